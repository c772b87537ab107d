"""What a contained child may use, and how it limits itself to that."""

import resource
import time
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
_SHARED_BYTES = 256 * _MIB
"""Part of a child's memory that is not its heap: code, the template's pages, the shared buffers."""
_MAPPED_BYTES = 8 << 30
"""Address space beyond memory: media files that are mapped, and reservations that are never touched."""
_FILES = 64


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of one child.

    Args:
        memory_bytes: Resident memory beside the item's own bytes, at least 320 MiB: 256 MiB of it for
            code and shared buffers.
        item_seconds: Wall-clock and CPU seconds of one item of work.
        items_per_child: After so many a new child takes over, so that leaks don't add up.
    """

    memory_bytes: int = 1 << 30
    item_seconds: float = 300.0
    items_per_child: int = 5000

    def __post_init__(self) -> None:
        if self.memory_bytes < _SHARED_BYTES + 64 * _MIB:
            raise ValueError(f"memory_bytes {self.memory_bytes} leaves no room to decode in")
        if not self.item_seconds > 0 or self.items_per_child < 1:
            raise ValueError(f"{self.item_seconds=} and {self.items_per_child=} must be positive")

    def impose(self) -> None:
        """Limit this process, for good."""
        heap_bytes = status_bytes("VmData") + self.memory_bytes - _SHARED_BYTES
        address_bytes = status_bytes("VmSize") + self.memory_bytes + _MAPPED_BYTES
        for what, most in (
            (resource.RLIMIT_DATA, heap_bytes),
            (resource.RLIMIT_AS, address_bytes),
            (resource.RLIMIT_NOFILE, _FILES),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(what)
            allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (allowed, allowed))


class CpuAllowance:
    """Grants CPU seconds item by item; the kernel ends the process (SIGXCPU) that takes more."""

    _SLACK_SECONDS = 5  # so that small items don't need a system call each

    def __init__(self, item_seconds: float) -> None:
        self._item_seconds = item_seconds
        self._granted = 0.0

    def renew(self) -> None:
        """Grant the next item its seconds, counted from now."""
        used = time.process_time()
        if used + self._item_seconds > self._granted:
            self._granted = used + self._item_seconds + self._SLACK_SECONDS
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (int(self._granted) + 1, hard))


def status_bytes(key: str, *, pid: int | None = None) -> int:
    """A size from a process's status (this one's by default), such as `VmData`."""
    status = Path(f"/proc/{pid or 'self'}/status")
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{status} says no {key}")
