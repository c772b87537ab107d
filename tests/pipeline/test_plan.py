"""The physical plan: stages are actor pools of their own, never one operator; no task takes a whole CPU."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
from ray.data._internal.logical.optimizers import get_execution_plan

from featurex_ray.job import ExtractionJob
from featurex_ray.media.sampling import Sampling
from featurex_ray.models.registry import resolve
from featurex_ray.pipeline.decode import DecodeSettings
from featurex_ray.pipeline.deploy import IMAGES, SMALL_TASK_CPUS, BlockShape, deploy
from featurex_ray.pipeline.execute import Work, build_dataset
from featurex_ray.pipeline.extract import ExtractSettings
from featurex_ray.pipeline.source import Assignment, slices_of
from featurex_ray.schemas import SAMPLE
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.store import open_store
from featurex_ray.table.table import FeatureTable

pytestmark = pytest.mark.usefixtures("local_ray")


def work(folder: Path, *, clip_seconds: float | None, gpus: float) -> Work:
    table = FeatureTable.open_or_create(open_store(str(folder)), TableFacts("t", "r", 84, {}))
    samples = pa.RecordBatch.from_pylist(
        [{"dataset": "d", "sample_id": str(i), "uri": f"{i}.jpg"} for i in range(8)], schema=SAMPLE
    )
    plans = table.plan(lambda: iter([samples]), run_id="r")
    job = ExtractionJob(
        manifest="m.csv", output="out", extractor="attention_convnet", gpus_per_extract_actor=gpus
    )
    resolved = resolve("attention_convnet")
    return Work(
        tables=[table],
        assignments=[Assignment({0: plans[0]})],
        slices=slices_of(0, np.ones(8, bool), num_rows=2),
        decode=DecodeSettings(
            policy=ReadPolicy(str(Path("m.csv").absolute())),
            inputs=(resolved.spec.input,),
            sampling=Sampling.parse("uniform:16"),
            clip_seconds=clip_seconds,
            clip_stride_seconds=None,
            decoder="pyav",
        ),
        extract=[ExtractSettings(resolved, 0, "fp32", None, 1, None)],
        deployment=deploy(job, ray.cluster_resources(), most=8),
        run_id="r",
        shape=BlockShape(IMAGES, samples=2, samples_per_decode=2, units=1, units_per_extract=4),
    )


@pytest.mark.parametrize("clip_seconds", [None, 2.0])
@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_stages_are_not_fused(clip_seconds: float | None, gpus: float, tmp_path: Path) -> None:
    dataset = build_dataset(work(tmp_path, clip_seconds=clip_seconds, gpus=gpus))
    plan, _ = get_execution_plan(dataset._logical_plan)
    names = [operator.name for operator in plan.dag.post_order_iter()]
    pools = ["MapBatches(ExtractFeatures)", "MapBatches(StageParts)"]
    decode = "MapBatches(DecodeSlices)" if clip_seconds is None else "MapBatches(DecodeMedia)"
    assert names[-3:] == [decode, *pools]
    assert ("cut" in " ".join(names)) == (clip_seconds is not None)


@pytest.mark.parametrize("clip_seconds", [None, 2.0])
def test_tasks_need_no_whole_cpu(clip_seconds: float | None, tmp_path: Path) -> None:
    """Where actors hold parts of all CPUs, such a task would never start."""
    dataset = build_dataset(work(tmp_path, clip_seconds=clip_seconds, gpus=0.0))
    plan, _ = get_execution_plan(dataset._logical_plan)
    tasks = [operator for operator in plan.dag.post_order_iter() if isinstance(operator, TaskPoolMapOperator)]
    assert len(tasks) == (0 if clip_seconds is None else 2)
    for task in tasks:
        assert task._ray_remote_args["num_cpus"] <= SMALL_TASK_CPUS
