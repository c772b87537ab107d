"""Tar shards read by range: an index of members, made from the headers alone."""

import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from featurex_ray.errors import FetchError

FIRST_WINDOW_BYTES = 64 << 10
_LARGEST_WINDOW_BYTES = 8 << 20
_LARGEST_HEADER_BYTES = 1 << 20
"""Of names and pax records; more is asked for by broken headers only."""
# What damaged headers were seen to raise, besides tarfile's own. It calls itself for each header that
# only says more of the next one, such as a long name.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, LookupError, EOFError, RecursionError)
# Skipping this much costs a store about as much time as reading it.
_WORTH_SKIPPING_BYTES = 1 << 20


@dataclass(frozen=True)
class TarIndex:
    """Where each member lies.

    Attributes:
        etag: Of the tar that was indexed.
        members: Name -> the bytes of its data in the tar. Of two members with one name the last counts.
    """

    etag: str
    members: Mapping[str, range]

    def find(self, name: str) -> range | None:
        """The member's bytes; `a.jpg` and `./a.jpg` are the same member."""
        bare = name.removeprefix("./")
        return next((self.members[n] for n in (name, bare, f"./{bare}") if n in self.members), None)


class RangeReader(io.RawIOBase):
    """A seekable file over ranged reads, for walking from header to header.

    Members that lie close together are read through in windows that double up to 8 MiB, so that a
    shard of small images costs few requests; large members are skipped over.
    """

    def __init__(self, size: int, read_range: Callable[[range], bytes], *, start: bytes = b"") -> None:
        self._size = size
        self._read_range = read_range
        self._position = 0
        self._window = FIRST_WINDOW_BYTES
        self._start = 0
        self._buffer = start

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves without reading."""
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes of headers, fewer only at the end.

        Raises:
            FetchError: `bad_archive`: no header is so large.
        """
        if not 0 <= size <= _LARGEST_HEADER_BYTES:
            raise FetchError("bad_archive", f"a header of the tar claims {size} bytes")
        stop = min(self._position + size, self._size)
        if stop <= self._position:
            return b""
        if not self._start <= self._position < stop <= self._start + len(self._buffer):
            self._fill(stop)
        first = self._position - self._start
        self._position = stop
        return self._buffer[first : stop - self._start]

    def _fill(self, stop: int) -> None:
        skipped = self._position - (self._start + len(self._buffer))
        grows = 0 <= skipped < _WORTH_SKIPPING_BYTES
        self._window = min(self._window * 2, _LARGEST_WINDOW_BYTES) if grows else FIRST_WINDOW_BYTES
        end = min(max(stop, self._position + self._window), self._size)
        self._buffer = self._read_range(range(self._position, end))
        self._start = self._position


def index_members(reader: RangeReader) -> dict[str, range]:
    """Walks the headers of an uncompressed tar.

    Raises:
        FetchError: `bad_archive`: this is no tar, or it breaks off.
    """
    try:
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            return {
                member.name: _data_of(member) for member in tar if member.isreg() and not member.issparse()
            }
    except _TAR_ERRORS as error:
        raise FetchError("bad_archive", f"not a readable uncompressed tar: {error}") from error


def _data_of(member: tarfile.TarInfo) -> range:
    if member.size < 0:  # tarfile would come back to it for ever
        raise FetchError("bad_archive", f"the tar's member {member.name!r} claims {member.size} bytes")
    return range(member.offset_data, member.offset_data + member.size)
