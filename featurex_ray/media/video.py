"""Videos to clips: which frames make them, how they are cut into units of work, and their pixels.

Times are the container's own presentation timestamps, as ffprobe, PyAV and torchcodec report
them. A sample's `start_seconds` and `end_seconds` are on the same clock, but for MPEG transport
and program streams, whose clocks start anywhere: there they count from the first frame, as the
display of a player does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from featurex_ray.errors import DecodeError, ProbeError, RequestError
from featurex_ray.media import decord_backend, nvdec_backend
from featurex_ray.media.decoder import (
    DecoderPolicy,
    FrameDecoder,
    StreamHeader,
    Timeline,
    TimelineDisagreementError,
)
from featurex_ray.media.limits import DEFAULT_LIMITS, MediaLimits
from featurex_ray.media.preprocess import InputSpec, fit
from featurex_ray.media.pyav_backend import PyavDecoder
from featurex_ray.media.sampling import Sampling, count_windows, select, windows
from featurex_ray.media.sniff import Buffer, Container, breaks_off, is_encrypted, sniff

MAX_UNIT_BYTES = 64 << 20
_MAX_WINDOWS = 1_000_000

_DECORD_TOLERANCE = 2
"""Of 255: by how much its pixels may differ from PyAV's; all that were measured are equal."""

_MIRRORED = {
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
}

_NVDEC_TOLERANCE = 4.0
"""Of 255: by how much its pixels may differ from PyAV's on average; it interpolates chroma in its own way."""

_FREE_CLOCKS = ("mpegts", "mpeg", "mpegvideo")
"""Formats whose timestamps start anywhere."""


@dataclass(frozen=True)
class ClipRequest:
    """What to take of a video.

    Args:
        sampling: Which frames of each clip.
        clip_seconds: Length of a clip; None makes the whole video one clip.
        clip_stride_seconds: From one clip's start to the next one's; None means `clip_seconds`.
        start_seconds: Use only what comes at or after this; None means the video's start.
        end_seconds: Use only what comes before this; None means the video's end.

    Raises:
        RequestError: A length that isn't positive, or an end before the start.
    """

    sampling: Sampling
    clip_seconds: float | None = None
    clip_stride_seconds: float | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, length in (
            ("clip_seconds", self.clip_seconds),
            ("clip_stride_seconds", self.clip_stride_seconds),
        ):
            if length is not None and not 0 < length < math.inf:
                raise RequestError(f"{name} must be positive, not {length}")
        if self.clip_seconds is None and self.clip_stride_seconds is not None:
            raise RequestError("clip_stride_seconds needs clip_seconds")
        start, end = self.start_seconds, self.end_seconds
        if start is not None and end is not None and start >= end:
            raise RequestError(f"start_seconds {start} is not before end_seconds {end}")


@dataclass(frozen=True)
class Clip:
    """One clip of a video and the frames that stand for it.

    Args:
        clip_index: Its place among the sample's clips.
        start_seconds: Of what it covers, `[start, end)`.
        end_seconds: Of what it covers.
        frame_pts_seconds: (T,) float64, ascending: when its frames are shown; a short clip
            repeats its last one.
    """

    clip_index: int
    start_seconds: float
    end_seconds: float
    frame_pts_seconds: np.ndarray

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.frame_pts_seconds)


@dataclass(frozen=True)
class ClipPlan:
    """The clips of a video, before any of its frames is decoded.

    Args:
        clips: All of them; a window in which no frame is shown makes none.
        complete: False when the container breaks off.
    """

    clips: tuple[Clip, ...]
    complete: bool


@dataclass(frozen=True)
class DecodedVideo:
    """The frames of some clips of a video.

    Args:
        clips: Those that were asked for.
        num_clips: How many clips the whole sample has.
        frames: One (sum of T, H, W, 3) uint8 RGB array per `InputSpec`: the clips' frames, one
            clip after another.
        width: Of the first frame that was used, in pixels, upright; the sample aspect ratio is
            not applied.
        height: Likewise.
        complete: False when the container breaks off, or a part of these clips could not be
            decoded as it should.
        decoder: `pyav`, `decord` or `nvdec`.
        num_decoded: Frames that PyAV had to decode for it.
    """

    clips: tuple[Clip, ...]
    num_clips: int
    frames: tuple[np.ndarray, ...]
    width: int
    height: int
    complete: bool
    decoder: str
    num_decoded: int


