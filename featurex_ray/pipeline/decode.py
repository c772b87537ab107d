"""Fetch and decode: units in, units with uint8 frames out. Knows no torch."""

import gc
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from featurex_ray.contained import ProcessLimits
from featurex_ray.errors import SampleError
from featurex_ray.job import Isolation, Partial
from featurex_ray.manifest import read_inline
from featurex_ray.media import nvdec_backend
from featurex_ray.media.contained import DECODER, ContainedDecoder
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.image import DecodedImage
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import (
    Decoded,
    DecodeOptions,
    InProcessDecoder,
    Outcome,
    SampleDecoder,
    SampleRequest,
)
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, DecodedVideo
from featurex_ray.pipeline import metrics
from featurex_ray.pipeline.source import PlannedSamples
from featurex_ray.pipeline.threads import limit_threads
from featurex_ray.pipeline.units import CUT, decoded_schema, error_struct, peak_bytes, to_table
from featurex_ray.storage import Fetched, Fetcher, ReadPolicy


@dataclass(frozen=True)
class DecodeSettings:
    """What fetching and decoding need to know of a job."""

    policy: ReadPolicy
    inputs: tuple[InputSpec, ...]  # the distinct preprocessings that the extractors want
    sampling: Sampling
    clip_seconds: float | None
    clip_stride_seconds: float | None
    decoder: DecoderPolicy
    isolation: Isolation = "process"
    limits: ProcessLimits = ProcessLimits()
    media_limits: MediaLimits = MediaLimits()
    partial: Partial = "use"
    handler: str = DECODER  # what decodes in the child; tests bring their own
    max_in_flight: int = 32

    def request(self, row: dict[str, Any], *, cut: bool = False) -> SampleRequest:
        """What this job wants of one unit; with `cut`, to know the sample's units."""
        first = row.get("first_clip")
        clips = None if first is None else range(first, first + row["num_unit_clips"])
        video = _clip_request(
            self.sampling,
            self.clip_seconds,
            self.clip_stride_seconds,
            row["start_seconds"],
            row["end_seconds"],
        )
        return _sample_request(video, row["media_type"], clips, cut)

    def sample_decoder(self) -> SampleDecoder:
        """Decodes in this process, or in a child of it."""
        options = DecodeOptions(self.inputs, self.decoder, self.media_limits, self.partial)
        if self.isolation == "none":
            return InProcessDecoder(options)
        return ContainedDecoder(options, limits=self.limits, handler=self.handler)


# Most requests of a run are equal, and one that is made once costs less to hand over than many.
_clip_request = lru_cache(maxsize=1024)(ClipRequest)
_sample_request = lru_cache(maxsize=1024)(SampleRequest)

Media = Fetched | SampleError


def fetch_media(rows: Sequence[dict[str, Any]], fetcher: Fetcher) -> dict[Any, Media]:
    """The encoded media of some rows, many fetches in flight, each object once.

    Returns:
        Media or its error, by `media_key(row)`.
    """
    wanted = {media_key(row): row for row in rows}
    inline = [key for key, row in wanted.items() if row["data_file"] is not None]
    remote = [key for key, row in wanted.items() if row["data_file"] is None]
    fetched: dict[Any, Media] = {}
    for index, media in fetcher.fetch_many([wanted[key]["uri"] for key in remote]):
        fetched[remote[index]] = media
    fetched.update(_read_inline(inline))
    return fetched


def media_key(row: dict[str, Any]) -> Any:
    """What tells one media object from another."""
    return row["uri"] if row["data_file"] is None else (row["data_file"], row["data_row"])


def _read_inline(keys: Sequence[tuple[str, int]]) -> dict[Any, Media]:
    start = time.perf_counter()
    media = read_inline(keys)
    seconds = (time.perf_counter() - start) / max(len(keys), 1)
    return {
        key: data if isinstance(data, SampleError) else Fetched(data, "inline", attempts=1, seconds=seconds)
        for key, data in zip(keys, media, strict=True)
    }


