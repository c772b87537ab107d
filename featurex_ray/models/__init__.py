"""Frames to features: what extractors there are, what they need, and the networks themselves.

`spec`, `torchvision_zoo`, `weights` and `registry` don't import torch, so that a driver can
resolve an extractor without it; everything else here does.
"""
