"""Retry and prune as whole runs, and several runs on the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import featurex_ray as fx
from featurex_ray.errors import RefusedUriError
from featurex_ray.manifest import build_manifest
from featurex_ray.pipeline.retry import retry
from featurex_ray.table.verify import verify_table

pytestmark = pytest.mark.usefixtures("local_ray")

PLAIN: dict[str, Any] = {"extractor": "attention_convnet", "extract_actors": "1", "decode_actors": "1"}


def test_retry(photos: Path, tmp_path: Path) -> None:
    """What failed for want of a file and what failed for its content, the one mended after the other."""
    pictures = sorted(photos.rglob("*.png"))
    missing, broken = pictures[2], pictures[5]
    content = missing.read_bytes(), broken.read_bytes()
    build_manifest(str(photos), str(tmp_path / "m.csv"))
    missing.unlink()
    broken.write_bytes(content[1][:50])
    job = fx.ExtractionJob(manifest=str(tmp_path / "m.csv"), output=str(tmp_path / "out"), **PLAIN)
    assert fx.run(job).failed == 2
    (tmp_path / "m.csv").unlink()
    missing.write_bytes(content[0])
    broken.write_bytes(content[1])

    table = str(tmp_path / "out" / "attention_convnet")
    report = retry(table, codes=["timeout", "not_found"])
    assert (report.planned, report.tables[0].done) == (1, 1)
    assert [row["error"] for row in fx.open_table(table).failures().to_pylist()] == ["truncated"]
    assert retry(table).tables[0].done == 1
    assert fx.open_table(table).failures().num_rows == 0
    assert fx.open_table(table).to_arrow(["sample_id"]).num_rows == 12
    assert verify_table(table).ok
    assert retry(table).planned == 0


def test_retry_of_what_fails_again_ends(photos: Path, tmp_path: Path) -> None:
    (photos / "odd" / "bad.png").write_bytes(b"no picture")
    build_manifest(str(photos), str(tmp_path / "m.csv"))
    fx.run(fx.ExtractionJob(manifest=str(tmp_path / "m.csv"), output=str(tmp_path / "out"), **PLAIN))
    report = retry(str(tmp_path / "out" / "attention_convnet"))
    assert (report.planned, report.failed) == (1, 1)
    assert verify_table(str(tmp_path / "out" / "attention_convnet")).ok


def test_retry_reads_only_what_it_may_fails(photos: Path, tmp_path: Path) -> None:
    (photos / "odd" / "bad.png").write_bytes(b"no picture")
    build_manifest(str(photos), str(tmp_path / "m.csv"))
    fx.run(fx.ExtractionJob(manifest=str(tmp_path / "m.csv"), output=str(tmp_path / "out"), **PLAIN))
    table = str(tmp_path / "out" / "attention_convnet")
    with pytest.raises(RefusedUriError, match=r"1 failed samples were not tried again.*bad\.png"):
        retry(table, only_prefix=("s3://elsewhere",))
    assert [row["error"] for row in fx.open_table(table).failures().to_pylist()] == ["unsupported_container"]


def test_prune(photos: Path, tmp_path: Path) -> None:
    build_manifest(str(photos), str(tmp_path / "m.csv"), dataset="d")
    job = fx.ExtractionJob(manifest=str(tmp_path / "m.csv"), output=str(tmp_path / "out"), **PLAIN)
    fx.run(job)
    lines = (tmp_path / "m.csv").read_text().splitlines()
    (tmp_path / "m.csv").write_text("\n".join(lines[:6]))
    assert fx.run(job).planned == 0  # nobody asked for it
    report = fx.run(job, prune=True)
    assert (report.planned, report.tables[0].pruned) == (0, 7)
    table = str(tmp_path / "out" / "attention_convnet")
    assert fx.open_table(table).to_arrow(["sample_id"]).num_rows == 5
    assert verify_table(table, manifest=str(tmp_path / "m.csv")).ok
    assert fx.run(job, prune=True).tables[0].pruned == 0


DRIVER = """
import json, sys
import featurex_ray as fx
report = fx.run(
    fx.ExtractionJob(
        manifest=sys.argv[1],
        output=sys.argv[2],
        extractor="tests.pipeline.own:SlowMean",
        max_samples_per_plan=4,
        decode_actors="1",
        extract_actors="1",
    )
)
print(json.dumps([report.planned, report.num_units]))
"""


@pytest.mark.long
def test_drivers_share_the_work(tmp_path: Path) -> None:
    """Each takes plans that no other has, all wait for all, and no sample is done twice (R4)."""
    noise = np.random.default_rng(1)
    (tmp_path / "photos").mkdir()
    for n in range(24):
        Image.fromarray(noise.integers(0, 256, (24, 24, 3), np.uint8)).save(tmp_path / "photos" / f"{n}.png")
    build_manifest(str(tmp_path / "photos"), str(tmp_path / "m.csv"))
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path / "m.csv"), str(tmp_path / "out")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"RAY_ADDRESS": "local"},
        )
        for _ in range(2)
    ]
    done = [json.loads(driver.communicate(timeout=240)[0].splitlines()[-1]) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert sum(planned for planned, _ in done) == 24
    assert sum(num_units for _, num_units in done) == 24
    table = str(tmp_path / "out" / "tests.pipeline.own-SlowMean")
    assert fx.open_table(table).to_arrow(["sample_id"]).num_rows == 24
    assert verify_table(table).ok
