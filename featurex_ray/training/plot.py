"""Loss and accuracy over the epochs, drawn."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure


def plot_metrics(history: Sequence[dict[str, Any]], *, title: str) -> bytes:
    """A PNG of loss and accuracy, of training and validation.

    Args:
        history: One row an epoch, as in the metrics file.
        title: Above the plot.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    epochs = [row["epoch"] for row in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for side, style in (("train", "--"), ("validation", "-")):
            if all(f"{side}_{name}" in row for row in history):
                axes.plot(epochs, [row[f"{side}_{name}"] for row in history], style, label=side)
        axes.set_xlabel("epoch")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()
