"""URI -> filesystem, one per process and environment."""

import errno
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import aiohttp
import fsspec
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from s3fs.core import set_custom_error_handler

from featurex_ray.errors import RequestError
from featurex_ray.storage.uri import WEB, Location, parse, redact

Filesystem = Any
"""An `fsspec.AbstractFileSystem`; fsspec ships no types."""

_LISTING_ATTEMPTS = 8
_CODES = {
    401: "forbidden",
    403: "forbidden",
    404: "not_found",
    408: "timeout",
    410: "not_found",
    412: "changed",
    416: "out_of_range",
    429: "unavailable",
    501: "bad_request",
}
_S3_CODES = {"RequestTimeout": "timeout", "ExpiredToken": "forbidden", "SlowDown": "unavailable"}

NO_CREDENTIALS = "no AWS credentials (environment, configuration or role)"

_AWAY = {
    errno.EBUSY,
    errno.EIO,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    getattr(errno, "EREMOTEIO", errno.EIO),
}

_TIMES = ("mtime", "last_modified", "modificationTime", "modify", "created")
"""Where filesystems say when an object was written: hdfs and sftp, az, webhdfs, ftp, and others."""


def filesystem(uri: str) -> tuple[Filesystem, str]:
    """The filesystem that holds a URI, and the path in it, literally.

    S3 credentials, region and endpoint come from the standard AWS chain only (environment,
    configuration files, instance and pod roles; `AWS_ENDPOINT_URL` is honoured).

    Raises:
        RefusedUriError: The URI is malformed.
        RequestError: Nothing installed speaks this scheme.
    """
    location = parse(uri)
    if location.scheme == "file":
        return fsspec.filesystem("file"), location.path
    if location.scheme == "s3":
        return _s3(os.getpid(), _aws_environment()), f"{location.root}/{location.path}"
    if location.scheme in WEB:
        return fsspec.filesystem(location.scheme), str(location.container)
    store, root = _rooted(location)
    return store, f"{root}{location.path}"


def uri_of(name: str, *, listed: str) -> str:
    """The URI of what a filesystem calls `name` when it lists another URI."""
    location = parse(listed)
    if location.scheme == "file" or location.scheme in WEB:
        return name
    root = f"{location.root}/" if location.scheme == "s3" else _rooted(location)[1]
    below = name.lstrip("/").removeprefix(root.lstrip("/"))
    return f"{location.scheme}://{location.root}/{below}"


def version_of(facts: Mapping[str, Any]) -> str:
    """What changes when an object does, of what a filesystem says of it: its ETag, or its time and size."""
    if etag := facts.get("ETag") or facts.get("etag"):
        return str(etag).strip('"')
    return f"{next((facts[key] for key in _TIMES if facts.get(key)), '')}-{facts['size']}"


def _rooted(location: Location) -> tuple[Filesystem, str]:
    """Any other filesystem, and what its paths start with.

    A host (hdfs, ftp) or an account (abfs) is its option, and no part of the path then.
    """
    start = f"{location.scheme}://{location.root}/"
    try:
        kind = fsspec.get_filesystem_class(location.scheme)
        options = kind._get_kwargs_from_urls(start)
        store = fsspec.filesystem(location.scheme, **options)
    except (ImportError, ValueError) as error:
        raise RequestError(f"can't read {redact(start)}: {error}") from error
    return store, kind._strip_protocol(f"{start}x")[:-1] if options else f"{location.root}/"


def error_code(status: int) -> str:
    """The stable code of an HTTP status that is not a success."""
    return _CODES.get(status, "unavailable" if status >= 500 else "bad_request")


def s3_error_code(error: Exception) -> str:
    """The stable code of what botocore, or the connection beneath it, raised."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        return _S3_CODES.get(error.response.get("Error", {}).get("Code", ""), error_code(status))
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return "forbidden"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "timeout"
    if isinstance(error, BotoCoreError | aiohttp.ClientError | OSError):
        return "unavailable"
    return "bad_request"


def is_away(error: Exception) -> bool:
    """Whether what a filesystem raised says that its store does not answer for now."""
    if isinstance(error, TimeoutError | ConnectionError | BotoCoreError):
        return True
    return isinstance(error, OSError) and error.errno in _AWAY


def _is_transient(error: Exception) -> bool:
    return s3_error_code(error) in ("timeout", "unavailable")


def _aws_environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@lru_cache(maxsize=4)
def _s3(_process: int, _environment: tuple[tuple[str, str], ...]) -> Filesystem:
    """One client per process and AWS environment: a fork or another endpoint needs its own."""
    set_custom_error_handler(_is_transient)
    store = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,  # what another process has just written must be seen
        default_block_size=8 << 20,
        config_kwargs={
            "max_pool_connections": 256,
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": 60,
        },
    )
    store.retries = _LISTING_ATTEMPTS
    return store
