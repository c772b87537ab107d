"""Every Arrow schema of the project: manifest samples, plans, work units, staged parts, tables.

Only portable Parquet types are used in what readers see: no extension types, no
fixed-size lists.
"""

import pyarrow as pa

CARRIED_BY_DEFAULT = "label"
"""The one manifest column beyond the known ones that is carried without being named."""

HELPER = "_featurex."
"""How columns begin that stand beside carried ones for a while; none that is carried begins so."""

SAMPLE = pa.schema(
    [
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("media_type", pa.string()),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field("version", pa.string()),
        # Where inline `data` lies: a Parquet file and the row in it. Plans never copy media.
        pa.field("data_file", pa.string()),
        pa.field("data_row", pa.int64()),
        # Which day's manifest a backfill took it from; null elsewhere.
        pa.field("backfill_day", pa.date32()),
    ]
)
"""A manifest row, normalised. Carried columns (`label`, `--keep-columns`) follow, as they are."""


def sample_schema(carried: pa.Schema) -> pa.Schema:
    """The schema of manifest samples and of plans, with the carried columns at the end."""
    return pa.schema([*SAMPLE, *carried])


CLIP_FIELDS = [
    pa.field("clip_index", pa.int32()),
    pa.field("num_clips", pa.int32()),
    pa.field("start_seconds", pa.float64()),
    pa.field("end_seconds", pa.float64()),
    pa.field("frame_pts_seconds", pa.list_(pa.float64())),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("media_complete", pa.bool_()),
    pa.field("feature", pa.list_(pa.float32())),
    pa.field("attention", pa.list_(pa.float32())),
    pa.field("attention_shape", pa.list_(pa.int32())),
    pa.field("media_sha256", pa.string()),
]
"""What a clip's row says of the clip itself, shared by staged parts and feature tables."""

ERROR_FIELDS = [
    pa.field("stage", pa.string()),
    pa.field("error", pa.string()),
    pa.field("message", pa.string()),
    pa.field("attempts", pa.int32()),
]
"""What a failure row says of the failure itself."""

PART = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("unit_index", pa.int32(), nullable=False),
        pa.field("num_units", pa.int32(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("media_type", pa.string()),
        *CLIP_FIELDS,
        *ERROR_FIELDS,
        pa.field("run_id", pa.string(), nullable=False),
    ]
)
"""A staged part: one row per clip, or one row with `error` set for a unit that failed."""

REPEATED = ["media_type", "version", "extractor_revision", "run_id", "stage", "error"]
"""Columns of few values, which files keep as a dictionary; to try that with features costs time and room."""


def features_schema(carried: pa.Schema) -> pa.Schema:
    """The schema of public feature objects; `dataset` is the partition, in the path."""
    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("uri", pa.string()),
            pa.field("media_type", pa.string()),
            pa.field("version", pa.string()),
            *CLIP_FIELDS,
            pa.field("extractor_revision", pa.string()),
            pa.field("run_id", pa.string()),
            *carried,
        ]
    )


FAILURES = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("version", pa.string()),
        *ERROR_FIELDS,
        pa.field("run_id", pa.string()),
    ]
)
"""The schema of public failure objects; `dataset` is the partition, in the path."""
