"""The log: which sample belongs to which plan, and what is still to do (protocol, step 2).

Invariant: creating entry n proves that all earlier entries of its dataset were read, so open plans
share no sample and no target. All else follows from that.
"""

import contextlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from hashlib import blake2b
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurex_ray.errors import ManifestError, TableDamagedError
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.layout import numbered
from featurex_ray.table.store import ObjectStore, ensure

ROWS_PER_SLICE = 1024
"""Rows of a plan's row group: a slice of the plan can be read alone."""

MAX_SAMPLES_PER_PLAN = 250_000

CHUNK_ROWS = 2**22
"""Manifest rows compared in one pass over the log: about 150 MB while it lasts."""

BUFFERED_ROWS = 1_000_000
"""Manifest rows held while plans fill, over all datasets."""

OWN_TARGET = -1
"""The target of samples that get a new object, named after their plan."""

NO_DAY = -(2**31)
"""The day of samples that no backfill planned: before all days."""

PLAN_FACTS = b"featurex.plan"

Kind = Literal["new", "changed", "prune"]
Samples = Callable[[], Iterable[pa.RecordBatch]]
"""Gives the manifest's samples in `sample_schema`, in the same order each time."""


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


class State(IntEnum):
    """What the last plan that names a sample says of it."""

    NEW = 0
    """No plan names it, or it was pruned."""
    DONE = 1
    FAILED = 2
    """It failed, and counts as held until it is retried."""
    CHANGED = 3
    """Its version differs from that of its features."""
    REVISED = 4
    """It failed, and its version differs since."""
    OPEN = 5
    """A plan that isn't done names it."""
    BLOCKED = 6
    """It changed, and an open plan is about to replace the object that holds it."""


TO_DO = (State.NEW, State.CHANGED, State.REVISED)


@dataclass(frozen=True)
class Work:
    """A manifest against a table's log.

    Args:
        counts: Samples by (dataset, state).
    """

    counts: Counter[tuple[str, State]]

    def num(self, *states: State, dataset: str | None = None) -> int:
        """Samples in any of the states, of one dataset or of all."""
        return sum(
            count
            for (name, state), count in self.counts.items()
            if state in states and dataset in {None, name}
        )

    @property
    def num_samples(self) -> int:
        """Samples of the manifest."""
        return self.counts.total()

    @property
    def new(self) -> int:
        """Samples that no plan names."""
        return self.num(State.NEW)

    @property
    def changed(self) -> int:
        """Samples whose version differs from the one that was planned."""
        return self.num(State.CHANGED, State.REVISED, State.BLOCKED)

    @property
    def done(self) -> int:
        """Samples that have their features."""
        return self.num(State.DONE)

    @property
    def failed(self) -> int:
        """Samples that failed; they are held until a retry."""
        return self.num(State.FAILED)

    @property
    def open(self) -> int:
        """Samples of plans that are not done."""
        return self.num(State.OPEN)

    @property
    def datasets(self) -> list[str]:
        """The manifest's datasets, sorted."""
        return sorted({dataset for dataset, _ in self.counts})


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


def read_log(store: ObjectStore, facts: TableFacts) -> Log:
    """Lists the log.

    Raises:
        TableDamagedError: An entry is missing from the sequence.
    """
    keys = facts.keys
    # In this order: what is listed as done has its entry and its objects in the later listings.
    done = {place for item in store.list(keys.done) if (place := numbered(item.key, keys.done))}
    plans = _by_dataset(store, keys.plans)
    for dataset, numbers in plans.items():
        if numbers != list(range(len(numbers))):
            hole = next(n for n, number in enumerate(numbers) if n != number)
            raise TableDamagedError(
                f"{store.uri}/{keys.plan(dataset, hole)} is missing, but later plans exist"
            )
    failures = _by_dataset(store, keys.failures)
    public = {place for item in store.list(keys.features) if (place := numbered(item.key, keys.features))}
    return Log(plans, done, public, failures)


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


