"""The extractors that there are, and how a name becomes one, without torch where that can be."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import sha256
from importlib import import_module
from inspect import getsource
from typing import Any

from featurex_ray.errors import ExtractorError
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.models.spec import ExtractorSpec, Media, WeightsInfo
from featurex_ray.models.torchvision_zoo import IMAGE_MODELS, VIDEO_MODELS, ImageModel, VideoModel
from featurex_ray.models.weights import (
    WeightsFile,
    bundled_weights,
    checkpoints_folder,
    read_shapes,
    read_weights,
    torchvision_weights,
)

Options = dict[str, str]

NO_WEIGHTS = "none"
"""Given as `weights`: everything from a fixed seed, and marked so; for trials and benchmarks."""


@dataclass(frozen=True)
class ResolvedExtractor:
    """An extractor and the weights that make it compute something; picklable.

    Attributes:
        spec: What it is.
        weights: The file, whole; None where everything is seeded, or the extractor brings its own.
    """

    spec: ExtractorSpec
    weights: WeightsFile | None


@dataclass(frozen=True)
class ExtractorRow:
    """A line of `featurex extractors`.

    Attributes:
        name: For `--extractor`.
        media: What it takes.
        dimension: Of the feature.
        input: Such as "3x224x224".
        weights: What it uses by default; "none" for seeded ones.
        on_disk: Whether these weights lie on this disk.
    """

    name: str
    media: Media
    dimension: int
    input: str
    weights: str
    on_disk: bool


def resolve(text: str, *, weights: str | None = None) -> ResolvedExtractor:
    """Find an extractor by its name and read its weights.

    Args:
        text: A built-in name with options, such as "cnn_lstm,backbone=resnet18,rnn=gru", or
            "torchvision/resnet18", or "my_package.module:MyExtractor".
        weights: The URI of a safetensors file with all the extractor's tensors, or those of its
            torchvision backbone (the rest is then seeded); `#sha256=<hex>` pins it. "none" for
            seeded weights. By default the bundled weights of `attention_convnet` and `cnn_lstm` with
            their default options, and torchvision's for all else.

    Raises:
        ExtractorError: an unknown name, or options that it doesn't take.
        WeightsError: weights that are missing, altered or of another shape.
    """
    name, options = _parse(text)
    if ":" in name:
        spec = _own_spec(name, options)
        if weights is None:
            return ResolvedExtractor(spec, None)
    elif name.startswith("torchvision/"):
        spec = _torchvision_spec(name, _complete(name, options, {}))
    elif name in BUILT_IN:
        kind = BUILT_IN[name]
        spec = kind.spec(_complete(name, options, kind.options))
    else:
        raise ExtractorError(f"there is no extractor {name!r}{_hint(name)}")
    file, seeded = _weights_of(spec, weights)
    return ResolvedExtractor(replace(spec, weights=_info(file, seeded)), file)


def list_extractors() -> list[ExtractorRow]:
    """Every built-in extractor with its default options."""
    built_in = [kind.spec(kind.options) for kind in BUILT_IN.values()]
    names = [f"torchvision/{name}" for name in (*IMAGE_MODELS, *VIDEO_MODELS)]
    return [_row(spec) for spec in (*built_in, *(_torchvision_spec(name, {}) for name in names))]


def _row(spec: ExtractorSpec) -> ExtractorRow:
    if spec.name in _BUNDLED:
        file = bundled_weights(spec.name)
        source, on_disk = (file.source, True) if file else (NO_WEIGHTS, True)
    else:
        _, source = _torchvision_file(spec)
        on_disk = (checkpoints_folder() / source).is_file()
    size = f"3x{spec.input.height}x{spec.input.width}"
    return ExtractorRow(spec.name, spec.media, spec.dimension, size, source, on_disk)


def _attention_convnet_spec(options: Options) -> ExtractorSpec:
    if options["attention"] not in ("yes", "no"):
        raise ExtractorError(f"attention_convnet: attention={options['attention']} must be yes or no")
    return ExtractorSpec(
        name="attention_convnet",
        options=_sorted(options),
        dimension=84,
        input=InputSpec(32, 32, 32, "bilinear"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        attention_shape=(5, 5) if options["attention"] == "yes" else None,
        architecture="attention_convnet 1",
    )


def _attention_cnn_spec(options: Options) -> ExtractorSpec:
    zoo = _backbone_zoo(options["backbone"])
    return ExtractorSpec(
        name="attention_cnn",
        options=_sorted(options),
        dimension=zoo.map_shape[0],
        input=_input(zoo),
        mean=zoo.mean,
        std=zoo.std,
        attention_shape=zoo.map_shape[1:],
        architecture="attention_cnn 1",
    )


def _cnn_lstm_spec(options: Options) -> ExtractorSpec:
    zoo = _backbone_zoo(options["backbone"])
    if options["rnn"] not in ("lstm", "gru"):
        raise ExtractorError(f"cnn_lstm: rnn={options['rnn']} must be lstm or gru")
    if not options["hidden"].isdecimal() or not 1 <= int(options["hidden"]) <= 8192:
        raise ExtractorError(f"cnn_lstm: hidden={options['hidden']} must be a number from 1 to 8192")
    return ExtractorSpec(
        name="cnn_lstm",
        options=_sorted(options),
        media="video",
        dimension=int(options["hidden"]),
        input=_input(zoo),
        mean=zoo.mean,
        std=zoo.std,
        attention_shape=(),
        architecture="cnn_lstm 2",
    )


def _torchvision_spec(name: str, _options: Options) -> ExtractorSpec:
    model = name.removeprefix("torchvision/")
    zoo = IMAGE_MODELS.get(model) or VIDEO_MODELS.get(model)
    if zoo is None:
        raise ExtractorError(f"torchvision has no model {model!r} that gives features{_hint(name)}")
    video: dict[str, Any] = {}
    if isinstance(zoo, VideoModel):
        video = {
            "media": "video",
            "default_sampling": zoo.default_sampling,
            "min_frames": zoo.min_frames,
            "max_frames": zoo.max_frames,
        }
    return ExtractorSpec(
        name=name,
        dimension=zoo.dimension,
        input=_input(zoo),
        mean=zoo.mean,
        std=zoo.std,
        architecture=f"{name} 1",
        **video,
    )


@dataclass(frozen=True)
class _BuiltIn:
    spec: Callable[[Options], ExtractorSpec]
    options: Options  # with their defaults


BUILT_IN: dict[str, _BuiltIn] = {
    "attention_convnet": _BuiltIn(_attention_convnet_spec, {"attention": "yes"}),
    "attention_cnn": _BuiltIn(_attention_cnn_spec, {"backbone": "resnet18"}),
    "cnn_lstm": _BuiltIn(_cnn_lstm_spec, {"backbone": "squeezenet1_0", "rnn": "lstm", "hidden": "256"}),
}
"""The extractors of this package's own; `torchvision/<name>` are those of `torchvision_zoo`."""

