"""What a manifest says for training: its classes, and which samples are for validation."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurex_ray.errors import ManifestError, RequestError
from featurex_ray.manifest import Manifest
from featurex_ray.storage import redact

_LISTED = 5


@dataclass(frozen=True)
class LabelledSamples:
    """Samples of one side of a training, in the manifest's order.

    Attributes:
        samples: In `schemas.sample_schema(...)`.
        targets: (N,) int64, places in `classes`.
        classes: Names, sorted; numbers by value.
    """

    samples: pa.Table
    targets: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.targets):
            raise ValueError(f"{len(self.samples)} samples, {len(self.targets)} targets")

    def take(self, rows: np.ndarray) -> "LabelledSamples":
        """Some of the samples, by their places."""
        return LabelledSamples(self.samples.take(pa.array(rows)), self.targets[rows], self.classes)

    def sha256(self) -> str:
        """A hash over what is trained on: each sample's name, version and label."""
        digest = hashlib.sha256()
        names = self.samples.select(["dataset", "sample_id", "version"]).to_pylist()
        for row, target in zip(names, self.targets.tolist(), strict=True):
            digest.update(f"{list(row.values())} {self.classes[target]}\n".encode())
        return digest.hexdigest()


def read_labelled(manifest: Manifest, *, classes: Sequence[str] | None = None) -> LabelledSamples:
    """Read a manifest's samples with their labels.

    Args:
        manifest: A validated manifest.
        classes: What the labels must be among; by default they are what is found.

    Raises:
        ManifestError: No labels, missing ones, several a sample, only one class, or labels beyond `classes`.
    """
    if "label" not in manifest.carried.names:
        raise ManifestError(f"{manifest.uri} has no `label` column, so there is nothing to train on")
    kind = manifest.carried.field("label").type
    if pa.types.is_nested(kind):
        raise ManifestError(f"{manifest.uri}: `label` is {kind}: one label a sample is needed")
    samples = pa.Table.from_batches(list(manifest.batches()))
    labels = samples["label"].combine_chunks()
    _refuse_missing(manifest.uri, samples)
    found = pc.unique(labels).sort().cast(pa.string()).to_pylist()
    if classes is None and len(found) < 2:
        raise ManifestError(f"{manifest.uri} has only one class, {found[0]!r}: there is nothing to learn")
    names = tuple(classes or found)
    if unknown := [name for name in found if name not in names]:
        raise ManifestError(
            f"{manifest.uri} has labels that the training samples lack: {_listed(unknown)}; "
            f"these have {_listed(names)}"
        )
    targets = pc.index_in(labels.cast(pa.string()), value_set=pa.array(names))
    return LabelledSamples(samples, targets.to_numpy().astype(np.int64), names)


def split(
    labelled: LabelledSamples, *, share: float, group_column: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide samples into those to train on and those to validate on, the same in every run.

    Whole groups are taken in the order of their names' hashes until each class has its share.

    Args:
        labelled: The samples.
        share: Of each class to validate on, in [0, 1).
        group_column: Samples with the same value stay together; None: those of the same media do.

    Returns:
        Places of the training samples and of the validation samples, ascending.

    Raises:
        RequestError: A class would be left without training samples.
    """
    groups = labelled.samples[group_column].to_pylist() if group_column else _by_media(labelled.samples)
    order = np.argsort([hashlib.sha256(f"{group}".encode()).hexdigest() for group in groups], kind="stable")
    held: set[object] = set()
    for target in range(len(labelled.classes)):
        rows = order[labelled.targets[order] == target]
        wanted = round(share * len(rows))
        sizes = Counter(groups[row] for row in rows)
        have = sum(size for group, size in sizes.items() if group in held)
        for row in rows:
            if have >= wanted:
                break
            if groups[row] not in held:
                held.add(groups[row])
                have += sizes[groups[row]]
    is_held = np.array([group in held for group in groups])
    if missing := sorted(set(range(len(labelled.classes))) - set(labelled.targets[~is_held].tolist())):
        raise RequestError(
            f"--validation-share {share} leaves nothing to train on of {labelled.classes[missing[0]]!r}"
        )
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def refuse_shared(train: LabelledSamples, validation: LabelledSamples) -> None:
    """Validating on what is trained on would say nothing.

    Raises:
        RequestError: Some media, or part of it, is on both sides.
    """
    known = set(_media(train.samples))
    shared = list(dict.fromkeys(place for place in _media(validation.samples) if place in known))
    if shared:
        more = f" and {len(shared) - 1:,} more" if len(shared) > 1 else ""
        raise RequestError(f"--validation has media that are trained on: {redact(shared[0])!r}{more}")


def _media(samples: pa.Table) -> list[str]:
    """Where each sample's media lies; of inline media, the URI is only a name."""
    inline = pc.binary_join_element_wise(samples["data_file"], samples["data_row"].cast(pa.string()), "#")
    places: list[str] = pc.coalesce(inline, samples["uri"]).to_pylist()
    return places


def _by_media(samples: pa.Table) -> list[str]:
    """Groups of the segments of one video, and of whatever else names the same media.

    Each is called as its first sample, so that the split stays when a manifest moves with its media.
    """
    names: dict[str, str] = {}
    ids = samples["sample_id"].to_pylist()
    return [names.setdefault(place, name) for place, name in zip(_media(samples), ids, strict=True)]


def _refuse_missing(uri: str, samples: pa.Table) -> None:
    missing = pc.indices_nonzero(pc.is_null(samples["label"]))
    if len(missing):
        names = samples["sample_id"].take(missing.slice(0, _LISTED)).to_pylist()
        raise ManifestError(f"{uri}: {len(missing)} samples have no label, such as {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name) for name in names[:_LISTED]) + rest