def resolve_policy(policy: DecoderPolicy) -> DecoderPolicy:
    """What a policy means on this machine: `auto` becomes `decord+pyav`, or `pyav` without decord.

    `nvdec` becomes `nvdec+pyav`: PyAV decodes what the card can't, or shows otherwise.

    Raises:
        RequestError: decord or torchcodec is asked for and not installed.
    """
    if policy == "auto":
        return "decord+pyav" if decord_backend.is_installed() else "pyav"
    if "decord" in policy and not decord_backend.is_installed():
        raise RequestError(f"decoder {policy!r} needs decord: pip install decord, or use 'pyav'")
    if "nvdec" in policy and not nvdec_backend.is_installed():
        raise RequestError(f"decoder {policy!r} needs torchcodec: pip install 'featurex-ray[nvdec]'")
    return "nvdec+pyav" if policy == "nvdec" else policy


def plan_clips(data: Buffer, request: ClipRequest, *, limits: MediaLimits = DEFAULT_LIMITS) -> ClipPlan:
    """Read a video's packet headers and lay out its clips; frames are only decoded where these don't tell.

    Raises:
        ProbeError: `empty`, `unsupported_container`, `truncated`, `undecodable`, `no_video`.
        DecodeError: `unsupported_codec`, `no_frames`, `too_large`.
    """
    container, decoder = _open(data, num_threads=1, limits=limits)
    layout = _Layout(container, decoder.timeline, request)
    clips = tuple(clip for clip, _ in layout.clips(decoder.timeline))
    return ClipPlan(clips, complete=decoder.num_errors == 0 and not breaks_off(data, container))


def cut_units(
    plan: ClipPlan, inputs: Sequence[InputSpec], *, max_unit_bytes: int = MAX_UNIT_BYTES
) -> list[range]:
    """Cut a video into runs of whole clips whose frames take at most `max_unit_bytes`.

    Raises:
        DecodeError: `too_large`: one clip alone takes more.
    """
    frame_bytes = sum(spec.frame_bytes for spec in inputs)
    units: list[range] = []
    begin, unit_bytes = 0, 0
    for index, clip in enumerate(plan.clips):
        clip_bytes = clip.num_frames * frame_bytes
        _check_bytes(clip_bytes, max_unit_bytes)
        if unit_bytes + clip_bytes > max_unit_bytes:
            units.append(range(begin, index))
            begin, unit_bytes = index, 0
        unit_bytes += clip_bytes
    return [*units, range(begin, len(plan.clips))]


def decode_video(
    data: Buffer,
    request: ClipRequest,
    *,
    inputs: Sequence[InputSpec],
    clips: range | None = None,
    policy: DecoderPolicy = "auto",
    num_threads: int = 1,
    limits: MediaLimits = DEFAULT_LIMITS,
    max_unit_bytes: int = MAX_UNIT_BYTES,
) -> DecodedVideo:
    """Decode the frames of some clips, each fitted to each input as it comes.

    Broken media: what can be decoded is used, and marked. Where frames that a clip asked for
    can't be decoded, its frames are chosen again among those that can.

    Args:
        data: The whole encoded object.
        request: Which clips and frames; the same for all units of a sample.
        inputs: What the models want; at least one.
        clips: Of all the sample's clips, those to decode; None for all.
        policy: Which decoder; `auto` and the names that `resolve_policy` gives.
        num_threads: Decoder threads.
        limits: What the header may claim.
        max_unit_bytes: The most that the fitted frames may take.

    Raises:
        ProbeError: `empty`, `unsupported_container`, `truncated`, `undecodable`, `no_video`.
        DecodeError: `unsupported_codec`, `no_frames`, `too_large`, `undecodable`.
        RequestError: The policy needs decord or torchcodec, which is not installed.
    """
    container, pyav = _open(data, num_threads=num_threads, limits=limits)
    layout = _Layout(container, pyav.timeline, request)
    unit = _Unit.of(layout.clips(pyav.timeline), clips)
    _check_bytes(unit.num_frames * sum(spec.frame_bytes for spec in inputs), max_unit_bytes)
    filled: _Filled | None = None
    whole = not breaks_off(data, container)
    policy = resolve_policy(policy)
    if _use_decord(policy, pyav.header, unit, whole=whole):
        filled = _try_decord(data, pyav, unit, inputs, num_threads)
    elif policy == "nvdec+pyav" and whole and nvdec_backend.reads_exactly(pyav.header):
        filled = _try_nvdec(data, pyav, unit, inputs)
    if filled is None:
        try:
            filled = _fill(pyav, unit, inputs)
        except TimelineDisagreementError:
            unit = _plan_again(pyav, layout, unit, clips)
            filled = _fill(pyav, unit, inputs)
    return DecodedVideo(
        clips=tuple(clip for clip, _ in unit.clips),
        num_clips=unit.num_clips,
        frames=filled.frames,
        width=filled.width,
        height=filled.height,
        complete=filled.intact and pyav.num_errors == 0 and whole,
        decoder=filled.decoder,
        num_decoded=pyav.num_decoded,
    )


