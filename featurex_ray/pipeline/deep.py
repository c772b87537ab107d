"""`verify --deep`: samples of a table, chosen at random, are extracted again and compared.

Without Ray, in this process, in fp32: what a reduced precision may make of a feature is allowed for.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurex_ray.media.sampling import Sampling
from featurex_ray.models.recorded import resolve_recorded
from featurex_ray.pipeline.decode import CutUnits, DecodeMedia, DecodeSettings
from featurex_ray.pipeline.extract import ExtractFeatures, ExtractSettings
from featurex_ray.pipeline.units import PLANNED
from featurex_ray.pipeline.write import part_rows
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.layout import numbered
from featurex_ray.table.log import open_parquet, open_plan, read_log
from featurex_ray.table.read import TableReader
from featurex_ray.table.store import ObjectStore
from featurex_ray.table.verify import VerifyReport

TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
"""How far a feature may be from the one that is recorded, as a part of its length."""

UNREADABLE = {"not_found", "forbidden", "timeout", "unavailable", "refused_uri"}

BEYOND_LIMITS = "too_large"
"""Of the default limits: tables don't record those that they were made with, which may have been wider."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """A sample that was chosen, as the table has it.

    Args:
        dataset: Its dataset.
        number: The object that holds it.
        sample_id: Its name.
        clips: Its rows, in order.
    """

    dataset: str
    number: int
    sample_id: str
    clips: list[Row]


def verify_deep(
    table: TableReader,
    report: VerifyReport,
    *,
    policy: ReadPolicy,
    num_samples: int = 20,
    seed: int | None = None,
    weights: str | None = None,
) -> None:
    """Extracts some samples again and notes in the report what is not as recorded.

    Args:
        table: The table.
        report: Where findings go.
        policy: What may be read.
        num_samples: How many samples, at most.
        seed: For the same choice again.
        weights: Where the extractor's weights lie, if elsewhere by now.
    """
    chosen = choose_samples(table, num_samples, random.Random(seed))  # noqa: S311  a choice, not a secret
    again = _Extraction(table.facts, policy, weights=weights)
    for sample in chosen:
        planned = _planned_row(table.store, table.facts, sample)
        if planned is None:
            report.note("samples that no plan names", [_name(sample)])
            continue
        _compare(table.facts, sample, again(planned), report)
    if chosen and not report.checked["samples extracted again"]:
        report.note("no sample could be extracted again", [_name(sample) for sample in chosen])


def choose_samples(table: TableReader, num_samples: int, chance: random.Random) -> list[Recorded]:
    """Different samples, each about as likely as its clips are many; few reads, however large the table."""
    prefix = table.facts.keys.features
    objects = [item for item in table.store.list(prefix) if numbered(item.key, prefix)]
    found: dict[tuple[str, str], Recorded] = {}
    for _ in range(10 * num_samples if objects else 0):
        (item,) = chance.choices(objects, weights=[item.num_bytes for item in objects])
        sample = _random_sample(table.store, item.key, prefix, chance)
        if sample:
            found.setdefault((sample.dataset, sample.sample_id), sample)
        if len(found) == num_samples:
            break
    return list(found.values())


def _random_sample(store: ObjectStore, key: str, prefix: str, chance: random.Random) -> Recorded | None:
    place = numbered(key, prefix)
    with open_parquet(store, key) as (file, _):
        if place is None or not file.metadata.num_rows:
            return None
        groups = range(file.num_row_groups)
        (group,) = chance.choices(groups, weights=[file.metadata.row_group(n).num_rows for n in groups])
        ids = file.read_row_group(group, columns=["sample_id"])["sample_id"]
        name = ids[chance.randrange(len(ids))].as_py()
        return Recorded(*place, name, _clips_around(file, group, name))


def _clips_around(file: pq.ParquetFile, group: int, name: str) -> list[Row]:
    """A sample's rows: of the group that was hit, and of those beside it as far as they hold some."""
    found = {group: _clips_in(file, group, name)}
    for step in (-1, 1):
        beside = group + step
        while 0 <= beside < file.num_row_groups and (clips := _clips_in(file, beside, name)):
            found[beside] = clips
            beside += step
    return [row for number in sorted(found) for row in found[number]]


