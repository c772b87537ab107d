"""Sample ids as 128-bit hashes: millions of them in little memory."""

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def hash_ids(dataset: str, ids: pa.Array) -> np.ndarray:
    """128-bit hashes of sample ids.

    Returns:
        (N, 2) uint64.
    """
    start = dataset + "\0"
    digests = [blake2b((start + name).encode(), digest_size=16).digest() for name in ids.to_pylist()]
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)


def hash_versions(versions: pa.Array) -> np.ndarray:
    """(N,) uint64 hashes of versions; null is 0."""
    encoded = versions.dictionary_encode()  # often the same for many
    texts = encoded.dictionary.to_pylist()
    digests = [bytes(8), *(blake2b(text.encode(), digest_size=8).digest() for text in texts)]
    places: np.ndarray = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False) + 1
    hashes: np.ndarray = np.frombuffer(b"".join(digests), np.uint64)[places]
    return hashes


def hash_samples(dataset: str, ids: pa.ChunkedArray) -> str:
    """A hash over sample ids, in order: 32 hex digits."""
    digest = blake2b(dataset.encode() + b"\0", digest_size=16)
    digest.update(pc.binary_length(ids).combine_chunks().to_numpy(zero_copy_only=False).astype("<i8"))
    for chunk in ids.chunks:
        _, offsets, data = chunk.buffers()
        if len(chunk):
            bounds = np.frombuffer(offsets, np.int32)[[chunk.offset, chunk.offset + len(chunk)]]
            digest.update(memoryview(data)[bounds[0] : bounds[1]])
    return digest.hexdigest()


class IdIndex:
    """Finds rows by the 128-bit hash of their id: 20 bytes a row."""

    def __init__(self, hashes: np.ndarray) -> None:
        order = np.argsort(hashes[:, 0])
        self._first = hashes[order, 0]
        self._second = hashes[order, 1]
        self._row = order.astype(np.int32)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """(N,) int64: the row of each hash, or -1."""
        place = np.searchsorted(self._first, hashes[:, 0])
        rows = np.full(len(hashes), -1, np.int64)
        left = np.flatnonzero(place < len(self._first))
        while len(left):  # more than once only where the first halves of two hashes are equal
            left = left[self._first[place[left]] == hashes[left, 0]]
            equal = self._second[place[left]] == hashes[left, 1]
            rows[left[equal]] = self._row[place[left[equal]]]
            left = left[~equal]
            place[left] += 1
            left = left[place[left] < len(self._first)]
        return rows


def last_of_each(hashes: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each hash once, with the highest of its numbers.

    Args:
        hashes: (N, 2) uint64.
        numbers: (N,) int32, the plans that name them.
    """
    order = np.lexsort((numbers, hashes[:, 1], hashes[:, 0]))
    hashes, numbers = hashes[order], numbers[order]
    last = np.append((hashes[1:] != hashes[:-1]).any(axis=1), True)[: len(hashes)]
    return hashes[last], numbers[last]
