"""Inline media: the `data` of single manifest rows, read when they are needed."""

from collections.abc import Iterator, Sequence
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
_STREAMED_ROWS = 64

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
    if media_bytes(_footer(uri), group) <= LARGE_GROUP_BYTES:
        column = _small_group(uri, group)
        return [column[row].as_py() for row in rows.tolist()]
    found: dict[int, bytes | None] = {}
    first = 0
    for batch in _group_batches(uri, group):
        for row in rows[(rows >= first) & (rows < first + len(batch))].tolist():
            found[row] = batch[row - first].as_py()
        first += len(batch)
        if first > rows.max():
            break
    return [found[row] for row in rows.tolist()]


def media_bytes(footer: pq.FileMetaData, group: int) -> int:
    """Unpacked bytes of a row group's inline media."""
    facts = footer.row_group(group)
    columns = map(facts.column, range(facts.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in ("data", "data.bytes"))


@lru_cache(maxsize=1)
def _small_group(uri: str, group: int) -> pa.Array:
    return pa.concat_arrays(list(_group_batches(uri, group)))


@lru_cache(maxsize=64)
def _footer(uri: str) -> pq.FileMetaData:
    with ManifestFile.of(uri).open() as opened:
        return pq.ParquetFile(opened).metadata


def _group_batches(uri: str, group: int) -> Iterator[pa.Array]:
    file, footer = ManifestFile.of(uri), _footer(uri)
    leaf = media_leaf(footer.schema.to_arrow_schema())
    with file.open() as opened:
        parquet = pq.ParquetFile(opened, metadata=footer)
        for batch in parquet.iter_batches(_STREAMED_ROWS, row_groups=[group], columns=[leaf]):
            yield media_column(batch)
