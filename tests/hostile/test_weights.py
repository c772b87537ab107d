"""S2: weight files that run code when they are unpickled. None of it runs."""

import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featurex_ray.errors import WeightsError
from featurex_ray.models.convert import convert_weights
from featurex_ray.models.weights import read_weights


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def calls(canary: str) -> dict[str, Any]:
    code = f"open({canary!r}, 'w').close()"
    return {
        "system": Runs(os.system, f"touch '{canary}'"),
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "open": Runs(open, canary, "w"),
        "nested": {"state_dict": {"a": torch.ones(2), "b": [Runs(exec, code)]}},
        "hidden among tensors": {"a": torch.ones(2), "b": Runs(os.system, f"touch '{canary}'")},
        "getattr": Runs(getattr, Runs(__import__, "os"), "sep"),
        "os.open": Runs(os.open, canary, os.O_CREAT | os.O_WRONLY),
    }


def torch_zip(payload: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return packed.getvalue()


def tar_of(payload: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return packed.getvalue()


def files(canary: str) -> dict[str, bytes]:
    made = {f"pickle {name}": pickle.dumps(call, protocol=2) for name, call in calls(canary).items()}
    raw = made["pickle exec"]
    made |= {"zip": torch_zip(raw), "tar": tar_of(raw)}
    # Opcodes by hand: the module's name from the stack, where scanners of GLOBAL don't look.
    text = f"open({canary!r}, 'w').close()".encode()
    made["stack global"] = (
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93"
        + b"X"
        + len(text).to_bytes(4, "little")
        + text
        + b"\x85R."
    )
    made["build"] = b"cbuiltins\nexec\n(V" + text + b"\ntR}b."
    return made


NAMES = list(files("x"))


@pytest.mark.parametrize("name", NAMES)
def test_malicious_weights_fail(name: str, tmp_path: Path) -> None:
    canary, source = tmp_path / "canary", tmp_path / "weights.pt"
    source.write_bytes(files(str(canary))[name])
    with pytest.raises(WeightsError, match="can't be converted"):
        convert_weights(str(source), str(tmp_path / "out.safetensors"))
    with pytest.raises(WeightsError, match="is a pickle"):
        read_weights(str(source))
    os.rename(source, source.with_suffix(".safetensors"))  # noqa: PTH104  the name is of no help
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        read_weights(str(source.with_suffix(".safetensors")))
    assert not canary.exists()


def test_the_files_do_run_code_elsewhere(tmp_path: Path) -> None:
    """Else the campaign would prove nothing: plain unpickling sets off all but getattr and tar."""
    assert len(NAMES) == 12
    struck = []
    for name, data in files(str(tmp_path / "canary")).items():
        try:
            if name == "zip":
                torch.load(io.BytesIO(data), weights_only=False)
            else:
                pickle.loads(data)
        except Exception as error:  # noqa: BLE001  it only matters what happened before
            print(name, error, file=sys.stderr)
        if (tmp_path / "canary").exists():
            struck.append(name)
            (tmp_path / "canary").unlink()
    assert set(NAMES) - set(struck) == {"pickle getattr", "tar"}
