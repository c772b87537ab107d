"""Fetching media: many in flight, retried a bounded number of times, large ones kept out of memory."""

import asyncio
import mmap
import os
import queue
import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from fsspec.asyn import get_loop

from featurex_ray.errors import FetchError, RefusedUriError, RequestError
from featurex_ray.storage.filesystems import filesystem
from featurex_ray.storage.mapped import MappedFile
from featurex_ray.storage.objects import (
    AnyObjects,
    Buffer,
    Chunk,
    LocalObjects,
    Objects,
    S3Objects,
    WebObjects,
)
from featurex_ray.storage.policy import ReadPolicy
from featurex_ray.storage.tar import FIRST_WINDOW_BYTES, RangeReader, TarIndex, index_members
from featurex_ray.storage.uri import WEB, Location, parse, redact
from featurex_ray.storage.web import web_filesystem

_WORTH_RETRYING = frozenset({"timeout", "unavailable"})
_LONGEST_BACKOFF_SECONDS = 30.0
_SPOOL_BYTES = 16 << 20
"""Larger objects go to an unlinked temporary file, in parts of this size."""
_PARTS_IN_FLIGHT = 4
_TAR_INDEXES_KEPT = 64
_TAR_INDEXERS = 4
_READS_OF_A_CHANGING_OBJECT = 3


@dataclass(frozen=True)
class Fetched:
    """An object's bytes.

    Attributes:
        data: `bytes`, or a read-only `mmap` for large objects.
        etag: Changes when the object does: S3's ETag, `mtime_ns-size` locally, `etag+offset` in a tar.
        attempts: Tries that the most troublesome request took.
        seconds: From asking to having it all.
    """

    data: Buffer
    etag: str
    attempts: int
    seconds: float


@dataclass(frozen=True)
class _Read:
    chunk: Chunk
    attempts: int


