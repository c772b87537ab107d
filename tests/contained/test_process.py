"""What a contained child can do, which is nothing but compute; and what happens when it ends."""

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featurex_ray.contained import ChildLostError, ContainedProcess, ProcessLimits
from featurex_ray.errors import RunError
from featurex_ray.storage.mapped import MappedFile

REFUSED = "PermissionError"


def contained(handler: str = "Trial", **limits: Any) -> ContainedProcess:
    return ContainedProcess(
        f"tests.contained.handlers:{handler}", None, outbox_bytes=1 << 20, limits=ProcessLimits(**limits)
    )


@pytest.fixture(scope="module")
def process() -> Iterator[ContainedProcess]:
    made = contained(item_seconds=30)
    yield made
    made.close()


def answers(process: ContainedProcess, *items: object, data: bytes = b"") -> list[Any]:
    return [result for told in process.run([(item, data) for item in items]) for result in told]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    (tmp_path / "canary").write_text("never read")
    return tmp_path / "canary"


def test_what_it_holds_goes_with_it() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        made = contained(item_seconds=30)
        assert answers(made, "data:", data=b"12345678")
        made.close()
    del made
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_bytes_go_in_and_results_come_out(process: ContainedProcess) -> None:
    first, second, empty = (
        answers(process, "data:", data=data)[0] for data in (b"12345678", b"\xff" * 100_000, b"")
    )
    assert first == [8, b"12345678".hex()]
    assert second == [100_000, "ff" * 8]
    assert empty == [0, ""]


def test_a_file_is_handed_over_as_a_descriptor(process: ContainedProcess, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"ABCDEFGH" + bytes(40 << 20))
    with (tmp_path / "large").open("rb") as file:
        mapped = MappedFile.of(file.fileno())
    for form in (mapped, bytes(mapped)):
        assert answers(process, "data:", data=form) == [[(40 << 20) + 8, b"ABCDEFGH".hex()]]


@pytest.mark.parametrize("trial", ["open", "stat", "write"])
def test_no_file_can_be_opened(process: ContainedProcess, canary: Path, trial: str) -> None:
    target = canary.with_name("new") if trial == "write" else canary
    assert answers(process, f"{trial}:{target}")[0][0] == REFUSED
    assert not canary.with_name("new").exists()


def test_the_working_directory_is_empty_and_gone(process: ContainedProcess) -> None:
    assert answers(process, "list:.")[0][0] == REFUSED
    assert str(Path(f"/proc/{process.child_pid}/cwd").readlink()).endswith("(deleted)")