def read_plan(store: ObjectStore, facts: TableFacts, plan: Plan, rows: range | None = None) -> pa.Table:
    """A plan's samples, or the rows [start, stop) of them.

    Returns:
        A table in `sample_schema`, sorted by `sample_id`.
    """
    with open_plan(store, facts, plan.dataset, plan.number) as (_, file):
        if rows is None:
            return file.read().cast(facts.sample_schema)
        first = rows.start // ROWS_PER_SLICE
        groups = range(first, -(-rows.stop // ROWS_PER_SLICE))
        table = file.read_row_groups(list(groups)).cast(facts.sample_schema)
        return table.slice(rows.start - first * ROWS_PER_SLICE, len(rows))


def hash_ids(dataset: str, ids: pa.Array) -> np.ndarray:
    """128-bit hashes of sample ids.

    Returns:
        (N, 2) uint64.
    """
    start = dataset + "\0"
    digests = [blake2b((start + name).encode(), digest_size=16).digest() for name in ids.to_pylist()]
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)


def hash_versions(versions: pa.Array) -> np.ndarray:
    """(N,) uint64 hashes of versions; null is 0."""
    if versions.null_count == len(versions):
        return np.zeros(len(versions), np.uint64)
    none = bytes(8)
    digests = [
        none if text is None else blake2b(text.encode(), digest_size=8).digest()
        for text in versions.to_pylist()
    ]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


class IdIndex:
    """Finds rows by the 128-bit hash of their id: 20 bytes a row."""

    def __init__(self, hashes: np.ndarray) -> None:
        order = np.argsort(hashes[:, 0])
        self._first = hashes[order, 0]
        self._second = hashes[order, 1]
        self._row = order.astype(np.int32)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """(N,) int64: the row of each hash, or -1."""
        place = np.searchsorted(self._first, hashes[:, 0])
        rows = np.full(len(hashes), -1, np.int64)
        left = np.flatnonzero(place < len(self._first))
        while len(left):  # more than once only where the first halves of two hashes are equal
            left = left[self._first[place[left]] == hashes[left, 0]]
            equal = self._second[place[left]] == hashes[left, 1]
            rows[left[equal]] = self._row[place[left[equal]]]
            left = left[~equal]
            place[left] += 1
            left = left[place[left] < len(self._first)]
        return rows


def last_of_each(hashes: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each hash once, with the highest of its numbers.

    Args:
        hashes: (N, 2) uint64.
        numbers: (N,) int32, the plans that name them.
    """
    order = np.lexsort((numbers, hashes[:, 1], hashes[:, 0]))
    hashes, numbers = hashes[order], numbers[order]
    last = np.append((hashes[1:] != hashes[:-1]).any(axis=1), True)[: len(hashes)]
    return hashes[last], numbers[last]


class _Chunk:
    """Consecutive manifest rows, and what the log says of each."""

    def __init__(
        self, datasets: list[str], dataset: np.ndarray, version: np.ndarray, day: np.ndarray, ids: np.ndarray
    ) -> None:
        self.datasets = datasets
        self.dataset = dataset
        self.version = version
        self.day = day
        self.index = IdIndex(ids)
        self.state = np.full(len(dataset), State.NEW, np.uint8)
        self.last_plan = np.full(len(dataset), -1, np.int32)
        self.target = np.full(len(dataset), OWN_TARGET, np.int32)
        self.planned_version = np.zeros(len(dataset), np.uint64)
        self.planned_day = np.full(len(dataset), NO_DAY, np.int32)

    def record_plan(self, plan: Plan, state: State, file: pq.ParquetFile) -> bool:
        """Notes what a plan says of these rows; whether it names any of them."""
        named = False
        for batch in file.iter_batches(columns=["sample_id", "version", "backfill_day"]):
            rows = self.index.find(hash_ids(plan.dataset, batch["sample_id"]))
            hit = rows >= 0
            self.state[rows[hit]] = state
            self.last_plan[rows[hit]] = plan.number
            self.target[rows[hit]] = plan.target
            self.planned_version[rows[hit]] = hash_versions(batch["version"])[hit]
            self.planned_day[rows[hit]] = _days(batch["backfill_day"])[hit]
            named = named or bool(hit.any())
        return named

    def record_failures(self, dataset: str, number: int, file: pq.ParquetFile) -> None:
        """Notes the samples that failed in the last plan that names them."""
        for batch in file.iter_batches(columns=["sample_id"]):
            rows = self.index.find(hash_ids(dataset, batch["sample_id"]))
            rows = rows[rows >= 0]
            rows = rows[(self.last_plan[rows] == number) & (self.state[rows] == State.DONE)]
            self.state[rows] = State.FAILED

    def record_versions(self, ours: np.ndarray, open_targets: list[int]) -> None:
        """Notes which rows changed since they were planned.

        Null in the manifest is never a change, nor is what a backfill says of a day that is older
        than the one that the sample was planned from.
        """
        differs = ours & (self.version != 0) & (self.version != self.planned_version)
        differs &= (self.day == NO_DAY) | (self.day >= self.planned_day)
        self.state[differs & (self.state == State.FAILED)] = State.REVISED
        self.state[differs & (self.state == State.DONE)] = State.CHANGED
        blocked = ours & (self.state == State.CHANGED) & np.isin(self.target, open_targets)
        self.state[blocked] = State.BLOCKED
        self.target[ours & ~np.isin(self.state, (State.CHANGED, State.BLOCKED))] = OWN_TARGET

    def forget(self) -> None:
        """Frees what only the comparison needs."""
        del self.index, self.version, self.planned_version, self.day, self.planned_day, self.dataset


@dataclass(frozen=True)
class Comparison:
    """Every manifest row against the log, in the manifest's order: 9 bytes a row.

    Args:
        log: The log as it was read.
        state: (N,) uint8, `State`.
        last_plan: (N,) int32, the last plan that names the row, or -1.
        target: (N,) int32, the object to change, or `OWN_TARGET`.
        work: Counts of the states.
        to_do: Rows to do by (dataset, target).
        open_plans: Open plans that name one of the samples, or block it.
    """

    log: Log
    state: np.ndarray
    last_plan: np.ndarray
    target: np.ndarray
    work: Work
    to_do: Counter[tuple[str, int]]
    open_plans: list[Plan]


def compare(store: ObjectStore, facts: TableFacts, samples: Samples) -> Comparison:
    """Streams the log past the hashes of the manifest's ids; writes nothing.

    Raises:
        TableDamagedError: An entry can't be read, or a done plan's object is missing.
    """
    log = read_log(store, facts)
    chunks: list[_Chunk] = []
    counts: Counter[tuple[str, State]] = Counter()
    to_do: Counter[tuple[str, int]] = Counter()
    open_plans: dict[tuple[str, int], Plan] = {}
    for chunk in _chunks(samples()):
        for code, dataset in enumerate(chunk.datasets):
            ours = chunk.dataset == code
            for plan in _compare_dataset(store, facts, log, chunk, dataset, ours):
                open_plans[dataset, plan.number] = plan
            counts.update({(dataset, State(state)): n for state, n in _count(chunk.state[ours])})
            todo = chunk.target[ours & np.isin(chunk.state, TO_DO)]
            to_do.update({(dataset, target): n for target, n in _count(todo)})
        chunk.forget()
        chunks.append(chunk)
    return Comparison(
        log,
        np.concatenate([np.zeros(0, np.uint8), *(chunk.state for chunk in chunks)]),
        np.concatenate([np.zeros(0, np.int32), *(chunk.last_plan for chunk in chunks)]),
        np.concatenate([np.zeros(0, np.int32), *(chunk.target for chunk in chunks)]),
        Work(counts),
        to_do,
        [open_plans[place] for place in sorted(open_plans)],
    )


def all_new(samples: Samples) -> Work:
    """The work where there is no table yet."""
    counts: Counter[tuple[str, State]] = Counter()
    for batch in samples():
        for item in pc.value_counts(batch["dataset"]).to_pylist():
            counts[item["values"], State.NEW] += item["counts"]
    return Work(counts)


def _count(values: np.ndarray) -> Iterator[tuple[int, int]]:
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        yield int(value), int(count)


def _chunks(batches: Iterable[pa.RecordBatch]) -> Iterator[_Chunk]:
    names: dict[str, int] = {}
    held: list[tuple[np.ndarray, ...]] = []
    num_rows = 0
    for batch in batches:
        held.append(_hashed(batch, names))
        num_rows += batch.num_rows
        if num_rows >= CHUNK_ROWS:
            yield _Chunk(list(names), *_joined(held))
            names, num_rows = {}, 0
    if num_rows:
        yield _Chunk(list(names), *_joined(held))


def _joined(held: list[tuple[np.ndarray, ...]]) -> Iterator[np.ndarray]:
    """The columns of all batches, joined one by one and let go, so that only one is held twice."""
    columns = [list(column) for column in zip(*held, strict=True)]
    held.clear()
    for column in columns:
        yield np.concatenate(column)
        column.clear()


def _hashed(batch: pa.RecordBatch, names: dict[str, int]) -> tuple[np.ndarray, ...]:
    """(dataset code, version hash, day, id hashes) of a batch; new datasets get the next code."""
    codes = np.zeros(batch.num_rows, np.int32)
    ids = np.zeros((batch.num_rows, 2), np.uint64)
    for dataset in pc.unique(batch["dataset"]).to_pylist():
        ours = pc.equal(batch["dataset"], dataset)
        mask = ours.to_numpy(zero_copy_only=False)
        codes[mask] = names.setdefault(dataset, len(names))
        ids[mask] = hash_ids(dataset, batch["sample_id"].filter(ours))
    return codes, hash_versions(batch["version"]), _days(batch["backfill_day"]), ids


def _days(column: pa.Array) -> np.ndarray:
    """(N,) int32 days since 1970; null is `NO_DAY`."""
    days: np.ndarray = pc.fill_null(column.cast(pa.int32()), NO_DAY).to_numpy(zero_copy_only=False)
    return days


def _compare_dataset(
    store: ObjectStore, facts: TableFacts, log: Log, chunk: _Chunk, dataset: str, ours: np.ndarray
) -> list[Plan]:
    """Fills in a dataset's rows of the chunk; the open plans that matter to them."""
    naming: dict[int, Plan] = {}
    unfinished: dict[int, Plan] = {}
    for number in log.plans.get(dataset, ()):
        with open_plan(store, facts, dataset, number) as (plan, file):
            is_open = (dataset, number) not in log.done
            if not is_open and (dataset, plan.target) not in log.public:
                missing = facts.keys.feature_object(dataset, plan.target)
                raise TableDamagedError(f"{store.uri}/{missing} is missing, but plan {plan.plan_id} is done")
            held = State.NEW if plan.kind == "prune" else State.DONE
            named = chunk.record_plan(plan, State.OPEN if is_open else held, file)
        if is_open:
            unfinished[plan.target] = plan
            naming |= {number: plan} if named else {}
    for number in log.failures.get(dataset, ()):
        with open_parquet(store, facts.keys.failure_object(dataset, number)) as (file, _):
            chunk.record_failures(dataset, number, file)
    chunk.record_versions(ours, list(unfinished))
    blocked = np.unique(chunk.target[ours & (chunk.state == State.BLOCKED)])
    return [*naming.values(), *(unfinished[int(target)] for target in blocked)]


def make_plans(
    store: ObjectStore,
    facts: TableFacts,
    samples: Samples,
    *,
    run_id: str,
    max_samples_per_plan: int = MAX_SAMPLES_PER_PLAN,
    most_samples: int | None = None,
) -> list[Plan]:
    """Plans what is to do, and returns the open plans that matter to the samples, whoever made them.

    What another run planned at the same time is left to its plan. Call again once the returned
    plans are done, until none is returned: then every sample is held at its version.

    Args:
        store: Where the table lies.
        facts: The table's.
        samples: The manifest's.
        run_id: The run that plans.
        max_samples_per_plan: Of plans that make a new object.
        most_samples: Stop planning once open plans hold so many samples, all if None.

    Raises:
        ManifestError: A sample occurs twice.
    """
    seen = compare(store, facts, samples)
    planner = Planner(store, facts, seen.log, run_id=run_id, mattering=seen.open_plans)
    for (dataset, target), rows in _groups(facts, seen, samples, max_samples_per_plan):
        left = rows.num_rows if most_samples is None else most_samples - planner.num_samples
        if left <= 0:
            break
        if target == OWN_TARGET:
            planner.create(dataset, target, rows.slice(0, left), kind="new")
        else:
            planner.create(dataset, target, rows, kind="changed")
    return planner.plans


FAILED_IN = "failed_in"
"""The column that travels with rows to plan: the plan whose failure object holds the row, or -1."""


def _groups(
    facts: TableFacts, seen: Comparison, samples: Samples, max_samples: int
) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """((dataset, target), rows) of each plan to make, as soon as its last row has been read.

    Rows of one dataset stay in the manifest's order, so that neighbours share a plan. When many
    datasets are mixed, the fullest goes early, so that memory stays bounded.
    """
    left = Counter(seen.to_do)
    held: dict[tuple[str, int], list[pa.RecordBatch]] = {}
    size: Counter[tuple[str, int]] = Counter()
    for group, rows in _rows_to_do(facts, seen, samples):
        limit = max_samples if group[1] == OWN_TARGET else seen.to_do[group]  # one object, one plan
        start = 0
        while start < rows.num_rows:
            piece = rows.slice(start, limit - size[group])
            start += piece.num_rows
            held.setdefault(group, []).append(piece)
            size[group] += piece.num_rows
            left[group] -= piece.num_rows
            if size[group] == limit or left[group] == 0:
                del size[group]
                yield group, pa.Table.from_batches(held.pop(group))
        if size.total() > BUFFERED_ROWS:
            fullest = max(size, key=lambda own: (own[1] == OWN_TARGET) * size[own])
            if fullest[1] == OWN_TARGET:
                del size[fullest]
                yield fullest, pa.Table.from_batches(held.pop(fullest))


def _rows_to_do(
    facts: TableFacts, seen: Comparison, samples: Samples
) -> Iterator[tuple[tuple[str, int], pa.RecordBatch]]:
    start = 0
    for batch in samples():
        part = slice(start, start + batch.num_rows)
        start += batch.num_rows
        state, target = seen.state[part], seen.target[part]
        failed_in = np.where(state == State.REVISED, seen.last_plan[part], -1)
        rows = facts.conform(batch).append_column(FAILED_IN, pa.array(failed_in))
        chosen = rows.append_column("target", pa.array(target)).filter(pa.array(np.isin(state, TO_DO)))
        for group in (
            pa.Table.from_batches([chosen]).group_by(["dataset", "target"]).aggregate([]).to_pylist()
        ):
            ours = pc.and_(
                pc.equal(chosen["dataset"], group["dataset"]), pc.equal(chosen["target"], group["target"])
            )
            yield (group["dataset"], group["target"]), chosen.filter(ours).drop_columns(["target"])


class _Rivals:
    """Entries of the log that other runs made after it was compared. Every later entry regards them all."""

    def __init__(self) -> None:
        self._plans: dict[str, list[tuple[Plan, IdIndex]]] = {}

    def add(self, plan: Plan, file: pq.ParquetFile) -> None:
        """Notes an entry that was lost to somebody else."""
        ids = IdIndex(hash_ids(plan.dataset, file.read(["sample_id"])["sample_id"]))
        self._plans.setdefault(plan.dataset, []).append((plan, ids))

    def left(self, dataset: str, target: int, rows: pa.Table) -> tuple[pa.Table, list[Plan]]:
        """The rows that no rival names, none if a rival has their target; and the rivals that took any."""
        if dataset not in self._plans:
            return rows, []
        hashes = hash_ids(dataset, rows["sample_id"])
        ours = np.ones(rows.num_rows, bool)
        takers = []
        for plan, ids in self._plans[dataset]:
            taken = (ids.find(hashes) >= 0) | (plan.target == target)
            ours &= ~taken
            if taken.any():
                takers.append(plan)
        return rows.filter(pa.array(ours)), takers


class Planner:
    """Creates entries of the log, and knows those that other runs created in the meantime.

    Args:
        store: Where the table lies.
        facts: The table's.
        log: As it was when the rows to plan were chosen.
        run_id: The run that plans.
        mattering: Open plans that matter to the rows already.
    """

    def __init__(
        self, store: ObjectStore, facts: TableFacts, log: Log, *, run_id: str, mattering: Iterable[Plan]
    ) -> None:
        self._store, self._facts, self._log, self._run_id = store, facts, log, run_id
        self._rivals = _Rivals()
        self._made = {(plan.dataset, plan.number): plan for plan in mattering}

    @property
    def plans(self) -> list[Plan]:
        """The plans that the rows are in by now, this run's and those that came first."""
        return [self._made[place] for place in sorted(self._made)]

    @property
    def num_samples(self) -> int:
        """Samples of all these plans."""
        return sum(plan.num_samples for plan in self._made.values())

    def create(self, dataset: str, target: int, rows: pa.Table, *, kind: Kind) -> None:
        """Creates the next entry of the log; who loses reads the winner's and plans what it left.

        Invariant: entry n is only asked for when all before it have been compared with its rows.

        Args:
            dataset: Of all rows.
            target: The object to change, or `OWN_TARGET`.
            rows: In `sample_schema`, and `FAILED_IN`.
            kind: What the plan does.
        """
        rows = rows.sort_by("sample_id")
        _check_unique(rows["sample_id"].combine_chunks())
        while True:
            ours, takers = self._rivals.left(dataset, target, rows)
            self._made |= {(taker.dataset, taker.number): taker for taker in takers}
            if not ours.num_rows:
                return
            plan = _next_plan(self._log, dataset, target, ours, kind, self._run_id)
            if self._wins(plan, ours):
                self._made[dataset, plan.number] = plan
                return

    def _wins(self, plan: Plan, rows: pa.Table) -> bool:
        key = self._facts.keys.plan(plan.dataset, plan.number)
        ensure(self._store, key, _encode(plan, rows.drop_columns([FAILED_IN])))
        self._log.plans.setdefault(plan.dataset, []).append(plan.number)
        with open_plan(self._store, self._facts, plan.dataset, plan.number) as (winner, file):
            if winner.token == plan.token:
                return True
            self._rivals.add(winner, file)
        return False


def _check_unique(ids: pa.Array) -> None:
    if len(ids) > 1:
        again = pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1))
        if pc.any(again).as_py():
            name = ids.slice(1).filter(again)[0].as_py()
            raise ManifestError(f"sample {name!r} occurs more than once in its dataset")


def _next_plan(log: Log, dataset: str, target: int, rows: pa.Table, kind: Kind, run_id: str) -> Plan:
    number = log.next_number(dataset)
    failed_in = pc.unique(rows[FAILED_IN]).to_pylist()
    return Plan(
        dataset=dataset,
        number=number,
        target=number if target == OWN_TARGET else target,
        kind=kind,
        num_samples=rows.num_rows,
        samples_hash=hash_samples(dataset, rows["sample_id"]),
        failed_in=tuple(sorted(older for older in failed_in if older >= 0)),
        run_id=run_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def hash_samples(dataset: str, ids: pa.ChunkedArray) -> str:
    """A hash over a plan's sample ids, in order."""
    return blake2b(hash_ids(dataset, ids).tobytes(), digest_size=16).hexdigest()


def _encode(plan: Plan, rows: pa.Table) -> bytes:
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
