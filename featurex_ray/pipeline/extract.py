"""Extract: units with frames in, units with features out. The device is asked here."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import ExtractError
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.pipeline import metrics
from featurex_ray.pipeline.threads import limit_threads
from featurex_ray.pipeline.units import (
    COSTS,
    CUT,
    ERROR,
    MEDIA,
    RESULT,
    error_struct,
    extracted_schema,
    peak_bytes,
)

if TYPE_CHECKING:
    from featurex_ray.models.embed import Embedder, Features


@dataclass(frozen=True)
class ExtractSettings:
    """One extractor of a run, as its actors need it.

    Attributes:
        resolved: The extractor with its weights.
        input_index: Which `frames_<i>` column it reads.
        precision: fp32, bf16 or fp16; resolved when its table was made.
        batch_frames: Frames of a device batch, None for the device's default.
        num_threads: CPU threads of the forward pass.
        assignments: Which assignments want it, None for all.
    """

    resolved: ResolvedExtractor
    input_index: int
    precision: str
    batch_frames: int | None
    num_threads: int
    assignments: frozenset[int] | None


class ExtractFeatures:
    """Runs every extractor of the job over the frames that it wants."""

    def __init__(self, settings: Sequence[ExtractSettings]) -> None:
        # torch is loaded here, in the actor: the driver names this class and needs none of it.
        from featurex_ray.models.embed import Embedder

        limit_threads(max(s.num_threads for s in settings), with_torch=True)
        self._settings = settings
        self._embedders = [
            Embedder(s.resolved, precision=s.precision, batch_frames=s.batch_frames) for s in settings
        ]
        self._schema = extracted_schema(len(settings))
        self._idle_since = time.perf_counter()
        self._batches = 0, 0  # rows and slots of device batches, as told so far

    def __call__(self, units: pa.Table) -> pa.Table:
        """Units with frames -> units with results; no row is lost, no frame is kept."""
        start = time.perf_counter()
        kept = units.select([*CUT.names, *(f.name for f in [*MEDIA, *COSTS])])
        results = [
            self._extract(units, s, embedder)
            for s, embedder in zip(self._settings, self._embedders, strict=True)
        ]
        self._tell(results, start)
        seconds = (time.perf_counter() - start) / max(len(units), 1)
        costs = [pa.repeat(pa.scalar(cost), len(units)) for cost in (seconds, peak_bytes())]
        return pa.table([*kept.columns, *results, *costs], schema=self._schema)

    def _tell(self, results: Sequence[pa.Array], start: float) -> None:
        now = time.perf_counter()
        clips = sum(pc.sum(pc.list_value_length(r.field("features"))).as_py() or 0 for r in results)
        metrics.count_extracted(clips=clips, seconds=now - start, waited=start - self._idle_since)
        rows, slots = self._batches
        self._batches = sum(e.num_rows for e in self._embedders), sum(e.num_slots for e in self._embedders)
        metrics.count_batches(rows=self._batches[0] - rows, slots=self._batches[1] - slots)
        self._idle_since = now

    def _extract(self, units: pa.Table, settings: ExtractSettings, embedder: "Embedder") -> pa.StructArray:
        asked = _asked(units, settings)
        errors = _refusals(units, settings, asked)
        taken = asked & errors.is_null().to_numpy(zero_copy_only=False)
        frames = units[f"frames_{settings.input_index}"]
        clips = units["clips"].combine_chunks()
        if not taken.all():  # a filter copies
            frames, clips = frames.filter(pa.array(taken)), clips.filter(pa.array(taken))
        lengths = clips.flatten().field("num_frames").to_numpy().astype(np.int64)
        if not len(lengths):
            return _results(None, np.zeros(len(units), np.int64), errors, asked)
        features = embedder.embed(frame_array(frames, settings.resolved.spec.input), lengths)
        num_clips = np.zeros(len(units), np.int64)
        num_clips[taken] = clips.value_lengths().to_numpy()
        return _results(features, num_clips, errors, asked)


def _asked(units: pa.Table, settings: ExtractSettings) -> np.ndarray:
    """(N,) bool: the units that this extractor's table wants."""
    if settings.assignments is None:
        return np.ones(len(units), bool)
    return np.isin(units["assignment"].to_numpy(), list(settings.assignments))


