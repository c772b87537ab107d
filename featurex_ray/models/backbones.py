"""torchvision's models, cut before their last layer or at their last feature map."""

from typing import Any

import torch
from torch import Tensor, nn

from featurex_ray.errors import ExtractorError
from featurex_ray.models.torchvision_zoo import IMAGE_MODELS, VIDEO_MODELS

# What torchvision itself sets where it builds a model for its default weights.
_INCEPTION: dict[str, Any] = {"transform_input": True, "aux_logits": False, "init_weights": False}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": _INCEPTION,
    "inception_v3": _INCEPTION,
    "vit_h_14": {"image_size": IMAGE_MODELS["vit_h_14"].size},
}


class Backbone(nn.Module):
    """An image model up to the vector that enters its last layer.

    Args:
        name: A key of `IMAGE_MODELS`.

    Raises:
        ExtractorError: the installed torchvision has no such model.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = _build(name)
        _replace(self.model, IMAGE_MODELS[name].head)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, D)."""
        vectors: Tensor = self.model(frames)
        return vectors


class FeatureMap(nn.Module):
    """An image model up to its last feature map.

    Args:
        name: A key of `IMAGE_MODELS`.

    Raises:
        ExtractorError: the installed torchvision has no such model.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        zoo = IMAGE_MODELS[name]
        self.model = _build(name)
        # The whole classifier goes, not only its last layer: nothing behind the map is needed.
        _replace(self.model, zoo.head.split(".")[0])
        self.map_size = zoo.map_shape[1:]
        self._is_densenet = name.startswith("densenet")
        self._maps: list[Tensor] = []
        self.model.get_submodule(zoo.map_layer).register_forward_hook(self._keep)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, C, h, w)."""
        self.model(frames)
        maps = self._maps.pop()
        if maps.ndim == 3:  # transformers give a class token, then one token a cell
            maps = maps[:, 1:].transpose(1, 2).reshape(len(maps), -1, *self.map_size)
        return torch.relu(maps) if self._is_densenet else maps  # DenseNet activates outside its layers

    def _keep(self, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._maps.append(output)


class VideoBackbone(nn.Module):
    """A video model up to the vector that enters its last layer.

    Args:
        name: A key of `VIDEO_MODELS`.

    Raises:
        ExtractorError: the installed torchvision has no such model.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = _build(name)
        _replace(self.model, VIDEO_MODELS[name].head)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W), normalised -> (B, D)."""
        vectors: Tensor = self.model(frames.transpose(1, 2))
        return vectors


class TorchvisionExtractor(nn.Module):
    """`torchvision/<name>`: a torchvision model's vector, of single frames or of clips.

    Args:
        name: A key of `IMAGE_MODELS` or `VIDEO_MODELS`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = VideoBackbone(name) if name in VIDEO_MODELS else Backbone(name)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W), normalised, T = 1 for image models -> (B, D)."""
        is_video = isinstance(self.backbone, VideoBackbone)
        vectors: Tensor = self.backbone(frames if is_video else frames.flatten(0, 1))
        return vectors


def _build(name: str) -> nn.Module:
    import torchvision  # takes longer to import than torch, and not every extractor needs it

    try:
        builder = torchvision.models.get_model_builder(name)
    except ValueError as error:
        raise ExtractorError(
            f"torchvision {torchvision.__version__} has no {name}; a newer torchvision may have it"
        ) from error
    model: nn.Module = builder(weights=None, **_ARGUMENTS.get(name, {}))
    return model


def _replace(model: nn.Module, path: str) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
