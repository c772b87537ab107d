"""R6: readers of the plain files, who poll all the while."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.campaign import Runner, count_of
from tests.faults.conftest import Record
from tests.table.conftest import World

READER = """
import json, sys, time
import duckdb, pyarrow.dataset as pads
folder, stop, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
from pathlib import Path
counts = {"duckdb": 0, "pyarrow": 0, "duplicates": 0, "halves": 0, "errors": 0}
glob = f"{folder}/t/**/*.parquet"
while not Path(stop).exists() and counts["duckdb"] + counts["pyarrow"] < most:
    which = "duckdb" if counts["duckdb"] <= counts["pyarrow"] else "pyarrow"
    counts[which] += 1
    try:
        if which == "duckdb":
            rows = duckdb.sql(f"SELECT sample_id, clip_index, num_clips FROM '{glob}'").fetchall()
        else:
            table = pads.dataset(f"{folder}/t", format="parquet", partitioning="hive").to_table(
                columns=["sample_id", "clip_index", "num_clips"])
            rows = list(zip(*(column.to_pylist() for column in table.columns)))
    except Exception as error:
        if "No files found" not in str(error) and "No such file" not in str(error):
            counts["errors"] += 1
            counts["last error"] = str(error)[:200]
        continue
    counts["duplicates"] += len(rows) != len(set(rows))
    clips = {}
    for name, clip, total in rows:
        clips.setdefault((name, total), set()).add(clip)
    counts["halves"] += any(len(found) != total for (_, total), found in clips.items())
print(json.dumps(counts))
"""


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
