"""The probe, against stores that keep their promises and one that lets all racers win."""

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from featurex_ray.errors import StoreRefusedError
from featurex_ray.table.probe import RESULT_KEY, probe_store, require_multipart
from featurex_ray.table.store import ObjectStore, open_store
from tests.table.conftest import observed


@pytest.fixture
def careless_endpoint(s3_server: str) -> Iterator[str]:
    """The same server behind a proxy that drops the conditions, as some stores ignore them."""

    class Proxy(BaseHTTPRequestHandler):
        def forward(self) -> None:
            upstream = http.client.HTTPConnection(urlsplit(s3_server).netloc, timeout=30)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in {"if-match", "if-none-match"}
            }
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "connection", "server", "date"}:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815 - what the server calls

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_probe_store(store: ObjectStore) -> None:
    result = probe_store(store)
    assert result.create
    assert result.replace
    assert result.multipart_create
    left = [item.key for item in store.list("") if not item.key.startswith("_featurex/locks/")]
    assert left == [RESULT_KEY]


def test_probe_store_is_remembered(store: ObjectStore) -> None:
    first = probe_store(store)
    operations: list[str] = []
    again = probe_store(observed(store, lambda operation, moment, key: operations.append(operation)))
    assert again == first
    assert len(operations) == 2


def test_probe_store_fails(s3_root: str, careless_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", careless_endpoint)
    start = time.monotonic()
    with pytest.raises(StoreRefusedError, match=r"of 12 racing conditional writes .* \(create and replace\)"):
        probe_store(open_store(s3_root))
    assert time.monotonic() - start < 10
    assert list(open_store(s3_root).list("")) == []


def test_require_multipart_fails(s3_root: str) -> None:
    """moto ignores If-Match when a multipart upload completes, so a replacement that needs one is refused."""
    with pytest.raises(StoreRefusedError, match="ignores the conditions of multipart uploads"):
        require_multipart(open_store(s3_root))
