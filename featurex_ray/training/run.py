"""One training from manifest to weights: prepare, decode, train on Ray Train, write the card."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.util.queue import Queue

from featurex_ray.errors import FeaturexError, RequestError, RunError, WeightsError
from featurex_ray.job import Decoder
from featurex_ray.manifest import read_manifest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import resolve_policy
from featurex_ray.models.registry import NO_WEIGHTS, ResolvedExtractor, resolve
from featurex_ray.pipeline.connect import connect, ray_as_found
from featurex_ray.pipeline.decode import DecodeSettings
from featurex_ray.pipeline.execute import configure, first_line
from featurex_ray.pipeline.report import versions
from featurex_ray.storage import ReadPolicy, redact, without_secrets
from featurex_ray.training.augment import Augmentation
from featurex_ray.training.data import decoded_dataset, outcome
from featurex_ray.training.job import TrainingJob
from featurex_ray.training.labels import LabelledSamples, read_labelled, refuse_shared, split
from featurex_ray.training.outputs import CARD, HISTORY, JOB, PLOT, STATE, WEIGHTS, MetricsLog, OutputFolder

if TYPE_CHECKING:
    from ray.data import Dataset

    from featurex_ray.training.loop import LoopSetup

Say = Callable[[str], None]

_WORKER_FAILURES = 3
_END = "end"
_MAY_CHANGE = ("resume", "workers", "use_gpu", "address")
"""Options that a training may go on under with other values; they change no result but rounding."""


@dataclass(frozen=True)
class Training:
    """A job whose inputs were found and found right; nothing is written yet."""

    job: TrainingJob
    resolved: ResolvedExtractor
    train: LabelledSamples
    validation: LabelledSamples | None
    decode: DecodeSettings
    output: OutputFolder

    @property
    def keeps_head(self) -> bool:
        """Whether fine-tuning goes on from the weights' own classifier: it tells the same classes apart."""
        weights = self.resolved.weights
        if self.job.mode != "finetune" or weights is None:
            return False
        return weights.classes == self.train.classes


@dataclass(frozen=True)
class TrainingReport:
    """What came of a training.

    Attributes:
        weights: URI of the weights.
        card: What is said of them.
        history: Metrics, one row an epoch.
    """

    weights: str
    card: dict[str, Any]
    history: list[dict[str, Any]]


def train(job: TrainingJob, *, say: Say = lambda _: None) -> TrainingReport:
    """Train an extractor; killed and started again with `resume`, it goes on from its last epoch.

    Args:
        job: What to train on what.
        say: Told of each step in a line.

    Raises:
        RequestError: The request is wrong; nothing was written.
        RunError: It failed or diverged; the weights of the last good epoch are kept.
    """
    training = prepare(job)
    _is_held(training)  # what is not to be gone on with is refused before any work
    sizes = f"{len(training.train.samples):,} to train on"
    if training.validation:
        sizes += f", {len(training.validation.samples):,} to validate on"
    head = ", going on from the weights' own classifier" if training.keeps_head else ""
    say(f"{sizes}, {len(training.train.classes)} classes{head}")
    with ray_as_found():
        connect(job)
        configure(ray.data.DataContext.get_current())
        datasets = _decode(training, say)
        _claim(training)
        return _fit(training, datasets, say)


def prepare(job: TrainingJob) -> Training:
    """Read and check all that a job names.

    Raises:
        RequestError: A manifest, its labels, the extractor or its weights can't be used.
    """
    Augmentation.parse(job.augment)
    weights = NO_WEIGHTS if job.mode == "scratch" else job.weights
    resolved = resolve(job.extractor_text, weights=weights)
    brings_its_own = ":" in resolved.spec.name and job.mode == "finetune"
    if job.mode != "scratch" and resolved.weights is None and not brings_its_own:
        raise WeightsError(
            f"--mode {job.mode} starts from weights, and {resolved.spec.text} has none: give --weights"
        )
    train, validation = _samples(job)
    spec = resolved.spec
    sampling = Sampling.parse(job.sampling or spec.default_sampling)
    decoder: Decoder = "auto"
    decode = DecodeSettings(
        policy=_policy(job, job.manifest),
        inputs=(spec.input,),
        sampling=sampling,
        clip_seconds=None,
        clip_stride_seconds=None,
        decoder=resolve_policy(decoder),
    )
    return Training(job, resolved, train, validation, decode, OutputFolder(job.output))


