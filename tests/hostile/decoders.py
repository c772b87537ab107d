"""Decoders with defects: what a file with such bytes in it does to the process that decodes it."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from featurex_ray.contained.template import Outbox
from featurex_ray.media.contained import Decoder
from featurex_ray.media.request import SampleRequest


def _double_free() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    memory = ctypes.c_void_p(libc.malloc(100_000))
    libc.free(memory)
    libc.free(memory)
    libc.free(ctypes.c_void_p(0x10))


def _null_pointer() -> None:
    ctypes.string_at(0)


def _endless_loop() -> NoReturn:
    while True:
        pass


def _eat_memory() -> None:
    eaten = []
    while True:
        eaten.append(b"x" * (8 << 20))


DEFECTS: dict[bytes, Callable[[], object]] = {
    b"DEFECT:segv": _null_pointer,
    b"DEFECT:abort": os.abort,
    b"DEFECT:exit": lambda: os._exit(0),
    b"DEFECT:sysexit": sys.exit,
    b"DEFECT:free": _double_free,
    b"DEFECT:kill": lambda: signal.raise_signal(signal.SIGKILL),
    b"DEFECT:loop": _endless_loop,
    b"DEFECT:sleep": lambda: time.sleep(1000),
    b"DEFECT:stop": lambda: signal.raise_signal(signal.SIGSTOP),
}
"""What some bytes at the end of a file set off."""


class DefectiveDecoder:
    """Decodes as the real one does, but for files that end in a defect's name."""

    def __init__(self, setup: Any) -> None:
        self._decoder = Decoder(setup)

    def __call__(self, item: SampleRequest, data: memoryview, outbox: Outbox) -> Any:
        end = bytes(data[-16:])
        for name, strike in DEFECTS.items():
            if end.endswith(name):
                strike()
        return self._decoder(item, data, outbox)


class Forger:
    """Answers with what the file says, whatever that is."""

    def __init__(self, setup: Any) -> None:
        pass

    def __call__(self, item: SampleRequest, data: memoryview, outbox: Outbox) -> Any:
        return eval(bytes(data), {"nan": float("nan"), "big": 1 << 70})
