"""Where an extractor looks: its attention drawn over an image, or beneath the frames of a video."""

import io
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featurex_ray.errors import RequestError, SampleError
from featurex_ray.media.image import decode_image
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, decode_video
from featurex_ray.models.embed import Embedder, Features
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.storage import Fetcher, ReadPolicy, redact

_COLOURS = "magma"
_OPACITY = 0.55
_FRAMES_A_ROW = 8


@dataclass(frozen=True)
class Seen:
    """Frames as the extractor saw them, and its weights.

    Attributes:
        frames: (T, H, W, 3) uint8, RGB.
        seconds: (T,) when each is shown; empty for an image.
        attention: (h, w) over cells, or (T,) over frames; sums to 1.
    """

    frames: np.ndarray
    seconds: np.ndarray
    attention: np.ndarray


def attend_image(resolved: ResolvedExtractor, uri: str) -> Seen:
    """Look at an image.

    Raises:
        RequestError: The image can't be used, or the extractor has no attention over an image.
    """
    _refuse_without_attention(resolved)
    if resolved.spec.media == "video":
        raise RequestError(f"{resolved.spec.name} takes videos: give --video")
    try:
        image = decode_image(_fetch(uri), inputs=[resolved.spec.input])
    except SampleError as error:
        raise RequestError(f"--image {redact(uri)}: {error}") from error
    frames = image.frames[0][None]
    return Seen(frames, np.empty(0), _attention(resolved, frames, uri))


def attend_video(resolved: ResolvedExtractor, uri: str, *, sampling: str | None = None) -> Seen:
    """Look at a video, whole.

    Args:
        resolved: The extractor.
        uri: The video.
        sampling: Which frames; by default as the extractor has it.

    Raises:
        RequestError: The video can't be used, or the extractor has no attention.
    """
    _refuse_without_attention(resolved)
    request = ClipRequest(Sampling.parse(sampling or resolved.spec.default_sampling))
    try:
        video = decode_video(_fetch(uri), request, inputs=[resolved.spec.input])
    except SampleError as error:
        raise RequestError(f"--video {redact(uri)}: {error}") from error
    frames = video.frames[0]
    return Seen(frames, video.clips[0].frame_pts_seconds, _attention(resolved, frames, uri))


def draw(seen: Seen) -> bytes:
    """A PNG: the weights over the picture, or the frames with a bar each.

    Weights over cells are drawn relative to their largest, and the title says how that compares
    with even attention.
    """
    figure = _over_cells(seen) if seen.attention.ndim == 2 else _over_frames(seen)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def _fetch(uri: str) -> bytes:
    with Fetcher(ReadPolicy(uri)) as fetcher:
        return bytes(fetcher.fetch(uri).data)


def _refuse_without_attention(resolved: ResolvedExtractor) -> None:
    if resolved.spec.attention_shape is None:
        raise RequestError(
            f"{resolved.spec.text} has no attention to look at; "
            "attention_convnet, attention_cnn and cnn_lstm have"
        )


def _attention(resolved: ResolvedExtractor, frames: np.ndarray, uri: str) -> np.ndarray:
    features: Features = Embedder(resolved, precision="fp32").embed(frames, np.array([len(frames)]))
    if features.errors:
        raise RequestError(f"{redact(uri)}: {features.errors[0]}")
    if features.attention is None or features.attention_shape is None:
        raise RequestError(f"{resolved.spec.text} gave no attention for {redact(uri)}")
    weights: np.ndarray = features.attention[0].reshape(features.attention_shape[0])
    return weights


def _over_cells(seen: Seen) -> Figure:
    """The picture alone, and under its weights; of a video the middle frame."""
    picture = seen.frames[len(seen.frames) // 2]
    figure = Figure(figsize=(6, 3.3), layout="constrained")
    plain, weighted = figure.subplots(1, 2)
    _show(plain, picture)
    _show(weighted, overlay(picture, seen.attention))
    most = seen.attention.max() * seen.attention.size
    weighted.set_title(f"largest weight {most:.1f} times the mean", fontsize=9)
    plain.set_title("as the extractor sees it", fontsize=9)
    return figure


def overlay(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A picture under its weights, bright where they are large.

    Args:
        picture: (H, W, 3) uint8.
        weights: (h, w), not negative; each covers its share of the picture.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = picture.shape[:2]
    rows = np.arange(height) * weights.shape[0] // height
    columns = np.arange(width) * weights.shape[1] // width
    relative = weights / max(float(weights.max()), 1e-12)
    colours = colormaps[_COLOURS](relative[rows[:, None], columns[None, :]])[..., :3]
    mixed = (1 - _OPACITY) * picture + _OPACITY * 255 * np.asarray(colours)
    return np.asarray(mixed.round(), np.uint8)


def _over_frames(seen: Seen) -> Figure:
    rows = -(-len(seen.frames) // _FRAMES_A_ROW)
    figure = Figure(figsize=(1.5 * _FRAMES_A_ROW, 2.2 * rows), layout="constrained")
    cells = figure.subplots(2 * rows, _FRAMES_A_ROW, height_ratios=[4, 1] * rows, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    for index, (frame, weight) in enumerate(zip(seen.frames, seen.attention, strict=True)):
        row, column = divmod(index, _FRAMES_A_ROW)
        picture, bar = cells[2 * row, column], cells[2 * row + 1, column]
        _show(picture, frame)
        picture.set_title(f"{seen.seconds[index]:.2f} s", fontsize=8)
        bar.barh([0], [weight], color="tab:orange")
        bar.set_xlim(0, float(seen.attention.max()))
        bar.text(0, -0.9, f"{weight:.3f}", fontsize=8, va="top")
    return figure


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture)
    axes.axis("off")
