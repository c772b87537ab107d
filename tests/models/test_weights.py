import hashlib
import json
import re
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import torchvision
from torch import nn

from featurex_ray.errors import WeightsError
from featurex_ray.models import torchvision_zoo, weights
from featurex_ray.models.attention_convnet import AttentionConvNet
from featurex_ray.models.build import build, save_weights
from featurex_ray.models.registry import resolve
from featurex_ray.models.weights import read_card

SMALL = "squeezenet1_1"


@pytest.fixture
def convnet(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    path = tmp_path / "convnet.safetensors"
    save_weights(AttentionConvNet(), str(path))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_of(text: str, **kwargs: str) -> dict[str, torch.Tensor]:
    resolved = resolve(text, **kwargs)
    module = build(resolved.spec, resolved.weights)
    assert isinstance(module, nn.Module)
    return module.state_dict()


def test_weights_are_loaded(convnet: Path) -> None:
    resolved = resolve("attention_convnet", weights=f"{convnet}#sha256={sha256(convnet)}")
    assert resolved.spec.weights.sha256 == sha256(convnet)
    assert resolved.spec.weights.seeded == ()
    stored = safetensors.numpy.load_file(convnet)
    loaded = weights_of("attention_convnet", weights=str(convnet))
    assert all(np.array_equal(loaded[k].numpy(), stored[k]) for k in stored)
    assert stored.keys() == loaded.keys()


def test_weights_at_any_uri(convnet: Path) -> None:
    import fsspec

    with fsspec.open("memory://weights/net.safetensors", "wb") as file:
        file.write(convnet.read_bytes())
    resolved = resolve("attention_convnet", weights="memory://weights/net.safetensors")
    assert resolved.spec.weights.source == "memory://weights/net.safetensors"


def test_seeded_weights_do_not_depend_on_global_state() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weights_of("attention_convnet", weights="none")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    torch.set_num_threads(2)
    second = weights_of("attention_convnet", weights="none")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_seeded_weights_are_marked() -> None:
    for name in ("attention_convnet", "cnn_lstm"):
        assert resolve(name, weights="none").spec.to_json()["weights"] == "none"
    # Bundled weights are those of the default options.
    assert resolve("attention_convnet,attention=no").spec.to_json()["weights"] == "none"


@pytest.mark.parametrize("name", ["attention_convnet", "cnn_lstm"])
def test_bundled_weights_have_a_card_and_are_small(name: str) -> None:
    spec = resolve(name).spec
    card = read_card(name)
    assert (spec.text, spec.weights.sha256) == (card["extractor"], card["sha256"])
    assert spec.weights.seeded == ()
    assert (weights.BUNDLED / f"{name}.safetensors").stat().st_size < 12 * 2**20


@pytest.mark.parametrize("text", [f"torchvision/{SMALL}", f"attention_cnn,backbone={SMALL}"])
def test_weights_of_a_bare_backbone_serve(text: str, tmp_path: Path) -> None:
    torch.manual_seed(8)
    model = torchvision.models.get_model(SMALL, weights=None)
    path = tmp_path / "bare.safetensors"
    # No classifier: the feature lies before it.
    save_weights(nn.ModuleDict({"features": model.features}), str(path))
    resolved = resolve(text, weights=str(path))
    assert resolved.spec.weights.seeded == (("attention",) if "attention" in text else ())
    loaded = weights_of(text, weights=str(path))
    for key, tensor in model.features.state_dict().items():
        assert torch.equal(loaded[f"backbone.model.features.{key}"], tensor)


def test_weights_of_the_whole_extractor_serve(tmp_path: Path) -> None:
    text = f"cnn_lstm,backbone={SMALL},hidden=8"
    seeded = resolve(text, weights="none")
    module = build(seeded.spec, None)
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        module.rnn.weight_ih_l0.fill_(0.25)
    save_weights(module, str(tmp_path / "w.safetensors"))
    loaded = weights_of(text, weights=str(tmp_path / "w.safetensors"))
    assert (loaded["rnn.weight_ih_l0"] == 0.25).all()
    assert resolve(text, weights=str(tmp_path / "w.safetensors")).spec.weights.seeded == ()


def test_half_precision_weights_serve(convnet: Path) -> None:
    half = {k: v.astype(np.float16) for k, v in safetensors.numpy.load_file(convnet).items()}
    safetensors.numpy.save_file(half, convnet)
    assert all(
        v.dtype == torch.float32 for v in weights_of("attention_convnet", weights=str(convnet)).values()
    )


def test_card_is_checked(convnet: Path) -> None:
    for card in (convnet.with_suffix(".json"), Path(f"{convnet}.json")):
        card.write_text(json.dumps({"sha256": sha256(convnet)}))
        resolve("attention_convnet", weights=str(convnet))
        card.write_text(json.dumps({"sha256": "0" * 64}))
        with pytest.raises(WeightsError, match="its card says 0000"):
            resolve("attention_convnet", weights=str(convnet))
        card.unlink()


def test_damaged_card_fails(convnet: Path) -> None:
    convnet.with_suffix(".json").write_text("{")
    with pytest.raises(WeightsError, match=r"the card .* can't be read"):
        resolve("attention_convnet", weights=str(convnet))


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("#sha256=" + "0" * 64, "but the pin says 0000"),
        ("#sha256=12", "the pin must be"),
        ("#md5=12", "the pin must be"),
        (".missing", "there is no weights file"),
    ],
)
def test_weights_fail(convnet: Path, suffix: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        resolve("attention_convnet", weights=f"{convnet}{suffix}")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"PK\x03\x04" + data,
        lambda data: b"\xff" * 64,
        lambda data: data[:-1],
        lambda data: data + b"0",
        lambda data: data[:100],
        lambda data: (2).to_bytes(8, "little") + b"[]",
        lambda data: (7).to_bytes(8, "little") + b'{"a":1}',
    ],
)
def test_damaged_weights_fail(convnet: Path, damage: object) -> None:
    convnet.write_bytes(damage(convnet.read_bytes()))
    with pytest.raises(WeightsError, match=r"not a safetensors file|cut short or altered"):
        resolve("attention_convnet", weights=str(convnet))