def _samples(job: TrainingJob) -> tuple[LabelledSamples, LabelledSamples | None]:
    """The samples to train on, and those to validate on."""
    keep = (job.group_column,) if job.group_column else ()
    manifest = read_manifest(
        job.manifest, dataset=job.dataset, keep_columns=keep, policy=_policy(job, job.manifest)
    )
    labelled = read_labelled(manifest)
    if job.validation is not None:
        other = read_manifest(job.validation, dataset=job.dataset, policy=_policy(job, job.validation))
        validation = read_labelled(other, classes=labelled.classes)
        refuse_shared(labelled, validation)
        return labelled, validation
    rows, held = split(labelled, share=job.validation_share, group_column=job.group_column)
    return labelled.take(rows), labelled.take(held) if len(held) else None


def _policy(job: TrainingJob, manifest: str) -> ReadPolicy:
    return ReadPolicy(manifest, allow_prefixes=job.allow_prefix)


def _claim(training: Training) -> None:
    """Note the job with the output.

    Only when the training is about to begin: what is refused before that is corrected and tried again.

    Raises:
        RequestError: The output holds another training, or can't be written.
        StoreUnavailableError: The store did not answer.
    """
    if not _is_held(training):
        training.output.write(JOB, json.dumps(_noted(training), indent=1).encode())


def _is_held(training: Training) -> bool:
    """Whether the output holds this very training, to be gone on with.

    Raises:
        RequestError: It holds one that is not this one, or `resume` wasn't asked for; or can't be read.
        StoreUnavailableError: The store did not answer.
    """
    job, output = training.job, training.output
    before = output.read(JOB)
    if before is None:
        return False
    if not job.resume:
        raise RequestError(
            f"{output.uri} holds a training: --resume goes on with it, or give another --output"
        )
    found, wanted = json.loads(before), _noted(training)
    if changed := sorted(key for key in wanted if found.get(key) != wanted[key]):
        raise RequestError(
            f"{output.uri} holds a training with another {', '.join(changed)}: give another --output"
        )
    return True


def _noted(training: Training) -> dict[str, Any]:
    """What a training is told by: its job, and what lay at the URIs that this names."""
    job = training.job
    wanted = {k: v for k, v in dataclasses.asdict(job).items() if k not in _MAY_CHANGE}
    wanted = without_secrets(wanted) | {"samples_sha256": training.train.sha256()}
    # What lies at a URI can be another thing by now: a resumed training would mix the two.
    if training.validation is not None:
        wanted["validation_sha256"] = training.validation.sha256()
    if training.resolved.weights is not None:
        wanted["weights_sha256"] = training.resolved.weights.sha256
    noted: dict[str, Any] = json.loads(json.dumps(wanted))
    return noted


def _decode(training: Training, say: Say) -> "dict[str, Dataset]":
    """Both sides, decoded; samples that failed are told and left out.

    Raises:
        RunError: Too many failed.
    """
    sides = {"train": training.train, "validation": training.validation}
    datasets = {}
    for name, samples in sides.items():
        if samples is None:
            continue
        policy = _policy(training.job, training.job.validation or training.job.manifest)
        settings = training.decode if name == "train" else dataclasses.replace(training.decode, policy=policy)
        datasets[name] = decoded_dataset(samples, settings)
        decoded = outcome(datasets[name])
        decoded.check(max_failure_rate=training.job.max_failure_rate)
        if decoded.failures:
            say(f"{name}: left out {decoded.failures.total()} that failed ({decoded.example})")
    return datasets


