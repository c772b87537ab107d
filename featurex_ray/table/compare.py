"""A manifest against a table's log: what is to do, in a state a sample.

Up to a million samples are compared in memory. Larger manifests go by parts of their ids' hashes through
temporary files (40 bytes a sample, 32 a planned one), so that manifest and log are each read once.
"""

import hashlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import TableDamagedError
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.ids import IdIndex, hash_ids, hash_versions
from featurex_ray.table.log import Beginning, Log, Plan, open_parquet, open_plan, read_log, reread
from featurex_ray.table.store import ObjectStore

IN_MEMORY = 1_000_000
"""Manifest rows that are compared without temporary files: about 80 MB while it lasts."""

PARTS = 256
"""Of larger manifests; by the first byte of the hashes."""

Samples = Callable[[], Iterable[pa.RecordBatch]]
"""Gives the manifest's samples in `sample_schema`, in the same order each time."""

OWN_TARGET = -1
"""The target of samples that get a new object, named after their plan."""

NO_DAY = -(2**31)
"""The day of samples that no backfill planned: before all days."""


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


_SAMPLE = np.dtype([("id", "u8", 2), ("version", "u8"), ("row", "i8"), ("dataset", "i4"), ("day", "i4")])
"""What the comparison keeps of a manifest row."""

_PLANNED = np.dtype([("id", "u8", 2), ("version", "u8"), ("entry", "i4"), ("day", "i4"), ("state", "u1")])
"""What it keeps of a planned row, and of a failed one: `entry` counts the plans that were read."""

Sink = Callable[[np.ndarray], None]
"""Takes records, in order."""


