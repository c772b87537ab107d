"""The tables that a request fills: found or made, with what is `auto` settled; or only looked at."""

import socket
from typing import Any

import ray

from featurex_ray.errors import RequestError, TableNotFoundError
from featurex_ray.job import ExtractionJob
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.video import resolve_policy
from featurex_ray.models.precision import resolve_precision
from featurex_ray.pipeline.connect import connect, hosts
from featurex_ray.pipeline.deploy import cluster_resources, deploy
from featurex_ray.pipeline.request import Request
from featurex_ray.storage import redact
from featurex_ray.table.facts import TableFacts, read_facts
from featurex_ray.table.store import ObjectStore
from featurex_ray.table.table import FeatureTable


def open_tables(request: Request) -> list[FeatureTable]:
    """The table of each extractor, made where there is none.

    Raises:
        RequestError: The cluster can't run the job, or a table is another extractor's; none was made.
    """
    names = [request.job.table_of(extractor) for extractor in request.job.extractors]
    recorded = [_recorded(request.store, name) for name in names]
    if not all(recorded):
        connect(request.job)
        nvdec = "nvdec" in request.job.decoder
        deploy(request.job, cluster_resources(request.job), most=1, decodes_on_gpu=nvdec)  # or refuse
    # Those that are there come first, as they are what refuses: a new one would keep a wrong request's facts.
    old_first = sorted(range(len(names)), key=lambda index: not recorded[index])
    opened = {index: open_table(request, index, recorded[index]) for index in old_first}
    return [opened[index] for index in range(len(names))]


def open_table(request: Request, index: int, recorded: dict[str, Any]) -> FeatureTable:
    """The table of one extractor; what is `auto` is resolved when it is made, and kept.

    Args:
        request: What was asked for.
        index: The extractor's place in it.
        recorded: What the table was made with; nothing where there is none.
    """
    job = request.job
    name = job.table_of(job.extractors[index])
    settled = settle(job, recorded)
    if settled["precision"] == "auto":
        connect(job)
        settled["precision"] = _ask_precision(job)
    return FeatureTable.open_or_create(request.store, _facts(request, index, name, **settled))


def settle(job: ExtractionJob, recorded: dict[str, Any]) -> dict[str, str]:
    """Precision and decoder: as asked for, else as recorded with the table.

    Raises:
        RequestError: They don't go with the job's isolation.
    """
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
    made_with: dict[str, Any] = {
        "sampling": str(request.sampling),
        "clip": clip,
        "precision": precision,
        "decoder": decoder,
    }
    return TableFacts(
        name=name,
        revision=spec.revision(**made_with),
        dimension=spec.dimension,
        extractor=spec.to_json() | made_with,
        carried=request.manifest.carried,
    )


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
    facts = _facts(request, index, name, **settle(request.job, recorded))
    table = FeatureTable.open_or_create(request.store, facts)
    work = table.compare(request.manifest.batches)
    gone = f", to be pruned {table.num_gone(request.manifest.batches):,}" if prune else ""
    return (
        f"new {work.new:,}, changed {work.changed:,}, done {work.done:,}, "
        f"failed before {work.failed:,}, in open plans {work.open:,}{gone}"
    )
