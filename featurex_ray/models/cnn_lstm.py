"""`cnn_lstm`: a backbone's vector per frame, a recurrent network over them, attention over time."""

import torch
from torch import Tensor, nn

from featurex_ray.models.attention import AdditiveAttention
from featurex_ray.models.backbones import Backbone

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class CnnLstm(nn.Module):
    """A CNN per frame, then an LSTM or GRU, then additive attention over its outputs.

    The state of the attention is the last hidden state, the items are the hidden states of all
    frames; the feature is the context vector.

    Args:
        backbone: Gives a vector for a frame.
        vector_size: Its length.
        rnn: Which recurrent network, "lstm" or "gru".
        hidden: Its hidden size, and D, the length of the feature.
    """

    def __init__(self, backbone: Backbone, *, vector_size: int, rnn: str, hidden: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.rnn = _CELLS[rnn](vector_size, hidden, batch_first=True)
        self.attention = AdditiveAttention(state_size=hidden, item_size=hidden, width=hidden)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Features and attention of clips.

        Args:
            frames: (B, T, 3, H, W) floating, normalised.

        Returns:
            The feature (B, D) and one weight a frame, (B, T), which sum to 1.
        """
        vectors = self.embed_frames(frames.flatten(0, 1))
        return self.embed_clips(vectors.reshape(*frames.shape[:2], -1))

    def embed_frames(self, frames: Tensor) -> Tensor:
        """The backbone's vectors (B, E) of frames (B, 3, H, W)."""
        vectors: Tensor = self.backbone(frames)
        return vectors

    def embed_clips(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and weights (B, T) from the frames' vectors (B, T, E)."""
        # A recurrent network adds rounding errors up step by step, and costs little: always float32.
        with torch.autocast(vectors.device.type, enabled=False):
            states, _ = self.rnn(vectors.float())
            context, weights = self.attention(states[:, -1], states)
        return context, weights
