"""Whole trainings on a real Ray: what they leave behind, going on after a kill, and what they refuse."""

import dataclasses
import hashlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

import featurex_ray as fx
from featurex_ray.errors import RequestError, RunError, WeightsError
from featurex_ray.models.registry import resolve
from featurex_ray.models.weights import read_card
from featurex_ray.training.job import TrainingJob
from featurex_ray.training.outputs import MetricsLog, OutputFolder
from featurex_ray.training.run import TrainingReport, _claim, _ended, _Listener, make_card, prepare, train

pytestmark = pytest.mark.usefixtures("local_ray")


def job(manifest: Path, output: Path | str, **options: Any) -> TrainingJob:
    plain: dict[str, Any] = {
        "extractor": "attention_convnet",
        "dataset": "d",
        "epochs": 3,
        "batch_size": 8,
        "lr": 0.03,
        "optimizer": "sgd",
        "validation_share": 0.25,
    }
    return TrainingJob(manifest=str(manifest), output=str(output), **plain | options)


def test_a_training_leaves_weights_with_a_card_that_extraction_takes(
    pictures: Path, tmp_path: Path, s3_root: str
) -> None:
    """On S3: weights, card, metrics, plot, TensorBoard; and the features are those of the weights."""
    said: list[str] = []
    report = train(job(pictures, f"{s3_root}/trained", group_column="scene"), say=said.append)
    assert report.weights == f"{s3_root}/trained/weights.safetensors"
    assert any("left out 1 that failed" in line for line in said)
    assert any("epoch 3/3" in line and "s left" in line for line in said)

    import fsspec

    files = fsspec.filesystem("s3")
    root = s3_root.removeprefix("s3://")
    weights = files.cat(f"{root}/trained/weights.safetensors")
    card = read_card(report.weights)
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["classes"] == ["blue", "green", "red"]
    assert card["data"]["num_samples"] + card["data"]["num_validation_samples"] == 49
    assert card["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert np.sum(card["metrics"]["confusion"]) == card["data"]["num_validation_samples"]
    lines = files.cat(f"{root}/trained/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert files.cat(f"{root}/trained/metrics.png").startswith(b"\x89PNG")
    assert files.glob(f"{root}/trained/tensorboard/events*")

    resolved = resolve("attention_convnet", weights=report.weights)
    assert resolved.spec.weights.sha256 == card["sha256"]
    fx.run(
        fx.ExtractionJob(
            manifest=str(pictures),
            output=str(tmp_path / "features"),
            extractor="attention_convnet",
            dataset="d",
            weights=(report.weights,),
        )
    )
    table = fx.open_table(str(tmp_path / "features/attention_convnet"))
    assert table.facts.extractor["weights"]["sha256"] == card["sha256"]
    with pytest.raises(RequestError, match="holds a training: --resume"):
        train(job(pictures, f"{s3_root}/trained", group_column="scene"))
    with pytest.raises(RequestError, match="with another lr"):
        train(job(pictures, f"{s3_root}/trained", group_column="scene", lr=0.1, resume=True))


@pytest.mark.parametrize(
    ("mode", "prefix", "keeps"),
    [("finetune", "", True), ("finetune", "very ", False), ("head-only", "", False)],
)
def test_a_classifier_is_gone_on_from_for_the_classes_of_its_card(
    mode: str, prefix: str, keeps: bool, tmp_path: Path
) -> None:
    classes = read_card("attention_convnet")["classes"]
    rows = [{"uri": f"{label}.png", "label": prefix + label} for label in classes]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    options = {"mode": mode, "validation_share": 0.0}
    assert prepare(job(tmp_path / "m.parquet", tmp_path / "out", **options)).keeps_head is keeps


@pytest.mark.long
def test_fine_tuning_starts_where_the_weights_training_ended(pictures: Path, tmp_path: Path) -> None:
    """The second of the two steps, at a rate that changes nothing: the loss is the first's last one."""
    first = train(job(pictures, tmp_path / "first", epochs=6))
    said: list[str] = []
    options = {"mode": "finetune", "weights": first.weights, "epochs": 1, "lr": 1e-9}
    second = train(job(pictures, tmp_path / "second", **options), say=said.append)
    assert "3 classes, going on from the weights' own classifier" in said[0]
    ended = first.history[-1]["validation_loss"]
    assert second.history[0]["validation_loss"] == pytest.approx(ended, rel=1e-4)


DRIVER = """
import sys
from tests.training.test_run import job
from featurex_ray.training.run import train
train(job(*sys.argv[1:], epochs=15, augment="flip,shift:1"))
"""


@pytest.mark.long
def test_killed_and_resumed_it_ends_with_the_weights_of_a_training_that_was_not(
    pictures: Path, tmp_path: Path
) -> None:
    """Killed after some epochs; the rest gives the very weights, with one worker."""
    killed = tmp_path / "killed"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(pictures), str(killed)],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    # Ray Train registers a reported epoch a moment later; what it has not registered is done again.
    while not (killed / "state" / "checkpoint_manager_snapshot.json").exists():
        assert driver.poll() is None, "the driver ended before an epoch was registered"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()

    said: list[str] = []
    options = {"epochs": 15, "augment": "flip,shift:1"}
    train(job(pictures, killed, resume=True, **options), say=said.append)
    resumed = next(int(line.split()[-1]) for line in said if line.startswith("going on after epoch"))
    assert 1 <= resumed < 15
    history = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == list(range(1, 16))
    train(job(pictures, tmp_path / "whole", **options))
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]


