"""Publish: whole plans in, visible rows out; in an actor beside the pipeline that stages other plans."""

from collections.abc import Sequence

from featurex_ray.pipeline import events, metrics
from featurex_ray.pipeline.threads import limit_threads
from featurex_ray.table.log import Plan
from featurex_ray.table.publish import Published
from featurex_ray.table.table import FeatureTable

PUBLISHING_THREADS = 2
"""Plans at the same time: while one waits for the store, one counts."""


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
