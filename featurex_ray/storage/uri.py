"""URIs, taken apart literally."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from featurex_ray.errors import RefusedUriError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# "http:/x" or "c:/x": a scheme that lost a slash, not a folder that anybody has.
_HALF_A_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MEMBER = re.compile(r"(.*?\.tar)::(.*)", re.IGNORECASE)
_COMPRESSED_MEMBER = re.compile(r"\.(tar\.[a-z0-9]+|tgz|tbz2?|txz)::", re.IGNORECASE)
_ENCODED_DOT = re.compile(r"%(25)*(2e|c0%(25)*ae)", re.IGNORECASE)
_ENCODED_SLASH = re.compile(r"%(25)*(2f|5c|c0%(25)*af)", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECRET_QUERY = re.compile(
    r"\?.*(signature|credential|token|secret|password|accesskey|sig=).*", re.IGNORECASE
)
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}

_CONTAINER_AT_ACCOUNT = frozenset({"abfs", "abfss"})
"""Where what stands before the @ is no user, but what the path starts with."""
WEB = frozenset({"http", "https"})
BUCKETED = frozenset({"s3", "gs"})


@dataclass(frozen=True)
class Location:
    """A URI's parts.

    Attributes:
        scheme: Lower case; `file` for local paths.
        root: Bucket, container or host; empty for local paths.
        path: Absolute path, or the key below `root`, literally.
        member: Name inside the tar at `path`, if the URI names one.
    """

    scheme: str
    root: str
    path: str
    member: str | None = None

    @property
    def container(self) -> "Location":
        """The object itself, without the member."""
        return replace(self, member=None)

    def __str__(self) -> str:
        start = self.path if self.scheme == "file" else f"{self.scheme}://{self.root}/{self.path}"
        return start if self.member is None else f"{start}::{self.member}"


def parse(uri: str) -> Location:
    """Takes a URI apart without touching what it names.

    Plain relative paths are taken from the working directory; for those in a manifest see `resolve`.

    Raises:
        RefusedUriError: The URI is malformed, or hides `..` behind escapes.
    """
    if not uri or _CONTROL.search(uri):
        raise _malformed(uri, "is empty or holds control characters")
    container, member = _split_member(uri)
    match = _SCHEME.match(container)
    if match is None:
        location = _local(uri, container, member)
    else:
        location = _remote(uri, match[1].lower(), container[match.end() :], member)
    _refuse_hidden_parents(uri, location)
    return location


def resolve(uri: str, *, relative_to: str) -> str:
    """A manifest's URI made absolute: relative names start at the manifest's own folder.

    Args:
        uri: As the manifest has it. Absolute paths and URIs with a scheme come back unchanged, and so
            does what is neither (`http:/x`), which `parse` refuses.
        relative_to: URI of the manifest file.
    """
    looks_absolute = not uri or uri.startswith("/") or "://" in uri or uri[:5].lower() == "file:"
    if looks_absolute or _HALF_A_SCHEME.match(uri):
        return uri
    base = relative_to if _SCHEME.match(relative_to) else str(parse(relative_to))
    return f"{base.rpartition('/')[0]}/{uri}"


def redact(uri: str) -> str:
    """The URI without credentials, for messages and logs."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    host, slash, path = rest.partition("/")
    if "@" in host and scheme.lower() not in _CONTAINER_AT_ACCOUNT:
        host = "***@" + host.rpartition("@")[2]
    path = re.sub(r"\?.*", "?***", path) if scheme.lower() in WEB else _SECRET_QUERY.sub("?***", path)
    return f"{scheme}://{host}{slash}{path}"


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """A job's values for what is kept of it: URIs without credentials and signatures."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return redact(value)
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    return {name: plain(value) for name, value in values.items()}


def has_parent_segment(location: Location) -> bool:
    """Whether `..` stands plainly among the path's segments."""
    return ".." in location.path.split("/")


def _split_member(uri: str) -> tuple[str, str | None]:
    if _COMPRESSED_MEMBER.search(uri):
        raise _malformed(uri, "names a member of a compressed archive; only plain .tar can be read by range")
    match = _MEMBER.fullmatch(uri)
    if match is None:
        return uri, None
    if not match[2] or ".." in match[2].split("/"):
        raise _malformed(uri, "has no usable name after '::'")
    return match[1], match[2]


def _local(uri: str, container: str, member: str | None) -> Location:
    if container[:5].lower() == "file:":
        container = container[5:]
        if not container.startswith("/"):
            raise _malformed(uri, "is a file: URI without an absolute path")
    elif "://" in container or _HALF_A_SCHEME.match(container):
        raise _malformed(uri, "is neither a path nor scheme://rest")
    path = container if container.startswith("/") else f"{os.getcwd()}/{container}"  # noqa: PTH109 (text)
    return Location("file", "", path, member)


def _remote(uri: str, scheme: str, rest: str, member: str | None) -> Location:
    scheme = _ALIASES.get(scheme, scheme)
    root, _, path = rest.partition("/")
    if scheme == "file":
        if root not in ("", "localhost"):
            raise _malformed(uri, "is a file: URI on another host")
        return Location("file", "", f"/{path}", member)
    if not root or (scheme in BUCKETED and not _BUCKET.fullmatch(root)):
        raise _malformed(uri, "has no valid bucket or host")
    return Location(scheme, root.lower() if scheme in WEB else root, path, member)


def _refuse_hidden_parents(uri: str, location: Location) -> None:
    decoded = _ENCODED_SLASH.sub("/", _ENCODED_DOT.sub(".", location.path)).replace("\\", "/")
    if ".." in decoded.split("/") and not has_parent_segment(location):
        raise _malformed(uri, "hides '..' in its path")


def _malformed(uri: str, why: str) -> RefusedUriError:
    return RefusedUriError(f"{redact(uri)!r} {why}")
