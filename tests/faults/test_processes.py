"""R2: SIGKILL of any process of a real local Ray run, at random times, while readers poll."""

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
from tests.faults.reader import Reader, summary
from tests.pipeline.test_run import many_photos

KILLS_A_ROUND = 10
EARLY_SPARED = 0.95
"""Of the moments before there are actors: else most kills would hit raylet and driver at their start."""
ENDS_THE_RUN = frozenset({"driver", "raylet", "gcs_server"})
REST = 3
"""How much likelier each role is than one whose death ends the run: the run makes good what others lose."""
HUNT_SECONDS = 1.0
"""For so long a decoder child's successors are killed too: a sample whose decoder dies twice is a failure."""
LEFT_SECONDS = 90
"""What a killed run leaves behind ends by itself within this, beside the next run."""
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
    names = {"raylet/raylet": "raylet", "gcs_server": "gcs_server", "DecodeSlices": "decode actor",
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
    tree: set[psutil.Process] = field(default_factory=set)

    def see_done(self) -> None:
        try:
            while (code := self._once()) != 0:
                assert self.starts < 40, f"still exit {code} after {self.starts} starts"
            _, left = psutil.wait_procs(self.tree, timeout=LEFT_SECONDS)
            assert not left, f"left behind: {[(each, role_of(each)) for each in left]}"
        finally:
            end_all(self.tree)

    def _once(self) -> int:
        self.starts += 1
        driver = start(self.arguments)
        self.tree.add(psutil.Process(driver.pid))
        last = time.monotonic()
        try:
            while driver.poll() is None:
                assert time.monotonic() - last < END_SECONDS, "the run hangs"
                self.tree |= children_of(driver.pid)
                if self.kills_left and self._kill_one(driver):
                    last = time.monotonic()
                self._pause(driver)
            return driver.returncode
        finally:
            driver.kill()
            driver.wait()

    def _pause(self, driver: subprocess.Popen[bytes]) -> None:
        try:
            driver.wait(self.chance.uniform(0.2, 2.0) if self.kills_left else 1.0)
        except subprocess.TimeoutExpired:
            return

    def _kill_one(self, driver: subprocess.Popen[bytes]) -> bool:
        """A role at random first, so that the many workers don't hide the few others."""
        by_role: dict[str, list[psutil.Process]] = {}
        for process in sorted(children_of(driver.pid), key=lambda each: each.pid):
            if role := role_of(process):
                by_role.setdefault(role, []).append(process)
        if "raylet" not in by_role:
            return False  # it is only starting: there is nothing yet that could be lost
        if "decode actor" not in by_role and self.chance.random() < EARLY_SPARED:
            return False
        by_role["driver"] = [psutil.Process(driver.pid)]
        roles = sorted(by_role)
        (role,) = self.chance.choices(roles, [1 if each in ENDS_THE_RUN else REST for each in roles])
        victim = self.chance.choice(by_role[role])
        parent = victim.parent() if role == "decoder child" and self.chance.random() < 0.5 else None
        if not self._kill(victim, role):
            return False
        if parent:
            self._hunt(parent)
        return True

    def _hunt(self, template: psutil.Process) -> None:
        end = time.monotonic() + HUNT_SECONDS
        while self.kills_left and time.monotonic() < end:
            for child in children_of(template.pid):
                self._kill(child, "decoder child")
            time.sleep(0.002)

    def _kill(self, process: psutil.Process, role: str) -> bool:
        if not self.kills_left:
            return False
        try:
            process.kill()
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
        "--extractor", "tests.pipeline.own:Steady", "--precision", "fp32",
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


@pytest.mark.long
def test_any_process_killed(bundled_media: Path, tmp_path: Path, record: Record) -> None:
    wanted, manifest = count_of("R2", 2, 200), tmp_path / "m.csv"
    photos = many_photos(tmp_path / "media", 160)
    for number in range(4):
        shutil.copy(bundled_media / "videos/bikes.mp4", photos / f"clip-{number}.mp4")
    build_manifest(str(photos), str(manifest), dataset="d")
    assert start(extraction(manifest, tmp_path / "oracle")).wait(END_SECONDS) == 0
    oracle = rows_of(tmp_path / "oracle/t")
    killed: Counter[str] = Counter()
    rounds = starts = mended = 0
    with Reader(pause=0.1) as reader:
        while killed.total() < wanted:
            output = tmp_path / f"out-{rounds}"
            reader.look_at(output)
            left = min(KILLS_A_ROUND, wanted - killed.total())
            run = KilledRun(extraction(manifest, output), random.Random(rounds), left)
            run.see_done()
            mended += mend(output, manifest)
            assert rows_of(output / "t") == oracle
            killed += run.killed
            rounds, starts = rounds + 1, starts + run.starts
            print(f"{rounds} rounds, {starts} starts, {mended} mended: {dict(killed)}", flush=True)
    reader.check()
    by_role = ", ".join(f"{count} {role}" for role, count in sorted(killed.items()))
    record(
        "R2",
        f"{killed.total()} kills ({by_role}) in {rounds} rounds, {starts} starts, {mended} samples mended by "
        f"retry; rows = oracle, 0 lost, 0 duplicate; meanwhile {summary(reader.counts)}",
    )
