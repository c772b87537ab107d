import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurex_ray.errors import RequestError, StoreRefusedError, TableNotFoundError
from featurex_ray.table import FeatureTable
from featurex_ray.table.read import TableReader, open_table
from tests.table.conftest import FACTS, World, run

WORLD = World(datasets=("a", "b"), version="1", failing=frozenset({"s0001"}))


@pytest.fixture
def reader(table: FeatureTable) -> TableReader:
    run(table, WORLD)
    return open_table(f"{table.store.uri}/t")


def test_to_arrow(reader: TableReader) -> None:
    rows = reader.to_arrow()
    assert rows.schema.names == ["dataset", *FACTS.features_schema.names]
    assert rows.num_rows == len(WORLD.expected()[0])
    first = rows.slice(0, 1).to_pylist()[0]
    assert (first["dataset"], first["uri"], first["version"], first["label"]) == (
        "a",
        f"u/{first['sample_id']}",
        "1",
        first["sample_id"][-1],
    )
    assert first["extractor_revision"] == "rev-1"
    assert reader.to_arrow(["sample_id"]).schema.names == ["sample_id"]


def test_failures(reader: TableReader) -> None:
    assert [
        {
            name: row[name]
            for name in ("dataset", "sample_id", "uri", "stage", "error", "message", "attempts", "run_id")
        }
        for row in sorted(reader.failures().to_pylist(), key=lambda row: row["dataset"])
    ] == [
        {
            "dataset": dataset,
            "sample_id": "s0001",
            "uri": "u/s0001",
            "stage": "decode",
            "error": "truncated",
            "message": "broke off",
            "attempts": 1,
            "run_id": "run",
        }
        for dataset in ("a", "b")
    ]


def test_query(reader: TableReader) -> None:
    counts = reader.query("SELECT dataset, count(*) AS n FROM features GROUP BY ALL ORDER BY ALL").to_pylist()
    assert counts == [{"dataset": "a", "n": 23}, {"dataset": "b", "n": 23}]
    assert reader.query("SELECT count(*) AS n FROM failures WHERE dataset = 'b'").to_pylist() == [{"n": 1}]


def test_columns_of_one_name_all_come_back(reader: TableReader) -> None:
    found = reader.query("SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a")
    assert found.to_pylist() == [{"a": 1, "a_2": 2, "a_1": 3, "a_3": 4}]


def test_a_query_for_nothing_fails(reader: TableReader) -> None:
    with pytest.raises(RequestError, match="no rows"):
        reader.query("-- features")


def test_query_fails(reader: TableReader) -> None:
    with pytest.raises(RequestError, match=r"DuckDB refused the query: .*nothing"):
        reader.query("SELECT * FROM nothing")


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{file}'",
        "SELECT 1; COPY (SELECT 1) TO '{file}'",
        "COPY (SELECT 1) TO '{file}'; SELECT 1",
        "COPY (PIVOT features ON dataset USING count(*)) TO '{file}'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{file}'",
        "-- a new one\nATTACH '{file}'",
        "SET log_query_path = '{file}'",
    ],
)
def test_a_query_that_writes_is_refused_before_it_does(reader: TableReader, sql: str, tmp_path: Path) -> None:
    file = tmp_path / "written"
    with pytest.raises(RequestError, match=r"query only reads, .*nothing was executed"):
        reader.query(sql.format(file=file))
    assert not file.exists()


@pytest.mark.parametrize(
    "sql",
    [
        "FROM features",
        "WITH f AS (FROM features) SELECT * FROM f",
        "DESCRIBE features",
        "SUMMARIZE features",
        "EXPLAIN SELECT * FROM features",
        "-- by dataset\nPIVOT features ON dataset USING count(*)",
        "SELECT 1; SELECT 2",
    ],
)
def test_all_that_reads_is_answered(reader: TableReader, sql: str) -> None:
    assert reader.query(sql).num_rows > 0


def test_table_without_rows(table: FeatureTable) -> None:
    empty = open_table(f"{table.store.uri}/t")
    assert empty.to_arrow().num_rows == 0
    assert empty.failures().num_rows == 0
    assert empty.query("SELECT count(*) AS n FROM features").to_pylist() == [{"n": 0}]
    assert empty.search([1.0, 0, 0, 0]).num_rows == 0


