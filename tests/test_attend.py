"""Pictures of attention: the overlay shows the weights where they are, and what is refused."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurex_ray.attend import attend_image, attend_video, draw, overlay
from featurex_ray.demo import MEDIA
from featurex_ray.errors import RequestError
from featurex_ray.models.registry import resolve


def test_overlay_is_bright_where_the_weights_are() -> None:
    weights = np.full((4, 4), 0.01)
    weights[1, 3] = 0.85
    mixed = overlay(np.full((40, 80, 3), 100, np.uint8), weights)
    assert mixed.shape == (40, 80, 3)
    light = mixed.mean(axis=2).reshape(4, 10, 4, 20).mean(axis=(1, 3))
    assert np.unravel_index(light.argmax(), light.shape) == (1, 3)


def test_an_image_is_drawn() -> None:
    seen = attend_image(resolve("attention_convnet"), str(MEDIA / "images/chelsea.jpg"))
    assert seen.attention.shape == (5, 5)
    assert seen.attention.sum() == pytest.approx(1, abs=1e-5)
    assert Image.open(io.BytesIO(draw(seen))).width >= 400


def test_a_video_is_drawn() -> None:
    resolved = resolve("cnn_lstm,backbone=squeezenet1_1", weights="none")
    seen = attend_video(resolved, str(MEDIA / "videos/bikes.mp4"), sampling="uniform:6")
    assert seen.attention.shape == seen.seconds.shape == (6,)
    assert (np.diff(seen.seconds) > 0).all()
    assert Image.open(io.BytesIO(draw(seen))).height >= 200


@pytest.mark.parametrize(
    ("extractor", "name", "message"),
    [
        ("torchvision/squeezenet1_1", "images/chelsea.jpg", "has no attention"),
        ("cnn_lstm,backbone=squeezenet1_1", "images/chelsea.jpg", "takes videos: give --video"),
        ("attention_convnet", "images/cut-off.jpg", "truncated"),
        ("attention_convnet", "images/none.jpg", "not_found"),
    ],
)
def test_attend_fails(extractor: str, name: str, message: str) -> None:
    weights = None if extractor == "attention_convnet" else "none"
    with pytest.raises(RequestError, match=message):
        attend_image(resolve(extractor, weights=weights), str(MEDIA / name))


@pytest.mark.parametrize("attend", [attend_image, attend_video])
def test_signatures_are_not_told(attend: Callable[..., object]) -> None:
    with pytest.raises(RequestError, match=r"https://host/a\?\*\*\*: refused_uri") as refused:
        attend(resolve("attention_convnet"), "https://host/a?X-Amz-Signature=secret")
    assert "secret" not in str(refused.value)


def test_command_wants_one_medium(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from featurex_ray.cli import cli

    found = CliRunner().invoke(cli, ["attend", "--extractor", "attention_convnet", "--output", "o.png"])
    assert found.exit_code == 2
    assert "either --image FILE or --video FILE" in found.output
