"""Additive attention, the one that every attending extractor uses."""

import torch
from torch import Tensor, nn


class AdditiveAttention(nn.Module):
    """Additive attention (Bahdanau, Cho and Bengio, 2015) of a state over items.

    With the state h and the items x_1 ... x_N:

        e_i   = v^T tanh(W1 h + W2 x_i)
        alpha = softmax(e)
        c     = sum_i alpha_i x_i

    Args:
        state_size: S, the length of h.
        item_size: D, the length of every x_i.
        width: Rows of W1 and W2, the length of v.
    """

    def __init__(self, *, state_size: int, item_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(state_size, width, bias=False)
        self.w2 = nn.Linear(item_size, width, bias=False)
        self.v = nn.Linear(width, 1, bias=False)

    def forward(self, state: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            state: (B, S) floating.
            items: (B, N, D) floating.

        Returns:
            The context (B, D) and the weights (B, N), float32, the weights summing to 1.
        """
        # Scores and sums are cheap next to any backbone; in float32 the weights sum to 1 in bf16 runs too.
        with torch.autocast(items.device.type, enabled=False):
            state, items = state.float(), items.float()
            scores = self.v(torch.tanh(self.w1(state).unsqueeze(1) + self.w2(items))).squeeze(-1)
            weights = torch.softmax(scores, dim=-1)
            return torch.einsum("bn,bnd->bd", weights, items), weights
