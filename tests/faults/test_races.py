"""R4, R5, R11, R13: several writers at once, one that sleeps, attempts that disagree, and collection."""

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from featurex_ray.table import FeatureTable, open_store
from featurex_ray.table import collect as collection
from featurex_ray.table.collect import collect
from featurex_ray.table.read import TableReader
from featurex_ray.table.store import Hook, ObjectStore
from featurex_ray.table.verify import verify
from tests.faults.campaign import YOUNG, Runner, check_between, count_of, in_process
from tests.faults.conftest import Record
from tests.faults.reader import Reader, summary
from tests.table.conftest import FACTS, World, content, public_etags


def extract_once(uri: str, run_id: str, world: World) -> None:
    Runner(uri, run_id=run_id).extract(world)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_three_drivers(where: str, tmp_path: Path, request: pytest.FixtureRequest, record: Record) -> None:
    """R4: three processes on the same work, or on manifests that overlap; all exit 0 when all is done."""
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3_root")
    rounds = count_of(f"R4_{where.upper()}", 2, 50)
    with Reader() as reader:
        for number in range(rounds):
            uri = f"{root}/{number}"
            reader.look_at(uri)
            sizes = [12, 12, 12] if number % 2 else [8, 10, 14]
            worlds = [World(num_samples=size, failing=frozenset({"s0004"})) for size in sizes]
            drivers = [in_process(extract_once, uri, f"run-{n}", world) for n, world in enumerate(worlds)]
            for driver in drivers:
                driver.join(120)
            assert [driver.exitcode for driver in drivers] == [0, 0, 0]
            table = FeatureTable(open_store(uri), FACTS)
            assert content(table) == worlds[-1].expected()
            assert verify(table.store, FACTS, worlds[-1].samples).ok
            plans = sum(1 for _ in table.store.list("_featurex/t/plans/"))
            assert len(public_etags(table.store, ("t/",))) == plans
    reader.check()
    assert reader.counts["errors"] == 0, reader.last_error  # nothing is replaced
    record(
        f"R4 {where}",
        f"{rounds} rounds of 3 drivers; one public object per plan, no sample twice, all exit 0; "
        f"meanwhile {summary(reader.counts)}",
    )


def stopped_before(uri: str, n: int, world: World) -> None:
    """Publishes every plan, but stops itself before the n-th write of a public object.

    On local disk that is before it takes the target's lock: who stops with it in hand keeps others
    waiting, up to their time limit.
    """
    writes = 0

    def hook(operation: str, moment: str, key: str) -> None:
        nonlocal writes
        if moment == "before" and operation in {"create", "replace", "write", "link"} and key.startswith("t"):
            writes += 1
            if writes == n:
                os.kill(os.getpid(), signal.SIGSTOP)

    Runner(uri, hook, run_id="sleeper").extract(world)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_worker_that_sleeps_past_publish(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, record: Record
) -> None:
    """R5: another run does everything meanwhile; what the sleeper sends when it wakes has no effect."""
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3_root")
    old, new = (
        World(num_samples=6, version="1"),
        World(num_samples=7, version="2", failing=frozenset({"s0001"})),
    )
    points = 0
    with Reader() as reader:
        for n in range(1, count_of(f"R5_{where.upper()}", 2, 100) + 1):
            uri = f"{root}/{n}"
            reader.look_at(uri)
            Runner(uri).extract(old)
            sleeper = in_process(stopped_before, uri, n, new)
            if not stops(sleeper):
                break  # it has no n-th write: those before it were all
            points = n
            Runner(uri, run_id="other").extract(new)
            store = open_store(uri)
            collect(store, FACTS, min_age=YOUNG) if where == "s3" else None
            before = public_etags(store)
            os.kill(sleeper.pid or 0, signal.SIGCONT)
            sleeper.join(60)
            assert sleeper.exitcode == 0
            assert public_etags(store) == before
            assert content(FeatureTable(store, FACTS)) == new.expected()
    reader.check()
    assert points >= 2
    record(
        f"R5 {where}",
        f"SIGSTOP before each of {points} public writes, SIGCONT later: ETags unchanged, exit 0; "
        f"meanwhile {summary(reader.counts)}",
    )


def stops(process: BaseProcess) -> bool:
    """Whether a process stops itself; False where it ends well instead."""
    deadline = time.monotonic() + 60
    while process.is_alive():
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.02)
    assert process.exitcode == 0
    return False


