"""What `featurex benchmark` does: the stages alone, then whole runs, ours and whoever is compared."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import torch

from featurex_ray.benchmark.alone import (
    Costs,
    mean_costs,
    measure_alone,
    measure_on_all_cpus,
    whole_media,
)
from featurex_ray.benchmark.contenders import Contender, ours, peer
from featurex_ray.benchmark.latency import slow_s3
from featurex_ray.benchmark.plot import plot_occupancy
from featurex_ray.benchmark.sweep import Axis, Sweep, sweep
from featurex_ray.benchmark.work import Pieces, Scratch, planned, scratch
from featurex_ray.errors import FeaturexError, RequestError
from featurex_ray.job import ExtractionJob
from featurex_ray.models.precision import resolve_precision
from featurex_ray.models.registry import NO_WEIGHTS, ResolvedExtractor, resolve
from featurex_ray.pipeline.report import versions
from featurex_ray.storage import ReadPolicy

SAMPLES_ALONE = 200
SECONDS_ALONE = 3.0
"""Where the stages take less for so many, more of them: a few milliseconds measure little."""
SMALL = 4
"""The small run of each pair has this fraction of the samples."""

BUCKET = "featurex-benchmark"

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        media: A folder or prefix of media, or a Parquet manifest; used again where they are too few.
        extractors: As given to `extract`; several share decoding.
        weights: As given to `extract`; extractors without get seeded ones, which are as fast as any.
        sampling: As given to `extract`, None for the first extractor's own.
        samples: Of the large run.
        repeats: Of everything; medians are reported.
        precision: As given to `extract`.
        device: Such as `cuda`, for the stages alone; None for a GPU where there is one.
        batch_size: As given to `extract`.
        address: Of a Ray cluster; None for a local one.
        with_ray: Whether there are runs, or the stages alone.
        compare: Which peers do the same work, of `contenders.PEER_NAMES`.
        latency_ms: Added to each GET of one more comparison, 0 for none.
        scratch: URI below which manifests and tables of the runs lie, until they are removed at the end;
            None for a local folder, which only a cluster of one host reaches.
    """

    media: str
    extractors: Sequence[str] = ("torchvision/resnet18",)
    weights: Sequence[str] = ()
    sampling: str | None = None
    samples: int = 1000
    repeats: int = 1
    precision: str = "auto"
    device: str | None = None
    batch_size: int | None = None
    address: str | None = None
    with_ray: bool = True
    compare: Sequence[str] = ()
    latency_ms: float = 0.0
    scratch: str | None = None


