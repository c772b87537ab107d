"""Fetch and decode: units in, units with uint8 frames out. Knows no torch."""

import gc
import hashlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyarrow as pa

from featurex_ray.contained import ProcessLimits
from featurex_ray.errors import FetchError, SampleError
from featurex_ray.job import Isolation, Partial
from featurex_ray.manifest import InlineMedia, read_inline
from featurex_ray.media import nvdec_backend
from featurex_ray.media.contained import DECODER, ContainedDecoder
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import (
    Decoded,
    DecodedBlock,
    DecodedImages,
    DecodeOptions,
    InProcessDecoder,
    Outcome,
    SampleDecoder,
    SampleRequest,
)
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.sniff import Buffer
from featurex_ray.media.video import ClipRequest, DecodedVideo
from featurex_ray.pipeline import metrics
from featurex_ray.pipeline.source import PlannedSamples
from featurex_ray.pipeline.threads import limit_threads
from featurex_ray.pipeline.units import (
    CUT,
    PLANNED,
    decoded_schema,
    error_struct,
    image_frames_column,
    peak_bytes,
    to_table,
)
from featurex_ray.storage import Fetched, Fetcher, ReadPolicy, redact


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

    def requests(self, units: pa.Table) -> list[SampleRequest]:
        """What this job wants of each unit."""
        asked = units.select(_ASKED)
        if all(column.null_count == len(units) for column in asked.columns):  # nothing of its own
            return [self.request(dict.fromkeys(_ASKED))] * len(units)
        return [self.request(row) for row in asked.to_pylist()]

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


def fetch_media(units: pa.Table, fetcher: Fetcher) -> list[Media | None]:
    """The encoded media of some rows, many fetches in flight, each object once.

    Args:
        units: In the schema `PLANNED` or `CUT`.
        fetcher: What reads objects.

    Returns:
        Media or its error, one a row; None for units that have an error already.
    """
    keys = _media_keys(units)
    wanted = dict.fromkeys(key for key in keys if key is not None)
    inline = [key for key in wanted if isinstance(key, InlineMedia)]
    remote = [key for key in wanted if isinstance(key, str)]
    fetched: dict[_Key | None, Media | None] = {None: None}
    for index, media in fetcher.fetch_many(remote):
        fetched[remote[index]] = media
    fetched.update(zip(inline, _read_inline(inline), strict=True))
    return [fetched[key] for key in keys]


_Key = str | InlineMedia  # a URI, or a sample of a manifest file


def _media_keys(units: pa.Table) -> list[_Key | None]:
    """What tells one media object from another; None where a unit has failed."""
    names = ("uri", "data_file", "data_row", "dataset", "sample_id")
    keys: list[_Key | None] = [
        uri if place[0] is None else InlineMedia(*place)
        for uri, *place in zip(*(units[name].to_pylist() for name in names), strict=True)
    ]
    if "error" in units.column_names:
        for failed in np.flatnonzero(units["error"].is_valid().to_numpy()):
            keys[failed] = None
    return keys


def _read_inline(keys: Sequence[InlineMedia]) -> list[Media]:
    start = time.perf_counter()
    media = read_inline(keys)
    seconds = (time.perf_counter() - start) / max(len(keys), 1)
    return [
        data if isinstance(data, SampleError) else Fetched(data, "", attempts=1, seconds=seconds)
        for data in media
    ]


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
        found = fetch_media(samples, self._fetcher)
        requests = [
            (self._settings.request(row, cut=True), each.data)
            for row, each in zip(rows, found, strict=True)
            if isinstance(each, Fetched)
        ]
        outcomes = iter(self._decoder.decode(requests))
        units = [
            unit
            for row, each in zip(rows, found, strict=True)
            for unit in _units(row, each, next(outcomes).outcome if isinstance(each, Fetched) else each)
        ]
        return to_table(units, CUT)


