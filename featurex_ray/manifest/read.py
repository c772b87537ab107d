"""A manifest, validated whole and then streamed as often as one likes."""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import ManifestError, NoManifestError, RequestError
from featurex_ray.manifest.carried import columns_to_carry, observed_type, promote
from featurex_ray.manifest.duplicates import Ids, note_duplicates
from featurex_ray.manifest.files import ManifestFile, explained, find_files
from featurex_ray.manifest.formats import DATA, READERS, ParquetRows, Rows, is_media, media_leaf
from featurex_ray.manifest.samples import DATASET_PATTERN, KNOWN, Block, Problems, check_rows, to_samples
from featurex_ray.schemas import CARRIED_BY_DEFAULT, sample_schema
from featurex_ray.storage import ReadPolicy, redact

_LIKELY_URIS = ("url", "path", "file", "filename", "file_name", "image_path", "video_path", "key", "location")


@dataclass(frozen=True)
class Manifest:
    """A validated manifest: facts in memory, rows where they lie.

    Attributes:
        uri: As it was named.
        files: What it consists of, by name.
        num_samples: Rows of all files.
        datasets: Samples of each dataset.
        carried: Columns that travel along, with their types; null where no row has a value.
        warnings: What is odd but no error.
        dataset: The dataset of rows that name none.
    """

    uri: str
    files: tuple[ManifestFile, ...]
    num_samples: int
    datasets: Mapping[str, int]
    carried: pa.Schema
    warnings: tuple[str, ...]
    dataset: str | None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The samples in `schemas.sample_schema(carried)`, streamed in the manifest's order.

        Inline media is not in there: `data_file` and `data_row` say where `read_inline` finds it.

        Raises:
            ManifestError: A file has changed for the worse since it was validated.
            StoreUnavailableError: The store did not answer.
        """
        schema = sample_schema(self.carried)
        for file in self.files:
            with _readable(file):
                rows = READERS[file.format](file)
                for block in _blocks(file, rows, [*KNOWN, *self.carried.names]):
                    samples = to_samples(block, dataset=self.dataset, carried=self.carried)
                    yield samples.cast(schema)


def read_manifest(
    uri: str, *, dataset: str | None = None, keep_columns: Sequence[str] = (), policy: ReadPolicy
) -> Manifest:
    """Reads a manifest once, whole, and refuses it with one message if any row can't be used.

    Relative URIs start at the folder of the manifest file that names them. Rows with inline `data` need no
    URI. In CSV everything is read as text: `007` stays `007`, an empty cell is null.

    Args:
        uri: File, folder or glob, on any store.
        dataset: For rows that name none (`--dataset`). A row that names another one is an error.
        keep_columns: Columns to carry along, besides `label`.
        policy: What the rows may name.

    Raises:
        ManifestError: Lists the first offenders by file and row.
        RequestError: An option can't be right.
        StoreUnavailableError: The store did not answer.
    """
    if dataset is not None and not pc.match_substring_regex(dataset, DATASET_PATTERN).as_py():
        raise RequestError(f"--dataset {dataset!r} is not {DATASET_PATTERN}")
    reading = _Reading(dataset, columns_to_carry(keep_columns), policy)
    files = find_files(uri)
    for file in files:
        reading.read(file)
    reading.check_carried()
    suspects, repeats = reading.ids.suspects()
    if repeats and reading.all_readable:
        note_duplicates(_placed(files, dataset), suspects, repeats, reading.problems)
    reading.problems.raise_if_any(uri)
    if not reading.num_samples:
        raise NoManifestError(f"manifest {redact(uri)!r} holds no samples")
    return reading.result(uri, files)


class _Reading:
    """What one pass over a manifest gathers."""

    def __init__(self, dataset: str | None, carry: list[str], policy: ReadPolicy) -> None:
        self.problems = Problems()
        self.ids = Ids()
        self.num_samples = 0
        self.all_readable = True
        self._dataset = dataset
        self._policy = policy
        self._types: dict[str, pa.DataType] = dict.fromkeys(carry, pa.null())
        self._met: Counter[str] = Counter()
        self._datasets: Counter[str] = Counter()

    def read(self, file: ManifestFile) -> None:
        """Goes over one file; what is wrong with it as a whole is one problem."""
        try:
            with _readable(file):
                rows = READERS[file.format](file)
                _check_columns(rows, self._dataset)
                for block in _blocks(file, rows, [*KNOWN, *self._types]):
                    self._take(block, is_text=rows.is_text)
                _check_columns(rows, self._dataset)  # again: JSON Lines show theirs only on the way
                self._met.update(set(rows.columns))
        except ManifestError as error:
            self.all_readable = False
            self.problems.add(redact(file.uri), str(error))

    def _take(self, block: Block, *, is_text: bool) -> None:
        check_rows(block, dataset=self._dataset, policy=self._policy, problems=self.problems)
        self.num_samples += block.raw.num_rows
        for name, known in self._types.items():
            try:
                self._types[name] = promote(known, observed_type(block.column(name), is_text=is_text))
            except ManifestError as error:
                raise ManifestError(f"column {name!r}: {error}") from error
        samples = to_samples(block, dataset=self._dataset, carried=pa.schema([]))
        self.ids.add(samples)
        for pair in samples["dataset"].value_counts().to_pylist():
            self._datasets[pair["values"]] += pair["counts"]

    def check_carried(self) -> None:
        """Notes columns that were asked for and are nowhere."""
        for name in self._types:
            if name not in self._met and name != CARRIED_BY_DEFAULT and not self.problems.total:
                there = ", ".join(sorted(self._met))
                self.problems.add(f"--keep-columns {name}", f"no file has such a column; there are {there}")

    def result(self, uri: str, files: list[ManifestFile]) -> Manifest:
        """The manifest, once nothing is wrong with it."""
        carried = {name: kind for name, kind in self._types.items() if name in self._met}
        partly = [name for name in carried if self._met[name] < len(files)]
        return Manifest(
            uri=uri,
            files=tuple(files),
            num_samples=self.num_samples,
            datasets=dict(sorted(self._datasets.items())),
            carried=pa.schema(list(carried.items())),
            warnings=tuple(f"column {n!r} is null for the files that lack it" for n in partly),
            dataset=self._dataset,
        )


def _blocks(file: ManifestFile, rows: Rows, columns: list[str]) -> Iterator[Block]:
    first_row = 0
    for raw in rows.batches(columns):
        raw.validate(full=True)
        yield Block(file, first_row, raw)
        first_row += raw.num_rows


def _placed(
    files: list[ManifestFile], dataset: str | None
) -> Iterator[tuple[ManifestFile, int, pa.RecordBatch]]:
    for file in files:
        with _readable(file):
            for block in _blocks(file, READERS[file.format](file), list(KNOWN)):
                yield file, block.first_row, to_samples(block, dataset=dataset, carried=pa.schema([]))


@contextmanager
def _readable(file: ManifestFile) -> Iterator[None]:
    try:
        with explained(file.uri):
            yield
    except (pa.ArrowException, zlib.error, EOFError, UnicodeError) as error:
        raise ManifestError(f"is not readable as {file.format}: {error}") from error


def _check_columns(rows: Rows, dataset: str | None) -> None:
    """Refuses a file that lacks what every manifest needs.

    Raises:
        ManifestError: Says what is there, and which column is likely meant.
    """
    columns = rows.columns
    if not columns:
        return  # an empty file, as jobs leave behind that had nothing to write
    if DATA in columns:
        if not isinstance(rows, ParquetRows):
            raise ManifestError("a `data` column can only be in Parquet; CSV and JSON Lines hold no media")
        media_leaf(rows.schema)
    elif "uri" not in columns:
        raise ManifestError(f"needs a `uri` or `data` column; {_what_is_there(rows)}")
    if dataset is None and "dataset" not in columns:
        raise ManifestError(f"needs a `dataset` column, or --dataset; {_what_is_there(rows)}")


def _what_is_there(rows: Rows) -> str:
    said = f"it has {', '.join(rows.columns) or 'no columns'}"
    likely = [f"{name!r} may be the `uri`" for name in rows.columns if name.lower() in ("uri", *_LIKELY_URIS)]
    if isinstance(rows, ParquetRows):
        media = [field.name for field in rows.schema if is_media(field.type)]
        likely += [f"{name!r} may be the `data`" for name in media]
    return f"{said} ({', '.join(likely)}: rename it)" if likely else said
