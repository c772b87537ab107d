"""Weight files, read and checked without torch: safetensors, and torchvision's own downloads."""

import dataclasses
import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import fsspec
from botocore.exceptions import BotoCoreError

from featurex_ray.errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

BUNDLED = Path(__file__).parent / "weights"
"""Weights that come with the package: `<extractor>.safetensors`, for its default options."""

_PICKLES = (".pt", ".pth", ".pt2", ".pkl", ".pickle", ".bin", ".ckpt")
_UNREADABLE = (OSError, ValueError, ImportError, BotoCoreError)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, whole.

    Attributes:
        source: Where it came from, without credentials.
        sha256: Of its bytes, in hex.
        format: "torch" only for torchvision's own files, whose sha256 is in their name.
        data: Its bytes.
        classes: What its classifier tells apart, as its card says; None where no card does.
    """

    source: str
    sha256: str
    format: Literal["safetensors", "torch"]
    data: bytes = field(repr=False)
    classes: tuple[str, ...] | None = None


def read_weights(uri: str) -> WeightsFile:
    """Read a safetensors file and check its sha256, where one is told.

    Args:
        uri: Any fsspec URI; `#sha256=<hex>` pins it. A card beside it (`<uri>.json`, or `.json`
            for `.safetensors`) with a `sha256` is checked too.

    Raises:
        WeightsError: missing, unreadable, altered, or not safetensors.
    """
    place, _, fragment = uri.partition("#")
    pin = _pin(uri, fragment)
    if place.lower().endswith(_PICKLES):
        raise WeightsError(
            f"{without_credentials(place)} is a pickle, which can run code when it is loaded; "
            "--weights takes safetensors: "
            f"featurex convert-weights {without_credentials(place)} {Path(place).stem}.safetensors"
        )
    data = read_file(place)
    sha256 = hashlib.sha256(data).hexdigest()
    card = _find_card(place) or {}
    for told_by, told in (("the pin", pin), ("its card", _sha256_in(card))):
        if told is not None and told != sha256:
            raise WeightsError(f"{without_credentials(place)} has sha256 {sha256}, but {told_by} says {told}")
    read_shapes(data, name=without_credentials(place))
    return WeightsFile(without_credentials(place), sha256, "safetensors", data, _classes_in(card))


def read_card(uri: str) -> dict[str, Any]:
    """What is said of weights in the card beside them, or of an extractor's bundled ones.

    Args:
        uri: As for `read_weights`; or the name of an extractor whose weights are bundled.

    Raises:
        WeightsError: the weights can't be used, or there is no card.
    """
    bundled = BUNDLED / f"{uri}.safetensors"
    place = str(bundled) if bundled.is_file() else uri
    read_weights(place)
    card = _find_card(place.partition("#")[0])
    if card is None:
        raise WeightsError(f"there is no card beside {without_credentials(uri)}")
    return card


def bundled_weights(name: str) -> WeightsFile | None:
    """The weights that come with the package for an extractor, None where there are none."""
    path = BUNDLED / f"{name}.safetensors"
    if not path.is_file():
        return None
    file = read_weights(str(path))
    return dataclasses.replace(file, source=f"bundled {path.name}")


def torchvision_weights(model: str, file_name: str) -> WeightsFile:
    """torchvision's own weights of a model, from TORCH_HOME or by its own loader.

    Args:
        model: Such as "resnet18".
        file_name: Such as "resnet18-f37072fd.pth"; ends in the first digits of its sha256.

    Raises:
        WeightsError: they can't be had, or are altered.
    """
    path = checkpoints_folder() / file_name
    if not path.is_file():
        _download(model, path)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    start = Path(file_name).stem.rpartition("-")[2]
    if not sha256.startswith(start):
        raise WeightsError(
            f"{path} has sha256 {sha256}, which should start with {start}: "
            "it is damaged or altered; remove it, so that it is downloaded again"
        )
    return WeightsFile(f"torchvision {file_name}", sha256, "torch", data)


def checkpoints_folder() -> Path:
    """Where torchvision keeps its downloads, as torch.hub finds it (but without torch)."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))  # noqa: PTH118
    return Path(home).expanduser() / "hub" / "checkpoints"


def read_shapes(data: bytes, *, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, from the header of a safetensors file.

    Raises:
        WeightsError: this is no safetensors file.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        complete = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
        shapes = {key: tuple(value["shape"]) for key, value in tensors.items()}
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise WeightsError(f"{name} is not a safetensors file; --weights takes nothing else") from error
    if complete != len(data):
        raise WeightsError(f"{name} is cut short or altered: {len(data)} bytes, its header says {complete}")
    return shapes


def without_credentials(uri: str) -> str:
    """The URI without user, password and query, fit for reports."""
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _pin(uri: str, fragment: str) -> str | None:
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if match is None:
        raise WeightsError(f"{without_credentials(uri)}: the pin must be #sha256= and 64 hex digits")
    return match[1].lower()


def read_file(uri: str) -> bytes:
    """A file's bytes.

    Raises:
        WeightsError: It is missing or unreadable.
    """
    try:
        with fsspec.open(uri, "rb") as file:
            data: bytes = file.read()
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weights file {without_credentials(uri)}") from error
    except _UNREADABLE as error:
        raise WeightsError(f"{without_credentials(uri)} can't be read: {error}") from error
    return data


def _sha256_in(card: Mapping[str, Any]) -> str | None:
    sha256 = card.get("sha256")
    return None if sha256 is None else str(sha256).lower()


def _classes_in(card: Mapping[str, Any]) -> tuple[str, ...] | None:
    classes = card.get("classes")
    return tuple(map(str, classes)) if isinstance(classes, list) else None


def _find_card(uri: str) -> dict[str, Any] | None:
    for place in dict.fromkeys((f"{uri}.json", f"{uri.removesuffix('.safetensors')}.json")):
        try:
            with fsspec.open(place, "rb") as file:
                card = json.load(file)
        except (FileNotFoundError, PermissionError):  # S3 says 403 where listing isn't allowed
            continue
        except _UNREADABLE as error:
            raise WeightsError(f"the card {without_credentials(place)} can't be read: {error}") from error
        if isinstance(card, dict):
            return card
    return None


def _download(model: str, path: Path) -> None:
    """Let torchvision fetch its weights to `path`."""
    import socket

    from torchvision.models import get_model_weights

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # the loader sets none, and some networks drop packets in silence
    try:
        get_model_weights(model).DEFAULT.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"the weights of {model} can't be downloaded ({error}). Put {path.name} into {path.parent} "
            "(or set TORCH_HOME), or give --weights a safetensors file"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    if not path.is_file():
        raise WeightsError(f"torchvision {model} uses another file than {path.name}: give --weights")
