"""How pictures move from frame to frame, told by correlating their feature maps; few numbers, no weights."""

import torch
from torch import Tensor

CHANNELS = 32
"""Of a map that is kept for correlation: means over neighbouring channels. 16 tell motion as well."""

_SHIFTS = 1
_REGIONS = 3
_LEAST_DEVIATION = 1e-3
NUM_VALUES = (2 * _SHIFTS + 1) ** 2 * _REGIONS**2
"""What `correlate` gives for a frame: nine shifts in nine regions."""


def compact(maps: Tensor) -> Tensor:
    """What `correlate` needs of feature maps, each cell a unit vector.

    Args:
        maps: (B, C, h, w) floating.

    Returns:
        (B, CHANNELS, h, w), float32.
    """
    cells = maps.float().flatten(2).transpose(1, 2)
    kept = torch.nn.functional.adaptive_avg_pool1d(cells, CHANNELS)
    # What all cells of a frame have in common would drown what tells them apart.
    kept = kept - kept.mean(dim=1, keepdim=True)
    unit = torch.nn.functional.normalize(kept, dim=-1, eps=1e-6)
    return unit.transpose(1, 2).reshape(len(maps), CHANNELS, *maps.shape[-2:])


def correlate(maps: Tensor) -> Tensor:
    """How well each frame's map agrees with the one before it, shifted by a cell or not.

    As the correlation layer of FlowNet (Dosovitskiy et al., 2015), averaged over a 3x3 grid of
    regions: all regions agree on a shift in a pan, and they disagree in a zoom. How alike a
    picture is to itself, at any shift, says more of its texture than of its movement: so the nine
    shifts of a region are given mean 0 and deviation 1.

    Args:
        maps: (B, T, C, h, w) float32, of `compact`. The first frame is compared with itself.

    Returns:
        (B, T, NUM_VALUES): shifts from up-left to down-right, in each of them regions likewise.
    """
    height, width = maps.shape[-2:]
    before = torch.cat([maps[:, :1], maps[:, :-1]], dim=1)
    padded = torch.nn.functional.pad(before, (_SHIFTS,) * 4)
    shifted = [
        (maps * padded[..., down : down + height, right : right + width]).sum(dim=2)
        for down in range(2 * _SHIFTS + 1)
        for right in range(2 * _SHIFTS + 1)
    ]
    agreement = torch.stack(shifted, dim=2)
    regions = torch.nn.functional.adaptive_avg_pool2d(agreement.flatten(0, 1), _REGIONS)
    regions = regions - regions.mean(dim=1, keepdim=True)
    regions = regions / (regions.std(dim=1, correction=0, keepdim=True) + _LEAST_DEVIATION)
    return regions.reshape(*maps.shape[:2], NUM_VALUES)
