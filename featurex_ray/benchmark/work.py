"""The one piece of work that a benchmark gives to everybody: a manifest of so many samples."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featurex_ray.errors import RequestError
from featurex_ray.manifest import build_manifest
from featurex_ray.pipeline.units import PLANNED, to_table
from featurex_ray.storage import filesystem, resolve

DATASET = "benchmark"


@dataclass(frozen=True)
class Scratch:
    """Where the work lies until it is done: manifests, tables, media that were made.

    Attributes:
        folder: Of this machine.
        uri: The same folder, or a prefix that all hosts of a cluster reach.
    """

    folder: Path
    uri: str

    def put(self, path: Path) -> str:
        """The URI of a file of the folder, which all who work find there."""
        uri = f"{self.uri}/{path.relative_to(self.folder)}"
        if self.uri != str(self.folder):
            store, target = filesystem(uri)
            store.put_file(str(path), target)
        return uri


@contextmanager
def scratch(uri: str | None) -> Iterator[Scratch]:
    """A local folder, and its like below a URI, if one is given; what is in them is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="featurex-benchmark-") as name:
        if uri is None:
            yield Scratch(Path(name), name)
            return
        below = f"{uri.rstrip('/')}/featurex-benchmark-{uuid.uuid4().hex[:8]}"
        try:
            yield Scratch(Path(name), below)
        finally:
            store, path = filesystem(below)
            with suppress(FileNotFoundError):
                store.rm(path, recursive=True)


@dataclass(frozen=True)
class Pieces:
    """Media to make manifests of any length from, by using them again.

    Attributes:
        rows: `uri`, or `data` where the media lie in a Parquet file.
    """

    rows: pa.Table

    @classmethod
    def of(cls, media: str, folder: Path) -> "Pieces":
        """The media below a folder or prefix, or those that a Parquet manifest names or holds.

        Raises:
            RequestError: There are none.
        """
        if media.endswith(".parquet"):
            store, path = filesystem(media)
            with pq.ParquetFile(path, filesystem=store) as file:
                names, num_rows = file.schema_arrow.names, file.metadata.num_rows
            if not num_rows:
                raise RequestError(f"--media {media}: has no rows")
            column = next((name for name in ("data", "uri") if name in names), None)
            if column is None:
                raise RequestError(f"--media {media}: has neither a `data` nor a `uri` column")
            rows = pq.read_table(path, columns=[column], filesystem=store)
            if column == "uri":
                uris = [resolve(uri, relative_to=media) for uri in rows["uri"].to_pylist()]
                rows = pa.table({"uri": uris})
            return cls(rows)
        listed = folder / "listed.parquet"
        build_manifest(media, str(listed), dataset=DATASET, labels=False)
        return cls(pq.read_table(listed, columns=["uri"]))

    @property
    def prefix(self) -> str | None:
        """What a run over them must be allowed to read; None for inline media.

        Raises:
            RequestError: They have no folder in common.
        """
        if "uri" not in self.rows.column_names:
            return None
        # Cut at a slash below; `commonpath` would make s3:/ of s3://.
        common = os.path.commonprefix(self.rows["uri"].to_pylist())  # noqa: RUF071
        common = common.rpartition("/")[0]
        if not common.strip("/") or common.endswith(":/"):
            raise RequestError("the media to measure on lie in several stores: take one at a time")
        return f"{common}/"

    def first(self, count: int) -> "Pieces":
        """The first of them, all if there are fewer."""
        return Pieces(self.rows.slice(0, count))

    def manifest(self, path: Path, num_samples: int) -> Path:
        """Writes a manifest of exactly so many samples."""
        chosen = self.rows.take(pa.array([i % len(self.rows) for i in range(num_samples)]))
        chosen = chosen.append_column("sample_id", pa.array([f"{i:09d}" for i in range(num_samples)]))
        chosen = chosen.append_column("dataset", pa.array([DATASET] * num_samples))
        pq.write_table(chosen, path, row_group_size=1024)
        return path


def planned(manifest: str, count: int) -> pa.Table:
    """The first samples of a manifest as the pipeline's rows, schema `PLANNED`."""
    store, path = filesystem(manifest)
    file = pq.ParquetFile(path, filesystem=store)
    inline = "data" in file.schema_arrow.names
    wanted = ["dataset", "sample_id"] if inline else ["dataset", "sample_id", "uri"]
    rows = next(file.iter_batches(batch_size=count, columns=wanted)).to_pylist()

    def place(i: int) -> dict[str, Any]:
        return {"data_file": manifest, "data_row": i} if inline else {}

    numbered = [{"assignment": 0, "plan_row": i, **row, **place(i)} for i, row in enumerate(rows)]
    return to_table(numbered, PLANNED)
