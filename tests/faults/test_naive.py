"""The campaigns can fail: a writer that appends without plans is caught at all of it."""

import os
import signal
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.campaign import in_process
from tests.faults.conftest import Record
from tests.faults.reader import look_into, scan_duckdb
from tests.table.conftest import FACTS, World

WORLD = World(num_samples=12)


def write_naively(folder: str, kill_after: int | None) -> None:
    """As many pipelines do it: a file a batch, written where readers look, under a new name each time."""
    place = Path(folder, "t/dataset=d")
    place.mkdir(parents=True, exist_ok=True)
    ids = [f"s{n:04d}" for n in range(WORLD.num_samples)]
    for number, start in enumerate(range(0, len(ids), 4)):
        rows = WORLD.part(ids[start : start + 4])
        columns = {name: rows[name] for name in FACTS.features_schema.names if name in rows.column_names}
        table = pa.table(columns)
        half = table.num_rows // 2
        for part in (table.slice(0, half), table.slice(half)):  # files end where they are full
            name = f"{os.getpid()}-{number}-{part.num_rows}.parquet"
            with (place / name).open("wb") as sink, pq.ParquetWriter(sink, part.schema) as out:
                out.write_table(part.slice(0, 1))
                sink.flush()
                time.sleep(0.3)
                out.write_table(part.slice(1))
            if number == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)


def test_a_naive_writer_is_caught(tmp_path: Path, record: Record) -> None:
    duckdb.sql("SELECT 1").fetchall()  # loaded before the writer starts
    writer = in_process(write_naively, str(tmp_path), 1)
    errors = partial = polls = 0
    while writer.is_alive():
        polls += 1
        try:
            partial += look_into(scan_duckdb(str(tmp_path)))["halves"]
        except duckdb.Error:
            errors += 1
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    partial += look_into(scan_duckdb(str(tmp_path)))["halves"]
    assert partial, "no half sample was ever seen"
    assert errors, "no torn file was ever seen"
    write_naively(str(tmp_path), None)
    rows = scan_duckdb(str(tmp_path))
    duplicates = len(rows) - len(set(rows))
    assert duplicates, "no row was doubled by the rerun"
    record(
        "R0 naive writer",
        f"caught: {errors} of {polls} polls failed, {partial} saw half samples, {duplicates} rows twice",
    )
