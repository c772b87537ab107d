"""How cost grows: the media that a sweep makes, what it concludes, and one small sweep for real."""

import json
from dataclasses import replace
from pathlib import Path

import av
import pytest
from click.testing import CliRunner
from PIL import Image

from featurex_ray.benchmark.sweep import Point, Sweep, write_photograph, write_video
from featurex_ray.cli import cli


def point(value: float, seconds: float) -> Point:
    stages = {"decode": seconds / 4, "extract": seconds * 3 / 4}
    return Point(value, 100, seconds / 2, 9.0, stages, 0.04, {"decode": 1 << 28, "driver": 1 << 27})


def test_linear_growth_is_the_power_of_one() -> None:
    assert Sweep("samples", [point(n, n / 50) for n in (100, 1000, 10_000)]).exponent == pytest.approx(1)
    assert Sweep("samples", [point(n, n**2 / 50) for n in (10, 100, 1000)]).exponent == pytest.approx(2)


def test_a_sweep_is_a_table_and_a_picture(tmp_path: Path) -> None:
    found = Sweep("samples", [point(100, 2.0), point(1000, 20.0)])
    assert "power of 1.00" in "\n".join(found.lines())
    (tmp_path / "sweep.png").write_bytes(found.plot())
    assert Image.open(tmp_path / "sweep.png").size[0] > 800


def test_a_sweep_tells_what_failed() -> None:
    found = Sweep(
        "samples", [point(100, 2.0), replace(point(1000, 20.0), failures="1.0% of the samples failed")]
    )
    assert "1000 samples: 1.0% of the samples failed" in list(found.lines())
    assert not [line for line in found.lines() if line.startswith("100 samples")]


def test_the_media_are_of_the_size_and_length_that_they_say(tmp_path: Path) -> None:
    path, megapixels = write_photograph(tmp_path / "photo", 300)
    assert (Image.open(path).size, megapixels) == ((300, 200), pytest.approx(0.06))
    path, seconds = write_video(tmp_path / "film", 2)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = sum(1 for _ in container.decode(stream))
    assert (shown, seconds) == (50, 2.0)


def test_too_few_samples_are_refused_before_any_run() -> None:
    told = CliRunner().invoke(cli, ["benchmark", "--sweep", "samples", "--samples", "1000"])
    assert told.exit_code == 2


@pytest.mark.long
def test_a_sweep_over_actors(tmp_path: Path) -> None:
    options = ["--sweep", "actors", "--samples", "64", "--extractor", "attention_convnet"]
    told = CliRunner().invoke(cli, ["benchmark", *options, "--json", str(tmp_path / "sweep.json")])
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [p["value"] for p in found["points"]] == [1, 2, 3, 4]
    assert all(p["driver_cpu_ms"] > 0 and p["stage_seconds"]["extract"] > 0 for p in found["points"])
