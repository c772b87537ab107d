"""Media to extract from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve small pictures in two class folders, unlike each other."""
    noise = np.random.default_rng(7)
    for label in ("even", "odd"):
        (tmp_path / "photos" / label).mkdir(parents=True)
    for i in range(12):
        pixels = noise.integers(0, 256, (40 + i, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / ("odd" if i % 2 else "even") / f"{i:03d}.png")
    return tmp_path / "photos"