@dataclass
class Benchmark:
    """All that was measured.

    Attributes:
        num_cpus: Of this process, or of the cluster that runs ours.
        num_gpus: Likewise, at least 1.
        costs: The stages alone, one CPU busy.
        all_cpus: The same with all CPUs of this machine busy, where there are several and they embed: before
            the runs and after each of ours, as machines that others share are faster at times than at others.
        contenders: Ours first.
        slow: Ours from an S3 server, without and with the delay.
    """

    settings: Settings
    precision: str
    num_cpus: int
    costs: Costs
    all_cpus: list[Costs] = field(default_factory=list)
    contenders: list[Contender] = field(default_factory=list)
    slow: list[Contender] = field(default_factory=list)
    num_gpus: int = 1
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def busy(self) -> Costs | None:
        """The stages with all CPUs busy, the means of all measurements."""
        return mean_costs(self.all_cpus) if self.all_cpus else None

    @property
    def bound(self) -> float:
        """Samples a second that the machine allows."""
        return (self.busy or self.costs).bound(self.num_cpus, self.num_gpus)

    def plot(self) -> bytes | None:
        """A PNG of how busy the stages were in our last run, if there was one."""
        if not self.contenders:
            return None
        report = self.contenders[0].large[-1].report or {}
        return plot_occupancy(report["watched"]["occupancy"], title=", ".join(self.settings.extractors))

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            "settings": asdict(self.settings),
            "precision": self.precision,
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "costs": asdict(self.costs),
            "all_cpus": [asdict(costs) for costs in self.all_cpus],
            "bound": self.bound,
            "contenders": [each.to_json() for each in self.contenders],
            "slow": [each.to_json() for each in self.slow],
            "versions": self.versions,
        }

    def lines(self) -> list[str]:
        """The measurement as a person reads it."""
        wanted = self.settings
        lines = [
            f"{', '.join(wanted.extractors)} on {self.costs.device}, {self.precision}, {self.num_cpus} CPUs",
            f"  alone     {_costs_line(self.costs)}",
            *([f"  all CPUs  {_costs_line(self.busy)}, all of them busy"] if self.busy else []),
            f"  bound     {self.bound:.1f} samples/s",
            *(f"  {name} on {rates.line()}" for name, rates in self.costs.rates.items()),
        ]
        if not self.contenders:
            return [*lines, "  pipeline  not measured (--no-ray)"]
        lines += [*self._our_lines(), *self._peer_lines(), *self._slow_lines()]
        if any(math.isnan(each.steady_rate) for each in (*self.contenders, *self.slow)):
            lines.append("  nan: a large run took no longer than its small one; give more --samples")
        return lines

    def _our_lines(self) -> Iterator[str]:
        run = self.contenders[0]
        report = run.large[-1].report or {}
        watched, peaks = report["watched"], report["peak_bytes"]
        held_up = ", ".join(f"{stage} {share:.0%}" for stage, share in watched["bounds"].items())
        memory = ", ".join(f"{name} {size >> 20} MiB" for name, size in peaks.items())
        yield (
            f"  pipeline  {run.steady_rate:.1f} samples/s once it runs, {run.steady_rate / self.bound:.2f} "
            f"of the bound; {run.startup_seconds:.1f} s to start and end; {run.whole_rate:.1f} samples/s "
            f"over all of {run.large[0].samples:,} samples"
        )
        yield f"            bounded by {held_up or 'its start'}; peak memory of a process: {memory}"
        yield (
            f"            object store: peak {watched['object_store_peak_bytes'] >> 20} MiB, "
            f"spilled {watched['spilled_bytes'] >> 20} MiB"
        )
        if run.large[-1].failures:
            yield f"            {run.large[-1].failures}"

    def _peer_lines(self) -> Iterator[str]:
        ours = self.contenders[0]
        for each in self.contenders[1:]:
            yield (
                f"  {each.name}: {each.steady_rate:.1f} samples/s once it runs, {each.startup_seconds:.1f} s "
                f"to start and end; the pipeline is {ours.steady_rate / each.steady_rate:.1f} times as fast"
            )

    def _slow_lines(self) -> Iterator[str]:
        if self.slow:
            without, late = (each.steady_rate for each in self.slow)
            yield (
                f"  from S3   {without:.1f} samples/s; with {self.settings.latency_ms:g} ms more on each GET "
                f"{late:.1f}, {late / without:.2f} of it"
            )


def _costs_line(costs: Costs) -> str:
    stages = {"fetch": costs.fetch, "decode": costs.decode}
    stages |= {f"embed {name}": cost for name, cost in costs.embed.items()}
    each = ", ".join(f"{name} {1000 * cost.cpu_seconds:.2f}" for name, cost in stages.items())
    return f"{each} CPU ms a sample"


def benchmark(settings: Settings, say: Say) -> Benchmark:
    """Measure extractors on media.

    Args:
        settings: What to measure.
        say: Told of every run that was done.

    Raises:
        RequestError: There are no media, none that an extractor embeds, or the device or an extractor can't
            be used.
        RunError: A run failed.
    """
    if settings.samples < SMALL or settings.repeats < 1:
        raise RequestError(f"--samples must be at least {SMALL}, --repeats at least 1")
    if settings.compare and len(settings.extractors) > 1:
        raise RequestError("--compare takes one --extractor: the peers have no way to share decoding")
    if settings.scratch and (settings.compare or settings.latency_ms):
        raise RequestError("--compare and --latency-ms are for one machine, which needs no --scratch")
    num_cpus, num_gpus = _machine(settings)
    if settings.compare and num_cpus != (here := len(os.sched_getaffinity(0))):
        raise RequestError(
            f"--compare is for one machine: the peers would run here, on {here} CPUs, ours on a cluster of "
            f"{num_cpus}"
        )
    with scratch(settings.scratch) as work:
        pieces = Pieces.of(settings.media, work.folder)
        if settings.latency_ms and pieces.prefix is None:
            raise RequestError("--latency-ms is for media that are objects of their own, not inline ones")
        if settings.compare:
            pieces = _for_peers(settings, pieces, work.folder, say)
        result, all_cpus = _alone(settings, pieces, work, num_cpus, num_gpus)
        say(result.lines()[1].strip())
        if settings.with_ray:
            result.contenders = _contenders(settings, result, pieces)
            _race(
                result.contenders,
                settings,
                pieces,
                work,
                say,
                after_ours=lambda: result.all_cpus.extend(all_cpus()),
            )
        if settings.with_ray and settings.latency_ms:
            result.slow = _from_slow_s3(settings, result.precision, pieces, work, say)
    return result


