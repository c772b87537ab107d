"""Real weights on real photographs: features that mean something."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from featurex_ray.media.preprocess import fit
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import resolve

PER_CLASS = 12


def photographs(folder: Path, embedder: Embedder, first: int) -> tuple[np.ndarray, list[str]]:
    files = [f for c in sorted(folder.iterdir()) for f in sorted(c.iterdir())[first : first + PER_CLASS]]
    frames = [fit(Image.open(f).convert("RGB"), embedder.spec.input) for f in files]
    features = embedder.embed(np.stack(frames), np.ones(len(files), int)).feature
    return features / np.linalg.norm(features, axis=1, keepdims=True), [f.parent.name for f in files]
