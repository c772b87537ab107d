"""Pools under load, by Ray's own statistics: who is held back, who idles, and what the report says of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurex_ray.manifest import build_manifest
from tests.pipeline.driver import run_driver

OBJECT_STORE_BYTES = 300 << 20
DRIVER = """
import json, sys
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
import featurex_ray as fx
manifest, output, store, options = sys.argv[1:]
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False,
         object_store_memory=int(store))
report = fx.run(fx.ExtractionJob(manifest=manifest, output=output, **json.loads(options)))
address = ray.get_runtime_context().gcs_address
spilled = get_memory_info_reply(get_state_from_address(address)).store_stats.spilled_bytes_total
print(json.dumps(report.to_json() | {"spilled_by_raylet": spilled}, default=str))
"""


def run(manifest: Path, output: Path, **options: Any) -> dict[str, Any]:
    arguments = [str(manifest), str(output), str(OBJECT_STORE_BYTES), json.dumps(options)]
    return run_driver(DRIVER, *arguments, seconds=300)


@pytest.mark.long
def test_a_slow_extractor_holds_decoding_back_and_nothing_spills(tmp_path: Path) -> None:
    """Twice the object store's size in frames goes through it, on a cluster that can shrink."""
    (tmp_path / "media").mkdir()
    for i in range(1000):
        Image.new("RGB", (32, 32), (i % 256, 80, 80)).save(tmp_path / "media" / f"{i:04d}.png")
    build_manifest(str(tmp_path / "media"), str(tmp_path / "m.csv"), dataset="d")
    pools = {"decode_actors": "1:3", "extract_actors": "1", "max_resources": "CPU=3"}
    report = run(tmp_path / "m.csv", tmp_path / "out", extractor="tests.pipeline.own:SlowLarge", **pools)

    frames_bytes = 1000 * 448 * 448 * 3
    assert frames_bytes > 1.9 * OBJECT_STORE_BYTES
    seen = report["watched"]
    assert (report["planned"], report["failed"]) == (1000, 0)
    assert report["spilled_by_raylet"] == seen["spilled_bytes"] == 0
    assert 0 < seen["object_store_peak_bytes"] < OBJECT_STORE_BYTES
    assert next(iter(seen["bounds"])) == "extract"
    # The pool shrank to its minimum while it had to wait.
    assert seen["fewest_workers"]["decode"] == 1 < seen["most_workers"]["decode"] <= 3


@pytest.mark.long
def test_slow_media_leave_the_extractors_idle_and_decode_its_cpus(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    ramp = np.tile(np.arange(3000, dtype=np.uint16)[None, :, None] % 256, (3000, 1, 3)).astype(np.uint8)
    for i in range(48):
        Image.fromarray(np.roll(ramp, i, axis=1)).save(tmp_path / "media" / f"{i:02d}.png", compress_level=1)
    # Each of them many times, for Ray leaves a pool as it is for a while after it grew.
    rows = [f"{time:02d}-{i:02d},media/{i:02d}.png,d" for time in range(6) for i in range(48)]
    (tmp_path / "m.csv").write_text("\n".join(["sample_id,uri,dataset", *rows, ""]))
    pools = {"decode_actors": "2", "extract_actors": "1:2", "max_resources": "CPU=3"}
    report = run(tmp_path / "m.csv", tmp_path / "out", extractor="tests.pipeline.own:MeanColour", **pools)

    assert (report["planned"], report["failed"]) == (288, 0)
    seen, spent = report["watched"], report["stage_seconds"]
    assert next(iter(seen["bounds"])) == "decode"
    assert seen["most_workers"]["decode"] == 2
    assert seen["fewest_workers"]["extract"] == 1
    assert spent["decode"] > 10 * spent["extract"]
