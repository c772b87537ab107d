"""Inline media: the `data` of single manifest rows, read when they are needed.

A plan says in which row of which file a sample's media lay when it was made. Files are rewritten, with
their rows in another order; so it is looked whether the row is the sample's still, and for the row that is.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurex_ray.errors import FeaturexError, FetchError, ManifestError, StoreUnavailableError
from featurex_ray.manifest.files import ManifestFile, explained
from featurex_ray.manifest.formats import media_column, media_leaf
from featurex_ray.manifest.samples import Block, sample_names
from featurex_ray.storage import redact

LARGE_GROUP_BYTES = 128 << 20
"""Media of smaller row groups is kept between calls, that of larger ones is streamed through."""
_MOST_ROWS = 64
_BATCH_BYTES = 16 << 20
"""At about so many rows and bytes a time it is decoded."""
_BUFFER_BYTES = 1 << 20
_ATTEMPTS = 3
"""At files that are replaced while they are read."""

Rows = npt.NDArray[np.int64]


class InlineMedia(NamedTuple):
    """Where a sample's media lay when it was planned.

    Attributes:
        file: URI of the manifest file.
        row: Of the file.
        dataset: The sample's.
        sample_id: The sample's.
    """

    file: str
    row: int
    dataset: str
    sample_id: str


def read_inline(media: Sequence[InlineMedia]) -> list[bytes | FetchError]:
    """Reads the inline media of some samples.

    Rows of one row group are read together, so neighbours had better be asked for at once.

    Returns:
        For each sample its bytes, or why they can't be had (`not_found` or `unavailable`).
    """
    found: list[bytes | FetchError] = [FetchError("not_found", "the manifest has no such row")] * len(media)
    by_file: dict[str, list[int]] = {}
    for index, each in enumerate(media):
        by_file.setdefault(each.file, []).append(index)
    for file, indices in by_file.items():
        try:
            for position, data in _read_file(file, [media[index] for index in indices]):
                found[indices[position]] = data
        except FetchError as error:
            for index in indices:
                found[index] = error
    return found


def _read_file(uri: str, media: Sequence[InlineMedia]) -> list[tuple[int, bytes | FetchError]]:
    """Positions in `media` with their bytes, or why there are none."""
    try:
        with explained(uri):
            return _read_some_version(ManifestFile.of(uri), media)
    except StoreUnavailableError as error:
        raise FetchError("unavailable", str(error)) from error
    except (ManifestError, pa.ArrowException) as error:
        raise FetchError("not_found", str(error)) from error


def _read_some_version(
    file: ManifestFile, media: Sequence[InlineMedia]
) -> list[tuple[int, bytes | FetchError]]:
    for _ in range(_ATTEMPTS - 1):
        version = file.version()
        try:
            return list(_File(file.uri, version).read(media))
        except (OSError, pa.ArrowException, FeaturexError):
            if file.version() == version:
                raise
            # Whatever reading came to, of a file that was replaced meanwhile it says nothing.
    return list(_File(file.uri, file.version()).read(media))


class _File(NamedTuple):
    """A manifest file as it is at the moment."""

    uri: str
    version: str

    def read(self, media: Sequence[InlineMedia]) -> Iterator[tuple[int, bytes | FetchError]]:
        """Positions in `media` with their bytes, one row group after the other, and what was not found."""
        footer = _footer(self)
        ends = np.cumsum([footer.row_group(group).num_rows for group in range(footer.num_row_groups)])
        wanted, ours = _located(self, media, ends)
        for position in np.flatnonzero(~ours).tolist():
            message = f"{redact(self.uri)} does not hold sample {media[position].sample_id!r} (any more)"
            yield position, FetchError("not_found", message)
        groups = np.searchsorted(ends, wanted, side="right")
        for group in np.unique(groups[ours]).tolist():
            positions = np.flatnonzero(ours & (groups == group))
            first = ends[group] - footer.row_group(group).num_rows
            read = _group_rows(self, group, wanted[positions] - first)
            for position, data in zip(positions.tolist(), read, strict=True):
                if data is not None:
                    yield position, data


def _located(file: _File, media: Sequence[InlineMedia], ends: Rows) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """The rows of some samples by now, and which of them there are."""
    rows = np.array([each.row for each in media], np.int64)
    datasets, names = (pa.array(column) for column in list(zip(*media, strict=True))[2:])
    ours = np.zeros(len(media), bool)
    groups = np.searchsorted(ends, rows, side="right")
    for group in np.unique(groups[groups < len(ends)]).tolist():
        here = np.flatnonzero(groups == group)
        names_here = _names(file, group).take(pa.array(rows[here] - (ends[group] - _num_rows(file, group))))
        ours[here] = _are(names_here, datasets.take(pa.array(here)), names.take(pa.array(here)))
    moved = np.flatnonzero(~ours)
    if len(moved):
        rows[moved] = _found(file, datasets.take(pa.array(moved)), names.take(pa.array(moved)))
        ours = rows >= 0
    return rows, ours


def _are(held: pa.RecordBatch, datasets: pa.Array, names: pa.Array) -> npt.NDArray[np.bool_]:
    """Which rows are those samples. Rows without a dataset are of the one that was named to the run."""
    same = pc.and_(
        pc.equal(held["sample_id"], names), pc.fill_null(pc.equal(held["dataset"], datasets), True)
    )
    found: npt.NDArray[np.bool_] = pc.fill_null(same, False).to_numpy(zero_copy_only=False)
    return found


def _found(file: _File, datasets: pa.Array, names: pa.Array) -> Rows:
    """The rows of samples, wherever in the file they are; -1 where they aren't."""
    rows = np.full(len(names), -1, np.int64)
    held_datasets, held_names = _all_names(file)
    for dataset in pc.unique(datasets):
        asked = np.flatnonzero(pc.equal(datasets, dataset))
        places = np.flatnonzero(pc.fill_null(pc.equal(held_datasets, dataset), True))
        at = pc.index_in(names.take(pa.array(asked)), held_names.take(pa.array(places)))
        there = np.flatnonzero(at.is_valid())
        rows[asked[there]] = places[at.drop_null()]
    return rows


