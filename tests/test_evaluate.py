"""Measures of features, against their definitions and on features that are known to be good or bad."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from featurex_ray.errors import RequestError
from featurex_ray.evaluate import (
    LabelledFeatures,
    average_precision,
    evaluate,
    nearest_first,
    read_labelled,
    retrieve,
)
from featurex_ray.table import FeatureTable, open_store
from featurex_ray.table.read import TableReader
from tests.table.conftest import FACTS, World, run


def clusters(count: int, *, spread: float, seed: int = 0, dataset: str = "d") -> LabelledFeatures:
    """Five classes around centres that are far apart."""
    rng = np.random.default_rng(seed)
    centres = np.eye(5, 16) * 10
    targets = np.arange(count) % 5
    features = (centres[targets] + spread * rng.standard_normal((count, 16))).astype(np.float32)
    labels = np.array([f"class {t}" for t in targets])
    return LabelledFeatures(features, labels, np.full(count, dataset))


def together(one: LabelledFeatures, other: LabelledFeatures) -> LabelledFeatures:
    return LabelledFeatures(
        np.concatenate([one.features, other.features]),
        np.concatenate([one.labels, other.labels]),
        np.concatenate([one.datasets, other.datasets]),
    )


def test_average_precision_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    relevant = rng.random((20, 50)) < 0.3
    scores = -np.arange(50)
    wanted = [average_precision_score(row, scores) for row in relevant]
    np.testing.assert_allclose(average_precision(relevant), wanted)
    assert average_precision(np.zeros((1, 4), bool)).tolist() == [0]


def test_good_features_measure_well_and_noise_does_not() -> None:
    good = evaluate(clusters(100, spread=0.5))
    assert good.linear_probe == good.knn == good.recall_at_1 == 1.0
    assert good.mean_average_precision > 0.99
    rng = np.random.default_rng(2)
    noise = clusters(500, spread=0.5)
    noise = LabelledFeatures(rng.standard_normal((500, 16)).astype(np.float32), noise.labels, noise.datasets)
    bad = evaluate(noise)
    assert 0.1 < bad.linear_probe < 0.3
    assert 0.1 < bad.recall_at_1 < 0.3
    assert bad.recall_at_10 > bad.recall_at_1


def test_k_nn_is_scikit_learns() -> None:
    known, asked = clusters(100, spread=4.0), clusters(100, spread=4.0, seed=9)
    units = [f.features / np.linalg.norm(f.features, axis=1, keepdims=True) for f in (known, asked)]
    # On unit vectors the nearest by distance are the nearest by cosine; ties apart, the vote is the same.
    reference = KNeighborsClassifier(5, weights=lambda d: 1 + (1 - d**2 / 2) / 20)
    wanted = reference.fit(units[0], known.labels).score(units[1], asked.labels)
    assert retrieve(asked, known).knn == pytest.approx(wanted)


def test_train_and_test_datasets_are_kept_apart() -> None:
    table = together(clusters(50, spread=1.0, dataset="a"), clusters(20, spread=1.0, seed=3, dataset="b"))
    found = evaluate(table, train="a", test="b")
    assert (found.num_train, found.num_test, found.num_classes) == (50, 20, 5)
    assert found.linear_probe > 0.9
    with pytest.raises(RequestError, match="no labelled clips in dataset 'c'; there are a, b"):
        evaluate(table, train="a", test="c")
    with pytest.raises(RequestError, match="give both"):
        evaluate(table, train="a")


def test_too_few_clips_for_folds_fail() -> None:
    with pytest.raises(RequestError, match="a class has 2 samples"):
        evaluate(clusters(10, spread=1.0))


def test_no_clip_is_its_own_neighbour() -> None:
    pair = LabelledFeatures(np.eye(2, 4, dtype=np.float32), np.array(["a", "b"]), np.array(["d", "d"]))
    assert retrieve(pair, None).recall_at_1 == 0


def test_clips_of_one_sample_are_not_each_others_neighbours() -> None:
    """Noise, but ten clips of each sample are all but equal: only who looks at those finds anything."""
    rng = np.random.default_rng(0)
    samples = np.repeat(np.arange(60), 10)
    features = rng.standard_normal((60, 16))[samples] + 0.001 * rng.standard_normal((600, 16))
    labels = np.array([f"class {sample % 3}" for sample in samples])
    alone = LabelledFeatures(features.astype(np.float32), labels, np.full(600, "d"))
    assert evaluate(alone).recall_at_1 == 1.0
    found = evaluate(LabelledFeatures(alone.features, labels, alone.datasets, samples))
    assert max(found.recall_at_1, found.knn, found.linear_probe) < 0.6


def test_a_dataset_is_not_measured_against_itself() -> None:
    table = together(clusters(50, spread=1.0, dataset="a"), clusters(20, spread=1.0, seed=3, dataset="b"))
    with pytest.raises(RequestError, match="the same"):
        evaluate(table, train="a", test="a")


def test_copies_of_one_medium_belong_together(tmp_path: Path) -> None:
    """The world's media are the same in both datasets."""
    table = FeatureTable.open_or_create(open_store(str(tmp_path)), FACTS)
    run(table, World(datasets=("a", "b")))
    found = read_labelled(TableReader(table.store, table.facts))
    assert len(set(found.groups.tolist())) == 12
    for group in set(found.groups.tolist()):
        assert set(found.datasets[found.groups == group].tolist()) == {"a", "b"}


