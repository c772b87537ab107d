"""A small HTTP object store that misbehaves as told, and counts what is asked of it."""

import hashlib
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

Fault = int | Literal["reset", "hang", "short"]


class FaultyStore(ThreadingHTTPServer):
    """Serves `objects` (path -> bytes) under path-style S3 and plain HTTP URLs.

    `faults[path]` is a list of what the next requests for it get: a status, a reset, no answer within
    `hang_seconds`, or a body that breaks off. `totals[path]` is what its parts say of the whole's size.
    No request is answered before so many as `gathers` are there.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.lengthless: set[str] = set()
        self.totals: dict[str, str] = {}
        self.gathered = threading.Event()
        self.gathers = 0
        self.redirects: dict[str, str] = {}
        self.delay_seconds = 0.0
        self.hang_seconds = 2.0
        self.requests: list[tuple[str, str | None]] = []
        self.bytes_served = 0
        self.most_at_once = 0
        self._at_once = 0
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def enter(self, path: str, asked: str | None) -> Fault | None:
        with self.lock:
            self.requests.append((path, asked))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            if self._at_once >= self.gathers:
                self.gathered.set()
            return self.faults[path].pop(0) if self.faults[path] else None

    def leave(self, sent: int) -> None:
        with self.lock:
            self._at_once -= 1
            self.bytes_served += sent

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


def use_store(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `s3://` mean this store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyStore

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(path, query.get("prefix", [""])[0], query.get("continuation-token", [""])[0])
            return
        asked = self.headers.get("Range")
        fault = self.server.enter(path, asked)
        sent = 0
        try:
            if self.server.gathers:
                self.server.gathered.wait(60)
            time.sleep(self.server.delay_seconds)
            sent = self._answer(path, asked, fault)
        finally:
            self.server.leave(sent)

    def _list(self, bucket: str, prefix: str, after: str) -> None:
        """Lists keys in pages of 25; the token is the last key of the page before."""
        start = f"{bucket.rstrip('/')}/"
        keys = sorted(
            path.removeprefix(start) for path in self.server.objects if path.startswith(start + prefix)
        )
        keys = [key for key in keys if key > after]
        page, more = keys[:25], len(keys) > 25
        items = "".join(
            f"<Contents><Key>{escape(k)}</Key><ETag>&quot;e&quot;</ETag><Size>1</Size></Contents>"
            for k in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        body = f"<ListBucketResult><KeyCount>{len(page)}</KeyCount>{items}{token}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server.enter(path, None)
        self.server.leave(0)
        data = self.server.objects.get(path)
        self.send_response(fault if isinstance(fault, int) else 404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("ETag", _etag(data or b""))
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.end_headers()

    def _answer(self, path: str, asked: str | None, fault: Fault | None) -> int:
        if fault == "hang":
            time.sleep(self.server.hang_seconds)
        if fault in ("reset", "hang"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return 0
        if isinstance(fault, int):
            return self._refuse(fault)
        if path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return 0
        data = self.server.objects.get(path)
        if data is None:
            return self._refuse(404)
        etag = _etag(data)
        if self.headers.get("If-Match", etag) != etag:
            return self._refuse(412)
        if path in self.server.lengthless:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            return len(data)
        total = self.server.totals.get(path, str(len(data)))
        return self._send(data, etag, asked, total, breaks_off=fault == "short")

    def _send(self, data: bytes, etag: str, asked: str | None, total: str, *, breaks_off: bool) -> int:
        first, last = 0, len(data) - 1
        if asked:
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            if first >= len(data):
                return self._refuse(416)
            last = min(last, len(data) - 1)
        body = data[first : last + 1]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if breaks_off:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return len(body) // 2
        self.wfile.write(body)
        return len(body)

    def _refuse(self, status: int) -> int:
        codes = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 503: "SlowDown"}
        body = (
            f"<Error><Code>{codes.get(status, 'InternalError')}</Code><Message>no</Message></Error>".encode()
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return len(body)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
