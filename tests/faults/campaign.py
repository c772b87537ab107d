"""What the campaigns share: a story with every kind of plan, processes that are really killed, an oracle."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from featurex_ray.table import FeatureTable, open_store
from featurex_ray.table.collect import collect
from featurex_ray.table.log import Plan
from featurex_ray.table.read import TableReader
from featurex_ray.table.store import Hook
from featurex_ray.table.verify import verify
from tests.table.conftest import FACTS, World, content, observed, stage

FIRST = World(num_samples=4, version="1", failing=frozenset({"s0001", "s0002"}))
SECOND = World(num_samples=5, version="22", failing=frozenset({"s0002", "s0003"}))
THIRD = World(num_samples=5, version="22", failing=frozenset({"s0003"}))
LAST = World(num_samples=3, version="22")
"""New objects, failures, changed samples, mended ones, retried ones, pruned ones."""

YOUNG = timedelta(seconds=-60)
"""Collection takes everything that it may take at all, whatever its age."""


def count_of(name: str, subset: int, full: int) -> int:
    """How often a campaign is done: `FEATUREX_FAULTS_<NAME>`, or the full count under `make torture`."""
    default = full if os.environ.get("FEATUREX_TORTURE") else subset
    return int(os.environ.get(f"FEATUREX_FAULTS_{name}", default))


@dataclass
class Runner:
    """A run over tables, as the pipeline makes it, but small: claims, stages, publishes.

    Args:
        uri: The output's root.
        hook: On the store's seam.
        run_id: Its name.
        per_plan: Samples of a plan.
    """

    uri: str
    hook: Hook | None = None
    run_id: str = "run"
    per_plan: int = 3
    table: FeatureTable = field(init=False)

    def __post_init__(self) -> None:
        store = observed(open_store(self.uri), self.hook)
        self.table = FeatureTable.open_or_create(store, FACTS)

    def extract(self, world: World) -> None:
        self._until_none(
            world,
            lambda: self.table.plan(world.samples, run_id=self.run_id, max_samples_per_plan=self.per_plan),
        )

    def prune(self, world: World) -> None:
        self._until_none(world, lambda: self.table.plan_prune(world.samples, run_id=self.run_id))

    def retry(self, world: World) -> None:
        self.table.finish_published()
        failed = self.table.failed()
        self._see_done(world, self.table.plan_retry(failed, allowed=everything, run_id=self.run_id))

    def _until_none(self, world: World, plans: Callable[[], list[Plan]]) -> None:
        self.table.finish_published()
        while found := plans():
            self._see_done(world, found)

    def _see_done(self, world: World, plans: list[Plan]) -> None:
        leases = self.table.leases(self.run_id)
        for plan in plans:
            leases.claim(plan)
            if plan.kind != "prune" and not self.table.is_done(plan):
                stage(self.table, plan, world, run_id=self.run_id, per_part=2)
            self.table.publish(plan)


def everything(rows: pa.Table) -> np.ndarray:
    return np.ones(len(rows), bool)


def tell_story(uri: str, hook: Hook | None = None) -> FeatureTable:
    """All kinds of plans, one after the other; from wherever it was left."""
    runner = Runner(uri, hook)
    runner.extract(FIRST)
    runner.extract(SECOND)
    runner.retry(THIRD)
    runner.prune(LAST)
    collect(runner.table.store, FACTS, min_age=YOUNG)
    return runner.table


def rows_of(table: FeatureTable) -> list[dict[str, Any]]:
    """Every feature row, without what names the run, in order."""
    rows = TableReader(table.store, FACTS).to_arrow().drop_columns(["run_id"]).to_pylist()
    return sorted(rows, key=lambda row: (row["dataset"], row["sample_id"], row["clip_index"]))


def check_between(uri: str) -> None:
    """What a reader sees in the middle of it: whole samples, each once."""
    features, _ = content(FeatureTable(open_store(uri), FACTS))
    assert len(features) == len(set(features)), "a row twice"
    for dataset, name in {(dataset, name) for dataset, name, _ in features}:
        clips = [clip for d, n, clip in features if (d, n) == (dataset, name)]
        assert clips == list(range(4 if int(name[1:]) % 3 == 0 else 1)), f"half of {name}"


def check_end(uri: str, oracle: list[dict[str, Any]]) -> None:
    """The table is that of an uninterrupted run, and says so of itself."""
    table = FeatureTable(open_store(uri), FACTS)
    assert content(table) == LAST.expected()
    assert rows_of(table) == oracle
    report = verify(table.store, FACTS, LAST.samples)
    assert report.ok, report.lines()


def kill_self_at(n: int) -> Hook:
    """SIGKILL at the n-th moment: no handler, no `finally`, nothing runs after it."""
    moments = 0

    def hook(operation: str, moment: str, key: str) -> None:
        nonlocal moments
        moments += 1
        if moments == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def count_moments(uri: str) -> int:
    moments = 0

    def hook(operation: str, moment: str, key: str) -> None:
        nonlocal moments
        moments += 1

    tell_story(uri, hook)
    return moments


def in_process(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Starts a function of a module in a process of its own, which shares nothing with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.campaign"])
    process = context.Process(target=_with_environment, args=(dict(os.environ), work, arguments))
    process.start()
    return process


def _with_environment(environment: dict[str, str], work: Callable[..., None], arguments: Any) -> None:
    os.environ.update(environment)
    work(*arguments)


def story_killed_at(uri: str, n: int) -> None:
    tell_story(uri, kill_self_at(n))
