"""The nightly job: a range of days, each with its manifest, merged so that the latest day wins.

Every day is idempotent, and days are too: a sample that was planned from a later day is no work for
an earlier one, so overlapping ranges, in any order, come to the same table. That takes versions that tell
generations apart: of one that comes back, or of none, the day that was planned first stays.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import cached_property, reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import NoManifestError, RequestError
from featurex_ray.job import ExtractionJob
from featurex_ray.manifest import Manifest, read_manifest
from featurex_ray.manifest.carried import promote
from featurex_ray.pipeline.agenda import Budget, ManifestAgenda
from featurex_ray.pipeline.progress import Progress, Silent
from featurex_ray.pipeline.report import RunReport
from featurex_ray.pipeline.request import Request, prepare
from featurex_ray.pipeline.run import carry_out, memory_given_back
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.ids import IdIndex, hash_ids

FIELDS = {"date": "%Y-%m-%d", "year": "%Y", "month": "%m", "day": "%d"}
"""What a template may hold, and how a day is written there."""


@dataclass(frozen=True)
class Days:
    """The days [first, last], both inside, by the calendar of UTC.

    Raises:
        RequestError: The last lies before the first.
    """

    first: date
    last: date

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise RequestError(f"--to {self.last} lies before --from {self.first}")

    @classmethod
    def parse(cls, first: str | None, last: str | None, recent: str | None) -> "Days":
        """Reads `--from D --to D`, or `--last 3d`: the last days up to today.

        Raises:
            RequestError: Neither or both, or not a date.
        """
        if recent is not None and first is None and last is None:
            match = re.fullmatch(r"(\d+)d", recent)
            if match is None or not int(match[1]):
                raise RequestError(f"--last {recent!r}: give a number of days, such as 3d")
            today = datetime.now(UTC).date()
            return cls(today - timedelta(days=int(match[1]) - 1), today)
        if recent is not None or first is None or last is None:
            raise RequestError("give --from D --to D, or --last 3d")
        return cls(_day("--from", first), _day("--to", last))

    def __iter__(self) -> Iterator[date]:
        """From the first to the last."""
        for number in range((self.last - self.first).days + 1):
            yield self.first + timedelta(days=number)


def _day(option: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise RequestError(f"{option} {text!r} is not a date such as 2026-01-31") from error


def fill(template: str, day: date) -> str:
    """A template's URI for one day.

    Raises:
        RequestError: It names no day, or holds other fields.
    """
    names = re.findall(r"\{([^{}]*)\}", template)
    unknown = sorted(set(names) - set(FIELDS))
    if unknown or not ({"date", "day"} & set(names)):
        problem = f"unknown field {{{unknown[0]}}}" if unknown else "no day in it"
        raise RequestError(
            f"--manifests {template!r}: {problem}; use {{date}}, or {{year}}, {{month}}, {{day}}"
        )
    return re.sub(r"\{(\w+)\}", lambda field: day.strftime(FIELDS[field[1]]), template)


@dataclass(frozen=True)
class MergedDays:
    """Several days' manifests as one: each sample once, as its latest day has it.

    Args:
        days: The manifests that there are, by day, all with the same carried columns.
        missing: Days without a manifest.
    """

    days: dict[date, Manifest]
    missing: tuple[date, ...]

    @property
    def carried(self) -> pa.Schema:
        """The columns that travel along."""
        return next(iter(self.days.values())).carried

    @cached_property
    def num_samples(self) -> int:
        """Samples, each once."""
        return sum(batch.num_rows for batch in self.batches())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The samples, the latest day's first.

        Which rows are the latest is found anew in each reading: a day's file may be written meanwhile.
        """
        later = _Later()
        for day in sorted(self.days, reverse=True):
            found = [np.zeros((0, 2), np.uint64)]
            for batch in self.days[day].batches():
                hashes = _hashes(batch)
                is_latest = later.lacks(hashes)
                found.append(hashes[is_latest])
                part = batch.filter(pa.array(is_latest))
                place = part.schema.get_field_index("backfill_day")
                days = pa.repeat(pa.scalar(day, pa.date32()), part.num_rows)
                yield pa.RecordBatch.from_arrays(
                    [days if n == place else column for n, column in enumerate(part.columns)],
                    schema=part.schema,
                )
            later.add(np.concatenate(found))


