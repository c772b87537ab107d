from dataclasses import replace

import pytest

from featurex_ray.media.preprocess import InputSpec
from featurex_ray.models.spec import ExtractorSpec, WeightsInfo

SPEC = ExtractorSpec(
    name="some/net",
    dimension=4,
    input=InputSpec(224, 224, 256, "bilinear"),
    options=(("rnn", "lstm"),),
    weights=WeightsInfo("s3://b/w.safetensors", "ab" * 32),
    architecture="net 1",
)
RUN = {"sampling": "uniform:16", "clip": (2.0, 1.0), "precision": "fp32", "decoder": "pyav"}


def test_revision_is_stable() -> None:
    assert SPEC.revision(**RUN) == "91fc5709921ecb3b"


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": "uniform:8"},
        {"clip": (2.0, 2.0)},
        {"clip": None},
        {"precision": "bf16"},
        {"decoder": "decord+pyav"},
    ],
    ids=str,
)
def test_revision_changes_with_the_run(change: dict[str, object]) -> None:
    assert SPEC.revision(**RUN | change) != SPEC.revision(**RUN)


@pytest.mark.parametrize(
    "change",
    [
        {"dimension": 5},
        {"input": InputSpec(224, 224, 232, "bilinear")},
        {"input": InputSpec(224, 224, 256, "bicubic")},
        {"options": (("rnn", "gru"),)},
        {"media": "video"},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"attention_shape": (7, 7)},
        {"weights": WeightsInfo("s3://b/w.safetensors", "cd" * 32)},
        {"weights": WeightsInfo("s3://b/w.safetensors", "ab" * 32, ("attention",))},
        {"weights": WeightsInfo(seeded=("all",))},
        {"architecture": "net 2"},
    ],
    ids=str,
)
def test_revision_changes_with_the_extractor(change: dict[str, object]) -> None:
    assert replace(SPEC, **change).revision(**RUN) != SPEC.revision(**RUN)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another/name"},
        {"weights": WeightsInfo("/elsewhere/w.safetensors", "ab" * 32)},
        {"default_sampling": "fps:2"},
    ],
    ids=str,
)
def test_revision_does_not_change_with(change: dict[str, object]) -> None:
    assert replace(SPEC, **change).revision(**RUN) == SPEC.revision(**RUN)


def test_to_json_names_what_was_never_trained() -> None:
    assert replace(SPEC, weights=WeightsInfo(seeded=("all",))).to_json()["weights"] == "none"
    partly = replace(SPEC, weights=WeightsInfo("f", "ab" * 32, ("attention",)))
    assert partly.to_json()["weights"] == {"source": "f", "sha256": "ab" * 32, "seeded": ["attention"]}
    assert "seeded" not in SPEC.to_json()["weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimension": 0}, "dimension must be at least 1"),
        ({"media": "image"}, 'media must be "any" or "video"'),
        ({"std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"attention_shape": ()}, "one weight a frame"),
    ],
)
def test_spec_fails(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)
