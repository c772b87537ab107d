"""Samples that a manifest names twice, found in eight bytes a row."""

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.manifest.files import ManifestFile
from featurex_ray.manifest.samples import Problems
from featurex_ray.storage import redact

_LOOKED_AT = 100_000

Hashes = npt.NDArray[np.int64]


class Ids:
    """64-bit hashes of every `(dataset, sample_id)`; rows whose hashes agree are then compared in full."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, samples: pa.RecordBatch) -> None:
        """Takes note of some samples."""
        named = pc.and_(samples["dataset"].is_valid(), samples["sample_id"].is_valid())
        self._hashes.frombytes(_hashes(samples.filter(named)).tobytes())

    def suspects(self) -> tuple[Hashes, int]:
        """Hashes that occur again (at most 100,000 of them), and how many rows repeat an earlier one."""
        hashes = np.frombuffer(self._hashes, np.int64)
        hashes.sort()
        again = hashes[1:][hashes[1:] == hashes[:-1]]
        return np.unique(again)[:_LOOKED_AT], len(again)


def note_duplicates(
    blocks: Iterable[tuple[ManifestFile, int, pa.RecordBatch]],
    suspects: Hashes,
    repeats: int,
    problems: Problems,
) -> None:
    """Goes over the samples again and notes the first that occurred before."""
    first_seen: dict[tuple[str, str], str] = {}
    found = 0
    for file, first_row, samples in blocks:
        for index in np.flatnonzero(np.isin(_hashes(samples), suspects)).tolist():
            key = samples["dataset"][index].as_py(), samples["sample_id"][index].as_py()
            where = f"{redact(file.uri)} row {first_row + index + 1}"
            if first_seen.setdefault(key, where) != where:
                problems.add(where, f"{key[1]!r} of dataset {key[0]!r} is already in {first_seen[key]}")
                found += 1
            if problems.is_full:
                problems.total += repeats - found
                return


def _hashes(samples: pa.RecordBatch) -> Hashes:
    # Python's own hash: 64 bits, keyed per process, and nothing here outlives the process.
    keys = zip(samples["dataset"].to_pylist(), samples["sample_id"].to_pylist(), strict=True)
    return np.fromiter(map(hash, keys), np.int64, samples.num_rows)
