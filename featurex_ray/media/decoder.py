"""What a video decoder is to the rest of the package: a timeline, and frames of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

DecoderPolicy = Literal["auto", "pyav", "decord", "decord+pyav", "nvdec", "nvdec+pyav"]


@dataclass(frozen=True)
class Timeline:
    """The frames that a player shows, in the order in which it shows them.

    Args:
        ticks: (N,) int64, strictly ascending: presentation timestamps as the container gives
            them, in units of `time_base`.
        keyframes: (N,) bool.
        time_base: Seconds a tick.
        end_tick: When the last frame's time on show ends.
    """

    ticks: np.ndarray
    keyframes: np.ndarray
    time_base: Fraction
    end_tick: int

    def __post_init__(self) -> None:
        if len(self.ticks) != len(self.keyframes):
            raise ValueError(f"{len(self.ticks)} ticks, {len(self.keyframes)} keyframe flags")
        if np.any(np.diff(self.ticks) <= 0):
            raise ValueError("the ticks of a timeline must ascend")

    def __len__(self) -> int:
        return len(self.ticks)

    @property
    def pts_seconds(self) -> np.ndarray:
        """(N,) float64."""
        return np.asarray(self.ticks * (self.time_base.numerator / self.time_base.denominator))

    @property
    def end_seconds(self) -> float:
        """The end of the last frame's time on show."""
        return float(self.end_tick * self.time_base)


class StreamHeader(NamedTuple):
    """What the container says of its video stream before anything is decoded."""

    container: str
    codec: str
    pixel_format: str | None
    width: int
    height: int
    num_video_streams: int
    num_discarded_packets: int
    is_interlaced: bool

    @property
    def is_plain(self) -> bool:
        """Whether any decoder sees the same: the only video stream, 8-bit 4:2:0, all its packets shown.

        Not where frames are of two fields: each may have a packet of its own, which some count as a frame.
        """
        return (
            self.pixel_format == "yuv420p"
            and self.num_video_streams == 1
            and self.num_discarded_packets == 0
            and not self.is_interlaced
        )


@dataclass(frozen=True)
class Shown:
    """One decoded frame.

    Args:
        index: Its place in the timeline.
        image: RGB, upright.
        intact: Whether the decoder made it without guessing.
        turn: What made it upright, where the decoder knows.
    """

    index: int
    image: Image.Image
    intact: bool
    turn: Image.Transpose | None = None


class TimelineDisagreementError(Exception):
    """The decoder gave other frames than the timeline lists. Never leaves `media`."""


class FrameDecoder(Protocol):
    """A decoder of one video's bytes."""

    name: str

    def frames(self, indices: np.ndarray) -> Iterator[Shown]:
        """Decode the frames at `indices` (ascending, unique) of the video's timeline, one after another.

        Raises:
            TimelineDisagreementError: What comes out isn't what the timeline lists.
        """
        ...