class _Layout:
    """The windows of a request over one video: set once, whatever turns out to be decodable."""

    def __init__(self, container: Container, timeline: Timeline, request: ClipRequest) -> None:
        self._sampling = request.sampling
        first, end = float(timeline.pts_seconds[0]), timeline.end_seconds
        self._covered = f"[{first:.3f}, {end:.3f})"
        origin = first if container.format in _FREE_CLOCKS else 0.0
        if request.start_seconds is not None:
            first = max(first, origin + request.start_seconds)
        if request.end_seconds is not None:
            end = min(end, origin + request.end_seconds)
        self._windows = _windows(first, end, request) if first < end else []

    def clips(self, timeline: Timeline) -> list[tuple[Clip, np.ndarray]]:
        """The clips and, for each, its (T,) frames as indices into the timeline."""
        pts = timeline.pts_seconds
        chosen = [
            (window, select(pts, timeline.keyframes, self._sampling, window)) for window in self._windows
        ]
        clips = [(window, indices) for window, indices in chosen if len(indices)]
        if not clips:
            raise DecodeError(
                "no_frames", f"no frame for {self._sampling} in what was asked of {self._covered} s"
            )
        return [
            (Clip(place, start, end, pts[indices]), indices)
            for place, ((start, end), indices) in enumerate(clips)
        ]


def _windows(start: float, end: float, request: ClipRequest) -> list[tuple[float, float]]:
    if request.clip_seconds is None:
        return [(start, end)]
    clip_seconds = request.clip_seconds
    stride_seconds = request.clip_stride_seconds or clip_seconds
    count = count_windows(start, end, clip_seconds=clip_seconds, stride_seconds=stride_seconds)
    if count > _MAX_WINDOWS:
        raise DecodeError("too_large", f"{count:,} clips; a longer --clip-stride-seconds makes fewer")
    return windows(start, end, clip_seconds=clip_seconds, stride_seconds=stride_seconds)


@dataclass(frozen=True)
class _Unit:
    """The clips to decode, with their frames as indices into the timeline."""

    clips: list[tuple[Clip, np.ndarray]]
    num_clips: int

    @classmethod
    def of(cls, clips: list[tuple[Clip, np.ndarray]], wanted: range | None) -> "_Unit":
        if wanted is None:
            return cls(clips, len(clips))
        if not 0 <= wanted.start < wanted.stop <= len(clips):
            raise ValueError(f"clips {wanted} of a video that has {len(clips)}")
        return cls(clips[wanted.start : wanted.stop], len(clips))

    @property
    def num_frames(self) -> int:
        return sum(clip.num_frames for clip, _ in self.clips)


@dataclass(frozen=True)
class _Filled:
    frames: tuple[np.ndarray, ...]
    width: int
    height: int
    intact: bool
    decoder: str


def _fill(decoder: FrameDecoder, unit: _Unit, inputs: Sequence[InputSpec]) -> _Filled:
    """Decode a unit's frames, each once, into all the places that want it."""
    wanted = np.concatenate([indices for _, indices in unit.clips])
    frames = tuple(np.empty((len(wanted), spec.height, spec.width, 3), np.uint8) for spec in inputs)
    size, intact = (0, 0), True
    order = np.argsort(wanted, kind="stable")
    ascending = wanted[order]
    for shown in decoder.frames(np.unique(wanted)):
        places = order[slice(*np.searchsorted(ascending, [shown.index, shown.index + 1]))]
        for array, spec in zip(frames, inputs, strict=True):
            array[places] = fit(shown.image, spec)
        size = size if size[0] else shown.image.size
        intact = intact and shown.intact
    return _Filled(frames, *size, intact, decoder.name)


