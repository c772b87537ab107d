"""Which attempts count: the columns' arithmetic against the rule as it reads."""

from itertools import groupby
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from featurex_ray.table.publish import _runs
from featurex_ray.table.staging import ATTEMPTS, choose

attempts = st.fixed_dictionaries(
    {
        "sample_id": st.sampled_from(["a", "b", "é"]),
        "etag": st.sampled_from(["", "x"]),
        "num_units": st.integers(1, 3),
        "unit_index": st.integers(0, 2),
        "source": st.integers(0, 2),
        "failed": st.booleans(),
    }
)


def by_the_rule(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """A sample is good if one generation of its media has every unit; else it failed, or isn't staged."""
    units, failed = [], []
    rows = sorted(rows, key=lambda row: [row[name] for name in ATTEMPTS.names[:6]])
    for sample_id, tries in groupby(rows, key=lambda row: row["sample_id"]):
        mine = list(tries)
        for (_, num_units), same in groupby(mine, key=lambda row: (row["etag"], row["num_units"])):
            first: dict[int, dict[str, Any]] = {}
            for row in same:
                if not row["failed"]:
                    first.setdefault(row["unit_index"], row)
            if sorted(first) == list(range(num_units)):
                units += [first[index] for index in range(num_units)]
                break
        else:
            failed += [sample_id] if any(row["failed"] for row in mine) else []
    return units, failed


@given(st.lists(attempts, max_size=12))
@settings(deadline=None)
def test_choice_is_what_the_rule_says(rows: list[dict[str, Any]]) -> None:
    rows = [row | {"start": place, "stop": place + 1} for place, row in enumerate(rows)]
    chosen = choose(pa.Table.from_pylist(rows, schema=ATTEMPTS))
    units, failed = by_the_rule(rows)
    assert chosen.units.to_pylist() == [{name: unit[name] for name in ATTEMPTS.names} for unit in units]
    assert chosen.failed.to_pylist() == failed


def test_kept_rows_are_pieces_batch_by_batch() -> None:
    batches = [pa.RecordBatch.from_pydict({"sample_id": ids}) for ids in (["a", "a", "b"], ["b", "c"])]
    pieces = _runs(pa.Table.from_batches(batches))
    found = [(piece["sample_id"], piece["start"], piece["stop"]) for piece in pieces.to_pylist()]
    assert found == [("a", 0, 2), ("b", 2, 3), ("b", 3, 4), ("c", 4, 5)]
