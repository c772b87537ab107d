"""What each training worker runs: its share of the decoded samples, epochs, a state after each of them."""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import ray.train
import ray.train.torch
import torch

from featurex_ray.models.build import weights_bytes
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.training.data import Examples
from featurex_ray.training.job import TrainingJob
from featurex_ray.training.learner import Learner, Metrics
from featurex_ray.training.outputs import HISTORY, WEIGHTS

OPTIMIZER = "state.pt"
"""What a state consists of, besides the weights and the history."""

_SECONDS_BETWEEN_NEWS = 5.0


class News(Protocol):
    """Where a worker tells the driver what happens; a Ray queue."""

    def put(self, item: Metrics) -> None:
        """Tell."""


@dataclass(frozen=True)
class LoopSetup:
    """All that a worker needs, besides its share of the decoded samples.

    Attributes:
        job: What was asked for.
        resolved: The extractor, and the weights that it starts from.
        num_classes: K.
        keep_head: Go on from the weights' own classifier.
        targets: By "train" and "validation": (N,) int64, of all samples.
        threads: CPU threads of a worker.
        news: Told of steps, epochs and trouble by the first worker.
    """

    job: TrainingJob
    resolved: ResolvedExtractor
    num_classes: int
    keep_head: bool
    targets: dict[str, np.ndarray]
    threads: int
    news: News


def train_loop(config: dict[str, LoopSetup]) -> None:
    """The function that Ray Train runs in every worker."""
    setup = config["setup"]
    # Ray's CPUs are a count; more threads than this process may run at once only wait for each other.
    torch.set_num_threads(min(setup.threads, len(os.sched_getaffinity(0))))
    torch.backends.cudnn.allow_tf32 = False
    context = ray.train.get_context()
    teller = _Teller(setup.news, is_first=context.get_world_rank() == 0)
    learner = Learner(
        setup.job,
        setup.resolved,
        num_classes=setup.num_classes,
        train=_examples(setup, "train"),
        validation=_examples(setup, "validation") if "validation" in setup.targets else None,
        device=ray.train.torch.get_device(),
        keep_head=setup.keep_head,
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
    )
    history = _restore(learner)
    if history:
        teller.tell({"resumed": len(history), "history": history})
    for epoch in range(len(history) + 1, setup.job.epochs + 1):
        metrics = learner.run_epoch(epoch, told=teller.steps_of(epoch, learner.steps))
        if "diverged_step" in metrics:
            # The state of the epoch before stays the last one; trying again would diverge again.
            teller.tell(metrics)
            return
        history.append(metrics)
        _save(learner, history, is_first=teller.is_first)
        teller.tell(metrics)


@dataclass
class _Teller:
    """Tells the driver, once for all workers."""

    news: News
    is_first: bool
    last: float = 0.0

    def tell(self, what: Metrics) -> None:
        if self.is_first:
            self.news.put(what)

    def steps_of(self, epoch: int, num_steps: int) -> "_StepTeller":
        return _StepTeller(self, epoch, num_steps)


@dataclass(frozen=True)
class _StepTeller:
    """Tells of an epoch's steps, every few seconds."""

    teller: _Teller
    epoch: int
    num_steps: int

    def __call__(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        if now - self.teller.last >= _SECONDS_BETWEEN_NEWS:
            self.teller.last = now
            self.teller.tell({"epoch": self.epoch, "step": step, "num_steps": self.num_steps, **metrics})


def _examples(setup: LoopSetup, name: str) -> Examples:
    batches = ray.train.get_dataset_shard(name).iter_batches(batch_size=None, batch_format="pyarrow")
    return Examples.gather(batches, setup.resolved.spec.input, setup.targets[name])


def _restore(learner: Learner) -> list[Metrics]:
    """Go on from the last state, if there is one; returns the metrics of the epochs done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        history: list[Metrics] = json.loads(Path(folder, HISTORY).read_text())
        learner.restore(torch.load(Path(folder, OPTIMIZER), map_location="cpu", weights_only=True))
    return history


def _save(learner: Learner, history: list[Metrics], *, is_first: bool) -> None:
    """Report an epoch to Ray Train, with all that is needed to go on from it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if is_first:
            Path(folder, WEIGHTS).write_bytes(weights_bytes(learner.model.tensors()))
            torch.save(learner.state(), Path(folder, OPTIMIZER))
            Path(folder, HISTORY).write_text(json.dumps(history))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(history[-1], checkpoint=checkpoint)
