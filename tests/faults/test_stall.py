"""R14: a run in which nothing moves any more ends by itself, says why, and can be run again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import featurex_ray as fx
from featurex_ray.manifest import build_manifest
from featurex_ray.pipeline.execute import STALL_SECONDS
from featurex_ray.table.verify import verify_table
from tests.conftest import CHECKOUT
from tests.faults.campaign import count_of
from tests.faults.conftest import Record
from tests.pipeline.test_run import many_photos

TABLE = "tests.pipeline.own-Hanging"
DRIVER = """
import sys
from featurex_ray.pipeline import execute
execute.STALL_SECONDS = float(sys.argv.pop(1))
from featurex_ray.cli import main
sys.exit(main())
"""


def extract(manifest: Path, output: Path, *, stall_seconds: float, hangs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-c", DRIVER, str(stall_seconds),
            "extract", str(manifest), "--output", str(output),
            "--extractor", "tests.pipeline.own:Hanging", "--precision", "fp32",
            "--decode-actors", "1", "--extract-actors", "1",
        ],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "FEATUREX_TEST_HANGS": str(hangs)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.long
def test_a_stall_ends_and_can_be_resumed(tmp_path: Path, record: Record) -> None:
    """The small form waits less; the full one waits as long as a user would."""
    manifest, hangs = tmp_path / "m.csv", tmp_path / "hangs"
    build_manifest(str(many_photos(tmp_path / "photos", 24)), str(manifest))
    hangs.touch()
    seconds = count_of("R14_STALL", 10, int(STALL_SECONDS))
    started = time.monotonic()
    run = extract(manifest, tmp_path / "out", stall_seconds=seconds, hangs=hangs)
    _, stderr = run.communicate(timeout=seconds + 120)
    took = time.monotonic() - started
    assert run.returncode == 1, stderr
    assert f"the pipeline stalled: nothing moved for {seconds} s" in stderr
    assert "Traceback" not in stderr
    assert took < seconds + 60
    assert not list((tmp_path / "out").glob(f"_featurex/{TABLE}/staging/**/*.parquet"))
    hangs.unlink()
    for output in ("out", "oracle"):
        again = extract(manifest, tmp_path / output, stall_seconds=STALL_SECONDS, hangs=hangs)
        _, stderr = again.communicate(timeout=300)
        assert again.returncode == 0, stderr
    rows, oracle = (
        fx.open_table(str(tmp_path / output / TABLE)).to_arrow().drop_columns(["run_id"]).sort_by("sample_id")
        for output in ("out", "oracle")
    )
    assert rows.num_rows == 24
    assert rows.equals(oracle)
    assert verify_table(str(tmp_path / "out" / TABLE), manifest=str(manifest)).ok
    record(
        "R14 stall",
        f"nothing moved for {seconds} s: exit 1 after {took:.0f} s, nothing staged; rerun = oracle",
    )
