"""Write: units with results in, staged parts out; what goes on to the driver is a line a unit."""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.pipeline import events, metrics
from featurex_ray.pipeline.source import Assignment
from featurex_ray.pipeline.threads import limit_threads
from featurex_ray.pipeline.units import STAGED
from featurex_ray.schemas import PART
from featurex_ray.storage.uri import redact
from featurex_ray.table.table import FeatureTable


class StageParts:
    """Puts one sorted part for each plan that a block holds rows of."""

    def __init__(
        self, tables: Sequence[FeatureTable], assignments: Sequence[Assignment], run_id: str
    ) -> None:
        limit_threads(1)
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
        metrics.count_staged(clips=pc.sum(units["num_unit_clips"]).as_py() or 0, seconds=spent)
        for index in range(len(self._tables)):
            self._tell_failures(units, index)
        return staged_lines(units, len(self._tables), seconds=spent)

    def _tell_failures(self, units: pa.Table, index: int) -> None:
        """An event for each unit that failed for one table, with all that finds it again."""
        errors = _errors(units, index)
        failed = units.select(["assignment", "sample_id", "uri"]).filter(errors.is_valid())
        name = self._tables[index].facts.name
        for unit, error in zip(failed.to_pylist(), errors.drop_null().to_pylist(), strict=True):
            plan = self._assignments[unit["assignment"]].plans.get(index)
            if plan is None:
                continue
            metrics.count_failure(table=name, stage=error["stage"], code=error["code"])
            ids = {"run_id": self._run_id, "table": name, "plan_id": plan.plan_id}
            sample = {"sample_id": unit["sample_id"], "uri": redact(unit["uri"] or "")}
            events.emit("sample_failed", **ids, dataset=plan.dataset, **sample, **error)


def part_rows(units: pa.Table, extractor: int, *, run_id: str) -> pa.Table:
    """Unnest units for one extractor: a row a clip, or one row for a unit that failed.

    Args:
        units: In the schema `extracted_schema`, all wanted by this extractor.
        extractor: Which `result_<k>` to take.
        run_id: Which run made them.

    Returns:
        A table of the schema `PART`, the failed units last.
    """
    is_good = _errors(units, extractor).is_null()
    rows = [
        _clip_rows(units.filter(is_good), extractor),
        _failure_rows(units.filter(pc.invert(is_good)), extractor),
    ]
    return pa.concat_tables(_of_part(columns, run_id) for columns in rows)


Columns = dict[str, pa.Array]


def _clip_rows(units: pa.Table, extractor: int) -> Columns:
    clips, result = _column(units, "clips"), _column(units, f"result_{extractor}")
    columns = _named(units.take(pc.list_parent_indices(clips)))
    flat = pc.list_flatten(clips)
    names = ("clip_index", "start_seconds", "end_seconds", "frame_pts_seconds")
    columns |= {name: pc.struct_field(flat, name) for name in names}
    nested = {"feature": "features", "attention": "attentions", "attention_shape": "attention_shapes"}
    values = {name: pc.list_flatten(pc.struct_field(result, field)) for name, field in nested.items()}
    return columns | {name: found for name, found in values.items() if len(found)}


def _failure_rows(units: pa.Table, extractor: int) -> Columns:
    errors = _errors(units, extractor)
    names = {"stage": "stage", "error": "code", "message": "message", "attempts": "attempts"}
    return _named(units) | {name: pc.struct_field(errors, field) for name, field in names.items()}


def _of_part(columns: Columns, run_id: str) -> pa.Table:
    """The columns of `PART`; what is not there is null."""
    num_rows = len(columns["sample_id"])
    columns |= {"run_id": pa.repeat(run_id, num_rows)}
    found = [columns.get(field.name, pa.nulls(num_rows, field.type)) for field in PART]
    return pa.table(found, schema=PART)


def staged_lines(units: pa.Table, num_tables: int, *, seconds: float) -> pa.Table:
    """What the driver is told of units, in the schema `STAGED`.

    Args:
        units: In the schema `extracted_schema`.
        num_tables: How many extractors there are.
        seconds: What staging them took.
    """
    clips = _column(units, "clips")
    frames = pc.struct_field(pc.list_flatten(clips), "num_frames").to_numpy()
    parents = pc.list_parent_indices(clips).to_numpy()
    columns = _named(units) | {
        "num_frames": pa.array(np.bincount(parents, frames, len(units)).astype(np.int32)),
        "error_codes": _side_by_side([pc.struct_field(_errors(units, k), "code") for k in range(num_tables)]),
        "write_seconds": pa.repeat(seconds / max(len(units), 1), len(units)),
    }
    return pa.table([columns[field.name] for field in STAGED], schema=STAGED)


def _side_by_side(columns: Sequence[pa.Array]) -> pa.ListArray:
    """Equally long columns as one of lists: in each row, the values of all of them."""
    num_rows = len(columns[0])
    order = np.arange(len(columns) * num_rows).reshape(len(columns), num_rows).T.ravel()
    offsets = np.arange(num_rows + 1, dtype=np.int32) * len(columns)
    return pa.ListArray.from_arrays(offsets, pa.concat_arrays(columns).take(pa.array(order)))


def _named(units: pa.Table) -> Columns:
    """The units' own columns; an `error` is what one table makes of it."""
    return {name: _column(units, name) for name in units.column_names if name != "error"}


def _column(units: pa.Table, name: str) -> pa.Array:
    return units[name].combine_chunks()


def _errors(units: pa.Table, extractor: int) -> pa.StructArray:
    """One a unit: why this extractor's table gets a failure; null where it went well or isn't asked for."""
    return pc.struct_field(_column(units, f"result_{extractor}"), "error")
