"""Feature tables as their readers see them: plain Parquet, nothing private is needed.

The object listing decides what is read, so `_featurex/` and other tables never come in, and each
read sees whole plans.
"""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import s3fs
from pyarrow import fs

from featurex_ray import schemas
from featurex_ray.errors import RequestError
from featurex_ray.table.facts import TableFacts, read_facts
from featurex_ray.table.layout import numbered
from featurex_ray.table.store import ObjectStore, S3Store, open_store

_DATASET = pa.field("dataset", pa.string())

_FOUND = ["dataset", "sample_id", "uri", "clip_index", "start_seconds", "end_seconds"]

_BATCH_ROWS = 16_384


def open_table(uri: str) -> "TableReader":
    """The feature table at `<output>/<table>`.

    Raises:
        TableNotFoundError: There is none.
        StoreRefusedError: Not a store that tables are written to.
    """
    output, _, name = uri.rstrip("/").rpartition("/")
    store = open_store(output or ("/" if uri.startswith("/") else "."))
    return TableReader(store, read_facts(store, name))


@dataclass(frozen=True)
class TableReader:
    """Reads one table.

    Args:
        store: Where it lies.
        facts: What it is: revision, dimension, extractor.
    """

    store: ObjectStore
    facts: TableFacts

    def dataset(self) -> pads.Dataset:
        """The features as they are now, with `dataset` as the partition column."""
        return self._dataset(self.facts.keys.features, self.facts.features_schema)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The features, or some columns of them, in memory."""
        return self.dataset().to_table(columns=columns and list(columns))

    def failures(self) -> pa.Table:
        """One row per sample that could not be used."""
        return self._failures().to_table()

    def query(self, sql: str) -> pa.Table:
        """Runs SQL with DuckDB, in which the table is `features` and its failures are `failures`.

        Returns:
            Its rows; of columns of one name the later ones are `a_1`, `a_2` and so on.

        Raises:
            RequestError: DuckDB refused it; its message says why. Or it asks for no rows, or more than
                that; nothing was executed then.
        """
        with duckdb.connect() as connection:
            connection.register("features", self.dataset())
            connection.register("failures", self._failures())
            try:
                _refuse_writing(connection.extract_statements(sql))
                found = connection.sql(sql)
                if found is None:  # nothing but a comment
                    raise RequestError("the query asks for no rows; give a SELECT")
                rows = found.to_arrow_table()
            except duckdb.Error as error:
                raise RequestError(f"DuckDB refused the query: {error}") from error
        return rows.rename_columns(_distinct(rows.column_names))

    def search(
        self,
        vector: np.ndarray | Sequence[float] | None = None,
        *,
        sample_id: str | None = None,
        dataset: str | None = None,
        k: int = 10,
    ) -> pa.Table:
        """The clips that are nearest by cosine, the nearest first.

        Args:
            vector: (D,) what to look for.
            sample_id: Or a sample of the table, by its first clip; it is not among its neighbours.
            dataset: The sample's dataset, where several have one of that name.
            k: How many.

        Returns:
            `similarity` in [-1, 1], `dataset`, `sample_id`, `uri`, `clip_index`, `start_seconds`,
            `end_seconds`; fewer than `k` rows where the table has fewer.

        Raises:
            RequestError: Not exactly one of vector and sample, no such sample, or a wrong length.
        """
        if (vector is None) == (sample_id is None):
            raise RequestError("search wants either a vector or a sample_id")
        rows = self.dataset()
        if sample_id is not None:
            place = pc.field("sample_id") == sample_id
            own = self._first_clip(rows.to_table(filter=place), sample_id, dataset)
            rows = rows.filter(~(place & (pc.field("dataset") == own["dataset"])))
            vector = own["feature"]
        query = np.asarray(vector, np.float64)
        if query.shape != (self.facts.dimension,):
            raise RequestError(
                f"the vector has shape {query.shape}, the table's are ({self.facts.dimension},)"
            )
        return _nearest(rows, _unit(query), k)

    def _first_clip(self, found: pa.Table, sample_id: str, dataset: str | None) -> dict[str, Any]:
        clips = [
            row
            for row in found.select(["dataset", "clip_index", "feature"]).to_pylist()
            if row["clip_index"] == 0 and dataset in {None, row["dataset"]}
        ]
        if len(clips) != 1:
            names = ", ".join(sorted(row["dataset"] for row in clips)) or "none"
            raise RequestError(f"sample {sample_id!r} must be in one dataset of the table; it is in: {names}")
        return dict(clips[0])

    def _failures(self) -> pads.Dataset:
        return self._dataset(self.facts.keys.failures, schemas.FAILURES)

    def _dataset(self, prefix: str, schema: pa.Schema) -> pads.Dataset:
        schema = pa.schema([_DATASET, *schema])
        keys = [item.key for item in self.store.list(prefix) if numbered(item.key, prefix)]
        if not keys:
            return pads.dataset(schema.empty_table())
        return pads.dataset(
            [f"{self._root}/{key}" for key in keys],
            schema=schema,
            format="parquet",
            filesystem=self._filesystem,
            partitioning=pads.partitioning(pa.schema([_DATASET]), flavor="hive"),
            partition_base_dir=f"{self._root}/{prefix}",
        )

    @property
    def _root(self) -> str:
        return self.store.uri.removeprefix("s3://")

    @cached_property
    def _filesystem(self) -> Any:
        if isinstance(self.store, S3Store):
            return s3fs.S3FileSystem(endpoint_url=self.store.endpoint)
        return fs.LocalFileSystem()


def _refuse_writing(statements: Sequence[Any]) -> None:
    """Raises before anything is executed: a COPY writes its file although it answers with no rows."""
    for statement in statements:
        if not _only_reads(statement):
            shown = textwrap.shorten(statement.query, 60, placeholder=" ...")
            raise RequestError(
                f"query only reads, which {shown!r} does not: nothing was executed. Give a SELECT, and "
                "write the rows that come back (--format csv or json; in Python a pyarrow.Table)"
            )


def _only_reads(statement: Any) -> bool:
    kind, text = statement.type, statement.query.lstrip()
    if kind == duckdb.StatementType.EXPLAIN:  # with ANALYZE it executes what it explains, be it a COPY
        return not re.search(r"\bANALY[SZ]E\b", text, re.IGNORECASE)
    if kind == duckdb.StatementType.MULTI:  # all that has a PIVOT in it
        return re.match(r"(PIVOT|FROM|SELECT|WITH)\b", text, re.IGNORECASE) is not None
    return bool(kind == duckdb.StatementType.SELECT)


def _distinct(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(1))
        found.append(next(new for new in others if new not in {*names, *found}) if name in found else name)
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(..., D) scaled to length one; zero stays zero."""
    length: np.ndarray = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _nearest(rows: pads.Dataset, query: np.ndarray, k: int) -> pa.Table:
    schema = pa.schema(
        [("similarity", pa.float64()), *(field for field in rows.schema if field.name in _FOUND)]
    )
    best = schema.empty_table()
    for found in _scored(rows, query, schema):
        best = pa.concat_tables([best, found]).sort_by([("similarity", "descending")]).slice(0, k)
    return best


def _scored(rows: pads.Dataset, query: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
    for batch in rows.to_batches(columns=[*_FOUND, "feature"], batch_size=_BATCH_ROWS):
        if batch.num_rows:
            vectors = pc.list_flatten(batch["feature"]).to_numpy().reshape(batch.num_rows, -1)
            similarity = pa.array(_unit(vectors.astype(np.float64)) @ query)
            table = pa.Table.from_batches([batch]).append_column("similarity", similarity)
            yield table.select(schema.names).cast(schema)
