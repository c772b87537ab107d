"""S3: canary secrets in the environment, the config and URIs. They turn up nowhere."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from tests.hostile.campaign import report
from tests.hostile.mutants import originals

CHECKOUT = Path(__file__).parents[2]
CANARIES = {
    "AWS_ACCESS_KEY_ID": "CANARY1accesskey",
    "AWS_SECRET_ACCESS_KEY": "CANARY2secretkey",
    "AWS_SESSION_TOKEN": "CANARY3session",
    "signature": "CANARY4signature",
    "weights": "CANARY5weights",
}


class _Media(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if "good" in self.path else 403)
        data = originals()["jpeg"] if "good" in self.path else b"denied"
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Media)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def hits(folder: Path) -> list[str]:
    """Files that hold a canary; of Parquet files their metadata, as the manifest's own `uri` is data."""
    found = []
    for file in folder.rglob("*"):
        if not file.is_file() or file.is_symlink():
            continue
        try:
            data = (
                str(pq.read_metadata(file).metadata).encode()
                if file.suffix == ".parquet"
                else file.read_bytes()
            )
        except FileNotFoundError:  # of an agent that ends meanwhile
            continue
        found += [f"{file}: {canary}" for canary in CANARIES.values() if canary.encode() in data]
    return found


def test_secrets_turn_up_nowhere(web: str, tmp_path: Path) -> None:

    manifest, output = tmp_path / "m.csv", tmp_path / "out"
    uris = [f"{web}/{name}.jpg?X-Amz-Signature={CANARIES['signature']}" for name in ("good", "bad")]
    manifest.write_text("uri,dataset,sample_id\n" + "".join(f"{u},d,{i}\n" for i, u in enumerate(uris)))
    config = tmp_path / "job.yaml"
    config.write_text(
        f"allow-prefix: ['{web}']\nmax-failure-rate: 1.0\n"
        f"weights: ['{web}/none.safetensors?token={CANARIES['weights']}']\n"
    )
    # Ray's sockets need a short path, and its agents may still write when the run is over.
    with tempfile.TemporaryDirectory(prefix="fx", ignore_cleanup_errors=True) as session:
        command = [
            *(sys.executable, "-m", "featurex_ray.cli", "extract", str(manifest), "--output", str(output)),
            *("--extractor", "attention_convnet", "--allow-prefix", web, "--max-failure-rate", "1"),
        ]
        environment = os.environ | CANARIES | {"RAY_TMPDIR": session}
        environment.pop("RAY_ADDRESS", None)
        run = subprocess.run(
            command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        refused = subprocess.run(
            [*command[:-4], "--config", str(config)],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == 2
        printed = run.stdout + run.stderr + refused.stdout + refused.stderr
        assert [canary for canary in CANARIES.values() if canary in printed] == []
        logs = hits(Path(session))
        num_logs = sum(1 for file in Path(session).rglob("*") if file.is_file())
    assert num_logs > 5
    assert logs + hits(output) == []
    assert list(output.rglob("*.json"))
    report("S3", canaries=len(CANARIES), ray_files=num_logs, hits=0)


def test_a_report_holds_no_credentials() -> None:
    from featurex_ray.storage import without_secrets

    values = {
        "manifest": "https://me:CANARY@host/m.csv?X-Amz-Signature=CANARY",
        "weights": ("cnn_lstm=https://host/w.safetensors?token=CANARY", "s3://bucket/w"),
        "max_pixels": 7,
        "dataset": None,
    }
    plain = without_secrets(values)
    assert "CANARY" not in str(plain)
    assert (plain["max_pixels"], plain["dataset"], plain["weights"][1]) == (7, None, "s3://bucket/w")


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """Else the campaign would prove nothing."""
    (tmp_path / "log").write_text(f"key={CANARIES['AWS_SECRET_ACCESS_KEY']}")
    save_file({}, tmp_path / "w.safetensors", {"from": CANARIES["weights"]})
    assert len(hits(tmp_path)) == 2
