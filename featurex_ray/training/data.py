"""Decoded samples for training: Ray Data with the decode stage of extraction, then arrays in a worker."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Dataset

from featurex_ray.errors import RunError
from featurex_ray.job import PoolSize
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.pipeline.decode import DecodeMedia, DecodeSettings
from featurex_ray.pipeline.deploy import (
    FETCHING_THREADS,
    Pool,
    block_shape,
    most_actors,
    store_bytes_per_cpu,
)
from featurex_ray.pipeline.execute import ARROW
from featurex_ray.pipeline.extract import frame_array
from featurex_ray.pipeline.units import PLANNED
from featurex_ray.training.labels import LabelledSamples

ROW = "plan_row"
"""The sample's place in its `LabelledSamples`; how a decoded row finds its label."""


class DecodeExamples(DecodeMedia):
    """The decode stage of extraction, keeping only what training needs."""

    def __call__(self, units: pa.Table) -> pa.Table:
        """Planned samples -> `plan_row`, `error`, `message`, `num_frames`, `frames_0`."""
        decoded = super().__call__(units)
        num_frames = [
            sum(clip["num_frames"] for clip in clips or ()) for clips in decoded["clips"].to_pylist()
        ]
        return pa.table(
            {
                ROW: decoded[ROW],
                "error": pc.struct_field(decoded["error"], "code"),
                "message": pc.struct_field(decoded["error"], "message"),
                "num_frames": pa.array(num_frames, pa.int32()),
                "frames_0": decoded["frames_0"],
            }
        )


def decoded_dataset(labelled: LabelledSamples, settings: DecodeSettings) -> Dataset:
    """Decode samples once, into the cluster's object store."""
    resources = ray.cluster_resources()
    num_samples = len(labelled.samples)
    first = labelled.samples.to_batches()[0]
    shape = block_shape(
        first,
        num_samples=num_samples,
        windowed=False,
        resources=resources,
        store_bytes=store_bytes_per_cpu(),
        frame_bytes=sum(spec.frame_bytes for spec in settings.inputs),
    )
    actors = min(
        max(int(resources.get("CPU", 1)), 1), most_actors(shape, num_samples=num_samples, windowed=False)
    )
    pool = Pool(PoolSize(1, actors), min(1.0, (resources.get("CPU", 1) - 0.5) / actors), 0.0)
    planned = _planned(labelled.samples)
    size = shape.samples_per_decode  # a task decodes its block in one call
    blocks = [planned.slice(first, size) for first in range(0, num_samples, size)]
    decoded: Dataset = (
        ray.data.from_arrow(blocks)
        .map_batches(
            DecodeExamples,
            fn_constructor_args=(settings,),
            compute=pool.strategy(threads=FETCHING_THREADS),
            **pool.options(),
            **ARROW,
        )
        .materialize()
    )
    return decoded


@dataclass(frozen=True)
class Decoded:
    """What became of samples in decoding.

    Attributes:
        num_samples: All of them.
        failures: Failed samples by error code.
        example: What one failure said.
        lengths: Frames of a clip, and how many clips have so many.
    """

    num_samples: int
    failures: Counter[str]
    example: str
    lengths: Counter[int]

    def check(self, *, max_failure_rate: float) -> None:
        """Refuse what can't be trained on.

        Raises:
            RunError: Too many samples failed, or clips differ in length.
        """
        failed = self.failures.total()
        if failed == self.num_samples or failed > max_failure_rate * self.num_samples:
            codes = ", ".join(f"{code} {count}" for code, count in self.failures.most_common())
            raise RunError(f"{failed} of {self.num_samples} samples can't be used ({codes}): {self.example}")
        if len(self.lengths) > 1:
            found = ", ".join(f"{count} of {length}" for length, count in sorted(self.lengths.items()))
            raise RunError(f"training needs clips of the same length, and these have frames: {found}")


def outcome(decoded: Dataset) -> Decoded:
    """Count what was decoded and what failed."""
    failures: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    example = ""
    facts = decoded.select_columns(["error", "message", "num_frames"])
    batches: Iterable[Any] = facts.iter_batches(batch_size=None, batch_format="pyarrow")
    for batch in batches:
        bad = pc.is_valid(batch["error"])
        failures.update(batch["error"].filter(bad).to_pylist())
        lengths.update(batch["num_frames"].filter(pc.invert(bad)).to_pylist())
        example = example or next(iter(batch["message"].filter(bad).to_pylist()), "")
    return Decoded(failures.total() + lengths.total(), failures, example, lengths)


@dataclass(frozen=True)
class Examples:
    """Clips with what they show, in the manifest's order.

    Attributes:
        frames: (N, T, H, W, 3) uint8, RGB.
        targets: (N,) int64, places among the classes.
    """

    frames: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        if self.frames.ndim != 5 or len(self.frames) != len(self.targets):
            raise ValueError(f"frames {self.frames.shape} for targets {self.targets.shape}")

    @classmethod
    def gather(cls, batches: Iterable[pa.Table], spec: InputSpec, targets: np.ndarray) -> "Examples":
        """Collect decoded samples; those that failed are left out.

        Args:
            batches: As `DecodeExamples` gives them, in any order.
            spec: What one frame looks like.
            targets: Of all samples, by `plan_row`.
        """
        rows, frames = [np.empty(0, np.int64)], []
        for batch in batches:
            good = batch.filter(pc.is_null(batch["error"]))
            if len(good):
                rows.append(good[ROW].to_numpy().astype(np.int64))
                pixels = frame_array(good["frames_0"], spec)
                frames.append(pixels.reshape(len(good), -1, *pixels.shape[1:]))
        found = np.concatenate(rows)
        # Whoever decoded first, the same order: so that the same seed gives the same weights.
        order = np.argsort(found, kind="stable")
        pixels = np.concatenate(frames) if frames else np.empty((0, 1, spec.height, spec.width, 3), np.uint8)
        return cls(pixels[order], targets[found[order]])


def _planned(samples: pa.Table) -> pa.Table:
    """Samples as the decode stage takes them."""
    rows = pa.array(range(len(samples)), pa.int32())
    zeros = pa.repeat(pa.scalar(0, pa.int32()), len(samples))
    columns = samples.append_column(ROW, rows).append_column("assignment", zeros)
    return columns.select(PLANNED.names).cast(PLANNED)