def test_media_that_are_asked_about_are_not_learned_from() -> None:
    one, other = clusters(50, spread=1.0, dataset="a"), clusters(20, spread=1.0, seed=3, dataset="b")
    both = together(one, other)
    media = np.concatenate([np.arange(50), np.arange(40, 60)])  # ten of a are in b too
    found = evaluate(LabelledFeatures(both.features, both.labels, both.datasets, media), train="a", test="b")
    assert (found.num_train, found.num_test, found.num_shared) == (40, 20, 10)
    assert found.lines()[0] == (
        "20 clips of 5 classes, against 40; 10 more are of media that are asked about"
    )
    copies = LabelledFeatures(both.features, both.labels, both.datasets, np.arange(70) % 20)
    with pytest.raises(RequestError, match=r"'a' without the 50 clips .* fewer than two labels"):
        evaluate(copies, train="a", test="b")


def test_segments_of_a_medium_may_have_labels_of_their_own() -> None:
    """Each medium shows all five classes, the first of them first."""
    table = clusters(100, spread=0.5)
    found = evaluate(LabelledFeatures(table.features, table.labels, table.datasets, np.arange(100) // 5))
    assert found.linear_probe == found.recall_at_1 == 1.0


def test_nearest_first_is_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    similarity = np.round(rng.uniform(-1, 1, (20, 300)), 2).astype(np.float32)  # many are equal
    similarity[:, :4] = [0.0, -0.0, -np.inf, -np.inf]
    np.testing.assert_array_equal(nearest_first(similarity), np.argsort(-similarity, axis=1, kind="stable"))


def test_stages_are_told() -> None:
    said: list[str] = []
    evaluate(clusters(100, spread=0.5), say=said.append)
    assert said == [
        *(f"linear probe: fold {fold} of 5, learns from 80 clips" for fold in range(1, 6)),
        "neighbours: 0 of 100 clips, among 100",
    ]


@pytest.mark.usefixtures("local_ray")
def test_evaluate_reads_a_table(tmp_path: Path) -> None:
    from PIL import Image

    import featurex_ray as fx
    from featurex_ray.manifest import build_manifest
    from tests.training.conftest import COLOURS, coloured

    for index in range(30):
        label = sorted(COLOURS)[index % 3]
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(coloured(label, seed=index))
        picture.save(tmp_path / "photos" / label / f"{index}.png")
    build_manifest(str(tmp_path / "photos"), str(tmp_path / "m.parquet"))
    job = fx.ExtractionJob(
        manifest=str(tmp_path / "m.parquet"), output=str(tmp_path / "out"), extractor="attention_convnet"
    )
    fx.run(job)
    table = fx.open_table(str(tmp_path / "out/attention_convnet"))
    found = evaluate(read_labelled(table))
    assert (found.num_test, found.num_classes) == (30, 3)
    assert found.recall_at_10 > 0.9
    with pytest.raises(RequestError, match="no column 'scene'"):
        read_labelled(table, labels="scene")
