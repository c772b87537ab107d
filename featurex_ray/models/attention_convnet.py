"""`attention_convnet`: a small convolutional network for 32x32 pictures that attends to their cells."""

import torch
from torch import Tensor, nn

NUM_CELLS = 25


class AttentionConvNet(nn.Module):
    """The small network, its 25 cells of the last feature map weighted by attention.

    x is (3, 32, 32), normalised with mean and std 0.5; `pool` is 2x2 max-pooling. With
    `t(V) = relu(fc2(relu(fc1(flatten(V)))))`:

        V       = pool(relu(conv2(pool(relu(conv1(x))))))          (16, 5, 5)
        h       = t(V)                                             (84,)
        e       = attention(h)                                     (25,)
        alpha   = softmax(e)                                       (25,)   the attention, [5, 5]
        h'      = t(25 * alpha * V)                                (84,)
        g       = sigmoid(attention_combine(tanh(e)))              (1,)
        feature = g * h' + (1 - g) * h                             (84,)
        logits  = fc3(feature)                                     (10,)

    Args:
        attends: Without attention the feature is h, to compare with; there are no weights then.
    """

    def __init__(self, *, attends: bool = True) -> None:
        super().__init__()
        self.attends = attends
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        if attends:
            self.attention = nn.Linear(84, NUM_CELLS)
            self.attention_combine = nn.Linear(NUM_CELLS, 1)

    def forward(self, frames: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features and attention of single frames.

        Args:
            frames: (B, 1, 3, 32, 32) floating, normalised.

        Returns:
            The feature (B, 84), and the attention (B, 5, 5), which sums to 1, where there is one.
        """
        cells = self._pool(self.conv2(self._pool(self.conv1(frames.flatten(0, 1)))))
        plain = self._trunk(cells)
        if not self.attends:
            return plain
        # float32, so that the weights sum to 1 in bf16 runs too.
        scores = self.attention(plain).float()
        weights = torch.softmax(scores, dim=-1).reshape(-1, 5, 5)
        attended = self._trunk(NUM_CELLS * weights.unsqueeze(1) * cells)
        gate = torch.sigmoid(self.attention_combine(torch.tanh(scores)))
        return gate * attended + (1 - gate) * plain, weights

    def logits(self, frames: Tensor) -> Tensor:
        """The scores of the ten classes, (B, 10), for training."""
        output = self(frames)
        scores: Tensor = self.fc3(output[0] if isinstance(output, tuple) else output)
        return scores

    def _pool(self, maps: Tensor) -> Tensor:
        # The same as pooling after the relu, which then has a quarter of the work.
        if self.training or maps.is_cuda:
            return torch.relu(nn.functional.max_pool2d(maps, 2))
        # The same values; on CPUs max_pool2d is slow where maps have few channels.
        rows = torch.maximum(maps[..., ::2, :], maps[..., 1::2, :])
        return torch.relu(torch.maximum(rows[..., ::2], rows[..., 1::2]))

    def _trunk(self, cells: Tensor) -> Tensor:
        return torch.relu(self.fc2(torch.relu(self.fc1(cells.flatten(1)))))
