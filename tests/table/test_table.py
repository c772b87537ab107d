import errno
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurex_ray.errors import (
    ManifestError,
    ReplacedError,
    RequestError,
    RevisionMismatchError,
    RunError,
    StoreUnavailableError,
    TableDamagedError,
    TableNotFoundError,
)
from featurex_ray.table import FeatureTable, log, open_store, prune, publish
from featurex_ray.table.compare import State
from featurex_ray.table.publish import merge
from featurex_ray.table.store import Listed, ObjectStore
from featurex_ray.table.verify import verify
from tests.table.conftest import FACTS, World, content, observed, public_etags, run, stage


def test_run(table: FeatureTable) -> None:
    world = World(datasets=("a", "b.1"), failing=frozenset({"s0003", "s0004"}))
    assert run(table, world) == 6
    assert content(table) == world.expected()
    assert verify(table.store, table.facts, world.samples).ok


def test_run_is_resumed_where_it_stopped(table: FeatureTable) -> None:
    world = World()
    plan = table.plan(world.samples, run_id="one")[0]
    table.write_part(plan, world.part(["s0001", "s0003"], run_id="one"))
    assert table.staged_samples(plan) == {"s0001", "s0003"}
    run(pickle.loads(pickle.dumps(table)), world, run_id="two")
    assert content(table) == world.expected()
    rows = table.store.read("t/dataset=d/0000000000.parquet")[0]
    made_by = pa.parquet.read_table(pa.BufferReader(rows)).select(["sample_id", "run_id"]).to_pylist()
    assert {row["sample_id"] for row in made_by if row["run_id"] == "one"} == {"s0001", "s0003"}


def test_run_again_writes_nothing(table: FeatureTable) -> None:
    world = World(failing=frozenset({"s0005"}))
    run(table, world)
    operations: list[str] = []
    watched = observed(table.store, lambda operation, moment, key: operations.append(operation))
    assert run(replace(table, store=watched), world) == 0
    assert operations
    assert not {"create", "replace", "put", "write", "link", "rename"} & set(operations)


def test_changed_samples_replace_the_object_that_holds_them(table: FeatureTable) -> None:
    run(table, World(version="1"))
    before = public_etags(table.store)
    run(table, World(version=None))  # null is never a change
    assert public_etags(table.store) == before
    changed = World(num_samples=14, version="22", failing=frozenset({"s0002"}))
    run(table, changed)
    assert content(table) == changed.expected()
    added = [key.partition("/")[0] for key in set(public_etags(table.store)) - set(before)]
    assert sorted(added) == ["t", "t.failures"]  # an object for the two new samples; one for the failure
    assert verify(table.store, table.facts, changed.samples).ok


def test_failed_samples_are_held_until_their_version_changes(table: FeatureTable) -> None:
    failing = World(version="1", failing=frozenset({"s0002", "s0011"}))
    run(table, failing)
    assert table.compare(failing.samples).failed == 2
    assert run(table, World(version="1")) == 0
    mended = World(version="2")
    run(table, mended)
    assert content(table) == mended.expected()
    assert verify(table.store, table.facts, mended.samples).ok


def test_object_and_failures_without_rows(table: FeatureTable) -> None:
    world = World(num_samples=2, failing=frozenset({"s0000", "s0001"}))
    run(table, world)
    assert content(table) == ([], [("d", "s0000"), ("d", "s0001")])
    assert len(public_etags(table.store)) == 2


def test_compare_counts_and_writes_nothing(local_table: FeatureTable) -> None:
    run(local_table, World(num_samples=6, version="1", failing=frozenset({"s0001"})))
    local_table.plan(World(num_samples=8).samples, run_id="r")
    before = [item.key for item in local_table.store.list("")]
    work = local_table.compare(World(num_samples=9, version="2").samples)
    assert [item.key for item in local_table.store.list("")] == before
    assert work.counts == {
        ("d", State.CHANGED): 5,
        ("d", State.REVISED): 1,
        ("d", State.OPEN): 2,
        ("d", State.NEW): 1,
    }
    assert (work.new, work.changed, work.open, work.done, work.failed) == (1, 6, 2, 0, 0)
    assert FeatureTable.preview(local_table.store, "other", World().samples).new == 12


