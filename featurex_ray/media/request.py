"""What to make of one sample's bytes, and making it: the one place where its failure becomes a result."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from featurex_ray.errors import DecodeError, ProbeError, SampleError
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.image import DecodedImage, decode_image, set_bomb_check
from featurex_ray.media.limits import DEFAULT_LIMITS, MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.sniff import Buffer, sniff
from featurex_ray.media.video import ClipRequest, DecodedVideo, cut_units, decode_video, plan_clips

Partial = Literal["use", "fail"]


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode, the same for all samples of a run.

    Args:
        inputs: The distinct preprocessings that the extractors want.
        policy: Which video decoder.
        limits: What a header may claim.
        partial: What becomes of a video that breaks off or is damaged: `use` takes the part that
            can be decoded and marks it, `fail` makes it a failure. Broken-off images always fail.
    """

    inputs: tuple[InputSpec, ...]
    policy: DecoderPolicy = "auto"
    limits: MediaLimits = DEFAULT_LIMITS
    partial: Partial = "use"


@dataclass(frozen=True)
class SampleRequest:
    """What is wanted of one sample.

    Args:
        video: Which clips and frames, if it is a video.
        media_type: `image` or `video` where the manifest says so; bytes of the other are a failure.
        clips: Of all the video's clips, those to decode; None for all.
        cut: Don't decode: say how a video is cut into units.
        policy: Which video decoder, if not that of all others.
    """

    video: ClipRequest
    media_type: str | None = None
    clips: range | None = None
    cut: bool = False
    policy: DecoderPolicy | None = None


Outcome = DecodedImage | DecodedVideo | list[range] | SampleError
"""Units where `SampleRequest.cut` asked for them; an image is not cut, and has none."""


class Decoded(NamedTuple):
    """What became of a request, and the seconds that it took."""

    outcome: Outcome
    seconds: float


@dataclass(frozen=True)
class DecodedImages:
    """Decoded images by columns: of small ones, a row in Python costs more than its pixels.

    Attributes:
        place: (N,) int64: which of the requests, ascending.
        width: (N,) int64: of the sources in pixels, upright.
        height: (N,) int64: likewise.
        seconds: (N,) float64: that each took.
        frames: One (N, H, W, 3) uint8 RGB array per `InputSpec`.
    """

    place: np.ndarray
    width: np.ndarray
    height: np.ndarray
    seconds: np.ndarray
    frames: tuple[np.ndarray, ...]

    @classmethod
    def joined(cls, parts: Sequence["DecodedImages"], inputs: Sequence[InputSpec]) -> "DecodedImages":
        """All images of some blocks, in their order."""

        def column(name: str, kind: type) -> np.ndarray:
            return np.concatenate([np.empty(0, kind), *(getattr(part, name) for part in parts)])

        frames = tuple(
            np.concatenate(
                [np.empty((0, spec.height, spec.width, 3), np.uint8), *(part.frames[i] for part in parts)]
            )
            for i, spec in enumerate(inputs)
        )
        place, width, height = (column(name, int) for name in ("place", "width", "height"))
        return cls(place, width, height, column("seconds", float), frames)


@dataclass(frozen=True)
class DecodedBlock:
    """What became of some requests.

    Attributes:
        images: Those of them that became one.
        others: All else, by place.
    """

    images: DecodedImages
    others: dict[int, Decoded]

    @property
    def num_requests(self) -> int:
        """How many there were."""
        return len(self.images.place) + len(self.others)

    def one_by_one(self) -> list[Decoded]:
        """The same, in the requests' order."""
        images = self.images
        done = dict(self.others)
        for row, place in enumerate(images.place.tolist()):
            frames = tuple(array[row] for array in images.frames)
            image = DecodedImage(frames, int(images.width[row]), int(images.height[row]))
            done[place] = Decoded(image, float(images.seconds[row]))
        return [done[place] for place in range(len(done))]


class SampleDecoder(Protocol):
    """Decodes samples, in this process or another."""

    def decode_block(self, requests: Sequence[tuple[SampleRequest, Buffer]]) -> DecodedBlock:
        """Decode requests' bytes; a failure is an outcome too."""
        ...

    def decode(self, requests: Sequence[tuple[SampleRequest, Buffer]]) -> list[Decoded]:
        """The same, one by one and in order."""
        return self.decode_block(requests).one_by_one()

    def peak_bytes(self) -> int:
        """The most memory that a process of its own took so far; 0 where there is none."""
        ...


class InProcessDecoder(SampleDecoder):
    """Decodes here: for media that are trusted not to bring their decoder down."""

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        set_bomb_check(options.limits)

    def decode_block(self, requests: Sequence[tuple[SampleRequest, Buffer]]) -> DecodedBlock:
        """See `SampleDecoder`."""
        images: dict[int, DecodedImage] = {}
        others: dict[int, Decoded] = {}
        seconds = []
        for place, (request, data) in enumerate(requests):
            done = decode_sample(request, data, self._options)
            if isinstance(done.outcome, DecodedImage):
                images[place] = done.outcome
                seconds.append(done.seconds)
            else:
                others[place] = done
        found = DecodedImages(
            np.array([*images], int),
            np.array([image.width for image in images.values()], int),
            np.array([image.height for image in images.values()], int),
            np.array(seconds, float),
            tuple(
                np.array([image.frames[i] for image in images.values()], np.uint8).reshape(
                    -1, spec.height, spec.width, 3
                )
                for i, spec in enumerate(self._options.inputs)
            ),
        )
        return DecodedBlock(found, others)

    def peak_bytes(self) -> int:
        """See `SampleDecoder`."""
        return 0


def decode_sample(request: SampleRequest, data: Buffer, options: DecodeOptions) -> Decoded:
    """Decode one sample; whatever goes wrong is its outcome."""
    start = time.perf_counter()
    try:
        outcome = _outcome(request, data, options)
    except SampleError as error:
        outcome = error
    except MemoryError as error:
        outcome = DecodeError("too_large", f"out of memory {error}".rstrip())
    except Exception as error:  # noqa: BLE001  the one boundary: a sample's failure becomes a row
        outcome = DecodeError("decoder_error", f"{type(error).__name__}: {error}")
    return Decoded(outcome, time.perf_counter() - start)


def _outcome(request: SampleRequest, data: Buffer, options: DecodeOptions) -> Outcome:
    if _media_type(request, data) == "image":
        return [] if request.cut else decode_image(data, inputs=options.inputs, limits=options.limits)
    if request.cut:
        plan = plan_clips(data, request.video, limits=options.limits)
        _check_complete(plan.complete, options)
        return cut_units(plan, options.inputs)
    video = decode_video(
        data,
        request.video,
        inputs=options.inputs,
        clips=request.clips,
        policy=request.policy or options.policy,
        limits=options.limits,
    )
    _check_complete(video.complete, options)
    return video


def _check_complete(complete: bool, options: DecodeOptions) -> None:
    if not complete and options.partial == "fail":
        raise DecodeError(
            "truncated",
            "the video breaks off or is damaged; --partial use takes the part that can be decoded",
        )


def _media_type(request: SampleRequest, data: Buffer) -> str:
    """What the bytes are; a manifest that says otherwise is wrong about this sample."""
    found = sniff(data).media_type
    if request.media_type is not None and request.media_type != found:
        raise ProbeError(
            "media_type_mismatch", f"the manifest says {request.media_type}, the bytes are of a {found}"
        )
    return found
