"""Rows of manifest files as Arrow batches, streamed, whatever the format.

Columns come as they are; only `data` comes as booleans that say which rows have inline media, so
that no media is read here.
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from featurex_ray.errors import ManifestError
from featurex_ray.manifest.files import Format, ManifestFile

DATA = "data"
_BATCH_ROWS = 16_384
_JSON_BATCH_ROWS = 8_192
_CSV_BLOCK_BYTES = 8 << 20
_LONGEST_HEADER_BYTES = 1 << 16


class Rows(Protocol):
    """The rows of one file."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that are there (JSON Lines: those that were met so far)."""
        ...

    @property
    def is_text(self) -> bool:
        """Whether values came without types, so that numbers may be written as strings."""
        ...

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows, with the named columns as far as they exist."""
        ...


class ParquetRows:
    """Rows of Parquet."""

    is_text = False

    def __init__(self, file: ManifestFile) -> None:
        self._file = file
        with _seekable(file) as opened:
            self.schema = pq.ParquetFile(opened).schema_arrow
        _refuse_twins(self.columns)

    @property
    def columns(self) -> Sequence[str]:
        """See `Rows.columns`."""
        return list(self.schema.names)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Rows.batches`."""
        wanted = [name for name in columns if name in self.schema.names and name != DATA]
        leaf = media_leaf(self.schema) if DATA in columns else None
        with _seekable(self._file) as opened:
            parquet = pq.ParquetFile(opened, pre_buffer=False)  # halves what a large row group takes
            for groups in _runs(parquet.metadata, wanted, self.schema):
                read = parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=wanted)
                if leaf is None:
                    yield from read
                    continue
                has_data = pa.concat_arrays([self._has_data(parquet, group, leaf) for group in groups])
                first = 0
                for batch in read:
                    yield batch.append_column(DATA, has_data.slice(first, batch.num_rows))
                    first += batch.num_rows

    def _has_data(self, parquet: pq.ParquetFile, group: int, leaf: str) -> pa.BooleanArray:
        """Which rows of a row group have media, from the statistics where those say it."""
        if self._file.gzipped:
            raise ManifestError("inline `data` can't be read out of a gzipped Parquet file: unpack it")
        facts = parquet.metadata.row_group(group)
        column = next(c for c in map(facts.column, range(facts.num_columns)) if c.path_in_schema == leaf)
        nulls = (
            column.statistics.null_count if column.statistics and column.statistics.has_null_count else None
        )
        if not facts.num_rows:
            return pa.array([], pa.bool_())
        if nulls in (0, facts.num_rows):
            return pa.array([nulls == 0] * facts.num_rows, pa.bool_())
        read = parquet.iter_batches(256, row_groups=[group], columns=[leaf])
        return pa.concat_arrays([media_column(batch).is_valid() for batch in read])


def _runs(footer: pq.FileMetaData, columns: Sequence[str], schema: pa.Schema) -> Iterator[list[int]]:
    """Row groups, as many together as make a batch: files of image datasets have groups of a hundred rows.

    Nested columns are read a group at a time: their rows can be long, and pyarrow can't read lists of
    dictionary values across groups.
    """
    if any(pa.types.is_nested(schema.field(name).type) for name in columns):
        yield from ([group] for group in range(footer.num_row_groups))
        return
    run: list[int] = []
    num_rows = 0
    for group in range(footer.num_row_groups):
        run.append(group)
        num_rows += footer.row_group(group).num_rows
        if num_rows >= _BATCH_ROWS:
            yield run
            run, num_rows = [], 0
    if run:
        yield run


def _refuse_twins(columns: Sequence[str]) -> None:
    if len(set(columns)) < len(columns):
        raise ManifestError(f"two columns have one name: {', '.join(columns)}")