class _Spilled:
    """Records in temporary files, one a part."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, stack: ExitStack) -> None:
        self._dtype = dtype
        self._paths = [folder / f"{name}-{part}" for part in range(PARTS)]
        self._files: list[BinaryIO] = [stack.enter_context(path.open("wb")) for path in self._paths]

    def add(self, records: np.ndarray) -> None:
        """Takes some."""
        parts = (records["id"][:, 0] >> np.uint64(56)).astype(np.uint8)
        order = np.argsort(parts, kind="stable")  # within a part, records stay in order
        ends = np.cumsum(np.bincount(parts, minlength=PARTS))
        ordered = records[order]
        for file, first, last in zip(self._files, [0, *ends], ends, strict=False):
            if last > first:
                file.write(ordered[first:last].data)

    def part(self, number: int) -> np.ndarray:
        """The records of one part, in order."""
        self._files[number].close()
        return np.fromfile(self._paths[number], self._dtype)


class _Part:
    """Manifest rows, and what the log says of each."""

    def __init__(self, samples: np.ndarray) -> None:
        self.samples = samples
        self._index = IdIndex(samples["id"])
        self.state = np.full(len(samples), State.NEW, np.uint8)
        self.last = np.full(len(samples), -1, np.int32)  # the last entry that names the row
        self._version = np.zeros(len(samples), np.uint64)
        self._day = np.full(len(samples), NO_DAY, np.int32)
        self.named: set[int] = set()

    def record_planned(self, planned: np.ndarray) -> None:
        """Notes what plans say of these rows; of several that name one, the last counts."""
        rows = self._index.find(planned["id"])
        hit = rows >= 0
        rows, planned = rows[hit], planned[hit]
        # Where a row occurs twice, NumPy keeps the last value.
        self.state[rows] = planned["state"]
        self.last[rows] = planned["entry"]
        self._version[rows] = planned["version"]
        self._day[rows] = planned["day"]
        self.named.update(np.unique(planned["entry"]).tolist())

    def record_failed(self, failed: np.ndarray) -> None:
        """Notes the samples that failed in the last plan that names them."""
        rows = self._index.find(failed["id"])
        hit = rows >= 0
        rows, entry = rows[hit], failed["entry"][hit]
        holds = (self.last[rows] == entry) & (self.state[rows] == State.DONE)
        self.state[rows[holds]] = State.FAILED

    def record_versions(self, changed_by: np.ndarray, by_later: np.ndarray) -> None:
        """Notes which rows changed since they were planned.

        Null in the manifest is never a change, nor is what a backfill says of a day that is older
        than the one that the sample was planned from, nor what a later run planned.

        Args:
            changed_by: Of each entry, the open one that replaces the same object, or -1.
            by_later: Of each entry, and at last of none, whether a run that began later made it.
        """
        version, day = self.samples["version"], self.samples["day"]
        differs = (version != 0) & (version != self._version) & ((day == NO_DAY) | (day >= self._day))
        differs &= ~by_later[self.last]
        self.state[differs & (self.state == State.FAILED)] = State.REVISED
        self.state[differs & (self.state == State.DONE)] = State.CHANGED
        changed = np.flatnonzero(self.state == State.CHANGED)
        by = changed_by[self.last[changed]]
        self.state[changed[by >= 0]] = State.BLOCKED
        self.named.update(np.unique(by[by >= 0]).tolist())


@dataclass(frozen=True)
class Comparison:
    """Every manifest row against the log, in the manifest's order: a byte a row, and 12 a changed one.

    Args:
        log: The log as it was read.
        state: (N,) uint8, `State`.
        changed: (M,) int64, ascending: rows in the states CHANGED and REVISED.
        last_plan: (M,) int32, of those, the last plan that names them.
        target: (M,) int32, of those, the object to change, or `OWN_TARGET`.
        work: Counts of the states.
        to_do: Rows to do by (dataset, target).
        open_plans: Open plans that name one of the samples, or block it.
        fingerprints: Of the manifest's batches: who reads it again must find the same rows.
    """

    log: Log
    state: np.ndarray
    changed: np.ndarray
    last_plan: np.ndarray
    target: np.ndarray
    work: Work
    to_do: Counter[tuple[str, int]]
    open_plans: list[Plan]
    fingerprints: Sequence[bytes] = ()

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(state, target, last plan) of the rows [start, stop); -1 where nothing changed."""
        first, last = np.searchsorted(self.changed, (start, stop))
        places = self.changed[first:last] - start
        target, last_plan = (np.full(stop - start, -1, np.int32) for _ in range(2))
        target[places], last_plan[places] = self.target[first:last], self.last_plan[first:last]
        return self.state[start:stop], target, last_plan


def compare(
    store: ObjectStore, facts: TableFacts, samples: Samples, *, began: Beginning | None = None
) -> Comparison:
    """Looks the manifest's samples up in the log; writes nothing but temporary files.

    Args:
        store: Where the table lies.
        facts: The table's.
        samples: The manifest's.
        began: What the run found that asks; what a later one planned since is no change.

    Raises:
        TableDamagedError: An entry can't be read, or a done plan's object is missing.
    """
    log = read_log(store, facts)
    datasets: dict[str, int] = {}
    held: list[np.ndarray] = []
    fingerprints: list[bytes] = []
    records = _records(_noted(samples(), fingerprints), datasets)
    for each in records:
        held.append(each)
        if sum(map(len, held)) > IN_MEMORY:
            by_parts = _compare_by_parts(store, facts, log, itertools.chain(held, records), datasets, began)
            return replace(by_parts, fingerprints=fingerprints)
    entries = _Entries(store, facts, log, datasets, began)
    part = _Part(np.concatenate([np.zeros(0, _SAMPLE), *held]))
    entries.read_plans(part.record_planned)
    entries.read_failures(part.record_failed)
    return replace(_compared(entries, [part], len(part.samples)), fingerprints=fingerprints)


