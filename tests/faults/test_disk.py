"""R10: a full disk, a broken one, and writes that break off, at every operation on local disk."""

import contextlib
import errno
import resource
import signal
from pathlib import Path

import pytest

from featurex_ray.errors import StoreUnavailableError
from featurex_ray.table.store import Hook
from tests.faults.campaign import (
    check_between,
    check_end,
    count_moments,
    count_of,
    in_process,
    rows_of,
    tell_story,
)
from tests.faults.conftest import Record


def broken_at(n: int, code: int) -> Hook:
    """From the n-th moment on, whatever writes fails; reading goes on."""
    moments = 0

    def hook(operation: str, moment: str, key: str) -> None:
        nonlocal moments
        moments += 1
        if moments >= n and operation in {"write", "link", "rename", "mkdir"} and moment == "before":
            raise OSError(code, "injected")

    return hook


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_full_or_broken_disk(code: int, tmp_path: Path, record: Record) -> None:
    oracle = rows_of(tell_story(str(tmp_path / "oracle")))
    num_moments = count_moments(str(tmp_path / "counted"))
    wanted = count_of("R10", 10, num_moments)
    moments = sorted({1 + n * num_moments // wanted for n in range(min(wanted, num_moments))})
    for n in moments:
        uri = str(tmp_path / str(n))
        with contextlib.suppress(StoreUnavailableError):  # or nothing was left to write
            tell_story(uri, broken_at(n, code))
        check_between(uri) if Path(uri, "_featurex/t/table.json").exists() else None
        tell_story(uri)
        check_end(uri, oracle)
    name = errno.errorcode[code]
    record(f"R10 {name}", f"{len(moments)} of {num_moments} moments: old or new, never torn; rerun = oracle")


def story_with_small_files(uri: str, most_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    tell_story(uri)


def test_writes_that_break_off(tmp_path: Path, record: Record) -> None:
    """The kernel cuts every file at a size: real short writes."""
    oracle = rows_of(tell_story(str(tmp_path / "oracle")))
    sizes = [100 + 150 * n for n in range(count_of("R10_SHORT", 3, 60))]
    broken = 0
    for size in sizes:
        uri = str(tmp_path / str(size))
        child = in_process(story_with_small_files, uri, size)
        child.join(60)
        broken += child.exitcode != 0
        check_between(uri) if Path(uri, "_featurex/t/table.json").exists() else None
        tell_story(uri)
        check_end(uri, oracle)
    assert broken
    record("R10 short", f"{len(sizes)} file size limits, {broken} runs broke off: never torn; rerun = oracle")
