"""The same network, cheaper to run: for extraction only, since nothing of it can be trained any more."""

import ctypes
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from featurex_ray.models.backbones import Backbone, FeatureMap, VideoBackbone
from featurex_ray.models.build import Extractor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 2**31 - 1
_LARGEST_KEPT = 32 << 20
"""The most that glibc takes."""

_PAIRS = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))


def for_inference(extractor: Extractor, dtype: torch.dtype) -> Extractor:
    """Make an extractor's backbone cheaper to run; all else stays as it is.

    Args:
        extractor: In evaluation mode, float32; changed in place.
        dtype: That autocast will compute with; float32 for no autocast.
    """
    for part in extractor.modules() if isinstance(extractor, nn.Module) else ():
        if isinstance(part, Backbone | FeatureMap | VideoBackbone):
            fold_batch_norms(part)
            cast_weights(part, dtype)
    return extractor


def keep_freed_memory() -> None:
    """Have this process keep the memory that a batch frees for the next one.

    By default malloc gives large blocks back to the system, which has to clear their pages when the next
    batch asks for them. The process's peak stays what it was. Does nothing where malloc isn't glibc's.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def fold_batch_norms(network: nn.Module) -> None:
    """Put each batch normalisation into the convolution before it: one pass over the maps less.

    Taken for a pair are neighbours in a module, a convolution and a normalisation. In torchvision's
    networks they always are one (tested for each family of them); in other people's they need not be.

    Args:
        network: In evaluation mode, float32; changed in place.
    """
    for parent in list(network.modules()):
        for (name, layer), (norm_name, norm) in pairwise(list(parent.named_children())):
            for convolution, normalisation in _PAIRS:
                if isinstance(layer, convolution) and isinstance(norm, normalisation):
                    setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                    setattr(parent, norm_name, nn.Identity())


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Have the weights of convolutions and linear layers in the type that autocast computes with.

    Autocast rounds them to the same values for every batch, because it keeps only what is trained.

    Args:
        network: Changed in place; everything else in it stays float32.
        dtype: As given to autocast.
    """
    for layer in network.modules():
        # Not subclasses of Linear: multi-head attention reads its output layer's weights itself.
        if isinstance(layer, nn.Conv2d | nn.Conv3d) or type(layer) is nn.Linear:
            layer.to(dtype)
