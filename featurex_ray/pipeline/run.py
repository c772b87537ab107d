"""One run from manifest to published tables: prepare, plan, execute, publish, report."""

import dataclasses
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from featurex_ray.contained import ProcessLimits
from featurex_ray.errors import RequestError, RunError, StoreUnavailableError, TableNotFoundError
from featurex_ray.job import ExtractionJob
from featurex_ray.manifest import read_manifest
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import resolve_policy
from featurex_ray.models.precision import resolve_precision
from featurex_ray.models.registry import ResolvedExtractor, resolve
from featurex_ray.pipeline import events, metrics
from featurex_ray.pipeline.agenda import Agenda, ManifestAgenda, SampleSet
from featurex_ray.pipeline.claims import Claims
from featurex_ray.pipeline.connect import connect, hosts, refuse_local_store_on_many_hosts
from featurex_ray.pipeline.decode import DecodeSettings
from featurex_ray.pipeline.deploy import (
    SMALL_TASK_CPUS,
    block_shape,
    cluster_resources,
    deploy,
    most_actors,
    store_bytes_per_cpu,
)
from featurex_ray.pipeline.execute import Tracker, Work, failed_units, first_line, run_pipeline
from featurex_ray.pipeline.extract import ExtractSettings
from featurex_ray.pipeline.preflight import ask_nodes
from featurex_ray.pipeline.progress import Progress, Silent
from featurex_ray.pipeline.publish import PUBLISHING_THREADS, PublishPlans
from featurex_ray.pipeline.report import RunReport, TableReport, failures_by_code, versions
from featurex_ray.pipeline.source import Assignment, assignments_of, slices_of
from featurex_ray.pipeline.threads import threads_of
from featurex_ray.storage import ReadPolicy, redact, without_secrets
from featurex_ray.table.facts import TableFacts, read_facts
from featurex_ray.table.log import Plan
from featurex_ray.table.probe import probe_store
from featurex_ray.table.publish import Published
from featurex_ray.table.store import ObjectStore, open_store
from featurex_ray.table.table import FeatureTable

POLL_SECONDS = 2.0
"""Between two looks at what other runs work on."""

PUBLISH_TRIES = 30
"""Of a call that loses its actor, whichever of the actor's calls brought that down."""

PLANS_AT_ONCE = 8
"""Plans whose staged parts are listed at the same time."""

SAMPLES_LOOKED_AT = 128
"""Of each of a few plans, to see of what kind the media are."""


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


@dataclass(frozen=True)
class Request:
    """A job whose inputs were found and found right; nothing is written yet."""

    job: ExtractionJob
    policy: ReadPolicy
    manifest: SampleSet
    store: ObjectStore
    extractors: tuple[ResolvedExtractor, ...]
    sampling: Sampling
    started: float  # monotonic


def prepare(job: ExtractionJob, manifest: SampleSet | None = None) -> Request:
    """Read and check all that a job names.

    Args:
        job: What to extract from what.
        manifest: Its manifest's samples, where they have been read and checked already.

    Raises:
        RequestError: The manifest, an extractor, its weights or the output can't be used.
    """
    started = time.monotonic()
    extractors = tuple(resolve(name, weights=job.weights_of(name)) for name in job.extractors)
    sampling = _sampling(job, extractors)
    store = open_store(job.output)
    policy = ReadPolicy(job.manifest, allow_prefixes=job.allow_prefix, only_prefixes=job.only_prefix)
    if manifest is None:
        manifest = read_manifest(
            job.manifest, dataset=job.dataset, keep_columns=job.keep_columns, policy=policy
        )
    return Request(job, policy, manifest, store, extractors, sampling, started)


def _sampling(job: ExtractionJob, extractors: Sequence[ResolvedExtractor]) -> Sampling:
    """Decoding once means one sampling for all extractors of a run."""
    if job.sampling is not None:
        return Sampling.parse(job.sampling)
    wanted = {e.spec.default_sampling for e in extractors}
    if len(wanted) > 1:
        each = ", ".join(f"{e.spec.name} {e.spec.default_sampling}" for e in extractors)
        raise RequestError(f"these extractors sample differently by default ({each}): give --sampling")
    return Sampling.parse(wanted.pop())


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
        tables = _open_tables(request)
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


def preview(request: Request, *, prune: bool = False) -> list[str]:
    """What carrying out a request would do, as lines; nothing is written."""
    lines = [f"{request.manifest.num_samples:,} samples in {redact(request.job.manifest)}, refused 0"]
    for index, extractor in enumerate(request.job.extractors):
        name = request.job.table_of(extractor)
        lines.append(f"  {name}: {_preview(request, index, name, prune=prune)}")
    return lines


