import numpy as np
import pytest
from torchvision.transforms import v2 as transforms

from featurex_ray.media.preprocess import InputSpec, fit
from tests.media.barcode import photograph

_MODES = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(320, 240), (240, 320), (333, 251), (1000, 700), (64, 64), (100, 31)])
def test_fit_equals_torchvision(size: tuple[int, int], interpolation: str) -> None:
    image = photograph(*size)
    spec = InputSpec(224, 200, resize=256, interpolation=interpolation)
    resize = transforms.Resize(256, interpolation=_MODES[interpolation], antialias=True)
    expected = np.asarray(transforms.CenterCrop((224, 200))(resize(image)))
    difference = np.abs(fit(image, spec).astype(int) - expected)
    # Pillow keeps the box in single precision, which moves a few values over a rounding edge.
    assert difference.max() <= 2
    assert difference.mean() < 0.02


def test_fit_squashes_without_resize() -> None:
    image = photograph(300, 100)
    expected = np.asarray(transforms.Resize((32, 48))(image))
    assert np.array_equal(fit(image, InputSpec(32, 48)), expected)


@pytest.mark.parametrize("size", [(5000, 1), (1, 20000), (1, 1), (2, 3)])
def test_fit_extreme_shapes(size: tuple[int, int]) -> None:
    fitted = fit(photograph(*size), InputSpec(224, 224, resize=256))
    assert fitted.shape == (224, 224, 3)
    assert fitted.dtype == np.uint8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0, "width": 8}, "at least one pixel, not 0x8"),
        ({"height": 224, "width": 224, "resize": 200}, "resize 200 is smaller than the crop 224x224"),
        ({"height": 8, "width": 8, "interpolation": "nearest"}, "'nearest' is none of bilinear, bicubic"),
    ],
)
def test_input_spec_fails(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputSpec(**arguments)
