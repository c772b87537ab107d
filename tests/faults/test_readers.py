"""R6: readers of the plain files, who poll all the while."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.campaign import Runner, count_of
from tests.faults.conftest import Record
from tests.faults.reader import READER
from tests.table.conftest import World


def write_until(reader: "subprocess.Popen[str]", folder: Path, *, replacing: bool) -> None:
    """Runs that add samples, or give all of them another version, until the reader has enough."""
    runner = Runner(str(folder))
    number = 0
    while reader.poll() is None:
        number += 1
        version = str(number) if replacing else "1"
        runner.extract(World(num_samples=9 if replacing else 3 * number, version=version))


@pytest.mark.parametrize("replacing", [False, True])
def test_readers_who_poll(replacing: bool, tmp_path: Path, record: Record) -> None:
    """R6: DuckDB and pyarrow on the plain files, while runs add samples, and while they replace some."""
    polls = count_of("R6", 150, 5_000)
    (tmp_path / "t").mkdir()
    stop = tmp_path / "stop"
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path), str(stop), str(polls)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        write_until(reader, tmp_path, replacing=replacing)
    finally:
        stop.touch()
    counts = json.loads(reader.communicate(timeout=60)[0])
    assert (counts["duplicates"], counts["halves"]) == (0, 0), counts
    if not replacing:
        assert counts["errors"] == 0, counts
    what = "while objects were replaced" if replacing else "while samples were added"
    record(
        f"R6 {'replacing' if replacing else 'adding'}",
        f"{counts['duckdb']:,} DuckDB and {counts['pyarrow']:,} pyarrow polls {what}: 0 duplicates, "
        f"0 halves, {counts['errors']} errors",
    )
