"""Training on Ray Train: manifests with labels in, weights with a card out.

`job`, `labels` and `data` don't import torch: the driver needs none. `augment`, `network`, `loop` do.
"""
