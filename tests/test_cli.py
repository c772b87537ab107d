"""The command line: what it teaches, what it refuses, and the exit codes that schedulers rely on."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from featurex_ray.cli import cli, with_job_options
from featurex_ray.job import option_fields

BASE = ["--extractor", "attention_convnet"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "a.png")
    path = tmp_path / "m.csv"
    path.write_text(f"uri,dataset\n{tmp_path}/a.png,d\n")
    return path


def test_help_shows_every_option_with_its_default() -> None:
    text = run("extract", "--help").output
    for field in option_fields():
        if field.name != "manifest":
            assert "--" + field.name.replace("_", "-") in text
    assert "250000" in text
    assert re.search(r"default:\s+0\.1", text)
    assert "Exit codes" in text


@pytest.mark.parametrize(
    "command",
    ["demo", "manifest", "extract", "verify", "status", "extractors", "query", "search", "benchmark"],
)
def test_every_command_explains_itself(command: str) -> None:
    found = run(command, "--help")
    assert found.exit_code == 0
    assert len(found.output) > 100


def test_extractors_are_listed() -> None:
    rows = [json.loads(line) for line in run("extractors", "--json").output.splitlines()]
    by_name = {row["name"]: row for row in rows}
    assert by_name["attention_convnet"]["dimension"] == 84
    assert by_name["torchvision/resnet18"]["dimension"] == 512
    assert by_name["torchvision/r3d_18"]["media"] == "video"
    assert "cnn_lstm" in run("extractors").output


def test_a_dry_run_writes_nothing(manifest: Path, tmp_path: Path) -> None:
    found = run("extract", manifest, "--output", tmp_path / "out", *BASE, "--dry-run")
    assert found.exit_code == 0
    assert "new 1" in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extractor", ["attention_convnet", "[attention_convnet]"])
def test_a_config_file_gives_options_and_flags_win(extractor: str, manifest: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(f"output: {tmp_path}/out\nextractor: {extractor}\ntable: from-file\n")
    assert "from-file: new 1" in run("extract", manifest, "--config", config, "--dry-run").output
    flagged = run("extract", manifest, "--config", config, "--table", "from-flag", "--dry-run")
    assert "from-flag: new 1" in flagged.output


def test_a_config_file_is_read_as_people_mean_it(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(
        f"output: {tmp_path}/out\nextractor: attention_convnet\ndecode-actors: 2:8\nextract-actors: 010\n"
        "max-failure-rate: .5\nbatch-size: 32\ndecode-seconds: 1e2\n"
    )

    @click.command()
    @with_job_options
    def show(**options: Any) -> None:
        click.echo(json.dumps(options, default=str))

    shown = CliRunner().invoke(show, ["--config", str(config)])
    found = json.loads(shown.output)
    assert (found["decode_actors"], found["extract_actors"]) == ("2:8", "010")
    assert (found["max_failure_rate"], found["batch_size"], found["decode_seconds"]) == (0.5, 32, 100.0)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("uri,dataset\n", BASE, "empty|no samples|no rows"),
        ("path,dataset\na.png,d\n", BASE, "uri"),
        ("uri,dataset\na.png,d\na.png,d\n", BASE, "a.png"),
        ("uri,dataset\na.png,a/b\n", BASE, "a/b"),
        ("uri,dataset\nhttp://example.com/a.png,d\n", BASE, "allow-prefix"),
        ("uri,dataset\na.png,d\n", ["--extractor", "resnet18"], "torchvision/resnet18"),
        ("uri,dataset\na.png,d\n", ["--extractor", "cnn_lstm,rnn=tcn"], "lstm or gru"),
        ("uri,dataset\na.png,d\n", [*BASE, "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        ("uri,dataset\na.png,d\n", [*BASE, "--sampling", "often"], "uniform:N"),
        ("uri,dataset\na.png,d\n", [*BASE, "--decode-actors", "9:1"], "MIN <= MAX"),
        ("uri,dataset\na.png,d\n", [], "--extractor"),
    ],
)
def test_a_wrong_request_exits_2_and_writes_nothing(
    content: str, options: list[str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.csv"
    path.write_text(content)
    found = run("extract", path, "--output", tmp_path / "out", *options)
    assert found.exit_code == 2, found.output
    assert re.search(message, found.output), found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"), [("gs://bucket/out", "gs://"), ("http://host/out", "http"), ("s3://", "s3://")]
)
def test_an_output_that_cannot_keep_the_promise_exits_2(manifest: Path, output: str, message: str) -> None:
    found = run("extract", manifest, "--output", output, *BASE)
    assert found.exit_code == 2
    assert message in found.output


def test_no_manifest_and_a_bad_config_exit_2(tmp_path: Path) -> None:
    missing = run("extract", tmp_path / "none.csv", "--output", tmp_path / "out", *BASE)
    assert missing.exit_code == 2
    assert "none.csv" in missing.output
    (tmp_path / "job.yaml").write_text("extractr: attention_convnet\n")
    unknown = run("extract", "m.csv", "--config", tmp_path / "job.yaml")
    assert unknown.exit_code == 2
    assert "extractr" in unknown.output


@pytest.mark.parametrize("command", [["query", "SELECT 1"], ["verify"], ["search", "--sample", "a"]])
def test_a_table_that_is_not_there_exits_2(command: list[str], tmp_path: Path) -> None:
    found = run(command[0], tmp_path / "none", *command[1:])
    assert found.exit_code == 2
    assert "none" in found.output


def test_weights_of_another_shape_exit_2(manifest: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(6, 3, 3, 3)}, tmp_path / "w.safetensors")
    found = run(
        "extract", manifest, "--output", tmp_path / "out", *BASE, "--weights", tmp_path / "w.safetensors"
    )
    assert found.exit_code == 2
    assert "conv1.weight" in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_extract_query_search_verify(tmp_path: Path) -> None:
    """The way of a first user, and exit 3 where too much failed."""
    (tmp_path / "media").mkdir()
    for name, colour in (("red", "red"), ("dark red", "darkred"), ("blue", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / "media" / f"{name}.jpg")
    (tmp_path / "media" / "broken.jpg").write_bytes(b"not an image")
    listed = run("manifest", tmp_path / "media", "--output", tmp_path / "m.parquet", "--dataset", "colours")
    assert "4 samples in dataset colours" in listed.output

    extract = ["extract", tmp_path / "m.parquet", "--output", tmp_path / "out", *BASE]
    first = run(*extract, "--max-failure-rate", "0.2")
    assert first.exit_code == 3, first.output
    assert "25.0% of the samples failed" in first.output
    assert "3 done, 1 failed" in first.output
    assert run(*extract).exit_code == 0

    table = tmp_path / "out" / "attention_convnet"
    counted = run("query", table, "SELECT count(*) AS n FROM features", "--format", "json")
    assert json.loads(counted.output) == {"n": 3}
    assert (
        "error\nunsupported_container"
        in run("query", table, "SELECT error FROM failures", "--format", "csv").output
    )
    wrong = run("query", table, "SELECT nothing FROM nowhere")
    assert wrong.exit_code == 2

    near = run("search", table, "--sample", "red.jpg", "-k", "1")
    assert "dark red.jpg" in near.output
    same = run("search", table, "--image", tmp_path / "media" / "blue.jpg", "-k", "1")
    assert "blue.jpg" in same.output
    assert run("search", table).exit_code == 2

    verified = run("verify", table, "--manifest", tmp_path / "m.parquet")
    assert verified.exit_code == 0, verified.output
    (tmp_path / "more.csv").write_text(f"uri,dataset\n{tmp_path}/other.png,colours\n")
    assert run("verify", table, "--manifest", tmp_path / "more.csv").exit_code == 1


def test_importing_the_package_imports_neither_torch_nor_ray() -> None:
    """Nor does planning need torch: it takes seconds to import."""
    code = """
import sys
import featurex_ray, featurex_ray.cli, featurex_ray.job
assert not {"torch", "ray", "av", "decord"} & set(sys.modules), "on import"
import featurex_ray.pipeline.run, featurex_ray.pipeline.execute
from featurex_ray.models.registry import resolve
resolve("cnn_lstm")
assert not {"torch", "decord"} & set(sys.modules), "for planning"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tables_carry_no_types_of_arrows_own(tmp_path: Path) -> None:
    from featurex_ray.schemas import FAILURES, features_schema

    schema = features_schema(pa.schema([pa.field("label", pa.string())]))
    for portable in (schema, FAILURES):
        pq.write_table(portable.empty_table(), tmp_path / "t.parquet", store_schema=False)
        assert pq.read_schema(tmp_path / "t.parquet").types == portable.types