_BUNDLED = ("attention_convnet", "cnn_lstm")  # their default weights come with the package
_BEYOND_BACKBONE = {"attention_cnn": ("attention",), "cnn_lstm": ("standardise", "rnn", "attention")}


def _weights_of(spec: ExtractorSpec, weights: str | None) -> tuple[WeightsFile | None, tuple[str, ...]]:
    """The file to use, and the parts that it doesn't hold."""
    if weights == NO_WEIGHTS:
        return None, ("all",)
    if weights is not None:
        return _given_weights(spec, weights)
    if spec.name in _BUNDLED and dict(spec.options) == BUILT_IN[spec.name].options:
        file = bundled_weights(spec.name)
        return file, () if file else ("all",)
    if spec.backbone is None:
        return None, ("all",)
    backbone, file_name = _torchvision_file(spec)
    file = torchvision_weights(backbone, file_name)
    return file, _BEYOND_BACKBONE.get(spec.name, ())


def _given_weights(spec: ExtractorSpec, uri: str) -> tuple[WeightsFile, tuple[str, ...]]:
    file = read_weights(uri)
    # Shapes are those of the network itself, and only torch can build it; without --weights it isn't needed.
    from featurex_ray.models.build import check_shapes, is_backbone_only

    shapes = read_shapes(file.data, name=file.source)
    check_shapes(spec, shapes, name=file.source)
    return file, _BEYOND_BACKBONE.get(spec.name, ()) if is_backbone_only(shapes, spec) else ()


