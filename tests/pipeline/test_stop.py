"""Ctrl-C and SIGTERM end a run cleanly: what is staged stays, the exit code says so, no process is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray  # noqa: F401  brings psutil

import psutil  # isort: skip
from PIL import Image

from featurex_ray.manifest import build_manifest
from tests.conftest import CHECKOUT


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_stopped_run_keeps_what_it_staged(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for i in range(400):
        Image.new("RGB", (40, 30), (i % 256, 80, 80)).save(tmp_path / "media" / f"{i:03d}.png")
    manifest = tmp_path / "m.csv"
    build_manifest(str(tmp_path / "media"), str(manifest), dataset="d")
    driver = subprocess.Popen(
        [
            sys.executable, "jobs/extract.py", manifest, "--output", tmp_path / "out",
            "--extractor", "tests.pipeline.own:Steady", "--max-samples-per-plan", "50",
            "--decode-actors", "1", "--extract-actors", "1",
        ],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    staging = tmp_path / "out/_featurex/tests.pipeline.own-Steady/staging"
    deadline = time.monotonic() + 400
    while not (parts := list(staging.rglob("*.parquet"))):
        assert driver.poll() is None, "the run ended before anything was staged"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(number)
    _, stderr = driver.communicate(timeout=200)

    assert driver.returncode == 1
    assert "featurex: stopped; what is done is kept, run it again to go on" in stderr
    assert "Traceback" not in stderr
    assert all(part.exists() for part in parts)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
