"""URI -> filesystem, one per process and environment."""

import os
from functools import lru_cache
from typing import Any

import aiohttp
import fsspec
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from s3fs.core import set_custom_error_handler

from featurex_ray.errors import RequestError
from featurex_ray.storage.uri import WEB, parse, redact

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
    path = str(location.container) if location.scheme in WEB else f"{location.root}/{location.path}"
    try:
        return fsspec.filesystem(location.scheme), path
    except (ImportError, ValueError) as error:
        raise RequestError(f"can't read {redact(uri)!r}: {error}") from error


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
