"""A reader of table `t`'s plain files, in a process of its own, that polls all through a campaign."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import fsspec
import pyarrow.dataset as pads
from pyarrow import fs

from tests.conftest import CHECKOUT

COLUMNS = ["sample_id", "clip_index", "num_clips"]
Row = tuple[str, int, int]


@dataclass
class Reader:
    """Polls the table below one root after another, from `with` to its end; `counts` says what it saw.

    Counts: `duckdb`, `pyarrow` (scans of tables that had files), `duplicates` and `halves` (scans that saw
    a row twice, or a sample without all its clips), `errors` (scans that failed) and `unexplained` (those
    of them during which no object was replaced).

    Args:
        pause: Seconds between scans.
    """

    pause: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    last_error: str = ""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "tests.faults.reader", self._folder.name, str(self.pause)]
        self._process = subprocess.Popen(command, cwd=CHECKOUT)
        while not Path(self._folder.name, "counts").exists():
            assert self._process.poll() is None, "the reader itself failed"
            time.sleep(0.02)
        return self

    def look_at(self, root: str | Path) -> None:
        """From now on below this root: a local folder, or an `s3://` URI."""
        write_atomically(Path(self._folder.name, "root"), str(root))

    def scans(self) -> int:
        """So far."""
        seen = self._seen()
        return int(seen["duckdb"] + seen["pyarrow"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Path(self._folder.name, "stop").touch()
        try:
            assert self._process.wait(60) == 0, "the reader itself failed"
            self.counts.update(self._seen())
        finally:
            self._process.kill()
            self._folder.cleanup()

    def _seen(self) -> Counter[str]:
        path = Path(self._folder.name, "counts")
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.last_error = found.pop("last error", "")
        return Counter(found)

    def check(self) -> None:
        """Nothing seen that the protocol rules out."""
        assert self.counts["duckdb"], "it never saw a file"
        bad = {name: self.counts[name] for name in ("duplicates", "halves", "unexplained")}
        assert not any(bad.values()), (bad, self.last_error)


def summary(counts: Counter[str]) -> str:
    """In words, for a figure."""
    overlapping = counts["errors"] - counts["unexplained"]
    return (
        f"{counts['duckdb']:,} DuckDB and {counts['pyarrow']:,} pyarrow polls: {counts['duplicates']} "
        f"duplicates, {counts['halves']} halves, {overlapping} errors in scans that overlap a replacement, "
        f"{counts['unexplained']} others"
    )


def scan_duckdb(root: str) -> list[Row]:
    with duckdb.connect() as connection:
        if "://" in root:
            connection.register_filesystem(fsspec.filesystem("s3", **FRESH))
        glob = f"{root}/t/**/*.parquet"
        return connection.sql(f"SELECT {', '.join(COLUMNS)} FROM '{glob}'").fetchall()


def scan_pyarrow(root: str) -> list[Row]:
    files, folder = fs.FileSystem.from_uri(root) if "://" in root else (fs.LocalFileSystem(), root)
    dataset = pads.dataset(f"{folder}/t", filesystem=files, format="parquet", partitioning="hive")
    return list(
        zip(*(column.to_pylist() for column in dataset.to_table(columns=COLUMNS).columns), strict=True)
    )


FRESH = {"skip_instance_cache": True, "use_listings_cache": False}
SCANS = {"duckdb": scan_duckdb, "pyarrow": scan_pyarrow}


def state(root: str) -> dict[str, object]:
    """What tells one generation of each of the table's objects from another."""
    files = fsspec.filesystem("s3", **FRESH) if "://" in root else fsspec.filesystem("file")
    found = files.find(f"{root}/t", detail=True)
    return {
        path: info.get("ETag") or (info["ino"], info["size"], info["mtime"])
        for path, info in found.items()
        if path.endswith(".parquet")
    }


def look_into(rows: list[Row]) -> dict[str, int]:
    clips: dict[tuple[str, int], set[int]] = {}
    for name, clip, total in rows:
        clips.setdefault((name, total), set()).add(clip)
    return {
        "duplicates": int(len(rows) != len(set(rows))),
        "halves": int(any(len(found) != total for (_, total), found in clips.items())),
    }


def write_atomically(path: Path, text: str) -> None:
    half = path.with_suffix(".half")
    half.write_text(text)
    half.rename(path)


def main(folder: Path, pause: float) -> None:
    counts: Counter[str] = Counter()
    last_error = ""
    write_atomically(folder / "counts", "{}")  # it is there, its imports are done
    parent = os.getppid()
    while not (folder / "stop").exists() and os.getppid() == parent:
        time.sleep(pause)
        root = (folder / "root").read_text() if (folder / "root").exists() else ""
        if not root or not (before := state(root)):
            time.sleep(0.01)  # of no files neither reader can say which columns they have
            continue
        which = min(SCANS, key=lambda name: counts[name])
        counts[which] += 1
        try:
            counts.update(look_into(SCANS[which](root)))
        except Exception as error:  # noqa: BLE001  whatever a user's reader may raise
            after = state(root)
            is_explained = any(after.get(path) != before.get(path) for path in before.keys() | after.keys())
            counts.update({"errors": 1, "unexplained": int(not is_explained)})
            if not is_explained:
                last_error = f"{which}: {error}"
        write_atomically(folder / "counts", json.dumps(counts | {"last error": last_error}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
