"""Work for children: each item names something to try, and the answer says how it went."""

import ctypes
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurex_ray.contained.template import Outbox

_LIBC = ctypes.CDLL(None, use_errno=True)


def _open(path: str) -> object:
    return os.open(path, os.O_RDONLY)


def _connect(address: str) -> object:
    host, _, port = address.partition(":")
    return socket.socket(socket.AF_INET).connect((host, int(port)))


def _raw_socket(_: str) -> object:
    return socket.socket(socket.AF_UNIX)


def _fork(_: str) -> object:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return pid


def _exec(path: str) -> object:
    return subprocess.run([path], check=False).returncode


def _kill(pid: str) -> object:
    return os.kill(int(pid), 0)


def _tgkill(pid: str) -> object:
    if _LIBC.syscall(234 if os.uname().machine == "x86_64" else 131, int(pid), int(pid), 0) != 0:
        raise OSError(ctypes.get_errno(), "tgkill")
    return 0


def _limit_of_another(pid: str) -> object:
    return resource.prlimit(int(pid), resource.RLIMIT_CORE, (0, 0))


def _io_uring(_: str) -> object:
    if _LIBC.syscall(425, 8, 0) < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    return 0


def _thread(_: str) -> object:
    done: list[int] = []
    thread = threading.Thread(target=done.append, args=(1,))
    thread.start()
    thread.join()
    return done


def _allocate(mebibytes: str) -> object:
    return len(bytearray(int(mebibytes) << 20))


def _map(mebibytes: str) -> object:
    memory = mmap.mmap(-1, int(mebibytes) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return len(memory)


def _spin(_: str) -> object:
    while True:
        pass


def _signal(name: str) -> object:
    return signal.raise_signal(signal.Signals[name])


TRIALS: dict[str, Callable[[str], object]] = {
    "open": _open,
    "write": lambda path: os.open(path, os.O_CREAT | os.O_WRONLY),
    "list": os.listdir,
    "stat": lambda path: Path(path).stat().st_size,
    "connect": _connect,
    "socket": _raw_socket,
    "fork": _fork,
    "exec": _exec,
    "kill": _kill,
    "tgkill": _tgkill,
    "limit": _limit_of_another,
    "io_uring": _io_uring,
    "thread": _thread,
    "allocate": _allocate,
    "map": _map,
    "spin": _spin,
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "exit": lambda code: os._exit(int(code)),
    "raise": _signal,
    "fail": lambda text: [][int(text)],
    "modules": lambda name: name in sys.modules,
    "environment": lambda _: dict(os.environ),
    "pid": lambda _: os.getpid(),
    "descriptors": lambda _: [fd for fd in range(256) if _is_open(fd)],
    "core": lambda _: list(resource.getrlimit(resource.RLIMIT_CORE)),
    "print": lambda text: print(text, flush=True) or print(text, file=sys.stderr, flush=True),
}


def _is_open(descriptor: int) -> bool:
    try:
        os.lseek(descriptor, 0, os.SEEK_CUR)
    except OSError as error:
        return error.errno != 9
    return True


class Trial:
    """Tries what an item `name:argument` says."""

    def __init__(self, setup: object) -> None:
        self._setup = setup
        Path("/proc/self/status").read_text()  # the template may still read

    def __call__(self, item: str, data: memoryview, outbox: Outbox) -> Any:
        name, _, argument = item.partition(":")
        if name == "data":
            return [len(data), bytes(data[:8]).hex()]
        if name == "put":
            return outbox.put([memoryview(bytes([int(argument)]) * 1000)])
        if name in ("fail", "exit", "raise", "spin", "sleep"):
            return TRIALS[name](argument)
        try:
            return ["done", TRIALS[name](argument)]
        except (OSError, MemoryError, RuntimeError) as error:
            return [type(error).__name__, str(error)]


class Liar:
    """Answers what its item is, unasked for forms included."""

    def __init__(self, setup: object) -> None:
        pass

    def __call__(self, item: Any, data: memoryview, outbox: Outbox) -> Any:
        if item == "memory":
            outbox._memory[0:8] = (1 << 62).to_bytes(8, "little")
            os._exit(3)
        if item == "shrink":
            os.ftruncate(4, 0)
        return item
