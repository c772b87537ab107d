"""What there is to do of claimed plans, and with what: slices, pools and the stages' settings."""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from featurex_ray.contained import ProcessLimits
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.pipeline.decode import DecodeSettings
from featurex_ray.pipeline.deploy import (
    block_shape,
    cluster_resources,
    deploy,
    most_actors,
    store_bytes_per_cpu,
)
from featurex_ray.pipeline.execute import Work
from featurex_ray.pipeline.extract import ExtractSettings
from featurex_ray.pipeline.request import Request
from featurex_ray.pipeline.source import Assignment, slices_of
from featurex_ray.pipeline.threads import threads_of
from featurex_ray.table.table import FeatureTable

PLANS_LOOKED_AT = 8
"""Spread over a run, to see of what kind the media are."""

SAMPLES_LOOKED_AT = 128
"""Of each of them."""


def rows_to_do(tables: Sequence[FeatureTable], assignment: Assignment) -> np.ndarray:
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


def work_of(
    request: Request,
    tables: Sequence[FeatureTable],
    assignments: Sequence[Assignment],
    todo: Sequence[np.ndarray],
    run_id: str,
) -> Work:
    """What `run_pipeline` is to do.

    Args:
        request: What was asked for.
        tables: Of its extractors.
        assignments: That this run has claimed.
        todo: Of each of them, as `rows_to_do` tells.
        run_id: Which run it is.

    Raises:
        RequestError: The cluster lacks what the job asks for.
    """
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
    chosen = [each.leader for each in assignments[:: math.ceil(len(assignments) / PLANS_LOOKED_AT)]]
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
