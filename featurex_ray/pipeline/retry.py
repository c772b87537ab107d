"""The failed samples of a table again, by what the table and its plans recorded."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from featurex_ray.errors import RefusedUriError
from featurex_ray.job import ExtractionJob
from featurex_ray.media.sampling import Sampling
from featurex_ray.models.recorded import extractor_text, resolve_recorded
from featurex_ray.pipeline.agenda import RetryAgenda
from featurex_ray.pipeline.progress import Progress, Silent
from featurex_ray.pipeline.report import RunReport
from featurex_ray.pipeline.request import Request
from featurex_ray.pipeline.run import carry_out, memory_given_back
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.read import open_table
from featurex_ray.table.table import FeatureTable


@dataclass(frozen=True)
class FailedSamples:
    """The failed samples of a table, as a run counts them; their rows come from the plans."""

    num_samples: int
    carried: pa.Schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """None: there is no manifest to compare with."""
        return iter(())


@memory_given_back()
def retry(
    table: str,
    *,
    codes: Sequence[str] = (),
    dataset: str | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> RunReport:
    """Extract the failed samples of a table again; those that fail again stay failed.

    The samples are those of the plans, whatever became of their manifests. What may be read follows
    from where the table lies, as for a manifest there; `allow_prefix` widens it.

    Args:
        table: `<output>/<table>`.
        codes: Only failures of these codes, all if none.
        dataset: Only of this dataset.
        weights: Where the extractor's weights lie, if elsewhere by now.
        progress: Told what happens meanwhile.
        options: Other options of `ExtractionJob` that change no feature.

    Raises:
        TableNotFoundError: There is no such table.
        RefusedUriError: Failed samples lie where this run may not read; the others were tried.
        RunError: The run failed and can be run again.
    """
    started = time.monotonic()
    reader = open_table(table)
    job = job_of(table, reader.facts, weights=weights, **options)
    policy = ReadPolicy(table, allow_prefixes=job.allow_prefix, only_prefixes=job.only_prefix)
    agenda = RetryAgenda(tuple(codes), dataset, policy, job.max_samples_per_plan)
    failed = FeatureTable(reader.store, reader.facts).failed(codes=codes, dataset=dataset)
    samples = FailedSamples(failed.num_samples + failed.num_open, reader.facts.carried)
    extractor = resolve_recorded(reader.facts.extractor, weights=weights)
    sampling = Sampling.parse(reader.facts.extractor["sampling"])
    request = Request(job, policy, samples, reader.store, (extractor,), sampling, started)
    report = carry_out(request, agenda, progress or Silent())
    if agenda.refused:
        raise RefusedUriError(
            f"{len(agenda.refused):,} failed samples were not tried again, as this run may not read them; "
            f"the first: {agenda.refused[0]}"
        )
    return report


def job_of(table: str, facts: TableFacts, *, weights: str | None = None, **options: Any) -> ExtractionJob:
    """The job that made a table, as far as its features depend on it; what was `auto` then is recorded."""
    made_with = facts.extractor
    clip = made_with["clip"] or (None, None)
    return ExtractionJob(
        manifest=table,
        output=table.rstrip("/").rpartition("/")[0] or ".",
        extractor=extractor_text(made_with),
        table=facts.name,
        weights=(weights,) if weights else (),
        sampling=made_with["sampling"],
        clip_seconds=clip[0],
        clip_stride_seconds=clip[1],
        **options,
    )
