"""R6: readers of the plain files, who poll all the while."""

from pathlib import Path

import pytest

from tests.faults.campaign import Runner, count_of
from tests.faults.conftest import Record
from tests.faults.reader import Reader, summary
from tests.table.conftest import World

RUNS_A_TABLE = 20
"""Then another one: scans of a table that only grows would become slower and slower."""


@pytest.mark.parametrize("replacing", [False, True])
def test_readers_who_poll(replacing: bool, tmp_path: Path, record: Record) -> None:
    """R6: DuckDB and pyarrow on the plain files, while runs add samples, and while they replace some."""
    polls = count_of("R6", 150, 5_000)
    number = 0
    with Reader() as reader:
        while reader.scans() < polls:
            table, step = divmod(number, RUNS_A_TABLE)
            root = tmp_path / str(table)
            reader.look_at(root)
            world = (
                World(num_samples=9, version=str(step)) if replacing else World(num_samples=3 * (step + 1))
            )
            Runner(str(root)).extract(world)
            number += 1
    reader.check()
    if not replacing:
        assert reader.counts["errors"] == 0, reader.last_error
    what = "replacing" if replacing else "adding"
    record(f"R6 {what}", f"{number:,} runs that go on {what} meanwhile; {summary(reader.counts)}")
