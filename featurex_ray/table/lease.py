"""Who works on which plan. It saves work, and decides nothing: a plan done twice is published once.

A plan's lease names the run that works on it; a counter of that run moves as long as it lives. So a
run with thousands of plans moves one counter, and whoever waits for it watches one.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from featurex_ray.errors import FeaturexError
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.log import Plan
from featurex_ray.table.store import ObjectStore, UnsettledWriteError

STILL_SECONDS = 30.0
"""A counter that stood still this long, by one's own monotonic clock: its plans may be taken over."""

BEAT_SECONDS = 5.0

_OVER = -1
"""The counter of a run that ended, well or not: what it left needs no waiting."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """Who works on a plan.

    Args:
        owner: The run.
        host: Its host.
        pid: Its driver's process there.
    """

    owner: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    @property
    def is_dead(self) -> bool:
        """Whether the owner is a process of this host that is gone."""
        return self.host == socket.gethostname() and not _alive(self.pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Leases:
    """The leases of one run on the plans of one table, and its watch over those of others.

    Args:
        store: Where the table lies.
        facts: The table's.
        owner: The run.
    """

    def __init__(self, store: ObjectStore, facts: TableFacts, owner: str) -> None:
        self._store, self._facts = store, facts
        self._mine = Lease(owner)
        self._held: dict[str, tuple[Lease, str]] = {}  # what was read of others' leases, with its ETag
        self._counters: dict[str, tuple[int, float]] = {}  # of other runs, and since when
        self._beats = 0
        self._has_claimed = False

    def claim(self, plan: Plan) -> bool:
        """Whether this run may work on the plan from now on: nobody else does, or nobody else lives.

        Of several runs that claim at the same time one is told so.
        """
        claimed = self._claim(self._facts.keys.lease(plan.dataset, plan.number))
        self._has_claimed |= claimed
        return claimed

    def _claim(self, key: str) -> bool:
        if key not in self._held and self._create(key):
            return True
        held = self._held.get(key) or self._read(key)
        if held is None:
            return False  # collected, so the plan is done
        lease, etag = held
        if lease.owner == self._mine.owner:
            return True
        if not self._is_free(lease):
            return False
        del self._held[key]  # whoever takes it over first, it is another's or ours from now on
        with contextlib.suppress(UnsettledWriteError):
            self._store.replace(key, self._body, etag=etag)
            return True
        return False

    def is_free(self, plan: Plan) -> bool:
        """Whether `claim` would find that nobody works on the plan; a claim may be lost all the same."""
        key = self._facts.keys.lease(plan.dataset, plan.number)
        held = self._held.get(key) or self._read(key)
        return held is None or held[0].owner == self._mine.owner or self._is_free(held[0])

    def beat(self) -> None:
        """Moves this run's counter."""
        self._beats += 1
        self._store.put(self._facts.keys.beat(self._mine.owner), str(self._beats).encode())

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Moves the counter in the background, until the end."""
        over = threading.Event()
        heart = threading.Thread(target=self._beat_until, args=(over,), daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            if self._has_claimed:
                with contextlib.suppress(FeaturexError):
                    self._store.put(self._facts.keys.beat(self._mine.owner), str(_OVER).encode())

    def _beat_until(self, over: threading.Event) -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                self.beat()
            except FeaturexError as error:
                logger.warning("other runs may do this run's plans as well: %s", error)
                return

    @property
    def _body(self) -> bytes:
        return json.dumps(asdict(self._mine)).encode()

    def _create(self, key: str) -> bool:
        with contextlib.suppress(UnsettledWriteError):
            self._store.create(key, self._body)
            return True
        return False

    def _read(self, key: str) -> tuple[Lease, str] | None:
        try:
            body, etag = self._store.read(key)
        except FileNotFoundError:
            return None
        self._held[key] = Lease(**json.loads(body)), etag
        return self._held[key]

    def _is_free(self, lease: Lease) -> bool:
        if lease.is_dead:
            return True
        try:
            counter = int(self._store.read(self._facts.keys.beat(lease.owner))[0])
        except FileNotFoundError:
            counter = 0
        if counter == _OVER:
            return True
        seen, since = self._counters.get(lease.owner, (None, 0.0))
        if seen != counter:
            self._counters[lease.owner] = counter, time.monotonic()
            return False
        return time.monotonic() - since >= STILL_SECONDS
