"""`verify --deep`: what was extracted once is extracted again, and differences are found."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import featurex_ray as fx
from featurex_ray.manifest import build_manifest
from featurex_ray.pipeline.deep import Recorded, _compare, choose_samples, verify_deep
from featurex_ray.storage import ReadPolicy
from featurex_ray.table import FeatureTable, open_store
from featurex_ray.table.verify import VerifyReport
from tests.table.conftest import FACTS, World, run

pytestmark = pytest.mark.usefixtures("local_ray")


def deep(table: Path, **options: int) -> VerifyReport:
    report = VerifyReport()
    verify_deep(fx.open_table(str(table)), report, policy=ReadPolicy(str(table)), seed=1, **options)
    return report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bundled_media: Path) -> Path:
    """A folder with media and a table over them."""
    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(bundled_media, folder / "media")
    build_manifest(str(folder / "media"), str(folder / "m.csv"), dataset="d")
    job = fx.ExtractionJob(
        manifest=str(folder / "m.csv"),
        output=str(folder / "out"),
        extractor="attention_convnet",
        sampling="uniform:4",
        clip_seconds=4.0,
    )
    fx.run(job)
    return folder


@pytest.fixture
def table(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out" / "attention_convnet"


def test_verify_deep(table: Path) -> None:
    report = deep(table, num_samples=8)
    assert report.ok
    assert report.checked == {"samples extracted again": 8}


def test_what_a_card_decoded_is_compared_without_one(table: Path) -> None:
    facts = table.parent / "_featurex" / table.name / "table.json"
    text = facts.read_text()
    decoder = json.loads(text)["extractor"]["decoder"]
    facts.write_text(text.replace(f'"{decoder}"', '"nvdec+pyav"'))
    report = deep(table, num_samples=4)
    assert report.ok, report.lines()
    assert report.checked == {"samples extracted again": 4}


def test_other_features_are_found(table: Path) -> None:
    (path,) = table.rglob("*.parquet")
    rows = pq.ParquetFile(path).read()
    values = np.stack(rows["feature"].to_numpy()) * 1.05
    place = rows.schema.get_field_index("feature")
    pq.write_table(rows.set_column(place, "feature", pa.array(list(values), pa.list_(pa.float32()))), path)
    assert deep(table, num_samples=4).problems == {"samples whose features are others now": 4}


def test_media_that_changed_or_went(made: Path, table: Path) -> None:
    away = made / "away"
    (made / "media").rename(away)
    try:
        gone = deep(table, num_samples=3)
        assert gone.checked == {"samples whose media can't be read any more": 3}
        assert gone.problems == {"no sample could be extracted again": 3}
        for path in away.rglob("*"):
            if path.is_file():
                (made / "media" / path.relative_to(away)).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), "red").save(made / "media" / path.relative_to(away), format="PNG")
        assert sum(deep(table, num_samples=3).problems.values()) == 3
    finally:
        shutil.rmtree(made / "media", ignore_errors=True)
        away.rename(made / "media")


def test_a_sample_of_many_row_groups_is_whole(tmp_path: Path) -> None:
    run(FeatureTable.open_or_create(open_store(str(tmp_path)), FACTS), World())
    for path in (tmp_path / "t").rglob("*.parquet"):
        pq.write_table(pq.ParquetFile(path).read(), path, row_group_size=1)
    samples = choose_samples(fx.open_table(str(tmp_path / "t")), 12, random.Random(1))
    assert {sample.sample_id for sample in samples} >= {"s0000", "s0003"}
    for sample in samples:
        assert [row["clip_index"] for row in sample.clips] == list(range(sample.clips[0]["num_clips"]))


@pytest.mark.parametrize(
    ("sha256", "problems"),
    [
        ("as before", {}),
        (None, {}),  # too large to be fetched at all
        ("another", {"samples with features that fail now (too_large)": 1}),
    ],
)
def test_media_that_only_the_default_limits_refuse(sha256: str | None, problems: dict[str, int]) -> None:
    report = VerifyReport()
    sample = Recorded("d", 0, "a.png", [{"media_sha256": "as before"}])
    _compare(FACTS, sample, [{"error": "too_large", "media_sha256": sha256}], report)
    assert report.problems == problems
    assert report.checked["samples whose media are too large for the default limits"] == (not problems)
