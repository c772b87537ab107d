"""What collection deletes, and what it leaves."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import botocore.session
import pytest

from featurex_ray.table import FeatureTable, open_store
from featurex_ray.table.collect import CLOCK, collect, now
from featurex_ray.table.store import ObjectStore, S3Store
from featurex_ray.table.verify import verify
from tests.table.conftest import FACTS, World, content, public_etags, run, stage

NOTHING = timedelta(seconds=-60)
"""Everything is older than this."""


def staged(store: ObjectStore) -> list[str]:
    return [item.key for item in store.list("_featurex/t/staging/")]


def test_collect(table: FeatureTable) -> None:
    world = World(num_samples=8, failing=frozenset({"s0001"}))
    run(table, world, per_plan=4)
    public = public_etags(table.store)
    assert table.collect() == {}  # nothing is a day old
    assert collect(table.store, table.facts, min_age=NOTHING)["parts"] == 4
    assert staged(table.store) == []
    assert public_etags(table.store) == public
    assert content(table) == world.expected()
    assert run(table, world) == 0
    assert verify(table.store, table.facts, world.samples).ok


def test_collect_leaves_parts_of_open_plans(table: FeatureTable) -> None:
    world = World(num_samples=8)
    one, two = table.plan(world.samples, run_id="r", max_samples_per_plan=4)
    for plan in (one, two):
        stage(table, plan, world)
        table.leases("r").claim(plan)
    table.publish(one)
    assert collect(table.store, table.facts, min_age=NOTHING) == {"parts": 2, "leases": 1}
    assert table.is_staged(two)
    assert all("0000000001/" in key for key in staged(table.store))


def test_collect_with_done_plans_whose_parts_are_gone(table: FeatureTable) -> None:
    """Whoever still holds such a plan finds that it is done."""
    (plan,) = table.plan(World(num_samples=3).samples, run_id="r")
    stage(table, plan, World(num_samples=3))
    first = table.publish(plan)
    collect(table.store, table.facts, min_age=NOTHING)
    assert table.publish(plan) == first
    assert table.finish_published() == []


def test_temporary_files_of_killed_writers(tmp_path: Path, local_table: FeatureTable) -> None:
    store = local_table.store
    with store.scratch() as young, store.scratch() as old:
        for folder in (young, old):
            (folder / "object").write_bytes(b"half")
        os.utime(old / "object", (0, 0))
        assert collect(store, local_table.facts) == {"temporary files": 1}
        assert (young / "object").exists()
        assert not old.exists()


def test_abandoned_uploads(s3_root: str) -> None:
    """This server says of every upload that it began years ago; those of others are left anyway."""
    store = open_store(s3_root)
    assert isinstance(store, S3Store)
    table = FeatureTable.open_or_create(store, FACTS)
    s3 = botocore.session.get_session().create_client("s3", endpoint_url=store.endpoint)
    for key in ("out/t/dataset=d/0000000000.parquet", "out/_featurex/t/x", "out/another/object", "elsewhere"):
        s3.create_multipart_upload(Bucket=store.bucket, Key=key)
    assert collect(store, table.facts) == {"uploads": 2}
    left = [item["Key"] for item in s3.list_multipart_uploads(Bucket=store.bucket)["Uploads"]]
    assert sorted(left) == ["elsewhere", "out/another/object"]


def test_now(store: ObjectStore) -> None:
    away = abs(now(store) - datetime.now(UTC))
    assert away < timedelta(seconds=5)
    assert list(store.list(CLOCK)) == []


@pytest.mark.parametrize("key", ["t/dataset=d/0000000000.parquet", "t.failures/dataset=d/0000000000.parquet"])
def test_collect_never_deletes_what_is_public(store: ObjectStore, key: str) -> None:
    store.create(key, b"public")
    with pytest.raises(ValueError, match="is public"):
        store.delete(key)
    assert store.head(key)
