"""The row that runs through the pipeline: one work unit, good or failed, its clips nested in it.

A unit is whole clips of one sample that are decoded together. It starts as a planned sample,
is cut where windows are asked for, gains frames in decoding, trades them for results in
extraction, and is unnested by the writer. Each stage adds columns; none drops a row.
"""

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from featurex_ray.contained.limits import status_bytes
from featurex_ray.errors import SampleError

ERROR = pa.struct(
    [
        pa.field("stage", pa.string()),
        pa.field("code", pa.string()),
        pa.field("message", pa.string()),
        pa.field("attempts", pa.int32()),
    ]
)

PLANNED = pa.schema(
    [
        pa.field("assignment", pa.int32()),  # which plans this row is work of
        pa.field("plan_row", pa.int32()),  # the sample's row in those plans
        pa.field("dataset", pa.string()),
        pa.field("sample_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("media_type", pa.string()),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field("data_file", pa.string()),
        pa.field("data_row", pa.int64()),
    ]
)

CUT = pa.schema(
    [
        *PLANNED,
        pa.field("unit_index", pa.int32()),
        pa.field("num_units", pa.int32()),
        pa.field("first_clip", pa.int32()),  # null: the unit is the whole sample
        pa.field("num_unit_clips", pa.int32()),
        pa.field("cut_etag", pa.string()),  # of the media that were cut; null: the unit is the whole sample
        pa.field("error", ERROR),
    ]
)

CLIP = pa.struct(
    [
        pa.field("clip_index", pa.int32()),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field("frame_pts_seconds", pa.list_(pa.float64())),
        pa.field("num_frames", pa.int32()),
    ]
)

MEDIA = [
    pa.field("etag", pa.string()),
    pa.field("media_sha256", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("media_complete", pa.bool_()),
    pa.field("num_clips", pa.int32()),
    pa.field("clips", pa.list_(CLIP)),
]

COSTS = [
    pa.field("fetched_bytes", pa.int64()),
    pa.field("fetch_seconds", pa.float64()),
    pa.field("decode_seconds", pa.float64()),
    pa.field("decode_peak_bytes", pa.int64()),  # of the actor so far, shared memory included
]

EXTRACT_COSTS = [
    pa.field("extract_seconds", pa.float64()),
    pa.field("extract_peak_bytes", pa.int64()),
]

RESULT = pa.struct(
    [
        pa.field("features", pa.list_(pa.list_(pa.float32()))),
        pa.field("attentions", pa.list_(pa.list_(pa.float32()))),
        pa.field("attention_shapes", pa.list_(pa.list_(pa.int32()))),
        pa.field("error", ERROR),
    ]
)
"""What one extractor made of a unit: a feature per clip, or an error; null where not asked for."""


def decoded_schema(num_inputs: int) -> pa.Schema:
    """Units after decoding: `frames_<i>` holds (F, H, W, 3) uint8, all clips one after the other."""
    frames = [pa.field(f"frames_{i}", pa.large_binary()) for i in range(num_inputs)]
    return pa.schema([*CUT, *MEDIA, *COSTS, *frames])


def extracted_schema(num_extractors: int) -> pa.Schema:
    """Units after extraction: frames are gone, `result_<k>` is there for extractor k."""
    results = [pa.field(f"result_{k}", RESULT) for k in range(num_extractors)]
    return pa.schema([*CUT, *MEDIA, *COSTS, *results, *EXTRACT_COSTS])


STAGED = pa.schema(
    [
        pa.field("assignment", pa.int32()),
        pa.field("plan_row", pa.int32()),
        pa.field("unit_index", pa.int32()),
        pa.field("num_units", pa.int32()),
        pa.field("num_unit_clips", pa.int32()),
        pa.field("num_frames", pa.int32()),
        pa.field("error_codes", pa.list_(pa.string())),  # one per extractor; null where it went well
        *COSTS,
        *EXTRACT_COSTS,
        pa.field("write_seconds", pa.float64()),
    ]
)
"""What the writer tells the driver of each unit once its rows are staged."""


def peak_bytes() -> int:
    """The most memory that this process has held so far, with the shared memory that it touched."""
    if sys.platform == "linux":
        return status_bytes("VmHWM")  # getrusage() would begin with what the parent held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def error_struct(error: SampleError) -> dict[str, Any]:
    """A sample's error as the pipeline's rows carry it."""
    return {
        "stage": error.stage,
        "code": error.code,
        "message": error.message[:1000],
        "attempts": error.attempts,
    }


def image_frames_column(frames: np.ndarray) -> pa.LargeBinaryArray:
    """Frames of N images, (N, H, W, 3) uint8, as Arrow, without a copy where they are contiguous."""
    offsets = np.arange(len(frames) + 1, dtype=np.int64) * (frames[0].size if len(frames) else 0)
    data = np.ascontiguousarray(frames).reshape(-1)
    return pa.Array.from_buffers(
        pa.large_binary(), len(frames), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table; what a row does not name is null. Frames are uint8 arrays."""
    columns = [_column([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.table(columns, schema=schema)


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    return _frames_column(values) if kind == pa.large_binary() else pa.array(values, type=kind)


def _frames_column(values: Sequence[np.ndarray | None]) -> pa.LargeBinaryArray:
    """Frames as Arrow, copied once. `pa.array` would never let go of a memoryview (seen on pyarrow 26)."""
    lengths = [0 if value is None else value.size for value in values]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    frames = [value.reshape(-1) for value in values if value is not None]
    buffers = [
        pa.array([value is not None for value in values], pa.bool_()).buffers()[1],
        pa.py_buffer(offsets.astype(np.int64)),
        pa.py_buffer(np.concatenate([np.empty(0, np.uint8), *frames])),
    ]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)
