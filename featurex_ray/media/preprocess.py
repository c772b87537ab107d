"""From a decoded picture to the pixels a model sees: the one way, for images and video frames alike."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class InputSpec:
    """The picture that a model wants.

    Args:
        height: Of the model's input, in pixels.
        width: Of the model's input, in pixels.
        resize: The shorter side before the centre crop, as in torchvision's `Resize(resize)`
            and `CenterCrop((height, width))`; None squashes straight to (height, width).
        interpolation: With antialiasing, as Pillow and torchvision have it.
    """

    height: int
    width: int
    resize: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"an input needs at least one pixel, not {self.height}x{self.width}")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ValueError(f"resize {self.resize} is smaller than the crop {self.height}x{self.width}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation {self.interpolation!r} is none of {', '.join(_FILTERS)}")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one fitted frame."""
        return self.height * self.width * 3

    def reduction(self, width: int, height: int) -> float:
        """How many source pixels make one input pixel, along the side where they are fewest."""
        if self.resize is not None:
            return min(width, height) / self.resize
        return min(width / self.width, height / self.height)


def fit(picture: Image.Image | np.ndarray, spec: InputSpec) -> np.ndarray:
    """Resize and crop a picture.

    Equal to torchvision's `Resize` and `CenterCrop` on a Pillow image, but for rounding (at most 2
    of 255, 0.02 on average: Pillow keeps the box in single precision). Only what the crop keeps
    is computed, so a picture of 5000x1 doesn't become one of 1,280,000x256 on the way.

    Args:
        picture: RGB, any size; as an array (H, W, 3) uint8.
        spec: What the model wants.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    if isinstance(picture, np.ndarray):
        size = spec.height, spec.width
        if picture.shape[:2] == size and spec.resize in (None, min(size)):
            return picture
        picture = Image.fromarray(picture)
    box = (0.0, 0.0, float(picture.width), float(picture.height))
    if spec.resize is not None:
        box = _crop_box(picture.width, picture.height, spec.resize, spec)
    resized = picture.resize((spec.width, spec.height), _FILTERS[spec.interpolation], box=box)
    return np.asarray(resized)


def _crop_box(width: int, height: int, resize: int, spec: InputSpec) -> tuple[float, float, float, float]:
    """The centre crop of the resized picture, in the source's pixels: (left, top, right, bottom)."""
    short = min(width, height)
    # torchvision truncates the longer side and rounds the margins.
    resized_width, resized_height = int(resize * width / short), int(resize * height / short)
    left = round((resized_width - spec.width) / 2)
    top = round((resized_height - spec.height) / 2)
    across, down = width / resized_width, height / resized_height
    right, bottom = (left + spec.width) * across, (top + spec.height) * down
    return left * across, top * down, min(right, width), min(bottom, height)
