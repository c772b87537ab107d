"""Ray nodes as separate processes on this machine, each with an address, CPUs and logical GPUs of its own."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray  # noqa: F401  brings psutil

import psutil  # isort: skip

BIN = Path(sys.executable).parent
CHECKOUT = Path(__file__).parents[2]
SECONDS_TO_START = 240
QUICK_TO_NOTICE = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
"""So that the head misses a killed node within seconds."""

PATIENT = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(SECONDS_TO_START),
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": str(SECONDS_TO_START),
}
"""Ray gives a dashboard up after a minute, which its ten processes take on a slow machine."""

_ports = random.SystemRandom().sample(range(20_000, 32_000), 2_000)
"""Below those that the system gives to whoever asks for any, Ray's own processes too."""


def free_port() -> int:
    """A port that nobody listens on, and that nobody is given until it is used; another one each time."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port := _ports.pop()))
            return port


@dataclass
class Node:
    """One node: the `ray start --block` process and all that descends from it."""

    address: str
    process: "subprocess.Popen[bytes]"

    def descendants(self) -> list[psutil.Process]:
        """Every process of this node, that of `ray start` first."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_extracting(self) -> bool:
        """Whether an extract actor of the node is in a call."""
        for process in self.descendants():
            try:
                name = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if name.startswith("ray::") and "ExtractFeatures" in name and ".submit" in name:
                return True
        return False

    def kill(self) -> None:
        """SIGKILL to all of it, as when a machine goes."""
        for process in self.descendants():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@dataclass
class Cluster:
    """A head without CPUs, and workers that come and go."""

    home: Path
    environment: Mapping[str, str]
    gcs_port: int
    dashboard_port: int
    folder: Path
    head: Node
    workers: list[Node] = field(default_factory=list)
    started: int = 0

    @property
    def jobs_address(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add_worker(self) -> Node:
        """Start another worker node with one CPU and one logical GPU; it joins when it is up."""
        self.started += 1
        arguments = [f"--address=127.0.0.1:{self.gcs_port}", "--num-cpus=1", "--num-gpus=1"]
        worker = start(
            f"127.0.0.{10 + self.started}", self.folder / f"w{self.started}", arguments, self.environment
        )
        self.workers.append(worker)
        return worker

    def kill_worker(self, worker: Node) -> None:
        """Take a worker away without warning."""
        self.workers.remove(worker)
        worker.kill()

    def run(self, *command: str, token: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run one of Ray's commands as a user of this cluster does."""
        home = self.home if token else self.folder / "stranger"
        home.mkdir(exist_ok=True)
        environment = dict(self.environment) | {"HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
        if not token:
            environment["RAY_AUTH_MODE"] = "disabled"
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400, check=False
        )


def start(address: str, folder: Path, arguments: list[str], environment: Mapping[str, str]) -> Node:
    folder.mkdir(parents=True, exist_ok=True)
    options = [
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={address}",
        f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--min-worker-port=0",  # several nodes share the machine's ports: the system chooses
        "--max-worker-port=0",
    ]
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [*as_host(f"node-{address.rpartition(chr(46))[2]}"), BIN / "ray", "start", *options, *arguments],
            env=dict(environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Node(address, process)


def as_host(name: str) -> list[str]:
    """A prefix that gives a command a host name of its own, where this user may do that."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return []
    return ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]


def token_file(home: Path, environment: Mapping[str, str]) -> Path:
    """Make a token as cluster/README.md says."""
    subprocess.run(
        ["/bin/sh", "-c", "umask 077; ray get-auth-token --generate > /dev/null"],
        env=dict(environment) | {"HOME": str(home)},
        check=True,
    )
    return home / ".ray" / "auth_token"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A head node whose job server answers; its workers are the caller's to add."""
    folder = Path(tempfile.mkdtemp(prefix="fx-", dir="/tmp"))  # Ray's sockets need a short path
    home = folder / "home"
    home.mkdir()
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{BIN}:{plain['PATH']}"
    ours = {"PATH": path, "HOME": str(home), "RAY_AUTH_MODE": "token"}
    environment = plain | QUICK_TO_NOTICE | PATIENT | ours
    token_file(home, environment)
    ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
    arguments = ["--head", "--num-cpus=0", *(f"--{name}={port}" for name, port in ports.items())]
    head = start("127.0.0.1", folder / "head", arguments, environment)
    found = Cluster(home, environment, ports["port"], ports["dashboard-port"], folder, head)
    try:
        wait_until(lambda: answers(found.dashboard_port) or head.process.poll() is not None, "the job server")
        assert head.process.poll() is None, (folder / "head" / "start.log").read_text()
        yield found
    finally:
        for node in [*found.workers, head]:
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = SECONDS_TO_START) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)
