"""Days, templates, budgets; and backfills that overlap, repeat and stop."""

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featurex_ray as fx
from featurex_ray.errors import ManifestError, NoManifestError, RequestError
from featurex_ray.pipeline.agenda import Budget
from featurex_ray.pipeline.backfill import Days, _Later, backfill, fill, read_days
from featurex_ray.table.log import Plan
from featurex_ray.table.verify import verify_table

JANUARY = Days(date(2026, 1, 1), date(2026, 1, 3))


def test_days() -> None:
    assert list(Days.parse("2026-02-27", "2026-03-01", None)) == [
        date(2026, 2, 27),
        date(2026, 2, 28),
        date(2026, 3, 1),
    ]
    recent = Days.parse(None, None, "3d")
    assert (recent.last - recent.first).days == 2
    assert abs((recent.last - datetime.now(UTC).date()).days) <= 1


@pytest.mark.parametrize(
    ("first", "last", "recent", "message"),
    [
        (None, None, None, "give --from D --to D, or --last"),
        ("2026-01-01", None, None, "give --from D --to D, or --last"),
        ("2026-01-01", "2026-01-02", "3d", "give --from D --to D, or --last"),
        ("2026-01-02", "2026-01-01", None, "lies before --from"),
        ("01.02.2026", "2026-01-01", None, "--from '01.02.2026' is not a date"),
        (None, None, "0d", "--last '0d'"),
        (None, None, "3 weeks", "--last '3 weeks'"),
    ],
)
def test_days_fails(first: str | None, last: str | None, recent: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Days.parse(first, last, recent)


def test_fill() -> None:
    day = date(2026, 1, 5)
    assert fill("s3://b/dt={date}/*.parquet", day) == "s3://b/dt=2026-01-05/*.parquet"
    assert fill("{year}/{month}/{day}.csv", day) == "2026/01/05.csv"


@pytest.mark.parametrize(
    ("template", "message"), [("m.csv", "no day"), ("{hour}.csv", "{hour}"), ("{month}", "no day")]
)
def test_fill_fails(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fill(template, date(2026, 1, 5))


@pytest.mark.parametrize(
    ("text", "budget"),
    [("500", (500, None)), ("20,000", (20000, None)), ("1.5h", (None, 5400)), ("90m", (None, 5400))],
)
def test_budget(text: str, budget: tuple[int | None, float | None]) -> None:
    found = Budget.parse(text)
    assert (found.samples, found.seconds) == budget


@pytest.mark.parametrize("text", ["0", "", "soon", "-3", "1.5", "3d"])
def test_budget_fails(text: str) -> None:
    with pytest.raises(RequestError, match="--budget"):
        Budget.parse(text)


def test_budget_of_time_grows_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("featurex_ray.pipeline.agenda.time.monotonic", lambda: now)
    budget = Budget(seconds=1000, started=0.0)
    first = budget.left
    budget.done, now = first, 10.0
    assert budget.left == pytest.approx(first / 10 * 990 * 0.8, abs=1)
    now = 960.0
    assert budget.left == 0


def test_budget_takes_whole_plans() -> None:
    plans = [Plan("d", n, n, "new", 10, "", (), "r", "") for n in range(4)]
    assert len(Budget(samples=25).take(plans)) == 2
    assert len(Budget(samples=5).take(plans)) == 1
    assert Budget(samples=5, done=5).take(plans) == []


def write_day(folder: Path, day: int, rows: dict[Path, str], **more: Any) -> None:
    lines = [json.dumps({"uri": str(uri), "version": v, "dataset": "d", **more}) for uri, v in rows.items()]
    (folder / f"2026-01-{day:02d}.jsonl").write_text("\n".join(lines))


def job(folder: Path, output: Path, **changes: Any) -> fx.ExtractionJob:
    plain = {"extractor": "attention_convnet", "extract_actors": "1", "decode_actors": "1"}
    return fx.ExtractionJob(manifest=f"{folder}/{{date}}.jsonl", output=str(output), **(plain | changes))


@pytest.fixture
def pictures(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"))


def test_the_latest_day_wins(pictures: list[Path], tmp_path: Path) -> None:
    write_day(tmp_path, 1, dict.fromkeys(pictures[:4], "1"), label="old")
    write_day(tmp_path, 3, dict.fromkeys(pictures[2:6], "3"), label="new")
    merged = read_days(job(tmp_path, tmp_path / "out"), JANUARY)
    rows = [row for batch in merged.batches() for row in batch.to_pylist()]
    assert merged.num_samples == len(rows) == 6
    assert merged.missing == (date(2026, 1, 2),)
    found = {row["uri"]: (row["version"], row["label"], row["backfill_day"].day) for row in rows}
    assert found == {
        str(uri): ("1", "old", 1) if n < 2 else ("3", "new", 3) for n, uri in enumerate(pictures[:6])
    }


def test_a_year_of_days_is_looked_up_in_few_indexes() -> None:
    later, chance = _Later(), np.random.default_rng(3)
    everything = chance.integers(0, 2**63, (20_000, 2), np.uint64)
    had = np.zeros(len(everything), bool)
    for _ in range(365):
        chosen = chance.choice(len(everything), chance.integers(0, 100), replace=False)
        is_latest = later.lacks(everything[chosen])
        np.testing.assert_array_equal(is_latest, ~had[chosen])
        later.add(everything[chosen][is_latest])
        had[chosen] = True
    assert len(later._indexes) <= 12


def test_a_day_that_is_written_again_meanwhile(pictures: list[Path], tmp_path: Path) -> None:
    """Which rows are the latest is what the days hold by then."""
    write_day(tmp_path, 1, dict.fromkeys(pictures[:4], "1"))
    write_day(tmp_path, 3, dict.fromkeys(pictures[2:6], "3"))
    merged = read_days(job(tmp_path, tmp_path / "out"), JANUARY)
    assert merged.num_samples == 6
    write_day(tmp_path, 3, dict.fromkeys(reversed(pictures[1:8]), "3"))
    found = [(row["uri"], row["version"]) for batch in merged.batches() for row in batch.to_pylist()]
    assert sorted(found) == [(str(uri), "1" if n < 1 else "3") for n, uri in enumerate(pictures[:8])]


def test_carried_columns_of_several_days(pictures: list[Path], tmp_path: Path) -> None:
    write_day(tmp_path, 1, dict.fromkeys(pictures[:1], "1"), label=7)
    write_day(tmp_path, 2, dict.fromkeys(pictures[1:2], "1"), label="seven")
    write_day(tmp_path, 3, dict.fromkeys(pictures[2:3], "1"))
    merged = read_days(job(tmp_path, tmp_path / "out"), JANUARY)
    assert [row["label"] for batch in merged.batches() for row in batch.to_pylist()] == [None, "seven", "7"]


def test_missing_days_fails(pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(NoManifestError, match="nothing to do: no manifest for 2026-01-01, 2026-01-02"):
        read_days(job(tmp_path, tmp_path / "out"), JANUARY)
    write_day(tmp_path, 1, dict.fromkeys(pictures[:1], "1"))
    (tmp_path / "2026-01-02.jsonl").write_text("")  # a day that brought nothing
    assert len(read_days(job(tmp_path, tmp_path / "out"), JANUARY).missing) == 2
    with pytest.raises(NoManifestError, match="--require-all: no manifest for 2026-01-02, 2026-01-03"):
        read_days(job(tmp_path, tmp_path / "out"), JANUARY, require_all=True)
    (tmp_path / "2026-01-02.jsonl").write_text("not json")
    with pytest.raises(ManifestError, match=r"2026-01-02\.jsonl"):
        read_days(job(tmp_path, tmp_path / "out"), JANUARY)


@pytest.mark.usefixtures("local_ray")
def test_backfills_that_overlap_come_to_the_same_table(pictures: list[Path], tmp_path: Path) -> None:
    """In any order, repeated, and with an old day after a new one."""
    write_day(tmp_path, 1, dict.fromkeys(pictures[:5], "1"))
    write_day(tmp_path, 2, dict.fromkeys(pictures[3:8], "2"))
    write_day(tmp_path, 3, dict.fromkeys(pictures[6:12], "3"))

    def days(first: int, last: int) -> Days:
        return Days(date(2026, 1, first), date(2026, 1, last))

    tables = []
    for name, ranges in {
        "whole": [(1, 3)],
        "backwards": [(3, 3), (1, 2), (2, 3)],
    }.items():
        for first, last in ranges:
            backfill(job(tmp_path, tmp_path / name), days(first, last))
        assert backfill(job(tmp_path, tmp_path / name), days(1, 3)).planned == 0
        uri = str(tmp_path / name / "attention_convnet")
        assert verify_table(uri).ok
        rows = fx.open_table(uri).to_arrow(["sample_id", "version", "feature"])
        tables.append(rows.sort_by("sample_id"))
    assert tables[0]["version"].to_pylist() == ["1"] * 3 + ["2"] * 3 + ["3"] * 6
    assert tables[0].drop(["feature"]).equals(tables[1].drop(["feature"]))
    # Batches of other sizes may be added up in another order.
    features = [np.stack(table["feature"].to_pylist()) for table in tables]
    np.testing.assert_allclose(*features, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.long
def test_a_budget_stops_at_a_plans_end(pictures: list[Path], tmp_path: Path) -> None:
    write_day(tmp_path, 1, dict.fromkeys(pictures, "1"))
    left = []
    for _ in range(3):
        report = backfill(
            job(tmp_path, tmp_path / "out", max_samples_per_plan=3), JANUARY, budget=Budget(samples=5)
        )
        left.append((report.planned, report.tables[0].left))
        assert verify_table(str(tmp_path / "out" / "attention_convnet")).ok
    assert left == [(5, 7), (5, 2), (2, 0)]
    in_time = backfill(job(tmp_path, tmp_path / "timed"), JANUARY, budget=Budget(seconds=3600))
    assert (in_time.planned, in_time.tables[0].left) == (12, 0)
