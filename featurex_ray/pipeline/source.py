"""The pipeline's source: slices of open plans, less what is staged already."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

from featurex_ray.pipeline.units import PLANNED
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


class SampleSource(Datasource):
    """Reads planned samples, one task a slice, so that nothing holds a whole plan."""

    def __init__(
        self,
        tables: Sequence[FeatureTable],
        assignments: Sequence[Assignment],
        slices: Sequence[Slice],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tables = tables
        self._assignments = assignments
        self._slices = slices

    def get_name(self) -> str:
        """The operator's name in plans and progress."""
        return "Samples"

    def estimate_inmemory_data_size(self) -> int | None:
        """Some hundred bytes a sample; media are not read here."""
        return sum(s.last - s.first for s in self._slices) * 300

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  a slice is a task, whatever Ray would choose
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """One task a slice."""
        return [self._read_task(s, per_task_row_limit) for s in self._slices]

    def _read_task(self, part: Slice, limit: int | None) -> ReadTask:
        num_rows = part.last - part.first if part.todo is None else int(part.todo.sum())
        metadata = BlockMetadata(
            num_rows=num_rows, size_bytes=300 * num_rows, input_files=None, exec_stats=None
        )
        index, plan = self._assignments[part.assignment].leader
        return ReadTask(_reader(self._tables[index], plan, part), metadata, PLANNED, limit)


def _reader(table: FeatureTable, plan: Plan, part: Slice) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterable[pa.Table]:
        yield planned_samples(table, plan, part)

    return read


def planned_samples(table: FeatureTable, plan: Plan, part: Slice) -> pa.Table:
    """The samples of one slice that are left to do, in the schema `PLANNED`."""
    rows = table.read_plan(plan, rows=range(part.first, part.last))
    rows = rows.append_column("plan_row", pa.array(range(part.first, part.last), pa.int32()))
    rows = rows.append_column("assignment", pa.repeat(pa.scalar(part.assignment, pa.int32()), len(rows)))
    rows = rows.select(PLANNED.names)
    if part.todo is not None:
        rows = rows.filter(pc.equal(pa.array(part.todo), True))
    return rows.cast(PLANNED).combine_chunks()
