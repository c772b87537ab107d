"""Watch a run from inside Ray Data's loop: queues, pools and memory."""

import time
from functools import partial
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.context import DataContext

from featurex_ray.pipeline import metrics
from featurex_ray.pipeline.bounds import StageState, Watched

SECONDS_BETWEEN_LOOKS = 1.0
OPERATORS = {"Decode": "decode", "ExtractFeatures": "extract", "StageParts": "write"}


def watch(context: DataContext, watched: Watched) -> None:
    """Have Ray Data's executions under this context be watched."""
    others = [kind for kind in context.custom_execution_callback_classes if not isinstance(kind, _Looking)]
    # Ray only ever calls what it finds here.
    context.custom_execution_callback_classes = [*others, _Looking(_Look, watched)]  # type: ignore[list-item]


class _Looking(partial[Any]):
    """A `_Look` still to be made, told apart from other users' callbacks."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Looking":
        """Ray copies contexts; what is seen has to arrive where it is waited for."""
        return self


class _Look(ExecutionCallback):
    """Ray's hook after each step of its loop; it looks once a second, and when all is over."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._last = 0.0
        # A run can have several executions: time goes on, and what they spilled adds up.
        self._first = time.monotonic() - (watched.occupancy.seconds or [0.0])[-1]
        self._spilled_before = watched.spilled_bytes

    def on_execution_step(self, executor: Any) -> None:
        """Look, if it is time."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LOOKS:
            self._last = now
            self._look(executor)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Look a last time."""
        self._look(executor)

    def _look(self, executor: Any) -> None:
        stages = _stages(executor)
        used = int(executor._resource_manager.get_global_usage().object_store_memory or 0)
        spilled = sum(op.metrics.obj_store_mem_spilled for op in executor._topology) + self._spilled_before
        seconds = time.monotonic() - self._first
        self._watched.see(stages, seconds=seconds, object_store_bytes=used, spilled_bytes=spilled)
        for name, stage in stages.items():
            metrics.show("featurex_queued_blocks", stage.queued, stage=name)
            metrics.show("featurex_pool_workers", stage.workers, stage=name, state="all")
            metrics.show("featurex_pool_workers", min(stage.workers, stage.tasks), stage=name, state="busy")
        metrics.show("featurex_object_store_bytes", used)
        metrics.show("featurex_spilled_bytes", spilled)


def _stages(executor: Any) -> dict[str, StageState]:
    found = {}
    for operator, state in executor._topology.items():
        name = next((name for part, name in OPERATORS.items() if part in operator.name), None)
        if name is not None:
            held_back = operator._in_task_submission_backpressure or operator._in_task_output_backpressure
            found[name] = StageState(
                operator.get_actor_info().running,
                operator.num_active_tasks(),
                state.total_enqueued_input_blocks(),
                held_back,
            )
    return found
