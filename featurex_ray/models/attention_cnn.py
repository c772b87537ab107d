"""`attention_cnn`: a backbone's last feature map, pooled by additive attention over its cells."""

from torch import Tensor, nn

from featurex_ray.models.attention import AdditiveAttention
from featurex_ray.models.backbones import FeatureMap

ATTENTION_WIDTH = 256


class AttentionCnn(nn.Module):
    """Additive attention over the cells of a feature map, with the mean-pooled map as the state.

    Args:
        backbone: Gives a (C, h, w) map for a frame.
        channels: C.
    """

    def __init__(self, backbone: FeatureMap, *, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.attention = AdditiveAttention(state_size=channels, item_size=channels, width=ATTENTION_WIDTH)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Features and attention of single frames.

        Args:
            frames: (B, 1, 3, H, W) floating, normalised.

        Returns:
            The feature (B, C) and the attention (B, h, w), which sums to 1.
        """
        return self.embed_clips(self.embed_frames(frames.flatten(0, 1)))

    def embed_frames(self, frames: Tensor) -> Tensor:
        """The backbone's maps (B, C, h, w) of frames (B, 3, H, W)."""
        maps: Tensor = self.backbone(frames)
        return maps

    def embed_clips(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C) and weights (B, h, w) of maps (B, C, h, w)."""
        maps = maps.float()
        cells = maps.flatten(2).transpose(1, 2)
        context, weights = self.attention(cells.mean(dim=1), cells)
        return context, weights.reshape(len(maps), *maps.shape[-2:])
