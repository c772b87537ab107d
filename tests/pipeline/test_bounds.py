"""What bounds a run: the last stage whose workers are all busy while work waits."""

from collections import Counter
from types import SimpleNamespace

import pytest

from featurex_ray.pipeline.bounds import MOST_LOOKS, Occupancy, StageState, Watched, bound_of, shares
from featurex_ray.pipeline.watch import _Look


def idle() -> StageState:
    return StageState(workers=2, tasks=0, queued=0)


def busy(*, queued: int = 0) -> StageState:
    return StageState(workers=2, tasks=2, queued=queued)


@pytest.mark.parametrize(
    ("decode", "extract", "write", "bound"),
    [
        (idle(), busy(queued=4), idle(), "extract"),
        (busy(), busy(queued=4), idle(), "extract"),
        (busy(), StageState(2, 4, 0), idle(), "extract"),  # the second call waits inside the actor
        (busy(), busy(), idle(), "decode"),  # all that comes is taken at once
        (idle(), busy(), idle(), "extract"),  # the last calls: nothing comes any more
        (idle(), idle(), busy(), "write"),
        (StageState(2, 4, 9, is_held_back=True), busy(), idle(), "extract"),  # the object store is full
        (busy(), idle(), idle(), "decode"),
        (busy(), busy(queued=1), busy(queued=9), "write"),
        (idle(), idle(), idle(), None),
        (StageState(0, 0, 9), StageState(0, 0, 0), idle(), None),  # no actor has started yet
    ],
)
def test_the_bound(decode: StageState, extract: StageState, write: StageState, bound: str | None) -> None:
    assert bound_of({"decode": decode, "extract": extract, "write": write}) == bound


def test_shares_are_of_the_looks_and_the_largest_comes_first() -> None:
    found = shares({"extract": 1, "decode": 3}, fetch_seconds=1, decode_seconds=2)
    assert list(found.items()) == [("decode", 0.75), ("extract", 0.25)]


def test_decoding_that_waits_for_its_media_is_bounded_by_storage() -> None:
    assert shares({"decode": 3}, fetch_seconds=9, decode_seconds=2) == {"storage": 1.0}


def test_nothing_seen_is_nothing() -> None:
    assert shares({}, fetch_seconds=0, decode_seconds=0) == {}


def test_watched_keeps_the_extremes() -> None:
    watched = Watched()
    for workers, used, spilled in ((0, 5, 0), (3, 9, 0), (1, 2, 7)):
        watched.see(
            {"decode": StageState(workers, workers, 0)},
            seconds=1.0,
            object_store_bytes=used,
            spilled_bytes=spilled,
        )
    assert watched.most_workers == {"decode": 3}
    assert watched.fewest_workers == {"decode": 1}
    assert (watched.object_store_peak_bytes, watched.spilled_bytes) == (9, 7)
    assert watched.bounds == Counter(decode=2)


def test_occupancy_of_a_long_run_thins_out_and_still_spans_it() -> None:
    occupancy = Occupancy()
    for second in range(10_000):
        stages = {"decode": StageState(4, 2, 0)}
        if second >= 5:
            stages["extract"] = StageState(2, 6, 0)
        occupancy.add(second, stages, 3 * second)
    columns = occupancy.to_json()
    assert {len(column) for column in columns.values()} == {len(occupancy.seconds)}
    assert MOST_LOOKS / 2 <= len(occupancy.seconds) <= MOST_LOOKS
    steps = {b - a for a, b in zip(occupancy.seconds, occupancy.seconds[1:], strict=False)}
    assert len(steps) == 1
    assert occupancy.seconds[-1] > 9_900
    assert set(occupancy.busy["decode"]) == {2}
    assert occupancy.busy["extract"][0] == 0
    assert occupancy.busy["extract"][-1] == 2
    assert occupancy.samples == [3 * second for second in occupancy.seconds]


def test_a_second_execution_of_a_run_goes_on_in_time_and_adds_what_it_spills() -> None:
    class Operator:
        name = "x"
        metrics = SimpleNamespace(obj_store_mem_spilled=5)

    usage = SimpleNamespace(get_global_usage=lambda: SimpleNamespace(object_store_memory=0))
    executor = SimpleNamespace(_topology={Operator(): None}, _resource_manager=usage)
    watched = Watched()
    for _ in range(2):
        look = _Look(watched)
        look._first -= 10
        look._look(executor)
    assert watched.occupancy.seconds == [10.0, 20.0]
    assert watched.spilled_bytes == 10
