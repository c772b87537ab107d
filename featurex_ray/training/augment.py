"""Random changes to clips while training: the frames of a clip change alike, so that motion stays motion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from featurex_ray.errors import RequestError

_FORMS = "none, or of flip, shift:PIXELS, crop:LEAST_AREA, colour:STRENGTH, with commas"


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random.

    Attributes:
        flip: Mirror every second clip, left to right.
        shift: Move by up to so many pixels either way; the border is repeated.
        crop: The least share of the area that a random crop keeps, 1 for no crop.
        colour: Brightness and contrast change by up to this share.

    Raises:
        RequestError: A value is out of its range.
    """

    flip: bool = False
    shift: int = 0
    crop: float = 1.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        if self.shift < 0 or not 0 < self.crop <= 1 or not 0 <= self.colour < 1:
            raise RequestError(f"--augment: {self} is out of range; give {_FORMS}")

    @classmethod
    def parse(cls, text: str) -> "Augmentation":
        """Read such as `flip,shift:4`.

        Raises:
            RequestError: Not of this form; the message lists what there is.
        """
        if text == "none":
            return cls()
        values: dict[str, bool | int | float] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition(":")
            try:
                values |= {
                    name: {"flip": bool, "shift": int, "crop": float, "colour": float}[name](number or 1)
                }
            except (KeyError, ValueError) as error:
                raise RequestError(f"--augment {text!r}: give {_FORMS}") from error
        return cls(**values)  # type: ignore[arg-type]

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed at all."""
        return self == Augmentation()

    def pixels(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Flip and shift.

        Args:
            frames: (B, T, H, W, 3) uint8.
            generator: Of the random numbers.
        """
        if not self.flip and not self.shift:
            return frames
        count, _, height, width, _ = frames.shape
        down = torch.randint(-self.shift, self.shift + 1, (count, 1), generator=generator)
        right = torch.randint(-self.shift, self.shift + 1, (count, 1), generator=generator)
        is_flipped = torch.rand((count, 1), generator=generator) < (0.5 if self.flip else 0.0)
        rows = (torch.arange(height) + down).clamp(0, height - 1)
        columns = torch.arange(width).expand(count, width)
        columns = (torch.where(is_flipped, columns.flip(1), columns) + right).clamp(0, width - 1)
        clips = torch.arange(count)[:, None, None]
        # Indexed so, time comes last of the indexed axes: (B, H, W, T, 3).
        moved = frames.movedim(1, 3)[clips, rows[:, :, None], columns[:, None, :]]
        return moved.movedim(3, 1)

    def normalised(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Crop and change colours.

        Args:
            frames: (B, T, 3, H, W) floating, normalised.
            generator: Of the random numbers, on the CPU.
        """
        if self.crop < 1:
            frames = self._cropped(frames, generator)
        if self.colour > 0:
            strength = self.colour * (2 * torch.rand((2, len(frames), 1, 1, 1, 1), generator=generator) - 1)
            brightness, contrast = strength.to(frames.device)
            middle = frames.mean(dim=(1, 3, 4), keepdim=True)
            frames = (frames - middle) * (1 + contrast) + middle + brightness
        return frames

    def _cropped(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        count, length = frames.shape[:2]
        area = self.crop + (1 - self.crop) * torch.rand((count, 1), generator=generator)
        side = area.sqrt()
        centre = (1 - side) * (2 * torch.rand((count, 2), generator=generator) - 1)
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = side[:, 0]
        theta[:, :, 2] = centre
        theta = theta.repeat_interleave(length, dim=0).to(frames.device)
        flat = frames.flatten(0, 1)
        grid = torch.nn.functional.affine_grid(theta, list(flat.shape), align_corners=False)
        cropped = torch.nn.functional.grid_sample(flat, grid, padding_mode="border", align_corners=False)
        return cropped.reshape(frames.shape)
