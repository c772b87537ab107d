"""Samples that left the manifest leave the table; those of other datasets stay."""

import threading
from concurrent.futures import ThreadPoolExecutor

from featurex_ray.table import FeatureTable
from featurex_ray.table.verify import verify
from tests.table.conftest import World, content, public_etags, run, stage


def prune(table: FeatureTable, world: World, *, run_id: str = "prune") -> int:
    num_plans = 0
    while plans := table.plan_prune(world.samples, run_id=run_id):
        for plan in plans:
            stage(table, plan, world)
            table.publish(plan)
        num_plans += len(plans)
    return num_plans


def test_prune(table: FeatureTable) -> None:
    """Good and failed samples that left; each object that held some is replaced once."""
    run(table, World(num_samples=12, failing=frozenset({"s0001", "s0010"})))
    smaller = World(num_samples=7, failing=frozenset({"s0001"}))
    assert table.num_gone(smaller.samples) == 5
    before = public_etags(table.store)
    assert prune(table, smaller) == 1
    assert content(table) == smaller.expected()
    changed = {key for key, etag in public_etags(table.store).items() if before[key] != etag}
    assert changed == {"t/dataset=d/0000000000.parquet", "t.failures/dataset=d/0000000000.parquet"}
    assert verify(table.store, table.facts, smaller.samples).ok
    assert table.num_gone(smaller.samples) == 0
    assert prune(table, smaller) == 0


def test_prune_touches_only_datasets_that_the_manifest_names(table: FeatureTable) -> None:
    run(table, World(num_samples=4, datasets=("a", "b")))
    prune(table, World(num_samples=1, datasets=("b",)))
    features, _ = content(table)
    assert {name for dataset, name, _ in features if dataset == "a"} == {"s0000", "s0001", "s0002", "s0003"}
    assert {name for dataset, name, _ in features if dataset == "b"} == {"s0000"}


def test_a_pruned_sample_can_come_back(table: FeatureTable) -> None:
    run(table, World(num_samples=6))
    prune(table, World(num_samples=3))
    assert table.compare(World(num_samples=6).samples).new == 3
    run(table, World(num_samples=6))
    assert content(table) == World(num_samples=6).expected()
    assert verify(table.store, table.facts, World(num_samples=6).samples).ok


def test_prune_after_changes(table: FeatureTable) -> None:
    """A sample's object is that of its last plan; one that failed there has its failure there."""
    run(table, World(num_samples=6, version="1"), per_plan=6)
    run(table, World(num_samples=6, version="2", failing=frozenset({"s0005"})), per_plan=6)
    left = World(num_samples=3, version="2")
    prune(table, left)
    assert content(table) == left.expected()
    assert verify(table.store, table.facts, left.samples).ok


def test_prune_waits_for_open_plans(local_table: FeatureTable) -> None:
    run(local_table, World(num_samples=6, version="1"), per_plan=6)
    (open_plan,) = local_table.plan(World(num_samples=2, version="2").samples, run_id="other")
    small = World(num_samples=3, version="1")
    assert local_table.num_gone(small.samples) == 0
    assert local_table.plan_prune(small.samples, run_id="p") == [open_plan]
    prune(local_table, small)
    assert content(local_table) == small.expected()


def test_verify_while_a_prune_is_open(local_table: FeatureTable) -> None:
    run(local_table, World(num_samples=6))
    (plan,) = local_table.plan_prune(World(num_samples=3).samples, run_id="p")
    assert verify(local_table.store, local_table.facts).ok
    local_table.publish(plan)
    local_table.store.delete(local_table.facts.keys.done_record("d", plan.number))  # published, not done
    assert verify(local_table.store, local_table.facts).ok
    assert [done.num_samples for done in local_table.finish_published()] == [3]


def test_racing_prunes(table: FeatureTable) -> None:
    run(table, World(num_samples=12))
    small = World(num_samples=4)
    barrier = threading.Barrier(3)

    def race(n: int) -> int:
        barrier.wait()
        return prune(table, small, run_id=f"run-{n}")

    with ThreadPoolExecutor(3) as racers:
        assert any(racers.map(race, range(3)))  # who comes late finds all done
    assert content(table) == small.expected()
    pruning = [plan for plan in range(3, 10) if table.store.head(table.facts.keys.plan("d", plan))]
    assert len(pruning) == 2
