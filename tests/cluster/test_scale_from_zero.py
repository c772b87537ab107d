"""A cluster that has no workers until a job wants them: Ray's own autoscaler, its nodes on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address

from featurex_ray.manifest import build_manifest
from featurex_ray.table.verify import verify_table
from tests.cluster.nodes import BIN, CHECKOUT, free_port, psutil, wait_until

NODE_TYPES = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "decode": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    "extract": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
}
CONFIG: dict[str, Any] = {
    "cluster_name": "from-zero",
    "max_workers": 3,
    "upscaling_speed": 20.0,
    "idle_timeout_minutes": 0.2,
    "provider": {
        # Ray's wheel lacks the defaults of the type `fake_multinode`; as an external one it needs none.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    },
    "available_node_types": NODE_TYPES,
    "head_node_type": "ray.head.default",
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


@pytest.fixture
def address() -> Iterator[str]:
    """Of a head without CPUs, whose autoscaler may start three nodes."""
    with tempfile.TemporaryDirectory(prefix="fx-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_port()
        host = get_node_ip_address()
        provider = CONFIG["provider"] | {"gcs_address": f"{host}:{port}"}
        (folder / "config.json").write_text(json.dumps(CONFIG | {"provider": provider}))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_AUTH_MODE": "disabled",
        }
        options = [
            "--head",
            "--num-cpus=0",
            f"--port={port}",
            f"--temp-dir={folder}",
            "--disable-usage-stats",
        ]
        options += [f"--autoscaling-config={folder}/config.json", "--include-dashboard=false"]
        with (folder / "start.log").open("wb") as log:
            subprocess.run(
                [BIN / "ray", "start", *options], env=environment, stdout=log, stderr=log, check=True
            )
        yield f"{host}:{port}"
        for process in _processes_of(folder):
            process.send_signal(signal.SIGKILL)


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Ray names its folder in the command line or the environment of all that it starts."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()):
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return list({process.pid: process for process in found}.values())


def nodes(address: str) -> list[dict[str, float]]:
    """The resources of all nodes that live, the head's left out."""
    code = (
        "import json, ray, sys; ray.init(address=sys.argv[1], logging_level='error', log_to_driver=False); "
        "print(json.dumps([n['Resources'] for n in ray.nodes() if n['Alive']]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, address],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=True,
    )
    resources: list[dict[str, float]] = json.loads(found.stdout.splitlines()[-1])
    return [each for each in resources if each.get("CPU")]


@pytest.mark.long
def test_a_job_makes_the_cluster_grow_and_its_end_lets_it_shrink(address: str, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    noise = np.random.default_rng(3)
    for i in range(400):
        pixels = noise.integers(0, 256, (32, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "media" / f"{i:03d}.png")
    manifest = str(tmp_path / "m.csv")
    build_manifest(str(tmp_path / "media"), manifest, dataset="noise")
    assert nodes(address) == []

    command = f"-m featurex_ray.cli extract {manifest} --output {tmp_path}/out --address {address} "
    command += "--extractor tests.pipeline.own:Steady --max-resources CPU=5,GPU=1"
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"400 done, 0 failed", done.stdout)
    # Nodes that decode may be gone again by now.
    assert {"extract", "decode"} == {*re.findall(r"Adding \d+ node\(s\) of type (\w+)", done.stdout)}
    assert verify_table(str(tmp_path / "out" / "tests.pipeline.own-Steady"), manifest=manifest).ok
    wait_until(lambda: nodes(address) == [], "the cluster's end without work", seconds=120)
