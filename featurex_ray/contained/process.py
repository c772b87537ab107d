"""The parent's side: a template, its one child, shared memory, and the clock."""

import fcntl
import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featurex_ray.contained.channel import ClosedError, receive, send
from featurex_ray.contained.limits import ProcessLimits, status_bytes
from featurex_ray.contained.template import HEADER_BYTES, Start
from featurex_ray.errors import RunError

Buffer = bytes | bytearray | memoryview | mmap.mmap
Reason = Literal["crashed", "timeout", "too_large"]

INBOX_BYTES = 32 << 20
_START_SECONDS = 120.0
_NEARLY_ALL = 0.7
"""Of its memory: a child that took so much and then crashed did so for want of more."""

_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    # A template must have one thread when it forks; and thread stacks and arenas are address space.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PATH", "TMPDIR")


class ChildLostError(Exception):
    """The child ended before its work was done.

    Args:
        reason: What to call it.
        detail: What the kernel or the clock said.
        item: Which of the request's items was in hand, as far as the child can be believed.
    """

    def __init__(self, reason: Reason, detail: str, item: int) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.item = item


@dataclass
class _Child:
    pid: int
    channel: socket.socket
    num_items: int = 0


class ContainedProcess:
    """One child at a time, made when it is needed, replaced when it is lost or old.

    Use it from one thread at a time.

    Args:
        handler: `module:name` of a factory of `template.Handler`; the template imports it.
        setup: The factory's argument; pickled.
        outbox_bytes: Room for results.
        limits: Of each child.

    Raises:
        RunError: This system can't contain processes (Linux can), or the template did not start.
    """

    def __init__(self, handler: str, setup: object, *, outbox_bytes: int, limits: ProcessLimits) -> None:
        if not hasattr(os, "memfd_create"):
            raise RunError("contained processes need Linux; --isolation none decodes without them")
        self._start = Start(handler, setup, limits)
        self._limits = limits
        self._inbox_file, self._inbox = _shared_memory(INBOX_BYTES)
        self._outbox_file, self._outbox = _shared_memory(HEADER_BYTES + outbox_bytes)
        self._readable_inbox = _read_only(self._inbox_file)
        # The memory lives as long as its descriptors do.
        files = (self._inbox_file, self._outbox_file, self._readable_inbox)
        weakref.finalize(self, _close_all, files)
        self._template: _Template | None = None
        self._child: _Child | None = None
        self._peak_bytes = 0

    @property
    def child_pid(self) -> int | None:
        """The child at work, None where there is none at the moment."""
        return None if self._child is None else self._child.pid

    def run(self, items: Sequence[tuple[object, Buffer]]) -> Iterator[list[Any]]:
        """Have some items worked on: several whose bytes fit into the inbox together, or one of any size.

        Yields:
            Lists of results, in the items' order. What they refer to in `outbox` is there until
            the next list is asked for. Results are of plain JSON types and otherwise unchecked.

        Raises:
            ChildLostError: The child ended, or was ended at its deadline; what was yielded is good.
        """
        if len(items) == 1 and len(items[0][1]) > INBOX_BYTES:
            yield from self._run_large(*items[0])
            return
        placed, used = [], 0
        for item, data in items:
            self._inbox[used : used + len(data)] = data
            placed.append((item, used, used + len(data)))
            used += len(data)
        yield from self._run(placed, self._readable_inbox)

    @property
    def outbox(self) -> mmap.mmap:
        """Where results point to. The child can write to it at any time, but not shrink it."""
        return self._outbox

    def peak_bytes(self) -> int:
        """The most resident memory that any of its children took so far."""
        if self._child is not None:
            with suppress(OSError):
                self._peak_bytes = max(self._peak_bytes, status_bytes("VmHWM", pid=self._child.pid))
        return self._peak_bytes

    def discard(self) -> None:
        """End the child; the next work gets a new one."""
        if self._child is not None:
            self._end()

    def close(self) -> None:
        """End child and template."""
        self.discard()
        if self._template is not None:
            self._template.close()
        self._template = None

    def _run_large(self, item: object, data: Buffer) -> Iterator[list[Any]]:
        file = _file_of(data)
        try:
            yield from self._run([(item, 0, len(data))], file)
        finally:
            os.close(file)

    def _run(self, placed: Sequence[tuple[object, int, int]], file: int) -> Iterator[list[Any]]:
        child = self._child or self._fork()
        child.num_items += len(placed)
        left = len(placed)
        self._outbox[:8] = bytes(8)
        try:
            send(child.channel, pickle.dumps(placed), [file], seconds=self._limits.item_seconds)
            while left:
                wait, results = self._next(child)
                left -= len(results)
                yield results
                if wait and left:
                    send(child.channel, b"", seconds=self._limits.item_seconds)
        except TimeoutError as error:
            self._end()
            seconds = self._limits.item_seconds
            raise ChildLostError("timeout", f"took over {seconds:g} s", self._begun()) from error
        except (ClosedError, ValueError, TypeError, RecursionError) as error:
            raise self._loss(error) from error
        except GeneratorExit:  # nobody wants the rest
            self._end()
            raise
        if child.num_items >= self._limits.items_per_child:
            self._end()

    def _next(self, child: _Child) -> tuple[bool, list[Any]]:
        """The child's next message.

        Raises:
            ValueError: It is none.
        """
        said = json.loads(receive(child.channel, seconds=self._limits.item_seconds))
        if not (isinstance(said, list) and len(said) == 2 and isinstance(said[1], list)):
            raise ValueError("not a list of results")
        if not said[1] and not said[0]:
            raise ValueError("no results")
        return said[0] is True, said[1]

    def _begun(self) -> int:
        return int.from_bytes(self._outbox[:8], "little") - 1

    def _loss(self, error: Exception) -> ChildLostError:
        """What it means that the child broke off."""
        exit_code, peak_bytes = self._end()
        if exit_code == -signal.SIGXCPU:
            return ChildLostError(
                "timeout", f"took over {self._limits.item_seconds:g} CPU seconds", self._begun()
            )
        if peak_bytes > _NEARLY_ALL * self._limits.memory_bytes:
            detail = f"took over {self._limits.memory_bytes >> 20} MiB of memory"
            return ChildLostError("too_large", detail, self._begun())
        return ChildLostError("crashed", _told(exit_code, error), self._begun())

    def _fork(self) -> _Child:
        here, there = socket.socketpair()
        with there:
            pid = self._live_template().fork([there.fileno(), self._outbox_file])
        self._child = _Child(pid, here)
        return self._child

    def _live_template(self) -> "_Template":
        if self._template is None or not self._template.is_alive:
            self._template = _Template(self._start)
        return self._template

    def _end(self) -> tuple[int, int]:
        """End the child.

        Returns:
            Its exit code (negative: the signal that ended it) and its peak memory in bytes.
        """
        child, self._child = self._child, None
        if child is None or self._template is None:
            return 0, 0
        child.channel.close()
        exit_code, peak_bytes = self._template.end(child.pid)
        self._peak_bytes = max(self._peak_bytes, peak_bytes)
        return exit_code, peak_bytes


