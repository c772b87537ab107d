"""One run from manifest to published tables: plan, execute, publish, report."""

import dataclasses
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import ray

from featurex_ray.errors import RequestError, RunError, StoreUnavailableError
from featurex_ray.job import ExtractionJob
from featurex_ray.pipeline import events, metrics
from featurex_ray.pipeline.agenda import Agenda, ManifestAgenda
from featurex_ray.pipeline.claims import Claims
from featurex_ray.pipeline.connect import connect, ray_as_found, refuse_local_store_on_many_hosts
from featurex_ray.pipeline.execute import Tracker, failed_units, run_pipeline
from featurex_ray.pipeline.preflight import ask_nodes
from featurex_ray.pipeline.progress import Progress, Silent
from featurex_ray.pipeline.publish import Publisher
from featurex_ray.pipeline.report import RunReport, TableReport, failures_by_code, versions
from featurex_ray.pipeline.request import Request, prepare
from featurex_ray.pipeline.source import Assignment, assignments_of
from featurex_ray.pipeline.tables import open_tables, preview
from featurex_ray.pipeline.work import rows_to_do, work_of
from featurex_ray.storage import redact, without_secrets
from featurex_ray.table.log import Plan
from featurex_ray.table.probe import probe_store
from featurex_ray.table.publish import Published
from featurex_ray.table.table import FeatureTable

POLL_SECONDS = 2.0
"""Between two looks at what other runs work on."""

PLANS_AT_ONCE = 8
"""Plans whose staged parts are listed at the same time."""


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Have Arrow let go of what it no longer needs, in the driver, which is to stay small.

    Its usual allocator keeps freed pages for the next time; the system's gives large ones back.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


@memory_given_back()
def run(job: ExtractionJob, *, progress: Progress | None = None, prune: bool = False) -> RunReport:
    """Do what a job asks and is not done yet.

    A run ends when every plan that names its samples is done, whoever made it. It may be
    killed at any moment and run again.

    Args:
        job: What to extract from what.
        progress: Told what happens meanwhile; silent by default.
        prune: Whether samples that left the manifest leave the table, of datasets that it names.

    Returns:
        Counts, rates and failures by code; also kept under `_featurex/`.

    Raises:
        RequestError: The request is wrong; nothing was written.
        RunError: The run failed and can be run again.
    """
    request = prepare(job)
    agenda = ManifestAgenda(request.manifest, job.max_samples_per_plan, prune=prune)
    return carry_out(request, agenda, progress or Silent())


def carry_out(request: Request, agenda: Agenda, progress: Progress) -> RunReport:
    """Do what an agenda asks for, until it asks for nothing more.

    Args:
        request: What was asked for, and found right.
        agenda: Which plans there are to see done.
        progress: Told what happens meanwhile.

    Raises:
        RequestError: The cluster or the store can't be used, or the table is another extractor's.
        RunError: The run failed and can be run again.
    """
    job, started = request.job, request.started
    progress.say(f"{request.manifest.num_samples:,} samples in {redact(job.manifest)}")
    with ray_as_found():
        if job.address or "RAY_ADDRESS" in os.environ or ray.is_initialized():
            connect(job)
            refuse_local_store_on_many_hosts(request.store)
            ask_nodes(request.store)
        probe_store(request.store)
        tables = open_tables(request)
        report = _new_report(request, tables)
        events.bind(run_id=report.run_id)
        claims = Claims(tables, report.run_id)
        with claims.beating():
            # Again after each round: other runs may have planned meanwhile what blocked ours.
            while assignments := _plan(tables, agenda, report, progress):
                _see_done(request, tables, assignments, claims, report, progress, started)
                agenda.worked(sum(assignment.num_samples for assignment in assignments))
        _close(request, tables, agenda, report)
        _collect(tables, report, progress)
    return report


def _close(request: Request, tables: Sequence[FeatureTable], agenda: Agenda, report: RunReport) -> None:
    for table, summary in zip(tables, report.tables, strict=True):
        summary.left = agenda.num_left(table)
        summary.skipped = max(request.manifest.num_samples - summary.planned, 0)
    report.close(request.started)
    for table in tables:
        table.save_report(report.run_id, report.to_json())


def _collect(tables: Sequence[FeatureTable], report: RunReport, progress: Progress) -> None:
    """Tidy up after a run whose work is done and reported: that it can't makes no failure of it."""
    for table, summary in zip(tables, report.tables, strict=True):
        if not (summary.planned or summary.pruned):
            continue
        try:
            table.collect()
        except (RequestError, StoreUnavailableError) as error:
            progress.say(f"what {summary.table} needs no more is left to a later run to collect: {error}")


def _see_done(
    request: Request,
    tables: Sequence[FeatureTable],
    assignments: Sequence[Assignment],
    claims: Claims,
    report: RunReport,
    progress: Progress,
    started: float,
) -> None:
    """Work on what no other run works on, and wait for the rest: never leave before all is done.

    Raises:
        RunError: Another run broke off, and left a plan of media that this one may not read.
    """
    waiting, said = list(assignments), 0
    fit: set[Plan] = set()  # of other runs
    refused: list[str] = []
    while waiting := claims.open_ones(waiting):
        unknown = [one for one in waiting if _is_anothers(one, report.run_id) and one.leader[1] not in fit]
        for one in claims.free_ones(unknown):
            if why := _refusal(request, tables, one):  # before it is claimed, and kept from who may do it
                refused.append(why)
                waiting.remove(one)
            else:
                fit.add(one.leader[1])
                unknown.remove(one)
        mine, others = claims.take([one for one in waiting if one not in unknown])
        waiting = [*others, *(one for one in waiting if one in unknown)]
        if mine:
            connect(request.job)
            _execute(request, tables, mine, report, progress, started)
        elif len(waiting) != said:
            said = len(waiting)
            progress.say(f"waiting for {said} plans that other runs work on")
        else:
            time.sleep(POLL_SECONDS)
    if refused:
        raise RunError(refused[0])


