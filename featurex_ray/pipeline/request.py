"""A request: a job whose manifest, extractors and output were found, and found right."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from featurex_ray.errors import RequestError
from featurex_ray.job import ExtractionJob
from featurex_ray.manifest import read_manifest
from featurex_ray.media.sampling import Sampling
from featurex_ray.models.registry import ResolvedExtractor, resolve
from featurex_ray.pipeline.agenda import SampleSet
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.store import ObjectStore, open_store


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
