"""Which frames to take: pure functions of presentation timestamps, at constant and variable rate alike."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from featurex_ray.errors import RequestError

Kind = Literal["uniform", "fps", "every", "keyframes"]

_FORMS = (
    "uniform:N (N frames spread over each clip), fps:R (R frames a second), "
    "every:K (each K-th frame) or keyframes"
)
_EPSILON_SECONDS = 1e-6
"""Timestamps are decimal roundings in many containers; bounds closer than this are the same."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are used: `uniform:16`, `fps:2`, `every:5` or `keyframes`.

    Args:
        kind: The rule.
        value: Frames (`uniform`), frames a second (`fps`) or a step (`every`); None for `keyframes`.

    Raises:
        RequestError: The value doesn't go with the kind.
    """

    kind: Kind
    value: float | int | None = None

    def __post_init__(self) -> None:
        value = self.value
        ok = {
            "uniform": isinstance(value, int) and value >= 1,
            "every": isinstance(value, int) and value >= 1,
            "fps": value is not None and 0 < value < math.inf,
            "keyframes": value is None,
        }
        if not ok.get(self.kind, False):
            raise RequestError(f"sampling {str(self)!r} is none of: {_FORMS}")

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}:{self.value:g}"

    @classmethod
    def parse(cls, text: str) -> "Sampling":
        """Read `uniform:16`, `fps:2`, `every:5` or `keyframes`.

        Raises:
            RequestError: Not one of these; the message lists them.
        """
        kind, colon, number = text.strip().partition(":")
        try:
            if kind == "keyframes" and not colon:
                return cls("keyframes")
            if kind == "fps":
                return cls("fps", float(number))
            if kind in ("uniform", "every"):
                return cls("uniform" if kind == "uniform" else "every", int(number))
        except ValueError:
            pass
        raise RequestError(f"sampling {text!r} is none of: {_FORMS}")


def select(
    pts_seconds: np.ndarray, keyframes: np.ndarray, sampling: Sampling, window: tuple[float, float]
) -> np.ndarray:
    """The frames to use of one clip.

    - `uniform:N`: the frames nearest to N points in time spread evenly from the clip's first
      frame to its last; no frame twice unless there are fewer than N, then all of them and the
      last one repeated.
    - `fps:R`: at 0/R, 1/R, 2/R ... seconds after the clip's start the frame on show, which is
      the nearest earlier one (before the first frame: the first). As many as R times the clip's
      length, rounded, at least one. A slow source repeats frames.
    - `every:K`: the clip's first frame and each K-th after it.
    - `keyframes`: all of them.

    Args:
        pts_seconds: (N,) float64, ascending: when each frame of the video is shown.
        keyframes: (N,) bool.
        sampling: The rule.
        window: The clip, `[start, end)` in seconds.

    Returns:
        (T,) int64, ascending indices into `pts_seconds`; empty where the window holds no frame
        (or no keyframe, for `keyframes`).
    """
    low, high = np.searchsorted(pts_seconds, np.asarray(window) - _EPSILON_SECONDS)
    pts = pts_seconds[low:high]
    value = sampling.value or 1
    if len(pts) == 0:
        chosen = np.arange(0)
    elif sampling.kind == "keyframes":
        chosen = np.flatnonzero(keyframes[low:high])
    elif sampling.kind == "every":
        chosen = np.arange(0, len(pts), int(value))
    elif sampling.kind == "uniform":
        chosen = _uniform(pts, count=int(value))
    else:
        chosen = _at_rate(pts, window, sampling_fps=float(value))
    return np.asarray(low + chosen, dtype=np.int64)


def _uniform(pts: np.ndarray, *, count: int) -> np.ndarray:
    num_frames = len(pts)
    if num_frames <= count:
        return np.minimum(np.arange(count), num_frames - 1)
    targets = np.linspace(pts[0], pts[-1], count)
    midpoints = (pts[1:] + pts[:-1]) / 2
    nearest = np.searchsorted(midpoints, targets - _EPSILON_SECONDS)
    # Where the source pauses, several targets meet in one frame: move on to the next free ones.
    ranks = np.arange(count)
    ascending = np.maximum.accumulate(nearest - ranks) + ranks
    return np.minimum(ascending, num_frames - count + ranks)


def _at_rate(pts: np.ndarray, window: tuple[float, float], *, sampling_fps: float) -> np.ndarray:
    start, end = window
    count = max(1, math.floor((end - start) * sampling_fps + 0.5))
    times = start + np.arange(count) / sampling_fps
    on_show = np.searchsorted(pts, times + _EPSILON_SECONDS, side="right") - 1
    return np.maximum(on_show, 0)


def count_windows(start: float, end: float, *, clip_seconds: float, stride_seconds: float) -> int:
    """How many windows `windows` would give."""
    beyond_first = end - start - clip_seconds - _EPSILON_SECONDS
    covering = 1 + max(0, math.ceil(beyond_first / stride_seconds))
    # With gaps between windows the next one may begin only after the end.
    beginning = max(1, math.ceil((end - start - _EPSILON_SECONDS) / stride_seconds))
    return min(covering, beginning)


def windows(
    start: float, end: float, *, clip_seconds: float, stride_seconds: float
) -> list[tuple[float, float]]:
    """Cut a stretch of time into clips.

    Windows begin at start, start + stride, ... until one reaches the end. That one is cut at the
    end and may be shorter: nothing of the video is left out, and no window lies inside another.

    Args:
        start: First moment, in seconds.
        end: Moment after the last, in seconds.
        clip_seconds: Length of a window.
        stride_seconds: From one window's start to the next one's.

    Returns:
        Half-open `(start, end)` pairs in seconds.
    """
    count = count_windows(start, end, clip_seconds=clip_seconds, stride_seconds=stride_seconds)
    starts = [start + index * stride_seconds for index in range(count)]
    return [(begin, min(begin + clip_seconds, end)) for begin in starts]