class CutUnits:
    """Cuts windowed videos into units that different actors decode at the same time.

    The clips are planned here on the exact timestamps of the whole video, and planned again
    from the same bytes by whoever decodes a unit, so that cutting changes no feature.
    """

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._fetcher = Fetcher(settings.policy, max_in_flight=settings.max_in_flight)
        self._decoder = settings.sample_decoder()

    def __call__(self, samples: pa.Table) -> pa.Table:
        """Planned samples -> units, at least one a sample, in the schema `CUT`."""
        rows = samples.to_pylist()
        media = fetch_media(rows, self._fetcher)
        found = [media[media_key(row)] for row in rows]
        requests = [
            (self._settings.request(row, cut=True), each.data)
            for row, each in zip(rows, found, strict=True)
            if isinstance(each, Fetched)
        ]
        outcomes = iter(self._decoder.decode(requests))
        units = [
            unit
            for row, each in zip(rows, found, strict=True)
            for unit in _units(row, next(outcomes).outcome if isinstance(each, Fetched) else each)
        ]
        return to_table(units, CUT)


def _units(row: dict[str, Any], outcome: Outcome) -> list[dict[str, Any]]:
    """A sample's units: the runs of its clips, or one of the whole sample."""
    if isinstance(outcome, SampleError):
        return [whole_unit(row) | {"error": error_struct(outcome)}]
    if not isinstance(outcome, list) or not outcome:
        return [whole_unit(row)]
    return [
        row
        | {
            "unit_index": index,
            "num_units": len(outcome),
            "first_clip": clips.start,
            "num_unit_clips": len(clips),
        }
        for index, clips in enumerate(outcome)
    ]


@lru_cache(maxsize=1)
def _cutter(settings: DecodeSettings) -> CutUnits:
    return CutUnits(settings)


def cut(slices: pa.Table, settings: DecodeSettings, samples: PlannedSamples) -> Iterator[pa.Table]:
    """`CutUnits` over slices of plans, as a plain function for a Ray task; a worker keeps it for the next."""
    yield from map(_cutter(settings), samples.read(slices))


def whole_unit(row: dict[str, Any]) -> dict[str, Any]:
    """The one unit of a sample that is not cut."""
    return row | {"unit_index": 0, "num_units": 1}


class DecodeMedia:
    """Units -> units with frames. Safe to call from two threads: one fetches, one decodes.

    Raises:
        RequestError: It is to decode by NVDEC, which this machine lacks; cutting needs none.
    """

    def __init__(self, settings: DecodeSettings) -> None:
        if "nvdec" in settings.decoder:
            nvdec_backend.check()
        limit_threads(1)  # one thread decodes, in the child; what is done here is little
        self._settings = settings
        self._fetcher = Fetcher(settings.policy, max_in_flight=settings.max_in_flight)
        self._schema = decoded_schema(len(settings.inputs))
        self._decoder = settings.sample_decoder()
        # Decoding takes the one CPU of this actor; the other thread's fetches overlap with it.
        self._decoding = threading.Lock()
        # A block's rows set off the garbage collector, again and again; what is here by now is none.
        gc.freeze()

    def __call__(self, units: pa.Table) -> pa.Table:
        """Units (or planned samples, which are units then) -> units with frames."""
        rows = [row if "unit_index" in row else whole_unit(row) for row in units.to_pylist()]
        start = time.perf_counter()
        media = fetch_media([row for row in rows if not row.get("error")], self._fetcher)
        # What fetching took of the actor's time; the objects of a block are fetched at the same time.
        return self.decode(rows, media, fetch_seconds=(time.perf_counter() - start) / max(len(rows), 1))

    def decode(
        self, units: list[dict[str, Any]], media: dict[Any, Media], *, fetch_seconds: float
    ) -> pa.Table:
        """Units with frames, of units and their media by `media_key`.

        Args:
            units: Rows in the schema `CUT`.
            media: What was fetched for those that have no error.
            fetch_seconds: What fetching took, a unit.
        """
        with self._decoding:
            decoded = self._decode(units, media)
            peak = max(peak_bytes(), self._decoder.peak_bytes())
        costs = {"fetch_seconds": fetch_seconds, "decode_peak_bytes": peak}
        decoded = [row | costs for row in decoded]
        metrics.count_decoded(decoded)
        return to_table(decoded, self._schema)

    def _decode(self, rows: list[dict[str, Any]], media: dict[Any, Media]) -> list[dict[str, Any]]:
        found = [None if row.get("error") else media[media_key(row)] for row in rows]
        requests = [
            (self._settings.request(row), each.data)
            for row, each in zip(rows, found, strict=True)
            if isinstance(each, Fetched)
        ]
        done = iter(self._decoder.decode(requests))
        return [
            row | _media_columns(each) | _outcome_columns(next(done))
            if isinstance(each, Fetched)
            else row | ({"error": error_struct(each)} if each else {})
            for row, each in zip(rows, found, strict=True)
        ]


