"""Decoding in a contained child process, and taking back only what could be true."""

import io
import math
import mmap
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import av
import numpy as np
from PIL import Image

from featurex_ray.contained import ChildLostError, ContainedProcess, ProcessLimits
from featurex_ray.contained.process import INBOX_BYTES
from featurex_ray.contained.template import HEADER_BYTES, Outbox
from featurex_ray.errors import DecodeError, ProbeError, SampleError
from featurex_ray.media import decord_backend, pyav_backend
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.image import DecodedImage, load_plugins, set_bomb_check
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import Decoded, DecodeOptions, Outcome, SampleRequest, decode_sample
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.sniff import Buffer
from featurex_ray.media.video import MAX_UNIT_BYTES, Clip, ClipRequest, DecodedVideo

DECODER = "featurex_ray.media.contained:Decoder"
_MOST_ORDERS = 1024
_TRIES = 2
_MOST = (1 << 31) - 1
_CODES = {"crashed": "decoder_crashed", "timeout": "timeout", "too_large": "too_large"}
_HELP = {
    "crashed": "",
    "timeout": "; --decode-seconds allows more",
    "too_large": "; --decode-memory allows more",
}
_STAGES: dict[str, type[SampleError]] = {"probe": ProbeError, "decode": DecodeError}


class ContainedDecoder:
    """Decodes samples in a child process; see `SampleDecoder`.

    A sample that loses its child twice (a crash, the deadline, memory) is a failure; those beside
    it are not affected. Where either decoder may be used, the second try is PyAV's: it reads all
    that decord reads, and is the one that is still maintained.

    Args:
        options: How to decode.
        limits: Of the child.
        handler: `module:name` of what decodes in the child.
    """

    def __init__(
        self,
        options: DecodeOptions,
        *,
        limits: ProcessLimits | None = None,
        handler: str = DECODER,
    ) -> None:
        self._inputs = options.inputs
        self._second: DecoderPolicy | None = "pyav" if options.policy == "decord+pyav" else None
        frame_bytes = sum(spec.frame_bytes for spec in options.inputs)
        self.process = ContainedProcess(
            handler,
            options,
            outbox_bytes=max(MAX_UNIT_BYTES, frame_bytes) + (4 << 20),
            limits=limits or ProcessLimits(),
        )

    def decode(self, requests: Sequence[tuple[SampleRequest, Buffer]]) -> list[Decoded]:
        """See `SampleDecoder`."""
        requests = list(requests)
        done: dict[int, Decoded] = {}
        losses: Counter[int] = Counter()
        waiting = deque(range(len(requests)))
        while waiting:
            batch = _batch(requests, waiting)
            try:
                for answers in self._answers([requests[place] for place in batch]):
                    done |= {waiting.popleft(): answer for answer in answers}
            except ChildLostError as error:
                lost = batch[min(max(error.item, batch.index(waiting[0])), len(batch) - 1)]
                losses[lost] += 1
                requests[lost] = (replace(requests[lost][0], policy=self._second), requests[lost][1])
                if losses[lost] == _TRIES:
                    waiting.remove(lost)
                    done[lost] = Decoded(_failure(error), math.nan)
        return [done[place] for place in range(len(requests))]

    def peak_bytes(self) -> int:
        """See `SampleDecoder`."""
        return self.process.peak_bytes()

    def _answers(self, requests: Sequence[tuple[SampleRequest, Buffer]]) -> Iterator[list[Decoded]]:
        """What the child says of a batch, as far as it can be true."""
        answered = 0
        for told in self.process.run(requests):
            answers = []
            for each in told:
                try:
                    answers.append(_believed(each, requests[answered][0], self._inputs, self.process.outbox))
                except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
                    self.process.discard()
                    raise ChildLostError(
                        "crashed", f"gave an impossible answer: {error}", answered
                    ) from error
                answered += 1
            yield answers


class Decoder:
    """What decodes in the child: `decode_sample`, its outcomes put into shared memory."""

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        load_plugins()
        set_bomb_check(options.limits)
        pyav_backend.preload()
        if "decord" in options.policy:
            decord_backend.preload()
        _rehearse(options)

    def __call__(self, item: SampleRequest, data: memoryview, outbox: Outbox) -> list[Any]:
        """Decode one sample; see `template.Handler`."""
        done = decode_sample(item, data, self._options)
        return [*_answer(done.outcome, outbox), done.seconds]


