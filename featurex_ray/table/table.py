"""A feature table as its writers see it; `read.py` is for readers.

The protocol's steps have a module each: `facts` and `probe` (1), `plan` (2), `staging` (3),
`publish` (4 and 5). This class only holds them together.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from featurex_ray.errors import TableNotFoundError
from featurex_ray.table import facts as table_facts
from featurex_ray.table import lease, publish, staging
from featurex_ray.table import plan as log
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.lease import Lease
from featurex_ray.table.plan import MAX_SAMPLES_PER_PLAN, Plan, Samples, Work
from featurex_ray.table.publish import Published
from featurex_ray.table.staging import PartInfo
from featurex_ray.table.store import ObjectStore


@dataclass(frozen=True)
class FeatureTable:
    """One table in one store. Can be pickled into tasks.

    Args:
        store: Where it lies.
        facts: What it is; those of `table.json`, which hold for every run.
    """

    store: ObjectStore
    facts: TableFacts

    @classmethod
    def open_or_create(cls, store: ObjectStore, facts: TableFacts) -> "FeatureTable":
        """The table of that name, created if there is none.

        Raises:
            RevisionMismatchError: It holds another revision.
            RequestError: Public objects of that name without a `table.json`, or other carried columns.
        """
        return cls(store, table_facts.agree(store, facts))

    @classmethod
    def open(cls, store: ObjectStore, name: str) -> "FeatureTable":
        """An existing table.

        Raises:
            TableNotFoundError: There is none of that name.
        """
        return cls(store, table_facts.read_facts(store, name))

    @classmethod
    def preview(cls, store: ObjectStore, name: str, samples: Samples) -> Work:
        """What a manifest's samples are to the table of that name, which need not exist; writes nothing."""
        try:
            return cls.open(store, name).compare(samples)
        except TableNotFoundError:
            return log.all_new(samples)

    def compare(self, samples: Samples) -> Work:
        """What a manifest's samples are to this table; writes nothing."""
        return log.compare(self.store, self.facts, samples).work

    def plan(
        self, samples: Samples, *, run_id: str, max_samples_per_plan: int = MAX_SAMPLES_PER_PLAN
    ) -> list[Plan]:
        """Plans what is to do; every open plan that matters to the samples, whoever made it.

        Call again once those are done, until none comes: only then is every sample held at its
        version, whatever other runs planned in the meantime.

        Raises:
            ManifestError: A sample occurs twice.
            TableDamagedError: The log or a done plan's object is damaged.
        """
        return log.make_plans(
            self.store, self.facts, samples, run_id=run_id, max_samples_per_plan=max_samples_per_plan
        )

    def read_plan(self, plan: Plan, rows: range | None = None) -> pa.Table:
        """A plan's samples in `sample_schema`, sorted by `sample_id`; all, or the rows of a slice."""
        return log.read_plan(self.store, self.facts, plan, rows)

    def write_part(self, plan: Plan, rows: pa.Table) -> PartInfo:
        """Stages rows (`schemas.PART`) of a plan's samples; all rows of a unit in one call.

        Raises:
            ValueError: A feature that isn't D finite values.
        """
        return staging.write_part(self.store, self.facts, plan, rows)

    def staged_samples(self, plan: Plan) -> set[str]:
        """The plan's samples that need no more work."""
        return staging.staged_samples(self.store, self.facts, plan)

    def missing(self, plan: Plan) -> set[str]:
        """The plan's samples that are still to be staged."""
        if plan.kind == "prune":
            return set()
        return set(self.read_plan(plan)["sample_id"].to_pylist()) - self.staged_samples(plan)

    def is_staged(self, plan: Plan) -> bool:
        """Whether the plan can be published."""
        return not self.missing(plan)

    def is_done(self, plan: Plan) -> bool:
        """Whether the plan is published and complete."""
        return publish.read_done(self.store, self.facts, plan) is not None

    def publish(self, plan: Plan) -> Published:
        """Makes a wholly staged plan visible. Any process may call it, any number of times.

        Raises:
            TableDamagedError: A part or the object contradicts the log, or samples aren't staged.
            StoreUnavailableError: The store didn't let it happen in time; nothing is deleted.
        """
        return publish.publish(self.store, self.facts, plan)

    def open_plans(self) -> Iterator[Plan]:
        """Every plan that isn't done."""
        entries = log.read_log(self.store, self.facts)
        for dataset, numbers in sorted(entries.plans.items()):
            for number in numbers:
                if (dataset, number) not in entries.done:
                    with log.open_plan(self.store, self.facts, dataset, number) as (plan, _):
                        yield plan

    def finish_published(self) -> list[Published]:
        """Completes the plans that are published and not done, whoever left them so."""
        finished = (publish.finish(self.store, self.facts, plan) for plan in self.open_plans())
        return [done for done in finished if done is not None]

    def beat(self, plan: Plan, owner: str) -> Lease:
        """Tells other runs that `owner` works on the plan."""
        return lease.beat(self.store, self.facts, plan, owner)

    def lease(self, plan: Plan) -> Lease | None:
        """Who works on the plan; `LeaseWatch` says whether to wait for them."""
        return lease.read_lease(self.store, self.facts, plan)

    def save_report(self, run_id: str, report: dict[str, Any]) -> str:
        """Writes a run's report; its key."""
        key = self.facts.keys.report(run_id)
        self.store.put(key, json.dumps(report, indent=1, default=str).encode())
        return key