def test_no_socket_can_be_made(process: ContainedProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        assert answers(process, f"connect:127.0.0.1:{server.getsockname()[1]}")[0][0] == REFUSED
        with pytest.raises(TimeoutError):
            server.accept()
    assert answers(process, "socket:")[0][0] == REFUSED


def test_no_process_can_be_started_or_touched(process: ContainedProcess) -> None:
    for trial in ("fork:", "exec:/bin/true", f"kill:{os.getpid()}", f"tgkill:{os.getpid()}", "io_uring:"):
        assert answers(process, trial)[0][0] == REFUSED, trial
    assert answers(process, f"limit:{os.getpid()}")[0][0] == REFUSED


def test_threads_can_be_started(process: ContainedProcess) -> None:
    assert answers(process, "thread:") == [["done", [1]]]


def test_nothing_is_inherited(process: ContainedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    fresh = contained()
    ((_, environment), (_, descriptors), (_, core)) = answers(fresh, "environment:", "descriptors:", "core:")
    assert not {name for name in environment if name.startswith(("AWS", "RAY", "PYTHON"))}
    assert "a secret" not in environment.values()
    assert len(descriptors) <= 6  # /dev/null three times, channel, outbox; the template's own are closed
    assert core == [0, 0]
    fresh.close()


@pytest.mark.parametrize("module", ["ray", "torch", "pyarrow", "__mp_main__"])
def test_heavy_modules_stay_out(process: ContainedProcess, module: str) -> None:
    assert answers(process, f"modules:{module}") == [["done", False]]


def test_nothing_is_printed(process: ContainedProcess, capfd: pytest.CaptureFixture[str]) -> None:
    answers(process, "print:noise")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("trial", ["allocate:900", "map:900"])
def test_memory_is_limited(process: ContainedProcess, trial: str) -> None:
    assert answers(process, trial)[0][0] in ("MemoryError", "OSError")
    assert answers(process, trial.replace("900", "600"))[0][0] == "done"


@pytest.mark.parametrize(
    ("trial", "reason", "detail"),
    [
        ("exit:0", "crashed", "exit code 0"),
        ("exit:7", "crashed", "exit code 7"),
        ("raise:SIGSEGV", "crashed", "SIGSEGV"),
        ("raise:SIGABRT", "crashed", "SIGABRT"),
        ("fail:1", "crashed", "exit code 1"),
    ],
)
def test_an_end_is_told_and_the_next_child_works(
    process: ContainedProcess, trial: str, reason: str, detail: str
) -> None:
    before = answers(process, "pid:")[0][1]
    with pytest.raises(ChildLostError, match=f"{reason}: .*{detail}") as caught:
        answers(process, "pid:", "pid:", trial, "pid:")
    assert (caught.value.reason, caught.value.item) == (reason, 2)
    assert answers(process, "pid:")[0][1] != before


@pytest.mark.parametrize("trial", ["spin:", "sleep:60"])
def test_the_deadline_is_kept(trial: str) -> None:
    process = contained(item_seconds=1.0)
    answers(process, "pid:")
    start = time.monotonic()
    with pytest.raises(ChildLostError, match="timeout: took over 1 ") as caught:
        answers(process, "pid:", trial)
    assert 1 <= time.monotonic() - start < 20  # the trial itself would take a minute
    assert caught.value.item == 1
    process.close()


def test_children_are_reused_and_recycled() -> None:
    process = contained(items_per_child=10)
    pids = [answers(process, "pid:", "pid:")[0][1] for _ in range(10)]
    assert len(set(pids)) == 2
    process.close()


def test_large_results_are_taken_in_portions(process: ContainedProcess) -> None:
    seen = []
    for told in process.run([(f"put:{number % 256}", b"") for number in range(3000)]):
        seen += [process.outbox[place : place + 1000] for place in told]
    assert seen == [bytes([number % 256]) * 1000 for number in range(3000)]


@pytest.mark.parametrize("item", ["memory", "shrink"])
def test_shared_memory_can_be_soiled_but_not_taken_away(item: str) -> None:
    process = contained("Liar")
    with pytest.raises(ChildLostError, match="crashed"):
        answers(process, item)
    assert len(process.outbox[:]) > 1 << 20
    process.close()


def test_the_rest_is_not_wanted(process: ContainedProcess) -> None:
    told = process.run([("pid:", b""), ("sleep:0.1", b""), ("pid:", b"")])
    next(told)
    told.close()
    assert process.child_pid is None
    assert len(answers(process, "pid:", "pid:")) == 2


def test_a_killed_template_is_replaced(process: ContainedProcess) -> None:
    before = answers(process, "pid:")[0][1]
    os.kill(process._template._process.pid, 9)  # type: ignore[union-attr]
    with pytest.raises(ChildLostError, match="crashed: ended by SIGKILL"):
        answers(process, "sleep:5")
    assert answers(process, "pid:")[0][1] != before


def test_a_handler_that_cannot_be_imported_fails() -> None:
    with pytest.raises(RunError, match="the process that contains decoders ended"):
        answers(contained("Missing"), "pid:")


@pytest.mark.parametrize("limits", [{"memory_bytes": 1 << 20}, {"item_seconds": 0}, {"items_per_child": 0}])
def test_limits_fail(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"memory_bytes|item_seconds"):
        ProcessLimits(**limits)


PARENT = """
import sys
from tests.contained.test_process import answers, contained
process = contained()
print(answers(process, "pid:")[0][1], process._template._process.pid, flush=True)
answers(process, "{last}")
"""


@pytest.mark.parametrize("last", ["spin:", "sleep:100"])
def test_it_ends_with_a_killed_parent(last: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(last=last)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
