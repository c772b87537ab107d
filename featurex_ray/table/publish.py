"""One plan becomes visible by one conditional request (protocol, steps 4 and 5).

Invariant: whoever reads the target with `last_plan >= n` knows that plan n is published, and only
that read decides what follows; it doesn't matter who published, or what its answer said.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurex_ray import schemas
from featurex_ray.errors import ReplacedError, StoreUnavailableError, TableDamagedError
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.log import Plan, open_parquet, read_plan, reread
from featurex_ray.table.probe import require_multipart
from featurex_ray.table.staging import ATTEMPTS, attempts_of, choose, part_keys, read_failures, read_part
from featurex_ray.table.store import Body, ObjectStore, attempts, ensure, settle

ROW_GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Published:
    """A plan that is visible, as its done record says.

    Args:
        key: The features object.
        etag: Its ETag when this plan was the last in it.
        num_rows: Rows of the object, other plans' included.
        num_samples: Samples of the plan that have features.
        num_failed: Samples of the plan that failed.
        run_id: The run that planned it.
    """

    key: str
    etag: str
    num_rows: int
    num_samples: int
    num_failed: int
    run_id: str


class _Target(NamedTuple):
    """One generation of a plan's features object, open."""

    file: pq.ParquetFile
    etag: str
    last_plan: int


def read_done(store: ObjectStore, facts: TableFacts, plan: Plan) -> Published | None:
    """The plan's done record, or None while it is open.

    Raises:
        TableDamagedError: It is done, but its object is missing.
    """
    try:
        published = Published(**json.loads(store.read(facts.keys.done_record(plan.dataset, plan.number))[0]))
    except FileNotFoundError:
        return None
    if store.head(published.key) is None:
        raise TableDamagedError(f"{store.uri}/{published.key} is missing, but plan {plan.plan_id} is done")
    return published


def publish(store: ObjectStore, facts: TableFacts, plan: Plan) -> Published:
    """Makes a wholly staged plan visible and completes it. Any process may call it, any number of times.

    Raises:
        TableDamagedError: A part or the object contradicts the log, or the plan isn't wholly staged.
        StoreUnavailableError: The store didn't let it happen within the time limit; nothing is deleted.
    """
    done = read_done(store, facts, plan)
    if done:
        return done
    try:
        for _ in attempts():
            with contextlib.suppress(ReplacedError):  # by another run: begin again with what is there now
                with _open_target(store, facts, plan) as target:
                    if target is None or target.last_plan < plan.number:
                        _write(store, facts, plan, target)
                done = finish(store, facts, plan)
                if done:
                    return done
    except (FileNotFoundError, TableDamagedError) as error:
        done = read_done(store, facts, plan)  # who misses a part checks `done` first
        if done:
            return done
        raise TableDamagedError(
            f"plan {plan.plan_id} of {plan.dataset} can't be published: {error}"
        ) from error
    raise StoreUnavailableError(f"plan {plan.plan_id} of {plan.dataset} could not be published in time")


@contextlib.contextmanager
def _open_target(store: ObjectStore, facts: TableFacts, plan: Plan) -> Iterator[_Target | None]:
    key = facts.keys.feature_object(plan.dataset, plan.target)
    with contextlib.ExitStack() as stack:
        try:
            file, etag = stack.enter_context(open_parquet(store, key))
        except FileNotFoundError:
            yield None
            return
        marks = file.metadata.metadata or {}
        if marks.get(b"featurex.revision") != facts.revision.encode() or b"featurex.last_plan" not in marks:
            raise TableDamagedError(
                f"{store.uri}/{key} isn't an object of this table's revision {facts.revision}"
            )
        yield _Target(file, etag, int(marks[b"featurex.last_plan"]))


def _write(store: ObjectStore, facts: TableFacts, plan: Plan, base: _Target | None) -> None:
    """The conditional request: creates the target, or replaces the generation that was merged.

    Invariant: it has an effect only on `base`, so a request that arrives late has none.
    """
    key = facts.keys.feature_object(plan.dataset, plan.target)
    if base is None and plan.kind != "new":
        raise TableDamagedError(f"{store.uri}/{key} is missing, but plan {plan.plan_id} is to change it")
    with store.scratch() as folder:
        try:
            body = merge(store, facts, plan, base, folder)
        except OSError as error:
            if isinstance(error, FileNotFoundError):  # a part is gone: the plan may be done
                raise
            raise StoreUnavailableError(f"can't merge plan {plan.plan_id} in {folder}: {error}") from error
        if body.stat().st_size > store.single_put_bytes:
            require_multipart(store)
        if base is None:
            ensure(store, key, body)
        else:
            _replace(store, key, body, etag=base.etag)


