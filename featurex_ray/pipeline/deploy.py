"""How many actors of what size: from the cluster's resources, the job's bounds and the work's size."""

import math
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy

from featurex_ray.errors import RequestError
from featurex_ray.job import ExtractionJob, PoolSize

SMALL_TASK_CPUS = 0.05
"""Cutting and staging parts wait for the store; they reserve next to nothing."""

RESOURCE_STEPS = 10_000
"""Ray counts resources in ten thousandths."""

FETCHING_THREADS = 2
"""Calls at the same time in a decode actor: one fetches the next block while one decodes."""

WRITING_THREADS = 2
"""Calls at the same time in a writing actor: one waits for the store while one makes its rows."""

CALLS_PER_THREAD = 2
"""That Ray Data hands to an actor: one runs, one waits in it."""


@dataclass(frozen=True)
class MediaKind:
    """What suits a kind of media.

    Attributes:
        per_block: Samples of a block at most. A block costs the driver some milliseconds.
        per_decode: Samples that are fetched at the same time, then decoded.
        per_actor: Samples that are worth an actor's start, which takes seconds of CPU.
    """

    per_block: int
    per_decode: int
    per_actor: int


VIDEOS = MediaKind(per_block=16, per_decode=1, per_actor=8)
IMAGES = MediaKind(per_block=256, per_decode=64, per_actor=256)
INLINE = MediaKind(per_block=2048, per_decode=2048, per_actor=4096)
"""Images that lie in the manifest are small."""

BLOCK_BYTES = 48 << 20
"""Of images' frames in a block, about; Ray Data handles blocks of up to 128 MB well."""

STORE_SHARE = 0.5
"""Of the object store, for the frames of a run's first decode calls: Ray Data hands out as many as the
actors take before it knows how large a block is. From then on it keeps to half of the store by itself."""

BLOCKS_PER_CPU = 8
"""At least, where there are samples enough: the last blocks of a run must not leave CPUs idle."""
MANY = 1_000_000
VIDEOS_PER_EXTRACT = {False: 4, True: 16}
"""Video units of an extract call, without and with a GPU: their frames fill device batches."""

_VIDEO_NAME = r"(?i)\.(mp4|m4v|mov|mkv|webm|avi|ts|m2ts|mts|mpg|mpeg|vob|flv|ogv|wmv|asf|3gp)$"


NVDEC_ACTORS = 2
"""Decode actors that share a GPU: cards have 1 to 7 decoding units, and each actor takes a CUDA context."""
NVDEC_GPU = 0.34
"""The part of a GPU that each of them reserves, though its decoding units are none of those that extract. Ray
fills a GPU before it takes the next: of more than a third two fit, and what is left is for one to extract."""
NVDEC_ROOM = round(1 - NVDEC_ACTORS * NVDEC_GPU, 4)
"""What they leave of each GPU."""

CPUS_BESIDE_A_GPU = 0.5
"""At most, of actors that only a GPU's node can have, where CPUs elsewhere don't help them or where nodes are
to come: such a node may have one CPU and be the first, so that small actors hold parts of that already."""

SECONDS_FOR_THE_FIRST_CPU = 60
"""Of a cluster whose nodes are only joining."""


def cluster_resources(job: ExtractionJob) -> dict[str, float]:
    """CPUs and GPUs that the cluster has or, where the job says so, can grow to.

    A cluster that scales from zero has none yet; actors that wait for their nodes are what makes it grow.

    Raises:
        RequestError: It has no CPU, and nobody says that it can grow.
    """
    limits = job.can_grow_to
    deadline = time.monotonic() + SECONDS_FOR_THE_FIRST_CPU
    while not (found := _now_or_later(limits)).get("CPU"):
        if time.monotonic() > deadline:
            raise RequestError(
                "the Ray cluster has no CPUs; if it scales from zero, say what it can grow to with "
                "--max-resources CPU=N,GPU=N"
            )
        time.sleep(1)
    return found


def _now_or_later(limits: dict[str, float]) -> dict[str, float]:
    now = ray.cluster_resources()
    return {
        name: max(now.get(name, 0.0), limits.get(name, 0.0))
        for name in ("CPU", "GPU")
        if name in now or name in limits
    }


def store_bytes_per_cpu() -> float:
    """Bytes of the cluster's object store by now, for each of its CPUs; endless before the first node.

    A cluster that grows brings both.
    """
    now = ray.cluster_resources()
    return now.get("object_store_memory", math.inf) / now["CPU"] if now.get("CPU") else math.inf


@dataclass(frozen=True)
class BlockShape:
    """How much work a block carries: little enough to spread and to redo, enough to pay.

    Attributes:
        kind: The media.
        samples: Samples of a slice of a plan; a decode task's, where nothing is cut.
        samples_per_decode: Samples of a decode call, of which a task makes several.
        units: Units of a decode task after cutting.
        units_per_extract: Units of an extract call, if there are as many.
    """

    kind: MediaKind
    samples: int
    samples_per_decode: int
    units: int
    units_per_extract: int