class CsvRows:
    """Rows of CSV. Everything is a string, so that `007` stays `007`; empty cells are null."""

    is_text = True

    def __init__(self, file: ManifestFile) -> None:
        self._file = file
        with file.open() as opened:
            beginning = opened.read(_LONGEST_HEADER_BYTES)
        self.columns: Sequence[str] = _only_header(beginning)
        self._has_rows = not self.columns and bool(beginning.strip())
        if self._has_rows:
            with file.open() as opened:
                self.columns = self._reader(opened, []).schema.names
        _refuse_twins(self.columns)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Rows.batches`."""
        wanted = [name for name in columns if name in self.columns and name != DATA]
        if not (wanted and self._has_rows):
            return  # an empty file, or one without any column of a manifest
        with self._file.open() as opened:
            yield from self._reader(opened, wanted)

    @staticmethod
    def _reader(opened: Any, columns: Sequence[str]) -> Any:
        return pa_csv.open_csv(
            opened,
            read_options=pa_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.string() for name in columns},
                include_columns=list(columns),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )


def _only_header(beginning: bytes) -> list[str]:
    """The columns of a file that has no more than them; pyarrow wants a line's end after them."""
    text = beginning.decode("utf-8-sig", errors="replace").strip("\r\n")
    if not text or "\n" in text or "\r" in text or len(beginning) == _LONGEST_HEADER_BYTES:
        return []
    return next(csv.reader([text]))


class JsonRows:
    """Rows of JSON Lines."""

    is_text = False

    def __init__(self, file: ManifestFile) -> None:
        self._file = file
        self._met: dict[str, None] = {}
        for _ in islice(self.batches([]), 1):
            pass

    @property
    def columns(self) -> Sequence[str]:
        """See `Rows.columns`."""
        return list(self._met)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Rows.batches`."""
        wanted = [name for name in columns if name != DATA]
        first_row = 1
        with self._file.open() as opened:
            lines = (line for line in opened if not line.isspace())
            while chunk := list(islice(lines, _JSON_BATCH_ROWS)):
                rows = _parse_lines(chunk, first_row)
                for row in rows:
                    self._met.update(dict.fromkeys(row))
                found = [_json_column([row.get(name) for row in rows]) for name in wanted]
                fields = [pa.field(name, column.type) for name, column in zip(wanted, found, strict=True)]
                # A batch without columns would forget how many rows it has.
                rows_column = pa.nulls(len(rows))
                yield pa.RecordBatch.from_arrays(
                    [*found, rows_column], schema=pa.schema([*fields, ("", pa.null())])
                )
                first_row += len(chunk)


READERS: dict[Format, type[ParquetRows] | type[CsvRows] | type[JsonRows]] = {
    "parquet": ParquetRows,
    "csv": CsvRows,
    "jsonl": JsonRows,
}


def media_leaf(schema: pa.Schema) -> str | None:
    """The Parquet column that holds inline media: `data`, or `data.bytes` of an image struct.

    Raises:
        ManifestError: `data` is of another type.
    """
    if DATA not in schema.names:
        return None
    kind = schema.field(DATA).type
    if is_media(kind):
        return f"{DATA}.bytes" if pa.types.is_struct(kind) else DATA
    raise ManifestError(f"`data` must be binary, or a struct with binary `bytes`; it is {kind}")


def media_column(batch: pa.RecordBatch) -> pa.Array:
    """The encoded media of a batch that was read from a media leaf."""
    column = batch.column(0)
    # Unlike `field`, this regards the struct's own nulls.
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def is_media(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded media."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_media(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


@contextmanager
def _seekable(file: ManifestFile) -> Iterator[Any]:
    """Parquet is read from its end; a gzipped one is unpacked to a nameless file first."""
    with file.open() as opened:
        if not file.gzipped:
            yield opened
            return
        with tempfile.TemporaryFile(prefix="featurex-") as unpacked:
            shutil.copyfileobj(opened, unpacked, 1 << 20)
            unpacked.seek(0)
            yield unpacked


def _parse_lines(lines: list[bytes], first_row: int) -> list[dict[str, Any]]:
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        rows = [_parse_line(line, row) for row, line in enumerate(lines, first_row)]
    for row, value in enumerate(rows, first_row):
        if not isinstance(value, dict):
            raise ManifestError(f"row {row} is not a JSON object")
    return list(rows)


def _parse_line(line: bytes, row: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ManifestError(f"row {row} is not JSON: {error}") from error


def _json_column(values: list[Any]) -> pa.Array:
    """Values with the type they agree on, or else as text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array(
            [v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string()
        )
