"""FFmpeg through PyAV: reads the listed containers and codecs.

The timeline is read from the packets' headers. Frames are then decoded from the last keyframe
before each one that is wanted, and each frame that comes out on the way is held against the
timeline: same timestamps, same order, none missing, none more, a true intra frame first. Where
that fails (damage, AVI with packed B-frames, field pictures, mislabelled keyframes), that stretch
of the timeline is made anew from what the decoder in fact shows.

What is shown is what FFmpeg shows by default: edit lists honoured, the display matrix applied,
no deinterlacing, no stretching to the sample aspect ratio, no tone mapping. YUV becomes RGB by
the matrix and range that the stream names, BT.601 and limited range where it names none.
"""

import errno
import importlib
import itertools
import pkgutil
import struct
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple, NoReturn, cast

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from featurex_ray.errors import DecodeError, ProbeError
from featurex_ray.media.decoder import Shown, StreamHeader, Timeline, TimelineDisagreementError
from featurex_ray.media.limits import DEFAULT_LIMITS, MediaLimits
from featurex_ray.media.sniff import Buffer, BufferReader, Container

_DEMUXERS = {
    "mp4": "mov",
    "matroska": "matroska",
    "avi": "avi",
    "mpegts": "mpegts",
    "mpeg": "mpeg",
    "mpegvideo": "mpegvideo",
    "flv": "flv",
    "ogg": "ogg",
    "asf": "asf",
}
"""The only FFmpeg demuxers that ever see the bytes, by sniffed format."""

DECODERS = frozenset(
    {
        "h264", "hevc", "vvc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "libvpx", "libvpx-vp9",
        "mpeg1video", "mpeg2video", "mpegvideo", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263",
        "h263p", "h261", "flv", "vp6", "vp6f", "vp6a", "vp3", "theora", "wmv1", "wmv2", "wmv3", "vc1",
        "svq1", "svq3",
        "mjpeg", "mjpegb", "prores", "dnxhd", "cfhd", "dvvideo", "huffyuv", "ffvhuff", "ffv1", "utvideo",
        "magicyuv", "lagarith", "rawvideo", "v210", "png", "qtrle", "rpza", "cinepak", "msvideo1", "msrle",
        "tscc", "indeo3", "indeo4", "indeo5", "snow", "jpeg2000",
    }
)  # fmt: skip
"""The only FFmpeg decoders that are ever opened: those that cameras, editors and archives write."""

_HELD_BYTES = 64 << 20
"""Decoded frames that may be kept to spare a second decode of the same stretch."""

_REORDER_FRAMES = 16
"""The most frames by which any codec reorders."""

_TRANSPOSES = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Pillow's name for a display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y."""


_PROGRESSIVE = 1
"""FFmpeg's AV_FIELD_PROGRESSIVE: it alone, and 0 for unknown, is no order of two fields."""


def preload() -> None:
    """Import all of PyAV now, so that nothing has to be opened later."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name != "av.__main__":
            importlib.import_module(module.name)


class _Listed(NamedTuple):
    """What a packet's header says."""

    pts: int | None
    packet: int
    duration: int
    is_keyframe: bool
    is_discard: bool


class _Run(NamedTuple):
    """A stretch of the timeline made by decoding: frame `first + k` is the `skip + k`-th to come out."""

    packet: int
    skip: int
    first: int


