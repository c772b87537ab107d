"""Manifests out of what lies in a store: a prefix, an image-folder tree, tar shards."""

import gzip
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from featurex_ray.errors import FetchError, ManifestError, RefusedUriError, RequestError
from featurex_ray.manifest.files import Format, ManifestFile, explained, is_file
from featurex_ray.manifest.samples import DATASET_PATTERN
from featurex_ray.storage import (
    Fetcher,
    Filesystem,
    ReadPolicy,
    filesystem,
    parse,
    redact,
    uri_of,
    version_of,
)

MEDIA_EXTENSIONS: dict[str, Literal["image", "video"]] = {
    **dict.fromkeys(
        (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ico"),
        "image",
    ),
    **dict.fromkeys((".ppm", ".pgm", ".tga"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv"), "video"),
    **dict.fromkeys((".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".ogv", ".ogg", ".asf"), "video"),
}
"""What is listed into a manifest. The media's type is still told from its bytes."""

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_BATCH_ROWS = 65_536
_QUOTE = '"'

Row = dict[str, str | None]


@dataclass(frozen=True)
class ManifestCounts:
    """What was listed.

    Attributes:
        dataset: The dataset that the samples were given.
        media: Samples by what their names say they are, `image` or `video`.
        labels: Samples of each label; empty where folders are no classes.
        skipped: Files that are no media by their names, by extension.
    """

    dataset: str
    media: Mapping[str, int]
    labels: Mapping[str, int]
    skipped: Mapping[str, int]

    @property
    def num_samples(self) -> int:
        """Rows in the manifest."""
        return sum(self.media.values())

    def lines(self) -> list[str]:
        """The counts for people."""
        media = ", ".join(f"{count:,} {kind}s" for kind, count in self.media.items() if count)
        lines = [f"{self.num_samples:,} samples in dataset {self.dataset}: {media}"]
        if self.labels:
            lines.append(f"  labels: {', '.join(f'{name} {count:,}' for name, count in self.labels.items())}")
        if self.skipped:
            lines.append(f"  passed over: {', '.join(f'{n:,} {ext}' for ext, n in self.skipped.items())}")
        return lines


@dataclass
class _Tally:
    media: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Entry:
    """Something that lies below the source."""

    uri: str
    name: str
    version: str

    @property
    def extension(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders below the source, or inside the tar, as in `train/cat/1.jpg`."""
        return PurePosixPath(self.name.rpartition("::")[2]).parts[:-1]

    @property
    def is_nameable(self) -> bool:
        """Whether a manifest can hold this name: UTF-8 without control characters or hidden `..`."""
        try:
            parse(self.uri.encode().decode())
        except (RefusedUriError, UnicodeError):
            return False
        return True


def build_manifest(
    source: str, output: str, *, dataset: str | None = None, labels: bool | None = None
) -> ManifestCounts:
    """Lists the media below `source` into a manifest at `output`.

    The rows have `uri` (absolute), `sample_id` (the path below the source), `dataset` and `version` (the
    ETag; locally time and size). Members of `.tar` files are listed as `shard.tar::name`. If all media
    lies in class folders (`cat/1.jpg`, or `train/cat/1.jpg`, at least two classes), there is a `label`
    too, and a `split` where there are splits.

    Args:
        source: A folder, prefix, tar or single file.
        output: Where to write; Parquet, CSV or JSON Lines by its extension. Replaced if it is there.
        dataset: Its name; the last part of `source` if none is given.
        labels: Whether folders are classes; told from the layout if none.

    Raises:
        ManifestError: There is no media, or folders are not the classes that `labels` says they are.
        RequestError: A name can't be used.
        StoreUnavailableError: The store did not answer.
    """
    file = _output_file(output)
    name = dataset if dataset is not None else _default_dataset(source)
    if not re.fullmatch(DATASET_PATTERN, name):
        raise RequestError(f"--dataset {name!r} is not {DATASET_PATTERN}")
    with explained(source), Fetcher(ReadPolicy(source)) as fetcher:
        layout = () if labels is False else _label_columns(_media(source, fetcher, _Tally()), labels=labels)
        tally = _Tally()
        rows = _rows(_media(source, fetcher, tally), name, layout, tally)
        first = next(rows, None)
        if first is None:
            raise ManifestError(
                f"no media below {redact(source)!r}; passed over {dict(tally.skipped) or 'nothing'}"
            )
        schema = pa.schema([(column, pa.string()) for column in first])
        with explained(output), _written(file) as opened:
            _WRITERS[file.format](_batches(chain([first], rows), schema), schema, opened)
    return ManifestCounts(name, dict(tally.media), dict(sorted(tally.labels.items())), dict(tally.skipped))


def _output_file(output: str) -> ManifestFile:
    file = ManifestFile.of(str(parse(output)))
    if file.format == "parquet" and file.gzipped:
        raise RequestError(f"{redact(output)!r}: Parquet is packed by itself, leave out the .gz")
    return file


def _default_dataset(source: str) -> str:
    name = PurePosixPath(parse(source).path.rstrip("/") or parse(source).root).name.removesuffix(".tar")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:128]


def _media(source: str, fetcher: Fetcher, tally: _Tally) -> Iterator[_Entry]:
    for entry in _with_members(_listed(source), fetcher):
        if entry.extension not in MEDIA_EXTENSIONS:
            tally.skipped[entry.extension or "(none)"] += 1
        elif not entry.is_nameable:
            tally.skipped["(unusable name)"] += 1
        else:
            yield entry


def _with_members(entries: Iterator[_Entry], fetcher: Fetcher) -> Iterator[_Entry]:
    for entry in entries:
        if entry.extension != ".tar":
            yield entry
            continue
        try:
            index = fetcher.tar_index(entry.uri)
        except FetchError as error:
            raise ManifestError(f"can't list {redact(entry.uri)!r}: {error}") from error
        for member, part in index.members.items():
            version = f"{index.etag.strip(_QUOTE)}+{part.start}"
            yield _Entry(f"{entry.uri}::{member}", f"{entry.name}::{member}", version)


def _listed(source: str) -> Iterator[_Entry]:
    """Everything below `source`, or `source` itself if it is a file."""
    store, path = filesystem(source)
    location = parse(source)
    if is_file(store, path):
        facts = store.info(path)
        yield _Entry(str(location), PurePosixPath(location.path).name, _version(facts))
    elif location.scheme == "file":
        yield from _listed_locally(Path(path), Path(path))
    elif location.scheme == "s3":
        yield from _listed_on_s3(store, location.root, location.path)
    else:
        for name, facts in store.find(path, detail=True).items():
            yield _Entry(uri_of(name, listed=source), name.removeprefix(path).lstrip("/"), _version(facts))


def _listed_locally(folder: Path, source: Path) -> Iterator[_Entry]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _listed_locally(path, source)
        elif path.is_file():
            facts = path.stat()
            version = f"{facts.st_mtime_ns}-{facts.st_size}"
            yield _Entry(str(path), str(path.relative_to(source)), version)


def _listed_on_s3(store: Filesystem, bucket: str, path: str) -> Iterator[_Entry]:
    """Page by page, as s3fs would hold the whole listing in memory."""
    prefix = path.rstrip("/") + "/" if path.strip("/") else ""
    page: dict[str, Any] = {"NextContinuationToken": None}
    while "NextContinuationToken" in page:
        token = page["NextContinuationToken"]
        more = {"ContinuationToken": token} if token else {}
        page = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):
                name = item["Key"].removeprefix(prefix)
                yield _Entry(f"s3://{bucket}/{item['Key']}", name, item["ETag"].strip(_QUOTE))


def _version(facts: Mapping[str, Any]) -> str:
    if "ino" in facts:  # a local file
        return f"{os.stat(facts['name']).st_mtime_ns}-{facts['size']}"  # noqa: PTH116
    return version_of(facts)


def _label_columns(media: Iterator[_Entry], *, labels: bool | None) -> tuple[str, ...]:
    """`label`, and `split`, if folders are classes; otherwise nothing, which ends the look early."""
    depths: set[int] = set()
    classes: set[str] = set()
    for entry in media:
        depth = _class_depth(entry.folders)
        if depth is None:
            if labels:
                raise ManifestError(f"{redact(entry.uri)!r} does not lie in a class folder")
            return ()
        depths.add(depth)
        classes.add(entry.folders[-1])
    if not labels and len(classes) < 2:
        return ()
    return ("label", "split") if 1 in depths else ("label",)


def _class_depth(folders: tuple[str, ...]) -> int | None:
    """0 for `cat/`, 1 for `train/cat/`, none for other layouts."""
    if len(folders) == 1 and folders[0].lower() not in SPLITS:
        return 0
    return 1 if len(folders) == 2 and folders[0].lower() in SPLITS else None


def _rows(media: Iterator[_Entry], dataset: str, layout: tuple[str, ...], tally: _Tally) -> Iterator[Row]:
    for entry in media:
        tally.media[MEDIA_EXTENSIONS[entry.extension]] += 1
        row: Row = {"uri": entry.uri, "dataset": dataset, "sample_id": entry.name, "version": entry.version}
        if "label" in layout:
            row["label"] = entry.folders[-1]
            tally.labels[entry.folders[-1]] += 1
        if "split" in layout:
            row["split"] = entry.folders[0] if len(entry.folders) == 2 else None
        yield row


def _batches(rows: Iterator[Row], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while chunk := list(islice(rows, _BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist(chunk, schema)


@contextmanager
def _written(file: ManifestFile) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when all is in it."""
    store, path = filesystem(file.uri)
    is_local = parse(file.uri).scheme == "file"
    if is_local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    folder = Path(path).parent if is_local else None
    with tempfile.TemporaryDirectory(prefix=".featurex-", dir=folder) as room:
        draft = Path(room) / "manifest"
        with gzip.open(draft, "wb") if file.gzipped else draft.open("wb") as opened:
            yield cast(IO[bytes], opened)
        if is_local:
            draft.replace(path)
        else:
            store.put_file(str(draft), path)


def _write_parquet(batches: Iterator[pa.RecordBatch], schema: pa.Schema, opened: IO[bytes]) -> None:
    with pq.ParquetWriter(opened, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_csv(batches: Iterator[pa.RecordBatch], schema: pa.Schema, opened: IO[bytes]) -> None:
    with pa_csv.CSVWriter(opened, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_jsonl(batches: Iterator[pa.RecordBatch], _schema: pa.Schema, opened: IO[bytes]) -> None:
    for batch in batches:
        opened.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch.to_pylist())


_WRITERS: dict[Format, Callable[[Iterator[pa.RecordBatch], pa.Schema, IO[bytes]], None]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
}
