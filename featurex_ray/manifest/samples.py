"""Manifest rows -> samples: one schema whatever came in, and what is wrong with each row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import ManifestError
from featurex_ray.manifest.carried import carry
from featurex_ray.manifest.files import ManifestFile
from featurex_ray.manifest.formats import DATA
from featurex_ray.schemas import SAMPLE
from featurex_ray.storage import ReadPolicy, redact, resolve

KNOWN = ("uri", DATA, "dataset", "sample_id", "media_type", "start_seconds", "end_seconds", "version")
DATASET_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_LISTED_PROBLEMS = 10
_NUMBER_PATTERN = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_ABSOLUTE_PATTERN = r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"


@dataclass
class Problems:
    """What is wrong with a manifest: the first few by file and row, and how many there are."""

    total: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Notes one problem."""
        self.total += 1
        if len(self.listed) < _LISTED_PROBLEMS:
            self.listed.append(f"{where}: {what}")

    @property
    def is_full(self) -> bool:
        """Whether more problems would only be counted."""
        return len(self.listed) >= _LISTED_PROBLEMS

    def raise_if_any(self, uri: str) -> None:
        """Ends the reading with one message.

        Raises:
            ManifestError: There are problems.
        """
        if self.total:
            rest = f" (the first {len(self.listed)})" if self.total > len(self.listed) else ""
            count = "1 problem" if self.total == 1 else f"{self.total} problems"
            lines = "\n  ".join(self.listed)
            raise ManifestError(f"manifest {redact(uri)!r} has {count}{rest}:\n  {lines}")


@dataclass(frozen=True)
class Block:
    """Some rows of a manifest file as they came, and where they stand.

    Attributes:
        file: Where from.
        first_row: Rows of the file before these.
        raw: The columns that exist.
    """

    file: ManifestFile
    first_row: int
    raw: pa.RecordBatch

    def column(self, name: str) -> pa.Array:
        """A column, null where the file has none."""
        if name not in self.raw.schema.names:
            return pa.nulls(self.raw.num_rows)
        return self.raw.column(self.raw.schema.get_field_index(name))

    def text(self, name: str) -> pa.StringArray:
        """A column as strings, empty ones as null."""
        column = as_text(name, self.column(name))
        return pc.if_else(pc.equal(column, ""), None, column)

    def seconds(self, name: str) -> pa.DoubleArray:
        """A column as doubles; what is no number becomes NaN, which no check lets pass."""
        column = self.column(name)
        if pa.types.is_null(column.type):
            return column.cast(pa.float64())
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            return column.cast(pa.float64())
        text = pc.utf8_trim_whitespace(self.text(name))
        return pc.if_else(pc.match_substring_regex(text, _NUMBER_PATTERN), text, "nan").cast(pa.float64())

    @property
    def numbers(self) -> pa.Int64Array:
        """The rows' places in the file."""
        return pa.array(np.arange(self.first_row, self.first_row + self.raw.num_rows))

    @property
    def has_data(self) -> pa.BooleanArray:
        """Which rows bring their media with them."""
        return pc.fill_null(self.column(DATA).cast(pa.bool_()), False)


def to_samples(block: Block, *, dataset: str | None, carried: pa.Schema) -> pa.RecordBatch:
    """Rows in the schema of samples. URIs are absolute; inline media is a file and a row in it."""
    named = block.text("uri")
    uri, data_file, data_row = _media(block, named)
    columns = [
        pc.coalesce(block.text("dataset"), pa.scalar(dataset, pa.string())),
        pc.coalesce(block.text("sample_id"), named, uri),
        uri,
        block.text("media_type"),
        block.seconds("start_seconds"),
        block.seconds("end_seconds"),
        block.text("version"),
        data_file,
        data_row,
        pa.nulls(len(uri), pa.date32()),
        *(carry(block.column(wanted.name), wanted.type) for wanted in carried),
    ]
    return pa.RecordBatch.from_arrays(
        columns, schema=pa.schema([*(f.with_nullable(True) for f in SAMPLE), *carried])
    )


def sample_names(block: Block) -> pa.RecordBatch:
    """Which samples the rows are: `dataset` as far as the file says it, and `sample_id`."""
    uri = _inline_uri(block, block.text("uri"))
    named = pc.coalesce(block.text("sample_id"), uri)
    return pa.RecordBatch.from_arrays([block.text("dataset"), named], ["dataset", "sample_id"])


def _media(block: Block, named: pa.StringArray) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Where each row's media lies: its URI, and the file and row of inline media."""
    absolute, count = _absolute(named, block.file.uri), block.raw.num_rows
    if DATA not in block.raw.schema.names:
        return absolute, pa.nulls(count, pa.string()), pa.nulls(count, pa.int64())
    has_data = block.has_data
    return (
        pc.if_else(has_data, _inline_uri(block, named), absolute),
        pc.if_else(has_data, block.file.uri, pa.scalar(None, pa.string())),
        pc.if_else(has_data, block.numbers, pa.scalar(None, pa.int64())),
    )