def _preview(request: Request, index: int, name: str, *, prune: bool) -> str:
    recorded = _recorded(request.store, name)
    if not recorded:
        return f"new {request.manifest.num_samples:,} (the table will be created)"
    facts = _facts(request, index, name, **_settled(request.job, recorded))
    table = FeatureTable.open_or_create(request.store, facts)
    work = table.compare(request.manifest.batches)
    gone = f", to be pruned {table.num_gone(request.manifest.batches):,}" if prune else ""
    return (
        f"new {work.new:,}, changed {work.changed:,}, done {work.done:,}, "
        f"failed before {work.failed:,}, in open plans {work.open:,}{gone}"
    )


@contextmanager
def ray_as_found() -> Iterator[None]:
    """Leave Ray as it was found: a cluster that this run started ends with it."""
    was_there = ray.is_initialized()
    try:
        yield
    finally:
        if not was_there and ray.is_initialized():
            ray.shutdown()


def _open_tables(request: Request) -> list[FeatureTable]:
    """The table of each extractor. Those that are there come first: what they refuse leaves nothing made."""
    names = [request.job.table_of(extractor) for extractor in request.job.extractors]
    is_new = [not _recorded(request.store, name) for name in names]
    if any(is_new):
        connect(request.job)
        nvdec = "nvdec" in request.job.decoder
        deploy(request.job, cluster_resources(request.job), most=1, decodes_on_gpu=nvdec)  # or refuse
    opened = {index: _open_table(request, index) for index in np.argsort(is_new, kind="stable").tolist()}
    return [opened[index] for index in range(len(names))]


def _open_table(request: Request, index: int) -> FeatureTable:
    """The table of one extractor; what is `auto` is resolved when it is made, and kept."""
    job = request.job
    name = job.table_of(job.extractors[index])
    settled = _settled(job, _recorded(request.store, name))
    if settled["precision"] == "auto":
        connect(job)
        settled["precision"] = _ask_precision(job)
    return FeatureTable.open_or_create(request.store, _facts(request, index, name, **settled))


def _settled(job: ExtractionJob, recorded: dict[str, Any]) -> dict[str, str]:
    """Precision and decoder: as asked for, else as recorded with the table."""
    precision = job.precision if job.precision != "auto" else recorded.get("precision", "auto")
    decoder: DecoderPolicy = job.decoder if job.decoder != "auto" else recorded.get("decoder", "auto")
    if "nvdec" in decoder and job.isolation != "none":
        raise RequestError("--decoder nvdec needs --isolation none: CUDA can't run in a confined process")
    return {"precision": precision, "decoder": resolve_policy(decoder)}


def _recorded(store: ObjectStore, name: str) -> dict[str, Any]:
    """What a table was made with; nothing where there is none."""
    try:
        return read_facts(store, name).extractor
    except TableNotFoundError:
        return {}


def _ask_precision(job: ExtractionJob) -> str:
    """What `auto` precision is on the hardware that will extract."""
    gpus = 1 if cluster_resources(job).get("GPU", 0) >= 1 and job.gpus_per_extract_actor != 0 else 0
    has_workers = bool(ray.cluster_resources().get("CPU"))
    if not gpus and has_workers and hosts() == {socket.gethostname()}:
        return auto_precision(False)  # this very CPU; a worker would only take its time
    # Where there is no worker yet, it is the reserved CPU that brings one.
    ask = ray.remote(num_cpus=0 if has_workers else 1, num_gpus=gpus)(auto_precision)
    return ray.get(ask.remote(gpus > 0))


def auto_precision(gpu: bool) -> str:
    """`resolve_precision` as a plain function of one argument, for a Ray task."""
    return resolve_precision("auto", gpu=gpu)


def _facts(request: Request, index: int, name: str, *, precision: str, decoder: str) -> TableFacts:
    job, spec = request.job, request.extractors[index].spec
    clip = None if job.clip_seconds is None else [job.clip_seconds, job.clip_stride_seconds]
    sampling = str(request.sampling)
    revision = spec.revision(sampling=sampling, clip=clip, precision=precision, decoder=decoder)
    made_with = {"sampling": sampling, "clip": clip, "precision": precision, "decoder": decoder}
    return TableFacts(
        name=name,
        revision=revision,
        dimension=spec.dimension,
        extractor=spec.to_json() | made_with,
        carried=request.manifest.carried,
    )


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
        todo = list(threads.map(lambda assignment: _todo(tables, assignment), assignments))
    work = _work(request, tables, assignments, todo, report.run_id)
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


def _todo(tables: Sequence[FeatureTable], assignment: Assignment) -> np.ndarray:
    """(N,) bool, one a row of the assignment's plans: some table lacks it."""
    leading, leader = assignment.leader
    todo = np.zeros(leader.num_samples, bool)
    for index, plan in assignment.plans.items():
        if plan.kind == "prune" or tables[index].is_done(plan):
            continue
        staged = tables[index].staged_samples(plan)
        if not staged:
            return np.ones(leader.num_samples, bool)
        ids = tables[leading].read_plan(leader, columns=["sample_id"])["sample_id"]
        todo |= ~pc.is_in(ids, value_set=pa.array(sorted(staged), pa.string())).to_numpy()
    return todo


