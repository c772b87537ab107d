"""Prune: samples that left the manifest leave the table, as plans of their own (protocol, step 2).

Only datasets that the manifest names are touched. Memory is 20 bytes a manifest sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.table.compare import Samples
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.ids import IdIndex, hash_ids, last_of_each
from featurex_ray.table.log import Beginning, Log, Plan, open_parquet, open_plan, read_log, reread
from featurex_ray.table.plan import FAILED_IN, Planner, as_media_lie
from featurex_ray.table.store import ObjectStore


@dataclass
class Gone:
    """Samples of the table that the manifest doesn't name any more.

    Args:
        log: The log as it was read.
        found: Hashes of their ids, by (dataset, the object that held them, the last plan that names them).
        open_plans: Open plans that name some of them, or are about to change an object that holds some.
    """

    log: Log
    found: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)
    open_plans: list[Plan] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """How many can be pruned now."""
        return sum(len(hashes) for hashes in self.found.values())

    def by_target(self) -> Iterator[tuple[str, int, dict[int, np.ndarray]]]:
        """(dataset, target, hashes by plan), for each object that holds some."""
        for dataset, target in sorted({(dataset, target) for dataset, target, _ in self.found}):
            named = {plan: ids for (d, t, plan), ids in self.found.items() if (d, t) == (dataset, target)}
            yield dataset, target, named


def find_gone(
    store: ObjectStore, facts: TableFacts, samples: Samples, *, began: Beginning | None = None
) -> Gone:
    """Looks for samples that left the manifest, but those that a later run planned since; writes nothing."""
    gone = Gone(read_log(store, facts))
    for dataset, index in _indexes(samples).items():
        _find_in(store, facts, gone, dataset, index, began)
    return gone


def _indexes(samples: Samples) -> dict[str, IdIndex]:
    hashes: dict[str, list[np.ndarray]] = {}
    for batch in samples():
        for dataset in pc.unique(batch["dataset"]).to_pylist():
            ids = batch["sample_id"].filter(pc.equal(batch["dataset"], dataset))
            hashes.setdefault(dataset, []).append(hash_ids(dataset, ids))
    return {dataset: IdIndex(np.concatenate(found)) for dataset, found in hashes.items()}


def _find_in(
    store: ObjectStore,
    facts: TableFacts,
    gone: Gone,
    dataset: str,
    index: IdIndex,
    began: Beginning | None,
) -> None:
    plans: list[Plan] = []
    hashes = [np.zeros((0, 2), np.uint64)]
    for number in gone.log.plans.get(dataset, ()):
        with open_plan(store, facts, dataset, number) as (plan, file):
            ids = hash_ids(dataset, file.read(["sample_id"])["sample_id"])
        plans.append(plan)
        hashes.append(ids[index.find(ids) < 0])
    numbers = np.repeat(np.arange(len(plans), dtype=np.int32), [len(ids) for ids in hashes[1:]])
    names, last = last_of_each(np.concatenate(hashes), numbers)
    changing = {plan.target for plan in plans if _is_open(gone.log, plan)}
    waiting: set[int] = set()
    for number in np.unique(last).tolist():
        plan = plans[number]
        if began is not None and began.is_by_later(plan):
            continue
        if _is_open(gone.log, plan) or (plan.kind != "prune" and plan.target in changing):
            waiting.add(plan.target)
        elif plan.kind != "prune":
            gone.found[dataset, plan.target, number] = names[last == number]
    gone.open_plans += [plan for plan in plans if plan.target in waiting and _is_open(gone.log, plan)]


def _is_open(log: Log, plan: Plan) -> bool:
    return (plan.dataset, plan.number) not in log.done


def plan_prune(
    store: ObjectStore,
    facts: TableFacts,
    samples: Samples,
    *,
    run_id: str,
    began: Beginning | None = None,
) -> list[Plan]:
    """Plans to take what left the manifest out of the table, one plan for each object that holds some.

    Call again once the returned plans are done, until none is returned.

    Returns:
        The plans, and open ones of other runs that have to be done first.
    """
    gone = find_gone(store, facts, samples, began=began)
    planner = Planner(store, facts, gone.log, run_id=run_id, mattering=gone.open_plans)
    for dataset, target, named in gone.by_target():
        rows = [_planned_rows(store, facts, dataset, number, ids) for number, ids in named.items()]
        planner.create(dataset, target, as_media_lie(pa.concat_tables(rows)), kind="prune")
    return planner.plans


def _planned_rows(
    store: ObjectStore, facts: TableFacts, dataset: str, number: int, hashes: np.ndarray
) -> pa.Table:
    """A plan's rows of some samples, each with the plan whose failure object holds it."""
    with open_plan(store, facts, dataset, number) as (_, file):
        rows = file.read().cast(facts.sample_schema)
    rows = rows.filter(pa.array(IdIndex(hashes).find(hash_ids(dataset, rows["sample_id"])) >= 0))
    failed = pc.is_in(rows["sample_id"], failed_ids(store, facts, dataset, number))
    return rows.append_column(FAILED_IN, pc.if_else(failed, pa.scalar(number, pa.int64()), -1))


def failed_ids(
    store: ObjectStore, facts: TableFacts, dataset: str, number: int, codes: tuple[str, ...] = ()
) -> pa.Array:
    """The samples in a plan's failure object, those of some codes or all; none where it has none."""
    key = facts.keys.failure_object(dataset, number)

    def read() -> pa.Table:
        with open_parquet(store, key) as (file, _):
            return file.read(["sample_id", "error"])

    try:
        rows = reread(read, what=f"{store.uri}/{key}")
    except FileNotFoundError:
        return pa.array([], pa.string())
    if codes:
        rows = rows.filter(pc.is_in(rows["error"], pa.array(codes)))
    return rows["sample_id"].combine_chunks()
