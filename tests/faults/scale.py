"""R7 and R9: planning and resuming millions of samples, and a rerun with nothing to do; no media, no Ray.

python -m tests.faults.scale --samples 10000000 --rerun 100000

Each step runs in a process of its own, and prints what it took and by how much that process grew.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from featurex_ray.job import ExtractionJob

ROWS_PER_FILE = 500_000
EXTRACTOR = "attention_convnet"


def write_manifest(folder: Path, num_samples: int) -> None:
    """Names as archives have them, in a random order of their ids."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for start in range(0, num_samples, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, num_samples - start)
        keys = chance.integers(0, 2**62, count)
        uris = [f"/archive/photos/{key:016x}/{start + n:09d}.jpg" for n, key in enumerate(keys.tolist())]
        table = pa.table({"uri": uris, "dataset": ["photos"] * count, "version": ["1"] * count})
        pq.write_table(table, folder / f"{start:012d}.parquet")


def step(name: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.faults.scale", "--step", name, *map(str, arguments)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    print(name, json.dumps(figures), flush=True)
    return figures


def memory_mib(name: str) -> float:
    """VmRSS or VmHWM of this process. `ru_maxrss` would begin with what the parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def job_of(folder: Path) -> "ExtractionJob":
    from featurex_ray.job import ExtractionJob

    return ExtractionJob(
        manifest=f"{folder}/manifest", output=f"{folder}/out", extractor=EXTRACTOR, precision="fp32"
    )


def plan(folder: Path) -> None:
    """From the manifest to plans; on a table that has them already, to the first tasks of a resume."""
    from featurex_ray.pipeline.claims import Claims
    from featurex_ray.pipeline.request import prepare
    from featurex_ray.pipeline.source import Assignment, slices_of
    from featurex_ray.pipeline.tables import open_table
    from featurex_ray.pipeline.work import rows_to_do

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports
    before, start = memory_mib("VmRSS"), time.monotonic()
    request = prepare(job_of(folder))
    read = time.monotonic() - start
    table = open_table(request, 0, {})
    plans = table.plan(request.manifest.batches, run_id="scale")
    # What a run plans first; of a table that has all its plans, what a resume finds.
    planned = time.monotonic() - start
    claims = Claims([table], "scale")
    mine, _ = claims.take([Assignment({0: plan}) for plan in plans])
    todo = [rows_to_do([table], assignment) for assignment in mine]
    slices = [part for n, mask in enumerate(todo) for part in slices_of(n, mask, num_rows=64)]
    ready = time.monotonic() - start
    print(
        json.dumps(
            {
                "samples": request.manifest.num_samples,
                "plans": len(plans),
                "first slices": len(slices),
                "manifest read s": round(read, 1),
                "planned s": round(planned, 1),
                "first task ready s": round(ready, 1),
                "CPU s": round(time.process_time(), 1),
                "grown MiB": round(memory_mib("VmHWM") - before),
            }
        )
    )


def plan_rest(folder: Path) -> None:
    """Every plan of the manifest, as a run has made them once it works on its last samples."""
    from featurex_ray.pipeline.request import prepare
    from featurex_ray.pipeline.tables import open_table

    request = prepare(job_of(folder))
    table = open_table(request, 0, {})
    plans = table.plan(request.manifest.batches, run_id="scale", most_new_samples=1 << 40)
    print(json.dumps({"plans": len(plans)}))


def stage_all(folder: Path) -> None:
    """Publishes every sample with made-up features, as if a run had done it."""
    from featurex_ray import schemas
    from featurex_ray.pipeline.request import prepare
    from featurex_ray.pipeline.tables import open_table

    request = prepare(job_of(folder))
    table = open_table(request, 0, {})
    for one in table.plan(request.manifest.batches, run_id="scale", most_new_samples=1 << 40):
        ids = table.read_plan(one)["sample_id"]
        for start in range(0, len(ids), 25_000):
            table.write_part(one, made_up(schemas.PART, ids.slice(start, 25_000), table.facts.dimension))
        table.publish(one)
    print(json.dumps({"peak MiB": round(memory_mib("VmHWM"))}))


def made_up(schema: pa.Schema, ids: pa.ChunkedArray, dimension: int) -> pa.Table:
    count = len(ids)
    values = np.random.default_rng(count).random(count * dimension, np.float32)
    offsets = pa.array(range(0, count * dimension + 1, dimension), pa.int32())
    given = {
        "sample_id": ids.combine_chunks(),
        "unit_index": pa.array(np.zeros(count, np.int32)),
        "num_units": pa.array(np.ones(count, np.int32)),
        "clip_index": pa.array(np.zeros(count, np.int32)),
        "num_clips": pa.array(np.ones(count, np.int32)),
        "feature": pa.ListArray.from_arrays(offsets, pa.array(values)),
        "run_id": pa.array(["scale"] * count),
    }
    return pa.table([given.get(item.name, pa.nulls(count, item.type)) for item in schema], schema=schema)


def rerun(folder: Path) -> None:
    """A whole run with nothing to do, imports and all."""
    start = time.monotonic()
    import featurex_ray as fx

    job = fx.ExtractionJob(manifest=f"{folder}/manifest", output=f"{folder}/out", extractor=EXTRACTOR)
    report = fx.run(job)
    print(
        json.dumps(
            {
                "samples": report.tables[0].skipped,
                "planned": report.planned,
                "bytes fetched": report.fetched_bytes,
                "seconds": round(time.monotonic() - start, 2),
                "CPU s": round(time.process_time(), 2),
            }
        )
    )


STEPS = {"plan": plan, "plan-rest": plan_rest, "stage-all": stage_all, "rerun": rerun}


def measure(num_samples: int, num_rerun: int) -> Iterator[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="featurex-scale-") as name:
        many, few = Path(name, "many"), Path(name, "few")
        for folder, count in ((many, num_samples), (few, num_rerun)):
            folder.mkdir()
            write_manifest(folder / "manifest", count)
        yield step("stage-all", few)
        yield step("rerun", few)
        yield step("plan", many)
        yield step("plan-rest", many)
        yield step("plan", many)  # on a table that holds these plans: a resume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--rerun", type=int, default=100_000)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("folder", nargs="?", type=Path)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step](options.folder)
    else:
        list(measure(options.samples, options.rerun))


if __name__ == "__main__":
    main()