def _info(file: WeightsFile | None, seeded: tuple[str, ...]) -> WeightsInfo:
    return WeightsInfo(file.source, file.sha256, seeded) if file else WeightsInfo(seeded=seeded)


def _own_spec(name: str, options: Options) -> ExtractorSpec:
    if options:
        raise ExtractorError(f"{name} takes no options, only built-in extractors do")
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ExtractorError(f"{name}: can't import {module_name!r}: {error}") from error
    kind = getattr(module, attribute, None)
    if kind is None:
        raise ExtractorError(f"{module_name} has no {attribute!r}")
    spec = getattr(kind, "spec", None)
    if not isinstance(spec, ExtractorSpec) or not isinstance(kind, type) or not _is_called(kind):
        raise ExtractorError(f"{name} must be a class with a `spec` (an ExtractorSpec) and __call__(frames)")
    # Whoever names no architecture gets a new revision with every change of the source.
    source = sha256(getsource(module).encode()).hexdigest()
    return replace(spec, name=name, architecture=spec.architecture or f"source {source}")


def _is_called(kind: type) -> bool:
    return any("__call__" in vars(base) for base in kind.__mro__)


def _parse(text: str) -> tuple[str, Options]:
    name, *rest = (part.strip() for part in text.split(","))
    pairs = [part.partition("=") for part in rest]
    if bad := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ExtractorError(f"{text!r}: an option is key=value, not {bad[0]!r}")
    if len({key for key, _, _ in pairs}) < len(pairs):
        raise ExtractorError(f"{text!r} gives an option twice")
    return name, {key: value for key, _, value in pairs}


def _complete(name: str, options: Options, defaults: Options) -> Options:
    if unknown := sorted(set(options) - set(defaults)):
        known = f"takes {', '.join(defaults)}" if defaults else "takes no options"
        raise ExtractorError(f"{name} has no option {unknown[0]!r}: it {known}")
    return defaults | options


def _sorted(options: Options) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(options.items()))


def _backbone_zoo(name: str) -> ImageModel:
    if name not in IMAGE_MODELS:
        close = get_close_matches(name, IMAGE_MODELS, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ExtractorError(f"there is no image backbone {name!r}{hint}")
    return IMAGE_MODELS[name]


def _torchvision_file(spec: ExtractorSpec) -> tuple[str, str]:
    """The torchvision model inside an extractor, and the file of its weights."""
    name = spec.backbone or ""
    return name, (IMAGE_MODELS | VIDEO_MODELS)[name].weights_file


def _input(zoo: ImageModel | VideoModel) -> InputSpec:
    interpolation = zoo.interpolation if isinstance(zoo, ImageModel) else "bilinear"
    return InputSpec(zoo.size, zoo.size, zoo.resize, interpolation)


def _hint(name: str) -> str:
    names = [*BUILT_IN, *(f"torchvision/{model}" for model in (*IMAGE_MODELS, *VIDEO_MODELS))]
    prefixed = [f"torchvision/{name}"] if f"torchvision/{name}" in names else []
    close = prefixed or get_close_matches(name, names, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return "; `featurex extractors` lists them, and one's own is my_package.module:MyExtractor"
