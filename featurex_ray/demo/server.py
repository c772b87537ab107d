"""An S3 server in a child process, for the demo: moto's, on a free loopback port.

Run as a module it is that child: it prints its address, serves until its standard input
closes, and so ends with its parent whatever becomes of it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from featurex_ray.errors import RequestError, RunError

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 and point this process (and what it starts) at it.

    Yields:
        The endpoint's URL.

    Raises:
        RequestError: moto's server is not installed.
        RunError: The server did not start.
    """
    before = dict(os.environ)
    child = subprocess.Popen(
        [sys.executable, "-m", "featurex_ray.demo.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        endpoint = _endpoint(child)
        os.environ.update(ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint})
        yield endpoint
    finally:
        os.environ.clear()
        os.environ.update(before)
        child.terminate()
        child.communicate(timeout=10)


def _endpoint(child: "subprocess.Popen[str]") -> str:
    line = child.stdout.readline().strip() if child.stdout else ""
    if line == "missing":
        raise RequestError("the demo needs moto's S3 server: pip install 'featurex-ray[demo]'")
    if not line.startswith("http://"):
        raise RunError("the demo's S3 server did not start")
    return line


def serve() -> None:
    """Print the address, then serve until standard input closes."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        print("missing", flush=True)
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve()