def _num_rows(file: _File, group: int) -> int:
    return int(_footer(file).row_group(group).num_rows)


@lru_cache(maxsize=1)
def _names(file: _File, group: int) -> pa.RecordBatch:
    """`dataset` and `sample_id` of a row group."""
    (named,) = _named(file, [group])
    return named


@lru_cache(maxsize=1)
def _all_names(file: _File) -> tuple[pa.Array, pa.Array]:
    """`dataset` and `sample_id` of all rows: what a file that was rewritten is searched in."""
    named = list(_named(file, range(_footer(file).num_row_groups)))
    datasets, names = ([each[name] for each in named] for name in ("dataset", "sample_id"))
    empty = pa.array([], pa.string())
    return pa.concat_arrays([empty, *datasets]), pa.concat_arrays([empty, *names])


def _named(file: _File, groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
    ends = np.cumsum([0, *(_num_rows(file, group) for group in range(_footer(file).num_row_groups))])
    with _opened(file, buffer_bytes=0) as (parquet, _):
        columns = [name for name in ("uri", "dataset", "sample_id") if name in parquet.schema_arrow.names]
        for group in groups:
            read = parquet.read_row_group(group, columns=columns, use_threads=False)
            nothing = pa.nulls(_num_rows(file, group))  # without a column, a batch would be of no rows
            held = [read[name].combine_chunks() for name in columns]
            raw = pa.RecordBatch.from_arrays([*held, nothing], [*columns, "nothing"])
            yield sample_names(Block(ManifestFile.of(file.uri), int(ends[group]), raw))


def _group_rows(file: _File, group: int, rows: Rows) -> list[bytes | None]:
    if media_bytes(_footer(file), group) > LARGE_GROUP_BYTES:
        return _large_group(file, group).read(rows)
    column = _small_group(file, group)
    return [column[row].as_py() for row in rows.tolist()]


def media_bytes(footer: pq.FileMetaData, group: int) -> int:
    """Unpacked bytes of a row group's inline media."""
    facts = footer.row_group(group)
    columns = map(facts.column, range(facts.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in ("data", "data.bytes"))


@lru_cache(maxsize=1)
def _small_group(file: _File, group: int) -> pa.Array:
    with _opened(file, buffer_bytes=0) as (parquet, leaf):
        rows = parquet.read_row_group(group, columns=[leaf], use_threads=False)
    return pa.concat_arrays([media_column(batch) for batch in rows.to_batches()])


@lru_cache(maxsize=1)
def _large_group(file: _File, group: int) -> "_LargeGroup":
    return _LargeGroup(file, group)


class _LargeGroup:
    """A row group that is read from its front and kept open: for later and later rows it is read once.

    A column of Parquet can't be entered in its middle; plans are in the order in which media lie. Safe to
    call from several threads.
    """

    def __init__(self, file: _File, group: int) -> None:
        self._place = file, group
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
                raise ManifestError(f"{self._place[0].uri} has fewer rows than its footer says")
            self._batch = batch
        media: bytes | None = self._batch[row - self._first].as_py()
        return media


def _batches(file: _File, group: int) -> Iterator[pa.Array]:
    # A batch is held until rows behind it are wanted: of long media, a few.
    row_bytes = media_bytes(_footer(file), group) // _num_rows(file, group) + 1
    num_rows = min(max(_BATCH_BYTES // row_bytes, 1), _MOST_ROWS)
    with _opened(file, buffer_bytes=_BUFFER_BYTES) as (parquet, leaf):
        for batch in parquet.iter_batches(num_rows, row_groups=[group], columns=[leaf], use_threads=False):
            yield media_column(batch)


@lru_cache(maxsize=64)
def _footer(file: _File) -> pq.FileMetaData:
    with _open(file) as opened:
        return pq.ParquetFile(opened).metadata


@contextmanager
def _opened(file: _File, *, buffer_bytes: int) -> Iterator[tuple[pq.ParquetFile, str | None]]:
    """The file, and the name of its media.

    It is read in this thread: others are waited for longer than one column takes. Without a buffer, a
    column of a row group is read at once.
    """
    footer = _footer(file)
    with _open(file) as opened:
        parquet = pq.ParquetFile(opened, metadata=footer, buffer_size=buffer_bytes, pre_buffer=False)
        yield parquet, media_leaf(footer.schema.to_arrow_schema())


@contextmanager
def _open(file: _File) -> Iterator[IO[bytes]]:
    """The file's bytes, which stay those of one version: open files do, and S3 is asked by ETag."""
    named = ManifestFile.of(file.uri)
    with named.open() as opened:
        if named.version() != file.version:
            raise StoreUnavailableError(f"{redact(file.uri)} was replaced while it was read")
        yield opened
