"""`verify` finds what was done to a table by hand."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from featurex_ray.table import FeatureTable
from featurex_ray.table.verify import verify, verify_table
from tests.table.conftest import World, observed, run, stage

WORLD = World(num_samples=8, datasets=("a", "b"), failing=frozenset({"s0001"}))
FIRST = "t/dataset=a/0000000000.parquet"
SECOND = "t/dataset=a/0000000001.parquet"
FAILURES = "t.failures/dataset=a/0000000001.parquet"


@pytest.fixture
def folder(local_table: FeatureTable) -> Path:
    run(local_table, WORLD)
    return Path(local_table.store.uri)


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    rows = pq.ParquetFile(path).read()
    pq.write_table(change(rows), path)


def problems(table: FeatureTable) -> dict[str, int]:
    return dict(verify(table.store, table.facts, WORLD.samples).problems)


def test_verify(table: FeatureTable) -> None:
    run(table, WORLD)
    report = verify(table.store, table.facts, WORLD.samples)
    assert report.ok
    assert report.checked == {
        "plans": 4,
        "planned samples": 16,
        "feature objects": 4,
        "feature rows": 32,
        "failure objects": 2,
        "failure rows": 2,
        "samples with features": 14,
        "failed samples": 2,
        "done records": 4,
        "staged parts": 6,
        "manifest samples": 16,
        "datasets": 2,
    }
    assert report.lines()[-1] == "everything holds"


def test_verify_table(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("uri,sample_id,dataset\nx,s0001,a\nx,s0002,b\nx,s0099,b\n")
    report = verify_table(f"{folder}/t", manifest=str(manifest))
    assert report.examples == {"samples of the manifest in neither table": ["s0099"]}
    assert verify_table(f"{folder}/t").ok


def test_lost_sample(local_table: FeatureTable, folder: Path) -> None:
    edit(folder / FIRST, lambda rows: rows.filter(pc.not_equal(rows["sample_id"], "s0005")))
    report = verify(local_table.store, local_table.facts)
    assert report.examples == {
        "feature objects that were edited since they were published": [FIRST],
        "planned samples in neither table": ["a/s0005"],
    }
    assert report.lines()[-1] == "the accounting does NOT hold"


def test_doubled_sample(local_table: FeatureTable, folder: Path) -> None:
    (folder / "t/dataset=a/0000000002.parquet").write_bytes((folder / FIRST).read_bytes())
    assert problems(local_table) == {
        "feature objects that no plan explains": 1,
        "feature objects that this table's plans didn't make": 1,
        "rows where the log says that none should be": 5,
        "samples in several objects": 5,
    }


def test_doubled_rows(local_table: FeatureTable, folder: Path) -> None:
    edit(
        folder / FIRST,
        lambda rows: pa.concat_tables([rows, rows]).sort_by(
            [("sample_id", "ascending"), ("clip_index", "ascending")]
        ),
    )
    assert problems(local_table)["damaged feature objects"] == 1


def test_lost_clip(local_table: FeatureTable, folder: Path) -> None:
    edit(
        folder / SECOND,
        lambda rows: rows.slice(0, rows.num_rows - 1).append_column("x", pa.nulls(rows.num_rows - 1)),
    )
    edit(folder / FIRST, lambda rows: rows.filter(pc.not_equal(rows["clip_index"], 3)))
    assert problems(local_table)["damaged feature objects"] == 1


def test_sample_in_both_tables(local_table: FeatureTable, folder: Path) -> None:
    edit(folder / FAILURES, lambda rows: rows.set_column(0, "sample_id", pa.array(["s0002"])))
    assert problems(local_table) == {
        "samples in both tables": 1,
        "planned samples in neither table": 1,
        "samples of the manifest in neither table": 1,
    }


def test_values(local_table: FeatureTable, folder: Path) -> None:
    def spoil(rows: pa.Table) -> pa.Table:
        features = rows["feature"].to_pylist()
        features[0] = [1.0]
        features[1] = [1.0, 2.0, 3.0, float("nan")]
        revisions = ["rev-0", *rows["extractor_revision"].to_pylist()[1:]]
        rows = rows.set_column(
            rows.schema.get_field_index("feature"), "feature", pa.array(features, pa.list_(pa.float32()))
        )
        return rows.set_column(
            rows.schema.get_field_index("extractor_revision"), "extractor_revision", pa.array(revisions)
        )

    edit(folder / FIRST, spoil)
    assert problems(local_table) == {
        "feature objects that were edited since they were published": 1,
        "rows of another revision": 1,
        "features of another dimension": 1,
        "row groups with values that are not finite": 1,
    }


def test_torn_objects(local_table: FeatureTable, folder: Path) -> None:
    for key in (FIRST, FAILURES):
        (folder / key).write_bytes((folder / key).read_bytes()[:-20])
    found = problems(local_table)
    assert (found["damaged feature objects"], found["damaged failure objects"]) == (1, 1)


def test_deleted_object(local_table: FeatureTable, folder: Path) -> None:
    (folder / FIRST).unlink()
    assert problems(local_table)["done plans whose object is missing"] == 1


def test_edited_values(local_table: FeatureTable, folder: Path) -> None:
    """Nothing but a value is another, and everything still fits together."""

    def spoil(rows: pa.Table) -> pa.Table:
        features = [[9.0] * 4, *rows["feature"].to_pylist()[1:]]
        place = rows.schema.get_field_index("feature")
        return rows.set_column(place, "feature", pa.array(features, pa.list_(pa.float32())))

    edit(folder / FIRST, spoil)
    assert problems(local_table) == {"feature objects that were edited since they were published": 1}


def test_rewritten_by_another_tool(local_table: FeatureTable, folder: Path) -> None:
    edit(folder / FIRST, lambda rows: rows.replace_schema_metadata(None))
    assert problems(local_table) == {"feature objects that this table's plans didn't make": 1}


def test_a_copied_table_holds(local_table: FeatureTable, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert verify_table(str(tmp_path / "copy" / "t")).ok


def test_orphans(local_table: FeatureTable, folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "t/dataset=a/copy.parquet")
    staged = next((folder / "_featurex/t/staging/dataset=a/0000000000").iterdir())
    (folder / "_featurex/t/staging/dataset=a/0000000077").mkdir()
    shutil.copy(staged, folder / "_featurex/t/staging/dataset=a/0000000077/")
    (folder / "_featurex/t/done/dataset=a/0000000077.json").write_text("{}")
    assert problems(local_table) == {
        "Parquet files among the table's that no plan explains": 1,
        "done records that no plan explains": 1,
        "staged parts that no plan explains": 1,
    }


def test_verify_while_others_write(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states that were read one after the other are no finding."""
    run(table, World(num_samples=8))
    written = False

    def write(operation: str, moment: str, key: str) -> None:
        nonlocal written
        if (operation, key) == ("open", "t/dataset=d/0000000000.parquet") and not written:
            written = True
            for plan in table.plan_prune(World(num_samples=2).samples, run_id="p"):
                table.publish(plan)

    assert verify(observed(table.store, write), table.facts).ok
    assert written


def test_open_plans(local_table: FeatureTable, folder: Path) -> None:
    """What is planned and not published is missing; what is done again is still accounted for."""
    more = World(num_samples=9, datasets=("a",), version="2")
    plans = local_table.plan(more.samples, run_id="r")
    assert problems(local_table) == {"samples of open plans that are in neither table yet": 1}
    for plan in plans:
        stage(local_table, plan, more)
        local_table.publish(plan)
    assert verify(local_table.store, local_table.facts, more.samples).ok
