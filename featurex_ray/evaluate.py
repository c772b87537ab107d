"""How good the features of a table are: linear probe, nearest neighbours, retrieval."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featurex_ray.errors import RequestError
from featurex_ray.table.read import TableReader

Say = Callable[[str], None]

NEIGHBOURS = 5
FOLDS = 5
_SIMILARITIES_AT_ONCE = 1 << 23
"""About 200 MB, with their order and what follows from it."""
_PROBE_ITERATIONS = 2000


@dataclass(frozen=True)
class Evaluation:
    """What the features of labelled clips are worth.

    Attributes:
        num_train: Clips that the probe learned from and that neighbours were looked for among.
        num_test: Clips that were asked about.
        num_classes: Labels.
        linear_probe: Accuracy of logistic regression on standardised features.
        knn: Accuracy of the majority among the 5 nearest by cosine.
        recall_at_1: Share of queries whose nearest clip is of their class.
        recall_at_10: Share of queries with one of their class among the ten nearest.
        mean_average_precision: Of ranking all clips by cosine.
        num_shared: Clips of the training dataset that were left out, as their media are asked about.
    """

    num_train: int
    num_test: int
    num_classes: int
    linear_probe: float
    knn: float
    recall_at_1: float
    recall_at_10: float
    mean_average_precision: float
    num_shared: int = 0

    def lines(self) -> list[str]:
        """The figures in words."""
        shared = f"; {self.num_shared:,} more are of media that are asked about" if self.num_shared else ""
        return [
            f"{self.num_test:,} clips of {self.num_classes} classes, against {self.num_train:,}{shared}",
            f"linear probe  {self.linear_probe:.1%}",
            f"{NEIGHBOURS}-NN          {self.knn:.1%}",
            f"recall@1      {self.recall_at_1:.1%}",
            f"recall@10     {self.recall_at_10:.1%}",
            f"mAP           {self.mean_average_precision:.3f}",
        ]


@dataclass(frozen=True)
class LabelledFeatures:
    """Features with labels, from a table.

    Attributes:
        features: (N, D) float32.
        labels: (N,) strings.
        datasets: (N,) strings.
        media: (N,) integers, equal for clips of one medium; None where each clip is its own.
    """

    features: np.ndarray
    labels: np.ndarray
    datasets: np.ndarray
    media: np.ndarray | None = None

    @property
    def groups(self) -> np.ndarray:
        """(N,) integers: of which medium each clip is; its own other clips prove nothing of features."""
        return np.arange(len(self.labels)) if self.media is None else self.media

    def take(self, rows: np.ndarray) -> "LabelledFeatures":
        """Some of the clips, by their places or a mask."""
        media = None if self.media is None else self.media[rows]
        return LabelledFeatures(self.features[rows], self.labels[rows], self.datasets[rows], media)

    def of(self, dataset: str) -> "LabelledFeatures":
        """Those of one dataset.

        Raises:
            RequestError: There are none.
        """
        chosen = self.datasets == dataset
        if not chosen.any():
            known = ", ".join(sorted(set(self.datasets.tolist())))
            raise RequestError(f"the table has no labelled clips in dataset {dataset!r}; there are {known}")
        return self.take(chosen)


def read_labelled(table: TableReader, *, labels: str = "label") -> LabelledFeatures:
    """Features and labels of a table; clips without a label are left out.

    Args:
        table: The table.
        labels: Its column that says what a clip shows.

    Raises:
        RequestError: There is no such column, or fewer than two labels.
    """
    if labels not in table.dataset().schema.names:
        raise RequestError(
            f"the table has no column {labels!r}: extract from a manifest with a label column, "
            "or name another one that was kept with --keep-columns"
        )
    if labels == "dataset":
        raise RequestError("--labels dataset: that is where clips lie, not what they show")
    rows = table.to_arrow(["dataset", "sample_id", "media_sha256", "feature", labels])
    rows = rows.filter(pc.is_valid(rows[labels]))
    names = np.array(rows[labels].cast(pa.string()).to_pylist(), dtype=str)
    if len(set(names.tolist())) < 2:
        raise RequestError(f"column {labels!r} must tell at least two classes apart")
    flat = pc.list_flatten(rows["feature"]).to_numpy().astype(np.float32)
    datasets = np.array(rows["dataset"].cast(pa.string()).to_pylist(), dtype=str)
    sample = pc.binary_join_element_wise(rows["dataset"].cast(pa.string()), rows["sample_id"], "/")
    # By its bytes: segments of one video, and copies under two names, are samples of one medium.
    medium = pc.coalesce(rows["media_sha256"], sample)
    groups = medium.combine_chunks().dictionary_encode().indices.to_numpy()
    return LabelledFeatures(flat.reshape(len(names), -1), names, datasets, groups)


def evaluate(
    found: LabelledFeatures, *, train: str | None = None, test: str | None = None, say: Say = lambda _: None
) -> Evaluation:
    """Measure features.

    Args:
        found: All labelled features of a table.
        train: The dataset to learn from and to look for neighbours in, without the media that the
            other one has too.
        test: The dataset to ask about. With neither, each clip is asked about once: the probe
            learns in five stratified folds, and neighbours are all clips of other media.
        say: Told what is being done.

    Raises:
        RequestError: Only one of the two is given, or there is too little to measure.
    """
    if (train is None) != (test is None):
        raise RequestError("give both --train-dataset and --test-dataset, or neither")
    if train is not None and train == test:
        raise RequestError("--train-dataset and --test-dataset are the same: each clip would find itself")
    if train is not None and test is not None:
        return _across(found, train, test, say)
    # By pairs, as segments of one medium may show different things.
    pairs = np.unique(np.stack([np.unique(found.labels, return_inverse=True)[1], found.groups]), axis=1)
    least = np.bincount(pairs[0]).min()
    if least < FOLDS:
        raise RequestError(
            f"a class has {least} samples of different media, and {FOLDS} folds need {FOLDS}: "
            "give --train-dataset and --test-dataset"
        )
    return _evaluation(found, found, _cross_validated(found, say), say)


def _across(found: LabelledFeatures, train: str, test: str, say: Say) -> Evaluation:
    num_train, asked = len(found.of(train).labels), found.of(test)
    is_asked = np.isin(found.groups, found.groups[found.datasets == test])
    known = found.take((found.datasets == train) & ~is_asked)
    num_shared = num_train - len(known.labels)
    if len(set(known.labels.tolist())) < 2:
        left = f" without the {num_shared:,} clips whose media are in {test!r} too" if num_shared else ""
        raise RequestError(
            f"dataset {train!r}{left} has fewer than two labels: there is nothing to tell apart"
        )
    say(f"linear probe: learns from {len(known.labels):,} clips")
    probe = _probe(known).score(asked.features, asked.labels)
    return replace(_evaluation(known, asked, float(probe), say), num_shared=num_shared)


@dataclass(frozen=True)
class Retrieval:
    """How well the nearest clips by cosine are of a query's class; the figures of `Evaluation`."""

    knn: float
    recall_at_1: float
    recall_at_10: float
    mean_average_precision: float


