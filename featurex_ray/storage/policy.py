"""What a run may read: decided from the URI alone, and again where the object is opened."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import RefusedUriError
from featurex_ray.storage.uri import WEB, Location, has_parent_segment, parse, redact
from featurex_ray.storage.web import hosts, objection_to_host

OBJECT_STORES = frozenset({"s3", "gs", "az", "abfs", "abfss", "adl", "oci", "oss", "hdfs"})
"""Schemes that a local manifest may name without being told so."""

# Nothing that `parse` looks twice at: escapes, members, leading dots, control characters.
_PLAIN_NAME = r"[^./\\%:\x00-\x1f\x7f][^/\\%:\x00-\x1f\x7f]*"
_PLAIN_PATH = rf"({_PLAIN_NAME}/)*{_PLAIN_NAME}"


@dataclass(frozen=True)
class ReadPolicy:
    """What a manifest may name, which follows from where it lies.

    A local manifest may name any local file and any object on an object store. A manifest on a
    store may name objects of its own bucket only. `..` is refused on stores and resolved before
    it is judged on local disk; symlinks are followed before they are judged.

    Prefixes end at a `/`: `s3://b/cats` covers `s3://b/cats/1.jpg`, not `s3://b/cats2/1.jpg`.

    Args:
        manifest_uri: The manifest: file, folder, glob or template; only its store matters.
        allow_prefixes: What may be read besides (`--allow-prefix`).
        only_prefixes: If any, nothing outside of them may be read (`--only-prefix`).

    Raises:
        RefusedUriError: The manifest's URI or a prefix is malformed.
    """

    manifest_uri: str
    allow_prefixes: tuple[str, ...] = ()
    only_prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self._home, self._allowed, self._only

    @cached_property
    def _home(self) -> Location:
        return parse(self.manifest_uri)

    @cached_property
    def _allowed(self) -> tuple[Location, ...]:
        return tuple(map(_prefix, self.allow_prefixes))

    @cached_property
    def _only(self) -> tuple[Location, ...]:
        return tuple(map(_prefix, self.only_prefixes))

    @cached_property
    def _plain_pattern(self) -> str:
        home = self._home
        if home.scheme == "file":
            return rf"^(s3://[a-z0-9][a-z0-9.-]*)?/{_PLAIN_PATH}$"
        return rf"^{re.escape(f'{home.scheme}://{home.root}/')}{_PLAIN_PATH}$"

    def check(self, uri: str) -> None:
        """Refuses what may not be read, without any I/O.

        Raises:
            RefusedUriError: Says why, and which option widens.
        """
        location = parse(uri)
        if not location.path.strip("/"):
            raise RefusedUriError(f"{redact(uri)!r} names no object")
        if has_parent_segment(location):
            if location.scheme != "file":
                raise RefusedUriError(f"{redact(uri)!r} is refused: it holds '..'")
            location = replace(location, path=os.path.normpath(location.path))
        reason = self._objection(location)
        if reason:
            raise RefusedUriError(f"{redact(uri)!r} is refused: {reason}")

    def refusal(self, uri: str) -> str | None:
        """Why `check` refuses a URI; None where it passes."""
        try:
            self.check(uri)
        except RefusedUriError as error:
            return str(error)
        return None

    def check_opened(self, location: Location, real_path: str) -> None:
        """Refuses a local file whose symlinks lead out of what may be read.

        Args:
            location: As it was named.
            real_path: Where its symlinks lead.

        Raises:
            RefusedUriError: `real_path` lies outside.
        """
        real = Location("file", "", real_path)
        inside_only = not self._only or _any_covers(map(_followed, self._only), real)
        if not inside_only or not (self._is_local or _any_covers(map(_followed, self._allowed), real)):
            raise RefusedUriError(f"'{location}' is refused: its symlinks lead out of the allowed prefixes")

    def plainly_allowed(self, uris: pa.Array) -> pa.Array:
        """A quick look at a whole column, so that millions of rows need no Python each.

        Returns:
            Booleans: true where `check` is certain to pass, false where it must be asked.
        """
        if self._only or self._home.scheme in WEB:
            return pa.array([False] * len(uris), pa.bool_())
        return pc.fill_null(pc.match_substring_regex(uris, self._plain_pattern), False)

    @cached_property
    def named_hosts(self) -> frozenset[str]:
        """Web hosts that the user named in a prefix."""
        return hosts({prefix.root for prefix in self._allowed if prefix.scheme in WEB})

    @property
    def _is_local(self) -> bool:
        return self._home.scheme == "file"

    def _objection(self, location: Location) -> str | None:
        if self._only and not _any_covers(self._only, location):
            return "it lies outside of --only-prefix"
        if location.scheme in WEB and _any_covers(self._allowed, location):
            return objection_to_host(location.root, named=self.named_hosts)
        if _any_covers(self._allowed, location) or self._is_home(location):
            return None
        if location.scheme in WEB:
            return "http(s) is read only where --allow-prefix says so"
        if self._is_local:
            return f"{location.scheme}:// is read only where --allow-prefix says so"
        return "a manifest on a store may name its own bucket only; --allow-prefix widens this"

    def _is_home(self, location: Location) -> bool:
        if self._is_local:
            return location.scheme == "file" or location.scheme in OBJECT_STORES
        if location.scheme in WEB:
            return False
        return (location.scheme, location.root) == (self._home.scheme, self._home.root)


def _prefix(uri: str) -> Location:
    scheme, mark, rest = uri.partition("://")
    if mark and not rest and scheme.lower() != "file":  # "https://": the whole scheme
        return Location(scheme.lower(), "", "")
    location = parse(uri)
    path = os.path.normpath(location.path) if location.scheme == "file" else location.path
    return replace(location, path=path.rstrip("/"))


def _followed(prefix: Location) -> Location:
    return (
        replace(prefix, path=os.path.realpath(prefix.path).rstrip("/")) if prefix.scheme == "file" else prefix
    )


def _any_covers(prefixes: Iterable[Location], location: Location) -> bool:
    return any(_covers(prefix, location) for prefix in prefixes)


def _covers(prefix: Location, location: Location) -> bool:
    if prefix.scheme != location.scheme:
        return False
    if prefix.scheme != "file" and prefix.root != location.root:
        return not prefix.root
    path = prefix.path
    return not path or location.path == path or location.path.startswith(f"{path}/")