def _rehearse(options: DecodeOptions) -> None:
    """Decode a little of everything, so that whatever is imported late is imported before it can't be."""
    pixels = np.full((64, 64, 3), 128, np.uint8)
    image, video = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(image, "PNG")
    with av.open(video, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 64
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    clips = ClipRequest(Sampling("uniform", 3), clip_seconds=0.3)
    for data in (image.getvalue(), video.getvalue(), video.getvalue()[:-400]):
        # By PyAV, whatever the policy: decord alone refuses this codec before anything is decoded.
        for request in (SampleRequest(clips, policy="pyav"), SampleRequest(clips, cut=True)):
            decode_sample(request, data, options)


def _answer(outcome: Outcome, outbox: Outbox) -> list[Any]:
    """An outcome in plain JSON types, its arrays in shared memory."""
    if isinstance(outcome, SampleError):
        return ["error", outcome.stage, outcome.code, outcome.message[:1000]]
    if isinstance(outcome, list):
        return ["units", [[unit.start, unit.stop] for unit in outcome]]
    size = [outcome.width, outcome.height, outcome.complete]
    try:
        if isinstance(outcome, DecodedImage):
            return ["image", *size, outbox.put([_bytes(array) for array in outcome.frames])]
        table = np.array(
            [[c.clip_index, c.start_seconds, c.end_seconds, c.num_frames] for c in outcome.clips], np.float64
        )
        pts = np.concatenate([clip.frame_pts_seconds for clip in outcome.clips])
        place = outbox.put([_bytes(array) for array in (table, pts, *outcome.frames)])
    except MemoryError as error:
        return ["error", "decode", "too_large", str(error)]
    facts = [outcome.decoder, outcome.num_decoded, outcome.num_clips, len(table)]
    return ["video", *size, place, *facts]


def _bytes(array: np.ndarray) -> memoryview:
    return (array if array.flags.c_contiguous else np.ascontiguousarray(array)).data.cast("B")


def _believed(
    told: list[Any], request: SampleRequest, inputs: Sequence[InputSpec], outbox: mmap.mmap
) -> Decoded:
    """An answer as an outcome, its arrays copied out of shared memory.

    Raises:
        ValueError: It can't be true; other errors of wrong types likewise.
    """
    kind, seconds = told[0], told[-1]
    if type(seconds) is not float or not 0 <= seconds < math.inf:
        raise ValueError("no seconds")
    if kind == "error":
        _, stage, code, message, _ = told
        if not (str(code).isidentifier() and len(code) <= 40 and len(message) <= 1000):
            raise ValueError("an error without a code")
        return Decoded(_STAGES[stage](code, str(message)), seconds)
    if request.cut:
        return Decoded(_units(kind, told[1:-1]), seconds)
    if kind == "image":
        return Decoded(_image(told, inputs, outbox), seconds)
    if kind == "video":
        return Decoded(_video(told, request, inputs, outbox), seconds)
    raise ValueError("an outcome of no kind")


def _image(told: list[Any], inputs: Sequence[InputSpec], outbox: mmap.mmap) -> DecodedImage:
    _, width, height, complete, place, _ = told
    memory = _Memory(outbox, place)
    frames = tuple([memory.bytes(spec.frame_bytes).reshape(spec.height, spec.width, 3) for spec in inputs])
    return DecodedImage(frames, _count(width), _count(height), complete is True)


def _units(kind: str, facts: list[Any]) -> list[range]:
    (bounds,) = facts
    units = [range(_count(first, least=0), _count(last)) for first, last in bounds]
    ends = [0, *(unit.stop for unit in units)]
    if kind != "units" or any(unit.start != end or not unit for unit, end in zip(units, ends, strict=False)):
        raise ValueError("units that don't follow each other")
    return units


def _video(
    told: list[Any], request: SampleRequest, inputs: Sequence[InputSpec], outbox: mmap.mmap
) -> DecodedVideo:
    _, width, height, complete, place, decoder, num_decoded, num_clips, num_rows, _ = told
    memory = _Memory(outbox, place)
    if decoder not in ("pyav", "decord"):
        raise ValueError("a decoder of no name")
    table = memory.floats(_count(num_rows) * 4).reshape(-1, 4)
    lengths = table[:, 3].astype(np.int64)
    if np.any(lengths < 1) or np.any(lengths != table[:, 3]):
        raise ValueError("clips without frames")
    pts = memory.floats(int(lengths.sum()))
    indices = [int(index) for index in table[:, 0]]
    wanted = request.clips or range(_count(num_clips))
    # Lengths first: a number of clips that nobody could list must not be listed here.
    if len(indices) != len(wanted) or indices != list(wanted) or wanted.stop > _count(num_clips):
        raise ValueError("clips that were not asked for")
    times = np.split(pts, np.cumsum(lengths)[:-1])
    clips = tuple(
        Clip(index, float(row[1]), float(row[2]), shown)
        for index, row, shown in zip(indices, table, times, strict=True)
    )
    return DecodedVideo(
        clips=clips,
        num_clips=num_clips,
        frames=tuple(
            memory.bytes(len(pts) * spec.frame_bytes).reshape(-1, spec.height, spec.width, 3)
            for spec in inputs
        ),
        width=_count(width),
        height=_count(height),
        complete=complete is True,
        decoder=decoder,
        num_decoded=_count(num_decoded, least=0),
    )


class _Memory:
    """Reads arrays out of shared memory, one after another, inside its bounds."""

    def __init__(self, memory: mmap.mmap, place: Any) -> None:
        self._memory = memory
        self._place = _count(place, least=HEADER_BYTES)

    def floats(self, count: int) -> np.ndarray:
        """(count,) float64, all finite."""
        values = self.bytes(count * 8).view(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("times that are no numbers")
        return values

    def bytes(self, count: int) -> np.ndarray:
        """(count,) uint8, copied."""
        first, self._place = self._place, self._place + count
        if not 0 <= first <= self._place <= len(self._memory):
            raise ValueError("results that lie outside of their memory")
        return np.frombuffer(self._memory[first : self._place], np.uint8)


def _count(value: Any, *, least: int = 1) -> int:
    if type(value) is int and least <= value <= _MOST:
        return value
    raise ValueError(f"an impossible number: {value!r:.40}")


def _failure(error: ChildLostError) -> DecodeError:
    message = f"its decoder {error.detail}{_HELP[error.reason]}"
    return DecodeError(_CODES[error.reason], message, attempts=_TRIES)


def _batch(requests: Sequence[tuple[SampleRequest, Buffer]], waiting: Sequence[int]) -> list[int]:
    """The next requests whose bytes fit into the inbox together; at least one."""
    batch: list[int] = []
    num_bytes = 0
    for place in waiting:
        num_bytes += len(requests[place][1])
        if batch and (num_bytes > INBOX_BYTES or len(batch) == _MOST_ORDERS):
            break
        batch.append(place)
    return batch
