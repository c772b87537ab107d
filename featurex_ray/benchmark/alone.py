"""What each stage costs when it runs alone, and the bound that follows."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.benchmark.device import DeviceRates, measure_device
from featurex_ray.errors import RequestError
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import resolve_policy
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.pipeline.decode import DecodeMedia, DecodeSettings, Media, fetch_media, whole_units
from featurex_ray.pipeline.extract import frame_array
from featurex_ray.storage import Fetcher, ReadPolicy

SECONDS_TO_WAIT = 300.0
"""For the slowest of the processes that measure at once; one that failed ends the others so."""

CHECKED_AT_ONCE = 16
"""Samples whose frames are held at the same time, where it only matters whether there are any."""


@dataclass(frozen=True)
class StageCost:
    """What one stage costs when it runs alone, a sample.

    Attributes:
        cpu_seconds: CPU seconds of the whole process.
        seconds: Wall-clock seconds.
    """

    cpu_seconds: float
    seconds: float


@dataclass(frozen=True)
class Costs:
    """The stages alone.

    Attributes:
        samples: How many were measured.
        fetch: Reading the media, many at a time.
        decode: Decoding and preprocessing, for all extractors at once.
        embed: Each extractor's forward passes, by its name, one CPU thread.
        device: Where they ran, such as `cpu` or `cuda:0`.
        rates: On a GPU, how close each extractor comes to it.
    """

    samples: int
    fetch: StageCost
    decode: StageCost
    embed: dict[str, StageCost]
    device: str
    rates: dict[str, DeviceRates] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of a sample, one stage after the other."""
        return sum(cost.seconds for cost in (self.fetch, self.decode, *self.embed.values()))

    def bound(self, num_cpus: int, num_gpus: int = 1) -> float:
        """Samples a second that the machine allows.

        All CPUs over the CPU seconds of a sample; on GPUs their own time a sample is the other bound, and
        the smaller one holds.
        """
        read = self.fetch.cpu_seconds + self.decode.cpu_seconds
        if self.device == "cpu":
            return num_cpus / (read + sum(cost.cpu_seconds for cost in self.embed.values()))
        return min(num_cpus / read, num_gpus / sum(cost.seconds for cost in self.embed.values()))


def measure_alone(
    samples: pa.Table,
    extractors: Sequence[ResolvedExtractor],
    *,
    policy: ReadPolicy,
    sampling: str,
    precision: str,
    device: str | None,
    batch_size: int | None,
    begin: Callable[[], Any] = lambda: None,
) -> Costs:
    """Fetch, decode and embed some samples in this process, one stage after the other.

    Args:
        samples: In the schema `PLANNED`.
        extractors: All see the same decoded media.
        policy: What may be read.
        sampling: Which frames of a video.
        precision: Resolved.
        device: Such as `cuda`; None for a GPU where there is one.
        batch_size: Frames of a device batch, None for the default.
        begin: Called before each stage, when all is ready for it.

    Raises:
        RequestError: Not one sample could be decoded, or an extractor embeds none of them.
    """
    units = whole_units(samples)
    settings = _settings(extractors, policy, sampling)
    inputs = settings.inputs
    with Fetcher(policy) as fetcher:
        fetch_media(units[:4], fetcher)  # first connections and imports are start-up, not the stage
        begin()
        fetch, media = _measured(len(units), lambda: fetch_media(units, fetcher))
    decode, decoded = _decode_alone(settings, units, media, begin)
    embed, rates, where = {}, {}, ""
    for extractor in extractors:
        embedder = Embedder(
            extractor, precision=precision, device=device, batch_frames=batch_size, num_threads=1
        )
        embed[extractor.spec.name] = _embed_alone(
            embedder, decoded, inputs.index(extractor.spec.input), begin, samples=len(units)
        )
        where = str(embedder.device)
        if embedder.device.type != "cpu":
            clip_frames = decoded["clips"][0].as_py()[0]["num_frames"]
            rates[extractor.spec.name] = measure_device(embedder, clip_frames=clip_frames)
    return Costs(len(units), fetch, decode, embed, where, rates)


def _settings(extractors: Sequence[ResolvedExtractor], policy: ReadPolicy, sampling: str) -> DecodeSettings:
    return DecodeSettings(
        policy=policy,
        inputs=tuple(dict.fromkeys(e.spec.input for e in extractors)),
        sampling=Sampling.parse(sampling),
        clip_seconds=None,
        clip_stride_seconds=None,
        decoder=resolve_policy("auto"),
        isolation="none",  # CPU seconds are this process's; a child's cost a few percent more
    )