class Fetcher:
    """Reads what a manifest names, as far as the policy allows.

    Timeouts, resets, 429 and 5xx are tried again with exponential backoff and full jitter;
    403 and 404 are not. Make one per process; threads can share it, each call with its own objects in flight.

    Args:
        policy: What may be read.
        max_in_flight: Objects in flight or waiting to be taken, in `fetch_many`.
        timeout_seconds: For one request, which moves at most 16 MiB.
        max_attempts: Tries for one request.
        backoff_seconds: The longest first pause; it doubles from try to try, up to 30 s.
        max_object_bytes: Larger objects are the failure `too_large`.
    """

    def __init__(
        self,
        policy: ReadPolicy,
        *,
        max_in_flight: int = 32,
        timeout_seconds: float = 60.0,
        max_attempts: int = 8,
        backoff_seconds: float = 1.0,
        max_object_bytes: int = 4 << 30,
    ) -> None:
        if max_in_flight < 1 or max_attempts < 1:
            raise RequestError(f"{max_in_flight=} and {max_attempts=} must be at least 1")
        self._policy = policy
        self._max_in_flight = max_in_flight
        self._timeout_seconds = timeout_seconds
        self._max_attempts = max_attempts
        self._backoff_seconds = backoff_seconds
        self._max_object_bytes = max_object_bytes
        self._loop = get_loop()
        self._threads = ThreadPoolExecutor(max_in_flight, thread_name_prefix="featurex-read")
        # Apart from the readers, on which they wait.
        self._indexers = ThreadPoolExecutor(_TAR_INDEXERS, thread_name_prefix="featurex-tar")
        self._indexes: OrderedDict[Location, asyncio.Task[TarIndex]] = OrderedDict()
        self._stores: dict[str, Objects] = {"file": LocalObjects(policy, self._threads)}

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._indexers.shutdown(wait=False, cancel_futures=True)

    def fetch(self, uri: str) -> Fetched:
        """Reads one object or tar member.

        Raises:
            FetchError: With the code `not_found`, `forbidden`, `timeout`, `unavailable`, `refused_uri`,
                `too_large`, `changed`, `bad_archive` or `bad_request`.
        """
        return self._submit(uri).result()

    def fetch_many(self, uris: Iterable[str]) -> Iterator[tuple[int, Fetched | FetchError]]:
        """Reads many at once, taking from `uris` only as results are taken.

        Yields:
            Each URI's position and its bytes or error, in the order in which they arrive.
        """
        arrived: queue.SimpleQueue[tuple[int, Future[Fetched]]] = queue.SimpleQueue()
        in_flight: set[Future[Fetched]] = set()
        waiting = enumerate(uris)
        try:
            while True:
                while len(in_flight) < self._max_in_flight and (named := next(waiting, None)) is not None:
                    future = self._submit(named[1])
                    in_flight.add(future)
                    future.add_done_callback(partial(_arrive, arrived, named[0]))
                if not in_flight:
                    return
                index, future = arrived.get()
                in_flight.remove(future)
                yield index, _outcome(future)
        finally:
            for future in in_flight:
                future.cancel()

    def tar_index(self, uri: str) -> TarIndex:
        """The members of the tar at `uri`, read from its headers once and kept.

        Raises:
            FetchError: The tar can't be read, or is none.
        """
        self._policy.check(uri)
        return asyncio.run_coroutine_threadsafe(self._tar_index(parse(uri)), self._loop).result()

    def _submit(self, uri: str) -> Future[Fetched]:
        return asyncio.run_coroutine_threadsafe(self._fetch(uri), self._loop)

    async def _fetch(self, uri: str) -> Fetched:
        started = time.monotonic()
        try:
            self._policy.check(uri)
            location = parse(uri)
        except RefusedUriError as error:
            raise FetchError("refused_uri", str(error)) from error
        for reads_left in reversed(range(_READS_OF_A_CHANGING_OBJECT)):
            try:
                data, etag, attempts = await (
                    self._whole(location) if location.member is None else self._member(location)
                )
                return Fetched(data, etag, attempts, time.monotonic() - started)
            except FetchError as error:
                if error.code != "changed" or not reads_left:
                    raise
                self._indexes.pop(location.container, None)
        raise AssertionError("the last read returns or raises")

    async def _whole(self, location: Location) -> tuple[Buffer, str, int]:
        got = await self._read(location)
        chunk = got.chunk
        self._refuse_too_large(location, chunk.size)
        if chunk.data is not None:
            return chunk.data, chunk.etag, got.attempts
        data, attempts = await self._spool(location, range(chunk.size), chunk.etag)
        return data, chunk.etag, max(attempts, got.attempts)

    async def _member(self, location: Location) -> tuple[Buffer, str, int]:
        tar = location.container
        index = await self._tar_index(tar)
        part = index.find(location.member or "")
        if part is None:
            raise FetchError("not_found", f"{redact(str(tar))!r} has no file {location.member!r}")
        self._refuse_too_large(location, len(part))
        etag = f"{index.etag}+{part.start}"
        if len(part) > _SPOOL_BYTES:
            data, attempts = await self._spool(tar, part, index.etag)
            return data, etag, attempts
        if not part:
            return b"", etag, 1
        got = await self._read(tar, part=part, etag=index.etag)
        return got.chunk.data or b"", etag, got.attempts

    async def _tar_index(self, tar: Location) -> TarIndex:
        task = self._indexes.get(tar)
        if task is None:
            task = self._indexes[tar] = asyncio.ensure_future(self._make_tar_index(tar))
            if len(self._indexes) > _TAR_INDEXES_KEPT:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(tar)
        try:
            return await asyncio.shield(task)  # one waiter that gives up must not stop the others
        except FetchError:
            self._indexes.pop(tar, None)
            raise

    async def _make_tar_index(self, tar: Location) -> TarIndex:
        try:
            first = (await self._read(tar, part=range(FIRST_WINDOW_BYTES))).chunk
        except FetchError as error:
            if error.code != "out_of_range":
                raise
            raise FetchError("bad_archive", f"{redact(str(tar))!r} is empty") from error

        def read_range(part: range) -> bytes:
            reading = self._read(tar, part=part, etag=first.etag)
            try:
                return bytes(asyncio.run_coroutine_threadsafe(reading, self._loop).result().chunk.data or b"")
            except FetchError as error:
                if error.code != "out_of_range":
                    raise
                return b""  # where the tar's size is unknown, its end shows only so

        reader = RangeReader(first.size, read_range, start=bytes(first.data or b""))
        members = await self._loop.run_in_executor(self._indexers, index_members, reader)
        return TarIndex(first.etag, members)

    async def _spool(self, location: Location, part: range, etag: str) -> tuple[mmap.mmap, int]:
        """Reads a large range in parts, several at a time, into a file that has no name."""
        turn = asyncio.Semaphore(_PARTS_IN_FLIGHT)
        with tempfile.TemporaryFile(prefix="featurex-") as file:
            file.truncate(len(part))

            async def copy(start: int) -> int:
                async with turn:
                    wanted = range(start, min(start + _SPOOL_BYTES, part.stop))
                    got = await self._read(location, part=wanted, etag=etag)
                    write = partial(os.pwrite, file.fileno(), got.chunk.data or b"", start - part.start)
                    if await self._loop.run_in_executor(self._threads, write) != len(wanted):
                        raise FetchError("unavailable", f"{redact(str(location))!r} came back short")
                    return got.attempts

            copies = [
                asyncio.ensure_future(copy(start)) for start in range(part.start, part.stop, _SPOOL_BYTES)
            ]
            try:
                attempts = await asyncio.gather(*copies)
            finally:
                for task in copies:
                    task.cancel()
                await asyncio.wait(copies)  # none may write to the file once it is closed
            return MappedFile.of(file.fileno()), max(attempts)

    async def _read(self, location: Location, *, part: range | None = None, etag: str | None = None) -> _Read:
        """One request, tried again while that is worth it."""
        objects = self._objects(location)
        attempt = 1
        while True:
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    chunk = await objects.read(location, part=part, etag=etag, limit=_SPOOL_BYTES)
                return _Read(chunk, attempt)
            except TimeoutError:
                error = FetchError(
                    "timeout", f"{redact(str(location))!r} took over {self._timeout_seconds:g} s"
                )
            except FetchError as failure:
                error = failure
            if error.code not in _WORTH_RETRYING or attempt == self._max_attempts:
                raise FetchError(error.code, error.message, attempts=attempt) from error
            await asyncio.sleep(self._pause_seconds(attempt))
            attempt += 1

    def _pause_seconds(self, attempt: int) -> float:
        longest = min(_LONGEST_BACKOFF_SECONDS, self._backoff_seconds * 2 ** (attempt - 1))
        return random.uniform(0, longest)  # noqa: S311 (full jitter, no secret)

    def _objects(self, location: Location) -> Objects:
        if location.scheme not in self._stores:
            self._stores[location.scheme] = self._connect(location)
        return self._stores[location.scheme]

    def _connect(self, location: Location) -> Objects:
        if location.scheme in WEB:
            return WebObjects(web_filesystem(named=self._policy.named_hosts))
        if location.scheme == "s3":
            store, _ = filesystem(str(location))
            return S3Objects(store)
        return AnyObjects(self._threads)

    def _refuse_too_large(self, location: Location, size: int) -> None:
        if size > self._max_object_bytes:
            message = f"{redact(str(location))!r} has {size} bytes, the limit is {self._max_object_bytes}"
            raise FetchError("too_large", message)


def _arrive(
    arrived: "queue.SimpleQueue[tuple[int, Future[Fetched]]]", index: int, future: "Future[Fetched]"
) -> None:
    arrived.put((index, future))


def _outcome(future: "Future[Fetched]") -> Fetched | FetchError:
    try:
        return future.result()
    except FetchError as error:
        return error
