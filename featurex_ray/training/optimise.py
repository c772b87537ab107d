"""Optimisers and the learning rate of each step."""

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from featurex_ray.training.job import TrainingJob

PRETRAINED_RATE = 0.1
"""What pretrained parts learn at in `finetune`, as a share of --lr: they have little to learn."""


def make_optimizer(model: nn.Module, pretrained: Collection[str], job: TrainingJob) -> torch.optim.Optimizer:
    """The job's optimiser over all that is trained.

    Args:
        model: The network.
        pretrained: Names of parameters that came with the weights.
        job: Which optimiser, its rate and decay.
    """
    parts: dict[tuple[bool, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[name in pretrained, parameter.ndim > 1].append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "peak": job.lr * (PRETRAINED_RATE if is_pretrained else 1.0),
            "weight_decay": job.weight_decay if is_matrix else 0.0,
        }
        for (is_pretrained, is_matrix), parameters in parts.items()
    ]
    if job.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=job.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=job.lr)


def set_rate(optimizer: torch.optim.Optimizer, *, done: float, job: TrainingJob) -> float:
    """Set the learning rate.

    Args:
        optimizer: Of `make_optimizer`.
        done: Share of all steps that are done, in [0, 1).
        job: Its schedule and warm-up.

    Returns:
        The rate of what is not pretrained.
    """
    factor = rate_factor(done, schedule=job.schedule, warmup=job.warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return job.lr * factor


def rate_factor(done: float, *, schedule: str, warmup: float) -> float:
    """The learning rate as a share of the highest, after a share of all steps."""
    if done < warmup:
        return max(done / warmup, 1e-3)
    left = (done - warmup) / (1 - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * left))
    if schedule == "step":
        return 1.0 if left < 0.5 else 0.1 if left < 0.75 else 0.01
    return 1.0
