"""A counter per plan that moves while somebody works on it. It saves work, and decides nothing."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass

from featurex_ray.table.facts import TableFacts
from featurex_ray.table.plan import Plan
from featurex_ray.table.store import ObjectStore

STILL_SECONDS = 30.0
"""A counter that stood still this long, by one's own monotonic clock, may be taken over."""


@dataclass(frozen=True)
class Lease:
    """Who works on a plan.

    Args:
        owner: The run.
        host: Its host.
        pid: Its driver's process there.
        counter: Moves with every beat.
    """

    owner: str
    host: str
    pid: int
    counter: int

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


def beat(store: ObjectStore, facts: TableFacts, plan: Plan, owner: str) -> Lease:
    """Moves the plan's counter in the name of `owner`."""
    held = read_lease(store, facts, plan)
    lease = Lease(owner, socket.gethostname(), os.getpid(), held.counter + 1 if held else 1)
    store.put(facts.keys.lease(plan.dataset, plan.number), json.dumps(asdict(lease)).encode())
    return lease


def read_lease(store: ObjectStore, facts: TableFacts, plan: Plan) -> Lease | None:
    """The plan's lease, or None if nobody ever held it."""
    try:
        return Lease(**json.loads(store.read(facts.keys.lease(plan.dataset, plan.number))[0]))
    except FileNotFoundError:
        return None


class LeaseWatch:
    """Watches other runs' leases by this process's monotonic clock."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._seen: dict[tuple[str, int], tuple[Lease, float]] = {}

    def is_free(self, plan: Plan, lease: Lease | None) -> bool:
        """Whether this run may work on the plan: nobody else's counter moves."""
        if lease is None or lease.owner == self._owner or lease.is_dead:
            return True
        place = (plan.dataset, plan.number)
        seen, since = self._seen.get(place, (None, 0.0))
        if seen != lease:
            self._seen[place] = (lease, time.monotonic())
            return False
        return time.monotonic() - since >= STILL_SECONDS
