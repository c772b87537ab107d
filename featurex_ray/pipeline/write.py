"""Write: units with results in, staged parts out; what goes on to the driver is a line a unit."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.pipeline import events, metrics
from featurex_ray.pipeline.source import Assignment
from featurex_ray.pipeline.units import STAGED, to_table
from featurex_ray.schemas import PART
from featurex_ray.storage.uri import redact
from featurex_ray.table.table import FeatureTable

Row = dict[str, Any]


class StageParts:
    """Puts one sorted part for each plan that a block holds rows of."""

    def __init__(
        self, tables: Sequence[FeatureTable], assignments: Sequence[Assignment], *, run_id: str
    ) -> None:
        self._tables = tables
        self._assignments = assignments
        self._run_id = run_id

    def __call__(self, units: pa.Table) -> pa.Table:
        """Units with results -> one line a unit, in the schema `STAGED`, once they are staged."""
        start = time.perf_counter()
        for number in pc.unique(units["assignment"]).to_pylist():
            mine = units.filter(pc.equal(units["assignment"], number))
            for index, plan in self._assignments[number].plans.items():
                self._tables[index].write_part(plan, part_rows(mine, index, run_id=self._run_id))
        spent = time.perf_counter() - start
        self._tell(units, spent)
        lines = [line | {"write_seconds": spent / max(len(units), 1)} for line in self._lines(units)]
        return to_table(lines, STAGED)

    def _tell(self, units: pa.Table, seconds: float) -> None:
        """Metrics, and an event for each unit that failed, with all that finds it again."""
        clips = pc.sum(units["num_unit_clips"]).as_py() or 0
        metrics.count_staged(clips=clips, seconds=seconds)
        for index, table in enumerate(self._tables):
            for unit, error in zip(_facts(units), _errors(units, index), strict=True):
                plan = self._assignments[unit["assignment"]].plans.get(index)
                if error is None or plan is None:
                    continue
                name = table.facts.name
                metrics.count_failure(table=name, stage=error["stage"], code=error["code"])
                ids = {"run_id": self._run_id, "table": name, "plan_id": plan.plan_id}
                sample = {"sample_id": unit["sample_id"], "uri": redact(unit["uri"] or "")}
                events.emit("sample_failed", **ids, dataset=plan.dataset, **sample, **error)

    def _lines(self, units: pa.Table) -> Iterator[Row]:
        errors = [_errors(units, index) for index in range(len(self._tables))]
        for row, *found in zip(_facts(units), *errors, strict=True):
            codes = [error and error["code"] for error in found]
            num_frames = sum(clip["num_frames"] for clip in row["clips"] or [])
            yield row | {"num_frames": num_frames, "error_codes": codes}


def part_rows(units: pa.Table, extractor: int, *, run_id: str) -> pa.Table:
    """Unnest units for one extractor: a row a clip, or one row for a unit that failed.

    Args:
        units: In the schema `extracted_schema`, all wanted by this extractor.
        extractor: Which `result_<k>` to take.
        run_id: Which run made them.

    Returns:
        A table of the schema `PART`.
    """
    rows: list[Row] = []
    places: list[int | None] = []  # of each row's clip among all clips that were embedded
    num_clips = 0
    for unit, error in zip(_facts(units), _errors(units, extractor), strict=True):
        if error is not None:
            rows.append(unit | error | {"error": error["code"], "run_id": run_id})
            places.append(None)
            continue
        for clip in unit["clips"]:
            rows.append(unit | clip | {"error": None, "run_id": run_id})
            places.append(num_clips)
            num_clips += 1
    return _with_results(to_table(rows, PART), units[f"result_{extractor}"], pa.array(places, pa.int64()))


def _with_results(rows: pa.Table, results: pa.ChunkedArray, places: pa.Array) -> pa.Table:
    """Put the clips' values into their rows as they lie in Arrow, never as Python floats."""
    columns = {"feature": "features", "attention": "attentions", "attention_shape": "attention_shapes"}
    for name, nested in columns.items():
        clips = pc.list_flatten(pc.struct_field(results, nested))
        if len(clips):
            rows = rows.set_column(rows.schema.get_field_index(name), name, clips.take(places))
    return rows


def _facts(units: pa.Table) -> list[Row]:
    """The units without their results, as rows."""
    results = [name for name in units.column_names if name.startswith("result_")]
    rows: list[Row] = units.drop_columns(results).to_pylist()
    return rows


def _errors(units: pa.Table, extractor: int) -> list[Row | None]:
    errors: list[Row | None] = pc.struct_field(units[f"result_{extractor}"], "error").to_pylist()
    return errors
