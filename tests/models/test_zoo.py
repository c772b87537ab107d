"""Each line of the zoo against the installed torchvision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featurex_ray.errors import ExtractorError
from featurex_ray.models import torchvision_zoo
from featurex_ray.models.backbones import Backbone, FeatureMap, VideoBackbone
from featurex_ray.models.registry import resolve
from featurex_ray.models.torchvision_zoo import IMAGE_MODELS, VIDEO_MODELS

NAMES = [
    *torchvision.models.list_models(module=torchvision.models),
    *torchvision.models.list_models(module=torchvision.models.video),
]


class _EmptyOnMeta(TorchFunctionMode):
    """Allocates no parameters; what constructors compute (RegNet's widths) stays real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


@contextmanager
def on_meta() -> Iterator[None]:
    with _EmptyOnMeta():
        yield


def test_zoo_has_every_model() -> None:
    assert sorted(NAMES) == sorted([*IMAGE_MODELS, *VIDEO_MODELS])


@pytest.mark.parametrize("name", NAMES)
def test_zoo_line_is_what_torchvision_says(name: str) -> None:
    zoo = IMAGE_MODELS.get(name) or VIDEO_MODELS[name]
    default = torchvision.models.get_model_weights(name).DEFAULT
    transforms = default.transforms()
    assert default.url.endswith(f"/{zoo.weights_file}")
    assert transforms.crop_size[-1] == zoo.size
    assert min(transforms.resize_size) == zoo.resize
    assert (tuple(transforms.mean), tuple(transforms.std)) == (zoo.mean, zoo.std)
    assert transforms.interpolation.value == getattr(zoo, "interpolation", "bilinear")
    if name in VIDEO_MODELS:
        length = zoo.default_sampling.removeprefix("uniform:")
        assert f"`clip_len={length}`" in default.meta["_docs"]
        assert zoo.min_frames == default.meta.get("min_temporal_size", 1)


@pytest.mark.parametrize("name", list(IMAGE_MODELS))
def test_image_backbone_shapes(name: str) -> None:
    zoo = IMAGE_MODELS[name]
    with on_meta():
        backbone = Backbone(name)
    backbone = backbone.to("meta").eval()
    maps: list[Tensor] = []
    backbone.model.get_submodule(zoo.map_layer).register_forward_hook(lambda *a: maps.append(a[2]))
    assert backbone(torch.empty(2, 3, zoo.size, zoo.size, device="meta")).shape == (2, zoo.dimension)
    if maps[0].ndim == 4:
        assert maps[0].shape == (2, *zoo.map_shape)
    else:
        assert maps[0].shape == (2, 1 + zoo.map_shape[1] * zoo.map_shape[2], zoo.map_shape[0])


@pytest.mark.parametrize("name", list(VIDEO_MODELS))
def test_video_backbone_shapes(name: str) -> None:
    zoo = VIDEO_MODELS[name]
    with on_meta():
        backbone = VideoBackbone(name)
    frames = torch.empty(2, max(16, zoo.min_frames), 3, zoo.size, zoo.size, device="meta")
    backbone = backbone.to("meta").eval()
    assert backbone(frames).shape == (2, zoo.dimension)
    assert backbone(frames[:, : zoo.min_frames]).shape == (2, zoo.dimension)


def whole_and_cut(name: str) -> tuple[nn.Module, nn.Module]:
    """torchvision's own model, and ours with the same weights."""
    torch.manual_seed(0)
    arguments = {"transform_input": True, "init_weights": True} if name == "googlenet" else {}
    whole = torchvision.models.get_model(name, weights=None, **arguments).eval()
    cut = (VideoBackbone if name in VIDEO_MODELS else Backbone)(name).eval()
    missing = cut.model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    assert missing == []
    return whole, cut


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "densenet121",
        "googlenet",
        "shufflenet_v2_x0_5",
        "r3d_18",
    ],
)
def test_feature_is_what_enters_the_classifier(name: str) -> None:
    whole, cut = whole_and_cut(name)
    head = (IMAGE_MODELS | VIDEO_MODELS)[name].head
    seen: list[Tensor] = []
    whole.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frames = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        if name in VIDEO_MODELS:
            clip = torch.stack([frames, -frames], dim=1)
            whole(clip.transpose(1, 2))
            got = cut(clip)
        else:
            whole(frames)
            got = cut(frames)
    torch.testing.assert_close(got, seen[0], rtol=0, atol=1e-6)


def test_squeezenet_feature_is_the_pooled_map() -> None:
    whole, cut = whole_and_cut("squeezenet1_1")
    frames = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(cut(frames), whole.features(frames).mean(dim=(2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mnasnet0_5", "regnet_y_400mf", "googlenet", "swin_t"]
)
def test_mean_of_the_map_is_the_feature(name: str) -> None:
    torch.manual_seed(0)
    vector, maps = Backbone(name).eval(), FeatureMap(name).eval()
    maps.model.load_state_dict(vector.model.state_dict(), strict=False)
    frames = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(maps(frames).mean(dim=(2, 3)), vector(frames), rtol=0, atol=1e-5)


def test_map_of_a_transformer_is_its_cells() -> None:
    with on_meta():
        maps = FeatureMap("vit_b_32")
    frames = torch.empty(2, 3, 224, 224, device="meta")
    assert maps.to("meta").eval()(frames).shape == (2, 768, 7, 7)


def test_a_model_that_torchvision_lacks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torchvision_zoo.IMAGE_MODELS, "resnet999", IMAGE_MODELS["resnet18"])
    assert resolve("torchvision/resnet999", weights="none").spec.dimension == 512
    with pytest.raises(ExtractorError, match="has no resnet999; a newer torchvision"):
        Backbone("resnet999")