@pytest.mark.long
def test_two_workers_train_together(pictures: Path, tmp_path: Path) -> None:
    # By scenes, whose names don't change: by files, the broken one is now on this side, now on that.
    report = train(job(pictures, tmp_path / "out", workers=2, epochs=8, group_column="scene"))
    assert report.history[-1]["train_loss"] < report.history[0]["train_loss"]
    # Each sample that could be used was seen by one of the two.
    (last,) = report.history[-1:]
    assert np.sum(last["confusion"]) == report.card["data"]["num_validation_samples"]


@pytest.mark.long
def test_a_loss_that_is_no_number_stops_it_and_keeps_the_last_good_weights(
    pictures: Path, tmp_path: Path
) -> None:
    """One step an epoch, at rates that rise until the scores overflow."""
    wild = {"lr": 1e3, "batch_size": 36, "schedule": "constant", "warmup": 0.9, "epochs": 8}
    with pytest.raises(RunError, match=r"no number any more at step \d+ .*lower --lr") as raised:
        train(job(pictures, tmp_path / "out", **wild))
    kept = re.search(r"the weights of epoch (\d+) are kept", str(raised.value))
    assert kept is not None
    card = read_card(str(tmp_path / "out/weights.safetensors"))
    assert 1 <= card["metrics"]["epoch"] == int(kept[1]) < 8
    stored = safetensors.numpy.load_file(tmp_path / "out/weights.safetensors")
    assert all(np.isfinite(values).all() for values in stored.values())


def test_too_many_failures_fail_and_leave_the_output_to_the_corrected_command(
    pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"1 of \d+ samples can't be used \(truncated 1\)"):
        train(job(pictures, tmp_path / "out", max_failure_rate=0.0, validation_share=0.0))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_metrics_that_cannot_be_written_change_nothing_in_the_card(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").write_text("no folder")
    said: list[str] = []
    report = train(job(pictures, tmp_path / "out", epochs=2), say=said.append)
    assert [row["epoch"] for row in report.history] == [1, 2]
    card = json.loads((tmp_path / "out/weights.json").read_text())
    assert card["metrics"] == report.history[-1]
    (line,) = [line for line in said if line.startswith("no metrics for now")]
    assert re.search("can't write '.*/out/tensorboard/events", line)


def epoch(number: int) -> dict[str, Any]:
    return {"epoch": number, "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 1.0}


def test_a_write_of_metrics_that_fails_is_made_up_for_and_what_follows_is_heard(tmp_path: Path) -> None:
    place = tmp_path / "tensorboard"
    place.write_text("no folder")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("epoch 2/"):
            place.unlink()

    news: Any = queue.Queue()  # a process's own has what is used of Ray's
    listener = _Listener(news, MetricsLog(OutputFolder(str(tmp_path))), 4, say)
    for item in (*map(epoch, (1, 2, 3)), {"epoch": 4, "diverged_step": 7}):
        news.put(item)
    listener.start()
    listener.end()
    assert listener.diverged == {"epoch": 4, "diverged_step": 7}
    assert [line.split(":")[0] for line in said] == [
        "no metrics for now",
        *(f"epoch {n}/4" for n in (1, 2, 3)),
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert list(place.glob("events*"))


@pytest.mark.parametrize(
    ("done", "diverged", "message"),
    [
        (2, None, "before its 3 epochs were done: the weights of epoch 2 are kept; --resume goes on"),
        (0, None, "before its 3 epochs were done: no epoch was completed"),
        (2, {"epoch": 3, "diverged_step": 9}, r"step 9 \(epoch 3\): lower --lr; the weights of epoch 2 are"),
        (0, {"epoch": 1, "diverged_step": 1}, r"step 1 \(epoch 1\): lower --lr; no epoch was completed"),
    ],
)
def test_a_training_without_all_of_its_epochs_fails(
    done: int, diverged: dict[str, Any] | None, message: str
) -> None:
    report = TrainingReport("w", {}, [epoch(n + 1) for n in range(done)]) if done else None
    with pytest.raises(RunError, match=message):
        _ended(report, diverged, epochs=3)


@pytest.mark.parametrize("mode", ["finetune", "head-only"])
def test_a_mode_that_starts_from_weights_needs_some(pictures: Path, tmp_path: Path, mode: str) -> None:
    with pytest.raises(WeightsError, match=f"--mode {mode} starts from weights, and .* has none"):
        train(job(pictures, tmp_path / "out", extractor="attention_convnet,attention=no", mode=mode))
    assert not (tmp_path / "out").exists()


def test_what_a_training_keeps_of_its_job_holds_no_secrets_and_says_what_lay_there(
    pictures: Path, tmp_path: Path
) -> None:
    made = prepare(job(pictures, tmp_path / "out", mode="finetune"))
    signed = dataclasses.replace(
        made, job=dataclasses.replace(made.job, weights="https://host/w.safetensors?token=SECRET")
    )
    _claim(signed)
    kept = json.loads((tmp_path / "out" / "training.json").read_text())
    assert "SECRET" not in json.dumps(kept) + json.dumps(make_card(signed, [], "0"))
    assert made.resolved.weights is not None
    assert kept["weights_sha256"] == made.resolved.weights.sha256
    others = dataclasses.replace(made.resolved.weights, sha256="f" * 64)
    retrained = dataclasses.replace(
        signed,
        job=dataclasses.replace(signed.job, resume=True),
        resolved=dataclasses.replace(made.resolved, weights=others),
    )
    with pytest.raises(RequestError, match="a training with another weights_sha256"):
        _claim(retrained)
