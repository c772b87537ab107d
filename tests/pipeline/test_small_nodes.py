"""Nodes whose CPUs all belong to actors: no stage waits for a CPU that never comes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from featurex_ray.manifest import build_manifest
from tests.pipeline.driver import run_driver

DRIVER = """
import json, sys
import ray
from ray.cluster_utils import Cluster
import featurex_ray as fx
manifest, output, options = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 << 20})
cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
ray.init(address=cluster.address, log_to_driver=False)
job = fx.ExtractionJob(manifest=manifest, output=output, extractor="attention_convnet", **json.loads(options))
report = fx.run(job)
print(json.dumps({"planned": report.planned, "failed": report.failed}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
def test_cut_videos_end_on_two_nodes_full_of_actors(tmp_path: Path) -> None:
    """Actors reserve parts of both nodes, so that neither has a whole CPU left."""
    (tmp_path / "media").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (10 * i, 80, 80)).save(tmp_path / "media" / f"{i}.png")
    build_manifest(str(tmp_path / "media"), str(tmp_path / "m.csv"), dataset="d")
    options = {"clip_seconds": 2.0, "decode_actors": "4", "extract_actors": "2"}
    arguments = [str(tmp_path / "m.csv"), str(tmp_path / "out"), json.dumps(options)]
    assert run_driver(DRIVER, *arguments, seconds=200) == {"planned": 8, "failed": 0}
