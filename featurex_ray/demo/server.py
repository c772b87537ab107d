"""An S3 server in a child process, for the demo and the tests: moto's, on a free loopback port.

Run as a module it is that child: it prints its address, serves until its standard input
closes, and so ends with its parent whatever becomes of it.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server
    except ImportError:
        print("missing", flush=True)
        return
    moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        # moto checks a condition and writes in two steps; a lock makes them one, as on a real store.
        with one_at_a_time:
            return moto(environ, start_response)

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            """Requests are nobody's business."""

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    serve()