def _work(
    request: Request,
    tables: Sequence[FeatureTable],
    assignments: Sequence[Assignment],
    todo: Sequence[np.ndarray],
    run_id: str,
) -> Work:
    num_samples = sum(int(mask.sum()) for mask in todo)
    cluster = cluster_resources(request.job)
    first = _some_samples(tables, assignments)
    windowed = request.job.clip_seconds is not None
    inputs = tuple(dict.fromkeys(e.spec.input for e in request.extractors))
    shape = block_shape(
        first,
        num_samples=num_samples,
        windowed=windowed,
        resources=cluster,
        store_bytes=store_bytes_per_cpu(),
        frame_bytes=sum(spec.frame_bytes for spec in inputs),
    )
    slices = [
        part for number, mask in enumerate(todo) for part in slices_of(number, mask, num_rows=shape.samples)
    ]
    most = most_actors(shape, num_samples=num_samples, windowed=windowed)
    decoder: DecoderPolicy = tables[0].facts.extractor["decoder"]
    deployment = deploy(
        request.job,
        cluster,
        most=most,
        num_nodes=sum(node["Alive"] for node in ray.nodes()),
        decodes_on_gpu="nvdec" in decoder,
    )
    decode = _decode_settings(request, inputs, decoder)
    extract = [
        ExtractSettings(
            resolved=resolved,
            input_index=inputs.index(resolved.spec.input),
            precision=tables[index].facts.extractor["precision"],
            batch_frames=request.job.batch_size,
            num_threads=threads_of(deployment.extract.num_cpus),
            assignments=frozenset(n for n, a in enumerate(assignments) if index in a.plans),
        )
        for index, resolved in enumerate(request.extractors)
    ]
    return Work(tables, assignments, slices, decode, extract, deployment, run_id, shape)


def _some_samples(tables: Sequence[FeatureTable], assignments: Sequence[Assignment]) -> pa.RecordBatch:
    """What says of what kind the media are, of plans spread over the run: each dataset can hold another."""
    chosen = [each.leader for each in assignments[:: math.ceil(len(assignments) / PLANS_AT_ONCE)]]
    columns = ["data_file", "uri", "media_type"]
    parts = [
        tables[index].read_plan(plan, range(min(plan.num_samples, SAMPLES_LOOKED_AT)), columns)
        for index, plan in chosen
    ]
    return pa.concat_tables(parts).combine_chunks().to_batches()[0]


def _decode_settings(
    request: Request, inputs: tuple[InputSpec, ...], decoder: DecoderPolicy
) -> DecodeSettings:
    job = request.job
    return DecodeSettings(
        policy=request.policy,
        inputs=inputs,
        sampling=request.sampling,
        clip_seconds=job.clip_seconds,
        clip_stride_seconds=job.clip_stride_seconds,
        decoder=decoder,
        isolation=job.isolation,
        media_limits=MediaLimits(
            max_pixels=job.max_pixels,
            max_seconds=job.max_media_seconds,
            max_frames=job.max_media_frames,
            max_streams=job.max_streams,
            max_ratio=job.max_ratio,
        ),
        partial=job.partial,
        limits=ProcessLimits(memory_bytes=job.decode_memory << 20, item_seconds=job.decode_seconds),
    )


class Publisher:
    """Publishes whole plans in actors of its own, while others are still being worked on.

    Args:
        tables: Of the run.
        assignments: Whose plans are to be published.
        run_id: Which run it is.
        num_actors: They take turns.
    """

    def __init__(
        self,
        tables: Sequence[FeatureTable],
        assignments: Sequence[Assignment],
        run_id: str,
        *,
        num_actors: int,
    ) -> None:
        self._assignments = assignments
        actor: Any = ray.remote(PublishPlans)
        # All calls that wait for an actor lose a try when it dies, whichever of them it was.
        options = {"max_restarts": -1, "max_task_retries": PUBLISH_TRIES, "num_cpus": SMALL_TASK_CPUS}
        made = actor.options(max_concurrency=PUBLISHING_THREADS, **options)
        self._actors = cycle([made.remote(tables, run_id) for _ in range(num_actors)])
        self._pending: list[tuple[int, Plan, Any]] = []

    def submit(self, number: int) -> None:
        """Begin to publish the plans of one assignment."""
        for index, plan in self._assignments[number].plans.items():
            self._pending.append((index, plan, next(self._actors).publish.remote(index, plan)))

    def wait(self) -> list[tuple[int, Plan, Published]]:
        """What was published, with the table's place in the run.

        Raises:
            RunError: A plan could not be published; the run can be run again.
        """
        try:
            return [(index, plan, ray.get(ref)) for index, plan, ref in self._pending]
        except ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise RunError(f"publishing failed: {first_line(cause)}") from error
        except ray.exceptions.RayError as error:
            raise RunError(f"publishing was interrupted: {first_line(error)}; run it again") from error


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
