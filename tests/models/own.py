"""Extractors as a user would write them, and some that are wrong."""

import torch
from torch import Tensor, nn

from featurex_ray.media.preprocess import InputSpec
from featurex_ray.models.spec import ExtractorSpec

SMALL = InputSpec(8, 8, None, "bilinear")


class MeanColour:
    """Frame by frame; no module, no weights, no attention."""

    spec = ExtractorSpec(dimension=3, input=SMALL, architecture="mean colour 1")

    def __call__(self, frames: Tensor) -> Tensor:
        return frames.mean(dim=(1, 3, 4))


class LastFrame(nn.Module):
    """Whole clips, one weight a frame: all of it on the last."""

    spec = ExtractorSpec(dimension=3, input=SMALL, media="video", attention_shape=(), min_frames=2)

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.zeros(frames.shape[:2], device=frames.device)
        weights[:, -1] = 1
        return self.mix(frames[:, -1].mean(dim=(2, 3))), weights


class Hungry(MeanColour):
    """Runs out of memory with more than two frames at once."""

    def __call__(self, frames: Tensor) -> Tensor:
        if len(frames) > 2:
            raise torch.OutOfMemoryError("no more")
        return super().__call__(frames)


class Insatiable(MeanColour):
    """Always runs out of memory."""

    def __call__(self, frames: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more")


class NotANumber(MeanColour):
    """NaN for black frames."""

    spec = ExtractorSpec(dimension=3, input=SMALL, mean=(0, 0, 0), std=(1, 1, 1))

    def __call__(self, frames: Tensor) -> Tensor:
        means = super().__call__(frames)
        return means / means


class WrongDimension(MeanColour):
    spec = ExtractorSpec(dimension=4, input=SMALL)


class Unannounced(LastFrame):
    spec = ExtractorSpec(dimension=3, input=SMALL, media="video")


class WithoutSpec:
    def __call__(self, frames: Tensor) -> Tensor:
        return frames


class WithoutCall:
    spec = ExtractorSpec(dimension=3, input=SMALL)


class NormFirst(nn.Module):
    """Twice what its normalisation gives, which stands behind the convolution but runs before it."""

    spec = ExtractorSpec(dimension=3, input=SMALL, mean=(0, 0, 0), std=(1, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        nn.init.dirac_(self.conv.weight)
        self.conv.weight.data *= 2
        nn.init.ones_(self.norm.running_mean)

    def forward(self, frames: Tensor) -> Tensor:
        return self.conv(self.norm(frames.flatten(0, 1))).mean(dim=(2, 3))
