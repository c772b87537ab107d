"""An HTTP proxy in front of the S3 server that misbehaves as told: a careless store, or a bad network."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

CONDITIONS = {"if-match", "if-none-match"}
NOT_FORWARDED = {"transfer-encoding", "connection", "server", "date"}

Fault = Literal["lost request", "lost answer", "503", "409", "timeout"]


class Proxy(ThreadingHTTPServer):
    """Forwards everything, unless `fault` says what goes wrong with the next request."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.drops_conditions = False
        self.forbids_deletes = False
        self.away = False
        self.counts: Counter[str] = Counter()
        self.timeout_seconds = 0.5

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> Fault | None:
        """What goes wrong with this request."""
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class BadNetwork(Proxy):
    """Loses 5 % of the requests and 5 % of the answers, and the server has its moods; seeded."""

    RATES: dict[Fault, float] = {
        "lost request": 0.05,
        "lost answer": 0.05,
        "503": 0.03,
        "409": 0.02,
        "timeout": 0.01,
    }

    def __init__(self, upstream: str, *, seed: int) -> None:
        super().__init__(upstream)
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def fault(self) -> Fault | None:
        with self._lock:
            drawn = self._chance.random()
        for fault, rate in self.RATES.items():
            if drawn < rate:
                return fault
            drawn -= rate
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = "lost request" if self.server.away else self.server.fault()
        self.server.counts["requests"] += 1
        if fault:
            self.server.counts[fault] += 1
        if self.server.forbids_deletes and (self.command == "DELETE" or self.path.endswith("?delete")):
            self._refuse(403)
        elif fault == "lost request":
            self._hang_up()
        elif fault in ("503", "409"):
            self._refuse(int(fault))
        else:
            status, headers, content = self._ask_upstream(body)
            if fault == "timeout":  # the server did it, and its answer comes when nobody waits any more
                time.sleep(self.server.timeout_seconds)
            if fault:
                self._hang_up()
            else:
                self._answer(status, headers, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815 - what the server calls

    def _ask_upstream(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        dropped = CONDITIONS if self.server.drops_conditions else set()
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer.status, answer.getheaders(), content

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in NOT_FORWARDED:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int) -> None:
        code = {403: "AccessDenied", 503: "SlowDown", 409: "ConditionalRequestConflict"}[status]
        body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


@contextmanager
def careless_proxy(upstream: str) -> Iterator[str]:
    """The server as one that ignores the conditions of writes, as some stores do; its endpoint."""
    proxy = Proxy(upstream)
    proxy.drops_conditions = True
    with running(proxy):
        yield proxy.endpoint
