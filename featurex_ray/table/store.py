"""The object store under a table: conditional requests on S3 and on local disk.

Everything that the write protocol does to storage goes through `ObjectStore`, and every operation
passes one seam, `on_operation`, before and after it. Keys are relative to the output's root.

A conditional write has three outcomes: it succeeded (an ETag comes back), it raised
`UnsettledWriteError` (lost, or nobody knows), or the request itself is wrong. After the second only
reading the object tells what happened; `settle` is that loop (protocol, step 5).
"""

import contextlib
import fcntl
import functools
import io
import itertools
import os
import random
import shutil
import socket
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.exceptions import ConnectionError as S3ConnectionError

from featurex_ray.errors import (
    ReplacedError,
    RequestError,
    RunError,
    StoreRefusedError,
    StoreUnavailableError,
)

PRIVATE = "_featurex/"
"""Only below this prefix does anything ever get deleted."""

TIME_LIMIT_SECONDS = 600.0
"""How long an operation is tried again before `StoreUnavailableError`."""

UPLOAD_PART_BYTES = 64 * 2**20
"""The size of the parts of a multipart upload."""

MAX_SINGLE_PUT_BYTES = 5 * 2**30
"""S3's limit for one PUT. Multipart uploads serve only above it: some servers that honour the
conditions of a PUT ignore those of a multipart upload's completion."""

TAIL_BYTES = 64 * 1024
"""Read when an object is opened: most Parquet footers are in it."""

LIST_PAGE_KEYS = 1000
"""The most that S3 lists in one answer."""

NETWORK_FILESYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "smb3", "smbfs", "virtiofs", "vboxsf",
}  # fmt: skip
"""Where `link`, `rename` and `flock` don't hold between machines; `fuse*` is refused as well."""

Body = bytes | Path
Moment = Literal["before", "after"]
Hook = Callable[[str, Moment, str], None]
T = TypeVar("T")


class UnsettledWriteError(RunError):
    """A conditional write lost, or its outcome is unknown: read the object to find out."""


@dataclass(frozen=True)
class Listed:
    """One object of a listing; `modified` is by the store's clock."""

    key: str
    num_bytes: int
    modified: datetime


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and never ended; `started` is by the store's clock."""

    key: str
    upload_id: str
    started: datetime