def _is_anothers(assignment: Assignment, run_id: str) -> bool:
    _, plan = assignment.leader
    return plan.run_id != run_id and plan.kind != "prune"


def _refusal(request: Request, tables: Sequence[FeatureTable], assignment: Assignment) -> str | None:
    """Why another run's plan is left as it is: it names what this run may not read; None if it doesn't.

    To do it would be to fail its samples, which are none of this run's, for all.
    """
    index, plan = assignment.leader
    rows = tables[index].read_plan(plan, columns=["uri", "data_file"])
    uris = pc.coalesce(rows["data_file"], rows["uri"])
    unclear = uris.filter(pc.invert(request.policy.plainly_allowed(uris))).to_pylist()
    refusal = next(filter(None, map(request.policy.refusal, unclear)), None)
    return refusal and (
        f"run {plan.run_id} broke off, and its plan {plan.plan_id} holds samples of this manifest "
        f"beside others that this run may not read: {refusal}. Run that one again, or widen this"
    )


def plan_only(job: ExtractionJob, *, prune: bool = False) -> list[str]:
    """What a run would do, as lines; nothing is written.

    Raises:
        RequestError: The request is wrong.
    """
    request = prepare(job)
    return preview(request, prune=prune)


def new_run_id() -> str:
    """A name for a run that sorts by time, such as `20260102T030405-1a2b3c`."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _new_report(request: Request, tables: Sequence[FeatureTable]) -> RunReport:
    reports = [
        TableReport(
            table=table.facts.name,
            extractor=name,
            revision=table.facts.revision,
            weights=resolved.spec.to_json()["weights"],
            precision=table.facts.extractor["precision"],
            decoder=table.facts.extractor["decoder"],
        )
        for table, name, resolved in zip(tables, request.job.extractors, request.extractors, strict=True)
    ]
    return RunReport(
        run_id=new_run_id(),
        job=without_secrets(dataclasses.asdict(request.job)),
        tables=reports,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def _plan(
    tables: Sequence[FeatureTable], agenda: Agenda, report: RunReport, progress: Progress
) -> list[Assignment]:
    """Ask for each table's plans; those over the very same samples become one assignment."""
    found = []
    for table in tables:
        table.finish_published()
        plans = agenda.plans(table, run_id=report.run_id)
        found.append(plans)
        if planned := sum(plan.num_samples for plan in plans):
            in_plans = f"{len(plans)} plan{'' if len(plans) == 1 else 's'}"
            progress.say(f"{table.facts.name}: {planned:,} samples to do, in {in_plans}")
    return assignments_of(found)


def _execute(
    request: Request,
    tables: Sequence[FeatureTable],
    assignments: Sequence[Assignment],
    report: RunReport,
    progress: Progress,
    started: float,
) -> None:
    """Stage what is not staged, and publish each plan as soon as it is whole."""
    with ThreadPoolExecutor(PLANS_AT_ONCE) as threads:
        todo = list(threads.map(lambda assignment: rows_to_do(tables, assignment), assignments))
    work = work_of(request, tables, assignments, todo, report.run_id)
    writers = work.deployment.write.size.maximum
    publisher = Publisher(tables, assignments, report.run_id, num_actors=min(len(assignments), writers))
    tracker = Tracker(todo, num_tables=len(tables))
    for number, left in enumerate(tracker.left):
        if left == 0:
            publisher.submit(number)
    progress.begin(sum(tracker.left))
    metrics.show("featurex_samples_left", sum(tracker.left))
    try:
        for staged in run_pipeline(work, report.watched) if work.slices else ():
            report.startup_seconds = report.startup_seconds or time.monotonic() - started
            report.count(staged)
            samples, whole = tracker.add(staged)
            report.watched.samples += samples
            failed = int(failed_units(staged).sum())
            clips = pc.sum(staged["num_unit_clips"]).as_py() or 0
            progress.advance(samples=samples, clips=clips, failed=failed)
            metrics.count("featurex_samples_total", samples)
            metrics.show("featurex_samples_left", sum(tracker.left))
            for number in whole:
                publisher.submit(number)
    finally:
        progress.end()  # also when stopped: a bar hides the terminal's cursor
    if any(tracker.left):
        raise RunError(f"{sum(tracker.left)} samples were not staged; run it again to go on")
    _count_published(publisher.wait(), tracker, report)


def _count_published(
    published: Sequence[tuple[int, Plan, Published]], tracker: Tracker, report: RunReport
) -> None:
    for index, plan, result in published:
        table = report.tables[index]
        if plan.kind == "prune":
            table.pruned += plan.num_samples
            continue
        table.planned += plan.num_samples
        table.done += result.num_samples
        table.failed += result.num_failed
        table.num_rows += result.num_rows
        table.objects.append(result.key)
    for table, codes in zip(report.tables, tracker.codes, strict=True):
        table.failures_by_code = failures_by_code([*codes.values()], before=table.failures_by_code)
