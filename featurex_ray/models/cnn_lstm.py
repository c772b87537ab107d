"""`cnn_lstm`: what each frame shows and how it moved, a recurrent network over them, attention over time."""

import torch
from torch import Tensor, nn

from featurex_ray.models import motion
from featurex_ray.models.attention import AdditiveAttention
from featurex_ray.models.backbones import FeatureMap

DROPOUT = 0.3
"""Share of a frame's vector that is left out while training: labelled videos are few."""

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class CnnLstm(nn.Module):
    """A CNN per frame, then an LSTM or GRU, then additive attention over its outputs.

    A frame's vector is the mean of its feature map, which tells what is seen, and the correlation
    of the map with that of the frame before, which tells what moved where: a mean alone forgets
    places, and with them every movement of the camera.

    The state of the attention is the last hidden state, the items are the hidden states of all
    frames; the feature is the context vector.

    Args:
        backbone: Gives a (C, h, w) map for a frame.
        channels: C.
        rnn: Which recurrent network, "lstm" or "gru".
        hidden: Its hidden size, and D, the length of the feature.
    """

    def __init__(self, backbone: FeatureMap, *, channels: int, rnn: str, hidden: int) -> None:
        super().__init__()
        self.backbone = backbone
        self._channels = channels
        size = channels + motion.NUM_VALUES
        # In evaluation a fixed scale and shift: correlations differ in the second digit only.
        self.standardise = nn.BatchNorm1d(size)
        self.dropout = nn.Dropout(DROPOUT)
        self.rnn = _CELLS[rnn](size, hidden, batch_first=True)
        self.attention = AdditiveAttention(state_size=hidden, item_size=hidden, width=hidden)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Features and attention of clips.

        Args:
            frames: (B, T, 3, H, W) floating, normalised.

        Returns:
            The feature (B, D) and one weight a frame, (B, T), which sum to 1.
        """
        items = self.embed_frames(frames.flatten(0, 1))
        return self.embed_clips(items.unflatten(0, frames.shape[:2]))

    def embed_frames(self, frames: Tensor) -> Tensor:
        """What is kept of frames (B, 3, H, W), (B, E): their maps' means, and the maps made small."""
        maps = self.backbone(frames).float()
        kept = motion.compact(maps)
        return torch.cat([maps.mean(dim=(2, 3)), kept.flatten(1)], dim=1)

    def embed_clips(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and weights (B, T) from what was kept of the frames (B, T, E)."""
        # A recurrent network adds rounding errors up step by step, and costs little: always float32.
        with torch.autocast(items.device.type, enabled=False):
            vectors = self.standardise(self.vectors(items.float()).flatten(0, 1))
            states, _ = self.rnn(self.dropout(vectors).reshape(*items.shape[:2], -1))
            context, weights = self.attention(states[:, -1], states)
        return context, weights

    def vectors(self, items: Tensor) -> Tensor:
        """The frames' vectors (B, T, C + 81) from what was kept of the frames (B, T, E)."""
        appearance, maps = items.split([self._channels, items.shape[-1] - self._channels], dim=-1)
        maps = maps.unflatten(-1, (motion.CHANNELS, *self.backbone.map_size))
        correlation = motion.correlate(maps)
        return torch.cat([appearance, correlation], dim=-1)
