"""Decoding in a contained child process, and taking back only what could be true."""

import io
import math
import mmap
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
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
from featurex_ray.media.request import (
    Decoded,
    DecodedBlock,
    DecodedImages,
    DecodeOptions,
    Outcome,
    SampleDecoder,
    SampleRequest,
    decode_sample,
)
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


class ContainedDecoder(SampleDecoder):
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

    def decode_block(self, requests: Sequence[tuple[SampleRequest, Buffer]]) -> DecodedBlock:
        """See `SampleDecoder`."""
        requests = list(requests)
        images: list[DecodedImages] = []
        others: dict[int, Decoded] = {}
        losses: Counter[int] = Counter()
        waiting = deque(range(len(requests)))
        while waiting:
            batch = _batch(requests, waiting)
            try:
                for told in self._answers([requests[place] for place in batch]):
                    places = np.array([waiting.popleft() for _ in range(told.num_requests)])
                    images.append(replace(told.images, place=places[told.images.place]))
                    others |= {int(places[place]): done for place, done in told.others.items()}
            except ChildLostError as error:
                lost = batch[min(max(error.item, batch.index(waiting[0])), len(batch) - 1)]
                losses[lost] += 1
                requests[lost] = (replace(requests[lost][0], policy=self._second), requests[lost][1])
                if losses[lost] == _TRIES:
                    waiting.remove(lost)
                    others[lost] = Decoded(_failure(error), math.nan)
        return DecodedBlock(DecodedImages.joined(images, self._inputs), others)

    def peak_bytes(self) -> int:
        """See `SampleDecoder`."""
        return self.process.peak_bytes()

    def _answers(self, requests: Sequence[tuple[SampleRequest, Buffer]]) -> Iterator[DecodedBlock]:
        """What the child says of a batch, message by message, as far as it can be true."""
        answered = 0
        for told in self.process.run(requests):
            asked = [request for request, _ in requests[answered : answered + len(told)]]
            answers = _Answers(asked, self._inputs, self.process.outbox)
            try:
                yield answers.believed(told)
            except _IMPOSSIBLE as error:
                self.process.discard()
                wrong = answered + answers.first_wrong(told)
                raise ChildLostError("crashed", f"gave an impossible answer: {error}", wrong) from error
            answered += len(told)


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


_IMPOSSIBLE = (ValueError, TypeError, IndexError, KeyError, OverflowError)


class _Answers:
    """What the child may say of some requests; all of it is checked before anything is made of it."""

    def __init__(
        self, requests: Sequence[SampleRequest], inputs: Sequence[InputSpec], outbox: mmap.mmap
    ) -> None:
        self._requests = requests
        self._inputs = inputs
        self._outbox = outbox

    def believed(self, told: list[Any]) -> DecodedBlock:
        """Answers as outcomes, their arrays copied out of shared memory.

        Raises:
            ValueError: One can't be true; other errors of wrong types likewise.
        """
        others: dict[int, Decoded] = {}
        places, images = [], []
        for place, (each, request) in enumerate(zip(told, self._requests, strict=True)):
            if each[0] == "image" and not request.cut:
                places.append(place)
                images.append(each)
            else:
                others[place] = self._other(each, request)
        return DecodedBlock(self._images(places, images), others)

    def first_wrong(self, told: list[Any]) -> int:
        """Which of some answers, that can't all be true, is the first that can't."""
        for place, request in enumerate(self._requests):
            try:
                _Answers([request], self._inputs, self._outbox).believed(told[place : place + 1])
            except _IMPOSSIBLE:
                return place
        return len(self._requests)

    def _images(self, places: list[int], told: list[list[Any]]) -> DecodedImages:
        _, widths, heights, complete, starts, seconds = zip(*told, strict=True) if told else ((),) * 6
        if {*map(type, (*widths, *heights, *starts))} - {int} or {*map(type, seconds)} - {float}:
            raise ValueError("an image without facts")
        size, start = np.array([widths, heights], np.int64), np.array(starts, np.int64)
        taken = np.array(seconds, float)
        if not (((size >= 1) & (size <= _MOST)).all() and ((taken >= 0) & (taken < math.inf)).all()):
            raise ValueError("an image of an impossible size or time")
        if any(each is not True for each in complete):
            raise ValueError("an image that isn't whole")
        width, height = size
        return DecodedImages(np.array(places, np.int64), width, height, taken, self._frames(start))

    def _frames(self, start: np.ndarray) -> tuple[np.ndarray, ...]:
        """Images' frames for each input, of where in the outbox they begin."""
        ends = np.cumsum([0, *(spec.frame_bytes for spec in self._inputs)]).tolist()
        if not ((start >= HEADER_BYTES) & (start <= len(self._outbox) - ends[-1])).all():
            raise ValueError("results that lie outside of their memory")
        memory = np.frombuffer(self._outbox, np.uint8)
        parts = np.empty((len(start), ends[-1]), np.uint8)
        for part, first in zip(parts, start.tolist(), strict=True):
            part[:] = memory[first : first + ends[-1]]
        return tuple(
            parts[:, first:last].reshape(-1, spec.height, spec.width, 3)
            for spec, (first, last) in zip(self._inputs, pairwise(ends), strict=True)
        )

    def _other(self, told: list[Any], request: SampleRequest) -> Decoded:
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
        if kind == "video":
            return Decoded(_video(told, request, self._inputs, self._outbox), seconds)
        raise ValueError("an outcome of no kind")


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
