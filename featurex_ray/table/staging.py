"""Staged parts: the only checkpoint there is (protocol, step 3).

Invariant: a part is written once, whole, under a name of its own, and never changed. What it holds
is a fact; resume is the plan minus what is staged.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurex_ray import schemas
from featurex_ray.errors import TableDamagedError
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.log import Plan, open_parquet
from featurex_ray.table.store import ObjectStore

UNIT_COLUMNS = ["sample_id", "etag", "num_units", "unit_index", "error"]

_ORDER = [
    ("sample_id", "ascending"),
    ("etag", "ascending"),
    ("unit_index", "ascending"),
    ("clip_index", "ascending"),
]


ATTEMPTS = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("etag", pa.string()),  # empty where there is none
        pa.field("num_units", pa.int32()),
        pa.field("unit_index", pa.int32()),
        pa.field("source", pa.int32()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("failed", pa.bool_()),
    ]
)
"""Attempts at units: each is the rows [start, stop) of a source."""


class Chosen(NamedTuple):
    """What the attempts at some samples' units come to.

    Attributes:
        units: One attempt of each unit of the good samples (`ATTEMPTS`), by sample and unit.
        failed: The samples that failed whole, in order.
    """

    units: pa.Table
    failed: pa.Array


@dataclass(frozen=True)
class PartInfo:
    """A part that was written."""

    key: str
    num_rows: int
    num_bytes: int


def write_part(store: ObjectStore, facts: TableFacts, plan: Plan, rows: pa.Table) -> PartInfo:
    """Stages rows of one plan as one sorted file under a unique name.

    Args:
        store: Where.
        facts: The table's.
        plan: The plan that the rows' samples belong to.
        rows: In `schemas.PART`; all rows of a unit from one attempt.

    Raises:
        ValueError: A feature that isn't D finite values, or a column that is none of PART's.
    """
    rows = rows.select(schemas.PART.names).cast(schemas.PART).sort_by(_ORDER)
    _check_features(facts, rows)
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows.replace_schema_metadata(_marks(facts, plan)),
        sink,
        compression="zstd",
        use_dictionary=schemas.REPEATED,
        write_page_checksum=True,
    )
    body = bytes(sink.getvalue())
    name = f"{uuid.uuid4().hex}-{sha256(body).hexdigest()}.parquet"
    key = facts.keys.staging(plan.dataset, plan.number) + name
    store.put(key, body)
    return PartInfo(key, rows.num_rows, len(body))


def _check_features(facts: TableFacts, rows: pa.Table) -> None:
    good = rows.filter(pc.is_null(rows["error"]))
    lengths = pc.list_value_length(good["feature"])
    if not pc.all(pc.fill_null(pc.equal(lengths, facts.dimension), False), min_count=0).as_py():
        found = sorted({str(length) for length in pc.unique(lengths).to_pylist()})
        raise ValueError(f"features have {', '.join(found)} values, the table's have {facts.dimension}")
    if not pc.all(pc.is_finite(pc.list_flatten(good["feature"])), min_count=0).as_py():
        raise ValueError("features hold values that aren't finite")


def _marks(facts: TableFacts, plan: Plan) -> dict[bytes, bytes]:
    return {
        b"featurex.table": facts.name.encode(),
        b"featurex.revision": facts.revision.encode(),
        b"featurex.token": plan.token.encode(),
    }


def part_keys(store: ObjectStore, facts: TableFacts, plan: Plan) -> list[str]:
    """The plan's parts, in order of their names."""
    return [item.key for item in store.list(facts.keys.staging(plan.dataset, plan.number))]


def read_part(store: ObjectStore, facts: TableFacts, plan: Plan, key: str) -> pa.Table:
    """A whole part, verified.

    Raises:
        TableDamagedError: Its bytes are not those that were written, or it is another plan's.
        FileNotFoundError: It has been collected: the plan is done.
    """
    body, _ = store.read(key)
    if sha256(body).hexdigest() != key.rpartition("-")[2].removesuffix(".parquet"):
        raise TableDamagedError(
            f"{store.uri}/{key} is damaged: its sha256 isn't the one in its name; delete it, and the next "
            "run does its samples again"
        )
    file = pq.ParquetFile(pa.BufferReader(body))
    _check_marks(store, facts, plan, key, file.schema_arrow)
    return file.read()


def _check_marks(store: ObjectStore, facts: TableFacts, plan: Plan, key: str, schema: pa.Schema) -> None:
    if not schema.equals(schemas.PART) or schema.metadata != _marks(facts, plan):
        raise TableDamagedError(
            f"{store.uri}/{key} is not a part of plan {plan.plan_id} of {facts.name}; move it away, and run "
            "again"
        )


