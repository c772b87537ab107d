"""R2: SIGKILL of any process of a real local Ray run, at random times, while readers poll."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import featurex_ray as fx
from featurex_ray.manifest import build_manifest
from featurex_ray.table.verify import verify_table
from tests.conftest import CHECKOUT
from tests.faults.campaign import count_of
from tests.faults.conftest import Record
from tests.faults.reader import READER
from tests.pipeline.test_run import many_photos

KILLS_A_ROUND = 6
EARLY_SPARED = 0.8
"""Of the moments before there are actors: else most kills would hit raylet and driver at their start."""
END_SECONDS = 240
"""A run that lost any of its processes ends, well or not, within this."""


def role_of(process: psutil.Process) -> str | None:
    """What a process does in the run; None for those that the campaign leaves alone."""
    try:
        command = process.cmdline()
        if "featurex_ray.contained.template" in " ".join(command):
            parent = process.parent()
            is_child = parent is not None and parent.cmdline() == command
            return "decoder child" if is_child else "decoder template"
    except psutil.Error:
        return None
    first = command[0] if command else ""
    names = {"raylet/raylet": "raylet", "gcs_server": "gcs_server", "DecodeMedia": "decode actor",
             "ExtractFeatures": "extract actor", "ray::": "other worker"}  # fmt: skip
    return next((role for part, role in names.items() if part in first), None)


@dataclass
class KilledRun:
    """Runs of the command on one output until one is done, whose processes are killed on the way.

    Args:
        arguments: Of the command.
        chance: Seeded.
        kills_left: How many processes are to be killed.
    """

    arguments: list[str]
    chance: random.Random
    kills_left: int
    killed: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    def see_done(self) -> None:
        while (code := self._once()) != 0:
            assert self.starts < 20, f"still exit {code} after {self.starts} starts"

    def _once(self) -> int:
        self.starts += 1
        driver = start(self.arguments)
        tree: set[psutil.Process] = {psutil.Process(driver.pid)}
        last = time.monotonic()
        try:
            while driver.poll() is None:
                assert time.monotonic() - last < END_SECONDS, "the run hangs"
                tree |= children_of(driver.pid)
                if self.kills_left and self._kill_one(driver, tree):
                    last = time.monotonic()
                self._pause(driver)
            return driver.returncode
        finally:
            end_all(tree)
            driver.wait()

    def _pause(self, driver: subprocess.Popen[bytes]) -> None:
        try:
            driver.wait(self.chance.uniform(0.3, 3.0) if self.kills_left else 1.0)
        except subprocess.TimeoutExpired:
            return

    def _kill_one(self, driver: subprocess.Popen[bytes], tree: set[psutil.Process]) -> bool:
        """A role at random first, so that the many workers don't hide the few others."""
        by_role: dict[str, list[psutil.Process]] = {}
        for process in sorted(tree, key=lambda each: each.pid):
            role = "driver" if process.pid == driver.pid else role_of(process)
            if role and process.is_running():
                by_role.setdefault(role, []).append(process)
        if "raylet" not in by_role:
            return False  # it is only starting: there is nothing yet that could be lost
        if "decode actor" not in by_role and self.chance.random() < EARLY_SPARED:
            return False
        role = self.chance.choice(sorted(by_role))
        try:
            self.chance.choice(by_role[role]).kill()
        except psutil.NoSuchProcess:
            return False
        self.killed[role] += 1
        self.kills_left -= 1
        return True


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "featurex_ray.cli", *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def children_of(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def end_all(tree: set[psutil.Process]) -> None:
    """What a killed cluster leaves; psutil refuses a pid that is another process by now."""
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=20)


def rows_of(table: Path) -> list[dict[str, Any]]:
    rows = fx.open_table(str(table)).to_arrow().drop_columns(["run_id"]).to_pylist()
    return sorted(rows, key=lambda row: (row["sample_id"], row["clip_index"]))


def extraction(manifest: Path, output: Path) -> list[str]:
    return [
        "extract", str(manifest), "--output", str(output), "--table", "t",
        "--extractor", "tests.pipeline.own:SlowMean", "--precision", "fp32",
        "--sampling", "uniform:4", "--clip-seconds", "2", "--max-samples-per-plan", "30",
        "--decode-actors", "1", "--extract-actors", "1", "--isolation", "process",
    ]  # fmt: skip


def mend(output: Path, manifest: Path) -> int:
    """Samples whose decoder was killed twice are failures; `retry` mends them."""
    failed = fx.open_table(str(output / "t")).failures().to_pylist()
    if failed:
        assert {row["error"] for row in failed} <= {"decoder_crashed"}, failed
        retry = start(["retry", str(output / "t")])
        assert retry.wait(END_SECONDS) == 0
        assert not fx.open_table(str(output / "t")).failures().num_rows
    assert verify_table(str(output / "t"), manifest=str(manifest)).ok
    return len(failed)


def poll(output: Path, stop: Path) -> subprocess.Popen[str]:
    (output / "t").mkdir(parents=True)
    command = [sys.executable, "-c", READER, str(output), str(stop), "1000000", "0.1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.long
def test_any_process_killed(bundled_media: Path, tmp_path: Path, record: Record) -> None:
    wanted, manifest = count_of("R2", 2, 200), tmp_path / "m.csv"
    photos = many_photos(tmp_path / "media", 80)
    for number in range(4):
        shutil.copy(bundled_media / "videos/bikes.mp4", photos / f"clip-{number}.mp4")
    build_manifest(str(photos), str(manifest), dataset="d")
    assert start(extraction(manifest, tmp_path / "oracle")).wait(END_SECONDS) == 0
    oracle = rows_of(tmp_path / "oracle/t")
    killed: Counter[str] = Counter()
    polls: Counter[str] = Counter()
    rounds = starts = mended = 0
    while killed.total() < wanted:
        output, stop = tmp_path / f"out-{rounds}", tmp_path / f"stop-{rounds}"
        reader = poll(output, stop)
        run = KilledRun(
            extraction(manifest, output), random.Random(rounds), min(KILLS_A_ROUND, wanted - killed.total())
        )
        try:
            run.see_done()
            mended += mend(output, manifest)
        finally:
            stop.touch()
            counts = json.loads(reader.communicate(timeout=60)[0])
        assert rows_of(output / "t") == oracle
        assert (counts["duplicates"], counts["halves"], counts["errors"]) == (0, 0, 0), counts
        killed += run.killed
        polls.update({name: counts[name] for name in ("duckdb", "pyarrow")})
        rounds, starts = rounds + 1, starts + run.starts
    by_role = ", ".join(f"{count} {role}" for role, count in sorted(killed.items()))
    record(
        "R2",
        f"{killed.total()} kills ({by_role}) in {rounds} rounds, {starts} starts, {mended} samples mended by "
        f"retry; rows = oracle, 0 lost, 0 duplicate; {polls['duckdb']:,} DuckDB and {polls['pyarrow']:,} "
        "pyarrow polls meanwhile: 0 duplicates, 0 halves, 0 errors",
    )
