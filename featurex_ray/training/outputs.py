"""What a training leaves behind, at any URI: weights with a card, metrics, a plot, a state to go on from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.fs

from featurex_ray.storage import filesystem, parse

WEIGHTS, CARD, METRICS, PLOT, JOB = (
    "weights.safetensors",
    "weights.json",
    "metrics.jsonl",
    "metrics.png",
    "training.json",
)
STATE, TENSORBOARD = "state", "tensorboard"


class OutputFolder:
    """A folder or prefix to write whole objects into.

    Args:
        uri: Local directory or any fsspec URI.
    """

    def __init__(self, uri: str) -> None:
        location = parse(uri)
        self.uri = str(location).rstrip("/")
        self._is_local = location.scheme == "file"
        self._fs, path = filesystem(self.uri)
        self._path = path.rstrip("/")

    def place(self, name: str) -> str:
        """The URI of an object."""
        return f"{self.uri}/{name}"

    def write(self, name: str, data: bytes) -> None:
        """Write an object, whole or not at all."""
        path = f"{self._path}/{name}"
        if self._is_local:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        file = self._fs.open(path, "wb", autocommit=False)
        file.write(data)
        file.close()
        file.commit()

    def read(self, name: str) -> bytes | None:
        """An object's bytes, None where there is none."""
        try:
            with self._fs.open(f"{self._path}/{name}", "rb") as file:
                data: bytes = file.read()
        except FileNotFoundError:
            return None
        return data

    def for_ray(self) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """Path and filesystem as Ray Train takes them; its own filesystem where the folder is local."""
        if self._is_local:
            return self._path, None
        return self._path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._fs))


@dataclass
class MetricsLog:
    """The metrics of all epochs, as JSON Lines and for TensorBoard; written after each epoch."""

    output: OutputFolder
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from tensorboardX import SummaryWriter

        self._folder = TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name, max_queue=1)

    def restart(self, history: Sequence[dict[str, Any]]) -> None:
        """Go on after these epochs."""
        self.history = list(history)

    def add(self, metrics: dict[str, Any]) -> None:
        """Note an epoch."""
        self.history.append(metrics)
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        self.output.write(METRICS, lines.encode())
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, metrics["epoch"])
        self._writer.flush()
        self._copy_events()

    def close(self) -> None:
        """Let go of the event file."""
        self._writer.close()
        self._copy_events()
        self._folder.cleanup()

    def _copy_events(self) -> None:
        for path in Path(self._folder.name).iterdir():
            self.output.write(f"{TENSORBOARD}/{path.name}", path.read_bytes())
