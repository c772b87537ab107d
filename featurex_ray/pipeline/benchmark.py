"""Measure a machine: what each stage costs alone, the bound that implies, and what a run reaches."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from featurex_ray.errors import RequestError
from featurex_ray.job import ExtractionJob
from featurex_ray.manifest import build_manifest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import resolve_policy
from featurex_ray.models.embed import Embedder
from featurex_ray.models.precision import resolve_precision
from featurex_ray.models.registry import ResolvedExtractor, resolve
from featurex_ray.pipeline.decode import DecodeMedia, DecodeSettings
from featurex_ray.pipeline.extract import frame_array
from featurex_ray.pipeline.report import versions
from featurex_ray.pipeline.units import PLANNED, to_table
from featurex_ray.storage import ReadPolicy

SAMPLES_MEASURED_ALONE = 200


@dataclass(frozen=True)
class StageCost:
    """What one stage costs when it runs alone.

    Attributes:
        samples: How many were measured.
        cpu_seconds: CPU seconds of the whole process, all of them together.
        seconds: Wall-clock seconds, all of them together.
    """

    samples: int
    cpu_seconds: float
    seconds: float

    @property
    def cpu_seconds_per_sample(self) -> float:
        """CPU seconds a sample."""
        return self.cpu_seconds / self.samples


@dataclass(frozen=True)
class Benchmark:
    """One measurement: costs alone, the bound, and the pipeline's throughput where it was run."""

    extractor: str
    device: str
    precision: str
    num_samples: int
    num_cpus: int
    decode: StageCost
    embed: StageCost
    pipeline: dict[str, float] | None
    versions: dict[str, str]

    @property
    def bound(self) -> float:
        """Samples a second that the CPUs allow: all CPUs over the CPU seconds of a sample.

        On a GPU the device's own time a sample is the other bound, and the smaller one holds.
        """
        if self.device == "cpu":
            each = self.decode.cpu_seconds_per_sample + self.embed.cpu_seconds_per_sample
            return self.num_cpus / each
        device_rate = self.embed.samples / self.embed.seconds
        return min(self.num_cpus / self.decode.cpu_seconds_per_sample, device_rate)

    def lines(self) -> list[str]:
        """The measurement as a person reads it."""
        decode, embed = self.decode, self.embed
        lines = [
            f"{self.extractor} on {self.device}, {self.precision}, "
            f"{self.num_samples:,} samples, {self.num_cpus} CPUs",
            f"  decode alone   {1000 * decode.cpu_seconds_per_sample:8.2f} CPU ms a sample",
            f"  embed alone    {1000 * embed.cpu_seconds_per_sample:8.2f} CPU ms a sample, "
            f"{embed.samples / embed.seconds:.1f} samples/s",
            f"  bound          {self.bound:8.1f} samples/s",
        ]
        if self.pipeline is None:
            return [*lines, "  pipeline       not measured (--no-ray)"]
        run = self.pipeline["samples_per_second"]
        return [
            *lines,
            f"  pipeline       {run:8.1f} samples/s from start to end, {run / self.bound:.2f} of the bound; "
            f"{self.pipeline['startup_seconds']:.1f} s of it until the first sample",
        ]

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return asdict(self) | {"bound": self.bound}


