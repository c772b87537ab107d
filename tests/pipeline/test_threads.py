"""An actor uses the threads that its CPUs are worth, whatever the machine would offer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from featurex_ray.pipeline.threads import threads_of
from tests.conftest import CHECKOUT

STAGES = """
import json, sys
import numpy as np, pyarrow as pa, pyarrow.compute as pc
from pathlib import Path
from featurex_ray.benchmark.work import Pieces, planned
from featurex_ray.contained.limits import status_bytes
from featurex_ray.media.sampling import Sampling
from featurex_ray.models.registry import resolve
from featurex_ray.pipeline.decode import DecodeMedia, DecodeSettings
from featurex_ray.storage import ReadPolicy

def threads():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Threads:"))

media, folder, stage = sys.argv[1:]
pa.set_cpu_count(16)  # as on a machine of so many CPUs
manifest = Pieces.of(media, Path(folder)).manifest(Path(folder) / "m.parquet", 12)
extractor = resolve("attention_convnet")
decode = DecodeMedia(DecodeSettings(
    policy=ReadPolicy(str(manifest), allow_prefixes=(media,)), inputs=(extractor.spec.input,),
    sampling=Sampling.parse("uniform:16"), clip_seconds=None, clip_stride_seconds=None, decoder="pyav",
))
units = decode(planned(str(manifest), 12))
found = {"arrow": pa.cpu_count()}
if stage == "extract":
    import torch
    torch.set_num_threads(16)
    from featurex_ray.pipeline.extract import ExtractFeatures, ExtractSettings
    extract = ExtractFeatures([ExtractSettings(extractor, 0, "fp32", None, 1, None)])
    before = threads()
    extract(units)
    found |= {"torch": torch.get_num_threads(), "arrow": pa.cpu_count(), "grown": threads() - before}
print(json.dumps(found))
"""


@pytest.mark.parametrize(("num_cpus", "threads"), [(0.25, 1), (1.0, 1), (1.4, 1), (4.0, 4)])
def test_threads_are_by_cpus(num_cpus: float, threads: int) -> None:
    assert threads_of(num_cpus) == threads


@pytest.mark.parametrize("stage", ["decode", "extract"])
def test_no_stage_takes_more_threads_than_it_was_given(
    stage: str, bundled_media: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGES, str(bundled_media / "images"), str(tmp_path), stage],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["arrow"] == 1
    if stage == "extract":
        assert found["torch"] == 1
        assert found["grown"] <= 1
