"""What `_featurex/` says of runs that were and of plans that are open, without a cluster."""

from dataclasses import replace
from pathlib import Path

import pytest

from featurex_ray.errors import TableNotFoundError
from featurex_ray.table.status import status_of
from featurex_ray.table.table import FeatureTable
from tests.table.conftest import World, run, stage


def report(run_id: str, **changes: object) -> dict[str, object]:
    plain = {
        "run_id": run_id,
        "tables": [{"table": "t"}],
        "started_at": "2026-01-02T03:04:05+00:00",
        "seconds": 12.5,
        "planned": 10,
        "failed": 1,
        "clips_per_second": {"run": 0.8},
        "watched": {"bounds": {"extract": 0.75, "decode": 0.25}},
    }
    return plain | changes


def test_an_open_plan_shows_what_is_staged_and_who_works_on_it(root: str, table: FeatureTable) -> None:
    world = World(num_samples=6)
    first, second = table.plan(world.samples, run_id="mine", max_samples_per_plan=3)
    stage(table, first, world)
    table.publish(first)
    table.write_part(second, world.part(["s0003", "s0004"]))
    leases = table.leases("mine")
    assert leases.claim(second)
    leases.beat()

    (plan,) = status_of(root).open_plans
    assert (plan.table, plan.plan_id, plan.planned_by) == ("t", second.plan_id, "mine")
    assert (plan.samples, plan.staged, plan.worked_on_by) == (3, 2, "mine")
    assert plan.seconds_since_beat is not None
    assert plan.seconds_since_beat < 60


def test_a_plan_that_nobody_took_up_has_no_worker(root: str, table: FeatureTable) -> None:
    table.plan(World(num_samples=2).samples, run_id="gone")
    (plan,) = status_of(root).open_plans
    assert (plan.staged, plan.worked_on_by, plan.seconds_since_beat) == (0, None, None)


def test_past_runs_come_latest_first_and_as_many_as_asked_for(root: str, table: FeatureTable) -> None:
    run(table, World(num_samples=2))
    for day in (1, 3, 2):
        table.save_report(f"2026010{day}T000000-aaaaaa", report(f"2026010{day}T000000-aaaaaa"))
    found = status_of(root, most_runs=2)
    assert found.open_plans == []
    assert [past.run_id[:8] for past in found.runs] == ["20260103", "20260102"]
    assert (found.runs[0].bounded_by, found.runs[0].clips_per_second) == ("extract 75%", 0.8)


def test_a_run_that_nothing_bounded_says_nothing(root: str, table: FeatureTable) -> None:
    table.save_report("20260101T000000-aaaaaa", report("20260101T000000-aaaaaa", watched={"bounds": {}}))
    assert [past.bounded_by for past in status_of(root).runs] == [""]


def test_a_table_named_runs_is_no_run(root: str, table: FeatureTable) -> None:
    FeatureTable.open_or_create(table.store, replace(table.facts, name="runs"))
    assert status_of(root).runs == []


def test_no_table_fails(tmp_path: Path) -> None:
    with pytest.raises(TableNotFoundError, match="holds no feature table"):
        status_of(str(tmp_path))