def measure_growth(settings: Settings, axis: Axis, say: Say) -> Sweep:
    """Measure how an extraction's cost grows along an axis; see `sweep`."""
    _machine(settings)  # refuses what a cluster of several hosts can't do
    options = _options(settings, settings.precision)
    with scratch(settings.scratch) as work:
        return sweep(axis, settings.media, options, samples=settings.samples, work=work, say=say)


def _for_peers(settings: Settings, pieces: Pieces, folder: Path, say: Say) -> Pieces:
    """The media that a run would use, less those at which peers stop: broken ones, videos among images."""
    pieces = pieces.first(settings.samples)
    count = len(pieces.rows)
    manifest = str(pieces.manifest(folder / "all.parquet", count))
    extractors = _extractors(settings)
    kinds = whole_media(
        planned(manifest, count),
        extractors,
        policy=_policy(manifest, pieces),
        sampling=_sampling(settings, extractors),
    )
    wanted = next((kind for kind in kinds if kind is not None), None)
    if wanted is None:
        raise RequestError(f"none of the {count:,} media can be decoded")
    kept = pieces.rows.filter(pa.array([kind == wanted for kind in kinds]))
    if left_out := count - len(kept):
        say(f"left out {left_out:,} of {count:,} media: peers stop at what isn't a whole {wanted}")
    return Pieces(kept)


def _extractors(settings: Settings) -> list[ResolvedExtractor]:
    return [resolve(name, weights=uri) for name, uri in _weights(settings).items()]


def _policy(manifest: str, pieces: Pieces) -> ReadPolicy:
    return ReadPolicy(manifest, allow_prefixes=(pieces.prefix,) if pieces.prefix else ())


def _sampling(settings: Settings, extractors: Sequence[ResolvedExtractor]) -> str:
    return settings.sampling or extractors[0].spec.default_sampling


def _alone(
    settings: Settings, pieces: Pieces, work: Scratch, num_cpus: int, num_gpus: int
) -> tuple[Benchmark, Callable[[], list[Costs]]]:
    """The stages with one CPU busy and with all, and what measures the latter again."""
    there = partial(_call_there, settings, num_gpus)
    extractors = _extractors(settings)
    precision = there(partial(_precision, settings))

    def measurement(count: int) -> Callable[..., Costs]:
        manifest = work.put(pieces.manifest(work.folder / f"alone-{count}.parquet", count))
        return partial(
            measure_alone,
            planned(manifest, count),
            extractors,
            policy=_policy(manifest, pieces),
            sampling=_sampling(settings, extractors),
            precision=precision,
            device=settings.device,
            batch_size=settings.batch_size,
        )

    count = min(SAMPLES_ALONE, len(pieces.rows))
    measure = measurement(count)
    costs = there(measure)
    # As in the runs, few media are used again: once each, what is imported for them would be most of it.
    if (enough := math.ceil(SECONDS_ALONE / costs.seconds)) > count:
        measure = measurement(enough)
        costs = there(measure)

    def all_cpus() -> list[Costs]:
        return there(partial(_all_busy, measure)) if costs.device == "cpu" else []

    result = Benchmark(settings, precision, num_cpus, costs, all_cpus(), num_gpus=max(num_gpus, 1))
    return result, all_cpus


def _precision(settings: Settings) -> str:
    gpu = torch.cuda.is_available() if settings.device is None else settings.device.startswith("cuda")
    return resolve_precision(settings.precision, gpu=gpu)


def _all_busy(measure: Callable[..., Costs]) -> list[Costs]:
    here = len(os.sched_getaffinity(0))
    return [measure_on_all_cpus(measure, here)] if here > 1 else []


