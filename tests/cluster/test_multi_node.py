"""A real cluster of several nodes on one machine: nodes are killed, another joins late, no row differs.

Each node is processes of its own, with an address, a CPU and a logical GPU; the head runs no work, and all
of it needs a token. `FEATUREX_KILLS=10 pytest -m long tests/cluster/test_multi_node.py` kills more of them.
"""

import json
import os
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import featurex_ray as fx
from featurex_ray.manifest import build_manifest
from featurex_ray.table.verify import verify_table
from tests.cluster.nodes import BIN, Cluster, Node, cluster, wait_until
from tests.conftest import CHECKOUT

KILLS = int(os.environ.get("FEATUREX_KILLS", "2"))
IMAGES = 150 * KILLS + 250
"""Two extract calls at least between kills, and some for who joins last."""
EXTRACTOR = "tests.pipeline.own:Steady"
TABLE = "tests.pipeline.own-Steady"
OPTIONS = ["--extractor", EXTRACTOR, "--precision", "fp32", "--max-samples-per-plan", "100"]


@pytest.fixture(scope="module")
def nodes(s3_server: str) -> Iterator[Cluster]:
    assert os.environ["AWS_ENDPOINT_URL"] == s3_server
    with cluster() as found:
        found.add_worker()
        found.add_worker()
        status = str(BIN / "ray"), "status", "--address", f"127.0.0.1:{found.gcs_port}"
        wait_until(lambda: "/2.0 GPU" in found.run(*status).stdout, "both workers")
        yield found


def status_of(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


def test_the_token_file_is_the_owners_alone(nodes: Cluster) -> None:
    token = nodes.home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text().strip()) >= 32


@pytest.mark.parametrize("token", [None, "wrong"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/jobs/", None),
        ("/api/jobs/", {"entrypoint": "echo hello"}),
        ("/nodes?view=summary", None),
        ("/api/cluster_status", None),
        ("/api/v0/actors", None),
        ("/api/v0/nodes", None),
    ],
)
def test_jobs_and_dashboard_answer_401_without_the_token(
    nodes: Cluster, path: str, body: dict[str, str] | None, token: str | None
) -> None:
    request = urllib.request.Request(
        nodes.jobs_address + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    assert status_of(request) in ((401,) if token is None else (401, 403))
    request.add_header("Authorization", f"Bearer {(nodes.home / '.ray/auth_token').read_text().strip()}")
    if body is None:
        assert status_of(request) == 200


def test_the_gcs_refuses_who_has_no_token(nodes: Cluster) -> None:
    address = f"127.0.0.1:{nodes.gcs_port}"
    refused = nodes.run(str(BIN / "ray"), "status", "--address", address, token=False)
    assert refused.returncode != 0
    assert "nauthenticated" in refused.stdout + refused.stderr or "401" in refused.stdout + refused.stderr
    assert nodes.run(str(BIN / "ray"), "status", "--address", address).returncode == 0


def test_submitting_without_a_token_fails(nodes: Cluster) -> None:
    submit = [str(BIN / "ray"), "job", "submit", "--address", nodes.jobs_address, "--", "echo", "hello"]
    found = nodes.run(*submit, token=False)
    assert found.returncode != 0
    assert "token" in found.stdout + found.stderr


def extract(nodes: Cluster, *arguments: str, token: bool = True) -> "subprocess.CompletedProcess[str]":
    """`featurex extract` from this machine on the cluster."""
    command = [str(BIN / "python"), "-m", "featurex_ray.cli", "extract", *arguments]
    address = [] if "--address" in arguments else ["--address", f"127.0.0.1:{nodes.gcs_port}"]
    return nodes.run(*command, *address, token=token)


@pytest.fixture
def manifest(tmp_path: Path, s3_root: str) -> str:
    media = pictures(tmp_path / "few", 2)
    fsspec.filesystem("s3").put(f"{media}/", f"{s3_root}/few/", recursive=True)
    build_manifest(f"{s3_root}/few", f"{s3_root}/few.parquet", dataset="few")
    return f"{s3_root}/few.parquet"


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ([], False, "if it wants a token, set RAY_AUTH_MODE=token"),
        (["--gpus-per-extract-actor", "9"], True, "--gpus-per-extract-actor 9, but the cluster has 2 GPUs"),
        (["--output", "{tmp}/out"], True, "is a local directory, and the cluster has"),
        (["--address", "127.0.0.1:1"], True, "no Ray cluster at 127.0.0.1:1: nothing listens there"),
    ],
)
def test_what_cannot_run_here_exits_2_before_any_work(
    nodes: Cluster, manifest: str, s3_root: str, tmp_path: Path, options: list[str], token: bool, message: str
) -> None:
    given = [option.format(tmp=tmp_path) for option in options]
    found = extract(nodes, manifest, "--output", f"{s3_root}/out", *OPTIONS, *given, token=token)
    assert found.returncode == 2, found.stdout + found.stderr
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
    assert not fsspec.filesystem("s3", use_listings_cache=False).glob(f"{s3_root}/out/{TABLE}/**")


def benchmark(nodes: Cluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(BIN / "python"), "jobs/benchmark.py", "--address", f"127.0.0.1:{nodes.gcs_port}"]
    return nodes.run(*command, "--extractor", "attention_convnet", *arguments)


def test_a_benchmark_of_several_hosts_wants_a_place_that_all_reach(nodes: Cluster) -> None:
    found = benchmark(nodes)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "the cluster has 3 hosts: give --scratch" in found.stderr