def _fit(training: Training, datasets: "dict[str, Dataset]", say: Say) -> TrainingReport:
    news = Queue(actor_options={"num_cpus": 0})
    listener = _Listener(news, MetricsLog(training.output), training.job.epochs, say)
    listener.start()
    try:
        result = _trainer(training, datasets, news).fit()
    except ray.train.TrainingFailedError as error:
        raise RunError(
            f"training failed: {first_line(error)}; --resume goes on from the last epoch"
        ) from error
    finally:
        listener.end()
    report = None if result.checkpoint is None else _write(training, result.checkpoint)
    return _ended(report, listener.diverged, epochs=training.job.epochs)


def _ended(report: TrainingReport | None, diverged: dict[str, Any] | None, *, epochs: int) -> TrainingReport:
    """The report of a training that did what it was asked for.

    Args:
        report: Of the epochs that were done; None where none was.
        diverged: Where the loss was no number, as the workers told.
        epochs: Wanted.

    Raises:
        RunError: It diverged, or epochs are missing.
    """
    done = len(report.history) if report else 0
    kept = f"the weights of epoch {done} are kept" if done else "no epoch was completed"
    if diverged is not None:
        raise RunError(
            f"the loss is no number any more at step {diverged['diverged_step']} "
            f"(epoch {diverged['epoch']}): lower --lr; {kept}"
        )
    if report is None or done < epochs:
        raise RunError(f"training ended before its {epochs} epochs were done: {kept}; --resume goes on")
    return report


def _trainer(training: Training, datasets: "dict[str, Dataset]", news: Queue) -> Any:
    from ray.train.torch import TorchTrainer

    job, resources = training.job, ray.cluster_resources()
    path, files = training.output.for_ray()
    # Logical CPUs only: half of them stay free, so that reading data never waits for training to end.
    cpus = min(1.0, resources.get("CPU", 1) / (2 * job.workers))
    return TorchTrainer(
        _train_loop,
        train_loop_config={"setup": _setup(training, news, resources)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.workers, use_gpu=job.use_gpu, resources_per_worker=_per_worker(job, cpus)
        ),
        run_config=ray.train.RunConfig(
            name=STATE,
            storage_path=path,
            storage_filesystem=files,
            failure_config=ray.train.FailureConfig(max_failures=_WORKER_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets=dict(datasets),
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]),
    )


def _per_worker(job: TrainingJob, cpus: float) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": 1.0} if job.use_gpu else {})