def _units(row: dict[str, Any], media: Media | None, outcome: Outcome | None) -> list[dict[str, Any]]:
    """A sample's units: the runs of its clips, or one of the whole sample."""
    if isinstance(outcome, SampleError):
        return [row | WHOLE | {"error": error_struct(outcome)}]
    if not isinstance(outcome, list) or not outcome or not isinstance(media, Fetched):
        return [row | WHOLE]
    etag = _etag(media)
    return [
        row
        | {
            "cut_etag": etag,
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


WHOLE = {"unit_index": 0, "num_units": 1}
"""The one unit of a sample that is not cut."""


def whole_units(samples: pa.Table) -> pa.Table:
    """Planned samples as units, in the schema `CUT`: none of them is cut."""
    num_rows = len(samples)
    added = {
        field.name: pa.repeat(pa.scalar(WHOLE.get(field.name), field.type), num_rows)
        for field in CUT
        if field.name not in PLANNED.names
    }
    return pa.table([added[name] if name in added else samples[name] for name in CUT.names], schema=CUT)


_ASKED = ["media_type", "start_seconds", "end_seconds", "first_clip", "num_unit_clips"]
"""What a unit can ask for."""

_CHANGES = ["media_type", "num_unit_clips", "error"]
"""Columns of a unit that decoding knows better, or adds to."""


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
        stays = {*CUT.names, "fetch_seconds", "decode_peak_bytes"} - {*_CHANGES}
        self._made = pa.schema([field for field in self._schema if field.name not in stays])
        self._decoder = settings.sample_decoder()
        # Decoding takes the one CPU of this actor; the other thread's fetches overlap with it.
        self._decoding = threading.Lock()

    def __call__(self, units: pa.Table) -> pa.Table:
        """Units (or planned samples, which are units then) -> units with frames."""
        if "unit_index" not in units.column_names:
            units = whole_units(units)
        start = time.perf_counter()
        media = _uncut(units, fetch_media(units, self._fetcher))
        # What fetching took of the actor's time; the objects of a block are fetched at the same time.
        return self.decode(units, media, fetch_seconds=(time.perf_counter() - start) / max(len(units), 1))

    def decode(self, units: pa.Table, media: Sequence[Media | None], *, fetch_seconds: float) -> pa.Table:
        """Units with frames, of units and their media.

        Args:
            units: In the schema `CUT`.
            media: As `fetch_media` has it.
            fetch_seconds: What fetching took, a unit.
        """
        fetched = [place for place, each in enumerate(media) if isinstance(each, Fetched)]
        requests = self._settings.requests(units)
        with self._decoding:
            done = self._decoder.decode_block([(requests[p], cast(Fetched, media[p]).data) for p in fetched])
            peak = max(peak_bytes(), self._decoder.peak_bytes())
        made = self._columns(units, media, np.array(fetched, np.int64), done)
        costs = {"fetch_seconds": fetch_seconds, "decode_peak_bytes": peak}
        columns = {name: units[name] for name in CUT.names}
        columns |= {name: made[name] for name in made.column_names}
        columns |= {name: pa.repeat(cost, len(units)) for name, cost in costs.items()}
        decoded = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        metrics.count_decoded(decoded)
        return decoded

    def _columns(
        self, units: pa.Table, media: Sequence[Media | None], fetched: np.ndarray, done: DecodedBlock
    ) -> pa.Table:
        """What decoding makes of units, less what stays as it is: of images by columns, of others by rows."""
        images = fetched[done.images.place]
        table = _image_table(done.images, [media[place] for place in images.tolist()], self._made)
        if len(images) == len(units):
            return table
        outcomes = {int(fetched[place]): outcome for place, outcome in done.others.items()}
        others = np.setdiff1d(np.arange(len(units)), images)
        rows = units.select(_CHANGES).take(pa.array(others)).to_pylist()
        made = [
            row | _columns_of(media[place], outcomes.get(place))
            for place, row in zip(others.tolist(), rows, strict=True)
        ]
        order = np.argsort(np.concatenate([images, others]))
        return pa.concat_tables([table, to_table(made, self._made)]).take(pa.array(order))


def _uncut(units: pa.Table, media: list[Media | None]) -> list[Media | None]:
    """The media of units; an error for those that are others than were cut."""
    for place in np.flatnonzero(units["cut_etag"].is_valid().to_numpy()).tolist():
        each = media[place]
        if isinstance(each, Fetched) and _etag(each) != units["cut_etag"][place].as_py():
            name = redact(units["uri"][place].as_py() or "")
            media[place] = FetchError("changed", f"{name!r} was replaced while its units were decoded")
    return media


class DecodeSlices(DecodeMedia):
    """Slices of plans -> their samples with frames; reads the plans itself.

    A task of its own for that would wait for a process: where actors hold all CPUs of a node, Ray ends
    the process of a task a second after it.
    """

    def __init__(self, settings: DecodeSettings, samples: PlannedSamples, samples_per_decode: int) -> None:
        super().__init__(settings)
        self._samples = samples
        self._num_rows = samples_per_decode
        # A block's rows set off the garbage collector, again and again; what is here by now is none. Only
        # in an actor of its own: beside torch, what is frozen is told as leaked when the process ends.
        gc.freeze()

    def __call__(self, slices: pa.Table) -> Iterator[pa.Table]:
        """Rows of the schema `SLICE` -> tables of at most `samples_per_decode` samples."""
        for samples in self._samples.read(slices):
            for start in range(0, len(samples), self._num_rows):
                yield super().__call__(samples.slice(start, self._num_rows))


_ONE_PICTURE = {
    "media_type": "image",
    "media_complete": True,  # one that breaks off is an error
    "num_clips": 1,
    "num_unit_clips": 1,
    "clips": [{"clip_index": 0, "num_frames": 1}],
}
"""What all images have in common."""


def _image_table(images: DecodedImages, media: Sequence[Media | None], schema: pa.Schema) -> pa.Table:
    if not media:
        return schema.empty_table()  # pyarrow can't repeat nested values no times
    fetched = cast(Sequence[Fetched], media)
    hashes = [_sha256(each.data) for each in fetched]
    columns: dict[str, Any] = {
        "etag": [each.etag or hashed for each, hashed in zip(fetched, hashes, strict=True)],
        "media_sha256": hashes,
        "fetched_bytes": [len(each.data) for each in fetched],
        "width": images.width,
        "height": images.height,
        "decode_seconds": images.seconds,
    }
    made = {f"frames_{i}": image_frames_column(each) for i, each in enumerate(images.frames)}
    for field in schema:
        if field.name in columns:
            made[field.name] = pa.array(columns[field.name], field.type)
        elif field.name not in made:
            made[field.name] = pa.repeat(pa.scalar(_ONE_PICTURE.get(field.name), field.type), len(fetched))
    return pa.table([made[name] for name in schema.names], schema=schema)


def _columns_of(media: Media | None, done: Decoded | None) -> dict[str, Any]:
    """Of a unit that isn't an image; one without media has failed before."""
    if media is None:
        return {}
    if isinstance(media, SampleError):
        return {"error": error_struct(media)}
    hashed = _sha256(media.data)
    columns: dict[str, Any] = {
        "etag": media.etag or hashed,
        "media_sha256": hashed,
        "fetched_bytes": len(media.data),
    }
    if done is None:
        raise TypeError("no outcome of media that are there")
    # Of one that lost its decoder nobody knows them, and a sum over all must not become unknown for it.
    columns["decode_seconds"] = None if math.isnan(done.seconds) else done.seconds
    if isinstance(done.outcome, SampleError):
        return columns | {"error": error_struct(done.outcome)}
    if isinstance(done.outcome, DecodedVideo):
        return columns | _video_columns(done.outcome)
    raise TypeError("units came out where frames were asked for")


def _etag(media: Fetched) -> str:
    """Of servers that send none, and of inline media, the hash: units of two generations must not mix."""
    return media.etag or _sha256(media.data)


def _sha256(data: Buffer) -> str:
    return hashlib.sha256(data).hexdigest()


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
        **{f"frames_{i}": array for i, array in enumerate(video.frames)},
    }
