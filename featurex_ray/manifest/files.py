"""The files of a manifest: found, opened, and what to say when that fails."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

from botocore.exceptions import BotoCoreError, NoCredentialsError

from featurex_ray.errors import FeaturexError, ManifestError, NoManifestError, StoreUnavailableError
from featurex_ray.storage import (
    NO_CREDENTIALS,
    Filesystem,
    filesystem,
    is_away,
    parse,
    redact,
    uri_of,
    version_of,
)

Format = Literal["parquet", "csv", "jsonl"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
FORMAT_NAMES = ", ".join((*FORMATS, "each also .gz"))


@dataclass(frozen=True)
class ManifestFile:
    """One file of a manifest.

    Attributes:
        uri: Absolute.
        format: By its extension.
        gzipped: Whether the name ends in `.gz`.
    """

    uri: str
    format: Format
    gzipped: bool

    @classmethod
    def of(cls, uri: str) -> "ManifestFile":
        """The file at `uri`, its format told from the name.

        Raises:
            ManifestError: The extension is none that a manifest can have.
        """
        found = format_of(uri)
        if found is None:
            raise ManifestError(f"{redact(uri)!r} is no manifest by its name; known are {FORMAT_NAMES}")
        return cls(uri, found, uri.lower().endswith(".gz"))

    def version(self) -> str:
        """What changes when the file does: its ETag, or its time and size."""
        store, path = filesystem(self.uri)
        return version_of(store.info(path))

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the file for reading, unpacked."""
        store, path = filesystem(self.uri)
        with store.open(path, "rb") as packed:
            if not self.gzipped:
                yield cast(IO[bytes], packed)
            else:
                with gzip.open(packed, "rb") as unpacked:
                    yield cast(IO[bytes], io.BufferedReader(cast(Any, unpacked), 1 << 20))


def format_of(uri: str) -> Format | None:
    """The format that a file's name stands for, if any."""
    name = uri.lower().removesuffix(".gz")
    return next((found for extension, found in FORMATS.items() if name.endswith(extension)), None)


def find_files(uri: str) -> list[ManifestFile]:
    """The files of the manifest at `uri`, by name: one file, all of a folder, or what a glob matches.

    In folders, names that begin with `_` or `.` and unknown extensions are passed over.

    Raises:
        ManifestError: There is none, or it can't be read.
        StoreUnavailableError: The store did not answer.
    """
    with explained(uri):
        store, path = filesystem(uri)
        kind = _kind(store, path)
        if kind == "file":
            return [ManifestFile.of(str(parse(uri)))]
        if kind is None and any(mark in path for mark in "*?["):  # else a name that holds one
            found = [name for name in store.glob(path) if format_of(name)]
        else:
            found = [name for name in store.find(path) if format_of(name) and _is_shown(name, path)]
    if not found:
        raise NoManifestError(f"no manifest at {redact(uri)!r}; looked for {FORMAT_NAMES}")
    return [ManifestFile.of(uri_of(name, listed=uri)) for name in sorted(found)]


def is_file(store: Filesystem, path: str) -> bool:
    """Whether a file lies there; unlike fsspec's own, it does not take an outage for a no."""
    return _kind(store, path) == "file"


def _kind(store: Filesystem, path: str) -> str | None:
    """`file` or `directory`; None where nothing lies there."""
    try:
        return str(store.info(path)["type"])
    except FileNotFoundError:
        return None


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns what filesystems raise into an error that says what to do about it.

    Raises:
        ManifestError: The file is missing or forbidden.
        StoreUnavailableError: The store did not answer.
    """
    try:
        yield
    except (OSError, BotoCoreError) as error:
        raise _explain(uri, error) from error


def _explain(uri: str, error: Exception) -> FeaturexError:
    name = repr(redact(uri))
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NoManifestError(f"no manifest at {name}")
    if isinstance(error, PermissionError):
        return ManifestError(f"may not read {name}: {error}")
    if isinstance(error, NoCredentialsError):
        return ManifestError(f"may not read {name}: {NO_CREDENTIALS}")
    if is_away(error):
        return StoreUnavailableError(f"reading {name}: {error}")
    return ManifestError(f"can't read {name}: {error}")


def _is_shown(name: str, folder: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in name.removeprefix(folder).split("/"))
