"""The run report: what a run did, in numbers; printed at its end and kept beside the table."""

import importlib.metadata
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.pipeline.bounds import Watched, shares
from featurex_ray.pipeline.units import peak_bytes

STAGES = ("fetch", "decode", "extract", "write")
POOLS = ("decode", "extract")
PACKAGES = [
    "featurex-ray",
    "ray",
    "torch",
    "torchvision",
    "pyarrow",
    "av",
    "decord",
    "pillow",
    "simplejpeg",
    "s3fs",
    "fsspec",
    "numpy",
]


@dataclass
class TableReport:
    """What a run did to one table.

    Attributes:
        planned: Samples of the plans that this run worked on.
        done: Of these, samples whose features are visible now.
        failed: Of these, samples that are failure rows now.
        failures_by_code: `failed`, by code; those that an earlier run staged aside.
        pruned: Samples that left the manifest and are gone now.
        left: Samples that a budget left for another run; None where there was none.
        skipped: Manifest samples that needed nothing (done or failed before).
        num_rows: Feature rows (clips) in the objects that this run published.
        objects: Keys of the features objects that this run published or completed.
    """

    table: str
    extractor: str
    revision: str
    weights: Any
    precision: str
    decoder: str
    planned: int = 0
    done: int = 0
    failed: int = 0
    failures_by_code: dict[str, int] = field(default_factory=dict)
    pruned: int = 0
    left: int | None = None
    skipped: int = 0
    num_rows: int = 0
    objects: list[str] = field(default_factory=list)


@dataclass
class RunReport:
    """What one run did: counts, rates, failures by code.

    Attributes:
        stage_seconds: Seconds of all workers together, by stage.
        peak_bytes: The most memory of the largest process of each pool, and of the driver.
        driver_cpu_seconds: CPU of the driver's process, from here to the end.
        watched: What was seen of the execution from inside.
    """

    run_id: str
    job: dict[str, Any]
    tables: list[TableReport]
    started_at: str
    seconds: float = 0.0
    startup_seconds: float = 0.0
    num_units: int = 0
    num_clips: int = 0
    num_frames: int = 0
    fetched_bytes: int = 0
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    peak_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(POOLS, 0))
    driver_cpu_seconds: float = field(default_factory=lambda: -time.process_time())
    watched: Watched = field(default_factory=Watched)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def planned(self) -> int:
        """Samples of the plans that this run worked on, over all tables."""
        return sum(t.planned for t in self.tables)

    @property
    def failed(self) -> int:
        """Samples that are failure rows now, over all tables."""
        return sum(t.failed for t in self.tables)

    @property
    def failure_rate(self) -> float:
        """Failed samples over planned ones; 0 where nothing was planned."""
        return self.failed / self.planned if self.planned else 0.0

    def count(self, staged: pa.Table) -> None:
        """Add what the writer told of some units (schema `STAGED`)."""
        self.num_units += len(staged)
        self.num_clips += pc.sum(staged["num_unit_clips"]).as_py() or 0
        self.num_frames += pc.sum(staged["num_frames"]).as_py() or 0
        self.fetched_bytes += pc.sum(staged["fetched_bytes"]).as_py() or 0
        for stage in STAGES:
            self.stage_seconds[stage] += pc.sum(staged[f"{stage}_seconds"]).as_py() or 0.0
        for pool in POOLS:
            peak = pc.max(staged[f"{pool}_peak_bytes"]).as_py() or 0
            self.peak_bytes[pool] = max(self.peak_bytes[pool], peak)

    def close(self, started: float) -> None:
        """Note how long the run took and what the driver needed."""
        self.seconds = round(time.monotonic() - started, 3)
        self.peak_bytes["driver"] = peak_bytes()
        self.driver_cpu_seconds = round(self.driver_cpu_seconds + time.process_time(), 3)

    def bounded_by(self) -> dict[str, float]:
        """What held the run up (storage, decode, extract or write), as shares of its time."""
        spent = self.stage_seconds
        return shares(self.watched.bounds, fetch_seconds=spent["fetch"], decode_seconds=spent["decode"])

    def rates(self) -> dict[str, float]:
        """Clips a second: over the whole run, and a worker's in each stage."""
        rates = {"run": self.num_clips / self.seconds if self.seconds else 0.0}
        rates |= {s: self.num_clips / t for s, t in self.stage_seconds.items() if t}
        return {name: round(rate, 2) for name, rate in rates.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as it is kept under `_featurex/`."""
        tables = [vars(t) for t in self.tables]
        return vars(self) | {
            "tables": tables,
            "planned": self.planned,
            "failed": self.failed,
            "clips_per_second": self.rates(),
            "watched": vars(self.watched)
            | {"bounds": self.bounded_by(), "occupancy": self.watched.occupancy.to_json()},
        }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that features depend on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def failures_by_code(codes: Sequence[str], *, before: Mapping[str, int]) -> dict[str, int]:
    """Counts by code, the most frequent first, those of earlier rounds of the run included."""
    return dict((Counter(before) + Counter(codes)).most_common())


def report_lines(report: RunReport) -> list[str]:
    """The report as a person reads it at the end of a run."""
    lines = [f"run {report.run_id}: {_plural(report.planned, 'sample')} planned, {report.seconds:.1f} s"]
    for table in report.tables:
        lines += _table_lines(table)
    if report.num_units:
        lines += _rate_lines(report)
    return lines


def _table_lines(table: TableReport) -> list[str]:
    lines = [
        f"  {table.table}: {table.done} done, {table.failed} failed, {table.skipped} skipped; "
        f"{_plural(table.num_rows, 'row')} in {_plural(len(table.objects), 'object')}"
    ]
    if table.pruned:
        lines.append(
            f"    {_plural(table.pruned, 'sample')} pruned, as the manifest doesn't name them any more"
        )
    if table.left is not None:
        lines.append(f"    {_plural(table.left, 'sample')} left by the budget; run it again to go on")
    if table.failures_by_code:
        codes = ", ".join(f"{code} {n}" for code, n in table.failures_by_code.items())
        lines.append(f"    failures: {codes}")
    lines.append(
        f"    revision {table.revision}, {table.precision}, {table.decoder}, "
        f"weights: {_weights(table.weights)}"
    )
    return lines


def _weights(weights: Any) -> str:
    if isinstance(weights, Mapping):
        return ", ".join(f"{k} {v}" for k, v in weights.items() if v is not None)
    return str(weights)


def _rate_lines(report: RunReport) -> list[str]:
    rates = report.rates()
    stages = ", ".join(f"{s} {report.stage_seconds[s]:.1f} s" for s in STAGES)
    peaks = ", ".join(f"{name} {_mib(peak)}" for name, peak in report.peak_bytes.items())
    return [
        f"  {_plural(report.num_clips, 'clip')} ({_plural(report.num_frames, 'frame')}, "
        f"{report.fetched_bytes / 1e6:.1f} MB fetched), {rates['run']:.1f} clips/s",
        f"  worker seconds: {stages}; {report.startup_seconds:.1f} s until the first clip",
        f"  peak memory of a process: {peaks}",
        f"  object store: peak {_mib(report.watched.object_store_peak_bytes)}, "
        f"spilled {_mib(report.watched.spilled_bytes)}",
        f"  bounded by: {_bounds(report.bounded_by())}",
    ]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _bounds(bounded_by: Mapping[str, float]) -> str:
    if not bounded_by:
        return "nothing but its start"
    return ", ".join(f"{stage} ({share:.0%} of the time)" for stage, share in bounded_by.items())


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