def retrieve(
    asked: LabelledFeatures, known: LabelledFeatures | None, *, say: Say = lambda _: None
) -> Retrieval:
    """Rank clips for each query.

    Args:
        asked: Q queries.
        known: N clips to rank; None for all queries of other media.
        say: Told how far it is, some ten times.
    """
    among = known or asked
    unit, gallery = _unit(asked.features), _unit(among.features)
    # Numbers for labels: of strings, a copy for each similarity would take ten times the memory.
    _, targets = np.unique(np.concatenate([among.labels, asked.labels]), return_inverse=True)
    classes, truths = np.split(targets.astype(np.int32), [len(among.labels)])
    at_once = max(_SIMILARITIES_AT_ONCE // len(gallery), 1)
    sums = np.zeros(4)
    lines = _tenths(len(unit), at_once)
    for first in range(0, len(unit), at_once):
        if first in lines:
            say(f"neighbours: {first:,} of {len(unit):,} clips, among {len(gallery):,}")
        similarity = unit[first : first + at_once] @ gallery.T
        if known is None:  # nothing is its own neighbour, nor are two clips of one medium
            own = asked.groups[first : first + len(similarity)]
            similarity[own[:, None] == asked.groups] = -np.inf
        order = nearest_first(similarity)
        truth = truths[first : first + len(order)]
        relevant = classes[order] == truth[:, None]
        relevant &= np.take_along_axis(similarity, order, axis=1) > -np.inf
        nearest = order[:, :NEIGHBOURS]
        voted = _majority(classes[nearest], np.take_along_axis(similarity, nearest, axis=1))
        sums += [
            (voted == truth).sum(),
            relevant[:, 0].sum(),
            relevant[:, :10].any(axis=1).sum(),
            average_precision(relevant).sum(),
        ]
    return Retrieval(*(sums / len(unit)).tolist())


def nearest_first(similarity: np.ndarray) -> np.ndarray:
    """Places by falling similarity; of equal ones the first comes first.

    Both go into one whole number, whose plain sort takes half the time of a stable one that says the order.

    Args:
        similarity: (Q, N) float32, no NaN.

    Returns:
        (Q, N) int64.
    """
    bits = (0.0 - similarity).view(np.uint32)  # with one zero: of 0.0 - 0.0 and 0.0 - -0.0
    bits ^= np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))  # rises as the float does
    keys = bits.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(similarity.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)


