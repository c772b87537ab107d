"""Publish: whole plans in, visible rows out; in actors beside the pipeline that stages other plans."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import ray

from featurex_ray.errors import RunError
from featurex_ray.pipeline import events, metrics
from featurex_ray.pipeline.deploy import SMALL_TASK_CPUS
from featurex_ray.pipeline.execute import first_line
from featurex_ray.pipeline.source import Assignment
from featurex_ray.pipeline.threads import limit_threads
from featurex_ray.table.log import Plan
from featurex_ray.table.publish import Published
from featurex_ray.table.table import FeatureTable

PUBLISHING_THREADS = 2
"""Plans at the same time: while one waits for the store, one counts."""


PUBLISH_TRIES = 30
"""Of a call that loses its actor, whichever of the actor's calls brought that down."""


class PublishPlans:
    """An actor: it starts with the pipeline, so that no run waits for a process at its end."""

    def __init__(self, tables: Sequence[FeatureTable], run_id: str) -> None:
        limit_threads(PUBLISHING_THREADS)
        self._tables = tables
        self._run_id = run_id

    def publish(self, index: int, plan: Plan) -> Published:
        """`FeatureTable.publish` of a plan of one table."""
        table = self._tables[index]
        name = table.facts.name
        with metrics.published(name):
            result = table.publish(plan)
        ids = {"run_id": self._run_id, "table": name, "dataset": plan.dataset, "plan_id": plan.plan_id}
        events.emit("plan_published", **ids, samples=result.num_samples, failed=result.num_failed)
        return result


class Publisher:
    """Publishes whole plans in actors of its own, while others are still being worked on.

    Args:
        tables: Of the run.
        assignments: Whose plans are to be published.
        run_id: Which run it is.
        num_actors: They take turns.
    """

    def __init__(
        self,
        tables: Sequence[FeatureTable],
        assignments: Sequence[Assignment],
        run_id: str,
        *,
        num_actors: int,
    ) -> None:
        self._assignments = assignments
        actor: Any = ray.remote(PublishPlans)
        # All calls that wait for an actor lose a try when it dies, whichever of them it was.
        options = {"max_restarts": -1, "max_task_retries": PUBLISH_TRIES, "num_cpus": SMALL_TASK_CPUS}
        made = actor.options(max_concurrency=PUBLISHING_THREADS, **options)
        self._actors = cycle([made.remote(tables, run_id) for _ in range(num_actors)])
        self._pending: list[tuple[int, Plan, Any]] = []

    def submit(self, number: int) -> None:
        """Begin to publish the plans of one assignment."""
        for index, plan in self._assignments[number].plans.items():
            self._pending.append((index, plan, next(self._actors).publish.remote(index, plan)))

    def wait(self) -> list[tuple[int, Plan, Published]]:
        """What was published, with the table's place in the run.

        Raises:
            RunError: A plan could not be published; the run can be run again.
        """
        try:
            return [(index, plan, ray.get(ref)) for index, plan, ref in self._pending]
        except ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise RunError(f"publishing failed: {first_line(cause)}") from error
        except ray.exceptions.RayError as error:
            raise RunError(f"publishing was interrupted: {first_line(error)}; run it again") from error
