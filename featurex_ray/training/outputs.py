"""What a training leaves behind, at any URI: weights with a card, metrics, a plot, a state to go on from."""

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.fs
from botocore.exceptions import BotoCoreError, NoCredentialsError

from featurex_ray.errors import FeaturexError, RequestError, StoreUnavailableError
from featurex_ray.storage import NO_CREDENTIALS, filesystem, is_away, parse, redact

WEIGHTS, CARD, METRICS, PLOT, JOB = (
    "weights.safetensors",
    "weights.json",
    "metrics.jsonl",
    "metrics.png",
    "training.json",
)
STATE, HISTORY, TENSORBOARD = "state", "history.json", "tensorboard"

_FULL = {errno.ENOSPC, errno.EDQUOT}


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
        """Write an object, whole or not at all.

        Raises:
            RequestError: There is no such place, or it may not be written.
            StoreUnavailableError: The store did not answer.
        """
        path = f"{self._path}/{name}"
        with _explained("write", self.place(name)):
            if self._is_local:
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            file = self._fs.open(path, "wb", autocommit=False)
            file.write(data)
            file.close()
            file.commit()

    def read(self, name: str) -> bytes | None:
        """An object's bytes, None where there is none.

        Raises:
            RequestError: There is no such place, or it may not be read.
            StoreUnavailableError: The store did not answer.
        """
        with _explained("read", self.place(name)):
            try:
                with self._fs.open(f"{self._path}/{name}", "rb") as file:
                    data: bytes = file.read()
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error.__cause__):  # nothing could be written there either
                    raise
                return None
        return data

    def for_ray(self) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """Path and filesystem as Ray Train takes them; its own filesystem where the folder is local."""
        if self._is_local:
            return self._path, None
        return self._path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._fs))


@contextmanager
def _explained(what: str, uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, BotoCoreError) as error:
        raise _explain(f"can't {what} {redact(uri)!r}", error) from error


def _explain(failed: str, error: OSError | BotoCoreError) -> FeaturexError:
    if isinstance(error, NoCredentialsError):
        return RequestError(f"{failed}: {NO_CREDENTIALS}")
    if isinstance(error, BotoCoreError) or is_away(error) or error.errno in _FULL:
        return StoreUnavailableError(f"{failed}: {error}")
    return RequestError(f"{failed}: {error.strerror or error}")


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
        """Note an epoch; `write` writes it."""
        self.history.append(metrics)
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, metrics["epoch"])

    def write(self) -> None:
        """Write all epochs, also those whose writing failed before.

        Raises:
            RequestError: The output may not be written (any more).
            StoreUnavailableError: The store did not answer.
        """
        self._writer.flush()
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        self.output.write(METRICS, lines.encode())
        for path in Path(self._folder.name).iterdir():
            self.output.write(f"{TENSORBOARD}/{path.name}", path.read_bytes())

    def close(self) -> None:
        """Let go of the event file."""
        self._writer.close()
        self._folder.cleanup()
