"""Extract: units with frames in, units with features out. The device is asked here."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import ExtractError
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.pipeline import metrics
from featurex_ray.pipeline.threads import limit_threads
from featurex_ray.pipeline.units import COSTS, CUT, MEDIA, error_struct, extracted_schema, peak_bytes

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

    def _extract(self, units: pa.Table, settings: ExtractSettings, embedder: "Embedder") -> pa.Array:
        rows = _UnitRows.read(units, settings)
        features = embedder.embed(rows.frames, rows.clip_lengths) if len(rows.clip_lengths) else None
        return pa.array(list(rows.results(features)), type=self._schema.field("result_0").type)


@dataclass
class _UnitRows:
    """The units of one block that one extractor takes, their frames laid end to end."""

    refusals: list[dict[str, Any] | None]  # one a unit: why it is not embedded
    num_clips: list[int]  # one a unit: clips that are embedded
    frames: np.ndarray  # (F, H, W, 3) uint8
    clip_lengths: np.ndarray  # (N,) int64

    @classmethod
    def read(cls, units: pa.Table, settings: ExtractSettings) -> "_UnitRows":
        spec = settings.resolved.spec
        facts = units.select(["assignment", "media_type", "clips", "error"]).to_pylist()
        refusals = [_refusal(row, settings) for row in facts]
        lengths = [
            [] if refusal is not None else [clip["num_frames"] for clip in row["clips"]]
            for row, refusal in zip(facts, refusals, strict=True)
        ]
        taken = pa.array([refusal is None for refusal in refusals])
        column = units.column(f"frames_{settings.input_index}").filter(taken)
        return cls(
            refusals=refusals,
            num_clips=[len(clips) for clips in lengths],
            frames=frame_array(column, spec.input),
            clip_lengths=np.array([n for clips in lengths for n in clips], dtype=np.int64),
        )

    def results(self, features: "Features | None") -> list[dict[str, Any] | None]:
        """One result a unit, in order."""
        results: list[dict[str, Any] | None] = []
        first = 0
        for refusal, num_clips in zip(self.refusals, self.num_clips, strict=True):
            if refusal is not None or features is None:
                results.append(refusal or None)
                continue
            results.append(_result(features, range(first, first + num_clips)))
            first += num_clips
        return results


def _refusal(row: dict[str, Any], settings: ExtractSettings) -> dict[str, Any] | None:
    """Why a unit is not embedded: {} where this extractor is not asked for, an error, or None."""
    if settings.assignments is not None and row["assignment"] not in settings.assignments:
        return {}
    if row["error"] is not None:
        return {"error": row["error"]}
    spec = settings.resolved.spec
    if spec.media == "video" and row["media_type"] == "image":
        error = ExtractError(
            "unsupported_media",
            f"{spec.name} takes videos and this sample is an image; use an image extractor for it",
        )
        return {"error": error_struct(error)}
    return None


def _result(features: "Features", clips: range) -> dict[str, Any]:
    """One unit's result; a clip that could not be embedded fails its unit."""
    for clip in clips:
        if clip in features.errors:
            return {"error": error_struct(features.errors[clip])}
    result: dict[str, Any] = {"features": list(features.feature[clips.start : clips.stop])}
    if features.attention is not None and features.attention_shape is not None:
        result["attentions"] = [features.attention[i] for i in clips]
        result["attention_shapes"] = [features.attention_shape[i] for i in clips]
    return result


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