@pytest.mark.parametrize("name", ["w.pth", "w.PT", "w.pkl", "w.bin"])
def test_pickles_fail(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(WeightsError, match=r"is a pickle, .*--weights takes safetensors"):
        resolve("attention_convnet", weights=str(tmp_path / name))


def test_unreadable_places_fail() -> None:
    with pytest.raises(WeightsError, match="can't be read"):
        resolve("attention_convnet", weights="nonsense://bucket/w.safetensors")


def test_no_credentials_in_messages() -> None:
    with pytest.raises(WeightsError) as raised:
        resolve("attention_convnet", weights="memory://key:hunter2@bucket/w.safetensors?token=hunter2")
    assert "hunter2" not in str(raised.value)


def test_other_shapes_fail(convnet: Path) -> None:
    tensors = safetensors.numpy.load_file(convnet)
    tensors["fc1.weight"] = np.zeros((120, 256), np.float32)
    tensors["extra"] = np.zeros(1, np.float32)
    del tensors["fc2.bias"]
    safetensors.numpy.save_file(tensors, convnet)
    with pytest.raises(
        WeightsError, match=r"fc1.weight is \(120, 256\), not \(120, 400\); fc2.bias is missing; extra is not"
    ):
        resolve("attention_convnet", weights=str(convnet))


def test_another_network_fails(convnet: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit torchvision/squeezenet1_1: .* and \d+ more"):
        resolve(f"torchvision/{SMALL}", weights=str(convnet))


def test_weights_for_what_is_no_module_fail(convnet: Path) -> None:
    with pytest.raises(WeightsError, match=r"no torch.nn.Module"):
        resolve("tests.models.own:MeanColour", weights=str(convnet))


def test_weights_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    safetensors.numpy.save_file(
        {"mix.weight": np.eye(3, dtype=np.float32), "mix.bias": np.ones(3, np.float32)}, path
    )
    loaded = weights_of("tests.models.own:LastFrame", weights=str(path))
    assert loaded["mix.bias"].tolist() == [1, 1, 1]


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put_pth(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, state: dict[str, torch.Tensor]) -> str:
    """A file as torchvision would have downloaded it: its name ends in the start of its sha256."""
    torch.save(state, folder / "new.pth")
    file_name = f"{name}-{sha256(folder / 'new.pth')[:8]}.pth"
    (folder / "new.pth").rename(folder / file_name)
    models = torchvision_zoo.IMAGE_MODELS
    monkeypatch.setitem(models, name, replace(models[name], weights_file=file_name))
    return file_name


def test_torchvision_weights_from_torch_home(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(9)
    model = torchvision.models.get_model(SMALL, weights=None)
    file_name = put_pth(torch_home, monkeypatch, SMALL, model.state_dict())
    resolved = resolve(f"attention_cnn,backbone={SMALL}")
    assert resolved.spec.weights.source == f"torchvision {file_name}"
    assert resolved.spec.weights.sha256 == sha256(torch_home / file_name)
    assert resolved.spec.weights.seeded == ("attention",)
    loaded = weights_of(f"torchvision/{SMALL}")
    assert torch.equal(loaded["backbone.model.features.0.weight"], model.features[0].weight)


def test_old_densenet_names_are_read(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(9)
    model = torchvision.models.get_model("densenet121", weights=None)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): tensor
        for key, tensor in model.state_dict().items()
    }
    assert old.keys() != model.state_dict().keys()
    put_pth(torch_home, monkeypatch, "densenet121", old)
    loaded = weights_of("torchvision/densenet121")
    key = "features.denseblock1.denselayer2.conv1.weight"
    assert torch.equal(loaded[f"backbone.model.{key}"], model.state_dict()[key])


def test_altered_torchvision_weights_fail(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file_name = put_pth(torch_home, monkeypatch, SMALL, {})
    with (torch_home / file_name).open("ab") as file:
        file.write(b"0")
    with pytest.raises(WeightsError, match="damaged or altered"):
        resolve(f"torchvision/{SMALL}")


def test_torchvision_weights_that_cannot_be_had_fail(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(WeightsError, match=r"squeezenet1_1-b8a52dc0.pth into .*checkpoints .*--weights"):
        resolve(f"torchvision/{SMALL}")
    assert not list(torch_home.glob("*.pth"))


def test_bundled_weights_are_the_default(convnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = convnet.parent
    convnet.rename(folder / "attention_convnet.safetensors")
    monkeypatch.setattr(weights, "BUNDLED", folder)
    spec = resolve("attention_convnet").spec
    assert spec.weights.source == "bundled attention_convnet.safetensors"
    assert spec.weights.seeded == ()
