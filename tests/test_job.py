"""The job's description: what it accepts, what it refuses and how it says so."""

from typing import Any

import pytest

from featurex_ray.errors import RequestError
from featurex_ray.job import ExtractionJob, PoolSize, option_fields


def job(**changes: Any) -> ExtractionJob:
    return ExtractionJob(**{"manifest": "m.csv", "output": "out", "extractor": "cnn_lstm"} | changes)


def test_table_is_the_extractors_name_without_slashes_and_options() -> None:
    assert job(extractor="torchvision/resnet18").table_of("torchvision/resnet18") == "torchvision-resnet18"
    assert job().table_of("cnn_lstm,rnn=gru") == "cnn_lstm"
    assert job(table="mine").table_of("cnn_lstm") == "mine"
    assert job().table_of("my_package.module:Mine") == "my_package.module-Mine"


def test_weights_go_to_their_extractor() -> None:
    both = job(extractor=("a", "b"), weights=("b=s3://w/b.safetensors",))
    assert both.weights_of("a") is None
    assert both.weights_of("b") == "s3://w/b.safetensors"
    assert job(weights=("w.safetensors",)).weights_of("cnn_lstm") == "w.safetensors"


def test_every_option_explains_itself() -> None:
    for field in option_fields():
        assert len(field.metadata["help"]) > 15, field.name
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": ""}, "a manifest and --output"),
        ({"extractor": ()}, "--extractor is needed"),
        ({"dataset": "a/b"}, "--dataset 'a/b'"),
        ({"dataset": ".hidden"}, "--dataset"),
        ({"table": "a/b"}, "--table 'a/b'"),
        ({"sampling": "uniform"}, "uniform"),
        ({"sampling": "fps:0"}, "fps"),
        ({"clip_seconds": 0.0}, "--clip-seconds 0.0"),
        ({"clip_seconds": float("nan")}, "--clip-seconds nan"),
        ({"clip_stride_seconds": 1.0}, "needs --clip-seconds"),
        ({"clip_seconds": 2.0, "clip_stride_seconds": -1.0}, "--clip-stride-seconds -1.0"),
        ({"precision": "fp8"}, "--precision 'fp8'"),
        ({"decoder": "ffmpeg"}, "--decoder 'ffmpeg'"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_samples_per_plan": 0}, "--max-samples-per-plan 0"),
        ({"max_failure_rate": 1.5}, "--max-failure-rate 1.5"),
        ({"gpus_per_extract_actor": -1.0}, "--gpus-per-extract-actor"),
        ({"decode_actors": "4:2"}, "1 <= MIN <= MAX"),
        ({"extract_actors": "many"}, "give N or MIN:MAX"),
        ({"weights": ("a", "b")}, "several times for one"),
        ({"extractor": ("a", "b"), "weights": ("w",)}, "EXTRACTOR=URI"),
        ({"extractor": ("a", "b"), "table": "t"}, "share a table"),
        ({"extractor": ("cnn_lstm", "cnn_lstm,rnn=gru")}, "share a table"),
        ({"allow_prefix": "s3://media/"}, "allow_prefix='s3://media/' is one text: give a tuple"),
        ({"keep_columns": "note"}, "keep_columns='note' is one text"),
    ],
)
def test_job_fails(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        job(**changes)


def test_pool_size() -> None:
    assert PoolSize.parse("3") == PoolSize(3, 3)
    assert PoolSize.parse("2:8") == PoolSize(2, 8)


def test_weights_of_several_extractors() -> None:
    names = ("cnn_lstm,rnn=gru", "torchvision/resnet18")
    for named in names[0], "cnn_lstm":
        both = job(extractor=names, weights=(f"{named}=s3://b/a=b.safetensors", "torchvision/resnet18=none"))
        assert [both.weights_of(name) for name in names] == ["s3://b/a=b.safetensors", "none"]
    with pytest.raises(RequestError, match="give EXTRACTOR=URI"):
        job(extractor=names, weights=("cnn_lstm,rnn=lstm=w.safetensors",))