def merge(store: ObjectStore, facts: TableFacts, plan: Plan, base: _Target | None, folder: Path) -> Path:
    """Writes the target's next generation into `folder`: the rows of other samples, and the plan's.

    Memory stays at a few row groups: the sources lie in the folder, mapped, and are read in order.

    Raises:
        TableDamagedError: A part is damaged or another's, or samples aren't staged.
    """
    samples = read_plan(store, facts, plan)
    kept = _mapped(_kept(facts, base, samples), facts.features_schema, folder / "kept")
    keys = [] if plan.kind == "prune" else part_keys(store, facts, plan)
    # One file for all parts, of which there may be more than a process may map.
    parts = (read_part(store, facts, plan, key).combine_chunks() for key in keys)
    staged = _mapped((b for part in parts for b in part.to_batches()), schemas.PART, folder / "staged")
    sources = [kept, *(pa.Table.from_batches([batch]) for batch in staged.to_batches())]
    pieces = pa.concat_tables([_runs(sources[_KEPT]), _staged_units(sources, samples, plan)])
    pieces = pieces.sort_by([(name, "ascending") for name in ("sample_id", "unit_index", "start")])
    return _write_object(facts, plan, samples, sources, pieces, folder / "merged")


_KEPT = 0
"""The source that holds the rows of other samples; those of the parts follow."""


def _kept(facts: TableFacts, base: _Target | None, samples: pa.Table) -> Iterator[pa.RecordBatch]:
    if base is None:
        return
    for batch in base.file.iter_batches(batch_size=8192):
        others = pc.invert(pc.is_in(batch["sample_id"], samples["sample_id"].combine_chunks()))
        yield batch.filter(others).cast(facts.features_schema)


