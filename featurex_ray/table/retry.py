"""Retry: the failed samples again, as new plans, with the manifest rows that their plans keep.

Their failure rows go once their features are visible, so a sample is always in one table at least.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.table.compare import OWN_TARGET
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.ids import IdIndex, hash_ids
from featurex_ray.table.log import Log, Plan, open_plan, read_log
from featurex_ray.table.plan import FAILED_IN, Planner, as_media_lie
from featurex_ray.table.prune import failed_ids
from featurex_ray.table.store import ObjectStore

Allowed = Callable[[pa.Table], np.ndarray]
"""(N,) bool: which of these samples (in `sample_schema`) this run may read."""


@dataclass
class Failed:
    """Samples whose last state is failed.

    Args:
        log: The log as it was read.
        found: Their ids, by the (dataset, plan) in whose failure object they are.
        open_plans: Open plans that do some of them again already; those are not in `found`.
        num_open: How many those are.
    """

    log: Log
    found: dict[tuple[str, int], pa.Array] = field(default_factory=dict)
    open_plans: list[Plan] = field(default_factory=list)
    num_open: int = 0

    @property
    def num_samples(self) -> int:
        """How many can be planned again now."""
        return sum(len(ids) for ids in self.found.values())


def find_failed(
    store: ObjectStore, facts: TableFacts, *, codes: Sequence[str] = (), dataset: str | None = None
) -> Failed:
    """Looks for samples that failed; writes nothing.

    Args:
        store: Where the table lies.
        facts: The table's.
        codes: Only failures of these codes, all if none.
        dataset: Only of this dataset.
    """
    failed = Failed(read_log(store, facts))
    for name, numbers in sorted(failed.log.failures.items()):
        if dataset in {None, name}:
            found = {number: failed_ids(store, facts, name, number, tuple(codes)) for number in numbers}
            _leave_out_open(store, facts, failed, name, found)
    return failed


def _leave_out_open(
    store: ObjectStore, facts: TableFacts, failed: Failed, dataset: str, found: dict[int, pa.Array]
) -> None:
    """A plan that isn't done has its samples to itself."""
    for number in failed.log.plans.get(dataset, ()):
        if (dataset, number) in failed.log.done:
            continue
        with open_plan(store, facts, dataset, number) as (plan, file):
            named = IdIndex(hash_ids(dataset, file.read(["sample_id"])["sample_id"]))
        before = sum(map(len, found.values()))
        found = {n: ids.filter(pa.array(named.find(hash_ids(dataset, ids)) < 0)) for n, ids in found.items()}
        taken = before - sum(map(len, found.values()))
        failed.num_open += taken
        failed.open_plans += [plan] if taken else []
    failed.found |= {(dataset, number): ids for number, ids in found.items() if len(ids)}


def plan_retry(
    store: ObjectStore,
    facts: TableFacts,
    failed: Failed,
    *,
    allowed: Allowed,
    run_id: str,
    max_samples_per_plan: int,
) -> list[Plan]:
    """Plans failed samples again; those that this run may not read are left as they are.

    Returns:
        The plans, and open ones of other runs that do some of the samples already.
    """
    planner = Planner(store, facts, failed.log, run_id=run_id, mattering=failed.open_plans)
    for dataset in sorted({dataset for dataset, _ in failed.found}):
        held: list[pa.Table] = []
        for rows in _rows(store, facts, failed, dataset, allowed):
            held.append(rows)
            while sum(map(len, held)) >= max_samples_per_plan:
                whole = pa.concat_tables(held)
                first = as_media_lie(whole.slice(0, max_samples_per_plan))
                planner.create(dataset, OWN_TARGET, first, kind="new")
                held = [whole.slice(max_samples_per_plan)]
        if sum(map(len, held)):
            planner.create(dataset, OWN_TARGET, as_media_lie(pa.concat_tables(held)), kind="new")
    return planner.plans


def _rows(
    store: ObjectStore, facts: TableFacts, failed: Failed, dataset: str, allowed: Allowed
) -> Iterator[pa.Table]:
    for (name, number), ids in failed.found.items():
        if name == dataset:
            with open_plan(store, facts, dataset, number) as (_, file):
                rows = file.read().cast(facts.sample_schema)
            rows = rows.filter(pc.is_in(rows["sample_id"], ids))
            rows = rows.filter(pa.array(allowed(rows)))
            yield rows.append_column(FAILED_IN, pa.repeat(pa.scalar(number, pa.int64()), len(rows)))
