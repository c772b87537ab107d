"""Staged parts: the only checkpoint there is (protocol, step 3).

Invariant: a part is written once, whole, under a name of its own, and never changed. What it holds
is a fact; resume is the plan minus what is staged.
"""

import itertools
import uuid
from collections.abc import Iterable, Iterator
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


class Unit(NamedTuple):
    """One attempt at a unit: rows [start, stop) of a source. Sorts by sample, then attempt."""

    sample_id: str
    etag: str
    num_units: int
    unit_index: int
    source: int
    start: int
    stop: int
    failed: bool


class Chosen(NamedTuple):
    """What a sample's staged attempts come to: its units in order, or none where it failed."""

    sample_id: str
    units: list[Unit]


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
        rows.replace_schema_metadata(_marks(facts, plan)), sink, compression="zstd", write_page_checksum=True
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


def units_of(rows: pa.Table, source: int) -> Iterator[Unit]:
    """The units of a part's rows, in the order of the rows."""
    if not rows.num_rows:
        return
    etags = pc.fill_null(rows["etag"], "").to_pylist()
    ids, units = rows["sample_id"].to_pylist(), rows["unit_index"].to_pylist()
    totals, failed = rows["num_units"].to_pylist(), rows["error"].is_valid().to_pylist()
    start = 0
    for mark, run in itertools.groupby(zip(ids, etags, totals, units, strict=True)):
        stop = start + sum(1 for _ in run)
        yield Unit(*mark, source, start, stop, any(failed[start:stop]))
        start = stop


def choose(units: Iterable[Unit]) -> Iterator[Chosen]:
    """Picks one attempt of each unit, all of one sample from one generation of its media.

    A sample is good if one generation has every unit; else it failed whole. A sample that is
    neither wholly there nor failed is left out: it isn't staged.
    """
    for sample_id, attempts in itertools.groupby(sorted(units), key=lambda unit: unit.sample_id):
        tries = list(attempts)
        for (_, num_units), same in itertools.groupby(tries, key=lambda unit: (unit.etag, unit.num_units)):
            first: dict[int, Unit] = {}
            for unit in same:
                if not unit.failed:
                    first.setdefault(unit.unit_index, unit)
            if sorted(first) == list(range(num_units)):
                yield Chosen(sample_id, [first[index] for index in range(num_units)])
                break
        else:
            if any(unit.failed for unit in tries):
                yield Chosen(sample_id, [])


def staged_samples(store: ObjectStore, facts: TableFacts, plan: Plan) -> set[str]:
    """The samples of a plan that need no more work: wholly staged, or failed."""
    units: list[Unit] = []
    for source, key in enumerate(part_keys(store, facts, plan)):
        with open_parquet(store, key) as (file, _):
            _check_marks(store, facts, plan, key, file.schema_arrow)
            units.extend(units_of(file.read(UNIT_COLUMNS), source))
    return {chosen.sample_id for chosen in choose(units)}


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
    ids = rows["sample_id"].to_numpy()
    rows = rows.filter(pa.array(np.append(True, ids[1:] != ids[:-1])[: len(ids)]))
    if rows.num_rows != len(failed):
        name = sorted(set(failed.to_pylist()) - set(rows["sample_id"].to_pylist()))[0]
        raise TableDamagedError(
            f"sample {name!r} of plan {plan.plan_id} is neither in its object nor staged as failed"
        )
    return rows.drop_columns(["unit_index", "row"])
