"""One run, described: `ExtractionJob` is what the command line, a config file and Python all make.

Each field carries its help text, so `featurex extract --help`, the YAML keys and the Python
arguments are the same names with the same defaults, written once.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from featurex_ray.errors import RequestError
from featurex_ray.media.sampling import Sampling

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Decoder = Literal["auto", "pyav", "decord", "nvdec"]
Isolation = Literal["process", "none"]
Partial = Literal["use", "fail"]

DATASET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
TABLE_PATTERN = DATASET_PATTERN


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,  # noqa: A002  click's own word
    metavar: str | None = None,
    group: str,
) -> Any:
    """A dataclass field that is a command line option too."""
    metadata = {"help": help, "metavar": metavar, "group": group}
    return field(default=default, metadata=metadata)


def option_fields(group: str | None = None) -> list["dataclasses.Field[Any]"]:
    """The job's fields, of one group or all, in the order in which help shows them."""
    return [f for f in dataclasses.fields(ExtractionJob) if group in (None, f.metadata["group"])]


@dataclass(frozen=True)
class PoolSize:
    """Bounds of an actor pool, both at least 1."""

    minimum: int
    maximum: int

    @classmethod
    def parse(cls, text: str) -> "PoolSize":
        """Read `N` or `MIN:MAX`.

        Raises:
            RequestError: `text` has another form, or the bounds are not 1 <= MIN <= MAX.
        """
        low, _, high = text.partition(":")
        if not (low.isdigit() and (high or low).isdigit()):
            raise RequestError(f"actors {text!r}: give N or MIN:MAX, such as 2:8")
        size = cls(int(low), int(high or low))
        if not 1 <= size.minimum <= size.maximum:
            raise RequestError(f"actors {text!r}: 1 <= MIN <= MAX must hold")
        return size


