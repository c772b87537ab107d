"""Units become the rows of parts, and the lines that the driver is told."""

from typing import Any

import pyarrow as pa

from featurex_ray.pipeline.units import extracted_schema, to_table
from featurex_ray.pipeline.write import part_rows, staged_lines
from featurex_ray.schemas import PART

ERROR = {"stage": "decode", "code": "corrupt", "message": "broken", "attempts": 1}


def unit(name: str, **columns: Any) -> dict[str, Any]:
    return {"assignment": 0, "plan_row": 0, "sample_id": name, "unit_index": 0, "num_units": 1, **columns}


def clip(index: int, frames: int) -> dict[str, Any]:
    pts = [float(index), index + 0.5][:frames]
    return {
        "clip_index": index,
        "start_seconds": float(index),
        "end_seconds": index + 1.0,
        "frame_pts_seconds": pts,
        "num_frames": frames,
    }


GOOD = unit(
    "video",
    start_seconds=100.0,
    num_clips=2,
    num_unit_clips=2,
    width=8,
    clips=[clip(0, 2), clip(1, 1)],
    result_0={
        "features": [[1.0, 2.0], [3.0, 4.0]],
        "attentions": [[0.25, 0.75], [1.0]],
        "attention_shapes": [[2], [1]],
    },
    result_1={"error": ERROR},
)
FAILED = unit("broken", error=ERROR, result_0={"error": ERROR}, result_1={"error": ERROR})
UNASKED = unit(
    "image",
    num_clips=1,
    num_unit_clips=1,
    clips=[{"clip_index": 0, "num_frames": 1}],
    result_0={"features": [[5.0, 6.0]], "attentions": [[1.0]], "attention_shapes": [[1]]},
)


def units(*rows: dict[str, Any]) -> pa.Table:
    table = to_table(rows, extracted_schema(2))
    return pa.concat_tables([table.slice(0, 1), table.slice(1)])  # of several chunks, as they may come


def test_a_row_a_clip_and_one_a_failure() -> None:
    rows = part_rows(units(FAILED, GOOD, UNASKED), 0, run_id="r")
    assert rows.schema == PART
    found = rows.to_pylist()
    assert [(r["sample_id"], r["clip_index"], r["error"]) for r in found] == [
        ("video", 0, None),
        ("video", 1, None),
        ("image", 0, None),
        ("broken", None, "corrupt"),
    ]
    assert [r["feature"] for r in found] == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], None]
    assert [r["attention"] for r in found] == [[0.25, 0.75], [1.0], [1.0], None]
    assert [r["start_seconds"] for r in found[:3]] == [0.0, 1.0, None]  # the clip's, never the sample's
    assert [r["frame_pts_seconds"] for r in found[:3]] == [[0.0, 0.5], [1.0], None]
    assert [r["width"] for r in found[:2]] == [8, 8]
    assert found[3]["message"] == "broken"
    assert {r["run_id"] for r in found} == {"r"}


def test_only_failures() -> None:
    rows = part_rows(units(FAILED, GOOD), 1, run_id="r")
    assert rows["error"].to_pylist() == ["corrupt", "corrupt"]
    assert rows["feature"].null_count == 2


def test_an_extractor_without_attention() -> None:
    bare = GOOD | {"result_0": {"features": [[1.0], [2.0]]}}
    assert part_rows(units(bare), 0, run_id="r")["attention"].null_count == 2


def test_the_driver_is_told_a_line_a_unit() -> None:
    lines = staged_lines(units(FAILED, GOOD, UNASKED), 2, seconds=3.0).to_pylist()
    assert [line["num_frames"] for line in lines] == [0, 3, 1]
    assert [line["num_unit_clips"] for line in lines] == [None, 2, 1]
    assert [line["error_codes"] for line in lines] == [
        ["corrupt", "corrupt"],
        [None, "corrupt"],
        [None, None],
    ]
    assert [line["write_seconds"] for line in lines] == [1.0, 1.0, 1.0]
