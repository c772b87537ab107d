"""R1: SIGKILL before and after every store operation, and what a rerun makes of it."""

import signal
from pathlib import Path

import pytest

from tests.faults.campaign import (
    check_between,
    check_end,
    count_moments,
    count_of,
    in_process,
    rows_of,
    story_killed_at,
    tell_story,
)
from tests.faults.conftest import Record
from tests.faults.reader import Reader, summary


@pytest.mark.parametrize("where", ["local", "s3"])
def test_kill_at_every_operation(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, record: Record
) -> None:
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3_root")
    oracle = rows_of(tell_story(f"{root}/oracle"))
    num_moments = count_moments(f"{root}/counted")
    wanted = count_of(f"R1_{where.upper()}", {"local": 12, "s3": 3}[where], num_moments)
    moments = sorted({1 + n * num_moments // wanted for n in range(min(wanted, num_moments))})
    with Reader() as reader:
        for n in moments:
            uri = f"{root}/{n}"
            reader.look_at(uri)
            killed = in_process(story_killed_at, uri, n)
            killed.join(120)
            assert killed.exitcode == -signal.SIGKILL
            check_between(uri)
            tell_story(uri)
            check_end(uri, oracle)
    reader.check()
    record(
        f"R1 {where}",
        f"{len(moments)} of {num_moments} kill points; after each rerun rows = oracle, 0 lost, 0 duplicate; "
        f"meanwhile {summary(reader.counts)}",
    )
