"""Leases: one of several runs works on a plan, until it is gone or stands still."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

from featurex_ray.table import FeatureTable, lease
from featurex_ray.table.log import Plan
from tests.table.conftest import World


@pytest.fixture
def plan(table: FeatureTable) -> Plan:
    return table.plan(World(num_samples=2).samples, run_id="r")[0]


def test_one_of_many_claims(table: FeatureTable, plan: Plan) -> None:
    barrier = threading.Barrier(6)

    def claim(n: int) -> bool:
        barrier.wait()
        return table.leases(f"run-{n}").claim(plan)

    with ThreadPoolExecutor(6) as racers:
        assert sum(racers.map(claim, range(6))) == 1


def test_a_claim_is_kept(table: FeatureTable, plan: Plan) -> None:
    mine, other = table.leases("mine"), table.leases("other")
    assert mine.claim(plan)
    assert not other.claim(plan)
    assert mine.claim(plan)
    assert table.leases("mine").claim(plan)


def test_a_still_counter_is_taken_over(
    table: FeatureTable, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now))
    owner, other = table.leases("owner"), table.leases("other")
    assert owner.claim(plan)
    for _ in range(5):  # while the counter moves, wait
        owner.beat()
        assert not other.claim(plan)
        now += lease.STILL_SECONDS - 1
    assert not other.claim(plan)
    now += 2
    assert other.claim(plan)
    assert not table.leases("third").claim(plan)
    assert not table.leases("owner").claim(plan)


def test_of_many_who_take_over_one_does(
    table: FeatureTable, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now))
    table.leases("owner").claim(plan)
    others = [table.leases(f"run-{n}") for n in range(5)]
    assert not any(other.claim(plan) for other in others)
    now += lease.STILL_SECONDS
    with ThreadPoolExecutor(5) as racers:
        assert sum(racers.map(lambda other: other.claim(plan), others)) == 1


def test_a_dead_process_is_not_waited_for(table: FeatureTable, plan: Plan) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert table.leases("owner").claim(plan)
    key = table.facts.keys.lease(plan.dataset, plan.number)
    held = json.loads(table.store.read(key)[0])
    table.store.put(key, json.dumps(held | {"pid": gone.pid}).encode())
    assert table.leases("other").claim(plan)


def test_a_run_that_ended_is_not_waited_for(table: FeatureTable, plan: Plan) -> None:
    owner, other = table.leases("owner"), table.leases("other")
    with owner.beating():
        assert owner.claim(plan)
        assert not other.claim(plan)
    assert other.claim(plan)


def test_beating(table: FeatureTable, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    leases = table.leases("owner")
    counter, deadline = 0, time.monotonic() + 60
    with leases.beating():
        while counter < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            with suppress(FileNotFoundError):
                counter = int(table.store.read(table.facts.keys.beat("owner"))[0])
