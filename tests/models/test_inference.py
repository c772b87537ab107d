"""What extraction does to a network before it runs changes its speed, not what it computes."""

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from featurex_ray.models.backbones import Backbone, FeatureMap, VideoBackbone
from featurex_ray.models.embed import Embedder
from featurex_ray.models.inference import cast_weights, fold_batch_norms
from featurex_ray.models.registry import resolve
from featurex_ray.models.torchvision_zoo import VIDEO_MODELS
from tests.conftest import CHECKOUT

# One of each family that normalises by batches: what they are built of, and in what order, is its family's.
FAMILIES = [
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "vgg11_bn",
    "wide_resnet50_2",
    "mc3_18",
    "r2plus1d_18",
    "r3d_18",
    "s3d",
]
BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network whose statistics aren't those of a new one, and an input for it."""
    torch.manual_seed(0)
    made = VideoBackbone(name) if name in VIDEO_MODELS else Backbone(name)
    for layer in made.eval().requires_grad_(False).modules():
        if isinstance(layer, BATCH_NORMS):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.1)
    size = 224 if name in ("maxvit_t", "s3d") else 96
    return made, torch.randn(2, 16, 3, size, size) if name in VIDEO_MODELS else torch.randn(2, 3, size, size)


def count_norms(made: nn.Module) -> int:
    return sum(isinstance(layer, BATCH_NORMS) for layer in made.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_keeps_the_function(name: str) -> None:
    made, frames = network(name)
    with torch.inference_mode():
        before, norms = made(frames), count_norms(made)
        fold_batch_norms(made)
        after = made(frames)
    assert count_norms(made) < norms
    scale = before.abs().max().item()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * scale)


def test_what_stands_before_the_convolution_stays() -> None:
    made, _ = network("densenet121")
    fold_batch_norms(made)
    assert count_norms(made) == 62  # of 121: before its first convolution, nothing can take it up


def test_a_feature_map_is_kept_too() -> None:
    torch.manual_seed(0)
    made, frames = FeatureMap("mobilenet_v2").eval(), torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        before = made(frames)
        fold_batch_norms(made)
        torch.testing.assert_close(made(frames), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_v2_t", "convnext_tiny"])
def test_weights_cast_beforehand_give_what_autocast_gives(name: str) -> None:
    torch.manual_seed(0)
    made, frames = Backbone(name).eval().requires_grad_(False), torch.randn(1, 3, 224, 224)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = made(frames)
        cast_weights(made, torch.bfloat16)
        torch.testing.assert_close(made(frames), before, rtol=0, atol=0)


def test_an_own_network_is_left_as_it_is() -> None:
    made = Embedder(resolve("tests.models.own:NormFirst"), precision="fp32", device="cpu")
    black = made.embed(np.zeros((1, 8, 8, 3), np.uint8), np.ones(1, int)).feature
    np.testing.assert_allclose(black, -2, rtol=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such setting")
def test_freed_memory_is_kept_for_the_next_batch() -> None:
    """What a batch frees must not be faulted in page by page again; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    before, after = map(int, done.stdout.split())
    assert before > 10_000  # ten times 64 MiB are 160,000 pages
    assert after < before / 10


_FAULTS = """
import resource, torch
from featurex_ray.models.inference import keep_freed_memory
size = 16 << 20
def faults():
    global size
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        # malloc learns from what is freed: only what is larger than all before goes back for sure.
        size += 1 << 16
        blocks = [torch.zeros(size, dtype=torch.uint8) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""