def _noted(batches: Iterable[pa.RecordBatch], fingerprints: list[bytes]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        fingerprints.append(fingerprint(batch))
        yield batch


def fingerprint(batch: pa.RecordBatch) -> bytes:
    """What a batch of manifest rows says of which samples there are, in a few bytes."""
    names = batch.select(["dataset", "sample_id", "version"])
    return hashlib.blake2b(names.serialize(), digest_size=16).digest()


def _compare_by_parts(
    store: ObjectStore,
    facts: TableFacts,
    log: Log,
    records: Iterator[np.ndarray],
    datasets: dict[str, int],
    began: Beginning | None,
) -> Comparison:
    with tempfile.TemporaryDirectory(prefix="featurex-compare-") as folder, ExitStack() as stack:
        samples = _Spilled(Path(folder), "samples", _SAMPLE, stack)
        num_rows = 0
        for each in records:
            samples.add(each)
            num_rows += len(each)
        entries = _Entries(store, facts, log, datasets, began)
        planned, failed = (_Spilled(Path(folder), n, _PLANNED, stack) for n in ("planned", "failed"))
        entries.read_plans(planned.add)
        entries.read_failures(failed.add)

        def parts() -> Iterator[_Part]:
            for number in range(PARTS):
                part = _Part(samples.part(number))
                part.record_planned(planned.part(number))
                part.record_failed(failed.part(number))
                yield part

        return _compared(entries, parts(), num_rows)


class _Entries:
    """The plans of the manifest's datasets, as they are read, in the log's order."""

    def __init__(
        self,
        store: ObjectStore,
        facts: TableFacts,
        log: Log,
        datasets: Iterable[str],
        began: Beginning | None,
    ) -> None:
        self._store, self._facts, self.log, self._began = store, facts, log, began
        self.datasets = list(datasets)
        self.plans: list[Plan] = []
        self._place: dict[tuple[str, int], int] = {}

    def read_plans(self, sink: Sink) -> None:
        """Gives each planned row."""
        for dataset in self.datasets:
            for number in self.log.plans.get(dataset, ()):
                with open_plan(self._store, self._facts, dataset, number) as (plan, file):
                    entry = self._place[dataset, number] = len(self.plans)
                    self.plans.append(plan)
                    self._check(plan)
                    for batch in file.iter_batches(columns=["sample_id", "version", "backfill_day"]):
                        sink(_planned(plan, entry, self._state(plan), batch))

    def read_failures(self, sink: Sink) -> None:
        """Gives each failed row."""
        for dataset in self.datasets:
            for number in self.log.failures.get(dataset, ()):
                if (dataset, number) in self._place:  # others are of plans made since the log was listed
                    self._read_failure_object(dataset, number, sink)

    def _read_failure_object(self, dataset: str, number: int, sink: Sink) -> None:
        key = self._facts.keys.failure_object(dataset, number)

        def read() -> None:
            with open_parquet(self._store, key) as (file, _):
                for batch in file.iter_batches(columns=["sample_id"]):
                    failed = np.zeros(batch.num_rows, _PLANNED)
                    failed["id"] = hash_ids(dataset, batch["sample_id"])
                    failed["entry"] = self._place[dataset, number]
                    sink(failed)  # rows that come twice change nothing

        reread(read, what=f"{self._store.uri}/{key}")

    def _state(self, plan: Plan) -> State:
        if (plan.dataset, plan.number) not in self.log.done:
            return State.OPEN
        return State.NEW if plan.kind == "prune" else State.DONE

    def _check(self, plan: Plan) -> None:
        if self._state(plan) != State.OPEN and (plan.dataset, plan.target) not in self.log.public:
            missing = self._facts.keys.feature_object(plan.dataset, plan.target)
            raise TableDamagedError(
                f"{self._store.uri}/{missing} is missing, but plan {plan.plan_id} is done"
            )

    def changed_by(self) -> np.ndarray:
        """(E,) int32: of each entry, the open one that replaces the same object, or -1."""
        changing = {
            (plan.dataset, plan.target): entry
            for entry, plan in enumerate(self.plans)
            if self._state(plan) == State.OPEN
        }
        return np.array([changing.get((p.dataset, p.target), -1) for p in self.plans], np.int32)

    def by_later(self) -> np.ndarray:
        """(E + 1,) bool: of each entry, and at last of none, whether a run that began later made it."""
        began = self._began
        return np.array([began is not None and began.is_by_later(plan) for plan in self.plans] + [False])

    def open_plans(self, named: set[int]) -> list[Plan]:
        """Of these entries, those that are open; sorted."""
        plans = [self.plans[entry] for entry in named]
        opened = [plan for plan in plans if self._state(plan) == State.OPEN]
        return sorted(opened, key=lambda plan: (plan.dataset, plan.number))


def _planned(plan: Plan, entry: int, state: State, batch: pa.RecordBatch) -> np.ndarray:
    records = np.zeros(batch.num_rows, _PLANNED)
    records["id"] = hash_ids(plan.dataset, batch["sample_id"])
    records["version"] = hash_versions(batch["version"])
    records["day"] = _days(batch["backfill_day"])
    records["entry"], records["state"] = entry, state
    return records


def _records(batches: Iterable[pa.RecordBatch], datasets: dict[str, int]) -> Iterator[np.ndarray]:
    """Manifest rows as `_SAMPLE`; new datasets get the next code."""
    row = 0
    for batch in batches:
        records = np.zeros(batch.num_rows, _SAMPLE)
        records["row"] = np.arange(row, row + batch.num_rows)
        records["version"] = hash_versions(batch["version"])
        records["day"] = _days(batch["backfill_day"])
        for dataset in pc.unique(batch["dataset"]).to_pylist():
            ours = pc.equal(batch["dataset"], dataset)
            mask = ours.to_numpy(zero_copy_only=False)
            records["dataset"][mask] = datasets.setdefault(dataset, len(datasets))
            records["id"][mask] = hash_ids(dataset, batch["sample_id"].filter(ours))
        row += batch.num_rows
        yield records


def _days(column: pa.Array) -> np.ndarray:
    """(N,) int32 days since 1970; null is `NO_DAY`."""
    days: np.ndarray = pc.fill_null(column.cast(pa.int32()), NO_DAY).to_numpy(zero_copy_only=False)
    return days


def _compared(entries: _Entries, parts: Iterable[_Part], num_rows: int) -> Comparison:
    """What all parts say, in the manifest's order."""
    states = np.zeros(num_rows, np.uint8)
    changed_by, by_later = entries.changed_by(), entries.by_later()
    targets = np.array([plan.target for plan in entries.plans], np.int32)
    numbers = np.array([plan.number for plan in entries.plans], np.int32)
    changed: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    counts: Counter[tuple[str, State]] = Counter()
    to_do: Counter[tuple[str, int]] = Counter()
    named: set[int] = set()
    for part in parts:
        part.record_versions(changed_by, by_later)
        row, dataset, state = part.samples["row"], part.samples["dataset"], part.state
        target = np.full(len(row), OWN_TARGET, np.int32)
        moves = state == State.CHANGED
        target[moves] = targets[part.last[moves]]
        for code, name in enumerate(entries.datasets):
            ours = dataset == code
            counts.update({(name, State(value)): n for value, n in _count(state[ours])})
            to_do.update({(name, value): n for value, n in _count(target[ours & np.isin(state, TO_DO)])})
        named |= part.named
        states[row] = state
        again = np.flatnonzero(np.isin(state, (State.CHANGED, State.REVISED)))
        changed.append((row[again], numbers[part.last[again]], target[again]))
    rows, last_plan, target = (np.concatenate(column) for column in zip(*changed, strict=True))
    order = np.argsort(rows)
    return Comparison(
        entries.log,
        states,
        rows[order],
        last_plan[order],
        target[order],
        Work(counts),
        to_do,
        entries.open_plans(named),
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
