"""Pools and blocks from resources: what fits, what is asked for and what is refused."""

import math
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from featurex_ray.errors import RequestError
from featurex_ray.job import ExtractionJob, PoolSize
from featurex_ray.pipeline.deploy import (
    FETCHING_THREADS,
    IMAGES,
    INLINE,
    SMALL_TASK_CPUS,
    VIDEOS,
    BlockShape,
    Deployment,
    block_shape,
    deploy,
    most_actors,
)
from featurex_ray.schemas import SAMPLE


def job(**changes: Any) -> ExtractionJob:
    return ExtractionJob(manifest="m.csv", output="out", extractor="cnn_lstm", **changes)


def reserved_cpus(found: Deployment) -> float:
    return sum(pool.size.maximum * pool.num_cpus for pool in (found.decode, found.extract))


@pytest.mark.parametrize("num_cpus", [1, 2, 4, 16, 96])
@pytest.mark.parametrize("num_gpus", [0, 1, 4])
def test_pools_leave_room_for_small_tasks(num_cpus: int, num_gpus: int) -> None:
    found = deploy(job(), {"CPU": num_cpus, "GPU": num_gpus}, most=10_000)
    assert 0 < reserved_cpus(found) <= num_cpus - 0.5
    assert found.extract.size.maximum * found.extract.num_gpus <= num_gpus


@pytest.mark.parametrize("cpus_each", [1, 2, 4, 16])
@pytest.mark.parametrize("num_nodes", [1, 2, 7, 64])
@pytest.mark.parametrize(
    ("decode_actors", "extract_actors"), [(None, None), ("5", "1"), ("2", "2"), ("3", "4")]
)
def test_all_actors_fit_on_nodes_with_room_for_writers_publisher_and_a_task(
    cpus_each: int, num_nodes: int, decode_actors: str | None, extract_actors: str | None
) -> None:
    """However Ray fills the nodes: each takes as many as fit, one after the other, to a ten thousandth."""
    bounds = job(decode_actors=decode_actors, extract_actors=extract_actors)
    found = deploy(bounds, {"CPU": cpus_each * num_nodes}, most=10_000, num_nodes=num_nodes)
    assert found.decode.num_cpus == found.extract.num_cpus
    left = found.decode.size.maximum + found.extract.size.maximum
    small = found.write.size.maximum + 2
    for _ in range(num_nodes):
        here = min(math.floor(cpus_each / found.decode.num_cpus + 1e-9), left)
        small -= math.floor((cpus_each - here * found.decode.num_cpus) / found.write.num_cpus)
        left -= here
    assert left == 0
    assert small <= 0


@pytest.mark.parametrize("limits", ["CPU=64", "CPU=312,GPU=4"])
def test_actors_ask_for_all_that_a_cluster_can_grow_to(limits: str) -> None:
    growing = job(max_resources=limits)
    found = deploy(growing, growing.can_grow_to, most=10_000)
    assert reserved_cpus(found) >= 0.95 * growing.can_grow_to["CPU"]


def test_a_node_of_one_cpu_and_a_gpu_that_comes_first_has_room_for_small_actors_too() -> None:
    growing = job(max_resources="CPU=5,GPU=1")
    found = deploy(growing, growing.can_grow_to, most=1, num_nodes=2)
    small = (1 + found.write.size.maximum) * SMALL_TASK_CPUS  # one publishes
    assert found.extract.num_cpus + small < 1.0
    assert found.decode.num_cpus == 1.0


def test_a_cluster_of_several_nodes_has_two_writers_at_least() -> None:
    assert deploy(job(), {"CPU": 4}, most=100).write.size.maximum == 1
    assert deploy(job(), {"CPU": 4}, most=100, num_nodes=2).write.size.maximum == 2


def test_gpu_cluster_gives_each_extract_actor_a_gpu_and_decode_the_cpus() -> None:
    found = deploy(job(), {"CPU": 32, "GPU": 4}, most=10_000)
    assert found.extract.size.maximum == 4
    assert found.extract.num_gpus == 1
    assert found.decode.size.maximum >= 24


def test_a_gpu_can_be_shared_or_left_alone() -> None:
    shared = deploy(job(gpus_per_extract_actor=0.5), {"CPU": 8, "GPU": 1}, most=100)
    assert (shared.extract.size.maximum, shared.extract.num_gpus) == (2, 0.5)
    of_two_cards = deploy(job(gpus_per_extract_actor=0.6), {"CPU": 8, "GPU": 4}, most=100)
    assert of_two_cards.extract.size.maximum == 4
    unused = deploy(job(gpus_per_extract_actor=0.0), {"CPU": 8, "GPU": 1}, most=100)
    assert unused.extract.num_gpus == 0


@pytest.mark.parametrize("num_cpus", [2, 4, 96])
@pytest.mark.parametrize("num_gpus", [1, 4])
@pytest.mark.parametrize("decode_actors", [None, "1", "20"])
def test_decoding_on_gpus_shares_them(num_cpus: int, num_gpus: int, decode_actors: str | None) -> None:
    cluster = {"CPU": num_cpus, "GPU": num_gpus}
    found = deploy(job(decode_actors=decode_actors), cluster, most=10_000, decodes_on_gpu=True)
    assert found.extract.size.maximum == num_gpus
    assert all(pool.num_gpus > 0 for pool in (found.decode, found.extract))
    assert sum(pool.size.maximum * pool.num_gpus for pool in (found.decode, found.extract)) <= num_gpus
    assert 0 < reserved_cpus(found) <= num_cpus - 0.5


