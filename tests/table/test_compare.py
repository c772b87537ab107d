"""A manifest against the log: in memory and by parts, the same."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from featurex_ray.table import FeatureTable
from featurex_ray.table import compare as comparing
from featurex_ray.table.compare import State, compare
from featurex_ray.table.ids import hash_samples, hash_versions
from tests.table.conftest import FACTS, World, run


def mixed() -> Iterator[pa.RecordBatch]:
    """Two datasets, row by row in turn: new, changed, failed before, done and open ones."""
    batches = [
        World(num_samples=40, version="1").samples(),
        World(num_samples=30, version="2", datasets=("e",)).samples(),
    ]
    for ours, theirs in zip(*map(list, batches), strict=False):
        both = pa.Table.from_batches([ours, theirs])
        yield both.take(pa.array(np.argsort(np.arange(len(both)) % 5, kind="stable"))).to_batches()[0]


def test_by_parts_comes_to_the_same(local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = World(num_samples=20, version="1", failing=frozenset({"s0012"}), datasets=("d", "e"))
    run(local_table, failing)
    local_table.plan(World(num_samples=25, version="2", datasets=("e",)).samples, run_id="open")
    in_memory = compare(local_table.store, FACTS, mixed)
    monkeypatch.setattr(comparing, "IN_MEMORY", 7)
    by_parts = compare(local_table.store, FACTS, mixed)
    assert {State.NEW, State.DONE, State.FAILED, State.OPEN} <= {State(s) for s in in_memory.state}
    assert by_parts.work == in_memory.work
    assert by_parts.to_do == in_memory.to_do
    assert by_parts.open_plans == in_memory.open_plans
    for ours, theirs in zip(by_parts.rows(3, 33), in_memory.rows(3, 33), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_changed_samples_by_parts(local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    run(local_table, World(num_samples=20, version="1", failing=frozenset({"s0003"})))
    changed = World(num_samples=22, version="2")
    in_memory = compare(local_table.store, FACTS, changed.samples)
    monkeypatch.setattr(comparing, "IN_MEMORY", 7)
    by_parts = compare(local_table.store, FACTS, changed.samples)
    assert in_memory.work.changed == 20
    for ours, theirs in zip(by_parts.rows(0, 22), in_memory.rows(0, 22), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    run(local_table, changed)
    assert compare(local_table.store, FACTS, changed.samples).work.done == 22


@pytest.mark.parametrize("in_memory", [7, 1_000])
@pytest.mark.parametrize("newer", ["20260102T220000-bbbbbb", "20260101T220000-bbbbbb"])
def test_what_a_later_run_planned_stands(
    local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch, in_memory: int, newer: str
) -> None:
    """Two that overlap, with manifests of two nights, would undo each other's work without end."""
    monkeypatch.setattr(comparing, "IN_MEMORY", in_memory)
    yesterday, today = World(num_samples=20, version="1"), World(num_samples=20, version="2")
    older = "20260101T220000-aaaaaa"
    began = local_table.beginning(older)
    run(local_table, yesterday, run_id=older)
    run(local_table, today, run_id=newer)
    assert local_table.plan(yesterday.samples, run_id=older, began=began) == []
    few = World(num_samples=5, version="1")
    assert local_table.plan_prune(few.samples, run_id=older, began=began) == []

    # Who begins after both may put the old version back, even by a clock that is behind.
    plans = local_table.plan(yesterday.samples, run_id=older, began=local_table.beginning(older))
    assert {plan.kind for plan in plans} == {"changed"}
    assert sum(plan.num_samples for plan in plans) == 20


def test_a_large_manifest_is_planned_in_rounds(local_table: FeatureTable) -> None:
    world = World(num_samples=20)
    plans = local_table.plan(world.samples, run_id="one", max_samples_per_plan=4, most_new_samples=10)
    assert [plan.num_samples for plan in plans] == [4, 4, 2]
    # Another run plans as much again: it doesn't wait for what the first one planned.
    both = local_table.plan(world.samples, run_id="two", max_samples_per_plan=4, most_new_samples=10)
    assert [plan.num_samples for plan in both] == [4, 4, 2, 4, 4, 2]
    assert run(local_table, world) == 6


def test_hashes_of_versions_are_by_value() -> None:
    hashes = hash_versions(pa.array(["1", None, "2", "1", ""]))
    assert hashes[1] == 0
    assert hashes[0] == hashes[3]
    assert len({*hashes.tolist()}) == 4
    np.testing.assert_array_equal(hash_versions(pa.nulls(3, pa.string())), np.zeros(3, np.uint64))


def test_the_hash_of_samples_knows_order_and_bounds_but_no_chunks() -> None:
    one = pa.chunked_array([["ab", "c", "d"]])
    assert hash_samples("x", one) == hash_samples("x", pa.chunked_array([["ab"], ["c", "d"]]))
    assert hash_samples("x", one) == hash_samples("x", pa.chunked_array([["z", "ab", "c", "d"]]).slice(1))
    others = [["a", "bc", "d"], ["c", "ab", "d"], ["ab", "c"], ["ab", "c", "d", ""]]
    assert len({hash_samples("x", pa.chunked_array([ids])) for ids in [["ab", "c", "d"], *others]}) == 5
    assert hash_samples("x", one) != hash_samples("y", one)
