"""A Delta log over the same files, for its own readers; plain readers see no difference."""

from pathlib import Path

import deltalake
import duckdb
import pytest

from featurex_ray.table import FeatureTable
from featurex_ray.table.delta import export_delta
from featurex_ray.table.read import open_table
from featurex_ray.table.store import S3Store
from featurex_ray.table.verify import verify
from tests.table.conftest import World, content, public_etags, run

SMALL, LARGE = World(num_samples=6, datasets=("a", "b")), World(num_samples=9, datasets=("a", "b"))


def rows_of(uri: str, table: FeatureTable, version: int | None = None) -> list[tuple[str, str, int]]:
    options = None
    if isinstance(table.store, S3Store):
        options = {"AWS_ENDPOINT_URL": table.store.endpoint, "AWS_ALLOW_HTTP": "true"}
    delta = deltalake.DeltaTable(uri, version=version, storage_options=options)
    found = delta.to_pyarrow_table(columns=["dataset", "sample_id", "clip_index"]).to_pylist()
    return sorted(tuple(row.values()) for row in found)


def test_export_delta(table: FeatureTable) -> None:
    run(table, SMALL)
    before = public_etags(table.store, ("t/",))
    uri, version, num_objects = export_delta(open_table(f"{table.store.uri}/t"))
    assert (version, num_objects) == (0, 4)
    run(table, LARGE)
    assert export_delta(open_table(uri)) == (uri, 1, 6)
    assert export_delta(open_table(uri)) == (uri, 1, 6)
    assert rows_of(uri, table) == LARGE.expected()[0]
    assert rows_of(uri, table, version=0) == SMALL.expected()[0]  # time travel
    assert content(table) == LARGE.expected()
    assert verify(table.store, table.facts, LARGE.samples).ok
    now = public_etags(table.store, ("t/",))
    assert all(now[key] == etag for key, etag in before.items())


def test_replaced_objects_are_named_anew(table: FeatureTable) -> None:
    run(table, World(num_samples=6, version="1"))
    uri, _, _ = export_delta(open_table(f"{table.store.uri}/t"))
    run(table, World(num_samples=6, version="2222"))
    assert export_delta(open_table(uri))[1] == 1
    assert rows_of(uri, table) == World(num_samples=6).expected()[0]


def test_no_checkpoint_ever_lies_among_the_features(
    local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{local_table.store.uri}/t"
    for num_samples in range(1, 14):
        run(local_table, World(num_samples=num_samples))
        assert export_delta(open_table(uri))[1] == num_samples - 1
    assert not list(Path(uri, "_delta_log").glob("*.parquet"))
    counted = duckdb.sql(f"SELECT count(*) FROM '{uri}/**/*.parquet'").fetchall()
    assert counted == [(len(World(num_samples=13).expected()[0]),)]