def attempts_of(rows: pa.Table, source: int, *, first: int = 0) -> pa.Table:
    """The attempts (`ATTEMPTS`) that a source's rows are, in the order of the rows.

    Args:
        rows: `UNIT_COLUMNS` at least, from the row `first` of the source on.
        source: Its number.
        first: See `rows`.
    """
    rows = rows.select(UNIT_COLUMNS).combine_chunks()
    marks = pa.table(
        [rows["sample_id"], pc.fill_null(rows["etag"], ""), rows["num_units"], rows["unit_index"]],
        names=ATTEMPTS.names[:4],
    )
    starts = np.flatnonzero(_first_of_runs(marks, ATTEMPTS.names[:4]))
    failures = np.append(0, np.cumsum(rows["error"].is_valid().to_numpy()))
    stops = np.append(starts, rows.num_rows)[1:]
    failed = failures[stops] > failures[starts]
    columns = [pa.repeat(source, len(starts)), first + starts, first + stops, failed]
    return pa.table([*marks.take(pa.array(starts)).columns, *columns], schema=ATTEMPTS)


def _first_of_runs(rows: pa.Table, names: Sequence[str]) -> np.ndarray:
    """(N,) bool: rows that differ from the row before in one of the columns; the first one does."""
    first = np.zeros(rows.num_rows, bool)
    first[:1] = True
    for name in names:
        column = rows[name].combine_chunks()
        first[1:] |= pc.not_equal(column.slice(1), column.slice(0, max(len(column) - 1, 0))).to_numpy(False)
    return first


def choose(attempts: pa.Table) -> Chosen:
    """Picks one attempt of each unit, all of one sample from one generation of its media.

    A sample is good if one generation has every unit; else it failed whole. A sample that is
    neither wholly there nor failed is left out: it isn't staged.

    Args:
        attempts: In the schema `ATTEMPTS`, in any order.
    """
    attempts = attempts.sort_by([(name, "ascending") for name in ATTEMPTS.names[:6]])
    sample = np.cumsum(_first_of_runs(attempts, ["sample_id"])) - 1
    failed = attempts["failed"].to_numpy()
    units = attempts.filter(pa.array(~failed))
    is_first = _first_of_runs(units, ["sample_id", "etag", "num_units", "unit_index"])
    units, of_sample = units.filter(pa.array(is_first)), sample[~failed][is_first]

    generation = np.cumsum(_first_of_runs(units, ["sample_id", "etag", "num_units"])) - 1
    first = np.flatnonzero(np.diff(generation, prepend=-1))
    last = np.append(first, len(generation))[1:] - 1
    index, num_units = units["unit_index"].to_numpy(), units["num_units"].to_numpy()
    # Units are distinct and in order, so the first and the last say whether all are there.
    is_whole = (index[first] == 0) & (index[last] + 1 == num_units[first]) & (last - first == index[last])
    _, taken = np.unique(of_sample[first][is_whole], return_index=True)
    is_taken = np.zeros(len(first), bool)
    is_taken[np.flatnonzero(is_whole)[taken]] = True

    is_good = np.zeros(attempts.num_rows, bool)
    is_good[of_sample[first][is_taken]] = True
    ids = attempts["sample_id"].filter(pa.array(failed & ~is_good[sample])).unique()
    return Chosen(units.filter(pa.array(is_taken[generation])), ids)


def staged_samples(store: ObjectStore, facts: TableFacts, plan: Plan) -> set[str]:
    """The samples of a plan that need no more work: wholly staged, or failed."""
    found = [ATTEMPTS.empty_table()]
    for source, key in enumerate(part_keys(store, facts, plan)):
        with open_parquet(store, key) as (file, _):
            _check_marks(store, facts, plan, key, file.schema_arrow)
            found.append(attempts_of(file.read(UNIT_COLUMNS), source))
    chosen = choose(pa.concat_tables(found))
    return {*chosen.units["sample_id"].to_pylist(), *chosen.failed.to_pylist()}


def read_failures(store: ObjectStore, facts: TableFacts, plan: Plan, failed: pa.Array) -> pa.Table:
    """The failure rows of samples, each that of its first failed unit.

    Returns:
        A table of `sample_id`, the error's columns and `run_id`, sorted by `sample_id`.

    Raises:
        TableDamagedError: A sample has none: somebody removed it from the features.
    """
    columns = ["sample_id", "unit_index", *(item.name for item in schemas.ERROR_FIELDS), "run_id"]
    found = [schemas.PART.empty_table().select(columns)]
    for key in part_keys(store, facts, plan):
        rows = read_part(store, facts, plan, key).select(columns)
        found.append(rows.filter(pc.and_(rows["error"].is_valid(), pc.is_in(rows["sample_id"], failed))))
    rows = pa.concat_tables([table.replace_schema_metadata(None) for table in found])
    rows = rows.append_column("row", pa.array(np.arange(rows.num_rows)))
    rows = rows.sort_by([("sample_id", "ascending"), ("unit_index", "ascending"), ("row", "ascending")])
    rows = rows.filter(pa.array(_first_of_runs(rows, ["sample_id"])))
    if rows.num_rows != len(failed):
        name = sorted(set(failed.to_pylist()) - set(rows["sample_id"].to_pylist()))[0]
        raise TableDamagedError(
            f"sample {name!r} of plan {plan.plan_id} is neither in its object nor staged as failed"
        )
    return rows.drop_columns(["unit_index", "row"])