class DecodeSlices(DecodeMedia):
    """Slices of plans -> their samples with frames; reads the plans itself.

    A task of its own for that would wait for a process: where actors hold all CPUs of a node, Ray ends
    the process of a task a second after it.
    """

    def __init__(self, settings: DecodeSettings, samples: PlannedSamples, samples_per_decode: int) -> None:
        super().__init__(settings)
        self._samples = samples
        self._num_rows = samples_per_decode

    def __call__(self, slices: pa.Table) -> Iterator[pa.Table]:
        """Rows of the schema `SLICE` -> tables of at most `samples_per_decode` samples."""
        for samples in self._samples.read(slices):
            for start in range(0, len(samples), self._num_rows):
                yield super().__call__(samples.slice(start, self._num_rows))


def _media_columns(media: Fetched) -> dict[str, Any]:
    return {
        "etag": media.etag,
        "media_sha256": hashlib.sha256(media.data).hexdigest(),
        "fetched_bytes": len(media.data),
    }


def _outcome_columns(done: Decoded) -> dict[str, Any]:
    outcome = done.outcome
    if isinstance(outcome, SampleError):
        columns: dict[str, Any] = {"error": error_struct(outcome)}
    elif isinstance(outcome, DecodedImage):
        columns = _image_columns(outcome)
    elif isinstance(outcome, DecodedVideo):
        columns = _video_columns(outcome)
    else:
        raise TypeError("units came out where frames were asked for")
    return columns | {"decode_seconds": done.seconds}


def _image_columns(image: DecodedImage) -> dict[str, Any]:
    return {
        "media_type": "image",
        "width": image.width,
        "height": image.height,
        "media_complete": image.complete,
        "num_clips": 1,
        "num_unit_clips": 1,
        "clips": [{"clip_index": 0, "num_frames": 1}],
        **_frame_columns(image.frames),
    }


def _video_columns(video: DecodedVideo) -> dict[str, Any]:
    return {
        "media_type": "video",
        "width": video.width,
        "height": video.height,
        "media_complete": video.complete,
        "num_clips": video.num_clips,
        "num_unit_clips": len(video.clips),
        "clips": [
            {
                "clip_index": clip.clip_index,
                "start_seconds": clip.start_seconds,
                "end_seconds": clip.end_seconds,
                "frame_pts_seconds": clip.frame_pts_seconds,
                "num_frames": len(clip.frame_pts_seconds),
            }
            for clip in video.clips
        ],
        **_frame_columns(video.frames),
    }


def _frame_columns(frames: Sequence[np.ndarray]) -> dict[str, memoryview]:
    return {f"frames_{i}": np.ascontiguousarray(array).data.cast("B") for i, array in enumerate(frames)}
