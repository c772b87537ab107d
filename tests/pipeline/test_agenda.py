"""What a run asks its agenda for, and how often the manifest is read for it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from featurex_ray.pipeline.agenda import ManifestAgenda
from featurex_ray.pipeline.source import assignments_of
from featurex_ray.table import FeatureTable, open_store
from featurex_ray.table.log import Plan
from tests.table.conftest import FACTS, World, stage


class Manifest:
    """A world's samples, which counts how often they are read."""

    carried = FACTS.carried

    def __init__(self, world: World) -> None:
        self.num_samples = world.num_samples * len(world.datasets)
        self.times_read = 0
        self._world = world

    def batches(self) -> Iterator[pa.RecordBatch]:
        """See `SampleSet.batches`."""
        self.times_read += 1
        return self._world.samples()


@pytest.fixture
def table(tmp_path: Path) -> FeatureTable:
    return FeatureTable.open_or_create(open_store(str(tmp_path / "out")), FACTS)


def see_done(table: FeatureTable, plans: list[Plan], world: World) -> None:
    for plan in plans:
        stage(table, plan, world)
        table.publish(plan)


def test_a_run_that_planned_every_sample_itself_reads_the_manifest_no_more(table: FeatureTable) -> None:
    world = World(12)
    manifest = Manifest(world)
    agenda = ManifestAgenda(manifest, 5)
    plans = agenda.plans(table, run_id="ours")
    assert [plan.num_samples for plan in plans] == [5, 5, 2]
    see_done(table, plans, world)
    read = manifest.times_read
    assert agenda.plans(table, run_id="ours") == []
    assert manifest.times_read == read
    assert table.compare(world.samples).done == 12


def test_a_run_looks_again_where_another_planned_some_of_the_samples(table: FeatureTable) -> None:
    older = World(4, version="1")
    (theirs,) = table.plan(older.samples, run_id="theirs", max_samples_per_plan=5)
    world = World(6, version="2")
    agenda = ManifestAgenda(Manifest(world), 5)
    plans = agenda.plans(table, run_id="ours")
    assert sorted((plan.run_id, plan.num_samples) for plan in plans) == [("ours", 2), ("theirs", 4)]
    see_done(table, plans, world)
    assert theirs in plans
    # Theirs were made from version 1, which is known only now.
    (changed,) = agenda.plans(table, run_id="ours")
    assert (changed.kind, changed.num_samples) == ("changed", 4)
    see_done(table, [changed], world)
    assert agenda.plans(table, run_id="ours") == []


def test_a_run_looks_again_where_another_planned_since(table: FeatureTable) -> None:
    world, others = World(8, version="2"), World(8, version="1")
    agenda = ManifestAgenda(Manifest(world), 5)
    first, second = agenda.plans(table, run_id="ours")
    see_done(table, [first], world)
    (theirs,) = (plan for plan in table.plan(others.samples, run_id="theirs") if plan.run_id == "theirs")
    see_done(table, [second], world)
    assert agenda.plans(table, run_id="ours") == [theirs]
    see_done(table, [theirs], others)
    (again,) = agenda.plans(table, run_id="ours")
    assert (again.kind, again.num_samples) == ("changed", theirs.num_samples)


def test_pruning_follows_plans_that_name_every_sample(table: FeatureTable) -> None:
    before = World(9)
    see_done(table, table.plan(before.samples, run_id="before", max_samples_per_plan=20), before)
    world = World(3, version="2")
    agenda = ManifestAgenda(Manifest(world), 5, prune=True)
    (changed,) = agenda.plans(table, run_id="ours")
    see_done(table, [changed], world)
    (prune,) = agenda.plans(table, run_id="ours")
    assert (prune.kind, prune.num_samples) == ("prune", 6)


def test_only_plans_of_one_run_share_their_media(tmp_path: Path) -> None:
    """Another run may have read another manifest, with other media of the same names."""
    tables = [
        FeatureTable.open_or_create(open_store(str(tmp_path)), replace(FACTS, name=name)) for name in "ab"
    ]
    world = World(4)
    (stale,) = tables[0].plan(world.samples, run_id="killed")
    plans = [ManifestAgenda(Manifest(world), 5).plans(table, run_id="ours") for table in tables]
    assert [plan.samples_hash for (plan,) in plans] == [stale.samples_hash] * 2
    assert [sorted(each.plans) for each in assignments_of(plans)] == [[0], [1]]
    ours = [[replace(plan, run_id="ours")] for (plan,) in plans]
    assert [sorted(each.plans) for each in assignments_of(ours)] == [[0, 1]]
