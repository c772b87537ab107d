"""From a resolved extractor to its network with weights: where `models` meets torch."""

import io
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from featurex_ray.errors import WeightsError
from featurex_ray.models.attention_cnn import AttentionCnn
from featurex_ray.models.attention_convnet import AttentionConvNet
from featurex_ray.models.backbones import FeatureMap, TorchvisionExtractor
from featurex_ray.models.cnn_lstm import CnnLstm
from featurex_ray.models.spec import ExtractorSpec
from featurex_ray.models.torchvision_zoo import IMAGE_MODELS, VIDEO_MODELS
from featurex_ray.models.weights import Shapes, WeightsFile

Extractor = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]

SEED = 0
"""Of weights that no file holds. Another seed is another architecture in the spec."""

HEAD = "classifier"
"""A classifier's tensors in weight files, `classifier.weight` and `.bias`; no feature needs them."""

_BACKBONE = "backbone.model"  # where every extractor on torchvision keeps torchvision's model
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # classifiers that only training needs
_DENSENET_LAYER = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..+)$")


def build(spec: ExtractorSpec, file: WeightsFile | None) -> Extractor:
    """The network of an extractor, on the CPU, in evaluation mode, with its weights.

    What the file doesn't hold is drawn from a fixed seed, whatever the global random state.

    Args:
        spec: As the registry made it.
        file: Its weights; None for none.

    Raises:
        WeightsError: the file doesn't fit the network.
    """
    extractor = _seeded(spec)
    if file is not None:
        load(extractor, spec, file)
    if isinstance(extractor, nn.Module):
        extractor.eval().requires_grad_(False)
    return extractor


def is_backbone_only(names: Iterable[str], spec: ExtractorSpec) -> bool:
    """Whether tensors of these names are a bare torchvision model, not the whole extractor."""
    return spec.backbone is not None and not any(name.startswith("backbone.") for name in names)


def check_shapes(spec: ExtractorSpec, found: Shapes, *, name: str) -> None:
    """Compare the tensors of a file with the network that they are for.

    Args:
        spec: Of the extractor.
        found: Names and shapes in the file.
        name: Of the file, for the message.

    Raises:
        WeightsError: they don't fit; says which layers.
    """
    extractor = _seeded(spec)
    _fit_classes(extractor, found)
    target = _target(extractor, spec, found)
    wanted = {key: tuple(tensor.shape) for key, tensor in target.state_dict().items()}
    kept = {key: found[key] for key in found if not _is_dropped(key, spec)}
    problems = [
        # What is shown first tells most: a shape says which other network it is.
        *(f"{k} is {kept[k]}, not {wanted[k]}" for k in wanted if k in kept and kept[k] != wanted[k]),
        # BatchNorm's counter may be missing: older files lack it, and no feature needs it.
        *(f"{k} is missing" for k in wanted if k not in kept and not k.endswith(".num_batches_tracked")),
        *(f"{k} is not part of it" for k in kept if k not in wanted),
    ]
    if problems:
        rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(f"{name} does not fit {spec.text}: {'; '.join(problems[:5])}{rest}")


def save_weights(module: nn.Module, path: str) -> None:
    """Write a network's weights as a safetensors file that `--weights` takes."""
    Path(path).write_bytes(weights_bytes(module.state_dict()))


def weights_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file; the same tensors give the same bytes."""
    # Copies, because safetensors refuses tensors that share memory or aren't laid out row by row.
    copies = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in sorted(tensors.items())
    }
    return safetensors.torch.save(copies)


def construct(spec: ExtractorSpec) -> Extractor:
    """The network of an extractor, its weights drawn from torch's random state as it is."""
    if ":" in spec.name:
        module, _, attribute = spec.name.partition(":")
        return cast("Extractor", getattr(import_module(module), attribute)())
    return _BUILDERS[spec.name.partition("/")[0]](spec)


def _seeded(spec: ExtractorSpec) -> Extractor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return construct(spec)


def _attention_convnet(spec: ExtractorSpec) -> nn.Module:
    return AttentionConvNet(attends=spec.option("attention") == "yes")