def _clips_in(file: pq.ParquetFile, group: int, name: str) -> list[Row]:
    rows = file.read_row_group(group)
    return list(rows.filter(pc.equal(rows["sample_id"], name)).to_pylist())


def _planned_row(store: ObjectStore, facts: TableFacts, sample: Recorded) -> pa.Table | None:
    """The sample's row of the last plan that changed its object and names it."""
    for number in reversed(read_log(store, facts).plans.get(sample.dataset, [])):
        with open_plan(store, facts, sample.dataset, number) as (plan, file):
            if plan.target != sample.number:
                continue
            rows = file.read().cast(facts.sample_schema)
        rows = rows.filter(pc.equal(rows["sample_id"], sample.sample_id))
        if rows.num_rows:
            return rows
    return None


class _Extraction:
    """The pipeline's stages, one after the other, over single samples."""

    def __init__(self, facts: TableFacts, policy: ReadPolicy, *, weights: str | None) -> None:
        made_with = facts.extractor
        resolved = resolve_recorded(made_with, weights=weights)
        clip = made_with["clip"] or (None, None)
        settings = DecodeSettings(
            policy=policy,
            inputs=(resolved.spec.input,),
            sampling=Sampling.parse(made_with["sampling"]),
            clip_seconds=clip[0],
            clip_stride_seconds=clip[1],
            # What a card decoded is compared on machines without one too, in a confined process.
            decoder=made_with["decoder"].replace("nvdec+", ""),
        )
        self._cut = CutUnits(settings) if clip[0] is not None else None
        self._decode = DecodeMedia(settings)
        self._extract = ExtractFeatures([ExtractSettings(resolved, 0, "fp32", None, 1, None)])

    def __call__(self, planned: pa.Table) -> list[Row]:
        """What staging would get of a planned sample: a row a clip, or the error."""
        zero = pa.array([0], pa.int32())
        samples = planned.append_column("assignment", zero).append_column("plan_row", zero)
        units = samples.select(PLANNED.names).cast(PLANNED)
        if self._cut:
            units = self._cut(units)
        rows: list[Row] = []
        for start in range(units.num_rows):  # one after the other, so that memory stays that of a unit
            extracted = self._extract(self._decode(units.slice(start, 1)))
            rows += part_rows(extracted, 0, run_id="deep").to_pylist()
        return rows


def _compare(facts: TableFacts, sample: Recorded, now: Sequence[Row], report: VerifyReport) -> None:
    errors = [row["error"] for row in now if row["error"] is not None]
    if errors and errors[0] in UNREADABLE:
        report.checked["samples whose media can't be read any more"] += 1
        return
    if errors and errors[0] == BEYOND_LIMITS and not _is_replaced(sample.clips, now):
        report.checked["samples whose media are too large for the default limits"] += 1
        return
    report.checked["samples extracted again"] += 1
    for problem in _differences(facts, sample.clips, now, errors):
        report.note(problem, [_name(sample)])
        return  # the first says why the others follow


def _differences(
    facts: TableFacts, before: Sequence[Row], now: Sequence[Row], errors: Sequence[str]
) -> Iterator[str]:
    if errors:
        yield f"samples with features that fail now ({errors[0]})"
    if {row["media_sha256"] for row in before} != {row["media_sha256"] for row in now}:
        yield "samples whose media was replaced since"
    times = ("clip_index", "num_clips", "start_seconds", "end_seconds", "frame_pts_seconds")
    if [[row[name] for name in times] for row in before] != [[row[name] for name in times] for row in now]:
        yield "samples whose clips are others now"
    old, new = (np.array([row["feature"] for row in rows], np.float64) for rows in (before, now))
    away = np.linalg.norm(old - new, axis=1) / np.maximum(np.linalg.norm(old, axis=1), 1e-12)
    if away.max(initial=0.0) > TOLERANCE[facts.extractor["precision"]]:
        yield "samples whose features are others now"


def _is_replaced(before: Sequence[Row], now: Sequence[Row]) -> bool:
    """Whether the media are known to be others; they are not known where they were not even fetched."""
    known = {row["media_sha256"] for row in now} - {None}
    return not known <= {row["media_sha256"] for row in before}


def _name(sample: Recorded) -> str:
    return f"{sample.dataset}/{sample.sample_id}"
