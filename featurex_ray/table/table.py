"""A feature table as its writers see it; `read.py` is for readers.

The protocol's steps have a module each: `facts` and `probe` (1), `plan`, `prune` and `retry` (2),
`staging` (3), `publish` (4 and 5), `collect` (6). This class only holds them together.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from featurex_ray.errors import TableNotFoundError
from featurex_ray.table import facts as table_facts
from featurex_ray.table import prune, publish, retry, staging
from featurex_ray.table.collect import collect
from featurex_ray.table.compare import Samples, Work, all_new, compare
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.layout import numbered
from featurex_ray.table.lease import Leases
from featurex_ray.table.log import Beginning, Plan, num_entries, open_plan, read_log, read_plan
from featurex_ray.table.plan import MAX_SAMPLES_PER_PLAN, PLANNED_AT_ONCE, make_plans
from featurex_ray.table.publish import Published
from featurex_ray.table.retry import Allowed, Failed
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
            return all_new(samples)

    def compare(self, samples: Samples) -> Work:
        """What a manifest's samples are to this table; writes nothing."""
        return compare(self.store, self.facts, samples).work

    def plan(
        self,
        samples: Samples,
        *,
        run_id: str,
        max_samples_per_plan: int = MAX_SAMPLES_PER_PLAN,
        most_samples: int | None = None,
        most_new_samples: int = PLANNED_AT_ONCE,
        began: Beginning | None = None,
    ) -> list[Plan]:
        """Plans what is to do; every open plan that matters to the samples, whoever made it.

        Call again once those are done, until none comes: only then is every sample held at its
        version, whatever other runs planned in the meantime.

        Raises:
            ManifestError: A sample occurs twice.
            TableDamagedError: The log or a done plan's object is damaged.
        """
        return make_plans(
            self.store,
            self.facts,
            samples,
            run_id=run_id,
            max_samples_per_plan=max_samples_per_plan,
            most_samples=most_samples,
            most_new_samples=most_new_samples,
            began=began,
        )

    def beginning(self, run_id: str) -> Beginning:
        """What a run that begins now finds: what later ones plan meanwhile it leaves as it is."""
        return Beginning(run_id, num_entries(self.store, self.facts))

    def has_no_plan_after(self, last: Mapping[str, int]) -> bool:
        """Whether these are the numbers of their datasets' last plans."""
        entries = num_entries(self.store, self.facts)
        return all(entries.get(dataset, 0) == number + 1 for dataset, number in last.items())

    def num_gone(self, samples: Samples) -> int:
        """Samples of the manifest's datasets that it doesn't name any more; writes nothing."""
        return prune.find_gone(self.store, self.facts, samples).num_samples

    def plan_prune(self, samples: Samples, *, run_id: str, began: Beginning | None = None) -> list[Plan]:
        """Plans to remove what left the manifest; call again once they are done, until none comes."""
        return prune.plan_prune(self.store, self.facts, samples, run_id=run_id, began=began)

    def failed(self, *, codes: Sequence[str] = (), dataset: str | None = None) -> Failed:
        """The samples that failed, of some codes or all; writes nothing."""
        return retry.find_failed(self.store, self.facts, codes=codes, dataset=dataset)

    def plan_retry(
        self,
        failed: Failed,
        *,
        allowed: Allowed,
        run_id: str,
        max_samples_per_plan: int = MAX_SAMPLES_PER_PLAN,
    ) -> list[Plan]:
        """Plans failed samples again, less those that this run may not read."""
        return retry.plan_retry(
            self.store,
            self.facts,
            failed,
            allowed=allowed,
            run_id=run_id,
            max_samples_per_plan=max_samples_per_plan,
        )

    def read_plan(
        self, plan: Plan, rows: range | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A plan's samples, as their media lie: all, or a slice; in `sample_schema`, or some columns."""
        return read_plan(self.store, self.facts, plan, rows, columns)

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
        return set(
            self.read_plan(plan, columns=["sample_id"])["sample_id"].to_pylist()
        ) - self.staged_samples(plan)

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
        entries = read_log(self.store, self.facts)
        for dataset, numbers in sorted(entries.plans.items()):
            for number in numbers:
                if (dataset, number) not in entries.done:
                    with open_plan(self.store, self.facts, dataset, number) as (plan, _):
                        yield plan

    def done_plans(self) -> set[tuple[str, int]]:
        """(dataset, number) of every plan that is done."""
        prefix = self.facts.keys.done
        return {place for item in self.store.list(prefix) if (place := numbered(item.key, prefix))}

    def finish_published(self) -> list[Published]:
        """Completes the plans that are published and not done, whoever left them so."""
        finished = (publish.finish_if_published(self.store, self.facts, plan) for plan in self.open_plans())
        return [done for done in finished if done is not None]

    def leases(self, owner: str) -> Leases:
        """By which a run tells others what it works on, and sees what they do."""
        return Leases(self.store, self.facts, owner)

    def collect(self) -> Counter[str]:
        """Deletes what nobody needs any more, if it is older than a day; how many of what."""
        return collect(self.store, self.facts)

    def save_report(self, run_id: str, report: dict[str, Any]) -> str:
        """Writes a run's report; its key."""
        key = self.facts.keys.report(run_id)
        self.store.put(key, json.dumps(report, indent=1, default=str).encode())
        return key
