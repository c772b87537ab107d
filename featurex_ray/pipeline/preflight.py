"""Before any work on a cluster of several nodes: do they run the same code, and do they reach the store?"""

import importlib.metadata
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from featurex_ray.errors import FeaturexError, RequestError
from featurex_ray.table.store import ObjectStore

SECONDS_TO_ANSWER = 120
MUST_AGREE = ("ray", "pyarrow", "torch", "torchvision")
"""What features or the bytes between nodes depend on; featurex itself may travel with the job."""


@dataclass(frozen=True)
class Answer:
    """What a node says of itself.

    Args:
        host: Its name.
        versions: Of Python and of the packages that must agree.
        store_error: Why it can't reach the output's store, None where it can.
    """

    host: str
    versions: dict[str, str]
    store_error: str | None


def ask_nodes(store: ObjectStore) -> None:
    """Ask every node that has CPUs; one that joins later is not asked.

    Raises:
        RequestError: A node has other versions than this process, or can't reach the store.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if {node["NodeManagerHostname"] for node in nodes} <= {socket.gethostname()}:
        return  # this very machine: nothing differs
    ask = ray.remote(answer)
    asked = [ask.options(**_only_on(node["NodeID"])).remote(store) for node in nodes]
    answered, silent = ray.wait(asked, num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    if silent:
        raise RequestError(f"{len(silent)} of {len(nodes)} nodes did not answer in {SECONDS_TO_ANSWER} s")
    try:
        check(ray.get(answered), own_versions())
    except ray.exceptions.RayError as error:
        raise RequestError(f"a node can't run featurex: {str(error).strip().splitlines()[-1]}") from error


def _only_on(node_id: str) -> dict[str, Any]:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}


def answer(store: ObjectStore) -> Answer:
    """What the node that runs this says."""
    try:
        next(iter(store.list("_featurex/store.json")), None)
        error = None
    except (FeaturexError, OSError) as found:
        error = f"{type(found).__name__}: {found}"
    return Answer(socket.gethostname(), own_versions(), error)


def own_versions() -> dict[str, str]:
    """Versions of Python and of the packages that must agree, where they are installed."""
    found = {"python": platform.python_version().rpartition(".")[0]}
    for name in MUST_AGREE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def is_same_version(one: str, other: str) -> bool:
    """Whether two are of one release: the CPU and CUDA builds of a torch differ behind the plus sign only."""
    return one.partition("+")[0] == other.partition("+")[0]


def check(answers: Sequence[Answer], ours: dict[str, str]) -> None:
    """Compare what the nodes say with this process.

    Raises:
        RequestError: Something differs; the message names the first node and all that differs there.
    """
    for found in answers:
        other = [
            f"{name} {found.versions[name]} there, {version} here"
            for name, version in ours.items()
            if not is_same_version(found.versions[name], version)
        ]
        if other:
            raise RequestError(f"node {found.host} differs from the driver: {'; '.join(other)}")
        if found.store_error is not None:
            raise RequestError(f"node {found.host} can't reach the output: {found.store_error}")
