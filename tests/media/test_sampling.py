import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurex_ray.errors import RequestError
from featurex_ray.media.sampling import Sampling, count_windows, select, windows
from tests.media.barcode import SHARED

SAMPLINGS = st.one_of(
    st.integers(1, 40).map(lambda count: Sampling("uniform", count)),
    st.integers(1, 9).map(lambda step: Sampling("every", step)),
    st.sampled_from([0.1, 0.5, 1, 2, 5, 12.5, 60]).map(lambda rate: Sampling("fps", rate)),
    st.just(Sampling("keyframes")),
)
TIMELINES = st.tuples(st.floats(0, 100), st.lists(st.floats(0.001, 2), min_size=1, max_size=80)).map(
    lambda drawn: drawn[0] + np.cumsum(drawn[1])
)


def everything(pts: np.ndarray) -> tuple[float, float]:
    return float(pts[0]), float(pts[-1]) + 0.04


@pytest.mark.parametrize("text", ["uniform:16", "fps:2", "fps:0.5", "fps:29.97", "every:5", "keyframes"])
def test_parse_round_trips(text: str) -> None:
    assert str(Sampling.parse(text)) == text
    assert Sampling.parse(str(Sampling.parse(text))) == Sampling.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "uniform",
        "uniform:0",
        "uniform:2.5",
        "fps:0",
        "fps:-1",
        "fps:nan",
        "fps:inf",
        "every:x",
        "keyframes:3",
        "all",
    ],
)
def test_parse_fails(text: str) -> None:
    with pytest.raises(RequestError, match=r"is none of: uniform:N .*, fps:R .*, every:K .* or keyframes"):
        Sampling.parse(text)


@settings(max_examples=200, deadline=None)
@given(pts=TIMELINES, sampling=SAMPLINGS)
def test_select_properties(pts: np.ndarray, sampling: Sampling) -> None:
    keyframes = np.arange(len(pts)) % 7 == 0
    indices = select(pts, keyframes, sampling, everything(pts))
    assert indices.dtype == np.int64
    assert len(indices) >= 1
    assert np.all(np.diff(indices) >= 0)
    assert indices[0] >= 0
    assert indices[-1] < len(pts)
    if sampling.kind == "uniform":
        assert len(indices) == sampling.value
        assert (indices[0], indices[-1]) == (0, 0 if sampling.value == 1 else len(pts) - 1)
        assert len(set(indices)) == min(len(pts), sampling.value)
    if sampling.kind == "keyframes":
        assert np.array_equal(indices, np.flatnonzero(keyframes))


@settings(max_examples=100, deadline=None)
@given(pts=TIMELINES, rate=st.sampled_from([0.3, 1.0, 4.0, 25.0]))
def test_fps_shows_the_nearest_earlier_frame(pts: np.ndarray, rate: float) -> None:
    start, end = everything(pts)
    indices = select(pts, np.ones(len(pts), bool), Sampling("fps", rate), (start, end))
    assert len(indices) == max(1, np.floor((end - start) * rate + 0.5))
    for place, index in enumerate(indices):
        time = start + place / rate
        assert pts[index] <= time + 1e-5
        assert index == len(pts) - 1 or pts[index + 1] > time - 1e-5


def test_uniform_at_constant_rate_equals_linspace_of_indices() -> None:
    pts = np.arange(91) / 30
    indices = select(pts, np.ones(91, bool), Sampling("uniform", 16), everything(pts))
    assert np.array_equal(indices, np.linspace(0, 90, 16).round())


def test_uniform_is_even_in_time_at_variable_rate() -> None:
    pts = np.concatenate([np.arange(10) / 10, 1 + np.arange(30) / 30])  # 10 fps, then 30 fps
    chosen = pts[select(pts, np.ones(40, bool), Sampling("uniform", 5), everything(pts))]
    assert np.allclose(chosen, np.linspace(0, pts[-1], 5), atol=0.05)


def test_uniform_repeats_the_last_of_a_short_video() -> None:
    pts = np.array([0.0, 0.04, 0.08])
    assert list(select(pts, np.ones(3, bool), Sampling("uniform", 5), (0, 0.12))) == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("sampling", ["uniform:4", "fps:2", "every:1", "keyframes"])
def test_select_in_a_gap_is_empty(sampling: str) -> None:
    pts = np.array([0.0, 0.1, 7.0])
    assert len(select(pts, np.ones(3, bool), Sampling.parse(sampling), (2.0, 4.0))) == 0


def test_fps_agrees_with_another_tool() -> None:
    folder = SHARED / "videos" / "video_features_reference"
    if not folder.exists():
        pytest.skip("the shared reference timestamps are not here")
    source = np.load(next(folder.glob("clip/*_1_None_*")))["data"] / 1000
    window = (0.0, float(source[-1] + source[1]))
    for file, rate in ((next(folder.glob("clip/*_1_5_*")), 5), (next(folder.glob("resnet/*_1_1_*")), 1)):
        expected = np.load(file)["data"] / 1000
        chosen = source[select(source, np.ones(len(source), bool), Sampling("fps", rate), window)]
        assert len(chosen) == len(expected)
        assert np.all((chosen <= expected + 1e-6) & (chosen > expected - source[1] - 1e-6))


@pytest.mark.parametrize(
    ("end", "clip", "stride", "expected"),
    [
        (10, 5, 5, [(0, 5), (5, 10)]),
        (10, 4, 4, [(0, 4), (4, 8), (8, 10)]),
        (10, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 10)]),
        (3, 5, 5, [(0, 3)]),
        (10, 1, 4, [(0, 1), (4, 5), (8, 9)]),
        (8, 1, 4, [(0, 1), (4, 5)]),
    ],
)
def test_windows(end: float, clip: float, stride: float, expected: list[tuple[float, float]]) -> None:
    assert windows(0, end, clip_seconds=clip, stride_seconds=stride) == expected


@settings(max_examples=200, deadline=None)
@given(
    start=st.floats(0, 1000),
    length=st.floats(0.01, 500),
    clip=st.floats(0.5, 20),
    stride=st.floats(0.5, 20),
)
def test_windows_properties(start: float, length: float, clip: float, stride: float) -> None:
    end = start + length
    cut = windows(start, end, clip_seconds=clip, stride_seconds=stride)
    assert len(cut) == count_windows(start, end, clip_seconds=clip, stride_seconds=stride)
    assert cut[0][0] == start
    assert all(begin < stop <= end for begin, stop in cut)
    assert all(stop == begin + clip for begin, stop in cut[:-1])
    if stride <= clip:
        assert cut[-1][1] == pytest.approx(end, abs=1e-5)
        assert all(later[0] <= earlier[1] + 1e-6 for earlier, later in itertools.pairwise(cut))
