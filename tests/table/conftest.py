"""A small deterministic world for the table's tests: samples, what extracting them gives, and a run."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest

from featurex_ray import schemas
from featurex_ray.table import FeatureTable, TableFacts, open_store
from featurex_ray.table.log import Plan
from featurex_ray.table.read import TableReader
from featurex_ray.table.store import Hook, ObjectStore

FACTS = TableFacts(
    name="t",
    revision="rev-1",
    dimension=4,
    extractor={"name": "fake", "precision": "fp32"},
    carried=pa.schema([("label", pa.string())]),
)


@dataclass(frozen=True)
class World:
    """A manifest of `num_samples` samples, every third a video of two units and four clips."""

    num_samples: int = 12
    datasets: tuple[str, ...] = ("d",)
    version: str | None = None
    failing: frozenset[str] = frozenset()
    day: date | None = None

    def samples(self) -> Iterator[pa.RecordBatch]:
        """In an order that is not that of the ids."""
        rows = [
            {
                "dataset": dataset,
                "sample_id": name,
                "uri": f"u/{name}",
                "version": self.version,
                "label": name[-1],
                "backfill_day": self.day,
            }
            for dataset in self.datasets
            for name in reversed([f"s{i:04d}" for i in range(self.num_samples)])
        ]
        for start in range(0, len(rows), 5):
            yield pa.RecordBatch.from_pylist(rows[start : start + 5], schema=FACTS.sample_schema)

    def part(self, ids: Iterable[str], *, run_id: str = "run", etag: str = "e") -> pa.Table:
        """What extracting these samples gives, in `schemas.PART`."""
        rows = [row for name in ids for row in self._rows(name, run_id, etag)]
        return pa.Table.from_pylist(rows, schema=schemas.PART)

    def _rows(self, name: str, run_id: str, etag: str) -> Iterator[dict[str, object]]:
        number = int(name[1:])
        num_units = 2 if number % 3 == 0 else 1
        common = {"sample_id": name, "num_units": num_units, "etag": etag, "run_id": run_id, "attempts": 1}
        for unit in range(num_units):
            if name in self.failing and unit == num_units - 1:
                yield common | {
                    "unit_index": unit,
                    "stage": "decode",
                    "error": "truncated",
                    "message": "broke off",
                }
                continue
            clips = range(unit * 2, unit * 2 + 2) if num_units == 2 else range(1)
            for clip in clips:
                yield common | {
                    "unit_index": unit,
                    "media_type": "video" if num_units == 2 else "image",
                    "clip_index": clip,
                    "num_clips": 4 if num_units == 2 else 1,
                    "width": 8,
                    "height": 6,
                    "media_complete": True,
                    "feature": [float(number), float(clip), float(len(self.version or "")), 1.0],
                    "media_sha256": f"sha-{name}",
                }

    def expected(self) -> tuple[list[tuple[str, str, int]], list[tuple[str, str]]]:
        """(dataset, sample, clip) of the features and (dataset, sample) of the failures."""
        features, failures = [], []
        for dataset in self.datasets:
            for name in [f"s{i:04d}" for i in range(self.num_samples)]:
                if name in self.failing:
                    failures.append((dataset, name))
                else:
                    features += [(dataset, name, clip) for clip in range(4 if int(name[1:]) % 3 == 0 else 1)]
        return features, failures


def run(table: FeatureTable, world: World, *, run_id: str = "run", per_plan: int = 5) -> int:
    """A run, as the pipeline makes it: how many plans it worked on."""
    table.finish_published()
    num_plans = 0
    while plans := table.plan(world.samples, run_id=run_id, max_samples_per_plan=per_plan):
        for plan in plans:
            stage(table, plan, world, run_id=run_id)
            table.publish(plan)
        num_plans += len(plans)
    return num_plans


def stage(table: FeatureTable, plan: Plan, world: World, *, run_id: str = "run", per_part: int = 3) -> None:
    """Stages what is missing of a plan."""
    missing = sorted(table.missing(plan))
    for start in range(0, len(missing), per_part):
        table.write_part(plan, world.part(missing[start : start + per_part], run_id=run_id))


def content(table: FeatureTable) -> tuple[list[tuple[str, str, int]], list[tuple[str, str]]]:
    """What `World.expected` says should be there, read by a plain reader."""
    reader = TableReader(table.store, table.facts)
    features = reader.to_arrow(["dataset", "sample_id", "clip_index"]).to_pylist()
    failures = reader.failures().select(["dataset", "sample_id"]).to_pylist()
    return sorted(tuple(row.values()) for row in features), sorted(tuple(row.values()) for row in failures)


def observed(store: ObjectStore, hook: Hook | None) -> ObjectStore:
    """The same store, with a hook on its seam."""
    return replace(store, on_operation=hook)  # type: ignore[type-var]


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output on local disk, and one on S3."""
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_root")


@pytest.fixture
def store(root: str) -> ObjectStore:
    return open_store(root)


@pytest.fixture
def table(store: ObjectStore) -> FeatureTable:
    return FeatureTable.open_or_create(store, FACTS)


@pytest.fixture
def local_table(tmp_path: Path) -> FeatureTable:
    return FeatureTable.open_or_create(open_store(str(tmp_path / "out")), FACTS)


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits: nothing after it runs, nothing catches it."""


def kill_at(n: int) -> tuple[Hook, Callable[[], int]]:
    """A hook that raises at the n-th moment, and a count of the moments so far."""
    moments = 0

    def hook(operation: str, moment: str, key: str) -> None:
        nonlocal moments
        moments += 1
        if moments == n:
            raise Killed(f"{moment} {operation} {key}")

    return hook, lambda: moments


def public_etags(store: ObjectStore, names: Collection[str] = ("t/", "t.failures/")) -> dict[str, str | None]:
    """The ETag of every public object."""
    return {item.key: store.head(item.key) for name in names for item in store.list(name)}