def whole_media(
    samples: pa.Table, extractors: Sequence[ResolvedExtractor], *, policy: ReadPolicy, sampling: str
) -> list[str | None]:
    """Which samples, in the schema `PLANNED`, are whole: each one's media type, None for what isn't."""
    decode = DecodeMedia(replace(_settings(extractors, policy, sampling), partial="fail"))
    found: list[str | None] = []
    for first in range(0, len(samples), CHECKED_AT_ONCE):
        decoded = decode(samples.slice(first, CHECKED_AT_ONCE))
        is_good = decoded["error"].combine_chunks().is_null()
        found += pc.if_else(is_good, decoded["media_type"].combine_chunks(), None).to_pylist()
    return found


def measure_on_all_cpus(measure: Callable[..., Costs], num_cpus: int) -> Costs:
    """The same in as many processes at once as there are CPUs, stage by stage; the means.

    CPUs that are all busy are slower than one alone: they share caches, memory, the clock's limits, and
    two of them are often one core.

    Args:
        measure: `measure_alone` with all its arguments but `begin`.
        num_cpus: Of this machine.
    """
    context = get_context("spawn")
    barrier = context.Barrier(num_cpus, timeout=SECONDS_TO_WAIT)
    with ProcessPoolExecutor(num_cpus, context, _wait_at, (barrier,)) as pool:
        found = [done.result() for done in [pool.submit(_measure_in_step, measure) for _ in range(num_cpus)]]
    return mean_costs(found)


def mean_costs(found: Sequence[Costs]) -> Costs:
    """The means of measurements on the same samples and device."""
    embed = {name: _mean([each.embed[name] for each in found]) for name in found[0].embed}
    fetch, decode = _mean([each.fetch for each in found]), _mean([each.decode for each in found])
    return Costs(found[0].samples, fetch, decode, embed, found[0].device)


_barrier: Barrier  # there only in a process that measures with others


def _wait_at(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603  a barrier is handed to a process when it starts, not with its work
    _barrier = barrier


def _measure_in_step(measure: Callable[..., Costs]) -> Costs:
    return measure(begin=_barrier.wait)


def _mean(costs: Sequence[StageCost]) -> StageCost:
    return StageCost(statistics.mean(c.cpu_seconds for c in costs), statistics.mean(c.seconds for c in costs))


def _measured(samples: int, work: Callable[[], Any]) -> tuple[StageCost, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    spent = StageCost((time.process_time() - cpu) / samples, (time.perf_counter() - wall) / samples)
    return spent, result


def _decode_alone(
    settings: DecodeSettings, units: pa.Table, media: Sequence[Media | None], begin: Callable[[], Any]
) -> tuple[StageCost, pa.Table]:
    decode = DecodeMedia(settings)
    decode.decode(units[:4], media[:4], fetch_seconds=0.0)
    begin()
    cost, decoded = _measured(len(units), lambda: decode.decode(units, media, fetch_seconds=0.0))
    good = decoded.filter(decoded["error"].is_null())
    if not len(good):
        message = decoded["error"][0].as_py()["message"]
        raise RequestError(f"none of the first {len(units)} samples could be decoded; the first: {message}")
    return cost, good


def _embed_alone(
    embedder: Embedder, units: pa.Table, index: int, begin: Callable[[], Any], *, samples: int
) -> StageCost:
    """The cost of embedding what could be decoded, a sample of all that were read, as of the other stages."""
    name = embedder.spec.name
    if embedder.spec.media == "video":  # in a run it is given no images either
        units = units.filter(pc.not_equal(units["media_type"], "image"))
    if not len(units):
        raise RequestError(f"{name} takes videos, and all of the media are images")
    frames = frame_array(units[f"frames_{index}"], embedder.spec.input)
    lengths = np.array([c["num_frames"] for clips in units["clips"].to_pylist() for c in clips])
    first = max(int(np.searchsorted(np.cumsum(lengths), embedder.batch_frames)), 1)
    embedder.embed(frames[: lengths[:first].sum()], lengths[:first])
    begin()
    cost, features = _measured(samples, lambda: embedder.embed(frames, lengths))
    if not features.finite.any():
        raise RequestError(f"{name} embeds none of the media; the first: {features.errors[0]}")
    return cost
