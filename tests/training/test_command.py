"""`featurex train`: what is refused before anything is written, with exit code 2."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from featurex_ray.cli import cli
from featurex_ray.models.build import save_weights
from featurex_ray.models.classifier import build_classifier
from featurex_ray.models.registry import resolve

GOOD = [{"uri": "a.png", "label": "a"}, {"uri": "b.png", "label": "b"}]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"uri": "a.png"}], [], "no `label` column"),
        ([{"uri": "a.png", "label": "a"}], [], "only one class"),
        (GOOD, ["--extractor", "attention_cnn", "--backbone", "resnet81"], "did you mean resnet"),
        (GOOD, ["--mode", "head-only"], "there is no weights file"),
        (GOOD, ["--mode", "half"], "'half' is not one of"),
        (GOOD, ["--augment", "turn"], "--augment 'turn'"),
        (GOOD, ["--validation", "other.jsonl"], "labels that the training samples lack: 'c'"),
        (GOOD, ["--validation", "same.jsonl"], "media that are trained on"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_train_fails(rows: list[dict[str, str]], options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "other.jsonl").write_text(json.dumps({"uri": "c.png", "label": "c"}))
    (tmp_path / "same.jsonl").write_text(json.dumps(GOOD[1]))
    options = [str(tmp_path / o) if o.endswith(".jsonl") else o for o in options]
    if "head-only" in options:
        options += ["--weights", str(tmp_path / "none.safetensors")]
    base = [str(tmp_path / "m.jsonl"), "--dataset", "d", "--output", str(tmp_path / "out")]
    extractor = [] if "--extractor" in options else ["--extractor", "attention_convnet"]
    found = CliRunner().invoke(cli, ["train", *base, *extractor, *options])
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())
    assert not (tmp_path / "out").exists()


def test_weights_of_another_shape_name_the_layers(tmp_path: Path) -> None:
    other, _ = build_classifier(
        resolve("cnn_lstm,backbone=squeezenet1_1,hidden=8", weights="none"),
        num_classes=2,
        freeze=False,
        seed=0,
    )
    save_weights(other.extractor, str(tmp_path / "w.safetensors"))
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in GOOD))
    options = ["--extractor", "cnn_lstm,backbone=squeezenet1_1,hidden=16", "--mode", "finetune"]
    base = [str(tmp_path / "m.jsonl"), "--dataset", "d", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(cli, ["train", *base, *options, "--weights", str(tmp_path / "w.safetensors")])
    assert found.exit_code == 2
    assert "rnn.weight_ih_l0 is (32, 593), not (64, 593)" in " ".join(found.output.split())


def test_the_card_is_shown(tmp_path: Path) -> None:
    import hashlib

    net, _ = build_classifier(
        resolve("attention_convnet", weights="none"), num_classes=2, freeze=False, seed=0
    )
    path = tmp_path / "w.safetensors"
    save_weights(net.extractor, str(path))
    found = CliRunner().invoke(cli, ["extractors", "--weights", str(path)])
    assert found.exit_code == 2
    assert "no card" in found.output
    card = {"extractor": "attention_convnet", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "w.json").write_text(json.dumps(card))
    shown = CliRunner().invoke(cli, ["extractors", "--weights", str(path), "--json"])
    assert json.loads(shown.output) == card
    (tmp_path / "w.json").write_text(json.dumps(card | {"sha256": "0" * 64}))
    altered = CliRunner().invoke(cli, ["extractors", "--weights", str(path)])
    assert altered.exit_code == 2
    assert "its card says" in altered.output


def failed(manifest: Path, output: str) -> tuple[int, str]:
    manifest.write_text("\n".join(json.dumps(row) for row in GOOD))
    base = [str(manifest), "--dataset", "d", "--extractor", "attention_convnet", "--validation-share", "0"]
    found = CliRunner().invoke(cli, ["train", *base, "--output", output])
    return found.exit_code, " ".join(found.output.split())


def test_train_into_what_is_no_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    code, said = failed(tmp_path / "m.jsonl", str(tmp_path / "out"))
    assert (code, said) == (2, f"featurex: can't read '{tmp_path}/out/training.json': Not a directory")


@pytest.mark.usefixtures("s3_server")
def test_train_into_a_bucket_that_is_not_there_fails(tmp_path: Path) -> None:
    code, said = failed(tmp_path / "m.jsonl", "s3://there-is-none/out")
    assert code == 2
    assert said.startswith(
        "featurex: can't read 's3://there-is-none/out/training.json': The specified bucket"
    )


@pytest.mark.usefixtures("s3_server")
def test_train_without_credentials_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    code, said = failed(tmp_path / "m.jsonl", "s3://bucket/out")
    assert code == 2
    assert "training.json': no AWS credentials" in said


def test_train_into_a_store_that_does_not_answer_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "eu-west-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    code, said = failed(tmp_path / "m.jsonl", "s3://bucket/out")
    assert code == 1
    assert "can't read 's3://bucket/out/training.json': Could not connect" in said
