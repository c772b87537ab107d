"""The Ray Data pipeline: slices of plans -> cut -> decode pool -> extract pool -> staged parts."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from featurex_ray.errors import RunError
from featurex_ray.pipeline.bounds import Watched
from featurex_ray.pipeline.decode import DecodeMedia, DecodeSettings, DecodeSlices, cut
from featurex_ray.pipeline.deploy import (
    FETCHING_THREADS,
    SMALL_TASK_CPUS,
    WRITING_THREADS,
    BlockShape,
    Deployment,
)
from featurex_ray.pipeline.extract import ExtractFeatures, ExtractSettings
from featurex_ray.pipeline.source import Assignment, PlannedSamples, Slice, slice_rows
from featurex_ray.pipeline.watch import watch
from featurex_ray.pipeline.write import StageParts
from featurex_ray.table.table import FeatureTable

ARROW: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
_RAISED = re.compile(r"(\w+\.)*[A-Z]\w*(Error|Exception|Invalid|Died|Killed|Interrupt)\w*: ")

STALL_SECONDS = 840.0
"""Without any block moving for so long, the run ends: within 15 minutes, its beginning and end included."""


@dataclass(frozen=True)
class Work:
    """All that a pipeline needs to know."""

    tables: Sequence[FeatureTable]
    assignments: Sequence[Assignment]
    slices: Sequence[Slice]
    decode: DecodeSettings
    extract: Sequence[ExtractSettings]
    deployment: Deployment
    run_id: str
    shape: BlockShape


def build_dataset(work: Work) -> Dataset:
    """The lazy dataset of one run; iterating over it does the work and yields `STAGED` rows."""
    slices = ray.data.from_blocks(list(slice_rows(work.slices)))
    samples = PlannedSamples(work.tables, work.assignments)
    decode = work.deployment.decode
    if work.decode.clip_seconds is None:
        decoded = slices.map_batches(
            DecodeSlices,
            fn_constructor_args=(work.decode, samples, work.shape.samples_per_decode),
            compute=decode.strategy(threads=FETCHING_THREADS),
            **decode.options(),
            **ARROW,
        )
    else:
        units = slices.map_batches(
            cut,
            fn_args=(work.decode, samples),
            num_cpus=SMALL_TASK_CPUS,
            compute=TaskPoolStrategy(size=decode.size.maximum),
            **ARROW,
        )
        decoded = _in_blocks(units, work.shape.units).map_batches(
            DecodeMedia,
            fn_constructor_args=(work.decode,),
            compute=decode.strategy(threads=FETCHING_THREADS),
            **decode.options(),
            **ARROW | {"batch_size": work.shape.units},
        )
    extracted = decoded.map_batches(
        ExtractFeatures,
        fn_constructor_args=(work.extract,),
        compute=work.deployment.extract.strategy(threads=1),
        **work.deployment.extract.options(),
        **ARROW | {"batch_size": work.shape.units_per_extract},
    )
    staged: Dataset = extracted.map_batches(
        StageParts,
        fn_constructor_args=(work.tables, work.assignments, work.run_id),
        compute=work.deployment.write.strategy(threads=WRITING_THREADS),
        **work.deployment.write.options(),
        **ARROW,
    )
    return staged


def _in_blocks(units: Dataset, num_rows: int) -> Dataset:
    """Blocks of so many rows, each of which can become a task."""
    blocks = units.repartition(target_num_rows_per_block=num_rows)
    # Such a task would reserve a whole CPU, which no node has left where actors hold parts of all of
    # them, and the run would wait for ever. Ray has no public way to say so.
    repartition: Any = blocks._logical_plan.dag
    repartition.ray_remote_args["num_cpus"] = SMALL_TASK_CPUS
    return blocks


class Tracker:
    """Which samples are staged, and so which assignments can be published."""

    def __init__(self, todo: Sequence[np.ndarray], *, num_tables: int) -> None:
        self._todo = [mask.copy() for mask in todo]
        self.left = [int(mask.sum()) for mask in todo]
        self.codes: list[dict[tuple[int, int], str]] = [{} for _ in range(num_tables)]
        self._units: dict[tuple[int, int], set[int]] = {}

    def add(self, staged: pa.Table) -> tuple[int, list[int]]:
        """Count units that were staged (schema `STAGED`).

        Returns:
            How many samples became whole by them, and the assignments that became whole.
        """
        self._note_codes(staged.filter(pa.array(failed_units(staged))))
        settles = self._is_last_unit(staged)
        assignment, row = staged["assignment"].to_numpy()[settles], staged["plan_row"].to_numpy()[settles]
        count, whole = 0, []
        for number in np.unique(assignment).tolist():
            rows = np.unique(row[assignment == number])
            rows = rows[self._todo[number][rows]]  # a unit that Ray did twice counts once
            self._todo[number][rows] = False
            self.left[number] -= len(rows)
            count += len(rows)
            if len(rows) and not self.left[number]:
                whole.append(number)
        return count, whole

    def _note_codes(self, failed: pa.Table) -> None:
        for unit in failed.select(["assignment", "plan_row", "error_codes"]).to_pylist():
            key = unit["assignment"], unit["plan_row"]
            for codes, code in zip(self.codes, unit["error_codes"], strict=True):
                if code is not None:
                    codes.setdefault(key, code)

    def _is_last_unit(self, staged: pa.Table) -> np.ndarray:
        """(N,) bool: with this unit, all of its sample's are there, failed ones included.

        One that failed settles nothing by itself: another table may want the others.
        """
        is_last: np.ndarray = staged["num_units"].to_numpy() == 1
        parts = np.flatnonzero(~is_last)
        names = ["assignment", "plan_row", "unit_index", "num_units"]
        for place, unit in zip(parts, staged.select(names).take(pa.array(parts)).to_pylist(), strict=True):
            key = unit["assignment"], unit["plan_row"]
            units = self._units.setdefault(key, set())
            units.add(unit["unit_index"])
            if len(units) == unit["num_units"]:
                is_last[place] = True
                del self._units[key]
        return is_last


def failed_units(staged: pa.Table) -> np.ndarray:
    """(N,) bool: units (schema `STAGED`) that failed for one of the tables."""
    codes = staged["error_codes"].combine_chunks()
    has_code = pc.list_flatten(codes).is_valid().to_numpy(False)
    failed = np.zeros(len(codes), bool)
    failed[pc.list_parent_indices(codes).to_numpy()[has_code]] = True
    return failed


def run_pipeline(work: Work, watched: Watched) -> Iterator[pa.Table]:
    """Execute the pipeline; yields what the writer tells, schema `STAGED`, as it comes.

    Args:
        work: What to do.
        watched: Takes what is seen of the execution.

    Raises:
        RunError: A stage failed for good, or nothing moved any more; the run can be run again.
    """
    context = DataContext.get_current().copy()  # the caller's is for what else it does with Ray Data
    configure(context)
    if not work.deployment.may_shrink:
        context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    watch(context, watched)
    try:
        with DataContext.current(context):
            dataset = build_dataset(work)
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayError as error:
        raise RunError(f"the pipeline stopped: {first_line(error)}; run it again to go on") from error
    except ExecutionTimeoutError as error:
        raise RunError(
            f"the pipeline stalled: nothing moved for {STALL_SECONDS:.0f} s, so a worker or the media's "
            "store hangs, or the cluster has no room; what is staged is kept, run it again to go on"
        ) from error


def configure(context: DataContext) -> None:
    """Ray Data's settings for a long run: actors come back, samples fail as rows, blocks never."""
    context.max_errored_blocks = 0
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = 3
    context.max_consecutive_actor_init_deaths = 5
    context.execution_no_progress_timeout_s = STALL_SECONDS
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    # The run has its own report; Ray's hints on each operator would bury it.
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    """The line of a remote traceback that says what was raised; Ray's hints on settings may follow it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or [type(error).__name__])[-1]
