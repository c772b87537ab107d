"""Large JPEGs are decoded at a fraction of their size: the features must hardly tell."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurex_ray.benchmark.sweep import picture
from featurex_ray.media.image import decode_image
from featurex_ray.media.preprocess import fit
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import resolve

WEIGHTS = "weights/squeezenet1_0_deepcompression_imagenet.safetensors"


def large_jpegs(data: Path) -> list[bytes]:
    """A made picture of 4000x3000, and photographs enlarged to 2400 pixels."""
    folder = data / "images" / "imagenet-sample"
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")][:5]
    images = [picture(4000, 3000)]
    for path in paths:
        photograph = Image.open(path).convert("RGB")
        height = 2400 * photograph.height // photograph.width
        images.append(photograph.resize((2400, height), Image.Resampling.LANCZOS))
    encoded = []
    for image in images:
        held = io.BytesIO()
        image.save(held, "JPEG", quality=90)
        encoded.append(held.getvalue())
    return encoded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_the_full_decode_in_fp32(data: Path, precision: str) -> None:
    resolved = resolve("torchvision/squeezenet1_0", weights=str(data / WEIGHTS))
    spec, encoded = resolved.spec.input, large_jpegs(data)
    reduced = np.stack([decode_image(each, inputs=[spec]).frames[0] for each in encoded])
    full = np.stack([fit(Image.open(io.BytesIO(each)).convert("RGB"), spec) for each in encoded])
    assert not np.array_equal(reduced, full)
    lengths = np.ones(len(encoded), int)
    ours = Embedder(resolved, precision=precision).embed(reduced, lengths).feature
    exact = Embedder(resolved, precision="fp32").embed(full, lengths).feature
    cosine = (ours * exact).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() >= 0.999