class _Template:
    """A running template process."""

    def __init__(self, start: Start) -> None:
        self._control, there = socket.socketpair()
        path = [str(Path(entry).absolute()) for entry in sys.path]
        program = (
            f"import sys; sys.path[:] = {path!r}; "
            f"from featurex_ray.contained.template import main; main({there.fileno()})"
        )
        environment = _ENVIRONMENT | {key: os.environ[key] for key in _KEPT_VARIABLES if key in os.environ}
        with there:
            self._process = subprocess.Popen(  # noqa: S603  this very Python
                [sys.executable, "-I", "-c", program],
                pass_fds=[there.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        # It ends when the control socket closes, so also when this process is killed.
        weakref.finalize(self, _let_go, self._control, self._process)
        self._ask(pickle.dumps(start))

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, files: Sequence[int]) -> int:
        return int(self._ask(b"fork", files))

    def end(self, pid: int) -> tuple[int, int]:
        try:
            exit_code, peak_bytes = json.loads(self._ask(str(pid).encode()))
        except RunError:
            return -signal.SIGKILL, 0  # the template is gone, and its child with it
        return exit_code, peak_bytes

    def close(self) -> None:
        _let_go(self._control, self._process)

    def _ask(self, message: bytes, files: Sequence[int] = ()) -> bytes:
        try:
            send(self._control, message, files, seconds=_START_SECONDS)
            return receive(self._control, seconds=_START_SECONDS)
        except (ClosedError, TimeoutError, OSError) as error:
            _let_go(self._control, self._process)
            raise RunError(f"the process that contains decoders ended: {error}") from error


def _let_go(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    control.close()
    process.kill()
    process.wait()


def _close_all(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def _shared_memory(num_bytes: int) -> tuple[int, mmap.mmap]:
    """Memory that nobody can shrink: reading it never faults, whoever else has it."""
    file = os.memfd_create("featurex", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, num_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file, mmap.mmap(file, num_bytes)


def _read_only(file: int) -> int:
    return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)


def _file_of(data: Buffer) -> int:
    """A file with these bytes, open for reading only: the one that is mapped, else a copy in memory."""
    descriptor = getattr(data, "descriptor", None)
    if descriptor is None:
        descriptor = os.memfd_create("featurex-media", os.MFD_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(descriptor)
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def _told(exit_code: int, error: Exception) -> str:
    if exit_code < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-exit_code).name}"
        return f"ended by signal {-exit_code}"
    if isinstance(error, ClosedError):
        return f"ended with exit code {exit_code}"
    return f"gave an impossible answer: {error}"
