"""Proves a table's accounting from its objects and its log, and says what was checked.

Every sample that was ever planned (and every one of a manifest) is in exactly one of the two public
tables, whole and once. Memory is some 40 bytes a sample of the largest dataset.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurex_ray.errors import TableDamagedError
from featurex_ray.manifest import read_manifest
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.compare import Samples
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.ids import IdIndex, hash_ids, hash_samples, last_of_each
from featurex_ray.table.layout import numbered, part_place
from featurex_ray.table.log import Log, Plan, open_parquet, open_plan, read_log
from featurex_ray.table.publish import WholeSamples, read_done
from featurex_ray.table.read import open_table
from featurex_ray.table.store import LocalStore, ObjectStore

MAX_EXAMPLES = 5
MAX_PASSES = 3


@dataclass
class VerifyReport:
    """What was checked, and what does not hold.

    Args:
        checked: Counts of what was looked at.
        problems: Counts of what does not hold.
        examples: A few of each problem.
    """

    checked: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.problems

    def lines(self) -> list[str]:
        """The report for people."""
        lines = ["checked: " + ", ".join(f"{count:,} {what}" for what, count in self.checked.items())]
        for problem, count in self.problems.items():
            lines.append(f"  {problem}: {count:,}, such as {', '.join(self.examples[problem])}")
        return [*lines, "everything holds" if self.ok else "the accounting does NOT hold"]

    def note(self, problem: str, offenders: Sequence[str], count: int | None = None) -> None:
        """Adds offenders, if there are any."""
        count = len(offenders) if count is None else count
        if count:
            self.problems[problem] += count
            self.examples.setdefault(problem, []).extend(offenders)
            del self.examples[problem][MAX_EXAMPLES:]


def verify_table(
    table: str, *, manifest: str | None = None, dataset: str | None = None, allow_prefixes: Sequence[str] = ()
) -> VerifyReport:
    """Checks the table at a URI, against a manifest if one is given; reads no media.

    Args:
        table: `<output>/<table>`.
        manifest: Its samples must all be there.
        dataset: As given to `extract`, where the manifest has no such column.
        allow_prefixes: As given to `extract`.

    Raises:
        TableNotFoundError: There is no such table.
        ManifestError: The manifest can't be used.
    """
    reader = open_table(table)
    samples = None
    if manifest is not None:
        policy = ReadPolicy(manifest, allow_prefixes=tuple(allow_prefixes))
        samples = read_manifest(manifest, dataset=dataset, policy=policy).batches
    return verify(reader.store, reader.facts, samples)


def verify(store: ObjectStore, facts: TableFacts, samples: Samples | None = None) -> VerifyReport:
    """Checks a table's log, its public objects, and that they account for every sample.

    Args:
        store: Where the table lies.
        facts: What it is.
        samples: A manifest's samples, which must all be there.
    """
    for _ in range(MAX_PASSES):
        log = read_log(store, facts)
        report = _verify(store, facts, log, samples)
        if report.ok or log == read_log(store, facts):
            break  # else somebody wrote in the meantime: what was read were two states
    return report


def _verify(store: ObjectStore, facts: TableFacts, log: Log, samples: Samples | None) -> VerifyReport:
    report = VerifyReport()
    places = {dataset for dataset, _ in log.public} | set(log.plans) | set(log.failures)
    accounts = {dataset: _Accounts(store, facts, log, dataset, report) for dataset in sorted(places)}
    for account in accounts.values():
        account.check_features()
        account.check_failures()
        account.check_samples()
    for batch in samples() if samples else ():
        _check_manifest(batch, accounts, report)
    _check_orphans(store, facts, log, report)
    report.checked["datasets"] = len(accounts)
    return report


def _check_orphans(store: ObjectStore, facts: TableFacts, log: Log, report: VerifyReport) -> None:
    """Nothing lies where readers or runs look that no plan explains."""
    planned = {(dataset, number) for dataset, numbers in log.plans.items() for number in numbers}
    for prefix in (facts.keys.features, facts.keys.failures):
        keys = [item.key for item in store.list(prefix) if item.key.endswith(".parquet")]
        strange = [key for key in keys if numbered(key, prefix) is None]
        report.note("Parquet files among the table's that no plan explains", strange)
    report.note("done records that no plan explains", sorted(map(str, log.done - planned)))
    report.checked["done records"] += len(log.done)
    for item in store.list(facts.keys.parts):
        report.checked["staged parts"] += 1
        if part_place(item.key, facts.keys.parts) not in planned:
            report.note("staged parts that no plan explains", [item.key])


def _check_manifest(batch: pa.RecordBatch, accounts: dict[str, "_Accounts"], report: VerifyReport) -> None:
    report.checked["manifest samples"] += batch.num_rows
    for dataset in pc.unique(batch["dataset"]).to_pylist():
        ids = batch["sample_id"].filter(pc.equal(batch["dataset"], dataset))
        known = accounts[dataset].names(ids) if dataset in accounts else np.zeros(len(ids), bool)
        report.note("samples of the manifest in neither table", ids.filter(pa.array(~known)).to_pylist())


class _Accounts:
    """One dataset: what the log says of each sample, and where it was found."""

    def __init__(
        self, store: ObjectStore, facts: TableFacts, log: Log, dataset: str, report: VerifyReport
    ) -> None:
        self._store, self._facts, self._log = store, facts, log
        self._dataset, self._report = dataset, report
        self._plans: list[Plan] = []
        hashes = [self._check_plan(number) for number in log.plans.get(dataset, ())]
        numbers = np.repeat(np.arange(len(hashes), dtype=np.int32), [len(rows) for rows in hashes])
        unique, self._last_plan = last_of_each(
            np.concatenate([np.zeros((0, 2), np.uint64), *hashes]), numbers
        )
        self._index = IdIndex(unique)
        self._in_features = np.zeros(len(unique), np.uint8)
        self._in_failures = np.zeros(len(unique), np.uint8)

    def names(self, ids: pa.Array) -> np.ndarray:
        """(N,) bool: which of these samples were found in one of the tables."""
        rows = self._index.find(hash_ids(self._dataset, ids))
        found = np.append((self._in_features > 0) | (self._in_failures > 0), False)
        held: np.ndarray = found[rows]  # -1, for none, is the last: not found
        return held

    def _check_plan(self, number: int) -> np.ndarray:
        """A plan's hashes; it must be the plan that was made, and its object must be there."""
        with open_plan(self._store, self._facts, self._dataset, number) as (plan, file):
            ids = file.read(["sample_id"])["sample_id"]
        self._plans.append(plan)
        hashes = hash_ids(self._dataset, ids)
        self._report.checked["plans"] += 1
        self._report.checked["planned samples"] += len(ids)
        if hash_samples(self._dataset, ids) != plan.samples_hash:
            self._report.note("plans whose samples are not those that were planned", [self._key(plan)])
        if self._is_done(plan) and (self._dataset, plan.target) not in self._log.public:
            self._report.note("done plans whose object is missing", [self._key(plan)])
        return hashes

    def check_features(self) -> None:
        """Every feature object is a plan's, holds whole samples, and each where the log says."""
        targets = {plan.target for plan in self._plans}
        for dataset, number in sorted(self._log.public):
            if dataset != self._dataset:
                continue
            key = self._facts.keys.feature_object(dataset, number)
            self._report.checked["feature objects"] += 1
            if number not in targets:
                self._report.note("feature objects that no plan explains", [key])
            try:
                with open_parquet(self._store, key) as (file, etag):
                    self._check_marks(file, number, key, etag)
                    self._check_rows(file, number, key)
            except TableDamagedError as error:
                self._report.note("damaged feature objects", [str(error)])

    def _check_marks(self, file: pq.ParquetFile, number: int, key: str, etag: str) -> None:
        """The object says what made it, and is what that plan's done record says."""
        marks = file.metadata.metadata or {}
        last = int(marks.get(b"featurex.last_plan", -1))
        known = 0 <= last < len(self._plans) and self._plans[last].target == number
        if not known or marks.get(b"featurex.revision") != self._facts.revision.encode():
            self._report.note("feature objects that this table's plans didn't make", [key])
        elif self._is_done(self._plans[last]):
            done = read_done(self._store, self._facts, self._plans[last])
            if done is None or done.num_rows != file.metadata.num_rows or not self._same(done.etag, etag):
                self._report.note("feature objects that were edited since they were published", [key])

    def _same(self, one: str, other: str) -> bool:
        """Whether two ETags are of one content; a copied disk has other inodes, but keeps times and sizes."""
        if isinstance(self._store, LocalStore):
            return one.split("-")[1:] == other.split("-")[1:]
        return one == other

    def _check_rows(self, file: pq.ParquetFile, number: int, key: str) -> None:
        order = WholeSamples()
        columns = ["sample_id", "clip_index", "num_clips", "feature", "extractor_revision"]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns)
            self._report.checked["feature rows"] += rows.num_rows
            order.check(rows)
            self._check_values(rows, key)
            starts = rows.filter(pc.equal(rows["clip_index"], 0))["sample_id"]
            self._found(starts, self._in_features, number, key)
        order.check_end()

    def _check_values(self, rows: pa.Table, key: str) -> None:
        wrong = pc.not_equal(rows["extractor_revision"], self._facts.revision)
        self._report.note("rows of another revision", rows.filter(wrong)["sample_id"].to_pylist())
        lengths = pc.fill_null(pc.list_value_length(rows["feature"]), -1)
        wrong = pc.not_equal(lengths, self._facts.dimension)
        self._report.note("features of another dimension", rows.filter(wrong)["sample_id"].to_pylist())
        if not pc.all(pc.is_finite(pc.list_flatten(rows["feature"])), min_count=0).as_py():
            self._report.note("row groups with values that are not finite", [key])

    def check_failures(self) -> None:
        """Every failure object is a plan's, and holds samples that failed in it."""
        for number in self._log.failures.get(self._dataset, ()):
            key = self._facts.keys.failure_object(self._dataset, number)
            self._report.checked["failure objects"] += 1
            if number >= len(self._plans):
                self._report.note("failure objects that no plan explains", [key])
            try:
                with open_parquet(self._store, key) as (file, _):
                    ids = file.read(["sample_id"])["sample_id"]
            except TableDamagedError as error:
                self._report.note("damaged failure objects", [str(error)])
                continue
            self._report.checked["failure rows"] += len(ids)
            self._found(ids, self._in_failures, number, key)

    def _found(self, ids: pa.ChunkedArray, where: np.ndarray, number: int, key: str) -> None:
        """Counts samples that lie in the object `number`, and notes those that shouldn't."""
        rows = self._index.find(hash_ids(self._dataset, ids))
        known = rows >= 0
        np.add.at(where, rows[known], 1)
        places = [plan.target if where is self._in_features else plan.number for plan in self._plans]
        settled = np.array([self._is_done(plan) for plan in self._plans], bool)
        last = self._last_plan[rows[known]]
        stray = np.ones(len(rows), bool)
        stray[known] = settled[last] & (np.array(places, np.int32)[last] != number)
        names = ids.filter(pa.array(stray)).to_pylist()
        self._report.note(
            "rows where the log says that none should be", [f"{name} in {key}" for name in names]
        )

    def check_samples(self) -> None:
        """Each planned sample is in exactly one table; until its plan is done, at least in one."""
        done = np.array([self._is_done(plan) for plan in self._plans], bool)[self._last_plan]
        pruned = np.array([plan.kind == "prune" for plan in self._plans], bool)[self._last_plan]
        features, failures = self._in_features, self._in_failures
        found = features.astype(np.int16) + failures
        self._note("planned samples in neither table", done & ~pruned & (found == 0))
        self._note("pruned samples that are still there", done & pruned & (found > 0))
        self._note("samples in both tables", done & (features > 0) & (failures > 0))
        self._note("samples in several objects", (features > 1) | (failures > 1))
        self._note("samples of open plans that are in neither table yet", ~done & ~pruned & (found == 0))
        self._report.checked["samples with features"] += int(np.count_nonzero(features))
        self._report.checked["failed samples"] += int(np.count_nonzero((failures > 0) & (features == 0)))

    def _note(self, problem: str, rows: np.ndarray) -> None:
        count = int(np.count_nonzero(rows))
        if count:
            self._report.note(problem, self._examples(np.flatnonzero(rows)[:MAX_EXAMPLES]), count)

    def _examples(self, rows: np.ndarray) -> list[str]:
        names: list[str] = []
        for number in np.unique(self._last_plan[rows]):
            with open_plan(self._store, self._facts, self._dataset, int(number)) as (_, file):
                ids = file.read(["sample_id"])["sample_id"]
            wanted = np.isin(self._index.find(hash_ids(self._dataset, ids)), rows)
            names += [f"{self._dataset}/{name}" for name in ids.filter(pa.array(wanted)).to_pylist()]
        return names

    def _is_done(self, plan: Plan) -> bool:
        return (self._dataset, plan.number) in self._log.done

    def _key(self, plan: Plan) -> str:
        return self._facts.keys.plan(plan.dataset, plan.number)
