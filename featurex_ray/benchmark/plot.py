"""How busy the stages of a run were over time, drawn."""

import io
from typing import Any

from matplotlib.figure import Figure

STAGES = ("decode", "extract", "write")


def plot_occupancy(occupancy: dict[str, list[Any]], *, title: str) -> bytes:
    """A PNG: busy workers of each stage, and the samples that are done, over time.

    Args:
        occupancy: As run reports keep it, `watched.occupancy`.
        title: Above the plot.
    """
    stages = [name for name in STAGES if name in occupancy]
    figure = Figure(figsize=(9, 1.1 + 1.1 * (len(stages) + 1)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(stages) + 1, 1, sharex=True)
    seconds = occupancy["seconds"]
    for each, name in zip(axes, stages, strict=False):
        each.fill_between(seconds, occupancy[name], step="post", alpha=0.6)
        each.set_ylim(0, max([*occupancy[name], 1]) * 1.1)
        each.set_ylabel(f"{name}\nbusy workers", fontsize=8)
        each.grid(alpha=0.3)
    axes[-1].plot(seconds, occupancy["samples"], color="black")
    axes[-1].set_ylabel("samples\ndone", fontsize=8)
    axes[-1].set_xlabel("seconds since the pipeline started")
    axes[-1].grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()
