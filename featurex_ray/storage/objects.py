"""One request for an object or a range of it, told in one vocabulary whatever the store."""

import asyncio
import errno
import mmap
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError
from yarl import URL

from featurex_ray.errors import FetchError, RefusedUriError, RequestError
from featurex_ray.storage.filesystems import Filesystem, error_code, filesystem, s3_error_code, version_of
from featurex_ray.storage.mapped import MappedFile
from featurex_ray.storage.policy import ReadPolicy
from featurex_ray.storage.uri import Location, redact

Buffer = bytes | mmap.mmap

UNKNOWN_SIZE = sys.maxsize
"""Of an object of which a store gives a part without saying how large the whole is: larger than any."""

_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Chunk:
    """What one request brought.

    Attributes:
        data: The bytes; none when the whole object was asked for and is larger than the limit.
        etag: Changes when the object does.
        size: Bytes of the whole object; where a part was asked for, it may be `UNKNOWN_SIZE`.
    """

    data: Buffer | None
    etag: str
    size: int


class Objects(Protocol):
    """A store, as the fetcher sees it."""

    async def read(self, location: Location, *, part: range | None, etag: str | None, limit: int) -> Chunk:
        """Reads an object, or the bytes `part` of it.

        Args:
            location: The object.
            part: Which bytes; all if none.
            etag: If given, the object must still have it.
            limit: Whole objects larger than this, in bytes, come back without data.

        Raises:
            FetchError: `timeout` and `unavailable` are worth another try, other codes are not.
        """
        ...


class S3Objects:
    """Objects through s3fs's own connection, without its retries."""

    def __init__(self, store: Filesystem) -> None:
        self._store = store

    async def read(self, location: Location, *, part: range | None, etag: str | None, limit: int) -> Chunk:
        """See `Objects.read`."""
        request = {"Bucket": location.root, "Key": location.path}
        if part is not None:
            request["Range"] = _range_header(part)
        if etag is not None:
            request["IfMatch"] = etag
        try:
            client = await self._store.set_session()
            reply = await client.get_object(**request)
            async with reply["Body"] as body:
                size = _total_size(reply.get("ContentRange"), reply["ContentLength"])
                fits = part is not None or size <= limit
                return Chunk(await body.read() if fits else None, reply["ETag"], size)
        except (ClientError, BotoCoreError, aiohttp.ClientError, OSError) as error:
            raise FetchError(s3_error_code(error), _s3_message(location, error)) from error