def _inline_uri(block: Block, named: pa.StringArray) -> pa.Array:
    """What inline media is called: as it is named, or by its place."""
    numbers = block.numbers.cast(pa.string())
    return pc.coalesce(named, pc.binary_join_element_wise(block.file.uri, numbers, "#"))


class _Notes:
    """The problems of one block, in the order of its rows."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[tuple[int, str]] = []

    def note(self, bad: pa.Array, describe: Callable[[int], str]) -> None:
        """Notes every row where `bad` is true; only the first ones are put into words."""
        rows = pc.indices_nonzero(pc.fill_null(bad, False))
        self.count += len(rows)
        self._first += [(row, describe(row)) for row in rows[:_LISTED_PROBLEMS].to_pylist()]

    def move_to(self, problems: Problems, block: Block) -> None:
        """Adds the notes to those of the whole manifest."""
        for row, what in sorted(self._first)[:_LISTED_PROBLEMS]:
            problems.add(f"{redact(block.file.uri)} row {block.first_row + row + 1}", what)
            self.count -= 1
        problems.total += self.count


def check_rows(block: Block, *, dataset: str | None, policy: ReadPolicy, problems: Problems) -> None:
    """Notes every row that can't be used."""
    notes = _Notes()
    uris, inline = block.text("uri"), block.has_data
    notes.note(pc.and_(pc.is_null(uris), pc.invert(inline)), lambda _: "no uri")
    _check_dataset(block, dataset, notes)
    media = block.text("media_type")
    unknown = pc.invert(pc.is_in(media, pa.array(["image", "video", None])))
    notes.note(unknown, lambda row: f"media_type {media[row].as_py()!r} is neither 'image' nor 'video'")
    _check_times(block, notes)
    _check_uris(block, pc.if_else(inline, None, uris), policy, notes)
    notes.move_to(problems, block)


def _check_dataset(block: Block, dataset: str | None, notes: _Notes) -> None:
    named = block.text("dataset")
    if dataset is not None:
        other = pc.not_equal(named, dataset)
        notes.note(other, lambda row: f"dataset {named[row].as_py()!r} contradicts --dataset {dataset!r}")
        return
    notes.note(pc.is_null(named), lambda _: "no dataset; name one, or give --dataset")
    bad = pc.invert(pc.match_substring_regex(named, DATASET_PATTERN))
    notes.note(bad, lambda row: f"dataset {named[row].as_py()!r} is not {DATASET_PATTERN}")


def _check_times(block: Block, notes: _Notes) -> None:
    start, end = block.seconds("start_seconds"), block.seconds("end_seconds")
    for name, seconds in (("start_seconds", start), ("end_seconds", end)):
        usable = pc.and_(pc.is_finite(seconds), pc.greater_equal(seconds, 0))
        notes.note(pc.invert(usable), partial(_describe, name, block.column(name)))
    empty = pc.less_equal(end, pc.coalesce(start, pa.scalar(0.0)))
    notes.note(
        empty,
        lambda row: f"end_seconds {end[row].as_py()} is not after start_seconds {start[row].as_py() or 0}",
    )


def _check_uris(block: Block, uris: pa.StringArray, policy: ReadPolicy, notes: _Notes) -> None:
    unclear = pc.indices_nonzero(pc.and_(pc.invert(policy.plainly_allowed(uris)), pc.is_valid(uris)))
    refused: dict[int, str] = {}
    for row in unclear.to_pylist():
        if refusal := policy.refusal(resolve(uris[row].as_py(), relative_to=block.file.uri)):
            refused[row] = refusal
    if refused:
        rows = pa.array(range(len(uris)), pa.int64())
        notes.note(pc.is_in(rows, pa.array(refused, pa.int64())), refused.__getitem__)


def _describe(name: str, column: pa.Array, index: int) -> str:
    return f"{name} is {column[index].as_py()!r}"


def as_text(name: str, column: pa.Array) -> pa.StringArray:
    """A column of scalars as strings.

    Raises:
        ManifestError: Its values have no plain text form.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(name, column.dictionary_decode())
    if pa.types.is_nested(kind) or isinstance(kind, pa.ExtensionType):
        raise ManifestError(f"column {name!r} is {kind}, not a string")
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise ManifestError(f"column {name!r} ({kind}) can't be read as strings: {error}") from error


def _absolute(uris: pa.StringArray, manifest_file: str) -> pa.StringArray:
    known = pc.fill_null(pc.match_substring_regex(uris, _ABSOLUTE_PATTERN), True)
    if pc.all(known, min_count=0).as_py():
        return uris
    found = [None if uri is None else resolve(uri, relative_to=manifest_file) for uri in uris.to_pylist()]
    return pa.array(found, pa.string())
