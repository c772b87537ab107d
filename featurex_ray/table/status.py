"""What goes on below an output: runs that were, and plans that are open, from `_featurex/` alone."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from featurex_ray.errors import TableNotFoundError
from featurex_ray.table.log import Plan
from featurex_ray.table.store import PRIVATE, Listed, ObjectStore, open_store
from featurex_ray.table.table import FeatureTable


@dataclass(frozen=True)
class PastRun:
    """A run that came to its end; its report has more.

    Args:
        run_id: Its name.
        tables: What it wrote to.
        started_at: When, in UTC.
        seconds: How long it took.
        planned: Samples of its plans, over all tables.
        failed: Of these, samples that became failure rows.
        clips_per_second: Over the whole run.
        bounded_by: The stage that held it up most, and for what share of its time.
    """

    run_id: str
    tables: str
    started_at: str
    seconds: float
    planned: int
    failed: int
    clips_per_second: float
    bounded_by: str

    @classmethod
    def from_report(cls, report: dict[str, Any]) -> "PastRun":
        """The run of a report as it is kept."""
        bounds = report.get("watched", {}).get("bounds", {})
        return cls(
            run_id=report["run_id"],
            tables=", ".join(table["table"] for table in report["tables"]),
            started_at=report["started_at"],
            seconds=report["seconds"],
            planned=report["planned"],
            failed=report["failed"],
            clips_per_second=report["clips_per_second"]["run"],
            bounded_by=next((f"{name} {share:.0%}" for name, share in bounds.items()), ""),
        )


@dataclass(frozen=True)
class OpenPlan:
    """A plan that is not done: somebody works on it, or a run ended before its end.

    Args:
        table: Whose.
        plan_id: Its number.
        dataset: Whose samples.
        planned_by: The run that made it.
        samples: How many it has.
        staged: How many of them need no more work.
        worked_on_by: The run whose lease it is, None where nobody ever took one.
        seconds_since_beat: How long ago that run's counter moved, by this machine's clock and the store's.
    """

    table: str
    plan_id: str
    dataset: str
    planned_by: str
    samples: int
    staged: int
    worked_on_by: str | None
    seconds_since_beat: float | None


@dataclass(frozen=True)
class Status:
    """What `featurex status` shows."""

    open_plans: list[OpenPlan]
    runs: list[PastRun]


def status_of(output: str, *, most_runs: int = 20) -> Status:
    """Look at an output; needs the store and no cluster.

    Args:
        output: As given to `extract`.
        most_runs: How many past runs, the latest first.

    Raises:
        TableNotFoundError: No table was ever begun there.
    """
    store = open_store(output)
    listed = {item.key: item for item in store.list(PRIVATE)}
    names = sorted({key.split("/")[1] for key in listed if key.endswith("/table.json")})
    if not names:
        raise TableNotFoundError(f"{store.uri} holds no feature table")
    tables = [FeatureTable.open(store, name) for name in names]
    return Status(
        open_plans=[_open_plan(table, plan, listed) for table in tables for plan in table.open_plans()],
        runs=list(_runs(store, listed, most_runs)),
    )


def _runs(store: ObjectStore, listed: dict[str, Listed], most: int) -> Iterator[PastRun]:
    # A run that filled several tables left its report with each; run ids sort by time.
    by_id = {key.rpartition("/")[2]: key for key in listed if key.split("/")[2:-1] == ["runs"]}
    for name in sorted(by_id, reverse=True)[:most]:
        yield PastRun.from_report(json.loads(store.read(by_id[name])[0]))


def _open_plan(table: FeatureTable, plan: Plan, listed: dict[str, Listed]) -> OpenPlan:
    owner = _owner(table, plan)
    beat = None if owner is None else listed.get(table.facts.keys.beat(owner))
    age = None if beat is None else (datetime.now(UTC) - beat.modified).total_seconds()
    return OpenPlan(
        table=table.facts.name,
        plan_id=plan.plan_id,
        dataset=plan.dataset,
        planned_by=plan.run_id,
        samples=plan.num_samples,
        staged=len(table.staged_samples(plan)),
        worked_on_by=owner,
        seconds_since_beat=None if age is None else round(max(age, 0.0), 1),
    )


def _owner(table: FeatureTable, plan: Plan) -> str | None:
    """The run whose lease the plan is."""
    try:
        body, _ = table.store.read(table.facts.keys.lease(plan.dataset, plan.number))
    except FileNotFoundError:
        return None
    return str(json.loads(body)["owner"])