@pytest.mark.parametrize("change", ["order", "appended", "cut"])
def test_a_manifest_that_changes_while_it_is_planned_plans_no_wrong_row(
    local_table: FeatureTable, change: str
) -> None:
    """Rows are compared in one reading and planned in the next."""
    run(local_table, World(10))
    first = pa.Table.from_batches(World(11).samples()).sort_by("sample_id")
    second = {
        "order": first.sort_by([("sample_id", "descending")]),
        "appended": pa.concat_tables([first, first.slice(0, 1)]),
        "cut": first.slice(0, 4),
    }[change]
    readings = iter([first, second])
    with pytest.raises(RunError, match="the manifest changed while it was read"):
        local_table.plan(lambda: next(readings).combine_chunks().to_batches(), run_id="r")
    assert list(local_table.open_plans()) == []
    run(local_table, World(11))
    assert content(local_table) == World(11).expected()


def test_who_reads_an_object_that_is_replaced_begins_again(
    local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(4)
    (plan,) = local_table.plan(world.samples, run_id="r")
    stage(local_table, plan, world)
    times = []

    def replaced_once(*arguments: Any) -> Path:
        times.append(1)
        if len(times) == 1:
            raise ReplacedError("it was replaced while it was read")
        return merge(*arguments)

    monkeypatch.setattr(publish, "merge", replaced_once)
    local_table.publish(plan)
    assert (len(times), content(local_table)) == (2, world.expected())


def test_who_completes_a_plan_whose_objects_are_replaced_begins_again(
    local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features object by another run, the failure object by one that took samples out of it."""
    world = World(4, failing=frozenset({"s0001"}))
    (plan,) = local_table.plan(world.samples, run_id="r")
    stage(local_table, plan, world)
    local_table.publish(plan)
    local_table.store.delete(local_table.facts.keys.done_record("d", 0))  # as where its writer was killed
    times: list[str] = []

    @contextmanager
    def replaced_once(store: ObjectStore, key: str) -> Iterator[Any]:
        times.append(key)
        if times.count(key) == 1:
            raise ReplacedError("it was replaced while it was read")
        with log.open_parquet(store, key) as opened:
            yield opened

    monkeypatch.setattr(publish, "open_parquet", replaced_once)
    monkeypatch.setattr(prune, "open_parquet", replaced_once)
    arguments = local_table.store, local_table.facts
    assert prune.failed_ids(*arguments, "d", 0).to_pylist() == ["s0001"]
    published = publish.finish_if_published(*arguments, plan)
    assert published is not None
    assert (published.num_samples, published.num_failed) == (3, 1)
    assert max(map(times.count, times)) == 2


def test_parts_beyond_what_a_process_may_map_are_merged(
    local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux maps 65,530 files; a plan of long videos has more parts."""
    world = World(40)
    (plan,) = local_table.plan(world.samples, run_id="r")
    for number in range(40):
        local_table.write_part(plan, world.part([f"s{number:04d}"]))
    mapped = []
    write = publish._write_object

    def watched(*arguments: Any) -> Path:
        folder = str(arguments[-1].parent)
        mapped.append(sum(folder in line for line in Path("/proc/self/maps").read_text().splitlines()))
        return write(*arguments)

    monkeypatch.setattr(publish, "_write_object", watched)
    local_table.publish(plan)
    assert 1 <= mapped[0] <= 2
    assert content(local_table) == world.expected()


def test_a_full_disk_is_not_called_a_damaged_table(
    local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(local_table, World(4, version="1"))
    world = World(4, version="2")
    (plan,) = local_table.plan(world.samples, run_id="r")
    stage(local_table, plan, world)

    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish, "merge", full)
    with pytest.raises(StoreUnavailableError, match="No space left on device"):
        local_table.publish(plan)


def test_samples_of_open_targets_wait(local_table: FeatureTable) -> None:
    run(local_table, World(version="1"), per_plan=12)
    half = World(num_samples=6, version="2")
    first = local_table.plan(half.samples, run_id="one")
    again = local_table.plan(World(version="2").samples, run_id="two")
    assert [plan.number for plan in first] == [plan.number for plan in again] == [1]
    run(local_table, World(version="2"))
    assert content(local_table) == World().expected()


def test_racing_planners_share_no_sample(store: ObjectStore) -> None:
    tables = [FeatureTable.open_or_create(store, FACTS) for _ in range(4)]
    worlds = [World(num_samples=10 + 2 * n) for n in range(4)]
    barrier = threading.Barrier(4)

    def race(n: int) -> int:
        barrier.wait()
        return run(tables[n], worlds[n], run_id=f"run-{n}", per_plan=4)

    with ThreadPoolExecutor(4) as racers:
        assert any(racers.map(race, range(4)))  # who comes late finds all done
    assert content(tables[0]) == worlds[3].expected()
    named = [
        name
        for item in store.list("_featurex/t/plans/")
        for name in pa.parquet.read_table(pa.BufferReader(store.read(item.key)[0]))["sample_id"].to_pylist()
    ]
    assert sorted(named) == [f"s{i:04d}" for i in range(16)]


def test_racing_publishers_publish_once(store: ObjectStore) -> None:
    table = FeatureTable.open_or_create(store, FACTS)
    world = World(failing=frozenset({"s0001"}))
    (plan,) = table.plan(world.samples, run_id="r")
    stage(table, plan, world)
    with ThreadPoolExecutor(4) as racers:
        assert len(set(racers.map(table.publish, [plan] * 4))) == 1
    assert content(table) == world.expected()


def test_one_attempt_of_each_unit(local_table: FeatureTable) -> None:
    """Units staged twice, by extractors that disagree: each unit's rows are of one attempt."""
    world = World(num_samples=4)
    (plan,) = local_table.plan(world.samples, run_id="r")
    for run_id in ("one", "two"):
        local_table.write_part(plan, world.part(["s0000", "s0001", "s0002", "s0003"], run_id=run_id))
    local_table.publish(plan)
    assert content(local_table) == world.expected()


def test_units_of_one_generation(local_table: FeatureTable) -> None:
    """Half of a sample from one generation of its media and half from another isn't a sample."""
    world = World(num_samples=1)
    (plan,) = local_table.plan(world.samples, run_id="r")
    whole = world.part(["s0000"], etag="new")
    local_table.write_part(plan, world.part(["s0000"], etag="old").slice(0, 2))
    local_table.write_part(plan, whole.slice(2))
    assert not local_table.is_staged(plan)
    with pytest.raises(TableDamagedError, match="1 samples are not wholly staged, such as 's0000'"):
        local_table.publish(plan)
    local_table.write_part(plan, whole.slice(0, 2))
    local_table.publish(plan)
    assert content(local_table) == world.expected()


def test_a_good_attempt_beats_a_failed_one(local_table: FeatureTable) -> None:
    world = World(num_samples=1)
    (plan,) = local_table.plan(world.samples, run_id="r")
    local_table.write_part(plan, World(failing=frozenset({"s0000"})).part(["s0000"]))
    local_table.write_part(plan, world.part(["s0000"]))
    assert local_table.publish(plan).num_failed == 0


def test_read_plan_slices(local_table: FeatureTable) -> None:
    (plan,) = local_table.plan(World(num_samples=2500).samples, run_id="r")
    whole = local_table.read_plan(plan)
    assert whole["sample_id"].to_pylist() == [f"s{i:04d}" for i in range(2500)]
    for rows in (range(0, 1024), range(1024, 2048), range(2048, 2500), range(1000, 1030)):
        assert local_table.read_plan(plan, rows) == whole.slice(rows.start, len(rows))


def test_plans_are_in_the_order_in_which_media_lie(local_table: FeatureTable) -> None:
    """A slice of a plan is decoded by one actor: it should read neighbours, whatever they are called."""
    rows = [
        {"dataset": "d", "sample_id": name, "uri": name, "data_file": file, "data_row": row}
        for row, (name, file) in enumerate(
            [("m#0", "b"), ("m#1", "a"), ("m#10", "a"), ("m#2", "a"), ("z", None), ("y", None)]
        )
    ]
    rows[4:] = [
        {**row, "data_row": None, "uri": uri} for row, uri in zip(rows[4:], ("u/1", "u/2"), strict=True)
    ]
    batch = pa.RecordBatch.from_pylist(rows[::-1], schema=local_table.facts.sample_schema)
    (plan,) = local_table.plan(lambda: iter([batch]), run_id="r")
    assert local_table.read_plan(plan)["sample_id"].to_pylist() == ["m#1", "m#10", "m#2", "m#0", "y", "z"]


def test_max_samples_per_plan(local_table: FeatureTable) -> None:
    plans = local_table.plan(World(num_samples=23).samples, run_id="r", max_samples_per_plan=10)
    assert [plan.num_samples for plan in plans] == [10, 10, 3]


def test_save_report(table: FeatureTable) -> None:
    assert table.store.read(table.save_report("r1", {"done": 3}))[0] == b'{\n "done": 3\n}'


def test_open_fails(store: ObjectStore) -> None:
    with pytest.raises(TableNotFoundError, match="no feature table named 'nothing'"):
        FeatureTable.open(store, "nothing")


def test_another_revision_fails(table: FeatureTable) -> None:
    other = replace(FACTS, revision="rev-2", extractor={"name": "fake", "precision": "bf16"})
    with pytest.raises(RevisionMismatchError, match=r"rev-1, .*rev-2 .precision: 'fp32' there, 'bf16' here"):
        FeatureTable.open_or_create(table.store, other)


def test_other_carried_columns_fails(table: FeatureTable) -> None:
    other = replace(FACTS, carried=pa.schema([("label", pa.list_(pa.string()))]))
    with pytest.raises(RequestError, match="carries label as string; this manifest has it as list"):
        FeatureTable.open_or_create(table.store, other)
    with pytest.raises(RequestError, match=r"without the carried column scene; it carries .label"):
        FeatureTable.open_or_create(table.store, replace(FACTS, carried=pa.schema([("scene", pa.string())])))


def test_a_column_of_text_takes_a_night_of_numbers(table: FeatureTable) -> None:
    """As CSV is read: labels that all look like numbers are some."""
    facts = replace(FACTS, carried=pa.schema([("label", pa.int64())]))
    later = FeatureTable.open_or_create(table.store, facts)
    row = {"dataset": "d", "sample_id": "s0001", "uri": "u", "label": 7}
    batch = pa.RecordBatch.from_pylist([row], schema=facts.sample_schema)
    (plan,) = later.plan(lambda: iter([batch]), run_id="r")
    assert later.read_plan(plan)["label"].to_pylist() == ["7"]


@pytest.mark.parametrize(("kind", "value"), [(pa.int64(), 7), (pa.list_(pa.int64()), [7])])
def test_a_column_without_values_is_of_any_type(store: ObjectStore, kind: pa.DataType, value: object) -> None:
    """Which kind of values come is known when the first come; a new table takes text for them."""
    empty = pa.list_(pa.null()) if pa.types.is_list(kind) else pa.null()
    facts = replace(FACTS, carried=pa.schema([("label", kind)]))
    FeatureTable.open_or_create(store, facts)
    nothing = replace(facts, carried=pa.schema([("label", empty)]))
    table = FeatureTable.open_or_create(store, nothing)
    row = {"dataset": "d", "sample_id": "s0001", "uri": "u"}
    batch = pa.RecordBatch.from_pylist([row], schema=nothing.sample_schema)
    (plan,) = table.plan(lambda: iter([batch]), run_id="r")
    assert table.read_plan(plan).schema.field("label").type == kind

    fresh = FeatureTable.open_or_create(store, replace(nothing, name="fresh"))
    row["label"] = value
    batch = pa.RecordBatch.from_pylist([row], schema=facts.sample_schema)
    (plan,) = fresh.plan(lambda: iter([batch]), run_id="r")
    wanted = [str(each) for each in value] if isinstance(value, list) else str(value)
    assert fresh.read_plan(plan)["label"].to_pylist() == [wanted]


def test_public_objects_without_facts_fails(store: ObjectStore) -> None:
    store.create("t/dataset=d/part-0.parquet", b"somebody else's")
    with pytest.raises(RequestError, match="this is not a table of ours"):
        FeatureTable.open_or_create(store, FACTS)


@pytest.mark.parametrize(
    "name", ["a/b", "", "_featurex", "x.failures", ".hidden", "ä", "tmp", "probe", "clock"]
)
def test_table_name_fails(local_table: FeatureTable, name: str) -> None:
    with pytest.raises(RequestError, match="can't be a table's name"):
        FeatureTable.open_or_create(local_table.store, replace(FACTS, name=name))


def test_duplicate_samples_fails(local_table: FeatureTable) -> None:
    def twice() -> list[pa.RecordBatch]:
        return [*World(num_samples=2).samples(), *World(num_samples=1).samples()]

    with pytest.raises(ManifestError, match="sample 's0000' occurs more than once"):
        local_table.plan(twice, run_id="r")


def test_write_part_fails(local_table: FeatureTable) -> None:
    world = World(num_samples=2)
    (plan,) = local_table.plan(world.samples, run_id="r")
    rows = world.part(["s0001"])
    place = rows.schema.get_field_index("feature")
    for feature, message in (
        ([1.0, 2.0], "features have 2 values"),
        ([1.0, float("nan"), 1.0, 1.0], "aren't finite"),
    ):
        bad = rows.set_column(place, "feature", pa.array([feature], pa.list_(pa.float32())))
        with pytest.raises(ValueError, match=message):
            local_table.write_part(plan, bad)


def test_clips_that_do_not_fit_fails(local_table: FeatureTable) -> None:
    world = World(num_samples=1)
    (plan,) = local_table.plan(world.samples, run_id="r")
    rows = world.part(["s0000"])
    place = rows.schema.get_field_index("clip_index")
    local_table.write_part(plan, rows.set_column(place, "clip_index", pa.array([0, 1, 1, 2], pa.int32())))
    with pytest.raises(TableDamagedError, match="sample 's0000': clip 1 of 4 is doubled"):
        local_table.publish(plan)


def test_damaged_part_fails(local_table: FeatureTable) -> None:
    world = World()
    (plan,) = local_table.plan(world.samples, run_id="r")
    stage(local_table, plan, world)
    key = next(local_table.store.list("_featurex/t/staging/")).key
    body = bytearray(local_table.store.read(key)[0])
    body[60] ^= 1
    local_table.store.put(key, bytes(body))
    with pytest.raises(TableDamagedError, match=f"{key} is damaged"):
        local_table.publish(plan)


def test_part_of_another_plan_fails(local_table: FeatureTable) -> None:
    world = World(num_samples=4)
    one, two = local_table.plan(world.samples, run_id="r", max_samples_per_plan=2)
    stage(local_table, one, world)
    item = next(local_table.store.list("_featurex/t/staging/"))
    local_table.store.put(item.key.replace("0000000000/", "0000000001/"), local_table.store.read(item.key)[0])
    with pytest.raises(TableDamagedError, match="is not a part of plan 0000000001"):
        local_table.staged_samples(two)


@pytest.mark.parametrize("num_bytes", [0, 3, 400])
def test_damaged_plan_fails(local_table: FeatureTable, num_bytes: int) -> None:
    (plan,) = local_table.plan(World().samples, run_id="r")
    key = local_table.facts.keys.plan("d", plan.number)
    local_table.store.put(key, local_table.store.read(key)[0][:num_bytes])
    with pytest.raises(TableDamagedError, match=f"{key} can't be read"):
        local_table.compare(World().samples)


def test_a_listing_may_show_the_later_of_two_new_plans_only(
    local_table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_table.plan(World().samples, run_id="r", max_samples_per_plan=4)
    hidden = [local_table.facts.keys.plan("d", 1)]
    real = type(local_table.store).list

    def lists(store: ObjectStore, prefix: str) -> Iterator[Listed]:
        passed_over = hidden.pop() if hidden and prefix == local_table.facts.keys.plans else None
        return (item for item in real(store, prefix) if item.key != passed_over)

    monkeypatch.setattr(type(local_table.store), "list", lists)
    assert local_table.compare(World().samples).open == World().num_samples
    assert not hidden


def test_missing_plan_fails(local_table: FeatureTable) -> None:
    local_table.plan(World().samples, run_id="r", max_samples_per_plan=4)
    local_table.store.delete(local_table.facts.keys.plan("d", 1))
    with pytest.raises(TableDamagedError, match=r"0000000001\.parquet is missing, but later plans exist"):
        local_table.compare(World().samples)


def test_deleted_object_fails(local_table: FeatureTable) -> None:
    run(local_table, World(), per_plan=12)
    (open_store(local_table.store.uri).root / "t/dataset=d/0000000000.parquet").unlink()
    with pytest.raises(
        TableDamagedError, match=r"0000000000\.parquet is missing, but plan 0000000000 is done"
    ):
        local_table.plan(World().samples, run_id="r")


def test_deleted_done_record_fails(local_table: FeatureTable) -> None:
    """Where only it could say what came of a plan; else the object says it, and the record is made again."""
    run(local_table, World(version="1"), per_plan=12)
    record = local_table.facts.keys.done_record("d", 0)
    local_table.store.delete(record)
    assert run(local_table, World(version="1"), per_plan=12) == 0
    run(local_table, World(version="2"), per_plan=12)
    local_table.store.delete(record)
    with pytest.raises(TableDamagedError, match=f"{record} is missing, but a later plan changed"):
        local_table.finish_published()


def test_backfilled_days(local_table: FeatureTable) -> None:
    """A sample that was planned from a later day is no work for an earlier one, whatever its version."""

    def day(number: int, version: str) -> World:
        return World(num_samples=4, version=version, day=date(2026, 1, number))

    run(local_table, day(2, "two"))
    assert run(local_table, day(1, "one")) == 0
    assert run(local_table, day(2, "two")) == 0
    assert run(local_table, day(3, "two")) == 0
    assert run(local_table, day(3, "three")) == 1
    assert run(local_table, World(num_samples=4, version="four")) == 1  # an extract has no day
    assert run(local_table, day(1, "one")) == 1
    assert content(local_table) == World(num_samples=4).expected()


@pytest.mark.parametrize("most", [0, 1, 5, 7, 100])
def test_most_samples(local_table: FeatureTable, most: int) -> None:
    """So many are planned at most, and open plans count."""
    world = World(num_samples=12)
    open_samples = local_table.plan(world.samples, run_id="r", max_samples_per_plan=3, most_samples=1)
    assert [plan.num_samples for plan in open_samples] == [1]
    plans = local_table.plan(world.samples, run_id="r", max_samples_per_plan=3, most_samples=most)
    assert sum(plan.num_samples for plan in plans) == min(max(most, 1), 12)


def test_most_samples_and_changed_ones(local_table: FeatureTable) -> None:
    """One object is one plan, however many samples of it changed."""
    run(local_table, World(num_samples=6, version="1"), per_plan=6)
    plans = local_table.plan(World(num_samples=6, version="2").samples, run_id="r", most_samples=2)
    assert [plan.num_samples for plan in plans] == [6]
