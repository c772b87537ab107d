"""What a benchmark counts, and that its peers do the same work."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from featurex_ray.benchmark import measure
from featurex_ray.benchmark.alone import Costs, StageCost, measure_alone, measure_on_all_cpus
from featurex_ray.benchmark.contenders import Contender, Timed
from featurex_ray.benchmark.latency import SlowProxy
from featurex_ray.benchmark.measure import Benchmark, Settings, benchmark
from featurex_ray.benchmark.peers import batch_of, dataloader
from featurex_ray.benchmark.plot import plot_occupancy
from featurex_ray.benchmark.work import Pieces, planned
from featurex_ray.cli import cli
from featurex_ray.demo import MEDIA
from featurex_ray.errors import RequestError
from featurex_ray.media.image import decode_image
from featurex_ray.media.limits import DEFAULT_LIMITS
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import resolve
from featurex_ray.storage import ReadPolicy
from tests.models.own import MeanColour

GOOD_IMAGE = str(MEDIA / "images" / "astronaut.jpg")


def test_the_steady_rate_leaves_out_start_and_end() -> None:
    large = [Timed(4000, seconds) for seconds in (50.0, 30.0, 99.0)]
    contender = Contender("x", [], small=[Timed(1000, 20.0)] * 3, large=large)
    assert contender.steady_rate == pytest.approx(3000 / 30)
    assert contender.startup_seconds == pytest.approx(10.0)
    assert contender.whole_rate == pytest.approx(4000 / 50)


def test_runs_too_short_to_tell_say_so() -> None:
    contender = Contender("x", [], small=[Timed(10, 15.0)], large=[Timed(40, 14.0)])
    assert math.isnan(contender.steady_rate)
    told = contender.to_json()
    assert (told["steady_rate"], told["startup_seconds"]) == (None, None)


@pytest.mark.parametrize(("device", "bound"), [("cpu", 2 / 0.040), ("cuda:0", 1 / 0.030)])
def test_the_bound(device: str, bound: float) -> None:
    stage = StageCost(0.005, 0.005)
    costs = Costs(10, stage, stage, {"a": StageCost(0.010, 0.010), "b": StageCost(0.020, 0.020)}, device)
    assert costs.bound(2) == pytest.approx(bound)


def costs_of_one_process(told: Path, *, begin: Callable[[], object]) -> Costs:
    """Costs that no other process has: its own draw, which it leaves in a file of its own."""
    begin()
    drawn = random.SystemRandom().random()
    told.joinpath(f"{os.getpid()}").write_text(repr(drawn))
    here = StageCost(drawn, 2 * drawn)
    return Costs(7, here, here, {"a": here}, "cpu")


def test_the_stages_on_all_cpus_are_the_mean_of_as_many_processes(tmp_path: Path) -> None:
    found = measure_on_all_cpus(partial(costs_of_one_process, tmp_path), 2)
    drawn = {int(told.name): float(told.read_text()) for told in tmp_path.iterdir()}
    assert len(drawn) == 2
    assert os.getpid() not in drawn
    mean = statistics.mean(drawn.values())
    assert found.samples == 7
    assert found.fetch.cpu_seconds == pytest.approx(mean)
    assert found.fetch.seconds == pytest.approx(2 * mean)
    assert found.embed["a"] == found.decode == found.fetch


def test_the_bound_is_that_of_busy_cpus() -> None:
    result = benchmark(
        Settings(str(MEDIA / "images"), extractors=["attention_convnet"], with_ray=False), print
    )
    assert result.busy is not None
    assert len(result.all_cpus) == 1
    assert result.bound == result.busy.bound(result.num_cpus)
    assert result.busy.samples == result.costs.samples


def test_the_bound_is_that_of_all_times() -> None:
    slow, fast = (Costs(1, *[StageCost(s, s)] * 2, {"a": StageCost(s, s)}, "cpu") for s in (0.003, 0.001))
    result = Benchmark(Settings("media"), "fp32", 2, slow, [slow, fast])
    assert result.bound == pytest.approx(2 / (3 * 0.002))


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        ("cnn_lstm,backbone=squeezenet1_1,hidden=16", "takes videos, and all of the media are images"),
        ("tests.models.own:NotANumber", "embeds none of the media; the first: non_finite"),
    ],
)
def test_media_that_all_fail_are_refused(tmp_path: Path, extractor: str, message: str) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "black.png")
    with pytest.raises(RequestError, match=message):
        benchmark(Settings(str(tmp_path), extractors=[extractor], with_ray=False), print)


class Slow(MeanColour):
    """Takes its time for each batch."""

    seconds = 0.5

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().__call__(frames)


def test_all_stages_cost_a_sample_of_those_that_were_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(Path(GOOD_IMAGE).read_bytes())
    for name in ("b.jpg", "c.jpg", "d.jpg", "e.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    pieces = Pieces.of(str(tmp_path), tmp_path)
    manifest = str(pieces.manifest(tmp_path / "m.parquet", 5))
    costs = measure_alone(
        planned(manifest, 5),
        [resolve("tests.benchmark.test_benchmark:Slow")],
        policy=ReadPolicy(manifest),
        sampling="uniform:16",
        precision="fp32",
        device="cpu",
        batch_size=None,
    )
    assert costs.samples == 5
    (embed,) = costs.embed.values()
    assert Slow.seconds / 5 <= embed.seconds < Slow.seconds


def reported(folder: Path, *tables: dict[str, Any]) -> Contender:
    """Ours, by a process that leaves such a report and does nothing else."""
    known = {name: sum(table[name] for table in tables) for name in ("planned", "failed")}
    (folder / "report.json").write_text(json.dumps(known | {"tables": tables}))
    script = folder / "leave.py"
    script.write_text(
        "import sys, shutil; from pathlib import Path\n"
        "runs = Path(sys.argv[2], '_featurex', 'table', 'runs'); runs.mkdir(parents=True)\n"
        "shutil.copy(sys.argv[1], runs / 'run.json')\n"
    )
    command = [sys.executable, str(script), str(folder / "report.json"), "{output}"]
    return Contender("x", command, is_ours=True)


def test_a_run_tells_what_failed(tmp_path: Path) -> None:
    good = {"extractor": "a", "planned": 8, "failed": 0, "failures_by_code": {}}
    bad = {"extractor": "b", "planned": 8, "failed": 4, "failures_by_code": {"truncated": 3, "not_found": 1}}
    run = reported(tmp_path, good, bad).timed("m", 8, str(tmp_path / "some"))
    assert run.failures == "25.0% of the samples failed: truncated 3, not_found 1"
    assert reported(tmp_path, good).timed("m", 8, str(tmp_path / "none")).failures == ""
    assert Timed(8, 1.0).failures == ""


def test_a_run_in_which_all_failed_measures_nothing(tmp_path: Path) -> None:
    good = {"extractor": "a", "planned": 8, "failed": 0, "failures_by_code": {}}
    bad = {"extractor": "b", "planned": 8, "failed": 8, "failures_by_code": {"unsupported_media": 8}}
    with pytest.raises(RequestError, match="b failed on all 8 samples: unsupported_media 8"):
        reported(tmp_path, good, bad).timed("m", 8, str(tmp_path / "all"))


def test_media_are_used_again_where_they_are_too_few(tmp_path: Path) -> None:
    pieces = Pieces.of(str(MEDIA / "images"), tmp_path)
    manifest = pq.read_table(pieces.manifest(tmp_path / "m.parquet", 100))
    assert len(set(manifest["sample_id"].to_pylist())) == 100
    assert set(manifest["uri"].to_pylist()) == set(pieces.rows["uri"].to_pylist())


def test_a_manifest_names_media_beside_it(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (9, 80, 80)).save(tmp_path / "a.png")
    pq.write_table(pa.table({"uri": ["a.png"]}), tmp_path / "m.parquet")
    settings = Settings(str(tmp_path / "m.parquet"), extractors=["attention_convnet"], with_ray=False)
    # Of one small picture the first imports would be all of the cost.
    assert benchmark(settings, print).costs.samples > 100
    assert Pieces.of(str(tmp_path / "m.parquet"), tmp_path).prefix == f"{tmp_path}/"


def test_peers_are_not_compared_with_a_cluster_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_machine", lambda _: (4096, 1))
    settings = Settings(str(MEDIA / "images"), extractors=["attention_convnet"], compare=["dataloader"])
    with pytest.raises(RequestError, match="ours on a cluster of 4096"):
        benchmark(settings, print)


def test_the_bound_of_several_gpus_is_theirs_together() -> None:
    stage = StageCost(0.0001, 0.0001)
    costs = Costs(10, stage, stage, {"a": StageCost(0.010, 0.010)}, "cuda:0")
    assert costs.bound(64, 4) == pytest.approx(400)


def test_a_manifest_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"data": pa.array([], pa.binary())}), tmp_path / "m.parquet")
    with pytest.raises(RequestError, match="no rows"):
        benchmark(Settings(media=str(tmp_path / "m.parquet")), print)


def test_delayed_gets_of_inline_media_are_refused_before_any_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"data": [b"x"]}), tmp_path / "m.parquet")
    with pytest.raises(RequestError, match="--latency-ms"):
        benchmark(Settings(media=str(tmp_path / "m.parquet"), latency_ms=5.0), print)


def test_a_manifest_without_media_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg"]}), tmp_path / "m.parquet")
    with pytest.raises(RequestError, match="`data` nor a `uri`"):
        benchmark(Settings(media=str(tmp_path / "m.parquet")), print)


def test_the_stages_alone(tmp_path: Path) -> None:
    extractors = ["attention_convnet", "torchvision/squeezenet1_0"]
    options = [word for name in extractors for word in ("--extractor", name)]
    figures = tmp_path / "figures.json"
    command = ["benchmark", "--no-ray", *options, "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "-m", "featurex_ray.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(figures.read_text())
    assert list(found["costs"]["embed"]) == extractors
    assert found["bound"] > 0
    assert "not measured" in done.stdout
    assert "leaked" not in done.stderr  # as torch's extensions say of what is never collected


def test_the_proxy_delays_gets_and_nothing_else() -> None:
    class Echo(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"got")

        def do_PUT(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = SlowProxy(server.server_port)
    url = f"http://127.0.0.1:{proxy.start()}/"
    proxy.delay_seconds = 0.5

    def ask(method: str, body: bytes | None = None) -> tuple[bytes, float]:
        start = time.monotonic()
        with urllib.request.urlopen(urllib.request.Request(url, body, method=method)) as answer:
            return answer.read(), time.monotonic() - start

    got, seconds = ask("GET")
    assert got == b"got"
    assert seconds >= 0.5
    body = bytes(1 << 20)
    assert ask("PUT", body)[0] == body
    proxy.stop()
    server.shutdown()
    server.server_close()


def test_the_dataloader_peer_computes_the_same_features(tmp_path: Path) -> None:
    manifest = str(tmp_path / "m.parquet")
    pq.write_table(pa.table({"uri": [GOOD_IMAGE], "sample_id": ["a"], "dataset": ["d"]}), manifest)
    dataloader(manifest, str(tmp_path / "theirs.parquet"), "torchvision/resnet18", "none", 1)
    theirs = np.array(pq.read_table(tmp_path / "theirs.parquet")["feature"].to_pylist())[0]
    extractor = resolve("torchvision/resnet18", weights="none")
    image = decode_image(Path(GOOD_IMAGE).read_bytes(), inputs=(extractor.spec.input,), limits=DEFAULT_LIMITS)
    ours = Embedder(extractor, precision="fp32").embed(image.frames[0][None], np.array([1])).feature[0]
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 0.99  # they resize by other rules


@pytest.mark.parametrize(
    ("media", "extractor", "samples"),
    [
        ("images/astronaut.jpg", "torchvision/resnet18", 64),
        ("images/astronaut.jpg", "attention_convnet", 512),
        ("videos/bikes.mp4", "torchvision/resnet18", 4),
        ("videos/bikes.mp4", "torchvision/efficientnet_b7", 1),
    ],
)
def test_a_peers_batch_suits_the_pictures(media: str, extractor: str, samples: int) -> None:
    rows = pa.table({"uri": [str(MEDIA / media)]})
    assert batch_of(rows, resolve(extractor, weights="none").spec) == samples


def test_occupancy_is_drawn() -> None:
    occupancy = {"seconds": [0, 1, 2], "decode": [0, 2, 1], "extract": [0, 1, 2], "samples": [0, 5, 9]}
    assert plot_occupancy(occupancy, title="t").startswith(b"\x89PNG")


def test_media_at_which_peers_would_stop_are_left_out_where_they_are_compared(tmp_path: Path) -> None:
    for name in ("images/astronaut.jpg", "images/cut-off.jpg", "videos/coffee-pan.webm"):
        (tmp_path / Path(name).name).write_bytes((MEDIA / name).read_bytes())
    settings = Settings(
        str(tmp_path), extractors=["attention_convnet"], with_ray=False, compare=["dataloader"]
    )
    told: list[str] = []
    benchmark(settings, told.append)
    assert told[0].startswith("left out 2 of 3 media: peers stop at what isn't a whole image")
    for name in ("astronaut.jpg", "coffee-pan.webm"):
        (tmp_path / name).unlink()
    with pytest.raises(RequestError, match="none of the 1 media can be decoded"):
        benchmark(settings, told.append)


@pytest.mark.long
def test_a_whole_benchmark(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "occupancy.png"
    options = "--extractor attention_convnet --samples 400 --compare --latency-ms 20"
    done = CliRunner().invoke(cli, f"benchmark {options} --json {figures} --plot {plot}".split())
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text())
    assert [len(each["large"]) for each in found["contenders"] + found["slow"]] == [1] * 5
    assert plot.read_bytes().startswith(b"\x89PNG")
