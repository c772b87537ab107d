"""Into a Ray cluster, or a local one made for the run; what can't work there is said before any work."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import ray

from featurex_ray.errors import RequestError
from featurex_ray.table.store import LocalStore, ObjectStore


class Addressed(Protocol):
    """A job that says where it runs."""

    @property
    def address(self) -> str | None:
        """Of a Ray cluster; None: as the environment says, or a local one."""


def connect(job: Addressed) -> None:
    """Connect to the job's cluster, or start a local one; does nothing where Ray is connected.

    Raises:
        RequestError: There is no cluster at the address, or it doesn't let this process in.
    """
    if ray.is_initialized():
        return
    address = job.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # The daemons' complaints on the way down are of no use on a laptop's terminal.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _what_was_there():
        _join(address)


WAY_IN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put the token into ~/.ray/auth_token with mode 0600"


def _join(address: str) -> None:
    listens = _listens(address)
    if listens is False:
        raise RequestError(f"no Ray cluster at {address}: nothing listens there")
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=address != "local",
            # Of a cluster that ends with the run nobody opens the dashboard, and its ten processes
            # would start beside ours.
            include_dashboard=False if address == "local" else None,
        )
    except ConnectionError as error:
        why = f"it doesn't let this process in; if it wants a token, {WAY_IN}" if listens else str(error)
        raise RequestError(f"no Ray cluster at {address}: {why}") from error
    except ray.exceptions.AuthenticationError as error:
        raise RequestError(f"the Ray cluster at {address} wants a token: {WAY_IN}") from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise RequestError(f"{address}: {' '.join(str(error).split())}") from error


def _listens(address: str) -> bool | None:
    """Whether anything listens at a host and port; None where the address has another form.

    Ray itself would try for minutes.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return None
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError:
        return False
    return True


@contextmanager
def _what_was_there() -> Iterator[None]:
    """Keep the handler of SIGTERM, for which Ray has its own, and a token that Ray makes private."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    yield
    if not had_token and token.exists():
        token.chmod(0o600)
    if threading.current_thread() is threading.main_thread() and callable(on_sigterm):
        signal.signal(signal.SIGTERM, on_sigterm)


def hosts() -> set[str]:
    """Names of the machines that the cluster runs on."""
    return {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}


def refuse_local_store_on_many_hosts(store: ObjectStore) -> None:
    """A local directory is another one on each host.

    Raises:
        RequestError: The output is local, and the cluster is not.
    """
    if isinstance(store, LocalStore) and (count := len(hosts())) > 1:
        raise RequestError(
            f"{store.uri} is a local directory, and the cluster has {count} hosts that would each write "
            "to their own: give --output an s3:// URI"
        )


@contextmanager
def ray_as_found() -> Iterator[None]:
    """Leave Ray as it was found: a cluster that this run started ends with it."""
    was_there = ray.is_initialized()
    try:
        yield
    finally:
        if not was_there and ray.is_initialized():
            ray.shutdown()