def block_shape(
    first: pa.RecordBatch,
    *,
    num_samples: int,
    windowed: bool,
    resources: dict[str, float],
    store_bytes: float,
    frame_bytes: int,
) -> BlockShape:
    """Choose the blocks' size. It changes no result, only how work spreads.

    Args:
        first: Some of the manifest's samples; they tell of what kind the others are.
        num_samples: Samples to do.
        windowed: Whether videos are cut; one of them is then a block's work.
        resources: As `cluster_resources` gives them.
        store_bytes: As `store_bytes_per_cpu` gives them.
        frame_bytes: Of a preprocessed frame, in all the ways that the extractors want it.
    """
    kind = _kind(first)
    block_bytes = min(BLOCK_BYTES, STORE_SHARE * store_bytes / (FETCHING_THREADS * CALLS_PER_THREAD))
    fitting = kind.per_block if kind is VIDEOS else int(block_bytes // frame_bytes)
    spread = math.ceil(num_samples / (BLOCKS_PER_CPU * max(resources.get("CPU", 1), 1)))
    samples = 1 if windowed and kind is VIDEOS else max(min(kind.per_block, spread, fitting), 1)
    per_decode = min(kind.per_decode, samples)
    videos = VIDEOS_PER_EXTRACT[resources.get("GPU", 0) >= 1]
    per_extract = videos if kind is VIDEOS else max(per_decode, IMAGES.per_decode)
    return BlockShape(kind, samples, per_decode, units=1, units_per_extract=per_extract)


def most_actors(shape: BlockShape, *, num_samples: int, windowed: bool) -> int:
    """Actors of a pool that are worth their start.

    Args:
        shape: What kind of samples they are.
        num_samples: Samples to do.
        windowed: Whether videos are cut, so that one sample can be work for many.
    """
    if windowed:
        return MANY
    return max(num_samples // shape.kind.per_actor, 1)


def _kind(first: pa.RecordBatch) -> MediaKind:
    by_name = pc.match_substring_regex(first["uri"], _VIDEO_NAME)
    is_video = pc.if_else(pc.is_valid(first["media_type"]), pc.equal(first["media_type"], "video"), by_name)
    if pc.mean(pc.cast(pc.fill_null(is_video, False), pa.float64())).as_py() > 0.1:
        return VIDEOS
    return INLINE if first["data_file"].null_count < len(first) else IMAGES


@dataclass(frozen=True)
class Pool:
    """An actor pool: its bounds and what each actor reserves."""

    size: PoolSize
    num_cpus: float
    num_gpus: float

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Dataset.map_batches`."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus or None}

    def strategy(self, *, threads: int) -> ActorPoolStrategy:
        """The pool for Ray Data.

        Args:
            threads: Calls that run at the same time in one actor.
        """
        return ActorPoolStrategy(
            min_size=self.size.minimum,
            max_size=self.size.maximum,
            initial_size=self.size.maximum,
            max_tasks_in_flight_per_actor=CALLS_PER_THREAD * threads,
            max_concurrent_calls_per_actor=threads,
            enable_true_multi_threading=threads > 1,
        )


@dataclass(frozen=True)
class Deployment:
    """The actor pools of a run.

    Attributes:
        write: Actors, not tasks: where actors hold all of a node's CPUs, Ray ends the process of a task a
            second after it, and the next task waits some seconds for another.
        may_shrink: Whether actors that wait for work are given up. On a cluster that can shrink they may
            keep a node; elsewhere they keep nothing, and to start them anew takes seconds of CPU each.
    """

    decode: Pool
    extract: Pool
    write: Pool
    may_shrink: bool


def deploy(
    job: ExtractionJob,
    resources: dict[str, float],
    *,
    most: int,
    num_nodes: int = 1,
    decodes_on_gpu: bool = False,
) -> Deployment:
    """Size the pools.

    On a cluster with GPUs each extract actor has its own, and all other CPUs decode, or actors that
    share those GPUs with it. Without GPUs both pools have an actor a CPU and share the CPUs: whichever
    stage lags gets the time.

    Args:
        job: Its bounds win over what the resources suggest.
        resources: As `cluster_resources` gives them.
        most: Actors that a pool has at most, where the job sets no bounds.
        num_nodes: Of the cluster by now; more than one can lose one.
        decodes_on_gpu: Whether decode actors need a GPU too.

    Raises:
        RequestError: The cluster lacks the CPUs or GPUs that the job's bounds ask for.
    """
    num_cpus = max(int(resources.get("CPU", 1)), 1)
    num_gpus = resources.get("GPU", 0.0)
    gpus_each = job.gpus_per_extract_actor
    room = NVDEC_ROOM if decodes_on_gpu else 1.0
    if decodes_on_gpu and num_gpus < 1:
        raise RequestError(f"--decoder nvdec needs GPUs, and the cluster has {num_gpus:g}")
    if gpus_each is None:
        gpus_each = room if num_gpus >= 1 else 0.0
    if decodes_on_gpu and gpus_each > room:
        raise RequestError(f"--gpus-per-extract-actor {gpus_each:g}, but nvdec leaves {room:g} of each GPU")
    if gpus_each > num_gpus:
        raise RequestError(f"--gpus-per-extract-actor {gpus_each:g}, but the cluster has {num_gpus:g} GPUs")
    num_devices = _extractors_on(num_gpus, gpus_each, room)
    cpus = _Cpus(num_cpus - _spare_cpus(num_cpus), grow=bool(job.can_grow_to))
    if decodes_on_gpu:
        decode, extract = _with_decoding_gpus(job, cpus, int(num_gpus), num_devices, gpus_each, most)
    elif gpus_each:
        decode, extract = _with_gpus(job, cpus, num_devices, gpus_each, most)
    else:
        decode, extract = _without_gpus(job, num_cpus, cpus, most)
    writers = max(math.ceil(decode.size.maximum / 4), min(num_nodes, 2))
    write = Pool(PoolSize(1, writers), SMALL_TASK_CPUS, 0.0)
    return Deployment(decode, extract, write, may_shrink=bool(job.can_grow_to))


def _extractors_on(num_gpus: float, gpus_each: float, room: float) -> int:
    """Extract actors that so many GPUs hold: parts of two cards are no share of one."""
    if gpus_each > 1:
        return int(num_gpus / gpus_each)
    return int(num_gpus) * (int(room / gpus_each + 1e-9) if gpus_each else 1)


def _spare_cpus(num_cpus: int) -> float:
    """CPUs that the two large pools don't reserve: for small tasks, and for actors that write."""
    return max(num_cpus / 32, 1.0 if num_cpus > 1 else 0.5)


@dataclass(frozen=True)
class _Cpus:
    """CPUs that actors reserve; where the cluster can grow, what they reserve is also what makes it grow."""

    total: float
    grow: bool

    def share(self, num_actors: float, *, of: float | None = None) -> float:
        """What each of so many actors reserves: a CPU, or a half, a third ... of one.

        Of such shares a node holds as many as its CPUs allow, so that all actors fit on nodes of any
        size, and what is left over is not scattered in crumbs that no task can use. Where nodes are only
        to come, shares ask for all CPUs instead.
        """
        cpus_each = min((self.total if of is None else of) / num_actors, 1.0)
        if not self.grow:
            cpus_each = 1.0 / math.ceil(1.0 / cpus_each - 1e-9)
        return math.floor(cpus_each * RESOURCE_STEPS) / RESOURCE_STEPS


def _with_gpus(
    job: ExtractionJob, cpus: _Cpus, num_devices: int, gpus_each: float, most: int
) -> tuple[Pool, Pool]:
    extract = _bounds(job.extract_actors, num_devices, most)
    cpus_each = cpus.share(4 * extract.maximum)
    if cpus.grow:
        cpus_each = min(cpus_each, CPUS_BESIDE_A_GPU)
    left = cpus.total - extract.maximum * cpus_each
    decode = _bounds(job.decode_actors, max(int(left), 1), most)
    decode_cpus = cpus.share(decode.maximum, of=left)
    return Pool(decode, decode_cpus, 0.0), Pool(extract, cpus_each, gpus_each)


def _with_decoding_gpus(
    job: ExtractionJob, cpus: _Cpus, num_gpus: int, num_devices: int, gpus_each: float, most: int
) -> tuple[Pool, Pool]:
    extract = _bounds(job.extract_actors, num_devices, most)
    decode = _bounds(job.decode_actors, num_gpus * NVDEC_ACTORS, most)
    cpus_each = min(cpus.share(extract.maximum + decode.maximum), CPUS_BESIDE_A_GPU / (NVDEC_ACTORS + 1))
    gpu_share = NVDEC_GPU * min(num_gpus * NVDEC_ACTORS / decode.maximum, 1.0)
    return Pool(decode, cpus_each, gpu_share), Pool(extract, cpus_each, gpus_each)


def _without_gpus(job: ExtractionJob, num_cpus: int, cpus: _Cpus, most: int) -> tuple[Pool, Pool]:
    decode = _bounds(job.decode_actors, num_cpus, most)
    extract = _bounds(job.extract_actors, num_cpus, most)
    each = cpus.share(decode.maximum + extract.maximum)
    return Pool(decode, each, 0.0), Pool(extract, each, 0.0)


def _bounds(asked: str | None, suggested: int, most: int) -> PoolSize:
    return PoolSize.parse(asked) if asked else PoolSize(1, max(min(suggested, most), 1))
