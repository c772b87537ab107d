"""Fetch and decode: units in, units with uint8 frames out. Knows no Ray and no torch."""

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from featurex_ray.errors import DecodeError, ProbeError, SampleError
from featurex_ray.manifest import read_inline
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.image import decode_image
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.sniff import Buffer, sniff
from featurex_ray.media.video import ClipRequest, cut_units, decode_video, plan_clips
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
    max_in_flight: int = 32

    def request(self, row: dict[str, Any]) -> ClipRequest:
        """The clips that this job wants of one sample."""
        return ClipRequest(
            sampling=self.sampling,
            clip_seconds=self.clip_seconds,
            clip_stride_seconds=self.clip_stride_seconds,
            start_seconds=row["start_seconds"],
            end_seconds=row["end_seconds"],
        )


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

    def __call__(self, samples: pa.Table) -> pa.Table:
        """Planned samples -> units, at least one a sample, in the schema `CUT`."""
        rows = samples.to_pylist()
        media = fetch_media(rows, self._fetcher)
        units = [unit for row in rows for unit in self._cut(row, media[media_key(row)])]
        return to_table(units, CUT)

    def _cut(self, row: dict[str, Any], media: Media) -> list[dict[str, Any]]:
        try:
            return self._windows(row, media)
        except SampleError as error:
            return [whole_unit(row) | {"error": error_struct(error)}]

    def _windows(self, row: dict[str, Any], media: Media) -> list[dict[str, Any]]:
        if isinstance(media, SampleError):
            raise media
        if media_type_of(media.data, row) == "image":
            return [whole_unit(row)]
        plan = plan_clips(media.data, self._settings.request(row))
        units = cut_units(plan, self._settings.inputs)
        return [
            row
            | {
                "unit_index": index,
                "num_units": len(units),
                "first_clip": clips.start,
                "num_unit_clips": len(clips),
            }
            for index, clips in enumerate(units)
        ]


def cut(samples: pa.Table, settings: DecodeSettings) -> pa.Table:
    """`CutUnits` as a plain function, for a Ray task."""
    return CutUnits(settings)(samples)


def whole_unit(row: dict[str, Any]) -> dict[str, Any]:
    """The one unit of a sample that is not cut."""
    return row | {"unit_index": 0, "num_units": 1}


def media_type_of(data: Buffer, row: dict[str, Any]) -> str:
    """What the bytes are; a manifest that says otherwise is wrong about this sample.

    Raises:
        ProbeError: The bytes are no listed format, or not what the manifest says.
    """
    found = sniff(data).media_type
    if row["media_type"] is not None and row["media_type"] != found:
        raise ProbeError(
            "media_type_mismatch", f"the manifest says {row['media_type']}, the bytes are of a {found}"
        )
    return found


class DecodeMedia:
    """Units -> units with frames. Safe to call from two threads: one fetches, one decodes."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._fetcher = Fetcher(settings.policy, max_in_flight=settings.max_in_flight)
        self._schema = decoded_schema(len(settings.inputs))
        # Decoding takes the one CPU of this actor; the other thread's fetches overlap with it.
        self._decoding = threading.Lock()

    def __call__(self, units: pa.Table) -> pa.Table:
        """Units (or planned samples, which are units then) -> units with frames."""
        rows = [row if "unit_index" in row else whole_unit(row) for row in units.to_pylist()]
        media = fetch_media([row for row in rows if not row.get("error")], self._fetcher)
        with self._decoding:
            decoded = [self._decode(row, media) for row in rows]
        peak = peak_bytes()
        return to_table([row | {"decode_peak_bytes": peak} for row in decoded], self._schema)

    def _decode(self, row: dict[str, Any], media: dict[Any, Media]) -> dict[str, Any]:
        if row.get("error"):
            return row
        found = media[media_key(row)]
        if isinstance(found, SampleError):
            return row | {"error": error_struct(found)}
        start = time.perf_counter()
        facts = {
            "etag": found.etag,
            "media_sha256": hashlib.sha256(found.data).hexdigest(),
            "fetched_bytes": len(found.data),
            "fetch_seconds": found.seconds,
        }
        decoded = self._decoded_or_error(row, found.data)
        return row | facts | decoded | {"decode_seconds": time.perf_counter() - start}

    def _decoded_or_error(self, row: dict[str, Any], data: Buffer) -> dict[str, Any]:
        try:
            if media_type_of(data, row) == "image":
                return self._image(data)
            return self._video(row, data)
        except SampleError as error:
            return {"error": error_struct(error)}
        except Exception as error:  # noqa: BLE001  the one boundary: a sample's failure becomes a row
            unforeseen = DecodeError("decoder_error", f"{type(error).__name__}: {error}")
            return {"error": error_struct(unforeseen)}

    def _image(self, data: Buffer) -> dict[str, Any]:
        image = decode_image(data, inputs=self._settings.inputs)
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

    def _video(self, row: dict[str, Any], data: Buffer) -> dict[str, Any]:
        first = row.get("first_clip")
        video = decode_video(
            data,
            self._settings.request(row),
            inputs=self._settings.inputs,
            clips=None if first is None else range(first, first + row["num_unit_clips"]),
            policy=self._settings.decoder,
        )
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
