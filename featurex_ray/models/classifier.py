"""An extractor with a classifier on top, for training."""

from typing import Literal

import torch
from torch import Tensor, nn

from featurex_ray.errors import ExtractorError, WeightsError
from featurex_ray.models.attention_cnn import AttentionCnn
from featurex_ray.models.attention_convnet import AttentionConvNet
from featurex_ray.models.build import HEAD, construct, is_backbone_only, load, load_head
from featurex_ray.models.cnn_lstm import CnnLstm
from featurex_ray.models.registry import ResolvedExtractor
from featurex_ray.models.weights import read_shapes

Frozen = Literal["nothing", "backbone", "extractor"]


class Classifier(nn.Module):
    """The scores of K classes from an extractor's feature, by one linear layer.

    `attention_convnet` has such a layer of its own, fc3; it is used. A video's feature is that of
    the extraction: for an extractor of single frames the mean over its frames.

    Args:
        extractor: The network.
        dimension: D, of its feature.
        num_classes: K.
        is_temporal: Whether it sees whole clips.
        frozen: What is not trained: it stays in evaluation mode, and needs to run only once
            over frames that are not augmented.
    """

    def __init__(
        self,
        extractor: nn.Module,
        *,
        dimension: int,
        num_classes: int,
        is_temporal: bool,
        frozen: Frozen = "nothing",
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.head = nn.Linear(dimension, num_classes)
        self.frozen: Frozen = frozen
        self._is_temporal = is_temporal
        if frozen != "nothing":
            self._frozen_module.requires_grad_(False)
        if isinstance(extractor, AttentionConvNet):
            extractor.fc3 = self.head

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W), normalised -> scores (B, K)."""
        return self.score(self.prepare(frames))

    def prepare(self, frames: Tensor) -> Tensor:
        """What the frozen part makes of clips, without gradients; the clips where nothing is frozen.

        Args:
            frames: (B, T, 3, H, W) floating, normalised.

        Returns:
            Features (B, D), or the backbone's output for each frame (B, T, ...), or `frames`.
        """
        if self.frozen == "nothing":
            return frames
        with torch.no_grad():
            if self.frozen == "extractor":
                return self._embed(frames)
            items = self._two_stage.embed_frames(frames.flatten(0, 1))
            return items.reshape(*frames.shape[:2], *items.shape[1:])

    def score(self, items: Tensor) -> Tensor:
        """Scores (B, K) of what `prepare` gave."""
        if self.frozen == "backbone":
            items = self._embed_prepared(items)
        elif self.frozen == "nothing":
            items = self._embed(items)
        scores: Tensor = self.head(items)
        return scores

    def train(self, mode: bool = True) -> "Classifier":
        """Frozen parts stay in evaluation mode: their statistics and dropout are not for training."""
        super().train(mode)
        if self.frozen != "nothing":
            self._frozen_module.eval()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that `--weights` takes: the extractor's, and the classifier's."""
        tensors = dict(self.extractor.state_dict())
        if not isinstance(self.extractor, AttentionConvNet):
            tensors |= {f"{HEAD}.{key}": tensor for key, tensor in self.head.state_dict().items()}
        return tensors

    @property
    def _frozen_module(self) -> nn.Module:
        return self.extractor if self.frozen == "extractor" else self.extractor.get_submodule("backbone")

    @property
    def _two_stage(self) -> CnnLstm | AttentionCnn:
        assert isinstance(self.extractor, CnnLstm | AttentionCnn)  # noqa: S101  for the type checker
        return self.extractor

    def _embed(self, frames: Tensor) -> Tensor:
        if self._is_temporal:
            return _feature(self.extractor(frames))
        features = _feature(self.extractor(frames.flatten(0, 1).unsqueeze(1)))
        return features.reshape(*frames.shape[:2], -1).mean(dim=1)

    def _embed_prepared(self, items: Tensor) -> Tensor:
        if self._is_temporal:
            return _feature(self._two_stage.embed_clips(items))
        features = _feature(self._two_stage.embed_clips(items.flatten(0, 1)))
        return features.reshape(*items.shape[:2], -1).mean(dim=1)


def build_classifier(
    resolved: ResolvedExtractor, *, num_classes: int, freeze: bool, seed: int, keep_head: bool = False
) -> tuple[Classifier, frozenset[str]]:
    """A network to train: its weights where there are any, all else drawn from the seed.

    Args:
        resolved: The extractor, and what it starts from.
        num_classes: K.
        freeze: Train only what the weights don't hold.
        seed: Of all that is drawn.
        keep_head: Go on from the weights' own classifier, whose classes are these.

    Returns:
        The network, and the names of its parameters that the weights hold.

    Raises:
        ExtractorError: The extractor is no torch module, so that there is nothing to train.
        WeightsError: There is nothing to freeze, or no such classifier.
    """
    spec, file = resolved.spec, resolved.weights
    if freeze and file is None:
        raise WeightsError(f"{spec.text} has no trained weights here to keep as they are: give --weights")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        extractor = construct(spec)
        if not isinstance(extractor, nn.Module):
            raise ExtractorError(f"{spec.name} is no torch.nn.Module, so there is nothing to train")
        is_backbone = file is not None and is_backbone_only(read_shapes(file.data, name=file.source), spec)
        in_parts = is_backbone and isinstance(extractor, CnnLstm | AttentionCnn)
        frozen: Frozen = "nothing" if not freeze else "backbone" if in_parts else "extractor"
        if file is not None:
            load(extractor, spec, file)
        classifier = Classifier(
            extractor,
            dimension=spec.dimension,
            num_classes=num_classes,
            is_temporal=spec.media == "video",
            frozen=frozen,
        )
    if file is not None and keep_head:
        load_head(classifier.head, file)
    held = "extractor.backbone." if in_parts else "extractor."
    names = [name for name, _ in classifier.named_parameters()]
    heads = ("head.", "extractor.fc3.")
    kept = [name for name in names if (keep_head if name.startswith(heads) else name.startswith(held))]
    return classifier, frozenset(kept if file is not None else ())


def _feature(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