def _setup(training: Training, news: Queue, resources: dict[str, float]) -> "LoopSetup":
    from featurex_ray.training.loop import LoopSetup

    targets = {"train": training.train.targets}
    if training.validation is not None:
        targets["validation"] = training.validation.targets
    return LoopSetup(
        job=training.job,
        resolved=training.resolved,
        num_classes=len(training.train.classes),
        keep_head=training.keeps_head,
        targets=targets,
        threads=max(int(resources.get("CPU", 1)) // training.job.workers, 1),
        news=news,
    )


def _train_loop(config: dict[str, Any]) -> None:
    """`loop.train_loop`, torch loaded where it runs."""
    from featurex_ray.training.loop import train_loop

    train_loop(config)


class _Listener(threading.Thread):
    """Hears of steps and epochs, says so, and keeps the metrics."""

    def __init__(self, news: Queue, log: MetricsLog, num_epochs: int, say: Say) -> None:
        super().__init__(daemon=True)
        self.log = log
        self.diverged: dict[str, Any] | None = None
        self._news = news
        self._num_epochs = num_epochs
        self._say = say
        self._has_complained = False

    def run(self) -> None:
        """Hear until the end."""
        while (item := self._news.get()) != _END:
            self._hear(item)

    def end(self) -> None:
        """Hear what is left, and stop."""
        self._news.put(_END)
        self.join()
        if self.log.history:
            self._write()  # once more: the last one may have failed
        self.log.close()

    def _hear(self, item: dict[str, Any]) -> None:
        if "resumed" in item:
            self.log.restart(item["history"])
            self._say(f"going on after epoch {item['resumed']}")
        elif "diverged_step" in item:
            self.diverged = item
        elif "num_steps" in item:
            self._say(self._step_line(item))
        else:
            self.log.add(item)
            self._write()
            self._say(self._epoch_line(item))

    def _write(self) -> None:
        """Write the metrics; where that fails, the training goes on and this is said once."""
        try:
            self.log.write()
            self._has_complained = False
        except FeaturexError as error:
            if not self._has_complained:
                self._say(f"no metrics for now: {error}")
            self._has_complained = True

    def _step_line(self, item: dict[str, Any]) -> str:
        return (
            f"epoch {item['epoch']}/{self._num_epochs}, step {item['step']}/{item['num_steps']}: "
            f"loss {item['train_loss']:.4f}, accuracy {item['train_accuracy']:.1%}"
        )

    def _epoch_line(self, item: dict[str, Any]) -> str:
        left = item["seconds"] * (self._num_epochs - item["epoch"])
        line = (
            f"epoch {item['epoch']}/{self._num_epochs}: loss {item['train_loss']:.4f}, "
            f"accuracy {item['train_accuracy']:.1%}"
        )
        if "validation_accuracy" in item:
            line += (
                f"; validation loss {item['validation_loss']:.4f}, accuracy {item['validation_accuracy']:.1%}"
            )
        return f"{line}; {item['seconds']:.1f} s, about {left:.0f} s left"


def _write(training: Training, checkpoint: Any) -> TrainingReport:
    """Weights, card and plot, from the last good epoch and of what it says itself.

    Raises:
        RunError: They can't be written (any more).
    """
    with checkpoint.as_directory() as folder:
        weights = Path(folder, WEIGHTS).read_bytes()
        history = json.loads(Path(folder, HISTORY).read_text())
    try:
        return _publish(training, weights, history)
    except RequestError as error:
        raise RunError(f"{error}; --resume writes the weights again") from error


def _publish(training: Training, weights: bytes, history: list[dict[str, Any]]) -> TrainingReport:
    output = training.output
    sha256 = hashlib.sha256(weights).hexdigest()
    card = make_card(training, history, sha256)
    # The card last: a card whose sha256 is not that of the weights is refused by whoever reads them.
    output.write(WEIGHTS, weights)
    output.write(CARD, json.dumps(card, indent=1).encode())
    _draw(training, history)
    return TrainingReport(output.place(WEIGHTS), card, history)


def _draw(training: Training, history: list[dict[str, Any]]) -> None:
    from featurex_ray.training.plot import plot_metrics

    if history:
        training.output.write(PLOT, plot_metrics(history, title=training.resolved.spec.text))


def make_card(training: Training, history: list[dict[str, Any]], sha256: str) -> dict[str, Any]:
    """What is said of weights beside them: what they are, what they were made from, how good they are."""
    job, spec = training.job, training.resolved.spec
    facts = spec.to_json()
    data: dict[str, Any] = {
        "manifest": redact(job.manifest),
        "num_samples": len(training.train.samples),
        "sha256": training.train.sha256(),
    }
    if training.validation is not None:
        data |= {
            "validation": redact(job.validation or f"a share of {job.validation_share} of it"),
            "num_validation_samples": len(training.validation.samples),
            "validation_sha256": training.validation.sha256(),
        }
    return {
        "extractor": spec.text,
        "architecture": facts["architecture"],
        "dimension": spec.dimension,
        "classes": list(training.train.classes),
        "preprocessing": {
            "input": facts["input"],
            "mean": facts["mean"],
            "std": facts["std"],
            "sampling": str(training.decode.sampling),
        },
        "data": data,
        "started_from": facts["weights"],
        "recipe": without_secrets(
            {k: v for k, v in dataclasses.asdict(job).items() if k not in (*_MAY_CHANGE, "output")}
        ),
        "metrics": history[-1] if history else {},
        "versions": versions(),
        "sha256": sha256,
    }