def test_each_gpu_gets_two_that_decode_and_one_that_extracts() -> None:
    """As Ray places them: those that decode first, each on the fullest card that it still fits on."""
    found = deploy(job(), {"CPU": 64, "GPU": 4}, most=10_000, decodes_on_gpu=True)
    left, placed = [1.0] * 4, [Counter[str]() for _ in range(4)]
    for name, pool in (("decode", found.decode), ("extract", found.extract)):
        for _ in range(pool.size.maximum):
            card = min((i for i in range(4) if left[i] >= pool.num_gpus - 1e-9), key=lambda i: left[i])
            left[card] -= pool.num_gpus
            placed[card][name] += 1
    assert placed == [Counter(decode=2, extract=1)] * 4


@pytest.mark.parametrize("limits", ["", "CPU=5,GPU=1"])
def test_decoding_on_gpus_needs_no_more_cpus_than_a_small_node_has(limits: str) -> None:
    found = deploy(job(max_resources=limits), {"CPU": 9, "GPU": 1}, most=10_000, decodes_on_gpu=True)
    assert reserved_cpus(found) <= 0.5


def test_decoding_on_gpus_needs_room_on_them() -> None:
    with pytest.raises(RequestError, match="needs GPUs"):
        deploy(job(), {"CPU": 8}, most=100, decodes_on_gpu=True)
    with pytest.raises(RequestError, match=r"nvdec leaves 0.32 of each GPU"):
        deploy(job(gpus_per_extract_actor=1.0), {"CPU": 8, "GPU": 1}, most=100, decodes_on_gpu=True)


def test_pools_are_no_larger_than_the_work_is_worth_unless_asked() -> None:
    assert deploy(job(), {"CPU": 64}, most=3).decode.size == PoolSize(1, 3)
    assert deploy(job(decode_actors="2:5"), {"CPU": 64}, most=3).decode.size == PoolSize(2, 5)


def test_deploy_fails_without_the_gpu_that_was_asked_for() -> None:
    with pytest.raises(RequestError, match="--gpus-per-extract-actor 1, but the cluster has 0 GPUs"):
        deploy(job(gpus_per_extract_actor=1.0), {"CPU": 8}, most=1)


def samples(**columns: Any) -> pa.RecordBatch:
    count = len(next(iter(columns.values())))
    arrays = [pa.array(columns.get(f.name, [None] * count), f.type) for f in SAMPLE]
    return pa.record_batch(arrays, schema=pa.schema([f.with_nullable(True) for f in SAMPLE]))


def shape_of(
    first: pa.RecordBatch,
    num_samples: int,
    *,
    windowed: bool = False,
    store_bytes: float = 2e9,
    frame_bytes: int = 3072,
) -> BlockShape:
    return block_shape(
        first,
        num_samples=num_samples,
        windowed=windowed,
        resources={"CPU": 4.0},
        store_bytes=store_bytes,
        frame_bytes=frame_bytes,
    )


def test_blocks_follow_the_media() -> None:
    images = samples(uri=["a.jpg", "b.png"])
    videos = samples(uri=["a.mp4", "b.MKV"])
    typed = samples(uri=["a", "b"], media_type=["video", "video"])
    inline = samples(data_file=["m.parquet"], data_row=[0])
    clips = samples(data_file=["m.parquet"] * 2, data_row=[0, 1], media_type=["video", None])
    kinds = [(images, IMAGES), (videos, VIDEOS), (typed, VIDEOS), (inline, INLINE), (clips, VIDEOS)]
    for batch, kind in kinds:
        many = shape_of(batch, 100_000)
        assert (many.kind, many.samples, many.samples_per_decode) == (kind, kind.per_block, kind.per_decode)
        few = shape_of(batch, 8)
        assert (few.samples, few.samples_per_decode) == (1, 1)
    assert shape_of(videos, 100_000, windowed=True).samples == 1


def test_blocks_of_large_frames_are_small() -> None:
    inline = samples(data_file=["m.parquet"], data_row=[0])
    shape = shape_of(inline, 100_000, frame_bytes=600 * 600 * 3)
    assert 10 < shape.samples < 128_000_000 / (600 * 600 * 3)


def test_the_first_decode_calls_of_all_actors_fit_into_a_small_object_store() -> None:
    images, store, frame = samples(uri=["a.jpg"]), 100e6, 448 * 448 * 3
    shape = shape_of(images, 100_000, store_bytes=store, frame_bytes=frame)
    calls = deploy(job(), {"CPU": 1.0}, most=100).decode.strategy(threads=FETCHING_THREADS)
    assert 1 < shape.samples * frame * calls.max_tasks_in_flight_per_actor <= store / 2
    assert shape_of(images, 100_000, store_bytes=1e6, frame_bytes=frame).samples == 1


def test_an_actor_has_to_be_worth_its_start() -> None:
    photos = shape_of(samples(uri=["a.jpg"]), 1000)
    films = shape_of(samples(uri=["a.mp4"]), 100)
    assert most_actors(photos, num_samples=100, windowed=False) == 1
    assert most_actors(photos, num_samples=1000, windowed=False) == 3
    assert most_actors(films, num_samples=100, windowed=False) == 12
    assert most_actors(films, num_samples=1, windowed=True) > 1000


@pytest.mark.parametrize(
    ("text", "found"), [("CPU=300,GPU=4", {"CPU": 300.0, "GPU": 4.0}), (" CPU=8 ", {"CPU": 8.0}), ("", {})]
)
def test_how_far_a_cluster_can_grow_is_said_by_option_or_environment(
    text: str, found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job(max_resources=text).can_grow_to == found
    monkeypatch.setenv("FEATUREX_MAX_RESOURCES", text)
    assert job().can_grow_to == found


@pytest.mark.parametrize("text", ["300", "CPU", "CPU=many", "TPU=3", "CPU=-1"])
def test_growth_of_another_form_fails(text: str) -> None:
    with pytest.raises(RequestError, match="--max-resources"):
        job(max_resources=text)
