"""The formulas, written out in NumPy float64, against the networks."""

import numpy as np
import pytest
import torch
from torch import nn

from featurex_ray.models import motion
from featurex_ray.models.attention import AdditiveAttention
from featurex_ray.models.attention_cnn import AttentionCnn
from featurex_ray.models.attention_convnet import AttentionConvNet
from featurex_ray.models.backbones import FeatureMap
from featurex_ray.models.cnn_lstm import CnnLstm

Arrays = dict[str, np.ndarray]


def arrays(module: nn.Module) -> Arrays:
    return {k: v.detach().numpy().astype(np.float64) for k, v in module.state_dict().items()}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def additive(p: Arrays, h: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    e = np.array([(p["v.weight"] @ np.tanh(p["w1.weight"] @ h + p["w2.weight"] @ x))[0] for x in items])
    alpha = softmax(e)
    return sum(a * x for a, x in zip(alpha, items, strict=True)), alpha


def lstm(p: Arrays, xs: np.ndarray) -> np.ndarray:
    h = c = np.zeros(p["weight_hh_l0"].shape[1])
    states = []
    for x in xs:
        gates = p["weight_ih_l0"] @ x + p["bias_ih_l0"] + p["weight_hh_l0"] @ h + p["bias_hh_l0"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.array(states)


def gru(p: Arrays, xs: np.ndarray) -> np.ndarray:
    h = np.zeros(p["weight_hh_l0"].shape[1])
    states = []
    for x in xs:
        xr, xz, xn = np.split(p["weight_ih_l0"] @ x + p["bias_ih_l0"], 3)
        hr, hz, hn = np.split(p["weight_hh_l0"] @ h + p["bias_hh_l0"], 3)
        z = sigmoid(xz + hz)
        h = (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * h
        states.append(h)
    return np.array(states)


def correlation(maps: np.ndarray) -> np.ndarray:
    """Frame by frame: agreement with the frame before at nine shifts, averaged over nine regions."""
    size = maps.shape[-1]
    # As PyTorch's adaptive pooling has them: regions of a side that 3 doesn't divide overlap.
    regions = [slice(i * size // 3, -(-(i + 1) * size // 3)) for i in range(3)]
    rows = []
    for t in range(len(maps)):
        before = np.pad(maps[max(t - 1, 0)], ((0, 0), (1, 1), (1, 1)))
        row = []
        for down in range(3):
            for right in range(3):
                agreement = (maps[t] * before[:, down : down + size, right : right + size]).sum(axis=0)
                row.append([agreement[a, b].mean() for a in regions for b in regions])
        shifts = np.array(row) - np.mean(row, axis=0)
        rows.append((shifts / (shifts.std(axis=0) + 1e-3)).ravel())
    return np.array(rows)


def test_compact_maps_are_unit_vectors_in_each_cell() -> None:
    torch.manual_seed(6)
    maps = torch.rand(3, 48, 5, 5)
    kept = motion.compact(maps)
    assert kept.shape == (3, motion.CHANNELS, 5, 5)
    np.testing.assert_allclose(kept.norm(dim=1), 1, atol=1e-5)


@pytest.mark.parametrize(("down", "right"), [(0, 1), (0, -1), (1, 0), (-1, 0), (0, 0)])
def test_correlation_finds_the_shift(down: int, right: int) -> None:
    torch.manual_seed(7)
    first = motion.compact(torch.rand(1, 64, 12, 12))[0]
    maps = torch.stack([first, first.roll((down, right), dims=(1, 2))])
    told = motion.correlate(maps[None])[0].reshape(2, 9, 9)[:, :, 4]  # the middle region has no border
    # The frame before, moved against the shift, is the frame itself.
    assert divmod(int(told[1].argmax()), 3) == (1 - down, 1 - right)
    assert divmod(int(told[0].argmax()), 3) == (1, 1)


def part(p: Arrays, prefix: str) -> Arrays:
    return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}


def assert_close(got: torch.Tensor, wanted: np.ndarray) -> None:
    error = np.abs(got.detach().numpy() - wanted).max() / np.abs(wanted).max()
    assert error <= 1e-5


def test_additive_attention_is_its_formula() -> None:
    torch.manual_seed(1)
    attention = AdditiveAttention(state_size=7, item_size=5, width=6)
    state, items = torch.randn(2, 7), torch.randn(2, 9, 5)
    context, weights = attention(state, items)
    for b in range(2):
        c, alpha = additive(arrays(attention), state[b].double().numpy(), items[b].double().numpy())
        assert_close(context[b], c)
        assert_close(weights[b], alpha)
    np.testing.assert_allclose(weights.detach().sum(dim=1), 1, atol=1e-6)


@pytest.mark.parametrize(("rnn", "reference"), [("lstm", lstm), ("gru", gru)])
def test_cnn_lstm_is_its_formula(rnn: str, reference: object) -> None:
    torch.manual_seed(2)
    net = CnnLstm(FeatureMap("squeezenet1_1"), channels=12, rnn=rnn, hidden=8).eval()
    net.standardise.running_mean.uniform_(-1, 1)
    net.standardise.running_var.uniform_(0.5, 2)
    items = torch.randn(2, 16, 12 + motion.CHANNELS * 13 * 13)
    feature, weights = net.embed_clips(items)
    p = arrays(net)
    for b in range(2):
        appearance, maps = np.split(items[b].double().numpy(), [12], axis=1)
        vectors = np.hstack([appearance, correlation(maps.reshape(16, motion.CHANNELS, 13, 13))])
        n = part(p, "standardise.")
        scaled = (vectors - n["running_mean"]) / np.sqrt(n["running_var"] + 1e-5)
        states = reference(part(p, "rnn."), scaled * n["weight"] + n["bias"])
        context, alpha = additive(part(p, "attention."), states[-1], states)
        assert_close(feature[b], context)
        assert_close(weights[b], alpha)


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    size = x.shape[-1] - 4
    patches = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
    return np.einsum("cijhw,ochw->oij", patches[:, :size, :size], weight) + bias[:, None, None]


def pool(x: np.ndarray) -> np.ndarray:
    c, h, w = x.shape
    return x.reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def convnet(p: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The contract's formulas, line by line."""

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return p[f"{name}.weight"] @ v + p[f"{name}.bias"]

    def t(v: np.ndarray) -> np.ndarray:
        return relu(linear("fc2", relu(linear("fc1", v.reshape(-1)))))

    cells = pool(relu(conv(x, p["conv1.weight"], p["conv1.bias"])))
    cells = pool(relu(conv(cells, p["conv2.weight"], p["conv2.bias"])))
    h = t(cells)
    e = linear("attention", h)
    alpha = softmax(e).reshape(5, 5)
    attended = t(25 * alpha * cells)
    g = sigmoid(linear("attention_combine", np.tanh(e)))
    feature = g * attended + (1 - g) * h
    return feature, alpha, linear("fc3", feature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_for_extraction_is_that_of_training(dtype: torch.dtype) -> None:
    net = AttentionConvNet()
    maps = torch.randn(5, 6, 28, 28).to(dtype).contiguous(memory_format=torch.channels_last)
    assert torch.equal(net.train()._pool(maps), net.eval()._pool(maps))


def test_attention_convnet_is_the_contract() -> None:
    torch.manual_seed(3)
    net = AttentionConvNet()
    with torch.no_grad():
        net.attention.weight *= 20  # far from uniform, so that the weighting is seen
    frames = torch.rand(3, 1, 3, 32, 32) * 2 - 1
    feature, attention = net(frames)
    logits = net.logits(frames)
    assert feature.shape == (3, 84)
    assert logits.shape == (3, 10)
    for b in range(3):
        f, alpha, scores = convnet(arrays(net), frames[b, 0].double().numpy())
        assert_close(feature[b], f)
        assert_close(attention[b], alpha)
        assert_close(logits[b], scores)
    assert attention.detach().std() > 0.005


def test_attention_convnet_has_exactly_these_layers() -> None:
    shapes = {k: tuple(v.shape) for k, v in AttentionConvNet().state_dict().items() if k.endswith("weight")}
    assert shapes == {
        "conv1.weight": (6, 3, 5, 5),
        "conv2.weight": (16, 6, 5, 5),
        "fc1.weight": (120, 400),
        "fc2.weight": (84, 120),
        "fc3.weight": (10, 84),
        "attention.weight": (25, 84),
        "attention_combine.weight": (1, 25),
    }


def test_attention_cnn_pools_with_the_mean_as_state() -> None:
    torch.manual_seed(4)
    net = AttentionCnn(FeatureMap("squeezenet1_1"), channels=512).eval()
    frames = torch.randn(1, 1, 3, 64, 64)
    feature, attention = net(frames)
    maps = net.backbone(frames[:, 0])[0].detach().double().numpy()
    cells = maps.reshape(512, -1).T
    context, alpha = additive(part(arrays(net), "attention."), cells.mean(axis=0), cells)
    assert_close(feature[0], context)
    assert_close(attention[0], alpha.reshape(maps.shape[1:]))


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (AttentionConvNet(), 32),
        (AttentionCnn(FeatureMap("squeezenet1_1"), channels=512), 64),
        (CnnLstm(FeatureMap("squeezenet1_1"), channels=512, rnn="lstm", hidden=8), 224),
        (CnnLstm(FeatureMap("squeezenet1_1"), channels=512, rnn="gru", hidden=8), 224),
    ],
    ids=["attention_convnet", "attention_cnn", "lstm", "gru"],
)
def test_every_parameter_gets_a_gradient(net: nn.Module, size: int) -> None:
    torch.manual_seed(5)
    frames = torch.randn(2, 3, 3, size, size)
    if isinstance(net, AttentionConvNet):
        loss = net.logits(frames[:, :1]).square().sum()
    elif isinstance(net, AttentionCnn):
        loss = net(frames[:, :1])[0].square().sum()
    else:
        loss = net(frames)[0].square().sum()
    loss.backward()
    without = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
