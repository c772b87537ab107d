"""Small labelled pictures that a network can learn to tell apart."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.one_thread import one_thread as one_thread

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


def coloured(colour: str, *, seed: int, size: int = 32) -> np.ndarray:
    """A noisy picture of about this colour."""
    noise = np.random.default_rng(seed).integers(-40, 40, (size, size, 3))
    return np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 48 pictures, 16 a class, four of each in a group, with one that is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for index in range(48):
        label = sorted(COLOURS)[index % 3]
        path = folder / f"{index:03d}.png"
        Image.fromarray(coloured(label, seed=index)).save(path)
        rows.append({"uri": str(path), "label": label, "scene": f"scene {index // 12}"})
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    rows.append({"uri": str(folder / "broken.png"), "label": "red", "scene": "scene 0"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    return folder / "manifest.parquet"