@dataclass
class _Span:
    """Frames to decode from one keyframe on.

    Args:
        packet: Where decoding starts.
        ticks: The timeline's.
        due: The frame that must come out next.
        last: The last one that is wanted.
        wanted: Indices into the timeline.
        begins_intra: Whether the first frame to come out must be the keyframe itself.
    """

    packet: int
    ticks: np.ndarray
    due: int
    last: int
    wanted: set[int]
    begins_intra: bool

    @property
    def done(self) -> bool:
        return self.due > self.last

    def join(self, later: "_Span") -> None:
        """Go on into a span whose first packet came before this one was done."""
        self.last = later.last
        self.wanted |= later.wanted

    def take(self, frame: VideoFrame) -> int | None:
        """Hold a frame against the timeline; its index if it is wanted."""
        index, tick = self.due, frame.pts
        if self.done or (self.begins_intra and tick is not None and tick < self.ticks[index]):
            return None  # past the end, or shown before the keyframe: it may refer to what was left out
        if tick != self.ticks[index] or (self.begins_intra and not _is_intra(frame)):
            raise TimelineDisagreementError(f"tick {tick} came out, {self.ticks[index]} was due")
        self.begins_intra = False
        self.due += 1
        return index if index in self.wanted else None


class PyavDecoder:
    """The best video stream of some bytes.

    That is FFmpeg's choice (`av_find_best_stream`: the default flag, then frames, then bit rate),
    but never an attached picture. See `FrameDecoder`.

    Args:
        data: The whole encoded object.
        container: What `sniff` made of it.
        num_threads: Decoder threads.
        limits: What the header may claim.

    Raises:
        ProbeError: `undecodable` header, `no_video`.
        DecodeError: `unsupported_codec`, `too_large`, `no_frames`.
    """

    name = "pyav"

    def __init__(
        self,
        data: Buffer,
        container: Container,
        *,
        num_threads: int = 1,
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> None:
        self._data = data
        self._format = container.format
        self._num_threads = num_threads
        self._limits = limits
        self._reformatter = VideoReformatter()
        self._keyframes: list[tuple[int, int]] = []
        self._run: _Run | None = None
        self._held: list[VideoFrame] | None = None
        self.num_decoded = 0
        """Frames that came out of the decoder so far, wanted or not."""
        self.num_errors = 0
        """Packets that the demuxer or the decoder refused so far."""
        self.header, self.timeline = self._read_timeline()

    def frames(self, indices: np.ndarray) -> Iterator[Shown]:
        """Decode frames of the timeline; see `FrameDecoder`."""
        if self._run is not None:
            decoded = self._decode_run(self._run, indices)
        else:
            decoded = self._decode_spans(deque(self._spans(indices)))
        for index, frame in decoded:
            turn = _turn(frame)
            yield Shown(index, self._picture(frame, turn), not frame.is_corrupt, turn)

    def redecode(self, low: int, high: int) -> None:
        """Make the timeline's frames `low` to `high` (inclusive) anew, from what the decoder shows."""
        old = self.timeline
        beyond = high + _REORDER_FRAMES
        stop = int(old.ticks[beyond]) if beyond < len(old) else None
        _, packet = self._keyframe_before(int(old.ticks[low]))
        pts, _, sound = self._listen(packet, stop)
        if not sound and packet > 0:
            # Not what a keyframe should give, or timestamps that only make sense from the start.
            packet = 0
            pts, _, _ = self._listen(packet, stop)
        ticks = _in_order(pts)
        keys = np.isin(ticks, old.ticks[old.keyframes])
        kept = (ticks >= old.ticks[low]) & (ticks <= old.ticks[high])
        self._run = _Run(packet, skip=int(np.argmax(kept)) if kept.any() else 0, first=low)
        self.timeline = replace(
            old,
            ticks=np.concatenate([old.ticks[:low], ticks[kept], old.ticks[high + 1 :]]),
            keyframes=np.concatenate([old.keyframes[:low], keys[kept], old.keyframes[high + 1 :]]),
        )

    def _read_timeline(self) -> tuple[StreamHeader, Timeline]:
        header, time_base, ticks_per_frame, packets = self._list_packets()
        timed = sorted(packet for packet in packets if packet.pts is not None)
        self._keyframes = [(packet.pts or 0, packet.packet) for packet in timed if packet.is_keyframe]
        shown = [packet for packet in timed if not packet.is_discard]
        ticks = np.array([packet.pts for packet in shown], dtype=np.int64)
        keys = np.array([packet.is_keyframe for packet in shown], dtype=bool)
        if len(timed) < len(packets) or np.any(np.diff(ticks) <= 0):
            self._run = _Run(packet=0, skip=0, first=0)
            pts, keys, _ = self._listen(0, None)
            ticks = _in_order(pts)
        if len(ticks) == 0:
            raise DecodeError("no_frames", f"the {header.codec} stream holds no frame that can be shown")
        duration = (shown[-1].duration if shown else 0) or ticks_per_frame
        return header, Timeline(ticks, keys, time_base, end_tick=int(ticks[-1]) + max(duration, 1))

    def _list_packets(self) -> tuple[StreamHeader, Fraction, int, list[_Listed]]:
        """The stream's header, time base, nominal ticks a frame, and packets from its first keyframe on."""
        with self._opened() as (container, stream):
            size = stream.codec_context.width * stream.codec_context.height
            packets: list[_Listed] = []
            for ordinal, packet in self._packets(container, stream):
                if packet is not None and not _is_hidden(packet, stream):
                    self._limits.check_frames(len(packets) + 1)
                    packets.append(
                        _Listed(
                            packet.pts, ordinal, packet.duration or 0, packet.is_keyframe, packet.is_discard
                        )
                    )
            self._limits.check_ratio(num_pixels=size * len(packets), num_bytes=len(self._data))
            header = _header(container, stream, self._format, packets)
            time_base = Fraction(stream.time_base or Fraction(1, av.time_base))
            rate = stream.average_rate
        first = next((place for place, packet in enumerate(packets) if packet.is_keyframe), 0)
        return header, time_base, round(1 / (rate * time_base)) if rate else 1, packets[first:]

    def _keyframe_before(self, tick: int) -> tuple[int, int]:
        """Tick and packet of the last keyframe at or before a tick; else of the first one."""
        place = bisect_right(self._keyframes, tick, key=lambda keyframe: keyframe[0]) - 1
        return self._keyframes[max(place, 0)] if self._keyframes else (tick, 0)

    def _spans(self, indices: np.ndarray) -> Iterator[_Span]:
        """What to decode for some frames: one span for each keyframe that leads to any of them."""
        ticks = self.timeline.ticks
        leads = [(self._keyframe_before(int(ticks[index])), int(index)) for index in indices]
        for (key_tick, packet), group in itertools.groupby(leads, key=lambda lead: lead[0]):
            wanted = [index for _, index in group]
            low = min(int(np.searchsorted(ticks, key_tick)), wanted[0])
            yield _Span(packet, ticks, low, wanted[-1], set(wanted), bool(ticks[low] == key_tick))

    def _decode_spans(self, spans: deque[_Span]) -> Iterator[tuple[int, VideoFrame]]:
        """Go through the packets once, decoding only what the spans ask for."""
        span: _Span | None = None
        with self._opened() as (container, stream):
            for ordinal, packet in self._packets(container, stream):
                if spans and ordinal >= spans[0].packet:
                    later = spans.popleft()
                    if span is None:
                        span = later
                    else:
                        span.join(later)
                if span is None:
                    continue
                for frame in self._decode(stream, packet):
                    index = span.take(frame)
                    if index is not None:
                        yield index, frame
                if span.done:
                    if not spans:
                        return
                    span = None
                    stream.codec_context.flush_buffers()
        raise TimelineDisagreementError("the packets ended before all frames had come out")

    def _decode_run(self, run: _Run, indices: np.ndarray) -> Iterator[tuple[int, VideoFrame]]:
        """Frames of a stretch that was made by decoding, by how many came out before them."""
        wanted = {run.skip + int(index) - run.first: int(index) for index in indices}
        frames = self._shown_from(run.packet) if self._held is None else iter(self._held)
        for ordinal, frame in enumerate(frames):
            if ordinal in wanted:
                yield wanted.pop(ordinal), frame
            if not wanted:
                return
        raise TimelineDisagreementError("fewer frames came out than the time before")

    def _listen(self, packet: int, stop: int | None) -> tuple[list[int | None], np.ndarray, bool]:
        """What the decoder shows from a packet on, up to tick `stop`.

        Returns:
            Timestamps as they come out, (N,) bool of keyframes, and whether this is what
            decoding from a keyframe should look like.
        """
        pts: list[int | None] = []
        keys: list[bool] = []
        begins_intra = False
        self._held, held_bytes = [], 0
        for frame in self._shown_from(packet):
            if stop is not None and frame.pts is not None and frame.pts > stop:
                break
            self._limits.check_frames(len(pts) + 1)
            pts.append(frame.pts)
            keys.append(frame.key_frame)
            begins_intra = begins_intra or (len(pts) == 1 and _is_intra(frame))
            held_bytes += sum(plane.buffer_size for plane in frame.planes)
            if self._held is not None:
                self._held.append(frame)
            if held_bytes > _HELD_BYTES:
                self._held = None
        known = [tick for tick in pts if tick is not None]
        ascending = len(known) == len(pts) and all(a < b for a, b in itertools.pairwise(known))
        return pts, np.array(keys, dtype=bool), ascending and begins_intra

    def _shown_from(self, first: int) -> Iterator[VideoFrame]:
        with self._opened() as (container, stream):
            for ordinal, packet in self._packets(container, stream):
                if ordinal >= first:
                    yield from self._decode(stream, packet)

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The bytes with the right demuxer, and nothing else: no other file, no network."""
        codec_options = {"codec_whitelist": ",".join(DECODERS)}
        options = codec_options | {
            "format_whitelist": _DEMUXERS[self._format],
            "protocol_whitelist": "",
        }
        try:
            container = av.open(
                BufferReader(self._data),
                "r",
                format=_DEMUXERS[self._format],
                options=options,
                metadata_errors="replace",
                io_open=_refuse,
            )
        except av.FFmpegError as error:
            _refuse_exhaustion(error)
            raise ProbeError("undecodable", f"{self._format} header: {error.strerror}") from error
        with container:
            stream = _best_stream(container)
            self._check(container, stream)
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
            context = stream.codec_context
            # Only here: told to the demuxer, it would have the header's size come out as 0x0.
            context.options = codec_options | {"max_pixels": str(self._limits.max_pixels)}
            context.thread_type = "AUTO" if self._num_threads > 1 else "SLICE"
            context.thread_count = self._num_threads
            yield container, stream

    def _packets(
        self, container: InputContainer, stream: VideoStream
    ) -> Iterator["tuple[int, Packet[VideoStream] | None]"]:
        """The stream's packets with their place in the file; at the end None, which drains a decoder."""
        try:
            for ordinal, packet in enumerate(container.demux(stream)):
                if packet.size:
                    yield ordinal, packet
        except av.FFmpegError as error:
            _refuse_exhaustion(error)
            self.num_errors += 1
        yield sys.maxsize, None

    def _decode(self, stream: VideoStream, packet: "Packet[VideoStream] | None") -> list[VideoFrame]:
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            _refuse_exhaustion(error)
            self.num_errors += 1
            return []
        self.num_decoded += len(frames)
        return frames

    def _check(self, container: InputContainer, stream: VideoStream) -> None:
        """Refuse what the header says already is too large, or of a codec that isn't listed."""
        seconds = container.duration / av.time_base if container.duration is not None else None
        self._limits.check_container(num_streams=len(container.streams), seconds=seconds)
        context = stream.codec_context
        if context is None:
            raise DecodeError("unsupported_codec", "FFmpeg has no decoder for the video stream")
        if context.codec.name not in DECODERS:
            raise DecodeError("unsupported_codec", f"the codec {context.codec.name} is not on the list")
        self._limits.check_size(context.width, context.height)

    def _picture(self, frame: VideoFrame, turn: Image.Transpose | None) -> Image.Image:
        """Convert to RGB and turn upright."""
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        except av.FFmpegError as error:
            _refuse_exhaustion(error)
            raise DecodeError("unsupported_codec", f"{frame.format.name} pixels: {error.strerror}") from error
        plane = rgb.planes[0]
        pixels = np.frombuffer(plane, np.uint8)  # type: ignore[call-overload]  # a buffer, which PyAV's stubs don't say
        image = Image.frombuffer("RGB", (rgb.width, rgb.height), pixels, "raw", "RGB", plane.line_size, 1)
        return image if turn is None else image.transpose(turn)


def _refuse(url: str, *_: object) -> NoReturn:
    raise ProbeError("unsupported_container", f"the container asks for another file: {url!r}")


def _best_stream(container: InputContainer) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise ProbeError("no_video", "there is no video stream, only sound, pictures or data")
    return stream


def _refuse_exhaustion(error: av.FFmpegError) -> None:
    """Memory that runs out is not damage: what FFmpeg couldn't hold would be left out in silence."""
    if error.errno == errno.ENOMEM:
        raise DecodeError("too_large", f"out of memory: {error.strerror}") from error


def _header(
    container: InputContainer, stream: VideoStream, container_format: str, packets: list[_Listed]
) -> StreamHeader:
    videos = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
    context = stream.codec_context
    return StreamHeader(
        container=container_format,
        codec=context.codec.canonical_name,
        pixel_format=context.pix_fmt,
        width=context.width,
        height=context.height,
        num_video_streams=len(videos),
        num_discarded_packets=sum(packet.is_discard for packet in packets),
        is_interlaced=context.field_order > _PROGRESSIVE,
    )


def _is_hidden(packet: "Packet[VideoStream]", stream: VideoStream) -> bool:
    """Whether a packet holds a frame that is never shown: VP8's alternate references."""
    return stream.codec_context.name in ("vp8", "libvpx") and not (memoryview(packet)[0] >> 4) & 1


def _is_intra(frame: VideoFrame) -> bool:
    # With intra refresh H.264's first whole picture is called a keyframe, but isn't exact.
    is_unknown = frame.pict_type == PictureType.NONE
    return frame.pict_type == PictureType.I or (is_unknown and frame.key_frame)


def _turn(frame: VideoFrame) -> Image.Transpose | None:
    """How the frame must be turned to stand upright."""
    try:
        matrix = cast("Mapping[SideDataType, bytes]", frame.side_data)[SideDataType.DISPLAYMATRIX]
    except KeyError:
        return None
    return _TRANSPOSES.get(_quarter_turns(bytes(matrix)))


def _quarter_turns(matrix: bytes) -> tuple[int, int, int, int]:
    """A display matrix's a, b, c, d as -1, 0 or 1; other angles than quarter turns round to one."""
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    scale = max(abs(a), abs(b), abs(c), abs(d), 1)
    return round(a / scale), round(b / scale), round(c / scale), round(d / scale)


def _in_order(pts: list[int | None]) -> np.ndarray:
    """Ascending ticks for frames in the order in which the decoder showed them.

    AVI's packed B-frames come with the right timestamps on the wrong frames: sorting puts them
    right. Where some are missing or come twice, they are counted on from the frame before.
    """
    known = [tick for tick in pts if tick is not None]
    ticks = np.sort(np.array(known, dtype=np.int64))
    steps = np.diff(ticks)
    if len(known) == len(pts) and np.all(steps > 0):
        return ticks
    step = int(np.median(steps[steps > 0])) if np.any(steps > 0) else 1
    counted: list[int] = []
    for tick in pts:
        floor = counted[-1] if counted else (tick or 0) - step
        counted.append(tick if tick is not None and tick > floor else floor + step)
    return np.array(counted, dtype=np.int64)