def average_precision(relevant: np.ndarray) -> np.ndarray:
    """Average precision of each ranking.

    Args:
        relevant: (Q, N) bool, the nearest first.

    Returns:
        (Q,) float64; 0 where nothing is relevant.
    """
    hits = np.cumsum(relevant, axis=1)
    precision = hits / np.arange(1, relevant.shape[1] + 1)
    found = np.maximum(hits[:, -1], 1)
    average: np.ndarray = (precision * relevant).sum(axis=1) / found
    return average


def _tenths(count: int, step: int) -> set[int]:
    """The multiples of a step, from 0, at which another tenth is reached."""
    return {-(-tenth * count // (10 * step)) * step for tenth in range(10)}


def _evaluation(known: LabelledFeatures, asked: LabelledFeatures, probe: float, say: Say) -> Evaluation:
    return Evaluation(
        num_train=len(known.labels),
        num_test=len(asked.labels),
        num_classes=len(set(known.labels.tolist())),
        linear_probe=probe,
        **asdict(retrieve(asked, None if known is asked else known, say=say)),
    )


def _probe(known: LabelledFeatures) -> Any:
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=_PROBE_ITERATIONS))
    return classifier.fit(known.features, known.labels)


def _cross_validated(found: LabelledFeatures, say: Say) -> float:
    has_several = len(np.unique(found.groups)) < len(found.groups)
    kind, groups = (StratifiedGroupKFold, found.groups) if has_several else (StratifiedKFold, None)
    folds = kind(FOLDS, shuffle=True, random_state=0)
    right = 0
    for fold, (rows, held) in enumerate(folds.split(found.features, found.labels, groups), 1):
        say(f"linear probe: fold {fold} of {FOLDS}, learns from {len(rows):,} clips")
        fitted = _probe(found.take(rows))
        right += int((fitted.predict(found.features[held]) == found.labels[held]).sum())
    return right / len(found.labels)


def _majority(labels: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """What most neighbours (Q, K) are; where votes are equal, the class whose voters are nearer."""
    classes, targets = np.unique(labels, return_inverse=True)
    votes = np.zeros((len(labels), len(classes)))
    rows = np.arange(len(labels))
    for rank, column in enumerate(targets.reshape(labels.shape).T):
        # Similarity is at most 1, so that K of them never outweigh a vote; one that may not be has none.
        near = similarity[:, rank]
        votes[rows, column] += np.where(near > -np.inf, 1 + near / (4 * NEIGHBOURS), 0.0)
    winners: np.ndarray = classes[votes.argmax(axis=1)]
    return winners


def _unit(vectors: np.ndarray) -> np.ndarray:
    length: np.ndarray = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = vectors / np.where(length > 0, length, 1.0)
    return unit
