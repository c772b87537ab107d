"""Inline media: the `data` of single manifest rows, read when they are needed."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featurex_ray.errors import FetchError, ManifestError, StoreUnavailableError
from featurex_ray.manifest.files import ManifestFile, explained
from featurex_ray.manifest.formats import media_column, media_leaf

LARGE_GROUP_BYTES = 128 << 20
"""Media of smaller row groups is kept between calls, that of larger ones is streamed through."""
_MOST_ROWS = 64
_BATCH_BYTES = 16 << 20
"""At about so many rows and bytes a time it is decoded."""
_BUFFER_BYTES = 1 << 20

Rows = npt.NDArray[np.int64]


def read_inline(rows: Sequence[tuple[str, int]]) -> list[bytes | FetchError]:
    """Reads the inline media of some manifest rows.

    Rows of one row group are read together, so neighbours had better be asked for at once.

    Args:
        rows: `(data_file, data_row)` of samples.

    Returns:
        For each row its bytes, or why they can't be had (`not_found` or `unavailable`).
    """
    found: list[bytes | FetchError] = [FetchError("not_found", "the manifest has no such row")] * len(rows)
    by_file: dict[str, list[int]] = {}
    for index, (file, _) in enumerate(rows):
        by_file.setdefault(file, []).append(index)
    for file, indices in by_file.items():
        try:
            for position, data in _read_rows(file, np.array([rows[i][1] for i in indices], np.int64)):
                found[indices[position]] = data
        except FetchError as error:
            for index in indices:
                found[index] = error
    return found


def _read_rows(uri: str, wanted: Rows) -> Iterator[tuple[int, bytes]]:
    """Yields positions in `wanted` with their bytes, one row group after the other."""
    try:
        with explained(uri):
            yield from _groups_rows(uri, wanted)
    except StoreUnavailableError as error:
        raise FetchError("unavailable", str(error)) from error
    except (ManifestError, pa.ArrowException) as error:
        raise FetchError("not_found", str(error)) from error


def _groups_rows(uri: str, wanted: Rows) -> Iterator[tuple[int, bytes]]:
    footer = _footer(uri)
    ends = np.cumsum([footer.row_group(group).num_rows for group in range(footer.num_row_groups)])
    groups = np.searchsorted(ends, wanted, side="right")
    for group in np.unique(groups[groups < footer.num_row_groups]).tolist():
        positions = np.flatnonzero(groups == group)
        first = ends[group] - footer.row_group(group).num_rows
        for position, data in zip(positions, _group_rows(uri, group, wanted[positions] - first), strict=True):
            if data is not None:
                yield int(position), data


def _group_rows(uri: str, group: int, rows: Rows) -> list[bytes | None]:
    if media_bytes(_footer(uri), group) > LARGE_GROUP_BYTES:
        return _large_group(uri, group).read(rows)
    column = _small_group(uri, group)
    return [column[row].as_py() for row in rows.tolist()]


def media_bytes(footer: pq.FileMetaData, group: int) -> int:
    """Unpacked bytes of a row group's inline media."""
    facts = footer.row_group(group)
    columns = map(facts.column, range(facts.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in ("data", "data.bytes"))


@lru_cache(maxsize=1)
def _small_group(uri: str, group: int) -> pa.Array:
    with _opened(uri, buffer_bytes=0) as (parquet, leaf):
        rows = parquet.read_row_group(group, columns=[leaf], use_threads=False)
    return pa.concat_arrays([media_column(batch) for batch in rows.to_batches()])


@lru_cache(maxsize=1)
def _large_group(uri: str, group: int) -> "_LargeGroup":
    return _LargeGroup(uri, group)


class _LargeGroup:
    """A row group that is read from its front and kept open: for later and later rows it is read once.

    A column of Parquet can't be entered in its middle; plans are in the order in which media lie. Safe to
    call from several threads.
    """

    def __init__(self, uri: str, group: int) -> None:
        self._place = uri, group
        self._lock = threading.Lock()
        self._rewind()

    def read(self, rows: Rows) -> list[bytes | None]:
        """The media of rows of the group.

        Raises:
            ManifestError: It has fewer rows than the file's footer says.
        """
        with self._lock:
            try:
                if rows.min() < self._first:
                    self._rewind()
                found = {row: self._row(row) for row in np.unique(rows).tolist()}
            except BaseException:
                self._rewind()  # a generator that raised yields no more
                raise
        return [found[row] for row in rows.tolist()]

    def _rewind(self) -> None:
        self._batches = _batches(*self._place)
        self._first = 0
        self._batch = pa.array([], pa.binary())

    def _row(self, row: int) -> bytes | None:
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            batch = next(self._batches, None)
            if batch is None:
                raise ManifestError(f"{self._place[0]} has fewer rows than its footer says")
            self._batch = batch
        media: bytes | None = self._batch[row - self._first].as_py()
        return media


def _batches(uri: str, group: int) -> Iterator[pa.Array]:
    footer = _footer(uri)
    # A batch is held until rows behind it are wanted: of long media, a few.
    row_bytes = media_bytes(footer, group) // footer.row_group(group).num_rows + 1
    num_rows = min(max(_BATCH_BYTES // row_bytes, 1), _MOST_ROWS)
    with _opened(uri, buffer_bytes=_BUFFER_BYTES) as (parquet, leaf):
        for batch in parquet.iter_batches(num_rows, row_groups=[group], columns=[leaf], use_threads=False):
            yield media_column(batch)


@lru_cache(maxsize=64)
def _footer(uri: str) -> pq.FileMetaData:
    with ManifestFile.of(uri).open() as opened:
        return pq.ParquetFile(opened).metadata


@contextmanager
def _opened(uri: str, *, buffer_bytes: int) -> Iterator[tuple[pq.ParquetFile, str | None]]:
    """The file, and the name of its media.

    It is read in this thread: others are waited for longer than one column takes. Without a buffer, a
    column of a row group is read at once.
    """
    footer = _footer(uri)
    with ManifestFile.of(uri).open() as opened:
        parquet = pq.ParquetFile(opened, metadata=footer, buffer_size=buffer_bytes, pre_buffer=False)
        yield parquet, media_leaf(footer.schema.to_arrow_schema())
