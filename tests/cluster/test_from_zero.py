"""A cluster that scales from zero: Ray's own autoscaler, its nodes made by its provider for one machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

import featurex_ray as fx
from featurex_ray.manifest import build_manifest
from tests.cluster.nodes import BIN, Cluster, cluster

NOT_NEEDED = [
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "rsync_exclude",
    "rsync_filter",
]
"""What the schema wants and a machine that is already there does not."""

AUTOSCALER = {
    "cluster_name": "from-zero",
    "max_workers": 3,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{key: [] for key in NOT_NEEDED},
    "provider": {"type": "fake_multinode", "head_node_id": FAKE_HEAD_NODE_ID, "launch_multiple": True},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "decode": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        "extract": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
}
ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}


@pytest.fixture(scope="module")
def from_zero(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert s3_server
    config = tmp_path_factory.mktemp("from-zero") / "autoscaler.json"
    config.write_text(json.dumps(AUTOSCALER))
    with cluster(options=[f"--autoscaling-config={config}"], also=ENVIRONMENT) as found:
        yield found


ASK = """
import json, logging, sys, ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR)
from featurex_ray.pipeline.deploy import cluster_resources
print(json.dumps([ray.cluster_resources().get("CPU", 0), cluster_resources()]))
"""


def test_pools_count_with_what_the_cluster_can_grow_to_and_make_it_grow(
    from_zero: Cluster, bundled_media: Path, s3_root: str
) -> None:
    address = f"127.0.0.1:{from_zero.gcs_port}"
    asked = from_zero.run(str(BIN / "python"), "-c", ASK, address)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout.splitlines()[-1]) == [0, {"CPU": 3.0, "GPU": 1.0}]

    fsspec.filesystem("s3").put(f"{bundled_media}/images/", f"{s3_root}/media/", recursive=True)
    build_manifest(f"{s3_root}/media", f"{s3_root}/m.parquet", dataset="photos")
    job = ["extract", f"{s3_root}/m.parquet", "--output", f"{s3_root}/out", "--address", address]
    options = ["--extractor", "tests.pipeline.own:MeanColour", "--precision", "fp32"]
    found = from_zero.run(str(BIN / "python"), "-m", "featurex_ray.cli", *job, *options)
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(fx.open_table(f"{s3_root}/out/tests.pipeline.own-MeanColour").to_arrow()) == 12
