"""Planning: which samples the next entries of the log name (protocol, step 2).

Invariant: creating entry n proves that all earlier entries of its dataset were read, so open plans
share no sample and no target. All else follows from that.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurex_ray.errors import ManifestError, RunError
from featurex_ray.schemas import HELPER
from featurex_ray.table.compare import (
    OWN_TARGET,
    TO_DO,
    Comparison,
    Samples,
    State,
    compare,
    fingerprint,
)
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.ids import IdIndex, hash_ids, hash_samples
from featurex_ray.table.log import Beginning, Kind, Log, Plan, encode_plan, open_plan
from featurex_ray.table.store import ObjectStore, ensure

MAX_SAMPLES_PER_PLAN = 250_000

PLANNED_AT_ONCE = 2_000_000
"""Samples that one call plans at most: the first are under way before the last are planned."""

BUFFERED_ROWS = 1_000_000
"""Manifest rows held while plans fill, over all datasets."""


def make_plans(
    store: ObjectStore,
    facts: TableFacts,
    samples: Samples,
    *,
    run_id: str,
    max_samples_per_plan: int = MAX_SAMPLES_PER_PLAN,
    most_samples: int | None = None,
    most_new_samples: int = PLANNED_AT_ONCE,
    began: Beginning | None = None,
) -> list[Plan]:
    """Plans what is to do, and returns the open plans that matter to the samples, whoever made them.

    What another run planned at the same time is left to its plan. Call again once the returned
    plans are done, until none is returned: then every sample is held at its version.

    Args:
        store: Where the table lies.
        facts: The table's.
        samples: The manifest's.
        run_id: The run that plans.
        max_samples_per_plan: Of plans that make a new object.
        most_samples: Stop planning once open plans hold so many samples, whoever made them; None for no end.
        most_new_samples: Or once those that this call makes do.
        began: What the run found when it began.

    Raises:
        ManifestError: A sample occurs twice.
        RunError: The manifest changed meanwhile.
    """
    seen = compare(store, facts, samples, began=began)
    planner = Planner(store, facts, seen.log, run_id=run_id, mattering=seen.open_plans)
    for (dataset, target), rows in _groups(facts, seen, samples, max_samples_per_plan):
        left = most_new_samples - planner.num_new_samples
        if most_samples is not None:
            left = min(left, most_samples - planner.num_samples)
        if left <= 0:
            break
        if target == OWN_TARGET:
            planner.create(dataset, target, rows.slice(0, left), kind="new")
        else:
            planner.create(dataset, target, rows, kind="changed")
        del rows  # or they would stay while those of the next plan are gathered
    return planner.plans


FAILED_IN = f"{HELPER}failed_in"
"""The column that travels with rows to plan: the plan whose failure object holds the row, or -1."""

_TARGET = f"{HELPER}target"


def _groups(
    facts: TableFacts, seen: Comparison, samples: Samples, max_samples: int
) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """((dataset, target), rows) of each plan to make, as soon as its last row has been read.

    Rows of one dataset stay in the manifest's order, so that neighbours share a plan. When many
    datasets are mixed, the fullest goes early, so that memory stays bounded.
    """
    left = Counter(seen.to_do)
    held: dict[tuple[str, int], list[pa.RecordBatch]] = {}
    size: Counter[tuple[str, int]] = Counter()
    for group, rows in _rows_to_do(facts, seen, samples):
        limit = max_samples if group[1] == OWN_TARGET else seen.to_do[group]  # one object, one plan
        start = 0
        while start < rows.num_rows:
            piece = rows.slice(start, limit - size[group])
            start += piece.num_rows
            held.setdefault(group, []).append(piece)
            size[group] += piece.num_rows
            left[group] -= piece.num_rows
            if size[group] == limit or left[group] == 0:
                del size[group]
                yield group, as_media_lie(pa.Table.from_batches(held.pop(group)))
        if size.total() > BUFFERED_ROWS:
            fullest = max(size, key=lambda own: (own[1] == OWN_TARGET) * size[own])
            if fullest[1] == OWN_TARGET:
                del size[fullest]
                yield fullest, as_media_lie(pa.Table.from_batches(held.pop(fullest)))


_AS_MEDIA_LIE = [(name, "ascending") for name in ("data_file", "data_row", "sample_id")]


def as_media_lie(rows: pa.Table) -> pa.Table:
    """The rows of a plan in its order.

    Inline media are read a row group at a time, so that a slice had better name neighbours, whatever the
    samples are called. Others go by their ids.
    """
    return rows.sort_by(_AS_MEDIA_LIE)


def _rows_to_do(
    facts: TableFacts, seen: Comparison, samples: Samples
) -> Iterator[tuple[tuple[str, int], pa.RecordBatch]]:
    start = 0
    batches = itertools.zip_longest(samples(), seen.fingerprints)
    for batch, before in batches:
        if batch is None or fingerprint(batch) != before:
            raise RunError("the manifest changed while it was read; run again")
        state, target, last_plan = seen.rows(start, start + batch.num_rows)
        start += batch.num_rows
        failed_in = np.where(state == State.REVISED, last_plan, -1)
        rows = facts.conform(batch).append_column(FAILED_IN, pa.array(failed_in))
        chosen = rows.append_column(_TARGET, pa.array(target)).filter(pa.array(np.isin(state, TO_DO)))
        for group in pa.Table.from_batches([chosen]).group_by(["dataset", _TARGET]).aggregate([]).to_pylist():
            ours = pc.and_(
                pc.equal(chosen["dataset"], group["dataset"]), pc.equal(chosen[_TARGET], group[_TARGET])
            )
            yield (group["dataset"], group[_TARGET]), chosen.filter(ours).drop_columns([_TARGET])


class _Rivals:
    """Entries of the log that other runs made after it was compared. Every later entry regards them all."""

    def __init__(self) -> None:
        self._plans: dict[str, list[tuple[Plan, IdIndex]]] = {}

    def add(self, plan: Plan, file: pq.ParquetFile) -> None:
        """Notes an entry that was lost to somebody else."""
        ids = IdIndex(hash_ids(plan.dataset, file.read(["sample_id"])["sample_id"]))
        self._plans.setdefault(plan.dataset, []).append((plan, ids))

    def left(self, dataset: str, target: int, rows: pa.Table) -> tuple[pa.Table, list[Plan]]:
        """The rows that no rival names, none if a rival has their target; and the rivals that took any."""
        if dataset not in self._plans:
            return rows, []
        hashes = hash_ids(dataset, rows["sample_id"])
        ours = np.ones(rows.num_rows, bool)
        takers = []
        for plan, ids in self._plans[dataset]:
            taken = (ids.find(hashes) >= 0) | (plan.target == target)
            ours &= ~taken
            if taken.any():
                takers.append(plan)
        return rows.filter(pa.array(ours)), takers


class Planner:
    """Creates entries of the log, and knows those that other runs created in the meantime.

    Args:
        store: Where the table lies.
        facts: The table's.
        log: As it was when the rows to plan were chosen.
        run_id: The run that plans.
        mattering: Open plans that matter to the rows already.
    """

    def __init__(
        self, store: ObjectStore, facts: TableFacts, log: Log, *, run_id: str, mattering: Iterable[Plan]
    ) -> None:
        self._store, self._facts, self._log, self._run_id = store, facts, log, run_id
        self._rivals = _Rivals()
        self._made = {(plan.dataset, plan.number): plan for plan in mattering}
        self.num_new_samples = 0  # of the plans that this planner made

    @property
    def plans(self) -> list[Plan]:
        """The plans that the rows are in by now, this run's and those that came first."""
        return [self._made[place] for place in sorted(self._made)]

    @property
    def num_samples(self) -> int:
        """Samples of all these plans."""
        return sum(plan.num_samples for plan in self._made.values())

    def create(self, dataset: str, target: int, rows: pa.Table, *, kind: Kind) -> None:
        """Creates the next entry of the log; who loses reads the winner's and plans what it left.

        Invariant: entry n is only asked for when all before it have been compared with its rows.

        Args:
            dataset: Of all rows.
            target: The object to change, or `OWN_TARGET`.
            rows: In `sample_schema`, and `FAILED_IN`; `as_media_lie`.
            kind: What the plan does.
        """
        _check_once(rows["sample_id"].combine_chunks())
        while True:
            ours, takers = self._rivals.left(dataset, target, rows)
            self._made |= {(taker.dataset, taker.number): taker for taker in takers}
            if not ours.num_rows:
                return
            plan = _next_plan(self._log, dataset, target, ours, kind, self._run_id)
            if self._wins(plan, ours):
                self._made[dataset, plan.number] = plan
                self.num_new_samples += plan.num_samples
                return

    def _wins(self, plan: Plan, rows: pa.Table) -> bool:
        key = self._facts.keys.plan(plan.dataset, plan.number)
        ensure(self._store, key, encode_plan(plan, rows.drop_columns([FAILED_IN])))
        self._log.plans.setdefault(plan.dataset, []).append(plan.number)
        with open_plan(self._store, self._facts, plan.dataset, plan.number) as (winner, file):
            if winner.token == plan.token:
                return True
            self._rivals.add(winner, file)
        return False


def _check_once(ids: pa.Array) -> None:
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        name = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ManifestError(f"sample {name!r} occurs more than once in its dataset")


def _next_plan(log: Log, dataset: str, target: int, rows: pa.Table, kind: Kind, run_id: str) -> Plan:
    number = log.next_number(dataset)
    failed_in = pc.unique(rows[FAILED_IN]).to_pylist()
    return Plan(
        dataset=dataset,
        number=number,
        target=number if target == OWN_TARGET else target,
        kind=kind,
        num_samples=rows.num_rows,
        samples_hash=hash_samples(dataset, rows["sample_id"]),
        failed_in=tuple(sorted(older for older in failed_in if older >= 0)),
        run_id=run_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