@dataclass(frozen=True, kw_only=True)
class ExtractionJob:
    """What to extract from what, where to, and how. Frozen and checked when made.

    Raises:
        RequestError: A value is out of its range; the message names the option.
    """

    manifest: str = option(help="Manifest file, directory or glob, at any fsspec URI.", group="data")
    output: str = option(
        help="Where feature tables live: s3://bucket/prefix or a local directory.",
        metavar="URI",
        group="data",
    )
    extractor: str | tuple[str, ...] = option(
        help="Extractor, with options after commas: cnn_lstm,rnn=gru. Give it several times to decode once "
        "and fill one table each. `featurex extractors` lists them.",
        metavar="NAME",
        group="model",
    )
    dataset: str | None = option(
        None, help="Dataset (partition) of all samples, where the manifest has no such column.", group="data"
    )
    table: str | None = option(
        None, help="Table's name. Default: the extractor's name, '/' written as '-'.", group="data"
    )
    keep_columns: tuple[str, ...] = option(
        (), help="Manifest columns to carry into the table, besides `label`.", metavar="NAME", group="data"
    )
    weights: tuple[str, ...] = option(
        (),
        help="safetensors file for the extractor; NAME=URI where there are several; #sha256=HEX pins it.",
        metavar="URI",
        group="model",
    )
    precision: Precision = option(
        "auto", help="Arithmetic of the forward pass; auto is bf16 where the hardware has it.", group="model"
    )
    batch_size: int | None = option(
        None,
        help="Frames per device batch. Default: as many as make 8 pictures of 224x224 on CPUs, 128 on GPUs.",
        group="model",
    )
    sampling: str | None = option(
        None,
        help="Frames of a clip: uniform:16, fps:2, every:5 or keyframes. Default: the extractor's own.",
        group="video",
    )
    clip_seconds: float | None = option(
        None, help="Cut videos into windows of this length. Default: a video is one clip.", group="video"
    )
    clip_stride_seconds: float | None = option(
        None, help="From one window's start to the next. Default: --clip-seconds.", group="video"
    )
    decoder: Decoder = option(
        "auto",
        help="Video backend; auto uses decord where it is frame-exact, else PyAV. nvdec is the GPU's own "
        "decoder (PyAV for what it can't do); it needs --isolation none.",
        group="video",
    )
    allow_prefix: tuple[str, ...] = option(
        (), help="URI prefix that manifests may name beyond their own store.", metavar="URI", group="safety"
    )
    only_prefix: tuple[str, ...] = option(
        (), help="Restrict what manifests may name to these URI prefixes.", metavar="URI", group="safety"
    )
    isolation: Isolation = option(
        "process",
        help="Where media are decoded: in a child process that can only compute, or (for media that you "
        "made yourself) in the decode actor.",
        group="safety",
    )
    decode_seconds: float = option(
        300.0, help="Wall-clock and CPU seconds of decoding one unit, with isolation.", group="safety"
    )
    decode_memory: int = option(
        1024, help="MiB of memory of a decoding process, at least 320, with isolation.", group="safety"
    )
    partial: Partial = option(
        "use",
        help="Videos that break off or are damaged: use the part that can be decoded (media_complete is "
        "false then), or fail.",
        group="safety",
    )
    max_pixels: int = option(64_000_000, help="Larger pictures and frames fail as too_large.", group="safety")
    max_media_seconds: float = option(
        86_400.0, help="Longer videos fail as too_large.", metavar="SECONDS", group="safety"
    )
    max_media_frames: int = option(1_000_000, help="Videos of more frames fail as too_large.", group="safety")
    max_streams: int = option(128, help="Containers of more streams fail as too_large.", group="safety")
    max_ratio: float = option(
        1_000_000.0, help="Media that grow more than so many times in decoding fail.", group="safety"
    )
    max_failure_rate: float = option(
        0.1, help="Exit 3 when a larger part of the samples failed.", metavar="RATE", group="safety"
    )
    max_samples_per_plan: int = option(
        250_000, help="Samples per plan, hence per published object.", group="scale"
    )
    decode_actors: str | None = option(
        None,
        help="Decode actors, N or MIN:MAX. Default: from the cluster's CPUs.",
        metavar="MIN:MAX",
        group="scale",
    )
    extract_actors: str | None = option(
        None,
        help="Extract actors, N or MIN:MAX. Default: one a GPU, or from the CPUs.",
        metavar="MIN:MAX",
        group="scale",
    )
    gpus_per_extract_actor: float | None = option(
        None, help="GPUs of one extract actor. Default: 1 where the cluster has GPUs, else 0.", group="scale"
    )
    address: str | None = option(
        None, help="Ray cluster to run on. Default: $RAY_ADDRESS, or a local one.", group="scale"
    )
    max_resources: str | None = option(
        None,
        help="What an autoscaling cluster can grow to, such as CPU=300,GPU=4; Ray does not say. "
        "Default: $FEATUREX_MAX_RESOURCES, or what is there when the run starts.",
        metavar="CPU=N,GPU=N",
        group="scale",
    )

    def __post_init__(self) -> None:
        """Check every value that can be checked without reading anything."""
        for name in ("keep_columns", "weights", "allow_prefix", "only_prefix"):
            if isinstance(value := getattr(self, name), str):  # its letters would be taken for the values
                raise RequestError(f"{name}={value!r} is one text: give a tuple of them, ({value!r},)")
        self._check_data()
        self._check_clips()
        self._check_model()
        self._check_safety()
        self._check_scale()

    @property
    def extractors(self) -> tuple[str, ...]:
        """The extractors asked for, as given."""
        return (self.extractor,) if isinstance(self.extractor, str) else tuple(self.extractor)

    @property
    def can_grow_to(self) -> dict[str, float]:
        """`max_resources` by name, from the environment where it isn't given; empty for no growth.

        Raises:
            RequestError: It has another form.
        """
        text = self.max_resources or os.environ.get("FEATUREX_MAX_RESOURCES", "")
        found: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, count = item.partition("=")
            if name not in ("CPU", "GPU") or not count.isdigit():
                raise RequestError(f"--max-resources {text!r}: give counts such as CPU=300,GPU=4")
            found[name] = float(count)
        return found

    def weights_of(self, extractor: str) -> str | None:
        """The `--weights` URI meant for one extractor, given as on the command line."""
        if len(self.extractors) == 1:
            return self.weights[0] if self.weights else None
        for item in self.weights:
            for name in (extractor, extractor.partition(",")[0]):  # its options hold equals signs too
                if item.startswith(f"{name}="):
                    return item.removeprefix(f"{name}=")
        return None

    def table_of(self, extractor: str) -> str:
        """The table that one extractor fills."""
        if self.table is not None:
            return self.table
        return re.sub(r"[^A-Za-z0-9._-]", "-", extractor.partition(",")[0])

    def _check_data(self) -> None:
        if not self.manifest or not self.output:
            raise RequestError("a manifest and --output are needed")
        if self.dataset is not None and not DATASET_PATTERN.fullmatch(self.dataset):
            raise RequestError(f"--dataset {self.dataset!r} must match {DATASET_PATTERN.pattern}")
        if self.table is not None and not TABLE_PATTERN.fullmatch(self.table):
            raise RequestError(f"--table {self.table!r} must match {TABLE_PATTERN.pattern}, without '/'")

    def _check_clips(self) -> None:
        if self.sampling is not None:
            Sampling.parse(self.sampling)
        if self.clip_seconds is not None and not self.clip_seconds > 0:
            raise RequestError(f"--clip-seconds {self.clip_seconds} must be above 0")
        if self.clip_stride_seconds is None:
            return
        if self.clip_seconds is None:
            raise RequestError("--clip-stride-seconds needs --clip-seconds")
        if not self.clip_stride_seconds > 0:
            raise RequestError(f"--clip-stride-seconds {self.clip_stride_seconds} must be above 0")

    def _check_model(self) -> None:
        names = self.extractors
        if not names or not all(names):
            raise RequestError("--extractor is needed; `featurex extractors` lists them")
        if len(names) == 1 and len(self.weights) > 1:
            raise RequestError("--weights is given several times for one extractor")
        known = tuple(f"{part}=" for name in names for part in (name, name.partition(",")[0]))
        for item in self.weights if len(names) > 1 else ():
            if not item.startswith(known):
                raise RequestError(f"--weights {item!r}: with several extractors, give EXTRACTOR=URI")
        tables = [self.table_of(name) for name in names]
        if len(set(tables)) < len(tables):
            raise RequestError(
                f"these extractors would share a table: {', '.join(names)}; run them one by one with --table"
            )
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise RequestError(f"--precision {self.precision!r} must be auto, fp32, bf16 or fp16")
        if self.decoder not in get_args(Decoder):
            raise RequestError(f"--decoder {self.decoder!r} must be auto, pyav, decord or nvdec")

    def _check_safety(self) -> None:
        if self.isolation not in ("process", "none"):
            raise RequestError(f"--isolation {self.isolation!r} must be process or none")
        if self.partial not in ("use", "fail"):
            raise RequestError(f"--partial {self.partial!r} must be use or fail")
        for name in ("max_pixels", "max_media_seconds", "max_media_frames", "max_streams", "max_ratio"):
            if not getattr(self, name) > 0:
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0")
        if not 0 < self.decode_seconds < float("inf"):
            raise RequestError(f"--decode-seconds {self.decode_seconds} must be above 0")
        if self.decode_memory < 320:
            raise RequestError(f"--decode-memory {self.decode_memory} must be at least 320 MiB")

    def _check_scale(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise RequestError(f"--batch-size {self.batch_size} must be at least 1")
        if self.max_samples_per_plan < 1:
            raise RequestError(f"--max-samples-per-plan {self.max_samples_per_plan} must be at least 1")
        if not 0 <= self.max_failure_rate <= 1:
            raise RequestError(f"--max-failure-rate {self.max_failure_rate} must be between 0 and 1")
        if self.gpus_per_extract_actor is not None and self.gpus_per_extract_actor < 0:
            raise RequestError(f"--gpus-per-extract-actor {self.gpus_per_extract_actor} must not be negative")
        for text in (self.decode_actors, self.extract_actors):
            if text is not None:
                PoolSize.parse(text)
        _ = self.can_grow_to  # raises where it has another form
