"""Frames to features on a device: batches, precision, and what becomes of clips that don't work out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from featurex_ray.errors import ExtractError
from featurex_ray.models.build import Extractor, build
from featurex_ray.models.inference import for_inference, keep_freed_memory
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.models.spec import ExtractorSpec

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BATCH_PIXELS = {"cpu": 8 * 224 * 224, "cuda": 128 * 224 * 224}
_MAX_BATCH_FRAMES = 4096

_Call = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
_Embedded = tuple[np.ndarray, np.ndarray | None]


@runtime_checkable
class TwoStage(Protocol):
    """A temporal extractor that sees each frame alone first, such as `cnn_lstm`.

    Its frames then go through the device in batches that don't care where clips begin.
    """

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Vectors (B, E) of frames (B, 3, H, W)."""

    def embed_clips(self, vectors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features, and attention where there is one, of the vectors (B, T, E) of whole clips."""


@dataclass(frozen=True)
class Features:
    """The features of N clips.

    Attributes:
        feature: (N, D) float32; rows of clips with an error mean nothing.
        attention: One flat float32 array a clip, each summing to 1; None without attention.
        attention_shape: One shape a clip, such as (7, 7), or (16,) for one weight a frame.
        errors: Clips that could not be embedded, by their place.
    """

    feature: np.ndarray
    attention: list[np.ndarray] | None
    attention_shape: list[tuple[int, ...]] | None
    errors: dict[int, ExtractError] = field(default_factory=dict)

    @property
    def finite(self) -> np.ndarray:
        """(N,) bool: the clips without an error, whose features can be used."""
        finite = np.ones(len(self.feature), bool)
        finite[list(self.errors)] = False
        return finite


class Normalise:
    """Frames as they come from decoding to what an extractor takes; in extraction and training alike.

    Args:
        spec: Whose mean and std are used.
        device: Where the frames are.
    """

    def __init__(self, spec: ExtractorSpec, device: torch.device) -> None:
        std = torch.tensor(spec.std, device=device)
        # Of a whole row of pixels: three values at a time are no work for a CPU's vectors.
        self._scale = (1 / (255 * std)).repeat(spec.input.width)
        self._shift = (-torch.tensor(spec.mean, device=device) / std).repeat(spec.input.width)

    def __call__(self, frames: Tensor) -> Tensor:
        """(..., H, W, 3) uint8, RGB -> (..., 3, H, W) float32, normalised."""
        rows = frames.float().flatten(-2).mul_(self._scale).add_(self._shift)
        # Frames lie as H, W, 3: seen as 3, H, W that is channels_last without a copy.
        return rows.view(frames.shape).movedim(-1, -3)


class Embedder:
    """An extractor with its weights on a device. To be made where it runs, in the actor.

    Args:
        resolved: The extractor.
        precision: What `resolve_precision` gave.
        device: Such as "cuda:0"; by default a GPU where this process has one, else the CPU.
        batch_frames: Frames of a device batch; by default what suits device and input size.
            It is halved whenever the device's memory doesn't suffice.
        num_threads: CPU threads of the forward pass; by default torch's own choice.

    Attributes:
        network: On the device, in evaluation mode.
        normalise: Its frames, there.

    Raises:
        WeightsError: the weights don't fit.
    """

    def __init__(
        self,
        resolved: ResolvedExtractor,
        *,
        precision: Precision | str,
        device: str | None = None,
        batch_frames: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.spec = resolved.spec
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_frames = batch_frames or _default_batch(self.device.type, self.spec.input.height)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._dtype = _DTYPES[precision]
        network = for_inference(build(resolved.spec, resolved.weights), self._dtype)
        self.network = on_device(network, self.device)
        self.normalise = Normalise(self.spec, self.device)
        self._copies = _copy_stream(self.device)
        self.num_rows = self.num_slots = 0  # of device batches so far: what they held, what they had room for
        # TF32 keeps ten bits; the same frame would differ in the third digit between batch sizes. Off in any
        # precision: what a network computes outside of autocast, as `cnn_lstm` its states, is to be float32.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")

    def embed(self, frames: np.ndarray, clip_lengths: np.ndarray) -> Features:
        """Embed clips.

        Args:
            frames: (F, H, W, 3) uint8, RGB, the clips' frames one after the other.
            clip_lengths: (N,) integers, at least 1, summing to F; an image is a clip of one.

        Returns:
            One feature a clip. It doesn't depend on the other clips.

        Raises:
            ValueError: shapes that don't fit each other or the extractor.
        """
        lengths = np.asarray(clip_lengths, np.int64)
        self._check(frames, lengths)
        result = _Collected(len(lengths), self.spec.dimension, self.spec.attention_shape)
        if len(lengths) == 0:
            return result.features()
        embed = self._embed_frame_by_frame if self.spec.media == "any" else self._embed_whole_clips
        try:
            with torch.inference_mode():
                embed(frames, lengths, result)
        except torch.OutOfMemoryError:  # not even for a single frame
            result.fail(np.arange(len(lengths)), *_TOO_LARGE)
        return result.features()

    def autocast(self) -> torch.autocast:
        """In this context the network runs."""
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def _embed_frame_by_frame(self, frames: np.ndarray, lengths: np.ndarray, result: "_Collected") -> None:
        vectors, attention = self._run(lambda x: self.network(x.unsqueeze(1)), frames, np.arange(len(frames)))
        means = None if attention is None else _mean(attention, lengths)
        result.put(np.arange(len(lengths)), _mean(vectors, lengths), means)

    def _embed_whole_clips(self, frames: np.ndarray, lengths: np.ndarray, result: "_Collected") -> None:
        call: _Call = self.network
        items = frames
        if isinstance(self.network, TwoStage):
            call = self.network.embed_clips
            items, _ = self._run(self.network.embed_frames, frames, np.arange(len(frames)))
        starts = np.cumsum(lengths) - lengths
        for length in np.unique(lengths):
            clips = np.flatnonzero(lengths == length)
            if not self.spec.min_frames <= length <= (self.spec.max_frames or length):
                result.fail(clips, "wrong_clip_length", self._wrong_length(int(length)))
                continue
            try:
                result.put(clips, *self._run(call, items, starts[clips, None] + np.arange(length)))
            except torch.OutOfMemoryError:
                result.fail(clips, *_TOO_LARGE)

    def _run(self, call: _Call, items: np.ndarray, index: np.ndarray) -> _Embedded:
        """Call the model on `items[index]` in batches; halve them for as long as memory doesn't suffice.

        Args:
            call: (B, ...) -> (B, E), or that and attention (B, ...).
            items: (F, ...) uint8 frames or float32 vectors.
            index: (N,) or (N, T): which items make an input.

        Raises:
            torch.OutOfMemoryError: not even one input fits.
        """
        while True:
            batch = max(1, self.batch_frames // (index.shape[1] if index.ndim > 1 else 1))
            try:
                return self._run_batches(call, items, index, batch)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                self.batch_frames //= 2
                torch.cuda.empty_cache()

    def _run_batches(self, call: _Call, items: np.ndarray, index: np.ndarray, batch: int) -> _Embedded:
        features, attentions = [], []
        for rows, padded in _batches(index, batch):
            with self.autocast():
                output = call(self._upload(items, padded))
            feature, attention = output if isinstance(output, tuple) else (output, None)
            self.num_rows += rows
            self.num_slots += batch
            features.append(self._download(feature[:rows].float()))
            if attention is not None:
                attentions.append(self._download(attention[:rows].float()))
        if self._copies is not None:
            # Only now does anything wait for the device: until here batches were queued behind each other.
            torch.cuda.current_stream(self.device).synchronize()
        return torch.cat(features).numpy(), torch.cat(attentions).numpy() if attentions else None

    def _upload(self, items: np.ndarray, index: np.ndarray) -> Tensor:
        """`items[index]` on the device; uint8 frames become normalised (..., 3, H, W)."""
        shape = (*index.shape, *items.shape[1:])
        host = torch.empty(shape, dtype=_TORCH_TYPES[items.dtype.name], pin_memory=self._copies is not None)
        # "clip" lets take() write straight into `out`; the indices are in range anyway.
        np.take(items, index, axis=0, out=host.numpy(), mode="clip")
        moved = self._move(host)
        if moved.dtype != torch.uint8:
            return moved
        return self.normalise(moved)

    def _move(self, host: Tensor) -> Tensor:
        if self._copies is None:
            return host.to(self.device)
        with torch.cuda.stream(self._copies):  # copies run beside the batch before
            moved = host.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        moved.record_stream(current)
        return moved

    def _download(self, result: Tensor) -> Tensor:
        """To the host: from a GPU without waiting, so to be read once its stream has come so far."""
        if self._copies is None:
            return result.cpu()
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        return host.copy_(result, non_blocking=True)

    def _check(self, frames: np.ndarray, lengths: np.ndarray) -> None:
        wanted = (self.spec.input.height, self.spec.input.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != wanted or frames.dtype != np.uint8:
            raise ValueError(
                f"frames must be (F, {wanted[0]}, {wanted[1]}, 3) uint8, not {frames.shape} {frames.dtype}"
            )
        if lengths.ndim != 1 or (lengths < 1).any() or lengths.sum() != len(frames):
            raise ValueError(f"clip lengths must be positive and sum to {len(frames)} frames, not {lengths}")

    def _wrong_length(self, length: int) -> str:
        least, most = self.spec.min_frames, self.spec.max_frames
        wanted = f"exactly {least}" if least == most else f"at least {least}"
        return (
            f"{self.spec.name} takes clips of {wanted} frames and this one has {length}; "
            f"--sampling {self.spec.default_sampling} gives what it takes"
        )


_TORCH_TYPES = {"uint8": torch.uint8, "float32": torch.float32}
_TOO_LARGE = ("too_large", "the clip doesn't fit into the device's memory; take fewer frames with --sampling")


class _Collected:
    """Features of N clips as they come, with a check of what an extractor returns."""

    def __init__(self, num_clips: int, dimension: int, attention_shape: tuple[int, ...] | None) -> None:
        self._feature = np.zeros((num_clips, dimension), np.float32)
        self._attention: list[np.ndarray] = [np.empty(0, np.float32)] * num_clips
        self._shapes: list[tuple[int, ...]] = [(0,)] * num_clips
        self._wanted = attention_shape
        self._errors: dict[int, ExtractError] = {}

    def fail(self, clips: np.ndarray, code: str, message: str) -> None:
        self._errors |= {int(clip): ExtractError(code, message) for clip in clips}

    def put(self, clips: np.ndarray, feature: np.ndarray, attention: np.ndarray | None) -> None:
        if feature.shape != (len(clips), self._feature.shape[1]):
            raise ValueError(
                f"the extractor gave {feature.shape}, not {(len(clips), self._feature.shape[1])}"
            )
        if (attention is None) != (self._wanted is None):
            raise ValueError("the extractor gives attention and its spec has no shape for it, or the reverse")
        finite = np.isfinite(feature).all(axis=1)
        self._feature[clips] = feature
        if attention is not None:
            self._put_attention(clips, attention)
            finite &= np.isfinite(attention).reshape(len(clips), -1).all(axis=1)
        self.fail(clips[~finite], "non_finite", "the extractor gave NaN or infinite values")

    def _put_attention(self, clips: np.ndarray, attention: np.ndarray) -> None:
        shape = attention.shape[1:]
        if self._wanted and shape != self._wanted:
            raise ValueError(f"the extractor gave attention {shape}, its spec says {self._wanted}")
        for clip, weights in zip(clips, attention, strict=True):
            self._attention[clip], self._shapes[clip] = weights.ravel(), shape

    def features(self) -> Features:
        if self._wanted is None:
            return Features(self._feature, None, None, self._errors)
        return Features(self._feature, self._attention, self._shapes, self._errors)


def _default_batch(device: str, height: int) -> int:
    pixels = _BATCH_PIXELS.get(device, _BATCH_PIXELS["cpu"])
    return min(max(1, pixels // (height * height)), _MAX_BATCH_FRAMES)


def on_device(extractor: Extractor, device: torch.device) -> Extractor:
    """Move a network to a device, its convolutions in the memory layout that decoded frames have."""
    if not isinstance(extractor, nn.Module):
        return extractor
    module = extractor.to(device)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
        elif isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
    return cast("Extractor", module)


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)


def _batches(index: np.ndarray, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut rows into batches; the last one is padded with copies of its last row.

    Padded to the next eighth of a batch, below that to the next power of two, and never beyond the
    batch: a device sees few shapes, and little is computed for nothing.

    Yields:
        How many rows are real, and the padded rows.
    """
    step = max(1, batch // 8)
    for start in range(0, len(index), batch):
        rows = index[start : start + batch]
        padding = min(-len(rows) % min(step, 1 << (len(rows) - 1).bit_length()), batch - len(rows))
        yield len(rows), np.concatenate([rows, np.repeat(rows[-1:], padding, axis=0)])


def _mean(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Means over runs of rows, in float64, so that long clips lose nothing."""
    if len(lengths) == len(rows):
        return rows
    sums = np.add.reduceat(rows, np.cumsum(lengths) - lengths, axis=0, dtype=np.float64)
    means: np.ndarray = (sums / lengths.reshape(-1, *[1] * (rows.ndim - 1))).astype(np.float32)
    return means
