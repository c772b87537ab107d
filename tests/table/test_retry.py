"""Failed samples again: which, from what rows, and what becomes of their failure rows."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from featurex_ray.table import FeatureTable
from featurex_ray.table.log import Plan
from featurex_ray.table.verify import verify
from tests.table.conftest import World, content, observed, public_etags, run, stage

FAILING = frozenset({"s0001", "s0004", "s0007"})


def everything(rows: pa.Table) -> np.ndarray:
    return np.ones(len(rows), bool)


def retry(table: FeatureTable, world: World, **options: object) -> list[Plan]:
    plans = table.plan_retry(table.failed(**options), allowed=everything, run_id="retry")  # type: ignore[arg-type]
    for plan in plans:
        stage(table, plan, world, run_id="retry")
        table.publish(plan)
    return plans


def test_retry(table: FeatureTable) -> None:
    run(table, World(failing=FAILING))
    before = public_etags(table.store)
    still = World(failing=frozenset({"s0004"}))
    (plan,) = retry(table, still)
    assert (plan.kind, plan.target, plan.num_samples, plan.failed_in) == ("new", plan.number, 3, (0, 1, 2))
    assert content(table) == still.expected()
    assert verify(table.store, table.facts, still.samples).ok
    now = public_etags(table.store)
    assert all(now[key] == etag for key, etag in before.items() if key.startswith("t/"))
    retry(table, World())
    assert content(table) == World().expected()
    assert retry(table, World()) == []


def test_retry_takes_the_rows_of_the_plans(local_table: FeatureTable) -> None:
    """Carried columns and all, though the manifest may be gone."""
    run(local_table, World(num_samples=2, version="7", failing=frozenset({"s0001"})))
    (plan,) = retry(local_table, World(num_samples=2, version="7"))
    (row,) = local_table.read_plan(plan).to_pylist()
    assert (row["sample_id"], row["uri"], row["version"], row["label"]) == ("s0001", "u/s0001", "7", "1")


def test_retry_by_code(local_table: FeatureTable) -> None:
    run(local_table, World(failing=FAILING))
    assert local_table.failed(codes=["timeout"]).num_samples == 0
    assert local_table.failed(codes=["timeout", "truncated"]).num_samples == 3
    assert retry(local_table, World(), codes=["not_found"]) == []
    assert len(retry(local_table, World(), codes=["truncated"])) == 1


def test_retry_of_one_dataset(local_table: FeatureTable) -> None:
    run(local_table, World(num_samples=2, datasets=("a", "b"), failing=frozenset({"s0001"})))
    assert [plan.dataset for plan in retry(local_table, World(num_samples=2), dataset="b")] == ["b"]


def test_retry_leaves_what_may_not_be_read(local_table: FeatureTable) -> None:
    run(local_table, World(failing=FAILING))

    def allowed(rows: pa.Table) -> np.ndarray:
        return np.array([uri == "u/s0004" for uri in rows["uri"].to_pylist()])

    (plan,) = local_table.plan_retry(local_table.failed(), allowed=allowed, run_id="r")
    assert local_table.read_plan(plan)["sample_id"].to_pylist() == ["s0004"]


def test_retry_that_was_killed_is_gone_on_with(local_table: FeatureTable) -> None:
    run(local_table, World(failing=FAILING))
    first = local_table.plan_retry(local_table.failed(), allowed=everything, run_id="killed")
    again = local_table.failed()
    assert (again.num_samples, again.num_open) == (0, 3)
    assert local_table.plan_retry(again, allowed=everything, run_id="next") == first


def test_verify_holds_at_every_moment_of_a_retry(table: FeatureTable) -> None:
    world = World(num_samples=4, failing=frozenset({"s0001", "s0002"}))
    run(table, world)
    checks = 0

    def check(operation: str, moment: str, key: str) -> None:
        nonlocal checks
        if moment == "after" and operation in {"create", "replace", "put", "link", "rename"}:
            assert verify(table.store, table.facts, world.samples).ok, (operation, key)
            checks += 1

    retry(replace(table, store=observed(table.store, check)), World(num_samples=4))
    assert checks >= 5


@pytest.mark.parametrize("most", [2, 1])
def test_retry_plans_are_bounded(local_table: FeatureTable, most: int) -> None:
    run(local_table, World(failing=FAILING))
    plans = local_table.plan_retry(
        local_table.failed(), allowed=everything, run_id="r", max_samples_per_plan=most
    )
    assert [plan.num_samples for plan in plans] == {2: [2, 1], 1: [1, 1, 1]}[most]