class _Later:
    """The samples of later days, in few indexes: of a year's days each row is looked up in some eight."""

    def __init__(self) -> None:
        self._indexes: list[tuple[np.ndarray, IdIndex]] = []

    def lacks(self, hashes: np.ndarray) -> np.ndarray:
        """(N,) bool: which samples no later day has."""
        lacking = np.ones(len(hashes), bool)
        for _, index in self._indexes:
            left = np.flatnonzero(lacking)
            lacking[left] = index.find(hashes[left]) < 0
        return lacking

    def add(self, hashes: np.ndarray) -> None:
        """Takes a day's samples in, with indexes that are not much larger."""
        while self._indexes and len(self._indexes[-1][0]) < 2 * len(hashes):
            hashes = np.concatenate([self._indexes.pop()[0], hashes])
        self._indexes.append((hashes, IdIndex(hashes)))


def _hashes(batch: pa.RecordBatch) -> np.ndarray:
    """(N, 2) uint64 of each (dataset, sample)."""
    hashes = np.zeros((batch.num_rows, 2), np.uint64)
    for dataset in pc.unique(batch["dataset"]).to_pylist():
        ours = pc.equal(batch["dataset"], dataset)
        hashes[ours.to_numpy(zero_copy_only=False)] = hash_ids(dataset, batch["sample_id"].filter(ours))
    return hashes


def read_days(job: ExtractionJob, days: Days, *, require_all: bool = False) -> MergedDays:
    """Reads and checks each day's manifest; days without one are noted.

    Args:
        job: Its `manifest` is the template.
        days: Which.
        require_all: Whether a missing day is an error.

    Raises:
        ManifestError: A manifest can't be used.
        NoManifestError: There is none, or not one for each day that must have one.
    """
    policy = ReadPolicy(job.manifest, allow_prefixes=job.allow_prefix, only_prefixes=job.only_prefix)
    manifests: dict[date, Manifest] = {}
    missing: dict[date, NoManifestError] = {}
    for day in days:
        try:
            manifests[day] = read_manifest(
                fill(job.manifest, day), dataset=job.dataset, keep_columns=job.keep_columns, policy=policy
            )
        except NoManifestError as error:
            missing[day] = error
    if missing and (require_all or not manifests):
        why = "--require-all" if manifests else "there is nothing to do"
        first = next(iter(missing.values()))
        raise NoManifestError(f"{why}: no manifest for {listed(list(missing))}; {first}")
    return MergedDays(_alike(manifests), tuple(missing))


def _alike(manifests: dict[date, Manifest]) -> dict[date, Manifest]:
    """The manifests, with one set of carried columns and types."""
    types: dict[str, pa.DataType] = {}
    for manifest in manifests.values():
        for item in manifest.carried:
            types[item.name] = reduce(promote, [item.type], types.get(item.name, pa.null()))
    carried = pa.schema(list(types.items()))
    return {day: replace(manifest, carried=carried) for day, manifest in manifests.items()}


def listed(days: Sequence[date], *, most: int = 5) -> str:
    """Days for a message, the first few."""
    more = f" and {len(days) - most} more" if len(days) > most else ""
    return ", ".join(map(str, days[:most])) + more


def prepare_days(job: ExtractionJob, days: Days, *, require_all: bool = False) -> tuple[Request, MergedDays]:
    """Read and check all that a backfill names; nothing is written.

    Raises:
        RequestError: As `prepare` and `read_days`.
    """
    merged = read_days(job, days, require_all=require_all)
    return prepare(job, merged), merged


@memory_given_back()
def backfill(
    job: ExtractionJob,
    days: Days,
    *,
    require_all: bool = False,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Do what a range of days asks and is not done yet. Safe to repeat, to overlap and to kill.

    Args:
        job: What to extract; its `manifest` is a template, such as `s3://b/manifests/dt={date}/*.parquet`.
        days: Which.
        require_all: Whether a day without a manifest is an error; else it is reported.
        budget: When to stop, at a plan's end, with the rest left for another run.
        progress: Told what happens meanwhile.

    Raises:
        RequestError: The request is wrong; nothing was written.
        RunError: The run failed and can be run again.
    """
    progress = progress or Silent()
    request, merged = prepare_days(job, days, require_all=require_all)
    if merged.missing:
        progress.say(f"no manifest for {len(merged.missing)} of the days: {listed(merged.missing)}")
    agenda = ManifestAgenda(merged, job.max_samples_per_plan, budget=budget)
    return carry_out(request, agenda, progress)
