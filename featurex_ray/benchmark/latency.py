"""An S3 server whose answers to GETs come late."""

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from urllib.parse import urlsplit

from featurex_ray.demo.server import s3_server


@contextmanager
def slow_s3() -> Iterator["SlowProxy"]:
    """Serve S3 behind a proxy, and point this process (and what it starts) at it."""
    with s3_server() as endpoint:
        proxy = SlowProxy(urlsplit(endpoint).port or 80)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.start()}"
        try:
            yield proxy
        finally:
            proxy.stop()


class SlowProxy:
    """Forwards HTTP to a port of this machine, GETs after a delay.

    Attributes:
        delay_seconds: For each GET; can be changed at any time.
    """

    def __init__(self, port: int) -> None:
        self.delay_seconds = 0.0
        self._port = port
        self._listens: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def start(self) -> int:
        """Listen; the port."""
        self._thread.start()
        return self._listens.result()

    def stop(self) -> None:
        """Take no more, and break off what is on its way."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self._listens.set_result(server.sockets[0].getsockname()[1])
        await self._stopped.wait()
        server.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, forward = await asyncio.open_connection("127.0.0.1", self._port)
        answers = asyncio.ensure_future(_pump(upstream, writer))
        try:
            while True:
                await self._request(reader, forward)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is done
        finally:
            forward.close()
            answers.cancel()

    async def _request(self, reader: asyncio.StreamReader, forward: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET "):
            await asyncio.sleep(self.delay_seconds)
        forward.write(head)
        lines = [line.partition(b":") for line in head.lower().split(b"\r\n")]
        length = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
        forward.write(await reader.readexactly(length))
        await forward.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # the client has what it wanted
    finally:
        writer.close()