def test_search(reader: TableReader) -> None:
    found = reader.search([3.0, 2.0, 1.0, 1.0], k=3).to_pylist()
    assert [(row["sample_id"], row["clip_index"]) for row in found[:2]] == [("s0003", 2), ("s0003", 2)]
    assert {row["dataset"] for row in found[:2]} == {"a", "b"}
    rows = reader.to_arrow(["feature"])["feature"].to_pylist()
    vectors = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = np.sort(vectors @ (np.array([3.0, 2.0, 1.0, 1.0]) / np.sqrt(15)))[::-1][:3]
    np.testing.assert_allclose([row["similarity"] for row in found], similar)


def test_search_by_sample(reader: TableReader) -> None:
    found = reader.search(sample_id="s0004", dataset="a", k=100).to_pylist()
    assert (found[0]["dataset"], found[0]["sample_id"]) == ("b", "s0004")
    assert ("a", "s0004") not in {(row["dataset"], row["sample_id"]) for row in found}
    assert len(found) == 45


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a vector or a sample_id"),
        ({"vector": [1.0]}, r"has shape \(1,\), the table's are \(4,\)"),
        ({"sample_id": "nobody"}, "it is in: none"),
        ({"sample_id": "s0004"}, "it is in: a, b"),
    ],
)
def test_search_fails(reader: TableReader, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        reader.search(**arguments)  # type: ignore[arg-type]


def test_open_table_fails(tmp_path: Path) -> None:
    with pytest.raises(TableNotFoundError, match="no feature table named 't'"):
        open_table(str(tmp_path / "t"))
    with pytest.raises(StoreRefusedError, match="gs://"):
        open_table("gs://bucket/t")


def test_other_tables_and_private_objects_stay_out(reader: TableReader) -> None:
    reader.store.create("t2/dataset=a/0000000000.parquet", b"not ours")
    reader.store.create("t/notes.txt", b"somebody's notes")
    assert reader.to_arrow(["sample_id"]).num_rows == len(WORLD.expected()[0])


@pytest.fixture
def folder(local_table: FeatureTable) -> str:
    run(local_table, WORLD)
    return f"{local_table.store.uri}/t"


def test_duckdb_reads_the_plain_files(folder: str) -> None:
    files = f"read_parquet('{folder}/**/*.parquet', hive_partitioning = true)"
    types = dict(duckdb.sql(f"SELECT column_name, column_type FROM (DESCRIBE FROM {files})").fetchall())
    assert (types["feature"], types["frame_pts_seconds"], types["dataset"]) == (
        "FLOAT[]",
        "DOUBLE[]",
        "VARCHAR",
    )
    assert duckdb.sql(f"SELECT dataset, count(*) FROM {files} GROUP BY ALL ORDER BY ALL").fetchall() == [
        ("a", 23),
        ("b", 23),
    ]


def test_pandas_reads_the_plain_files(folder: str) -> None:
    frame = pd.read_parquet(folder)
    assert frame.groupby("dataset", observed=True).size().to_dict() == {"a": 23, "b": 23}
    assert frame["feature"].iloc[0].shape == (4,)


def test_polars_reads_the_plain_files(folder: str) -> None:
    frame = pl.scan_parquet(f"{folder}/**/*.parquet", hive_partitioning=True).collect()
    assert frame.schema["feature"] == pl.List(pl.Float32)
    assert sorted(frame.group_by("dataset").len().rows()) == [("a", 23), ("b", 23)]


def test_files_are_sorted_and_say_what_made_them(folder: str) -> None:
    file = pq.ParquetFile(f"{folder}/dataset=a/0000000000.parquet")
    order = file.read(["sample_id", "clip_index"]).to_pylist()
    assert order == sorted(order, key=lambda row: (row["sample_id"], row["clip_index"]))
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    marks = file.metadata.metadata
    assert marks[b"featurex.extractor"] == b'{"name": "fake", "precision": "fp32"}'
    assert (marks[b"featurex.revision"], marks[b"featurex.dimension"]) == (b"rev-1", b"4")
    assert (marks[b"featurex.last_plan"], marks[b"featurex.run_ids"]) == (b"0", b'["run"]')
    assert not any(
        isinstance(kind, pa.ExtensionType | pa.FixedSizeListType) for kind in file.schema_arrow.types
    )


def test_imports_neither_ray_nor_torch() -> None:
    code = "import sys, featurex_ray.table.verify; print(sorted({'ray', 'torch'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