class WebObjects:
    """Objects over http(s); redirects are not followed, as they could lead out of the allowed prefix."""

    def __init__(self, store: Filesystem) -> None:
        self._store = store

    async def read(self, location: Location, *, part: range | None, etag: str | None, limit: int) -> Chunk:
        """See `Objects.read`."""
        headers = {"Accept-Encoding": "identity"}
        if part is not None:
            headers["Range"] = _range_header(part)
        if etag:
            headers["If-Match"] = etag
        async with self._reply(location, headers) as reply:
            if reply.status != (200 if part is None else 206):
                code = "bad_request" if reply.status < 400 else error_code(reply.status)
                raise FetchError(code, f"{redact(str(location))!r} answered {reply.status} {reply.reason}")
            if (encoding := reply.headers.get("Content-Encoding", "identity")) != "identity":
                message = f"{redact(str(location))!r} came as {encoding}, which was not asked for"
                raise FetchError("bad_request", message)
            etag_now = reply.headers.get("ETag", "")
            if part is not None:
                data = await _read_at_most(reply, len(part))
                return Chunk(data, etag_now, _total_size(reply.headers.get("Content-Range"), len(data)))
            if reply.content_length is not None and reply.content_length > limit:
                return Chunk(None, etag_now, reply.content_length)
            data = await _read_at_most(reply, limit)
            return Chunk(data, etag_now, len(data))

    @asynccontextmanager
    async def _reply(
        self, location: Location, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        session = await self._store.set_session()
        try:
            url = URL(str(location), encoded=True)
            async with session.get(url, headers=headers, allow_redirects=False) as reply:
                yield reply
        except RefusedUriError as error:
            raise FetchError("refused_uri", str(error)) from error
        except TimeoutError as error:
            raise FetchError("timeout", f"{redact(str(location))!r} did not answer") from error
        except aiohttp.ClientError as error:
            raise FetchError("unavailable", f"{redact(str(location))!r}: {type(error).__name__}") from error
        except ValueError as error:  # a port that is no number, a name that no resolver can be asked for
            raise FetchError("bad_request", f"{redact(str(location))!r} has no valid host or port") from error


class AnyObjects:
    """Objects of any other fsspec filesystem (gs, az, hdfs, ...), read in threads."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads

    async def read(self, location: Location, *, part: range | None, etag: str | None, limit: int) -> Chunk:
        """See `Objects.read`."""
        return await _in_thread(self._threads, location, lambda: self._read(location, part, etag, limit))

    def _read(self, location: Location, part: range | None, etag: str | None, limit: int) -> Chunk:
        try:
            store, path = filesystem(str(location))
        except RequestError as error:
            raise FetchError("bad_request", str(error)) from error
        facts = store.info(path)
        if facts["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, "is a folder")
        found = version_of(facts)
        if etag not in (None, found):
            raise FetchError("changed", f"{redact(str(location))!r} was replaced while it was read")
        if part is None and facts["size"] > limit:
            return Chunk(None, found, facts["size"])
        bounds = {} if part is None else {"start": part.start, "end": part.stop}
        return Chunk(store.cat_file(path, **bounds), found, facts["size"])


class LocalObjects:
    """Local files: symlinks are judged by where they lead, large files are mapped, not read."""

    def __init__(self, policy: ReadPolicy, threads: Executor) -> None:
        self._policy = policy
        self._threads = threads

    async def read(self, location: Location, *, part: range | None, etag: str | None, limit: int) -> Chunk:
        """See `Objects.read`; a large file comes back mapped."""
        return await _in_thread(self._threads, location, lambda: self._read(location, part, etag, limit))

    def _read(self, location: Location, part: range | None, etag: str | None, limit: int) -> Chunk:
        real_path = os.path.realpath(location.path)
        self._policy.check_opened(location, real_path)
        # Not following a last symlink: what was judged is what is opened. Not blocking: it may be a pipe.
        descriptor = os.open(real_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise FetchError("not_found", f"'{location}' is not a file")
            found = f"{facts.st_mtime_ns}-{facts.st_size}"
            if etag not in (None, found):
                raise FetchError("changed", f"'{location}' was replaced while it was read")
            if part is not None:
                return Chunk(os.pread(descriptor, len(part), part.start), found, facts.st_size)
            if facts.st_size > limit:
                return Chunk(MappedFile.of(descriptor), found, facts.st_size)
            return Chunk(file.read(), found, facts.st_size)


async def _in_thread(threads: Executor, location: Location, read: Callable[[], Chunk]) -> Chunk:
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, read)
    except RefusedUriError as error:
        raise FetchError("refused_uri", str(error)) from error
    except aiohttp.ClientError as error:
        raise FetchError("unavailable", f"{redact(str(location))!r}: {type(error).__name__}") from error
    except OSError as error:
        message = f"{redact(str(location))!r}: {error.strerror or type(error).__name__}"
        raise FetchError(_os_error_code(error), message) from error
    except FetchError:
        raise
    except Exception as error:  # gcsfs, adlfs and others have errors of their own, of no common kind
        status = str(getattr(error, "code", None) or getattr(error, "status_code", None))
        code = error_code(int(status)) if status.isdigit() else "unavailable"
        raise FetchError(code, f"{redact(str(location))!r}: {type(error).__name__}") from error


def _os_error_code(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, FileNotFoundError | IsADirectoryError) or error.errno in _MISSING:
        return "not_found"
    if isinstance(error, PermissionError) or error.errno in _FORBIDDEN:
        return "forbidden"
    return "unavailable"


def _range_header(part: range) -> str:
    return f"bytes={part.start}-{part.stop - 1}"


def _total_size(content_range: str | None, content_length: int) -> int:
    """Bytes of the whole object, whether all of it was asked for or a part."""
    if content_range is None:
        return content_length
    size = content_range.rpartition("/")[2]
    try:
        return UNKNOWN_SIZE if size == "*" else int(size)
    except ValueError as error:
        raise FetchError("bad_request", f"the server sent the range {content_range!r}") from error


async def _read_at_most(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body, whatever the server says of its length: it may be endless."""
    data = bytearray()
    async for piece in reply.content.iter_any():
        data += piece
        if len(data) > limit:
            raise FetchError("too_large", f"the server sent more than the {limit} bytes that fit")
    return bytes(data)


def _s3_message(location: Location, error: Exception) -> str:
    """botocore's own texts name hosts and headers; the code and status say enough."""
    if isinstance(error, ClientError):
        said = error.response.get("Error", {})
        return f"{redact(str(location))!r}: {said.get('Code', '')} {said.get('Message', '')}".rstrip()
    return f"{redact(str(location))!r}: {type(error).__name__}"