@pytest.mark.long
@pytest.mark.parametrize("inline", [False, True])
def test_a_benchmark_measures_the_cluster_and_leaves_nothing(
    nodes: Cluster, s3_root: str, tmp_path: Path, inline: bool
) -> None:
    media = pictures(tmp_path / "media", 60)
    files = fsspec.filesystem("s3", use_listings_cache=False)
    files.put(f"{media}/", f"{s3_root}/media/", recursive=True)
    if inline:
        pictured = [path.read_bytes() for path in sorted(media.iterdir())]
        with files.open(f"{s3_root}/inline.parquet", "wb") as opened:
            pq.write_table(pa.table({"data": pictured}), opened)
    named = f"{s3_root}/inline.parquet" if inline else f"{s3_root}/media"
    figures = tmp_path / "figures.json"
    wanted = ["--media", named, "--scratch", f"{s3_root}/scratch", "--samples", "800", "--json", str(figures)]
    found = benchmark(nodes, *wanted)
    assert found.returncode == 0, found.stdout + found.stderr
    told = json.loads(figures.read_text())
    assert (told["num_cpus"], told["num_gpus"]) == (2, 2)
    (run,) = told["contenders"]
    assert [each["samples"] for each in run["large"]] == [800]
    assert run["large"][0]["report"]["planned"] == 800
    assert not files.glob(f"{s3_root}/scratch/**")


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(11)
    for i in range(count):
        pixels = noise.integers(0, 256, (32, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    (folder / "broken.png").write_bytes(b"no image at all")
    return folder


def job_status(nodes: Cluster, job: str) -> str:
    token = (nodes.home / ".ray/auth_token").read_text().strip()
    request = urllib.request.Request(f"{nodes.jobs_address}/api/jobs/{job}")
    request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return str(found["status"])


def parts(root: str) -> int:
    files = fsspec.filesystem("s3", use_listings_cache=False)
    return len(files.glob(f"{root}/_featurex/{TABLE}/staging/**/*.parquet"))


def logs(nodes: Cluster, job: str) -> str:
    return nodes.run(str(BIN / "ray"), "job", "logs", "--address", nodes.jobs_address, job).stdout


def rows(root: str) -> pa.Table:
    table = fx.open_table(f"{root}/{TABLE}").to_arrow()
    return table.drop_columns(["run_id"]).sort_by([("sample_id", "ascending"), ("clip_index", "ascending")])


@pytest.mark.long
def test_workers_are_killed_and_replaced_and_the_table_is_that_of_one_node(
    nodes: Cluster, s3_root: str, tmp_path: Path
) -> None:
    media = pictures(tmp_path / "media", IMAGES)
    fsspec.filesystem("s3").put(f"{media}/", f"{s3_root}/media/", recursive=True)
    manifest = f"{s3_root}/m.parquet"
    build_manifest(f"{s3_root}/media", manifest, dataset="noise")

    submitted = nodes.run(
        str(BIN / "ray"), "job", "submit", "--address", nodes.jobs_address, "--no-wait",
        "--submission-id", "killed", "--working-dir", str(CHECKOUT), "--",
        "python", "jobs/extract.py", manifest, "--output", f"{s3_root}/cluster", *OPTIONS,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    worked: list[Node] = []
    for _ in range(KILLS):
        before = parts(f"{s3_root}/cluster")

        def has_gone_on(before: int = before) -> bool:
            assert job_status(nodes, "killed") in ("PENDING", "RUNNING"), logs(nodes, "killed")
            return parts(f"{s3_root}/cluster") > before

        wait_until(has_gone_on, "something staged", seconds=240)
        worked += [node for node in nodes.workers if node.is_extracting()]
        busy = [node for node in nodes.workers if node.is_extracting()]
        nodes.kill_worker((busy or nodes.workers)[0])
        nodes.add_worker()

    def is_over() -> bool:
        worked.extend(node for node in nodes.workers if node.is_extracting())
        return job_status(nodes, "killed") not in ("PENDING", "RUNNING")

    wait_until(is_over, "the end of the job", seconds=600)
    log = logs(nodes, "killed")
    assert job_status(nodes, "killed") == "SUCCEEDED", log
    late = {node.address for node in worked} - {"127.0.0.11", "127.0.0.12"}
    assert late, "no node that joined late took work"

    alone = single_node(manifest, f"{s3_root}/alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert len(rows(f"{s3_root}/alone")) == IMAGES
    assert rows(f"{s3_root}/cluster").equals(rows(f"{s3_root}/alone"))
    assert verify_table(f"{s3_root}/cluster/{TABLE}", manifest=manifest).ok


@pytest.mark.long
def test_a_stopped_job_says_so_and_keeps_what_it_staged(nodes: Cluster, s3_root: str, tmp_path: Path) -> None:
    media = pictures(tmp_path / "media", 600)
    fsspec.filesystem("s3").put(f"{media}/", f"{s3_root}/media/", recursive=True)
    build_manifest(f"{s3_root}/media", f"{s3_root}/m.parquet", dataset="noise")
    ray = [str(BIN / "ray"), "job"]
    address = ["--address", nodes.jobs_address]
    job = ["python", "jobs/extract.py", f"{s3_root}/m.parquet", "--output", f"{s3_root}/cluster", *OPTIONS]
    submit = ["submit", *address, "--no-wait", "--submission-id", "stopped", "--working-dir", str(CHECKOUT)]
    assert nodes.run(*ray, *submit, "--", *job).returncode == 0
    wait_until(lambda: parts(f"{s3_root}/cluster") > 0, "something staged", seconds=240)
    nodes.run(*ray, "stop", *address, "stopped")
    wait_until(lambda: job_status(nodes, "stopped") == "STOPPED", "the end of the job")
    assert "stopped; what is done is kept" in logs(nodes, "stopped")
    assert parts(f"{s3_root}/cluster") > 0


def single_node(manifest: str, output: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [BIN / "python", "jobs/extract.py", manifest, "--output", output, *OPTIONS],
        cwd=CHECKOUT,
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
