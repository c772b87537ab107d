"""The log: its entries (plans), listed and read. Who makes them is in `plan.py`."""

import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from featurex_ray.errors import ReplacedError, StoreUnavailableError, TableDamagedError
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.layout import numbered
from featurex_ray.table.store import ObjectStore, attempts

T = TypeVar("T")

ROWS_PER_SLICE = 1024
"""Rows of a plan's row group: a slice of the plan can be read alone."""

PLAN_FACTS = b"featurex.plan"

Kind = Literal["new", "changed", "prune"]


@dataclass(frozen=True)
class Plan:
    """The facts of one entry of the log.

    Args:
        dataset: The one dataset that it is about.
        number: Its place in the dataset's log; as a string, the `plan_id`.
        target: The number of the only features object that it changes.
        kind: `new` makes its target; `changed` and `prune` replace one that is there.
        num_samples: Rows of the plan.
        samples_hash: Over its sample ids, in order.
        failed_in: Older plans whose failure objects hold some of its samples.
        run_id: The run that made it.
        created: When, by that run's clock; for people only.
        token: Unlike any other's, by which a planner knows its own entry.
    """

    dataset: str
    number: int
    target: int
    kind: Kind
    num_samples: int
    samples_hash: str
    failed_in: tuple[int, ...]
    run_id: str
    created: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def plan_id(self) -> str:
        """The number as it stands in object names."""
        return f"{self.number:010d}"


@dataclass(frozen=True)
class Log:
    """The entries of each dataset, and which of them are done; a done one may still show as open."""

    plans: dict[str, list[int]]
    done: set[tuple[str, int]]
    public: set[tuple[str, int]]
    failures: dict[str, list[int]]

    def next_number(self, dataset: str) -> int:
        """The first number that is free."""
        return len(self.plans.get(dataset, ()))


_BEGAN = re.compile(r"\d{8}T\d{6}(?=-)")
"""How the names of runs begin: with the time of their beginning."""


@dataclass(frozen=True)
class Beginning:
    """What a run found of a table's log when it began.

    Two runs that overlap may have manifests of two nights. What the one that began later plans stands:
    else each would take the other's versions for changes, plan its own again, and neither could end.

    Args:
        run_id: The run.
        num_plans: Entries by dataset.
    """

    run_id: str
    num_plans: Mapping[str, int]

    def is_by_later(self, plan: Plan) -> bool:
        """Whether a run made the plan that began later than this one, which ran by then."""
        ours, theirs = (_BEGAN.match(run_id) for run_id in (self.run_id, plan.run_id))
        # Whole names: of two that began in the same second one has to be the later, and the same to both.
        later = ours is not None and theirs is not None and plan.run_id > self.run_id
        # By clocks alone, a host whose clock is ahead would be right for hours.
        return later and plan.number >= self.num_plans.get(plan.dataset, 0)


def read_log(store: ObjectStore, facts: TableFacts) -> Log:
    """Lists the log.

    Raises:
        TableDamagedError: An entry is missing from the sequence.
    """
    keys = facts.keys
    # In this order: what is listed as done has its entry and its objects in the later listings.
    done = {place for item in store.list(keys.done) if (place := numbered(item.key, keys.done))}
    plans = _by_dataset(store, keys.plans)
    if _holes(plans):
        # A folder's listing may show the second of two entries that were made meanwhile, and not the first.
        plans = _by_dataset(store, keys.plans)
    for dataset, hole in _holes(plans):
        raise TableDamagedError(f"{store.uri}/{keys.plan(dataset, hole)} is missing, but later plans exist")
    failures = _by_dataset(store, keys.failures)
    public = {place for item in store.list(keys.features) if (place := numbered(item.key, keys.features))}
    return Log(plans, done, public, failures)


def num_entries(store: ObjectStore, facts: TableFacts) -> dict[str, int]:
    """How many entries the log has, by dataset; one listing."""
    return {dataset: numbers[-1] + 1 for dataset, numbers in _by_dataset(store, facts.keys.plans).items()}


def _holes(plans: dict[str, list[int]]) -> list[tuple[str, int]]:
    """Of each dataset, the first entry that is missing before others."""
    return [
        (dataset, next(n for n, number in enumerate(numbers) if n != number))
        for dataset, numbers in plans.items()
        if numbers != list(range(len(numbers)))
    ]


def _by_dataset(store: ObjectStore, prefix: str) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for item in store.list(prefix):
        place = numbered(item.key, prefix)
        if place:
            places.setdefault(place[0], []).append(place[1])
    return {dataset: sorted(numbers) for dataset, numbers in places.items()}


@contextlib.contextmanager
def open_parquet(store: ObjectStore, key: str) -> Iterator[tuple[pq.ParquetFile, str]]:
    """One generation of a Parquet object, with its ETag; pages are checked as they are read.

    Raises:
        TableDamagedError: It isn't Parquet, or not any more.
        FileNotFoundError: It doesn't exist.
    """
    with store.open(key) as opened:
        try:
            yield (
                pq.ParquetFile(opened.file, pre_buffer=True, page_checksum_verification=True),
                opened.etag,
            )
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise TableDamagedError(f"{store.uri}/{key} can't be read: {error}") from error


def reread(read: Callable[[], T], *, what: str) -> T:
    """What is read of an object that others may replace meanwhile: then it begins again.

    Raises:
        StoreUnavailableError: It was replaced each time.
    """
    for _ in attempts():
        with contextlib.suppress(ReplacedError):
            return read()
    raise StoreUnavailableError(f"{what} was replaced each time that it was read")


@contextlib.contextmanager
def open_plan(
    store: ObjectStore, facts: TableFacts, dataset: str, number: int
) -> Iterator[tuple[Plan, pq.ParquetFile]]:
    """An entry of the log.

    Raises:
        TableDamagedError: It can't be read, or is another's.
    """
    key = facts.keys.plan(dataset, number)
    with open_parquet(store, key) as (file, _):
        values = json.loads((file.schema_arrow.metadata or {}).get(PLAN_FACTS, b"{}"))
        if (values.get("dataset"), values.get("number")) != (dataset, number):
            raise TableDamagedError(f"{store.uri}/{key} is not the plan of that name")
        plan = Plan(**(values | {"failed_in": tuple(values["failed_in"])}))
        if file.metadata.num_rows != plan.num_samples:
            raise TableDamagedError(
                f"{store.uri}/{key}: {file.metadata.num_rows} rows, not {plan.num_samples}"
            )
        yield plan, file


def read_plan(
    store: ObjectStore,
    facts: TableFacts,
    plan: Plan,
    rows: range | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """A plan's samples, or the rows [start, stop) of them.

    Returns:
        A table in `sample_schema` or some of its columns, in the order in which their media lie.
    """
    schema = facts.sample_schema
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    with open_plan(store, facts, plan.dataset, plan.number) as (_, file):
        if rows is None:
            return file.read(schema.names).cast(schema)
        first = rows.start // ROWS_PER_SLICE
        groups = range(first, -(-rows.stop // ROWS_PER_SLICE))
        table = file.read_row_groups(list(groups), schema.names).cast(schema)
        return table.slice(rows.start - first * ROWS_PER_SLICE, len(rows))


def encode_plan(plan: Plan, rows: pa.Table) -> bytes:
    """An entry of the log as it is stored.

    Args:
        plan: Its facts.
        rows: In `sample_schema`, as their media lie.
    """
    metadata = {PLAN_FACTS: json.dumps(asdict(plan)).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        row_group_size=ROWS_PER_SLICE,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())
