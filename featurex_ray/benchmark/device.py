"""How close extraction comes to its device: the same network on frames that lie there already."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from featurex_ray.models.embed import Embedder, TwoStage

SECONDS = 3.0
"""That each rate is measured for."""
BATCHES = 8
"""Of host frames, so that copies have a batch to run beside."""
WARM_UP = 3

Forward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class DeviceRates:
    """Frames a second of one extractor on one device.

    Attributes:
        device: Its name, such as `NVIDIA H200`.
        batch_frames: Frames of a device batch.
        host: From uint8 frames in host memory to features there, as extraction does it.
        eager: The network alone on one batch that lies on the device, normalised; as extraction runs it.
        compiled: The same by `torch.compile`; None where it failed.
        graphed: The same as a CUDA graph; None where it failed or there is no CUDA.
        failed: Why, by `compiled` and `graphed`.
    """

    device: str
    batch_frames: int
    host: float
    eager: float
    compiled: float | None = None
    graphed: float | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def fed(self) -> float:
        """What part of its time the device has work."""
        return self.host / self.eager

    @property
    def of_best(self) -> float:
        """What part of the best of the three ways eager reaches."""
        return self.eager / max(self.eager, self.compiled or 0.0, self.graphed or 0.0)

    def line(self) -> str:
        """All of it for people."""
        others = {"compiled": self.compiled, "graphed": self.graphed}
        told = ", ".join(
            f"{name} {'not measured' if rate is None else f'{rate:.1f}'}" for name, rate in others.items()
        )
        why = "".join(f"; {name}: {message}" for name, message in self.failed.items())
        return (
            f"{self.device}: {self.host:.1f} frames/s from host frames, {self.fed:.2f} of resident ones "
            f"({self.eager:.1f} eager), which is {self.of_best:.2f} of the best ({told}); batches of "
            f"{self.batch_frames}{why}"
        )


def measure_device(embedder: Embedder, *, clip_frames: int, seconds: float = SECONDS) -> DeviceRates:
    """Measure an extractor on frames of noise: what they show costs nothing.

    Args:
        embedder: On the device.
        clip_frames: Frames of each clip, 1 for images.
        seconds: That each rate is measured for.
    """
    size = embedder.spec.input
    num_clips = max(embedder.batch_frames // clip_frames, 1) * BATCHES
    shape = (num_clips * clip_frames, size.height, size.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    lengths = np.full(num_clips, clip_frames)
    host = _rate(lambda: embedder.embed(frames, lengths), len(frames), embedder.device, seconds)

    # After that its batches fit: they are halved where the device's memory doesn't suffice.
    num_clips = max(embedder.batch_frames // clip_frames, 1)
    with torch.inference_mode(), embedder.autocast():
        batch = torch.from_numpy(frames[: num_clips * clip_frames]).to(embedder.device)
        batch = embedder.normalise(batch.unflatten(0, (num_clips, clip_frames)))
        forward, count = _forward(embedder), num_clips * clip_frames
        eager = _rate(lambda: forward(batch), count, embedder.device, seconds)
        ways: dict[str, Callable[[], Callable[[], Any]]] = {"compiled": lambda: _compiled(forward, batch)}
        if embedder.device.type == "cuda":
            ways["graphed"] = lambda: _graphed(forward, batch)
        rates, failed = {}, {}
        for name, make in ways.items():
            try:
                rates[name] = _rate(make(), count, embedder.device, seconds)
            except RuntimeError as error:  # compilers and captures have their reasons
                failed[name] = str(error).strip().partition("\n")[0]
    name = torch.cuda.get_device_name(embedder.device) if embedder.device.type == "cuda" else "CPU"
    return DeviceRates(name, count, host, eager, **rates, failed=failed)


def _forward(embedder: Embedder) -> Forward:
    """Features of clips (N, T, 3, H, W), as the embedder computes them from one batch."""
    network: Any = embedder.network
    if embedder.spec.media == "any":
        return lambda clips: network(clips.flatten(0, 1).unsqueeze(1))
    if not isinstance(network, TwoStage):
        return cast("Forward", network)

    def in_two_stages(clips: Tensor) -> Any:
        return network.embed_clips(network.embed_frames(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]))

    return in_two_stages


def _compiled(forward: Forward, batch: Tensor) -> Callable[[], Any]:
    compiled = torch.compile(forward, dynamic=False)
    return lambda: compiled(batch)


def _graphed(forward: Forward, batch: Tensor) -> Callable[[], Any]:
    aside = torch.cuda.Stream(batch.device)
    aside.wait_stream(torch.cuda.current_stream(batch.device))
    with torch.cuda.stream(aside):  # a capture wants all that is chosen at the first call to be chosen
        for _ in range(WARM_UP):
            forward(batch)
    torch.cuda.current_stream(batch.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):  # its own is one of the device that is current, not of ours
        forward(batch)
    return graph.replay


def _rate(call: Callable[[], Any], count: int, device: torch.device, seconds: float) -> float:
    """Frames a second of calls that take `count` of them; a device's queue is emptied at the end."""
    for _ in range(WARM_UP):
        call()
    _wait(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call()
        calls += 1
        if calls % WARM_UP == 0:  # some calls ahead keep the device busy, thousands would only queue
            _wait(device)
    _wait(device)
    return count * calls / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
