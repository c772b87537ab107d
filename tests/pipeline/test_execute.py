"""The tracker: a sample is whole once, however often Ray did its units."""

from typing import Any

import numpy as np
import pyarrow as pa

from featurex_ray.pipeline.execute import Tracker, first_line
from featurex_ray.pipeline.units import STAGED, to_table


def staged(*rows: dict[str, Any]) -> pa.Table:
    plain = {"assignment": 0, "plan_row": 0, "unit_index": 0, "num_units": 1, "error_codes": [None]}
    return to_table([plain | row for row in rows], STAGED)


def tracker(*lengths: int, num_tables: int = 1) -> Tracker:
    return Tracker([np.ones(n, bool) for n in lengths], num_tables=num_tables)


def test_an_assignment_is_whole_when_all_its_samples_are() -> None:
    found = tracker(2, 1)
    assert found.add(staged({"plan_row": 0})) == (1, [])
    assert found.add(staged({"plan_row": 1}, {"assignment": 1})) == (2, [0, 1])


def test_a_unit_done_twice_counts_once() -> None:
    found = tracker(2)
    assert found.add(staged({"plan_row": 0}, {"plan_row": 0})) == (1, [])
    assert found.add(staged({"plan_row": 0})) == (0, [])
    assert found.left == [1]


def test_a_sample_needs_all_its_units() -> None:
    found = tracker(1)
    assert found.add(staged({"unit_index": 1, "num_units": 2})) == (0, [])
    assert found.add(staged({"unit_index": 1, "num_units": 2})) == (0, [])
    assert found.add(staged({"unit_index": 0, "num_units": 2})) == (1, [0])


def test_a_unit_that_failed_for_one_table_settles_nothing_for_the_other() -> None:
    found = tracker(1, num_tables=2)
    codes = ["wrong_clip_length", None]
    assert found.add(staged({"num_units": 2, "unit_index": 1, "error_codes": codes})) == (0, [])
    assert found.add(staged({"num_units": 2, "unit_index": 0, "error_codes": [None, None]})) == (1, [0])
    assert found.codes == [{(0, 0): "wrong_clip_length"}, {}]


def test_of_a_remote_traceback_the_line_that_was_raised_is_shown() -> None:
    error = RuntimeError(
        "ray::ReadSamples() (pid=1)\n  File plan.py, line 3, in read\n"
        "pyarrow.lib.ArrowInvalid: no such column\n\n"
        "Failed to apply UDF transform after 1/1 attempts.\n"
        "To change retry attempts, configure `DataContext`.\n"
    )
    assert first_line(error) == "pyarrow.lib.ArrowInvalid: no such column"
    assert first_line(RuntimeError("the node died")) == "the node died"
    assert first_line(RuntimeError()) == "RuntimeError"