@dataclass(frozen=True)
class Opened:
    """One generation of an object, open for ranged reads; a later one never shows through."""

    file: BinaryIO
    etag: str
    num_bytes: int

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class ObjectStore(Protocol):
    """What the write protocol needs of a store. Implementations can be pickled.

    Reads and `put` are tried again until the time limit; conditional writes are tried once.
    A missing object is `FileNotFoundError`.
    """

    @property
    def single_put_bytes(self) -> int:
        """Larger objects take a multipart upload."""

    @property
    def uri(self) -> str:
        """The root's URI, without a slash at the end."""

    @property
    def endpoint(self) -> str:
        """What answers for this root; the probe's result holds for one root at one endpoint."""

    def read(self, key: str) -> tuple[bytes, str]:
        """An object's bytes and its ETag."""

    def open(self, key: str) -> Opened:
        """An object, for ranged reads of the generation that is there now."""

    def head(self, key: str) -> str | None:
        """An object's ETag, or None when there is no such object."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """The objects below a prefix, in order of their keys."""

    def put(self, key: str, body: Body) -> str:
        """Writes below `_featurex/` without a condition, under a name that nobody relies on; its ETag."""

    def create(self, key: str, body: Body, *, multipart: bool = False) -> str:
        """Writes an object if there is none, all or nothing; its ETag.

        Raises:
            UnsettledWriteError: There is one already, or nobody knows.
        """

    def replace(self, key: str, body: Body, *, etag: str, multipart: bool = False) -> str:
        """Replaces an object if its ETag is still `etag`, all or nothing; the new ETag.

        Raises:
            UnsettledWriteError: It is another one by now, or nobody knows.
        """

    def delete(self, key: str) -> None:
        """Deletes an object below `_featurex/`; nothing public is ever deleted."""

    def uploads(self, prefix: str) -> Iterator[Upload]:
        """The multipart uploads below a prefix that are neither completed nor aborted."""

    def abort(self, upload: Upload) -> None:
        """Gives up an upload. It never became an object, and never will."""

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A folder for files on their way into the store, removed at the end."""


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Lets this process try no longer than that, for as long as the block lasts."""
    global TIME_LIMIT_SECONDS  # noqa: PLW0603  every store of the process obeys the one limit
    before, TIME_LIMIT_SECONDS = TIME_LIMIT_SECONDS, seconds
    try:
        yield
    finally:
        TIME_LIMIT_SECONDS = before


def attempts() -> Iterator[int]:
    """Counts attempts, sleeping with jitter in between, until the time limit is over."""
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    ceiling = 0.05
    for attempt in itertools.count(1):
        yield attempt
        pause = random.uniform(0, ceiling)  # noqa: S311 - jitter, not a secret
        if time.monotonic() + pause > deadline:
            return
        time.sleep(pause)
        ceiling = min(2 * ceiling, 10.0)


def settle(write: Callable[[], object], *, over: Callable[[], bool]) -> None:
    """Makes the same conditional write until it succeeded or its precondition is gone.

    Args:
        write: The conditional request.
        over: Reads the object: has it been written, by whomever?

    Raises:
        StoreUnavailableError: Neither within the time limit. Nothing is deleted.
    """
    for _ in attempts():
        try:
            write()
        except UnsettledWriteError as error:
            last = error
            if over():
                return
        else:
            return
    raise StoreUnavailableError(
        f"no conditional write went through within {TIME_LIMIT_SECONDS:.0f} s: {last}"
    )


def ensure(store: ObjectStore, key: str, body: Body) -> None:
    """Sees to it that the object exists: this body, or what somebody else created first."""
    settle(lambda: store.create(key, body), over=lambda: store.head(key) is not None)


def open_store(uri: str, *, on_operation: Hook | None = None) -> ObjectStore:
    """The store at a local path, a `file://` or an `s3://` URI.

    Args:
        uri: The output's root.
        on_operation: Called with (operation, "before" | "after", key) around every operation.

    Raises:
        StoreRefusedError: Another scheme, or a network filesystem.
    """
    parts = urlsplit(uri) if "://" in uri else None
    if parts is None:
        return _local(Path(uri), on_operation)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return _local(Path(unquote(parts.path)), on_operation)
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(
            parts.netloc, uri.split("://", 1)[1].partition("/")[2].strip("/"), on_operation=on_operation
        )
    raise StoreRefusedError(
        f"{uri}: tables are written to a local disk or to s3://bucket/prefix; other stores have not "
        "been shown to honour conditional writes"
    )


def _local(path: Path, on_operation: Hook | None) -> "LocalStore":
    path = path.expanduser().resolve()
    kind = filesystem_of(path, Path("/proc/self/mountinfo").read_text())
    if kind in NETWORK_FILESYSTEMS or kind.startswith("fuse"):
        raise StoreRefusedError(
            f"{path} is on a network filesystem ({kind}), where link and rename aren't safe"
        )
    if path.exists() and not path.is_dir():
        raise StoreRefusedError(f"{path} is a file; the output must be a directory")
    return LocalStore(path, on_operation)


def filesystem_of(path: Path, mountinfo: str) -> str:
    """The type of the filesystem that `path` is on, by the text of `/proc/self/mountinfo`."""
    mounts = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        mounts[point] = right.split()[0]  # a later mount hides an earlier one
    return next((mounts[str(p)] for p in (path, *path.parents) if str(p) in mounts), "unknown")


class _Observed:
    """The one seam through which faults are injected: every operation passes `_point`."""

    on_operation: Hook | None

    @contextlib.contextmanager
    def _point(self, operation: str, key: str) -> Iterator[None]:
        if self.on_operation:
            self.on_operation(operation, "before", key)
        yield
        if self.on_operation:
            self.on_operation(operation, "after", key)


def _check_private(key: str) -> None:
    if not key.startswith(PRIVATE):
        raise ValueError(f"{key} is public: it may only be created or replaced under a condition")


@dataclass(frozen=True)
class LocalStore(_Observed):
    """A directory on a local disk, durable and atomic through fsync, link and rename."""

    root: Path
    on_operation: Hook | None = None
    single_put_bytes: ClassVar[int] = sys.maxsize

    @property
    def uri(self) -> str:
        """The root's path."""
        return str(self.root)

    @property
    def endpoint(self) -> str:
        """This host: a local disk is nobody else's."""
        return f"local:{socket.gethostname()}"

    def read(self, key: str) -> tuple[bytes, str]:
        """An object's bytes and its ETag."""
        with self.open(key) as opened:
            return opened.file.read(), opened.etag

    def open(self, key: str) -> Opened:
        """An object; the open file keeps its generation."""
        with self._local_point("open", key):
            file = (self.root / key).open("rb")
        status = os.fstat(file.fileno())
        return Opened(file, _etag(status), status.st_size)

    def head(self, key: str) -> str | None:
        """An object's ETag, or None."""
        try:
            with self._local_point("head", key):
                status = (self.root / key).stat()
                return _etag(status) if stat.S_ISREG(status.st_mode) else None
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Listed]:
        """The objects below a prefix, in order of their keys."""
        with self._local_point("list", prefix):
            paths = sorted(_files_below(self.root / prefix.rpartition("/")[0]))
        for path in paths:
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield Listed(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def put(self, key: str, body: Body) -> str:
        """Writes a private object without a condition."""
        _check_private(key)
        with self._temporary(key, body) as temporary, self._local_point("rename", key):
            etag = _etag(temporary.stat())
            temporary.rename(self.root / key)
            _fsync(self.root / key, parent=True)
        return etag

    def create(self, key: str, body: Body, *, multipart: bool = False) -> str:  # noqa: ARG002
        """Links a finished file to its name, which fails if the name is taken."""
        with self._temporary(key, body) as temporary, self._local_point("link", key):
            try:
                os.link(temporary, self.root / key)
            except FileExistsError as error:
                raise UnsettledWriteError(f"{key} exists") from error
            _fsync(self.root / key, parent=True)
            return _etag(temporary.stat())

    def replace(self, key: str, body: Body, *, etag: str, multipart: bool = False) -> str:  # noqa: ARG002
        """Compares and renames under the target's lock; whoever replaces holds it."""
        with self._temporary(key, body) as temporary, self._locked(key), self._local_point("rename", key):
            target = self.root / key
            if not target.exists() or _etag(target.stat()) != etag:
                raise UnsettledWriteError(f"{key} is another generation by now")
            new = _etag(temporary.stat())
            temporary.rename(target)
            _fsync(target, parent=True)
            return new

    def delete(self, key: str) -> None:
        """Deletes a private object."""
        _check_private(key)
        path = self.root / key
        with self._local_point("delete", key):
            path.unlink(missing_ok=True)
            if key.startswith(f"{PRIVATE}tmp/"):  # a killed writer's folder, which holds nothing else
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    def uploads(self, prefix: str) -> Iterator[Upload]:  # noqa: ARG002
        """None: what becomes a file here is written in one go."""
        return iter(())

    def abort(self, upload: Upload) -> None:
        """Nothing: there are no uploads."""

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder in `_featurex/tmp/`, on the same disk, so that its files can be linked."""
        folder = self.root / PRIVATE / "tmp" / uuid.uuid4().hex
        with self._local_point("mkdir", folder.name):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _temporary(self, key: str, body: Body) -> Iterator[Path]:
        """The body as a finished, fsynced file under a name of its own; the target's folder exists."""
        with self.scratch() as folder:
            path = folder / "object"
            with self._local_point("write", key):
                if isinstance(body, Path):
                    os.link(body, path)
                else:
                    path.write_bytes(body)
                # The clock's ticks are coarse; a time of one's own makes every generation's ETag its own.
                os.utime(path, ns=(time.time_ns(), time.time_ns()))
                _fsync(path)
                self._make_folder((self.root / key).parent)
            yield path

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _fsync(folder, parent=True)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self.root / PRIVATE / "locks" / blake2b(key.encode(), digest_size=16).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as lock:
            for _ in attempts():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
            else:
                raise StoreUnavailableError(f"another process holds the lock of {key}")
            yield

    @contextlib.contextmanager
    def _local_point(self, operation: str, key: str) -> Iterator[None]:
        """A fault point; what the disk says becomes an error that names the operation."""
        try:
            with self._point(operation, key):
                yield
        except (FileNotFoundError, FileExistsError):
            raise
        except PermissionError as error:
            raise RequestError(f"{self.root}: no permission to {operation} {key}: {error}") from error
        except OSError as error:
            raise StoreUnavailableError(f"{self.root}: can't {operation} {key}: {error}") from error


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file; a folder that is removed in the meantime has none, but one that can't be read fails."""
    for place, _, names in os.walk(folder, onerror=_unless_missing):
        yield from (Path(place, name) for name in names)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _etag(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _fsync(path: Path, *, parent: bool = False) -> None:
    descriptor = os.open(path.parent if parent else path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _TransientError(Exception):
    """A request that may be made again; whether it had an effect is unknown."""


@dataclass(frozen=True)
class S3Store(_Observed):
    """A prefix of a bucket, with conditional PUT and multipart requests.

    Credentials, region and endpoint come from the standard AWS chain.
    """

    bucket: str
    prefix: str = ""
    on_operation: Hook | None = None
    single_put_bytes: int = MAX_SINGLE_PUT_BYTES

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def endpoint(self) -> str:
        """The URL that requests go to."""
        return str(_client(_endpoint()).meta.endpoint_url)

    def read(self, key: str) -> tuple[bytes, str]:
        """An object's bytes and its ETag."""

        def get(s3: Any) -> tuple[bytes, str]:
            response = s3.get_object(**self._at(key))
            return response["Body"].read(), response["ETag"]

        return self._retried("get", key, get)

    def open(self, key: str) -> Opened:
        """An object; every later request insists on the same ETag."""

        def tail(s3: Any) -> tuple[bytes, str, int]:
            try:
                response = s3.get_object(**self._at(key), Range=f"bytes=-{TAIL_BYTES}")
            except ClientError as error:
                if error.response["Error"]["Code"] != "InvalidRange":
                    raise
                return b"", "", 0  # an empty object has no last bytes
            return response["Body"].read(), response["ETag"], _total_bytes(response)

        data, etag, num_bytes = self._retried("open", key, tail)
        ranged = _RangedFile(self, key, etag, num_bytes, data)
        return Opened(io.BufferedReader(ranged, 2**20), etag, num_bytes)

    def range(self, key: str, start: int, stop: int, *, etag: str) -> bytes:
        """Bytes [start, stop) of one generation of an object.

        Raises:
            ReplacedError: The object was replaced in the meantime.
        """

        def get(s3: Any) -> bytes:
            response = s3.get_object(**self._at(key), Range=f"bytes={start}-{stop - 1}", IfMatch=etag)
            return bytes(response["Body"].read())

        try:
            return self._retried("range", key, get)
        except UnsettledWriteError as error:
            raise ReplacedError(f"{self.uri}/{key} was replaced while it was read; run again") from error

    def head(self, key: str) -> str | None:
        """An object's ETag, or None."""
        try:
            return self._retried("head", key, lambda s3: str(s3.head_object(**self._at(key))["ETag"]))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Listed]:
        """The objects below a prefix, in order of their keys."""
        place = {"Bucket": self.bucket, "Prefix": self._key(prefix), "MaxKeys": LIST_PAGE_KEYS}
        more: dict[str, str] = {}
        while True:
            page = self._retried("list", prefix, functools.partial(_list_page, **place, **more))
            for item in page.get("Contents", []):
                key = item["Key"][len(self._key("")) :]
                yield Listed(key, item["Size"], item["LastModified"])
            if not page["IsTruncated"]:
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def put(self, key: str, body: Body) -> str:
        """Writes a private object without a condition."""
        _check_private(key)
        return self._retried("put", key, lambda s3: self._put(s3, key, body, {}))

    def create(self, key: str, body: Body, *, multipart: bool = False) -> str:
        """Writes an object with `If-None-Match: *`."""
        multipart = multipart or _num_bytes(body) > self.single_put_bytes
        return self._conditional("create", key, body, {"IfNoneMatch": "*"}, multipart=multipart)

    def replace(self, key: str, body: Body, *, etag: str, multipart: bool = False) -> str:
        """Writes an object with `If-Match`."""
        multipart = multipart or _num_bytes(body) > self.single_put_bytes
        return self._conditional("replace", key, body, {"IfMatch": etag}, multipart=multipart)

    def delete(self, key: str) -> None:
        """Deletes a private object."""
        _check_private(key)
        self._retried("delete", key, lambda s3: s3.delete_object(**self._at(key)))

    def uploads(self, prefix: str) -> Iterator[Upload]:
        """The multipart uploads below a prefix that were begun and not ended."""
        place = {"Bucket": self.bucket, "Prefix": self._key(prefix)}
        more: dict[str, str] = {}
        while True:
            page = self._retried("uploads", prefix, functools.partial(_upload_page, **place, **more))
            for item in page.get("Uploads", []):
                if item["Key"].startswith(self._key(prefix)):  # some servers ignore the prefix
                    yield Upload(item["Key"][len(self._key("")) :], item["UploadId"], item["Initiated"])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort(self, upload: Upload) -> None:
        """Gives up an upload; one that is gone already is as good."""
        where = self._at(upload.key) | {"UploadId": upload.upload_id}
        try:
            self._once("abort", upload.key, lambda s3: s3.abort_multipart_upload(**where))
        except (_TransientError, FileNotFoundError):
            return  # another collection will find it again, or nobody will

    def is_versioned(self) -> bool | None:
        """Whether the bucket keeps old versions; None where that may not be asked."""
        try:
            answer = self._retried("versioning", "", lambda s3: s3.get_bucket_versioning(Bucket=self.bucket))
        except RequestError:
            return None
        return bool(answer.get("Status") == "Enabled")

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on this machine's own disk (`TMPDIR`)."""
        with tempfile.TemporaryDirectory(prefix="featurex-") as folder:
            yield Path(folder)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(key)}

    def _put(self, s3: Any, key: str, body: Body, condition: dict[str, str]) -> str:
        with _stream(body) as stream:
            return str(s3.put_object(**self._at(key), Body=stream, **condition)["ETag"])

    def _conditional(
        self, operation: str, key: str, body: Body, condition: dict[str, str], *, multipart: bool
    ) -> str:
        try:
            if multipart:
                return self._multipart(operation, key, body, condition)
            return self._once(operation, key, lambda s3: self._put(s3, key, body, condition))
        except (_TransientError, FileNotFoundError) as error:  # If-Match on what isn't there is a 404
            raise UnsettledWriteError(f"{operation} {self.uri}/{key}: {error}") from error

    def _multipart(self, operation: str, key: str, body: Body, condition: dict[str, str]) -> str:
        """The parts change nothing that anyone sees; the one conditional request is the last."""
        at = self._at(key)
        upload = {
            "UploadId": self._once("upload", key, lambda s3: s3.create_multipart_upload(**at)["UploadId"])
        }
        parts: list[dict[str, Any]] = []
        with _stream(body) as stream:
            while (chunk := stream.read(UPLOAD_PART_BYTES)) or not parts:
                part = {"PartNumber": len(parts) + 1}
                send = functools.partial(_upload_part, at=at | upload | part, chunk=chunk)
                parts.append(part | {"ETag": self._retried("upload_part", key, send)})

        def complete(s3: Any) -> str:
            parts_sent = {"Parts": parts}
            return str(
                s3.complete_multipart_upload(**at, **upload, MultipartUpload=parts_sent, **condition)["ETag"]
            )

        try:
            return self._once(operation, key, complete)
        except UnsettledWriteError:  # a definite 412: the upload can't be completed any more
            self._retried("abort", key, lambda s3: s3.abort_multipart_upload(**at, **upload))
            raise

    def _once(self, operation: str, key: str, call: Callable[[Any], T]) -> T:
        with self._point(operation, key):
            try:
                return call(_client(_endpoint()))
            except ClientError as error:
                raise self._translated(error, operation, key) from error
            except (HTTPClientError, S3ConnectionError, IncompleteReadError) as error:
                raise _TransientError(str(error)) from error
            except BotoCoreError as error:  # no credentials, no region, a bad profile
                raise RequestError(f"{self.uri}: {error}") from error

    def _retried(self, operation: str, key: str, call: Callable[[Any], T]) -> T:
        for _ in attempts():
            try:
                return self._once(operation, key, call)
            except _TransientError as error:
                last = error
        raise StoreUnavailableError(f"{self.uri}/{key}: no {operation} in {TIME_LIMIT_SECONDS:.0f} s: {last}")

    def _translated(self, error: ClientError, operation: str, key: str) -> Exception:
        code = str(error.response["Error"].get("Code"))
        status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        if status == 412:
            return UnsettledWriteError(f"{operation} {self.uri}/{key}: {error}")
        if (
            status in {408, 409, 429}
            or status >= 500
            or code in {"SlowDown", "RequestTimeout", "NoSuchUpload"}
        ):
            return _TransientError(str(error))
        if status == 404 and code != "NoSuchBucket":
            return FileNotFoundError(f"{self.uri}/{key}")
        if code == "ExpiredToken":  # after hours of work, perhaps: run again with new credentials
            return StoreUnavailableError(f"{operation} {self.uri}/{key}: {error}")
        return RequestError(f"{operation} {self.uri}/{key} was refused: {error}")


class _RangedFile(io.RawIOBase):
    """Ranged GETs of one generation as a file; its last bytes, the footer, came with the opening."""

    def __init__(self, store: S3Store, key: str, etag: str, num_bytes: int, tail: bytes) -> None:
        self._store, self._key, self._etag = store, key, etag
        self._num_bytes, self._tail, self._position = num_bytes, tail, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._num_bytes)
        if start >= stop:
            return 0
        tail_start = self._num_bytes - len(self._tail)
        if start >= tail_start:
            data = self._tail[start - tail_start : stop - tail_start]
        else:
            data = self._store.range(self._key, start, stop, etag=self._etag)
        buffer[: len(data)] = data
        self._position = start + len(data)
        return len(data)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@functools.cache
def _client(endpoint: str | None) -> Any:
    """One client a process and endpoint; its own retries are off, so that one call is one request."""
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint, config=config)


def _upload_part(s3: Any, *, at: dict[str, Any], chunk: bytes) -> str:
    return str(s3.upload_part(**at, Body=chunk)["ETag"])


def _list_page(s3: Any, **where: Any) -> Any:
    return s3.list_objects_v2(**where)


def _upload_page(s3: Any, **where: Any) -> Any:
    return s3.list_multipart_uploads(**where)


def _total_bytes(response: Any) -> int:
    if "ContentRange" not in response:  # the server sent the whole object
        return int(response["ContentLength"])
    return int(response["ContentRange"].rpartition("/")[2])


def _num_bytes(body: Body) -> int:
    return body.stat().st_size if isinstance(body, Path) else len(body)


def _stream(body: Body) -> BinaryIO:
    return body.open("rb") if isinstance(body, Path) else io.BytesIO(body)
