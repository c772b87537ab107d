"""A training worker's model, data and optimiser: epochs over examples in memory. Knows no Ray."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from featurex_ray.models.classifier import Classifier, build_classifier
from featurex_ray.models.embed import Normalise, on_device
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.training.augment import Augmentation
from featurex_ray.training.data import Examples
from featurex_ray.training.job import TrainingJob
from featurex_ray.training.optimise import make_optimizer, set_rate

_EVALUATION_FRAMES = 256
_PREPARED_FRAMES = 32
_LARGEST_CONFUSION = 100

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Clips:
    """Clips as they enter the network.

    Attributes:
        items: uint8 frames (N, T, H, W, 3), or what the frozen part made of them.
        targets: (N,) int64.
        prepared: Which of the two.
    """

    items: Tensor
    targets: Tensor
    prepared: bool

    def __len__(self) -> int:
        return len(self.targets)


class Learner:
    """Trains a classifier, alone or as one of several data-parallel workers.

    Args:
        job: How to train.
        resolved: The extractor, and the weights that it starts from.
        num_classes: K.
        train: This worker's examples.
        validation: All examples to validate on; each worker does its part. None for none.
        device: Where to compute.
        keep_head: Go on from the weights' own classifier.
        rank: This worker's number.
        num_workers: How many there are; with several, torch's process group must be there.
    """

    def __init__(
        self,
        job: TrainingJob,
        resolved: ResolvedExtractor,
        *,
        num_classes: int,
        train: Examples,
        validation: Examples | None,
        device: torch.device,
        keep_head: bool = False,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        self._job, self._rank, self._num_workers, self._device = job, rank, num_workers, device
        self._augmentation = Augmentation.parse(job.augment)
        self._normalise = Normalise(resolved.spec, device)
        self.num_classes = num_classes
        self.model, pretrained = build_classifier(
            resolved,
            num_classes=num_classes,
            freeze=job.mode == "head-only",
            seed=job.seed,
            keep_head=keep_head,
        )
        on_device(self.model, device)
        self.optimizer = make_optimizer(self.model, pretrained, job)
        self._train = self._clips(train, changing=not self._augmentation.is_identity)
        self._validation = None if validation is None else self._clips(validation, changing=False)
        self._batch = job.batch_size // num_workers
        # Each worker must do as many steps as the others.
        self.steps = max(_over_workers(len(train.targets), torch.distributed.ReduceOp.MIN) // self._batch, 1)
        self._call = _distributed(self.model, device, num_workers)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, besides the number of epochs done."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def run_epoch(self, epoch: int, *, told: Callable[[int, Metrics], None] = lambda *_: None) -> Metrics:
        """Train for an epoch and validate.

        Args:
            epoch: From 1.
            told: Told of each step, and of loss and accuracy so far.

        Returns:
            Loss, accuracy, learning rate and times; or `diverged_step`, where the loss was no number.
        """
        started = time.monotonic()
        # Each epoch has its own random numbers, so that a resumed training equals one that wasn't killed.
        torch.manual_seed((self._job.seed * 1_000_003 + epoch) * 1009 + self._rank)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        totals, rate = _Totals(), 0.0
        self.model.train()
        order = torch.randperm(len(self._train), generator=generator)
        for step in range(self.steps):
            number = (epoch - 1) * self.steps + step
            rate = set_rate(self.optimizer, done=number / (self._job.epochs * self.steps), job=self._job)
            rows = order[step * self._batch : (step + 1) * self._batch]
            if not self._step(rows, generator, totals):
                return {"epoch": epoch, "diverged_step": number + 1}
            told(step + 1, totals.metrics("train"))
        seconds = time.monotonic() - started
        trained = totals.over_workers()
        speed = {"seconds": seconds, "samples_per_second": trained.count / seconds}
        metrics = {"epoch": epoch, "steps": epoch * self.steps, "lr": rate, **trained.metrics("train")}
        return metrics | self.evaluate() | speed

    def evaluate(self) -> Metrics:
        """Loss, accuracy and confusion matrix (rows: truth) on the validation samples."""
        clips = self._validation
        if clips is None:
            return {}
        self.model.eval()
        totals = _Totals.with_confusion(self.num_classes)
        own = torch.arange(self._rank, len(clips), self._num_workers)
        batch = _EVALUATION_FRAMES if clips.prepared else max(_EVALUATION_FRAMES // clips.items.shape[1], 1)
        with torch.inference_mode():
            for part in _ranges(len(own), batch):
                items = clips.items[own[part]].to(self._device)
                scores = self.model.score(items) if clips.prepared else self.model(self._normalise(items))
                targets = clips.targets[own[part]].to(self._device)
                totals.add(scores, targets, float(torch.nn.functional.cross_entropy(scores, targets)))
        totals = totals.over_workers()
        confusion = None if totals.confusion is None else totals.confusion.tolist()
        return totals.metrics("validation") | {"confusion": confusion}

    def _step(self, rows: Tensor, generator: torch.Generator, totals: "_Totals") -> bool:
        """One step; False where the loss is no number in some worker."""
        targets = self._train.targets[rows].to(self._device)
        scores = self._call(self._items(rows, generator), self._train.prepared)
        loss = torch.nn.functional.cross_entropy(scores, targets)
        value = float(loss.detach())
        if _over_workers(int(not np.isfinite(value)), torch.distributed.ReduceOp.MAX):
            return False  # all workers stop together
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        totals.add(scores, targets, value)
        return True

    def _items(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        items = self._train.items[rows]
        if self._train.prepared:
            return items.to(self._device)
        frames = self._normalise(self._augmentation.pixels(items, generator).to(self._device))
        return self._augmentation.normalised(frames, generator)

    def _clips(self, examples: Examples, *, changing: bool) -> Clips:
        """Examples as tensors; the frozen part runs over them once, unless they change each epoch."""
        clips = Clips(torch.from_numpy(examples.frames), torch.from_numpy(examples.targets), prepared=False)
        if self.model.frozen == "nothing" or changing or not len(clips):
            return clips
        self.model.eval()
        batch = max(_PREPARED_FRAMES // clips.items.shape[1], 1)
        parts = [
            self.model.prepare(self._normalise(clips.items[part].to(self._device))).cpu()
            for part in _ranges(len(clips), batch)
        ]
        return Clips(torch.cat(parts), clips.targets, prepared=True)


@dataclass
class _Totals:
    """Sums over samples; the confusion matrix, which is the square of the classes, only where asked for."""

    right: int = 0
    count: int = 0
    loss: float = 0.0
    confusion: Tensor | None = None

    @classmethod
    def with_confusion(cls, num_classes: int) -> "_Totals":
        """Nothing yet; without a matrix where it would be too large to look at."""
        if num_classes > _LARGEST_CONFUSION:
            return cls()
        return cls(confusion=torch.zeros(num_classes, num_classes, dtype=torch.int64))

    def add(self, scores: Tensor, targets: Tensor, loss: float) -> None:
        truth, found = targets.cpu(), scores.detach().argmax(dim=1).cpu()
        self.right += int((truth == found).sum())
        self.count += len(truth)
        self.loss += loss * len(truth)
        if self.confusion is not None:
            self.confusion.index_put_((truth, found), torch.ones_like(truth), accumulate=True)

    def over_workers(self) -> "_Totals":
        if not _is_parallel():
            return self
        sums = torch.tensor([self.right, self.count, self.loss], dtype=torch.float64)
        if self.confusion is not None:
            sums = torch.cat([sums, self.confusion.flatten().double()])
        sums = sums.to(_collective_device())
        torch.distributed.all_reduce(sums)
        (right, count, loss), cells = sums[:3].tolist(), sums[3:].long().cpu()
        confusion = None if self.confusion is None else cells.reshape(self.confusion.shape)
        return _Totals(int(right), int(count), loss, confusion)

    def metrics(self, prefix: str) -> Metrics:
        count = max(self.count, 1)
        return {f"{prefix}_loss": self.loss / count, f"{prefix}_accuracy": self.right / count}


class _Call(torch.nn.Module):
    """The classifier, called with frames or with what is prepared; one module for DDP to wrap."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor, prepared: bool) -> Tensor:
        scores: Tensor = self.model.score(items) if prepared else self.model(items)
        return scores


def _distributed(model: Classifier, device: torch.device, num_workers: int) -> torch.nn.Module:
    """The call whose gradients are averaged over the workers."""
    call = _Call(model)
    if num_workers == 1:
        return call
    devices = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(call, device_ids=devices)


def _ranges(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _over_workers(value: int, operation: torch.distributed.ReduceOp.RedOpType) -> int:
    """The least or greatest of all workers' values."""
    if not _is_parallel():
        return value
    tensor = torch.tensor(value, device=_collective_device())
    torch.distributed.all_reduce(tensor, op=operation)
    return int(tensor)


def _is_parallel() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