def _plan_again(pyav: PyavDecoder, layout: _Layout, unit: _Unit, wanted: range | None) -> _Unit:
    """Choose the unit's frames anew among those that its part of the video in fact shows."""
    first, last = unit.clips[0][0], unit.clips[-1][0]
    low, high = np.searchsorted(pyav.timeline.pts_seconds, [first.start_seconds, last.end_seconds])
    in_use = np.concatenate([indices for _, indices in unit.clips])
    pyav.redecode(min(int(low), int(in_use[0])), max(int(high) - 1, int(in_use.max())))
    clips = layout.clips(pyav.timeline)
    if len(unit.clips) == unit.num_clips:
        return _Unit.of(clips, None)
    if len(clips) != unit.num_clips:
        # The other units were numbered with it.
        raise DecodeError(
            "undecodable",
            f"no frame of a clip in [{first.start_seconds:.3f}, {last.end_seconds:.3f}) s can be decoded",
        )
    return _Unit.of(clips, wanted)


def _open(data: Buffer, *, num_threads: int, limits: MediaLimits) -> tuple[Container, PyavDecoder]:
    container = sniff(data)
    if container.media_type != "video":
        raise DecodeError("unsupported_codec", f"a {container.format} image, not a video")
    if is_encrypted(data, container):
        raise DecodeError("unsupported_codec", "the video is encrypted")
    try:
        return container, PyavDecoder(data, container, num_threads=num_threads, limits=limits)
    except ProbeError as error:
        if error.code == "undecodable" and breaks_off(data, container):
            raise ProbeError(
                "truncated", f"the {container.format} file breaks off; {error.message}"
            ) from error
        raise


def _use_decord(policy: DecoderPolicy, header: StreamHeader, unit: _Unit, *, whole: bool) -> bool:
    """Where the header promises exact frames and, but for the policy `decord`, reading on pays.

    Never where the file breaks off: decord was seen to end the whole process on opening one.
    """
    exact = decord_backend.reads_exactly(header)
    if policy == "decord" and not (exact and whole):
        flaw = (
            f"not frame-exact on this {header.codec} in {header.container}"
            if whole
            else "not safe on cut-off files"
        )
        raise DecodeError("unsupported_codec", f"decord is {flaw}; 'auto' is")
    last = max(int(indices[-1]) for _, indices in unit.clips)
    is_dense = 2 * unit.num_frames > last
    return policy == "decord" or (policy == "decord+pyav" and exact and whole and is_dense)


def _try_decord(
    data: Buffer, pyav: PyavDecoder, unit: _Unit, inputs: Sequence[InputSpec], num_threads: int
) -> _Filled | None:
    """decord's frames, or None where it doesn't see the video as PyAV does, as when it is damaged."""
    try:
        decord = decord_backend.DecordDecoder(data, pyav.timeline, num_threads=num_threads)
        filled = _fill(decord, unit, inputs)
        first = next(pyav.frames(unit.clips[0][1][:1]))
    except TimelineDisagreementError:
        return None
    if first.turn in _MIRRORED:  # which it doesn't know, and no header shows beforehand
        return None
    difference = np.abs(filled.frames[0][0].astype(int) - fit(first.image, inputs[0]))
    return filled if difference.max() <= _DECORD_TOLERANCE else None


def _try_nvdec(
    data: Buffer, pyav: PyavDecoder, unit: _Unit, inputs: Sequence[InputSpec], *, device: str = "cuda"
) -> _Filled | None:
    """The card's frames, or None where it doesn't see the video as PyAV does, or can't decode it."""
    # A whole picture that both decode alone; its colours tell whether they read YUV in the same way.
    first = int(min(indices[0] for _, indices in unit.clips))
    keyframe = np.flatnonzero(pyav.timeline.keyframes[: first + 1])[-1:]
    try:
        nvdec = nvdec_backend.NvdecDecoder(data, pyav.timeline, device=device)
        theirs, ours = (next(decoder.frames(keyframe)) for decoder in (nvdec, pyav))
        pictures = [fit(shown.image, inputs[0]) for shown in (theirs, ours)]
        # Whether a card turns pictures depends on how torchcodec was built; black ones wouldn't tell.
        if ours.turn is None and np.abs(np.subtract(*pictures, dtype=int)).mean() <= _NVDEC_TOLERANCE:
            return _fill(nvdec, unit, inputs)
    except (TimelineDisagreementError, StopIteration):
        return None
    return None


def _check_bytes(num_bytes: int, max_unit_bytes: int) -> None:
    if num_bytes > max_unit_bytes:
        raise DecodeError(
            "too_large",
            f"a clip's frames take {num_bytes:,} bytes, more than {max_unit_bytes:,}: "
            "a sparser --sampling or a shorter --clip-seconds helps",
        )
