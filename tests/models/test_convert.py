"""Pickled weights become safetensors, with the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from featurex_ray.cli import cli
from featurex_ray.errors import WeightsError
from featurex_ray.models.convert import convert_weights
from featurex_ray.models.weights import read_weights

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(5, dtype=torch.int64),
    "c": torch.rand(4, 4).half().t(),
}


def saved(path: Path, content: Any, **options: Any) -> str:
    torch.save(content, path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (TENSORS, None),
        ({"state_dict": TENSORS, "epoch": 3}, None),
        ({"model": {f"module.{name}": each for name, each in TENSORS.items()}}, None),
        ({"generator": TENSORS, "discriminator": {}}, "generator"),
        ({**TENSORS, "c": TENSORS["c"].requires_grad_()}, None),
    ],
)
def test_convert(tmp_path: Path, content: Any, key: str | None) -> None:
    target = tmp_path / "w.safetensors"
    made = convert_weights(saved(tmp_path / "w.pt", content), str(target), key=key)
    loaded = load_file(target)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], each) for name, each in TENSORS.items())
    assert made.num_tensors == 3
    assert read_weights(f"{made.uri}#sha256={made.sha256}").sha256 == made.sha256


def test_legacy_format_and_large_file(tmp_path: Path) -> None:
    source = saved(tmp_path / "w.pth", {"big": torch.ones(12 << 20)}, _use_new_zipfile_serialization=False)
    convert_weights(source, str(tmp_path / "w.safetensors"))
    assert load_file(tmp_path / "w.safetensors")["big"].sum() == 12 << 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "a": torch.ones(2)}, "no tensors: epoch; --key says where they are"),
        ({}, "no tensors"),
        ([torch.ones(2)], "it holds a list, not tensors by name"),
        (torch.nn.Linear(2, 2), "can't be converted: UnpicklingError"),
    ],
)
def test_convert_fails(tmp_path: Path, content: Any, message: str) -> None:
    target = tmp_path / "w.safetensors"
    with pytest.raises(WeightsError, match=message):
        convert_weights(saved(tmp_path / "w.pt", content), str(target))
    assert not target.exists()


def test_what_is_no_pickle_fails(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"not a pickle")
    with pytest.raises(WeightsError, match="can't be converted"):
        convert_weights(str(tmp_path / "w.pt"), str(tmp_path / "w.safetensors"))
    with pytest.raises(WeightsError, match="there is no weights file"):
        convert_weights(str(tmp_path / "none.pt"), str(tmp_path / "w.safetensors"))
    with pytest.raises(WeightsError, match=r"must end in \.safetensors"):
        convert_weights(str(tmp_path / "w.pt"), str(tmp_path / "w.bin"))


def test_command(tmp_path: Path) -> None:
    source = saved(tmp_path / "w.pt", TENSORS)
    with pytest.raises(WeightsError, match=r"featurex convert-weights .*w\.pt w\.safetensors"):
        read_weights(source)
    result = CliRunner().invoke(cli, ["convert-weights", source, str(tmp_path / "w.safetensors")])
    assert result.exit_code == 0
    assert "3 tensors; pinned: --weights" in result.output
