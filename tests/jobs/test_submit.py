"""The main job as people run it: submitted over HTTP to a Ray cluster that knows nothing of us."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest

import featurex_ray as fx
from featurex_ray.manifest import build_manifest
from featurex_ray.table.verify import verify_table
from tests.cluster.nodes import PATIENT, SECONDS_TO_START, answers, free_port
from tests.conftest import CHECKOUT

BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Told outright: whether Ray asks for one by itself depends on files in the home directory."""

KEY = {"AWS_SECRET_ACCESS_KEY": f"canary{secrets.token_hex(16)}"}

PAGES = ["api/jobs/", "logical/actors"]
"""What Ray's job API and dashboard tell of a job."""


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[str]:
    """The address of a head node's job server; the cluster finds the S3 server in its environment."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    dashboard = free_port()
    ports = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
    }
    head = subprocess.Popen(
        [
            BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--temp-dir={folder}",
            *(f"--{name}={port}" for name, port in ports.items()),
        ],
        env=os.environ
        | TOKEN
        | KEY
        | PATIENT
        | {"PATH": f"{BIN}:{os.environ['PATH']}", "AWS_ENDPOINT_URL": s3_server},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not answers(dashboard):
            assert head.poll() is None, "the head node ended at once"
            assert time.monotonic() < deadline, "the job server does not answer"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # the head's daemons and workers are of its group
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    address: str, *arguments: str, options: Sequence[str] = ("--working-dir", ".")
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [BIN / "ray", "job", "submit", "--address", address, *options, "--", "python", *arguments],
        cwd=CHECKOUT,
        env=os.environ | TOKEN,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def told(address: str, page: str) -> str:
    request = urllib.request.Request(f"{address}/{page}")
    request.add_header("Authorization", f"Bearer {TOKEN['RAY_AUTH_TOKEN']}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def test_the_main_job_is_submitted_to_a_cluster(cluster: str, bundled_media: Path, s3_root: str) -> None:
    fsspec.filesystem("s3").put(f"{bundled_media}/images/", f"{s3_root}/media/", recursive=True)
    manifest = f"{s3_root}/m.parquet"
    build_manifest(f"{s3_root}/media", manifest, dataset="photos")
    extract = ["jobs/extract.py", manifest, "--output", f"{s3_root}/out", "--extractor", "attention_convnet"]

    first = submit(cluster, *extract)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "attention_convnet: 12 done, 1 failed, 0 skipped" in first.stdout

    pages = {page: told(cluster, page) for page in PAGES}
    assert "jobs/extract.py" in pages["api/jobs/"]
    assert "DecodeSlices" in pages["logical/actors"]
    assert [page for page, text in pages.items() if KEY["AWS_SECRET_ACCESS_KEY"] in text] == []

    table = f"{s3_root}/out/attention_convnet"
    assert verify_table(table, manifest=manifest).ok
    rows = fx.open_table(table).query(
        "SELECT count(*) AS rows, count(DISTINCT sample_id) AS samples FROM features"
    )
    assert rows.to_pylist() == [{"rows": 12, "samples": 12}]

    again = submit(cluster, *extract)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 done, 0 failed, 13 skipped" in again.stdout


def test_a_wrong_request_fails_the_job_and_says_why(cluster: str, s3_root: str) -> None:
    found = submit(
        cluster,
        "jobs/extract.py",
        f"{s3_root}/none.parquet",
        "--output",
        f"{s3_root}/out",
        "--extractor",
        "cnn_lstm",
    )
    assert found.returncode != 0
    assert "featurex: " in found.stdout, found.stderr
    assert "none.parquet" in found.stdout
    assert "exit code 2" in found.stdout


OWN = """
from featurex_ray import ExtractorSpec, InputSpec


class Mean:
    spec = ExtractorSpec(dimension=3, input=InputSpec(16, 16, None, "bilinear"))

    def __call__(self, frames):
        return frames.mean(dim=(1, 3, 4))
"""


@pytest.mark.long
def test_an_own_extractor_travels_as_py_module(
    cluster: str, bundled_media: Path, s3_root: str, tmp_path: Path
) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "module.py").write_text(OWN)
    fsspec.filesystem("s3").put(f"{bundled_media}/images/", f"{s3_root}/media/", recursive=True)
    build_manifest(f"{s3_root}/media", f"{s3_root}/m.parquet", dataset="photos")
    extract = f"-m featurex_ray.cli extract {s3_root}/m.parquet --output {s3_root}/out --extractor"
    environment = ["--runtime-env-json", json.dumps({"py_modules": [str(tmp_path / "my_package")]})]
    without = submit(cluster, *extract.split(), "my_package.module:Mean", options=[])
    assert without.returncode != 0
    assert "my_package" in without.stdout
    done = submit(cluster, *extract.split(), "my_package.module:Mean", options=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "my_package.module-Mean: 12 done, 1 failed, 0 skipped" in done.stdout