def benchmark(
    media: str,
    *,
    extractor: str,
    weights: str | None,
    num_samples: int,
    precision: str,
    device: str | None,
    batch_size: int | None,
    with_ray: bool,
) -> Benchmark:
    """Measure one extractor on the media below a folder or prefix.

    Args:
        media: Where media lie; they are used several times where there are too few.
        extractor: As given to `extract`.
        weights: As given to `extract`; "none" for seeded ones, which are as fast as any.
        num_samples: Samples of the pipeline's run.
        precision: `auto` is resolved here.
        device: Such as `cuda`; None for a GPU where there is one.
        batch_size: Frames of a device batch, None for the default.
        with_ray: Run the pipeline too.

    Raises:
        RequestError: There are no media, or the device or extractor can't be used.
    """
    resolved = resolve(extractor, weights=weights)
    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    precision = resolve_precision(precision, gpu=gpu)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _manifest(media, num_samples, Path(folder))
        some = _planned(manifest, SAMPLES_MEASURED_ALONE)
        units, decode = _decode_alone(resolved, some, manifest)
        embedder = Embedder(
            resolved, precision=precision, device=device, batch_frames=batch_size, num_threads=1
        )
        embed = _embed_alone(embedder, units)
        job = ExtractionJob(
            manifest=str(manifest),
            output=f"{folder}/features",
            extractor=extractor,
            weights=() if weights is None else (weights,),
            precision=precision,  # type: ignore[arg-type]  # resolved: never anything else
            batch_size=batch_size,
            max_failure_rate=1.0,
        )
        num_cpus, pipeline = _run_pipeline(job) if with_ray else (_cpus(), None)
    return Benchmark(
        extractor, str(embedder.device), precision, num_samples, num_cpus, decode, embed, pipeline, versions()
    )


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _manifest(media: str, num_samples: int, folder: Path) -> Path:
    """A manifest of exactly `num_samples` rows over the media that there are."""
    listed, path = folder / "listed.parquet", folder / "manifest.parquet"
    build_manifest(media, str(listed), dataset="benchmark", labels=False)
    uris = pq.read_table(listed, columns=["uri"])["uri"].to_pylist()
    rows = {
        "uri": [uris[i % len(uris)] for i in range(num_samples)],
        "sample_id": [f"{i:09d}" for i in range(num_samples)],
        "dataset": ["benchmark"] * num_samples,
    }
    pq.write_table(pa.table(rows), path)
    return path


def _planned(manifest: Path, count: int) -> pa.Table:
    rows = pq.read_table(manifest).slice(0, count).to_pylist()
    return to_table([row | {"assignment": 0, "plan_row": i} for i, row in enumerate(rows)], PLANNED)


@contextmanager
def _measured(samples: int, costs: list[StageCost]) -> Iterator[None]:
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    costs.append(StageCost(samples, time.process_time() - cpu, time.perf_counter() - wall))


def _decode_alone(
    resolved: ResolvedExtractor, samples: pa.Table, manifest: Path
) -> tuple[pa.Table, StageCost]:
    settings = DecodeSettings(
        policy=ReadPolicy(str(manifest)),
        inputs=(resolved.spec.input,),
        sampling=Sampling.parse(resolved.spec.default_sampling),
        clip_seconds=None,
        clip_stride_seconds=None,
        decoder=resolve_policy("auto"),
        isolation="none",  # CPU seconds are this process's; a child's cost a few percent more
    )
    decode = DecodeMedia(settings)
    decode(samples.slice(0, 4))  # imports and first opens are start-up, not the stage
    costs: list[StageCost] = []
    with _measured(len(samples), costs):
        units = decode(samples)
    good = units.filter(units["error"].is_null())
    if not len(good):
        raise RequestError(f"none of the first {len(samples)} samples could be decoded")
    return good, costs[0]


def _embed_alone(embedder: Embedder, units: pa.Table) -> StageCost:
    frames = frame_array(units["frames_0"], embedder.spec.input)
    lengths = np.array([c["num_frames"] for clips in units["clips"].to_pylist() for c in clips])
    embedder.embed(frames[: lengths[0]], lengths[:1])
    costs: list[StageCost] = []
    with _measured(len(units), costs):
        embedder.embed(frames, lengths)
    return costs[0]


def _run_pipeline(job: ExtractionJob) -> tuple[int, dict[str, float]]:
    import ray

    from featurex_ray.pipeline.connect import connect
    from featurex_ray.pipeline.progress import console_progress
    from featurex_ray.pipeline.run import run

    connect(job)
    report = run(job, progress=console_progress())
    num_cpus = int(ray.cluster_resources()["CPU"])
    ray.shutdown()
    return num_cpus, {
        "seconds": report.seconds,
        "startup_seconds": report.startup_seconds,
        "samples_per_second": report.planned / report.seconds,
        "failed": float(report.failed),
    }
