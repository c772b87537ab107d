"""One training, described: `TrainingJob` is what the command line, a recipe file and Python all make."""

from dataclasses import dataclass
from typing import Literal

from featurex_ray.errors import RequestError
from featurex_ray.job import DATASET_PATTERN, option
from featurex_ray.media.sampling import Sampling

Mode = Literal["scratch", "finetune", "head-only"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "step", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What to train on what, where to, and how. Frozen and checked when made.

    Raises:
        RequestError: A value is out of its range; the message names the option.
    """

    manifest: str = option(help="Manifest with a `label` column, at any fsspec URI.", group="data")
    output: str = option(
        help="Where weights, card, metrics and state go: s3://bucket/prefix or a local directory.",
        metavar="URI",
        group="data",
    )
    extractor: str = option(
        help="What to train, with options after commas: cnn_lstm,rnn=gru; or torchvision/resnet18.",
        metavar="NAME",
        group="model",
    )
    validation: str | None = option(
        None, help="Manifest to validate on. Default: a share of MANIFEST.", metavar="URI", group="data"
    )
    validation_share: float = option(
        0.1, help="Share of each class to validate on; 0 for none.", metavar="SHARE", group="data"
    )
    group_column: str | None = option(
        None,
        help="Manifest column whose values never stand on both sides of the split, such as a source video.",
        metavar="NAME",
        group="data",
    )
    dataset: str | None = option(
        None, help="Dataset of all samples, where the manifest has no such column.", group="data"
    )
    backbone: str | None = option(
        None, help="The same as backbone=NAME in the extractor.", metavar="NAME", group="model"
    )
    weights: str | None = option(
        None,
        help="safetensors to start from: the extractor's, or its backbone's. Default: as for extract.",
        metavar="URI",
        group="model",
    )
    mode: Mode = option(
        "scratch",
        help="scratch: no weights. finetune: all is trained, what the weights hold at a tenth of --lr, "
        "the classifier too where their card names the same classes. "
        "head-only: only what the weights don't hold is trained, and a new classifier.",
        group="model",
    )
    epochs: int = option(10, help="Passes over the data.", group="training")
    batch_size: int = option(32, help="Samples of a step, over all workers.", group="training")
    lr: float = option(0.001, help="Highest learning rate.", metavar="RATE", group="training")
    optimizer: Optimizer = option("adamw", help="sgd has Nesterov momentum 0.9.", group="training")
    schedule: Schedule = option(
        "cosine",
        help="cosine: one cycle, up over --warmup, then down to 0; step: a tenth after 1/2 and 3/4.",
        group="training",
    )
    warmup: float = option(
        0.1, help="Share of all steps over which the rate rises.", metavar="SHARE", group="training"
    )
    weight_decay: float = option(0.0001, help="Of matrices and kernels, not of biases.", group="training")
    augment: str = option(
        "none",
        help="none, or of: flip, shift:PIXELS, crop:LEAST_AREA, colour:STRENGTH; with commas. "
        "The frames of a clip change alike.",
        group="training",
    )
    seed: int = option(0, help="Of initial weights, order and augmentation.", group="training")
    sampling: str | None = option(
        None, help="Frames of a video: uniform:N. Default: the extractor's own.", group="video"
    )
    allow_prefix: tuple[str, ...] = option(
        (), help="URI prefix that manifests may name beyond their own store.", metavar="URI", group="safety"
    )
    max_failure_rate: float = option(
        0.1, help="Fail when a larger part of the samples can't be decoded.", metavar="RATE", group="safety"
    )
    workers: int = option(1, help="Data-parallel training workers.", group="scale")
    use_gpu: bool = option(False, help="A GPU for each worker.", group="scale")
    resume: bool = option(
        False, help="Go on from the last epoch in --output, if there is one.", group="scale"
    )
    address: str | None = option(
        None, help="Ray cluster to run on. Default: $RAY_ADDRESS, or a local one.", group="scale"
    )

    def __post_init__(self) -> None:
        """Check every value that can be checked without reading anything."""
        self._check_data()
        self._check_choices()
        self._check_numbers()

    @property
    def extractor_text(self) -> str:
        """The extractor with its backbone, as `resolve` reads it."""
        return self.extractor if self.backbone is None else f"{self.extractor},backbone={self.backbone}"

    def _check_data(self) -> None:
        if not self.manifest or not self.output:
            raise RequestError("a manifest and --output are needed")
        if not self.extractor:
            raise RequestError("--extractor is needed; `featurex extractors` lists them")
        if self.dataset is not None and not DATASET_PATTERN.fullmatch(self.dataset):
            raise RequestError(f"--dataset {self.dataset!r} must match {DATASET_PATTERN.pattern}")
        if self.group_column is not None and self.validation is not None:
            raise RequestError("--group-column splits MANIFEST; with --validation there is nothing to split")
        if self.sampling is not None and Sampling.parse(self.sampling).kind != "uniform":
            raise RequestError(
                f"--sampling {self.sampling}: training takes uniform:N, clips of the same length"
            )

    def _check_choices(self) -> None:
        for name, value, known in (
            ("mode", self.mode, ("scratch", "finetune", "head-only")),
            ("optimizer", self.optimizer, ("sgd", "adamw")),
            ("schedule", self.schedule, ("cosine", "step", "constant")),
        ):
            if value not in known:
                raise RequestError(f"--{name} {value!r} must be {', '.join(known)}")
        if self.mode == "scratch" and self.weights not in (None, "none"):
            raise RequestError("--weights with --mode scratch: give --mode finetune or head-only")
        if self.mode != "scratch" and self.weights == "none":
            raise RequestError(f"--mode {self.mode} needs weights to start from")

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.batch_size % self.workers:
            raise RequestError(
                f"--batch-size {self.batch_size} can't be shared among {self.workers} --workers alike"
            )
        if not self.lr > 0:
            raise RequestError(f"--lr {self.lr} must be above 0")
        if self.weight_decay < 0:
            raise RequestError(f"--weight-decay {self.weight_decay} must not be negative")
        for name in ("validation_share", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)} must be in [0, 1)")
