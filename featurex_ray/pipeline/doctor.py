"""Tests a store, and a cluster or this machine, for what a run needs; says what is missing."""

import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from featurex_ray.errors import FeaturexError, RequestError, RunError
from featurex_ray.job import ExtractionJob
from featurex_ray.pipeline.report import versions
from featurex_ray.table.collect import now
from featurex_ray.table.probe import NUM_RACERS, race
from featurex_ray.table.store import PRIVATE, LocalStore, ObjectStore, S3Store, open_store, patience

PATIENCE_SECONDS = 8.0
"""How long a store may take to answer at all; runs wait longer."""
SKEW_WARNING_SECONDS = 60.0
SKEW_LIMIT_SECONDS = 900.0
"""S3 refuses requests that are signed by a clock further away."""
MIN_SHARED_BYTES = 1 << 30
MIN_FREE_BYTES = 10 << 30

Verdict = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One thing that was tested."""

    name: str
    verdict: Verdict
    detail: str

    def line(self) -> str:
        """For people."""
        return f"{self.verdict:>4}  {self.name}: {self.detail}"


def examine(uri: str, *, address: str | None = None) -> Iterator[Check]:
    """Tests what a run would rely on; each finding as it comes. What it writes, it deletes.

    Args:
        uri: An output's root.
        address: A Ray cluster; else $RAY_ADDRESS, else this machine alone is looked at.
    """
    store = open_store(uri)
    with patience(PATIENCE_SECONDS):
        yield from examine_store(store)
    if address or os.environ.get("RAY_ADDRESS"):
        yield from examine_cluster(uri, address)
    else:
        yield from _machine_checks(socket.gethostname(), machine_facts())


def examine_store(store: ObjectStore) -> Iterator[Check]:
    """Access, then the conditions that the write protocol stands on, then what is good to know."""
    access = _attempt("access", lambda: _access(store))
    yield access
    if access.verdict == "FAIL":
        return
    yield _attempt("conditional writes", lambda: _races(store))
    if isinstance(store, S3Store):
        yield _attempt("conditional multipart uploads", lambda: _multipart_races(store))
        yield _attempt("abandoned uploads", lambda: _uploads(store))
        yield _attempt("versioning", lambda: _versioning(store))
    yield _attempt("clock", lambda: _skew(now(store)))
    if isinstance(store, LocalStore):
        yield _attempt("disk", lambda: _disk(store.root))


def _attempt(name: str, test: Callable[[], tuple[Verdict, str]]) -> Check:
    try:
        return Check(name, *test())
    except FeaturexError as error:
        return Check(name, "FAIL", str(error))


def _access(store: ObjectStore) -> tuple[Verdict, str]:
    """Credentials, read, write, listing after write, delete."""
    key, body = f"{PRIVATE}doctor/{uuid.uuid4().hex}", b"written by featurex doctor"
    store.head(key)
    store.put(key, body)
    try:
        if store.read(key)[0] != body:
            return "FAIL", f"{store.uri}/{key} doesn't hold what was written"
        if [item.key for item in store.list(key)] != [key]:
            return "FAIL", "a listing doesn't show what was just written"
    finally:
        store.delete(key)
    if store.head(key) is not None:
        return "FAIL", f"{store.uri}/{key} is still there after it was deleted"
    return "ok", f"{store.uri} at {store.endpoint}: read, write, list after write, delete"


def _races(store: ObjectStore) -> tuple[Verdict, str]:
    created, replaced = race(store, multipart=False)
    if created and replaced:
        return "ok", f"of {NUM_RACERS} racers exactly one created, and exactly one replaced"
    lost = " and ".join(name for name, won in (("create", created), ("replace", replaced)) if not won)
    return (
        "FAIL",
        f"of {NUM_RACERS} racing writers not exactly one won ({lost}): this store would lose or double rows",
    )


def _multipart_races(store: ObjectStore) -> tuple[Verdict, str]:
    created, replaced = race(store, multipart=True)
    if created and replaced:
        return "ok", f"of {NUM_RACERS} racers exactly one created, and exactly one replaced"
    return "note", "not honoured, so objects above 5 GiB are refused; smaller ones never need them"


def _uploads(store: S3Store) -> tuple[Verdict, str]:
    try:
        count = sum(1 for _ in store.uploads(PRIVATE))
    except RequestError as error:
        return "note", f"can't be listed, so runs can't end them; give the bucket a lifecycle rule: {error}"
    return "ok", f"{count} under way or broken off; runs end those older than a day"


def _versioning(store: S3Store) -> tuple[Verdict, str]:
    versioned = store.is_versioned()
    if versioned is None:
        return "note", "may not be asked"
    if versioned:
        return (
            "note",
            "on: replaced and collected objects stay as old versions; give the bucket a lifecycle rule",
        )
    return "ok", "off"


def _skew(at_store: datetime) -> tuple[Verdict, str]:
    seconds = (datetime.now(UTC) - at_store).total_seconds()
    said = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the store's"
    if abs(seconds) > SKEW_LIMIT_SECONDS:
        return "FAIL", f"{said}; S3 refuses such requests: set this machine's clock"
    if abs(seconds) > SKEW_WARNING_SECONDS:
        return "note", f"{said}; nothing relies on it, but it will be refused above 15 minutes"
    return "ok", said


def _disk(root: Path) -> tuple[Verdict, str]:
    there = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return ("ok" if free >= MIN_FREE_BYTES else "note"), f"{free / 2**30:.0f} GiB free at {there}"


def machine_facts() -> dict[str, Any]:
    """What a machine has and runs; as plain values, so that a Ray task can send them."""
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0  # noqa: S108  measured, not used
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": len(list(Path("/dev").glob("nvidia[0-9]*"))),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_bytes": shared,
        "versions": versions(),
    }


def _machine_checks(host: str, facts: dict[str, Any]) -> Iterator[Check]:
    has = f"{facts['cpus']} CPUs, {facts['gpus']} GPUs, {facts['memory_bytes'] / 2**30:.0f} GiB memory"
    yield Check(host, "ok", has)
    shared = facts["shared_bytes"]
    enough = shared >= MIN_SHARED_BYTES
    hint = "" if enough else ": Ray falls back to disk and is slow; give containers a larger /dev/shm"
    yield Check(f"{host} /dev/shm", "ok" if enough else "note", f"{shared / 2**30:.1f} GiB{hint}")


def examine_cluster(uri: str, address: str | None) -> Iterator[Check]:
    """Every node: what it has, whether it runs the same versions, whether it reaches the store."""
    import ray

    from featurex_ray.pipeline.connect import connect

    try:
        connect(ExtractionJob(manifest="-", output=uri, extractor="-", address=address))
    except FeaturexError as error:
        yield Check("cluster", "FAIL", str(error))
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    yield Check("cluster", "ok", f"{len(nodes)} nodes, {_resources(ray.cluster_resources())}")
    mine = versions()
    for node in nodes:
        yield from _node_checks(uri, node, mine)


def _resources(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


def _node_checks(uri: str, node: dict[str, Any], mine: dict[str, str]) -> Iterator[Check]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    host = node["NodeManagerHostname"]
    there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    ask = ray.remote(num_cpus=0, max_retries=0)(look_from_node)
    try:
        facts = ray.get(ask.options(scheduling_strategy=there).remote(uri), timeout=60)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        yield Check(host, "FAIL", f"a task there failed: {str(error).strip().splitlines()[-1]}")
        return
    yield from _machine_checks(host, facts)
    yield Check(f"{host} versions", *_compared(facts["versions"], mine))
    yield Check(f"{host} store", "ok" if facts["store"] == "ok" else "FAIL", facts["store"])


def _compared(theirs: dict[str, str], mine: dict[str, str]) -> tuple[Verdict, str]:
    """What differs on a node; it fails where a run would refuse the node for it."""
    from featurex_ray.pipeline.preflight import MUST_AGREE, is_same_version

    other = {name: theirs.get(name, "missing") for name in mine if theirs.get(name) != mine[name]}
    if not other:
        return "ok", "the same as here"
    fails = any(
        not is_same_version(theirs.get(name, "missing"), mine[name]) for name in other if name in MUST_AGREE
    ) or _minor(theirs["python"]) != _minor(mine["python"])
    differs = ", ".join(f"{name} {version} (here {mine[name]})" for name, version in other.items())
    return ("FAIL" if fails else "note"), differs


def _minor(python: str) -> str:
    return python.rpartition(".")[0]


def look_from_node(uri: str) -> dict[str, Any]:
    """A node's facts, and how the store answers from there; a plain function, for a Ray task."""
    try:
        with patience(PATIENCE_SECONDS):
            open_store(uri).head(f"{PRIVATE}doctor/{uuid.uuid4().hex}")
    except FeaturexError as error:
        return machine_facts() | {"store": str(error)}
    return machine_facts() | {"store": "ok"}


def raise_if_failed(checks: list[Check]) -> None:
    """Ends the examination with one message.

    Raises:
        RunError: Something that runs need is missing.
    """
    if failed := [check.name for check in checks if check.verdict == "FAIL"]:
        raise RunError(f"runs would fail here: {', '.join(failed)}")
