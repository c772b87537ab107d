"""Learning itself, without Ray: it learns, repeats to the bit, goes on, freezes, and stops at NaN."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featurex_ray.errors import RequestError, WeightsError
from featurex_ray.models.build import save_weights, weights_bytes
from featurex_ray.models.classifier import build_classifier
from featurex_ray.models.registry import resolve
from featurex_ray.training.augment import Augmentation
from featurex_ray.training.data import Examples
from featurex_ray.training.job import TrainingJob
from featurex_ray.training.learner import Learner
from featurex_ray.training.optimise import rate_factor
from tests.training.conftest import COLOURS, coloured

FAST = {"epochs": 4, "batch_size": 8, "lr": 0.01, "optimizer": "sgd"}


def examples(count: int, *, first: int = 0, size: int = 32) -> Examples:
    frames = [coloured(sorted(COLOURS)[i % 3], seed=first + i, size=size) for i in range(count)]
    return Examples(np.stack(frames)[:, None], np.arange(count) % 3)


def learner(
    train: Examples | None = None,
    *,
    extractor: str = "attention_convnet",
    weights: str = "none",
    **options: Any,
) -> Learner:
    job = TrainingJob(manifest="m", output="o", extractor=extractor, **FAST | options)
    size = resolve(extractor, weights="none").spec.input.height
    return Learner(
        job,
        resolve(extractor, weights=weights),
        num_classes=3,
        train=train or examples(48),
        validation=examples(12, first=1000, size=size),
        device=torch.device("cpu"),
    )


def run(made: Learner, epochs: range) -> list[dict[str, Any]]:
    return [made.run_epoch(epoch) for epoch in epochs]


def test_it_learns_and_says_how_well() -> None:
    made = learner(epochs=12, lr=0.03)
    first, *_, last = run(made, range(1, 13))
    assert last["train_loss"] < first["train_loss"] / 2
    assert last["validation_accuracy"] >= 0.9
    confusion = np.array(last["confusion"])
    assert confusion.sum() == 12
    assert np.trace(confusion) / 12 == pytest.approx(last["validation_accuracy"])
    assert last["steps"] == 12 * 6


def test_no_confusion_matrix_is_made_of_many_classes() -> None:
    """The square of 50,000 classes would be 20 GB."""
    job = TrainingJob(manifest="m", output="o", extractor="attention_convnet", **FAST | {"batch_size": 2})
    made = Learner(
        job,
        resolve("attention_convnet", weights="none"),
        num_classes=50_000,
        train=Examples(np.zeros((2, 1, 32, 32, 3), np.uint8), np.array([0, 49_999])),
        validation=Examples(np.zeros((2, 1, 32, 32, 3), np.uint8), np.array([0, 49_999])),
        device=torch.device("cpu"),
    )
    metrics = made.run_epoch(1)
    assert metrics["confusion"] is None
    assert metrics["validation_accuracy"] in (0, 0.5)


def test_the_same_seed_gives_the_same_weights_to_the_bit() -> None:
    files = []
    for seed in (1, 1, 2):
        made = learner(seed=seed, augment="flip,shift:2,crop:0.6,colour:0.2")
        run(made, range(1, 3))
        files.append(weights_bytes(made.model.tensors()))
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_going_on_from_a_state_is_as_if_nothing_had_happened() -> None:
    whole = learner(optimizer="adamw", augment="flip,shift:2")
    run(whole, range(1, 5))
    first = learner(optimizer="adamw", augment="flip,shift:2")
    run(first, range(1, 3))
    second = learner(optimizer="adamw", augment="flip,shift:2")
    second.restore(first.state())
    run(second, range(3, 5))
    assert weights_bytes(second.model.tensors()) == weights_bytes(whole.model.tensors())


def test_it_stops_at_the_step_where_the_loss_is_no_number() -> None:
    made = learner(lr=1e30)
    metrics = next(m for m in map(made.run_epoch, range(1, 5)) if "diverged_step" in m)
    assert 1 <= metrics["diverged_step"] <= 4 * made.steps


@pytest.mark.parametrize(
    ("text", "frozen"),
    [
        ("attention_cnn,backbone=squeezenet1_1", "backbone"),
        ("torchvision/squeezenet1_1", "extractor"),
    ],
)
def test_head_only_trains_only_what_the_weights_lack(text: str, frozen: str, tmp_path: Path) -> None:
    bare, _ = build_classifier(
        resolve("torchvision/squeezenet1_1", weights="none"), num_classes=3, freeze=False, seed=3
    )
    features = torch.nn.ModuleDict({"features": bare.extractor.backbone.model.features})
    save_weights(features, str(tmp_path / "bare.safetensors"))
    made = learner(
        examples(9, size=224),
        extractor=text,
        weights=str(tmp_path / "bare.safetensors"),
        mode="head-only",
        batch_size=3,
    )
    assert made.model.frozen == frozen
    before = {k: v.clone() for k, v in made.model.tensors().items()}
    run(made, range(1, 2))
    changed = {k for k, v in made.model.tensors().items() if not torch.equal(v, before[k])}
    assert changed
    assert not any(name.startswith("backbone.") for name in changed)


def test_the_frozen_part_runs_once_and_changes_no_score(tmp_path: Path) -> None:
    """What is prepared gives the scores that the whole network gives."""
    source, _ = build_classifier(
        resolve("attention_convnet", weights="none"), num_classes=3, freeze=False, seed=5
    )
    save_weights(source.extractor, str(tmp_path / "w.safetensors"))
    made, _ = build_classifier(
        resolve("attention_convnet", weights=str(tmp_path / "w.safetensors")),
        num_classes=4,
        freeze=True,
        seed=6,
    )
    made.eval()
    frames = torch.randn(5, 1, 3, 32, 32)
    torch.testing.assert_close(made.score(made.prepare(frames)), made(frames))
    assert made(frames).shape == (5, 4)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"extractor.fc3.weight", "extractor.fc3.bias"}


@pytest.mark.parametrize("text", ["attention_convnet", "torchvision/squeezenet1_1"])
def test_the_weights_own_classifier_is_kept_and_pretrained(text: str, tmp_path: Path) -> None:
    """The same scores, and the classifier is among what learns at a tenth."""
    path = tmp_path / "w.safetensors"
    source, _ = build_classifier(resolve(text, weights="none"), num_classes=3, freeze=False, seed=5)
    path.write_bytes(weights_bytes(source.tensors()))
    resolved = resolve(text, weights=str(path))
    size = resolved.spec.input.height
    frames = torch.randn(2, 1, 3, size, size)
    for keep_head in (True, False):
        made, pretrained = build_classifier(
            resolved, num_classes=3, freeze=False, seed=6, keep_head=keep_head
        )
        new = {name for name, _ in made.named_parameters()} - pretrained
        assert bool(new) is not keep_head
        scores = made.eval()(frames)
        assert torch.equal(scores, source.eval()(frames)) is keep_head


def test_keeping_a_classifier_of_other_classes_fails(tmp_path: Path) -> None:
    source, _ = build_classifier(
        resolve("attention_convnet", weights="none"), num_classes=4, freeze=False, seed=5
    )
    save_weights(source.extractor, str(tmp_path / "w.safetensors"))
    resolved = resolve("attention_convnet", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(WeightsError, match=r"the classifier in .*w.safetensors does not fit: (.|\n)*84"):
        build_classifier(resolved, num_classes=3, freeze=False, seed=6, keep_head=True)


def test_a_video_has_the_mean_of_its_frames_features() -> None:
    made, _ = build_classifier(
        resolve("attention_convnet", weights="none"), num_classes=3, freeze=False, seed=0
    )
    made.eval()
    frames = torch.randn(2, 4, 3, 32, 32)
    each = torch.stack([made.extractor(frames[:, [t]])[0] for t in range(4)])
    torch.testing.assert_close(made(frames), made.head(each.mean(dim=0)))


def test_freezing_without_weights_fails() -> None:
    with pytest.raises(WeightsError, match="give --weights"):
        build_classifier(resolve("attention_convnet", weights="none"), num_classes=3, freeze=True, seed=0)


def test_augmentation_moves_all_frames_of_a_clip_alike() -> None:
    frame = torch.randint(0, 256, (6, 1, 16, 16, 3), dtype=torch.uint8)
    clips = frame.expand(6, 5, 16, 16, 3)
    generator = torch.Generator().manual_seed(0)
    augmentation = Augmentation.parse("flip,shift:3,crop:0.5,colour:0.3")
    moved = augmentation.pixels(clips, generator)
    assert (moved == moved[:, :1]).all()
    assert not torch.equal(moved, clips)
    floats = augmentation.normalised(moved.movedim(-1, -3).float(), generator)
    torch.testing.assert_close(floats, floats[:, :1].expand_as(floats))


def test_flip_mirrors_and_none_leaves_alone() -> None:
    clips = torch.randint(0, 256, (40, 2, 8, 8, 3), dtype=torch.uint8)
    moved = Augmentation.parse("flip").pixels(clips, torch.Generator().manual_seed(1))
    mirrored = [bool((m == c.flip(2)).all()) for m, c in zip(moved, clips, strict=True)]
    same = [bool((m == c).all()) for m, c in zip(moved, clips, strict=True)]
    assert [a != b for a, b in zip(mirrored, same, strict=True)] == [True] * 40
    assert 8 < sum(mirrored) < 32
    assert Augmentation.parse("none").is_identity


@pytest.mark.parametrize("text", ["turn", "shift:far", "crop:2", "shift:-1", "flip;shift:2"])
def test_augmentation_fails(text: str) -> None:
    with pytest.raises(RequestError, match="--augment"):
        Augmentation.parse(text)


def test_rates() -> None:
    cosine = [rate_factor(done / 100, schedule="cosine", warmup=0.2) for done in range(100)]
    assert max(cosine) == cosine[20] == 1
    assert cosine[10] == pytest.approx(0.5)
    assert cosine[60] == pytest.approx(0.5)
    assert cosine[99] < 0.001
    step = [rate_factor(done, schedule="step", warmup=0) for done in (0, 0.49, 0.5, 0.75)]
    assert step == [1, 1, 0.1, 0.01]
    assert rate_factor(0.9, schedule="constant", warmup=0.1) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "scratch", "weights": "w.safetensors"}, "give --mode finetune or head-only"),
        ({"mode": "finetune", "weights": "none"}, "needs weights"),
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
        ({"batch_size": 9, "workers": 2}, "can't be shared among 2 --workers"),
        ({"lr": 0.0}, "--lr 0.0 must be above 0"),
        ({"validation_share": 1.0}, "--validation-share 1.0 must be in"),
        ({"sampling": "fps:2"}, "training takes uniform:N"),
        ({"optimizer": "adam"}, "--optimizer 'adam' must be sgd, adamw"),
        ({"validation": "v.csv", "group_column": "g"}, "nothing to split"),
    ],
)
def test_job_fails(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TrainingJob(**{"manifest": "m", "output": "o", "extractor": "attention_convnet"} | options)
