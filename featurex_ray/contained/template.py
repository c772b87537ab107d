"""What runs inside: the template process that forks children, and a child's life.

Started as `python -I -c "..." DESCRIPTOR`; see `process.py` for the other side.
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from featurex_ray.contained.channel import ClosedError, receive, receive_with_files, send
from featurex_ray.contained.kernel import die_with_parent, forbid_all_but_computing
from featurex_ray.contained.limits import CpuAllowance, ProcessLimits

_FLUSH_SECONDS = 0.05
_MOST_RESULTS = 256
"""Results are told together, to spare messages; those of the last moment are lost with the child."""
_BEGUN = slice(0, 8)
"""Where in the outbox a child keeps count of the items that it has begun."""
HEADER_BYTES = 64


@dataclass(frozen=True)
class Start:
    """What a template needs to know; it comes from the parent, pickled.

    Args:
        handler: `module:name` of a `Handler` factory, which is imported before the first fork.
        setup: The factory's argument.
        limits: Of each child.
    """

    handler: str
    setup: Any
    limits: ProcessLimits


class Outbox:
    """The shared memory through which results leave, filled from the front."""

    def __init__(self, memory: mmap.mmap, make_room: Callable[[], None]) -> None:
        self._memory = memory
        self._make_room = make_room
        self._next = HEADER_BYTES

    @property
    def free_bytes(self) -> int:
        """The most that could be put, once what lies there was taken."""
        return len(self._memory) - HEADER_BYTES

    def put(self, parts: Sequence[memoryview]) -> int:
        """Copy bytes in, one part after another; the place where they begin, a multiple of 8.

        Raises:
            MemoryError: They can never fit.
        """
        num_bytes = sum(len(part) for part in parts)
        if num_bytes > self.free_bytes:
            raise MemoryError(f"{num_bytes:,} bytes of results, room for {self.free_bytes:,}")
        if self._next + num_bytes > len(self._memory):
            self._make_room()
            self._next = HEADER_BYTES
        place = at = self._next
        for part in parts:
            self._memory[at : at + len(part)] = part
            at += len(part)
        self._next = -(-at // 8) * 8
        return place

    def begin(self, count: int) -> None:
        """Note that so many items of the request were begun."""
        self._memory[_BEGUN] = count.to_bytes(8, "little")

    def clear(self) -> None:
        """Start from the front again."""
        self._next = HEADER_BYTES


class Handler(Protocol):
    """The work: made once in the template, called in children."""

    def __call__(self, item: Any, data: memoryview, outbox: Outbox) -> Any:
        """Do one item of work; what it returns becomes JSON."""
        ...


def main(descriptor: int) -> NoReturn:
    """Prepare, then fork a child for each request until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    control = socket.socket(fileno=descriptor)
    start: Start = pickle.loads(receive(control))  # noqa: S301  from the parent
    handler = _resolve(start.handler)(start.setup)
    _enter_empty_folder()
    gc.collect()  # ends the threads of codecs that were tried: only a process of one thread forks safely
    gc.freeze()
    send(control, b"ready")
    with contextlib.suppress(ClosedError):
        while True:
            message, files = receive_with_files(control)
            if message == b"fork":
                send(control, str(_fork(control, files, handler, start.limits)).encode())
            else:
                send(control, _end(int(message)))
    os._exit(0)


def _resolve(name: str) -> Callable[[Any], Handler]:
    module, _, attribute = name.partition(":")
    made: Callable[[Any], Handler] = getattr(importlib.import_module(module), attribute)
    return made


def _enter_empty_folder() -> None:
    """Work in a folder that is empty, and gone: nothing can be put into it."""
    folder = tempfile.mkdtemp(prefix="featurex-")
    os.chdir(folder)
    Path(folder).rmdir()


def _fork(control: socket.socket, files: list[int], handler: Handler, limits: ProcessLimits) -> int:
    pid = os.fork()
    if pid == 0:
        control.close()
        _live(files, handler, limits)
    for file in files:
        os.close(file)
    return pid


def _end(pid: int) -> bytes:
    """Kill a child that may have ended already; how it ended."""
    # It is a zombie until it is waited for here, so its number can't be another's by now.
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]).encode()


def _live(files: list[int], handler: Handler, limits: ProcessLimits) -> NoReturn:
    """A child's life: limit yourself, then answer until there is nobody to answer to."""
    code = 1
    try:
        die_with_parent()
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        _silence()
        channel, outbox = socket.socket(fileno=files[0]), mmap.mmap(files[1], 0)
        os.close(files[1])
        limits.impose()
        forbid_all_but_computing()
        with contextlib.suppress(ClosedError):
            _Child(channel, outbox, handler, limits).answer_all()
        code = 0
    finally:
        os._exit(code)


def _silence() -> None:
    """Nothing that a decoder prints reaches anybody."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


class _Child:
    """Answers requests. A request is items of work and where in the media their bytes lie."""

    def __init__(
        self, channel: socket.socket, memory: mmap.mmap, handler: Handler, limits: ProcessLimits
    ) -> None:
        self._channel = channel
        self._handler = handler
        self._cpu = CpuAllowance(limits.item_seconds)
        self._outbox = Outbox(memory, self._hand_over)
        self._done: list[Any] = []

    def answer_all(self) -> NoReturn:
        while True:
            message, files = receive_with_files(self._channel)
            items: list[tuple[Any, int, int]] = pickle.loads(message)  # noqa: S301  from the parent
            # The length is told: a contained process may not ask for it.
            media = mmap.mmap(files[0], max(last for _, _, last in items) or 1, prot=mmap.PROT_READ)
            os.close(files[0])
            self._answer(items, memoryview(media))

    def _answer(self, items: Sequence[tuple[Any, int, int]], view: memoryview) -> None:
        self._outbox.clear()
        flushed = time.monotonic()
        for place, (item, first, last) in enumerate(items):
            self._cpu.renew()
            self._outbox.begin(place + 1)
            result = self._handler(item, view[first:last], self._outbox)
            self._done.append(result)  # only now: the handler may have had the list handed over
            if time.monotonic() - flushed > _FLUSH_SECONDS or len(self._done) == _MOST_RESULTS:
                self._say(wait=False)
                flushed = time.monotonic()
        if self._done:
            self._say(wait=False)

    def _hand_over(self) -> None:
        """Have the parent take what lies in the outbox, and wait until it has."""
        self._say(wait=True)
        receive(self._channel)

    def _say(self, *, wait: bool) -> None:
        send(self._channel, json.dumps([wait, self._done]).encode())
        self._done = []


if __name__ == "__main__":
    main(int(sys.argv[1]))
