"""R8: all processes of a run killed at half, and how much the next run does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

import featurex_ray as fx
from featurex_ray.manifest import build_manifest
from tests.conftest import CHECKOUT
from tests.faults.conftest import Record
from tests.faults.test_processes import children_of, end_all
from tests.pipeline.test_run import many_photos

SAMPLES = 384
IN_FLIGHT = 160
"""Samples begun and not staged yet, at most: the one extract actor takes 64 a call, some are on their way."""

DRIVER = """
import sys
import featurex_ray as fx
fx.run(fx.ExtractionJob(manifest=sys.argv[1], output=sys.argv[2], extractor="tests.pipeline.own:CountedMean",
                        precision="fp32", max_samples_per_plan=100, decode_actors="1", extract_actors="1"))
"""


def run(manifest: Path, output: Path) -> fx.RunReport:
    return fx.run(
        fx.ExtractionJob(
            manifest=str(manifest),
            output=str(output),
            extractor="tests.pipeline.own:CountedMean",
            precision="fp32",
            max_samples_per_plan=100,
        )
    )


def num_staged(table: Path) -> int:
    """Samples in staged parts, those of published plans included: none is collected within a day."""
    parts = (table / "staging").rglob("*.parquet")
    return sum(pq.read_metadata(part).num_rows for part in parts)


def num_begun(counts: Path) -> int:
    return sum(int(line) for each in counts.iterdir() for line in each.read_text().split())


def kill_at_half(manifest: Path, output: Path, counts: Path) -> int:
    """Run until half of the samples are staged, then kill driver, raylet and workers; what was staged."""
    arguments = [sys.executable, "-c", DRIVER, str(manifest), str(output)]
    driver = subprocess.Popen(arguments, cwd=CHECKOUT, env=os.environ | {"FEATUREX_TEST_COUNTS": str(counts)})
    deadline = time.monotonic() + 400
    table = output / "_featurex/tests.pipeline.own-CountedMean"
    while num_staged(table) < SAMPLES // 2:
        assert driver.poll() is None, "the driver ended before half was staged"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tree = children_of(driver.pid)
    driver.kill()
    driver.wait()
    end_all(tree)  # what lives may go on staging
    return num_staged(table)


def test_killed_at_half(tmp_path: Path, record: Record) -> None:
    """The next run does what was not staged and nothing else; the rows are as if nothing had happened."""
    manifest, killed, counts = tmp_path / "m.csv", tmp_path / "killed", tmp_path / "counts"
    counts.mkdir()
    build_manifest(str(many_photos(tmp_path / "photos", SAMPLES)), str(manifest))
    staged = kill_at_half(manifest, killed, counts)
    again = num_begun(counts) - staged
    assert SAMPLES // 2 <= staged < SAMPLES
    assert 0 <= again <= IN_FLIGHT
    resumed = run(manifest, killed)
    assert resumed.num_units == SAMPLES - staged
    run(manifest, tmp_path / "whole")
    tables = [
        fx.open_table(str(root / "tests.pipeline.own-CountedMean")).to_arrow()
        for root in (killed, tmp_path / "whole")
    ]
    columns = ["sample_id", "feature", "media_sha256", "extractor_revision"]
    first, second = (table.select(columns).sort_by("sample_id") for table in tables)
    assert first.equals(second)
    record(
        "R8",
        f"every process killed with {staged} of {SAMPLES} samples staged: the rerun, on two CPUs, did the "
        f"other {resumed.num_units}, {again} of them for the second time; rows = oracle",
    )
