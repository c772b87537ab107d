"""Extraction of a block with everything in it: good, failed, refused and not asked for keep their places."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from featurex_ray import ExtractorSpec, InputSpec
from featurex_ray.models.registry import resolve
from featurex_ray.pipeline.extract import ExtractFeatures, ExtractSettings
from featurex_ray.pipeline.units import decoded_schema, extracted_schema, to_table

ERROR = {"stage": "fetch", "code": "not_found", "message": "gone", "attempts": 3}


class Picky:
    """The mean of each channel, NaN where a clip is black; attention of two weights."""

    spec = ExtractorSpec(
        dimension=3,
        input=InputSpec(4, 4, None, "bilinear"),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        media="video",
        attention_shape=(2,),
    )

    def __call__(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, 3, H, W) -> (B, 3), (B, 2)."""
        means = frames.mean(dim=(1, 3, 4))
        means[means.sum(dim=1) == 0] = torch.nan
        return means, torch.full((len(frames), 2), 0.5)


def unit(row: int, clips: list[int], **columns: Any) -> dict[str, Any]:
    """Of clips of two frames, each of one gray value."""
    values = np.repeat(clips, 2).astype(np.uint8)
    frames = np.broadcast_to(values[:, None, None, None], (len(values), 4, 4, 3))
    return {
        "assignment": 0,
        "plan_row": row,
        "media_type": "video",
        "clips": [{"clip_index": i, "num_frames": 2} for i in range(len(clips))],
        "frames_0": frames,
    } | columns


@pytest.fixture(scope="module")
def units() -> pa.Table:
    rows = [
        unit(0, [51, 102]),
        unit(1, [], error=ERROR, frames_0=None),
        unit(2, [204]),
        unit(3, [51, 0, 51]),
        unit(4, [51], media_type="image"),
        unit(5, [153], assignment=7),
        unit(6, [0], assignment=7),
        unit(7, [], assignment=7, error=ERROR, frames_0=None),
        unit(8, [255, 51]),
    ]
    return to_table(rows, decoded_schema(1))


def extracted(units: pa.Table, assignments: frozenset[int] | None) -> list[Any]:
    settings = ExtractSettings(resolve(f"{__name__}:Picky"), 0, "fp32", None, 1, assignments)
    table = ExtractFeatures([settings])(units)
    table.validate(full=True)
    assert table.schema == extracted_schema(1)
    assert table["plan_row"].to_pylist() == units["plan_row"].to_pylist()
    return list(table["result_0"].to_pylist())


def good(*grays: float) -> dict[str, Any]:
    return {
        "features": [pytest.approx([gray] * 3) for gray in grays],
        "attentions": [[0.5, 0.5]] * len(grays),
        "attention_shapes": [[2]] * len(grays),
        "error": None,
    }


def code(result: dict[str, Any]) -> str:
    assert result["features"] is None
    assert result["attentions"] is None
    return str(result["error"]["code"])


def test_each_unit_keeps_its_place(units: pa.Table) -> None:
    found = extracted(units, frozenset({0}))
    assert found[0] == good(0.2, 0.4)
    assert found[1]["error"] == ERROR
    assert found[2] == good(0.8)
    assert code(found[3]) == "non_finite"
    assert code(found[4]) == "unsupported_media"
    assert found[5:8] == [None, None, None]  # another table's
    assert found[8] == good(1.0, 0.2)


def test_all_are_asked_for(units: pa.Table) -> None:
    found = extracted(units, None)
    assert found[5] == good(0.6)
    assert (code(found[6]), code(found[7])) == ("non_finite", "not_found")
    assert found[8] == good(1.0, 0.2)


def test_a_part_of_a_larger_block(units: pa.Table) -> None:
    assert extracted(units.slice(2, 2), None)[0] == good(0.8)
    assert extracted(pa.concat_tables([units[8:], units[:1]]), None) == [good(1.0, 0.2), good(0.2, 0.4)]


def test_nothing_to_embed(units: pa.Table) -> None:
    assert [code(each) for each in extracted(units.slice(1, 1), None)] == ["not_found"]
    assert extracted(units.slice(5, 3), frozenset({0})) == [None, None, None]
    assert extracted(units.slice(0, 0), None) == []