def _refusals(units: pa.Table, settings: ExtractSettings, asked: np.ndarray) -> pa.StructArray:
    """One a unit, of the type `ERROR`: why it is not embedded, null where it is or isn't asked for."""
    errors = pc.if_else(pa.array(asked), units["error"].combine_chunks(), pa.scalar(None, ERROR))
    spec = settings.resolved.spec
    if spec.media != "video":
        return errors
    refusal = ExtractError(
        "unsupported_media",
        f"{spec.name} takes videos and this sample is an image; use an image extractor for it",
    )
    is_image = pc.equal(units["media_type"].combine_chunks(), "image")
    refused = pc.and_(pc.and_(pa.array(asked), errors.is_null()), pc.fill_null(is_image, False))
    return pc.if_else(refused, pa.scalar(error_struct(refusal), ERROR), errors)


def _results(
    features: "Features | None", num_clips: np.ndarray, errors: pa.StructArray, asked: np.ndarray
) -> pa.StructArray:
    """One result a unit; a clip that could not be embedded fails its unit.

    Args:
        features: Of all clips that were embedded, in the units' order; None if there were none.
        num_clips: (U,) int64: how many of them are each unit's.
        errors: (U,) of the type `ERROR`: why others were not embedded.
        asked: (U,) bool; the others' results are null.
    """
    units = np.repeat(np.arange(len(num_clips)), num_clips)
    if features is not None and features.errors:
        told = errors.to_pylist()
        for clip, error in features.errors.items():
            told[units[clip]] = told[units[clip]] or error_struct(error)
        errors = pa.array(told, ERROR)
    is_good = asked & errors.is_null().to_numpy(zero_copy_only=False)
    kept = np.flatnonzero(is_good[units])
    values: dict[str, pa.Array] = {}
    if features is not None:
        values["features"] = _lists(features.feature[kept])
        if features.attention is not None and features.attention_shape is not None:
            values["attentions"] = pa.array([features.attention[i] for i in kept], pa.list_(pa.float32()))
            shapes = [features.attention_shape[i] for i in kept]
            values["attention_shapes"] = pa.array(shapes, pa.list_(pa.int32()))
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.where(is_good, num_clips, 0))]), pa.int32())
    columns = {"error": errors} | {
        name: pa.ListArray.from_arrays(offsets, each, mask=pa.array(~is_good))
        for name, each in values.items()
    }
    found = [columns.get(field.name, pa.nulls(len(num_clips), field.type)) for field in RESULT]
    return pa.StructArray.from_arrays(found, fields=list(RESULT), mask=pa.array(~asked))


def _lists(matrix: np.ndarray) -> pa.ListArray:
    """(N, D) float32 as N lists."""
    num_rows, width = matrix.shape
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int64) * width, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(matrix.reshape(-1), pa.float32()))


def frame_array(column: pa.ChunkedArray, spec: InputSpec) -> np.ndarray:
    """Frames of a `frames_<i>` column, all rows one after the other.

    Args:
        column: large_binary; every value is (F, H, W, 3) uint8, F may differ.
        spec: What H and W are.

    Returns:
        (sum of F, H, W, 3) uint8, copied once at most.
    """
    buffers = [_bytes_of(chunk) for chunk in column.chunks if len(chunk)]
    if not buffers:
        return np.empty((0, spec.height, spec.width, 3), np.uint8)
    flat = buffers[0] if len(buffers) == 1 else np.concatenate(buffers)
    return flat.reshape(-1, spec.height, spec.width, 3)


def _bytes_of(chunk: pa.LargeBinaryArray) -> np.ndarray:
    """The values of a chunk without nulls are contiguous: a view, not a copy."""
    offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    return np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