def test_attempts_that_disagree(tmp_path: Path, record: Record) -> None:
    """R11: every unit staged several times, each time with other values; its rows are of one attempt."""
    seeds = count_of("R11", 20, 1000)
    for seed in range(seeds):
        chance = random.Random(seed)
        uri = str(tmp_path / str(seed))
        table = Runner(uri).table
        world = World(num_samples=6)
        (plan,) = table.plan(world.samples, run_id="r")
        names = [f"s{n:04d}" for n in range(6)]
        for attempt in range(chance.randint(2, 4)):
            chance.shuffle(names)
            for name in names if attempt == 0 else names[: chance.randint(1, 6)]:
                rows = world.part([name], run_id=f"attempt-{attempt}")
                # A video has two units of two clips; they may be staged apart, as whole units.
                cut = [0, 2, 4] if rows.num_rows == 4 and chance.random() < 0.5 else [0, rows.num_rows]
                for start, stop in itertools.pairwise(cut):
                    table.write_part(plan, rows.slice(start, stop - start))
        table.publish(plan)
        check_between(uri)
        made_by: dict[tuple[str, int], set[str]] = {}
        for row in TableReader(table.store, FACTS).to_arrow().to_pylist():
            made_by.setdefault((row["sample_id"], row["clip_index"] // 2), set()).add(row["run_id"])
        assert all(len(attempts) == 1 for attempts in made_by.values())
    record(
        "R11",
        f"{seeds:,} seeds, units staged 1 to 4 times by attempts that disagree: each from one attempt",
    )


class Schedule:
    """Lets one thread at a time run, from one store operation to the next, in a seeded order."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._turn = threading.Condition()
        self._running: str | None = None
        self._names: list[str] = []
        self.errors: list[BaseException] = []

    def hook(self, name: str) -> Hook:
        def pause(operation: str, moment: str, key: str) -> None:
            # A renaming thread holds the target's lock; another one would wait for it in vain.
            if operation != "rename":
                self._yield(name)

        return pause

    def run(self, actors: dict[str, Callable[[Hook], None]]) -> None:
        self._names = list(actors)
        threads = [threading.Thread(target=self._act, args=(name, act)) for name, act in actors.items()]
        for thread in threads:
            thread.start()
        with self._turn:
            self._pass_on()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]

    def _act(self, name: str, act: Callable[[Hook], None]) -> None:
        self._wait(name)
        try:
            act(self.hook(name))
        except BaseException as error:  # noqa: BLE001  the test's thread raises it
            self.errors.append(error)
        finally:
            with self._turn:
                self._names.remove(name)
                self._pass_on()

    def _yield(self, name: str) -> None:
        with self._turn:
            self._pass_on()
        self._wait(name)

    def _wait(self, name: str) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == name, timeout=100)

    def _pass_on(self) -> None:
        self._running = self._chance.choice(self._names) if self._names else None
        self._turn.notify_all()


def test_collection_races_publishing(tmp_path: Path, record: Record) -> None:
    """R13: two runs and two collectors, in a seeded order of every single store operation."""
    seeds = count_of("R13", 12, 1000)
    deleted = 0
    for seed in range(seeds):
        uri = str(tmp_path / str(seed))
        old, new = World(num_samples=4, version="1"), World(num_samples=5, version="2")
        Runner(uri).extract(old)

        def extract(hook: Hook, run_id: str, uri: str = uri, new: World = new) -> None:
            Runner(uri, hook, run_id=run_id).extract(new)

        def sweep(hook: Hook, uri: str = uri) -> None:
            nonlocal deleted
            store = Runner(uri, hook).table.store
            for _ in range(3):
                counts = collect_parts(store)
                deleted += counts

        Schedule(seed).run(
            {
                "one": lambda hook: extract(hook, "one"),
                "two": lambda hook: extract(hook, "two"),
                "sweeper": sweep,
                "another": sweep,
            }
        )
        table = FeatureTable(open_store(uri), FACTS)
        assert content(table) == new.expected()
        assert verify(table.store, FACTS, new.samples).ok
    assert deleted
    record(
        "R13",
        f"{seeds:,} seeds, {deleted:,} objects collected meanwhile, none that is referenced; all runs end",
    )


def collect_parts(store: ObjectStore) -> int:
    """Collection of whatever age, but for temporary files: those of the living are younger than a day."""
    before = collection.now(store) - YOUNG
    count = 0
    for what, key in collection._collectable(store, FACTS, before):
        if what != "temporary files":
            store.delete(key)
            count += 1
    return count
