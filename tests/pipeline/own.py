"""Extractors of a user's own, for tests."""

import os
import time
from pathlib import Path

import torch

from featurex_ray import ExtractorSpec, InputSpec


class MeanColour:
    """The mean of each channel."""

    spec = ExtractorSpec(
        dimension=3, input=InputSpec(16, 16, None, "bilinear"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, 3)."""
        return frames.mean(dim=(1, 3, 4))


class LargeMean(MeanColour):
    """The same of large frames."""

    spec = ExtractorSpec(dimension=3, input=InputSpec(224, 224, 224, "bilinear"))


class EveryFifth(MeanColour):
    """The same, with another default sampling."""

    spec = ExtractorSpec(dimension=3, input=MeanColour.spec.input, default_sampling="every:5")


class SlowMean(MeanColour):
    """The same, slow enough to be killed on the way."""

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, 3), a fiftieth of a second a frame."""
        time.sleep(0.02 * len(frames))
        return super().__call__(frames)


class CountedMean(SlowMean):
    """Slow too; the folder that FEATUREX_TEST_COUNTS names tells how many frames it has begun."""

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, 3)."""
        if folder := os.environ.get("FEATUREX_TEST_COUNTS"):
            with Path(folder, str(os.getpid())).open("a") as counts:
                counts.write(f"{len(frames)}\n")
        return super().__call__(frames)


class Steady(MeanColour):
    """The same, a twentieth of a second a frame: calls of some seconds."""

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, 3)."""
        time.sleep(0.05 * len(frames))
        return super().__call__(frames)


class SlowLarge(MeanColour):
    """The mean of large frames, 8 ms a frame: decoding runs ahead of it wherever it is let."""

    spec = ExtractorSpec(
        dimension=3, input=InputSpec(448, 448, None, "bilinear"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, 3)."""
        time.sleep(0.008 * len(frames))
        return super().__call__(frames)


class Hanging(MeanColour):
    """The same, but it hangs as long as the file that FEATUREX_TEST_HANGS names is there."""

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, 3)."""
        while Path(os.environ.get("FEATUREX_TEST_HANGS", "/nonexistent")).exists():
            time.sleep(0.5)
        return super().__call__(frames)
