"""What an extractor is, told without torch: its input, its output and its weights."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from featurex_ray.media.preprocess import InputSpec

Media = Literal["any", "video"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class WeightsInfo:
    """Where the numbers of an extractor come from.

    Attributes:
        source: The file's URI or name; "none" where there is no file.
        sha256: Of the file, in hex; "none" where there is no file.
        seeded: The parts that no file holds, drawn from a fixed seed: never trained.
    """

    source: str = "none"
    sha256: str = "none"
    seeded: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any] | str:
        """The three facts; "none" where nothing at all was trained."""
        if self.sha256 == "none":
            return "none"
        facts: dict[str, Any] = {"source": self.source, "sha256": self.sha256}
        return facts | {"seeded": list(self.seeded)} if self.seeded else facts


@dataclass(frozen=True)
class ExtractorSpec:
    """An extractor, described; with its weights this determines the function computed.

    An extractor of one's own is a class with a `spec` like this and a method
    `__call__(frames)`. `frames` is a (B, T, 3, H, W) float32 tensor on the device, RGB,
    normalised with `mean` and `std`; it returns (B, D), or (B, D) and the attention weights
    (B, *attention_shape). Only `dimension` and `input` have no default.

    Attributes:
        dimension: D, the length of the feature.
        input: What one frame looks like.
        name: As it is given to `--extractor`; the registry fills it in.
        options: What was chosen, defaults included, sorted.
        media: "any" sees single frames (T is 1) and a video's feature is the mean over its
            frames, attention likewise. "video" sees whole clips and takes no images.
        mean: Subtracted from the channels, of values in [0, 1].
        std: What the channels are then divided by.
        attention_shape: Of the attention weights, such as (7, 7); () for one weight a frame;
            None for no attention.
        default_sampling: How a video's frames are chosen where nothing is said.
        min_frames: The shortest clip that it takes.
        max_frames: The longest, None for any.
        weights: Where its numbers come from.
        architecture: Whatever, with the rest, determines the function computed. The registry
            fills in a hash of the module's source for an own extractor that leaves it empty.
    """

    dimension: int
    input: InputSpec
    name: str = ""
    options: tuple[tuple[str, str], ...] = ()
    media: Media = "any"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    attention_shape: tuple[int, ...] | None = None
    default_sampling: str = "uniform:16"
    min_frames: int = 1
    max_frames: int | None = None
    weights: WeightsInfo = WeightsInfo()
    architecture: str = ""

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension must be at least 1, not {self.dimension}")
        if self.media not in ("any", "video"):
            raise ValueError(f'media must be "any" or "video", not {self.media!r}')
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean and std need three values each, std positive, not {self.mean} and {self.std}"
            )
        if self.attention_shape == () and self.media == "any":
            raise ValueError('one weight a frame, attention_shape (), is for media "video"')

    @property
    def text(self) -> str:
        """Name and options, in the form that `resolve` reads."""
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.options)])

    @property
    def backbone(self) -> str | None:
        """The torchvision model inside, None where there is none."""
        if self.name.startswith("torchvision/"):
            return self.name.removeprefix("torchvision/")
        return dict(self.options).get("backbone")

    def option(self, key: str) -> str:
        """The value of one option."""
        return dict(self.options)[key]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON types; what table metadata and run reports carry."""
        facts = asdict(self) | {"options": dict(self.options), "weights": self.weights.to_json()}
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    def revision(
        self, *, sampling: str, clip: Sequence[float | None] | None, precision: str, decoder: str
    ) -> str:
        """A hash over everything that a feature depends on.

        Args:
            sampling: Such as "uniform:16".
            clip: Window length and stride in seconds, None for the whole video.
            precision: "fp32", "bf16" or "fp16".
            decoder: The resolved decoder policy.

        Returns:
            16 hex digits. Where weights lie, and what the extractor is called, don't enter.
        """
        facts = self.to_json()
        del facts["name"]
        del facts["default_sampling"]
        facts["weights"] = [self.weights.sha256, *self.weights.seeded]
        facts |= {
            "sampling": sampling,
            "clip": clip and list(clip),
            "precision": precision,
            "decoder": decoder,
        }
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
