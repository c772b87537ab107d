"""The pipeline's source: slices of open plans, less what is staged already."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.pipeline.units import PLANNED
from featurex_ray.schemas import SAMPLE
from featurex_ray.table.log import Plan
from featurex_ray.table.table import FeatureTable


@dataclass(frozen=True)
class Assignment:
    """Plans of several tables over the very same samples: decoded once, extracted for each.

    Attributes:
        plans: One a table, by the table's place in the run; at least one.
    """

    plans: dict[int, Plan]

    @property
    def leader(self) -> tuple[int, Plan]:
        """The plan whose rows are read; all of them hold the same samples in the same order."""
        return next(iter(self.plans.items()))

    @property
    def num_samples(self) -> int:
        """Samples of each of the plans."""
        return self.leader[1].num_samples


def assignments_of(plans: Sequence[Sequence[Plan]]) -> list[Assignment]:
    """The plans of each table, those over the very same samples together.

    Only plans of one run are: another may have read another manifest, with other media of the same names.
    """
    together: dict[tuple[str, str, str, bool], dict[int, Plan]] = defaultdict(dict)
    for index, own in enumerate(plans):
        for plan in own:
            together[plan.run_id, plan.dataset, plan.samples_hash, plan.kind == "prune"][index] = plan
    return [Assignment(each) for each in together.values()]


@dataclass(frozen=True)
class Slice:
    """Rows [first, last) of an assignment's plans, and which of them are left to do."""

    assignment: int
    first: int
    last: int
    todo: np.ndarray | None  # (last - first,) bool; None: all of them


def slices_of(assignment: int, todo: np.ndarray, *, num_rows: int) -> list[Slice]:
    """Cut a plan into slices of `num_rows` rows; a slice with nothing to do is left out.

    Args:
        assignment: The assignment's number in the run.
        todo: (N,) bool, one a row of the plan: not staged yet.
        num_rows: Rows of a slice, at least 1.
    """
    slices = []
    for first in range(0, len(todo), num_rows):
        part = todo[first : first + num_rows]
        if part.any():
            slices.append(Slice(assignment, first, first + len(part), None if part.all() else part))
    return slices


SLICE = pa.schema(
    [
        pa.field("assignment", pa.int32()),
        pa.field("first", pa.int32()),
        pa.field("last", pa.int32()),
        pa.field("todo", pa.list_(pa.bool_())),
    ]
)
"""A `Slice` as a row: all that the driver gives out; whoever works on it reads its samples."""


MOST_BLOCKS = 20_000
"""Of slices, for each takes the driver a fraction of a millisecond before anything begins."""


def slice_rows(slices: Sequence[Slice]) -> Iterator[pa.Table]:
    """Tables in the schema `SLICE`, of one row, or of a few where there are very many slices."""
    rows = [
        {"assignment": part.assignment, "first": part.first, "last": part.last, "todo": part.todo}
        for part in slices
    ]
    num_rows = -(-len(rows) // MOST_BLOCKS)
    for start in range(0, len(rows), max(num_rows, 1)):
        yield pa.Table.from_pylist(rows[start : start + num_rows], schema=SLICE)


class PlannedSamples:
    """The samples of a run's plans, read a slice at a time, so that nothing holds a whole plan."""

    def __init__(self, tables: Sequence[FeatureTable], assignments: Sequence[Assignment]) -> None:
        self._tables = tables
        self._assignments = assignments

    def read(self, slices: pa.Table) -> Iterator[pa.Table]:
        """Rows of the schema `SLICE` -> for each of them its samples, in the schema `PLANNED`."""
        for row in slices.to_pylist():
            index, plan = self._assignments[row["assignment"]].leader
            yield planned_samples(self._tables[index], plan, _slice(row))


def _slice(row: dict[str, Any]) -> Slice:
    todo = None if row["todo"] is None else np.array(row["todo"], bool)
    return Slice(row["assignment"], row["first"], row["last"], todo)


def planned_samples(table: FeatureTable, plan: Plan, part: Slice) -> pa.Table:
    """The samples of one slice that are left to do, in the schema `PLANNED`."""
    rows = table.read_plan(plan, rows=range(part.first, part.last)).select(SAMPLE.names)
    rows = rows.append_column("plan_row", pa.array(range(part.first, part.last), pa.int32()))
    rows = rows.append_column("assignment", pa.repeat(pa.scalar(part.assignment, pa.int32()), len(rows)))
    rows = rows.select(PLANNED.names)
    if part.todo is not None:
        rows = rows.filter(pc.equal(pa.array(part.todo), True))
    return rows.cast(PLANNED).combine_chunks()
