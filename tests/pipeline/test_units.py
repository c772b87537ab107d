"""Rows become Arrow tables, and what they were made of is let go."""

import sys

import numpy as np
import pyarrow as pa

from featurex_ray.pipeline.extract import frame_array
from featurex_ray.pipeline.units import decoded_schema, to_table
from tests.models.own import SMALL


def test_frames_come_back_as_they_were_and_none_is_held() -> None:
    frames = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 3), np.uint8)
    references = sys.getrefcount(frames)
    rows = [
        {"frames_0": frames[:2]},
        {"frames_0": None},
        {"frames_0": frames[2:]},
    ]
    table = to_table(rows, decoded_schema(1))
    assert table["frames_0"].is_valid().to_pylist() == [True, False, True]
    taken = table["frames_0"].filter(pa.array([True, False, True]))
    np.testing.assert_array_equal(frame_array(taken, SMALL), frames)
    table.validate(full=True)
    del rows, table, taken
    assert sys.getrefcount(frames) == references