def _mapped(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> pa.Table:
    """The batches as a table that lies on disk: its pages come and go as they are needed."""
    with pa.ipc.new_file(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(None))
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _runs(kept: pa.Table) -> pa.Table:
    """The kept rows, a piece for each run of one sample in a batch, as units are (`ATTEMPTS`)."""
    names = ["sample_id", "etag", "num_units", "unit_index", "error"]
    found, first = [ATTEMPTS.empty_table()], 0
    for batch in kept.to_batches():
        unit = [pa.repeat(value, len(batch)) for value in ("", 1, 0)]
        rows = pa.table([batch["sample_id"], *unit, pa.nulls(len(batch))], names=names)
        found.append(attempts_of(rows, _KEPT, first=first))
        first += len(batch)
    return pa.concat_tables(found)


def _staged_units(sources: list[pa.Table], samples: pa.Table, plan: Plan) -> pa.Table:
    """The units of the plan's good samples, one attempt of each (`ATTEMPTS`).

    Raises:
        TableDamagedError: A sample isn't staged, or isn't the plan's.
    """
    found = [attempts_of(rows, number) for number, rows in enumerate(sources) if number != _KEPT]
    chosen = choose(pa.concat_tables([ATTEMPTS.empty_table(), *found]))
    if plan.kind == "prune":
        return chosen.units
    planned = samples["sample_id"].combine_chunks()
    staged = pa.concat_arrays([chosen.units["sample_id"].combine_chunks().unique(), chosen.failed])
    for wrong, what in (
        (planned.filter(pc.invert(pc.is_in(planned, staged))), "not wholly staged"),
        (staged.filter(pc.invert(pc.is_in(staged, planned))), "staged but not planned"),
    ):
        if len(wrong):
            raise TableDamagedError(
                f"plan {plan.plan_id} of {plan.dataset}: {len(wrong)} samples are {what}, "
                f"such as {pc.min(wrong).as_py()!r}"
            )
    return chosen.units


def _write_object(
    facts: TableFacts, plan: Plan, samples: pa.Table, sources: list[pa.Table], pieces: pa.Table, path: Path
) -> Path:
    run_ids: set[str] = set()
    with pq.ParquetWriter(
        path,
        facts.features_schema,
        compression="zstd",
        use_dictionary=schemas.REPEATED,
        write_page_checksum=True,
    ) as writer:
        order = WholeSamples()
        for group in _cut(pieces, sources):
            rows = _gather(facts, samples, sources, group)
            order.check(rows)
            writer.write_table(rows, row_group_size=rows.num_rows)
            run_ids.update(pc.unique(rows["run_id"]).to_pylist())
        order.check_end()
        writer.add_key_value_metadata(_marks(facts, plan) | {"featurex.run_ids": json.dumps(sorted(run_ids))})
    return path


def _marks(facts: TableFacts, plan: Plan) -> dict[str, str]:
    return {
        "featurex.table": facts.name,
        "featurex.dataset": plan.dataset,
        "featurex.extractor": json.dumps(facts.extractor),
        "featurex.revision": facts.revision,
        "featurex.dimension": str(facts.dimension),
        "featurex.last_plan": str(plan.number),
    }


def _cut(pieces: pa.Table, sources: list[pa.Table]) -> Iterator[pa.Table]:
    """Pieces in groups of about `ROW_GROUP_BYTES`."""
    row_bytes = np.array([rows.nbytes / max(1, rows.num_rows) for rows in sources])
    lengths = pieces["stop"].to_numpy() - pieces["start"].to_numpy()
    ends = np.cumsum(lengths * row_bytes[pieces["source"].to_numpy()])
    start, done = 0, 0.0
    while start < len(ends):
        stop = min(int(np.searchsorted(ends, done + ROW_GROUP_BYTES)) + 1, len(ends))
        yield pieces.slice(start, stop - start)
        start, done = stop, ends[stop - 1]


def _gather(facts: TableFacts, samples: pa.Table, sources: list[pa.Table], group: pa.Table) -> pa.Table:
    """The rows of one row group, in order. Each source is touched in one stretch, or nearly."""
    kept: list[pa.Table] = []
    staged: list[pa.Table] = []
    for source in pc.unique(group["source"]).to_pylist():
        pieces = group.filter(pc.equal(group["source"], source))
        slices = [sources[source].slice(start, stop - start) for start, stop in _stretches(pieces)]
        (kept if source == _KEPT else staged).extend(slices)
    if staged:  # all at once: looking rows up in the plan takes as long as the plan is, however few they are
        kept.append(_features(facts, samples, pa.concat_tables(staged)))
    return pa.concat_tables(kept).sort_by([("sample_id", "ascending"), ("clip_index", "ascending")])


def _stretches(pieces: pa.Table) -> Iterator[tuple[int, int]]:
    """Pieces of one source as [start, stop), in order; those that follow each other are one."""
    starts, stops = np.sort(pieces["start"].to_numpy()), np.sort(pieces["stop"].to_numpy())
    is_new = np.append(True, starts[1:] != stops[:-1])
    yield from zip(starts[is_new].tolist(), stops[np.append(is_new[1:], True)].tolist(), strict=True)


def _features(facts: TableFacts, samples: pa.Table, rows: pa.Table) -> pa.Table:
    """Staged rows as feature rows: what the media says from the part, the rest from the plan."""
    # A carried column is the plan's, also where parts have one of its name, such as `etag`.
    own = {*rows.column_names} - {*facts.carried.names}
    names = [name for name in facts.features_schema.names if name not in own]
    planned = samples.select([name for name in names if name != "extractor_revision"])
    planned = planned.take(pc.index_in(rows["sample_id"], samples["sample_id"].combine_chunks()))
    revision = pa.repeat(pa.scalar(facts.revision), rows.num_rows)
    planned = planned.append_column("extractor_revision", revision)
    columns = [(planned if item.name in names else rows)[item.name] for item in facts.features_schema]
    return pa.Table.from_arrays(columns, schema=facts.features_schema)


class WholeSamples:
    """Whole samples, each once, in order: checked on what is written, wherever it came from."""

    def __init__(self) -> None:
        self._last: pa.Table = pa.table([[""], [-1], [0]], schema=_PLACES)

    def check(self, rows: pa.Table) -> None:
        """Continues with the next rows.

        Raises:
            TableDamagedError: A clip is missing, doubled or out of place.
        """
        places = rows.select(_PLACES.names).replace_schema_metadata(None).cast(_PLACES)
        before = pa.concat_tables([self._last, places])
        self._last = before.slice(rows.num_rows)
        before = before.slice(0, rows.num_rows)
        clip, was = places["clip_index"].to_numpy(), before["clip_index"].to_numpy()
        total, had = places["num_clips"].to_numpy(), before["num_clips"].to_numpy()
        later = pc.greater(places["sample_id"], before["sample_id"]).to_numpy()
        same = pc.equal(places["sample_id"], before["sample_id"]).to_numpy()
        begins = (clip == 0) & (later | (was < 0))
        follows = same & (clip == was + 1) & (total == had)
        for row in np.flatnonzero(np.where(begins, was + 1 != had, ~follows))[:1].tolist():
            if begins[row]:
                _require_whole(before.slice(row, 1))
            raise TableDamagedError(
                f"sample {places['sample_id'][row].as_py()!r}: clip {clip[row]} of {total[row]} is doubled "
                "or out of place"
            )

    def check_end(self) -> None:
        """The sample so far must be whole.

        Raises:
            TableDamagedError: It isn't.
        """
        _require_whole(self._last)


_PLACES = pa.schema([("sample_id", pa.string()), ("clip_index", pa.int32()), ("num_clips", pa.int32())])


def _require_whole(last: pa.Table) -> None:
    """`last` is the last row of a sample."""
    row = last.to_pylist()[0]
    if row["clip_index"] + 1 != row["num_clips"]:
        raise TableDamagedError(
            f"sample {row['sample_id']!r} has {row['clip_index'] + 1} of {row['num_clips']} clips"
        )


def finish(store: ObjectStore, facts: TableFacts, plan: Plan) -> Published | None:
    """Completes a plan that is published, by whomever; None if it isn't yet.

    Invariant: all that follows is decided by one read of the target, pinned to its ETag, and each
    step is a conditional write that finds itself already made when it is repeated.
    """
    samples = read_plan(store, facts, plan)
    ids = samples["sample_id"].combine_chunks()
    with _open_target(store, facts, plan) as target:
        if target is None or target.last_plan < plan.number:
            return None
        if target.last_plan > plan.number:
            return _done_before(store, facts, plan)
        held = pc.is_in(ids, _sample_ids(target.file))
        num_rows, etag = target.file.metadata.num_rows, target.etag
    failed = ids.filter(pc.invert(held)) if plan.kind != "prune" else ids.slice(0, 0)
    if len(failed):
        body = _encode_failures(facts, plan, samples, read_failures(store, facts, plan, failed))
        ensure(store, facts.keys.failure_object(plan.dataset, plan.number), body)
    for older in plan.failed_in:
        _remove_failures(store, facts.keys.failure_object(plan.dataset, older), ids)
    key = facts.keys.feature_object(plan.dataset, plan.target)
    done = Published(key, etag, num_rows, len(ids) - len(failed), len(failed), plan.run_id)
    ensure(store, facts.keys.done_record(plan.dataset, plan.number), json.dumps(asdict(done)).encode())
    return done


def _done_before(store: ObjectStore, facts: TableFacts, plan: Plan) -> Published:
    """The done record of a plan whose target a later one changed: it was made only because this is done."""
    done = read_done(store, facts, plan)
    if done is None:
        missing = facts.keys.done_record(plan.dataset, plan.number)
        raise TableDamagedError(f"{store.uri}/{missing} is missing, but a later plan changed the same object")
    return done


def finish_if_published(store: ObjectStore, facts: TableFacts, plan: Plan) -> Published | None:
    """`finish`, while others may complete the plan and collect its parts.

    Raises:
        TableDamagedError: An object that the plan needs is missing, and nobody completed it.
    """
    key = facts.keys.feature_object(plan.dataset, plan.target)
    try:
        return reread(lambda: finish(store, facts, plan), what=f"{store.uri}/{key}")
    except (FileNotFoundError, TableDamagedError) as error:
        done = read_done(store, facts, plan)  # who misses a part checks `done` first
        if done is None:
            raise TableDamagedError(
                f"plan {plan.plan_id} of {plan.dataset} can't be completed: {error}"
            ) from error
        return done


def _sample_ids(file: pq.ParquetFile) -> pa.Array:
    groups = [
        pc.unique(file.read_row_group(number, columns=["sample_id"])["sample_id"])
        for number in range(file.num_row_groups)
    ]
    return pa.concat_arrays([pa.array([], pa.string()), *groups])


def _encode_failures(facts: TableFacts, plan: Plan, samples: pa.Table, failures: pa.Table) -> bytes:
    planned = samples.take(pc.index_in(failures["sample_id"], samples["sample_id"].combine_chunks()))
    columns = [
        (failures if name in failures.column_names else planned)[name] for name in schemas.FAILURES.names
    ]
    marks = {name: value for name, value in _marks(facts, plan).items() if name != "featurex.last_plan"}
    return _encode(pa.Table.from_arrays(columns, schema=schemas.FAILURES.with_metadata(marks)))


def _encode(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", use_dictionary=schemas.REPEATED, write_page_checksum=True)
    return bytes(sink.getvalue())


def _remove_failures(store: ObjectStore, key: str, ids: pa.Array) -> None:
    """Takes samples out of an older failure object, which only ever shrinks."""

    def read() -> tuple[pa.Table, str]:
        with open_parquet(store, key) as (file, etag):
            return file.read(), etag

    for _ in attempts():
        rows, etag = reread(read, what=f"{store.uri}/{key}")
        left = rows.filter(pc.invert(pc.is_in(rows["sample_id"], ids)))
        if left.num_rows == rows.num_rows:
            return
        _replace(store, key, _encode(left), etag=etag)
    raise StoreUnavailableError(f"{store.uri}/{key} could not be replaced in time")


def _replace(store: ObjectStore, key: str, body: Body, *, etag: str) -> None:
    """Replaces this generation, unless it is another's by now: the caller reads it again."""
    settle(lambda: store.replace(key, body, etag=etag), over=lambda: store.head(key) != etag)