def _address(settings: Settings) -> str | None:
    """Of the cluster that runs ours, None for a local one; as `extract` understands it."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def _machine(settings: Settings) -> tuple[int, int]:
    """CPUs and GPUs of what runs ours; of this process where nothing does.

    Raises:
        RequestError: It is several hosts, and what they work on would lie on this one.
    """
    if not _on_cluster(settings):
        return len(os.sched_getaffinity(0)), torch.cuda.device_count() * settings.with_ray
    import ray

    from featurex_ray.pipeline.connect import connect, hosts, ray_as_found

    with ray_as_found():
        connect(settings)
        found, count = ray.cluster_resources(), len(hosts())
    if count > 1 and settings.scratch is None:
        raise RequestError(f"the cluster has {count} hosts: give --scratch a URI that all of them reach")
    return int(found.get("CPU", 1)), int(found.get("GPU", 0))


def _on_cluster(settings: Settings) -> bool:
    return settings.with_ray and _address(settings) is not None


def _call_there(settings: Settings, num_gpus: int, work: Callable[[], T]) -> T:
    """What `work` returns where ours runs: here, or on a node of the cluster, with a GPU if any has one.

    Raises:
        FeaturexError: Of `work`.
    """
    if not _on_cluster(settings):
        return work()
    import ray

    from featurex_ray.pipeline.connect import connect, ray_as_found

    with ray_as_found():
        connect(settings)
        call: Any = ray.remote(num_cpus=1, num_gpus=min(num_gpus, 1), max_retries=0)(_call)
        try:
            found: T = ray.get(call.remote(work))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FeaturexError):
                raise error.cause from error
            raise
    return found


def _call(work: Callable[[], T]) -> T:
    return work()


def _contenders(settings: Settings, result: Benchmark, pieces: Pieces) -> list[Contender]:
    extractor, weights = next(iter(_weights(settings).items()))
    return [
        ours(_options(settings, result.precision, pieces.prefix)),
        *(peer(name, extractor, weights, result.num_cpus) for name in settings.compare),
    ]


def _weights(settings: Settings) -> dict[str, str]:
    """Each extractor's weights, as `extract` would understand the options."""
    job = ExtractionJob(
        manifest=settings.media,
        output="unused",
        extractor=tuple(settings.extractors),
        weights=tuple(settings.weights),
    )
    return {name: job.weights_of(name) or NO_WEIGHTS for name in settings.extractors}


def _options(settings: Settings, precision: str, prefix: str | None = None) -> list[str]:
    """Of `featurex extract`."""
    several = len(settings.extractors) > 1
    options: list[tuple[str, Any]] = [
        *(("extractor", name) for name in settings.extractors),
        *(("weights", f"{n}={uri}" if several else uri) for n, uri in _weights(settings).items()),
        ("sampling", settings.sampling),
        ("precision", precision),
        ("batch-size", settings.batch_size),
        ("address", settings.address),
        ("allow-prefix", prefix),
        ("max-failure-rate", 1),
    ]
    return [word for name, value in options if value is not None for word in (f"--{name}", str(value))]


def _race(
    contenders: Sequence[Contender],
    settings: Settings,
    pieces: Pieces,
    work: Scratch,
    say: Say,
    *,
    after_ours: Callable[[], object] = lambda: None,
) -> None:
    """Everybody once, then everybody again: what the machine does meanwhile hits all alike."""
    sizes = settings.samples // SMALL, settings.samples
    small, large = (work.put(pieces.manifest(work.folder / f"{size}.parquet", size)) for size in sizes)
    for repeat in range(settings.repeats):
        for each in contenders:
            each.run(small, large, sizes, work.uri)
            times = each.small[-1].seconds, each.large[-1].seconds
            took = ", ".join(
                f"{size:,} samples {time:.1f} s" for size, time in zip(sizes, times, strict=True)
            )
            say(f"run {repeat + 1} of {settings.repeats}, {each.name}: {took}")
            if each is contenders[0]:
                after_ours()


def _from_slow_s3(
    settings: Settings, precision: str, pieces: Pieces, work: Scratch, say: Say
) -> list[Contender]:
    found = []
    # Before this process is pointed at the slow server: they may lie on S3 themselves.
    media = _copied(pieces.first(settings.samples), work.folder / "media")
    with slow_s3() as proxy:
        stored = _uploaded(media)
        for delay in (0.0, settings.latency_ms / 1000):
            proxy.delay_seconds = delay
            contender = ours(_options(settings, precision, stored.prefix))
            contender.name = f"from S3 with {1000 * delay:g} ms more"
            _race([contender], settings, stored, work, say)
            found.append(contender)
    return found


def _copied(pieces: Pieces, folder: Path) -> list[Path]:
    """The media as files."""
    folder.mkdir()
    paths = []
    for number, uri in enumerate(pieces.rows["uri"].to_pylist()):
        paths.append(folder / f"{number:06d}-{uri.rpartition('/')[2]}")
        with fsspec.open(uri) as media:
            paths[-1].write_bytes(media.read())
    return paths


def _uploaded(media: Sequence[Path]) -> Pieces:
    """The media in a bucket of the server that the environment names."""
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir(BUCKET)
    for path in media:
        store.put_file(str(path), f"{BUCKET}/{path.name}")
    return Pieces(pa.table({"uri": [f"s3://{BUCKET}/{path.name}" for path in media]}))
