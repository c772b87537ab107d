"""Fixtures that several parts share: real data, and an S3 server in a process of its own."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest

CHECKOUT = Path(__file__).parents[1]

# moto checks a condition and writes in two steps; one request at a time makes that one step.
SERVER = """
import os, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_at_a_time(environ, start_response):
    with lock:
        return app(environ, start_response)

class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass

server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Quiet)
print(server.server_port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
server.serve_forever()
"""


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared real media, where the checkout has it."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of moto's S3 server; it ends with this process, whatever becomes of it."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    before = dict(os.environ)
    os.environ.update(environment)
    yield endpoint
    os.environ.clear()
    os.environ.update(before)
    server.terminate()
    server.wait(10)


@pytest.fixture
def s3_root(s3_server: str) -> str:
    """The URI of a prefix in a fresh bucket."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    botocore.session.get_session().create_client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/out"
