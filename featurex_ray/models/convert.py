"""Pickled weights (`.pt`, `.pth`) to safetensors, unpickled where nothing but tensors can come of it.

`weights_only=True` lets no code run, as far as anybody knows; the process that it runs in can
open, connect to and start nothing, should that turn out wrong.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from featurex_ray.contained import ChildLostError, ContainedProcess, ProcessLimits
from featurex_ray.contained.template import Outbox
from featurex_ray.errors import WeightsError
from featurex_ray.models.weights import read_file, read_shapes, without_credentials

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "ema")
_GIB = 1 << 30


@dataclass(frozen=True)
class Converted:
    """A safetensors file that was made.

    Attributes:
        uri: Where it is, without credentials.
        sha256: Of its bytes, in hex: the pin for `--weights`.
        num_tensors: Tensors in it.
    """

    uri: str
    sha256: str
    num_tensors: int


def convert_weights(source: str, output: str, *, key: str | None = None) -> Converted:
    """Write the tensors of a pickled state dict as safetensors.

    Args:
        source: A file that `torch.save` wrote, at any fsspec URI.
        output: The safetensors file to write, at any fsspec URI.
        key: Where in the file the state dict is; by default the file itself or its `state_dict`, ...

    Raises:
        WeightsError: The file can't be read, or holds anything but tensors.
    """
    if not output.lower().endswith(".safetensors"):
        raise WeightsError(f"{without_credentials(output)} must end in .safetensors")
    data = _contained(read_file(source), key, name=without_credentials(source))
    shapes = read_shapes(data, name=without_credentials(source))
    try:
        with fsspec.open(output, "wb") as file:
            file.write(data)
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(f"{without_credentials(output)} can't be written: {error}") from error
    return Converted(without_credentials(output), hashlib.sha256(data).hexdigest(), len(shapes))


def _contained(pickled: bytes, key: str | None, *, name: str) -> bytes:
    limits = ProcessLimits(memory_bytes=2 * _GIB + 4 * len(pickled))
    process = ContainedProcess(
        "featurex_ray.models.convert:Unpickler",
        None,
        outbox_bytes=2 * len(pickled) + (1 << 20),
        limits=limits,
    )
    try:
        for told in process.run([(key, pickled)]):
            return _taken(told[0], process, name=name)
    except ChildLostError as error:
        raise WeightsError(f"{name} can't be converted: its reader {error.detail}") from error
    finally:
        process.close()
    raise AssertionError("a request has an answer")


def _taken(told: Any, process: ContainedProcess, *, name: str) -> bytes:
    """The file that the child made, or its complaint."""
    if isinstance(told, str):
        raise WeightsError(f"{name} can't be converted: {told[:1000]}")
    if not (isinstance(told, list) and len(told) == 2 and all(type(each) is int for each in told)):
        raise WeightsError(f"{name} can't be converted: its reader gave an impossible answer")
    place, num_bytes = told
    return process.outbox[place : place + num_bytes]


class Unpickler:
    """What unpickles in the child; see `template.Handler`."""

    def __init__(self, setup: None) -> None:  # noqa: ARG002  a handler is made of a setup
        import torch

        self._torch = torch
        # Whatever is imported late must be imported before it can't be.
        target = io.BytesIO()
        torch.save({"state_dict": {"a": torch.zeros(2, 2)}}, target)
        self._convert(target.getvalue(), None)

    def __call__(self, item: str | None, data: memoryview, outbox: Outbox) -> list[int] | str:
        """Convert one file; [place, bytes] or what is wrong with it."""
        try:
            made = self._convert(bytes(data), item)
            return [outbox.put([memoryview(made)]), len(made)]
        except Exception as error:  # noqa: BLE001  torch's readers raise anything; all of it is a complaint
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"[:500]

    def _convert(self, pickled: bytes, key: str | None) -> bytes:
        import safetensors.torch

        loaded = self._torch.load(io.BytesIO(pickled), map_location="cpu", weights_only=True)
        tensors = self._tensors(loaded, key)
        made: bytes = safetensors.torch.save(
            {name: each.clone().contiguous() for name, each in tensors.items()}
        )
        return made

    def _tensors(self, loaded: Any, key: str | None) -> Mapping[str, Any]:
        """The state dict in what was loaded.

        Raises:
            WeightsError: There is none.
        """
        if key is not None:
            loaded = loaded[key]
        elif isinstance(loaded, Mapping):
            loaded = next((loaded[k] for k in _NESTED if isinstance(loaded.get(k), Mapping)), loaded)
        if not isinstance(loaded, Mapping):
            raise WeightsError(f"it holds a {type(loaded).__name__}, not tensors by name")
        others = [str(name) for name, value in loaded.items() if not isinstance(value, self._torch.Tensor)]
        if others or not loaded:
            raise WeightsError(f"no tensors: {', '.join(others[:5])}; --key says where they are")
        return {str(name).removeprefix("module."): value.detach() for name, value in loaded.items()}
