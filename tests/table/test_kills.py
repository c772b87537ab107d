"""A run is killed at every moment before and after a store operation, and run again: R1 in process."""

import os
from pathlib import Path

import pytest

from featurex_ray.table import FeatureTable, open_store
from featurex_ray.table.store import Hook
from featurex_ray.table.verify import verify
from tests.table.conftest import FACTS, Killed, World, content, kill_at, observed, run

FIRST = World(num_samples=4, version="1", failing=frozenset({"s0001", "s0002"}))
SECOND = World(num_samples=5, version="22", failing=frozenset({"s0002"}))
"""Together they make new objects, failures, changed samples and mended ones."""


STRIDES = os.environ.get("FEATUREX_KILL_STRIDES", "29,71").split(",")
"""Every so many moments are tried, locally and on S3; `FEATUREX_KILL_STRIDES=1,1` tries them all."""


def both_runs(uri: str, hook: Hook | None = None) -> FeatureTable:
    table = FeatureTable.open_or_create(observed(open_store(uri), hook), FACTS)
    run(table, FIRST, per_plan=3)
    run(table, SECOND, per_plan=3)
    return table


def check_kill(uri: str, n: int) -> None:
    """Killed at moment n, then run again; whoever reads in between sees whole samples, each once."""
    hook, _ = kill_at(n)
    with pytest.raises(Killed):
        both_runs(uri, hook)
    store = open_store(uri)
    features, _ = content(FeatureTable(store, FACTS))
    assert len(features) == len(set(features))
    assert set(features) <= {*FIRST.expected()[0], *SECOND.expected()[0]}
    table = both_runs(uri)
    assert content(table) == SECOND.expected()
    assert verify(store, FACTS, SECOND.samples).ok


def num_moments(uri: str) -> int:
    hook, moments = kill_at(0)
    both_runs(uri, hook)
    return moments()


def test_kill_locally(tmp_path: Path) -> None:
    for n in range(1, num_moments(str(tmp_path / "counted")) + 1, int(STRIDES[0])):
        check_kill(str(tmp_path / str(n)), n)


def test_kill_on_s3(s3_root: str) -> None:
    for n in range(1, num_moments(f"{s3_root}/counted") + 1, int(STRIDES[1])):
        check_kill(f"{s3_root}/{n}", n)
