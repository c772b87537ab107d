"""Real weights on real photographs: features that mean something."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurex_ray.media.preprocess import fit
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import resolve


def photographs(folder: Path, embedder: Embedder, *, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit features (N, D) of the first photographs of every class, and their classes."""
    files = [f for c in sorted(folder.iterdir()) for f in sorted(c.iterdir())[:per_class]]
    frames = [fit(Image.open(f).convert("RGB"), embedder.spec.input) for f in files]
    features = embedder.embed(np.stack(frames), np.ones(len(files), int)).feature
    return features / np.linalg.norm(features, axis=1, keepdims=True), np.array(
        [f.parent.name for f in files]
    )


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("torchvision/squeezenet1_0", "squeezenet1_0_deepcompression_imagenet.safetensors"),
        ("torchvision/mobilenet_v2", "mobilenet_v2_features_imagenet.safetensors"),
    ],
)
def test_neighbours_are_of_the_same_class(text: str, file: str, data: Path) -> None:
    resolved = resolve(text, weights=str(data / "weights" / file))
    embedder = Embedder(resolved, precision="fp32", device="cpu")
    known, classes = photographs(data / "images" / "imagenette224-train", embedder, per_class=8)
    asked, truth = photographs(data / "images" / "imagenette224-val", embedder, per_class=4)
    nearest = classes[np.argmax(asked @ known.T, axis=1)]
    assert (nearest == truth).mean() >= 0.75  # seeded weights reach about 0.2
