"""How close extraction comes to its device: here the CPU; on a GPU it is the same code, but for graphs."""

from contextlib import nullcontext

import pytest
import torch

from featurex_ray.benchmark import device
from featurex_ray.benchmark.device import DeviceRates, measure_device
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import resolve


def test_shares() -> None:
    rates = DeviceRates(
        "card", 128, host=1900.0, eager=2000.0, compiled=2500.0, failed={"graphed": "no room"}
    )
    assert (rates.fed, rates.of_best) == (0.95, 0.8)
    line = rates.line()
    assert "card: 1900.0 frames/s from host frames, 0.95 of resident ones (2000.0 eager)" in line
    assert (
        "0.80 of the best (compiled 2500.0, graphed not measured); batches of 128; graphed: no room" in line
    )


@pytest.mark.parametrize(
    ("text", "clip_frames"),
    [
        ("attention_convnet", 1),
        ("cnn_lstm,backbone=squeezenet1_1,hidden=16", 2),
        ("tests.models.own:LastFrame", 3),
    ],
)
def test_measured_on_the_cpu(text: str, clip_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)  # takes half a minute, measured
    made = Embedder(
        resolve(text, weights=None if ":" in text else "none"), precision="bf16", device="cpu", batch_frames=6
    )
    rates = measure_device(made, clip_frames=clip_frames, seconds=0.05)
    assert rates.batch_frames == 6
    assert min(rates.host, rates.eager, rates.compiled or 0.0) > 0
    assert rates.graphed is None
    assert rates.failed == {}


def test_an_image_extractor_sees_each_frame_of_a_video_alone() -> None:
    made = Embedder(resolve("tests.models.own:MeanColour"), precision="fp32", device="cpu")
    made.network = lambda frames: frames.shape  # type: ignore[assignment]
    assert device._forward(made)(torch.zeros(4, 2, 3, 8, 8)) == (8, 1, 3, 8, 8)


def test_a_network_that_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(device, "_compiled", fails)
    made = Embedder(resolve("attention_convnet"), precision="fp32", device="cpu", batch_frames=4)
    rates = measure_device(made, clip_frames=1, seconds=0.01)
    assert rates.compiled is None
    assert rates.of_best == 1
    assert "compiled: no compiler" in rates.line()


def test_a_graph_is_captured_on_the_stream_that_was_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, of: torch.device) -> None:
            self.device = of

        def wait_stream(self, other: "Stream") -> None:
            pass

    class Graph:
        def replay(self) -> None:
            pass

    used: list[Stream | None] = []

    def use(stream: Stream) -> nullcontext[None]:
        used.append(stream)
        return nullcontext()

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": use,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "graph", lambda _, stream=None: use(stream))
    device._graphed(lambda batch: batch, torch.zeros(1))
    warmed_up, captured = used
    assert captured is warmed_up


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_on_a_gpu() -> None:
    made = Embedder(resolve("torchvision/resnet18", weights="none"), precision="bf16", device="cuda")
    rates = measure_device(made, clip_frames=1, seconds=0.5)
    assert rates.failed == {}
    assert rates.graphed