def _attention_cnn(spec: ExtractorSpec) -> nn.Module:
    return AttentionCnn(FeatureMap(spec.option("backbone")), channels=spec.dimension)


def _cnn_lstm(spec: ExtractorSpec) -> nn.Module:
    backbone = spec.option("backbone")
    channels = IMAGE_MODELS[backbone].map_shape[0]
    return CnnLstm(FeatureMap(backbone), channels=channels, rnn=spec.option("rnn"), hidden=spec.dimension)


def _torchvision(spec: ExtractorSpec) -> nn.Module:
    return TorchvisionExtractor(spec.name.removeprefix("torchvision/"))


_BUILDERS: dict[str, Callable[[ExtractorSpec], nn.Module]] = {
    "attention_convnet": _attention_convnet,
    "attention_cnn": _attention_cnn,
    "cnn_lstm": _cnn_lstm,
    "torchvision": _torchvision,
}


def load(extractor: Extractor, spec: ExtractorSpec, file: WeightsFile) -> None:
    """Put a file's weights into a network, or into its backbone.

    Raises:
        WeightsError: the file doesn't fit.
    """
    tensors = _read(file)
    _fit_classes(extractor, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    target = _target(extractor, spec, tensors)
    for key in [key for key in tensors if _is_dropped(key, spec)]:
        del tensors[key]
    try:
        target.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{file.source} does not fit {spec.text}: {error}") from error


def load_head(head: nn.Linear, file: WeightsFile) -> None:
    """Put a file's classifier into a network's.

    Raises:
        WeightsError: the file holds none, or one of another shape.
    """
    tensors = _read(file)
    # attention_convnet has its classifier under its own name.
    name = HEAD if f"{HEAD}.weight" in tensors else "fc3"
    found = {key: tensors[f"{name}.{key}"] for key in ("weight", "bias") if f"{name}.{key}" in tensors}
    try:
        head.load_state_dict(found)
    except RuntimeError as error:
        raise WeightsError(f"the classifier in {file.source} does not fit: {error}") from error


def _fit_classes(extractor: Extractor, found: Shapes) -> None:
    """`attention_convnet` keeps its classifier, of as many classes as it was trained on."""
    shape = found.get("fc3.weight", ())
    if isinstance(extractor, AttentionConvNet) and len(shape) == 2:
        extractor.fc3 = nn.Linear(extractor.fc3.in_features, shape[0])


def _read(file: WeightsFile) -> dict[str, Tensor]:
    if file.format == "safetensors":
        return safetensors.torch.load(file.data)
    tensors: dict[str, Any] = torch.load(io.BytesIO(file.data), map_location="cpu", weights_only=True)
    # torchvision's DenseNet files still have the names that its layers had before 2018.
    for key in [key for key in tensors if _DENSENET_LAYER.match(key)]:
        tensors[_DENSENET_LAYER.sub(r"\1\2", key)] = tensors.pop(key)
    return tensors


def _target(extractor: Extractor, spec: ExtractorSpec, names: Iterable[str]) -> nn.Module:
    """The module that tensors of these names are for: all of the extractor, or its backbone."""
    if not isinstance(extractor, nn.Module):
        raise WeightsError(f"{spec.name} is no torch.nn.Module, so it takes no --weights")
    return extractor.get_submodule(_BACKBONE) if is_backbone_only(names, spec) else extractor


def _is_dropped(key: str, spec: ExtractorSpec) -> bool:
    """Whether a tensor belongs to a classifier: ours, or what is cut off a torchvision model."""
    if key in (f"{HEAD}.weight", f"{HEAD}.bias"):
        return True
    name = spec.backbone
    if name is None:
        return False
    head = (IMAGE_MODELS | VIDEO_MODELS)[name].head
    if not spec.name.startswith("torchvision/"):  # nothing behind the feature map is kept
        head = head.split(".")[0]
    return key.removeprefix(f"{_BACKBONE}.").startswith((f"{head}.", *_AUXILIARY))
