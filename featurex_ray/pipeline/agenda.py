"""What a run is to do: its agenda is asked for plans again and again, until there are none."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from featurex_ray.errors import RequestError
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.log import Beginning, Plan
from featurex_ray.table.table import FeatureTable

FIRST_SAMPLES = 1_000
"""Of a run that has so many hours and doesn't know its rate yet."""
SLACK = 0.8
"""The part of the time left that a plan may be expected to take."""
LEFT_OVER = 0.05
"""The part of the time at whose beginning no plan is begun any more."""


class SampleSet(Protocol):
    """A manifest's samples, or several manifests' merged into one."""

    @property
    def num_samples(self) -> int:
        """How many there are."""

    @property
    def carried(self) -> pa.Schema:
        """The columns that travel along."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The samples in `schemas.sample_schema(carried)`, in the same order each time."""


class Agenda(Protocol):
    """What a run is to do."""

    def plans(self, table: FeatureTable, *, run_id: str) -> list[Plan]:
        """Open plans to see done, whoever made them; none when the run has nothing left to do."""

    def worked(self, num_samples: int) -> None:
        """So many samples' plans are done."""

    def num_left(self, table: FeatureTable) -> int | None:
        """Samples that the run left for another one; None where it leaves none."""


@dataclass
class Budget:
    """How much a run may do before it stops, at a plan's end.

    Args:
        samples: At most so many.
        seconds: Or for about so long; plans are made as large as fits, by the rate so far.
    """

    samples: int | None = None
    seconds: float | None = None
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads `20000` (samples), `6h` or `90m`.

        Raises:
            RequestError: `text` has another form, or is nothing.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(h|m|)", text.strip().replace("_", "").replace(",", ""))
        if match is None or not float(match[1]) or (not match[2] and "." in match[1]):
            raise RequestError(f"--budget {text!r}: give samples (20000) or time (6h, 90m), more than none")
        if not match[2]:
            return cls(samples=int(match[1]))
        return cls(seconds=float(match[1]) * {"h": 3600, "m": 60}[match[2]])

    @property
    def left(self) -> int:
        """Samples that may still be begun."""
        if self.samples is not None:
            return max(self.samples - self.done, 0)
        return self._fitting(self.seconds or 0.0)

    def _fitting(self, seconds: float) -> int:
        spent = time.monotonic() - self.started
        if spent >= seconds * (1 - LEFT_OVER):
            return 0
        if not self.done:
            return FIRST_SAMPLES
        return max(int(self.done / spent * (seconds - spent) * SLACK), 1)

    def take(self, plans: Sequence[Plan]) -> list[Plan]:
        """The first plans that fit; the very first always, unless nothing is left."""
        taken: list[Plan] = []
        left = self.left
        for plan in plans:
            if left <= 0 or (taken and plan.num_samples > left):
                break
            taken.append(plan)
            left -= plan.num_samples
        return taken


@dataclass
class ManifestAgenda:
    """Every sample of a manifest is to be held at its version; with `prune`, and no other one.

    Args:
        samples: The manifest's.
        max_samples_per_plan: Of plans that make a new object.
        prune: Whether what left the manifest leaves the table, once all else is done.
        budget: When to stop before.
    """

    samples: SampleSet
    max_samples_per_plan: int
    prune: bool = False
    budget: Budget | None = None
    _settled: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    _began: dict[str, Beginning] = field(default_factory=dict, init=False)

    def plans(self, table: FeatureTable, *, run_id: str) -> list[Plan]:
        """What is new or changed, then what is gone."""
        most = self.budget.left if self.budget else None
        if most == 0:
            return []
        if table.facts.name not in self._began:
            self._began[table.facts.name] = table.beginning(run_id)
        plans = [] if self._is_settled(table) else self._plan(table, run_id, most)
        if not plans and self.prune:
            began = self._began[table.facts.name]
            plans = table.plan_prune(self.samples.batches, run_id=run_id, began=began)
        return self.budget.take(plans) if self.budget else plans

    def _plan(self, table: FeatureTable, run_id: str, most_samples: int | None) -> list[Plan]:
        plans = table.plan(
            self.samples.batches,
            run_id=run_id,
            max_samples_per_plan=self.max_samples_per_plan,
            most_samples=most_samples,
            began=self._began[table.facts.name],
        )
        ours = [plan for plan in plans if plan.run_id == run_id]
        if sum(plan.num_samples for plan in ours) == self.samples.num_samples and self.budget is None:
            self._settled[table.facts.name] = {
                plan.dataset: plan.number for plan in ours
            }  # they are in order
        return plans

    def _is_settled(self, table: FeatureTable) -> bool:
        """Whether all samples are held for sure: own plans named every one, and no later plan is there.

        To compare them once more would only find that out, and takes long where they are many.
        """
        last = self._settled.pop(table.facts.name, None)
        return last is not None and table.has_no_plan_after(last)

    def worked(self, num_samples: int) -> None:
        """Spends the budget."""
        if self.budget:
            self.budget.done += num_samples

    def num_left(self, table: FeatureTable) -> int | None:
        """Samples that are not held yet, because of the budget."""
        if self.budget is None:
            return None
        work = table.compare(self.samples.batches)
        return work.new + work.changed + work.open


@dataclass
class RetryAgenda:
    """Samples that failed are to be tried once more.

    Args:
        codes: Only these, all if none.
        dataset: Only of this one.
        policy: What this run may read; failures of other samples stay as they are.
        max_samples_per_plan: Of each plan.
    """

    codes: tuple[str, ...]
    dataset: str | None
    policy: ReadPolicy
    max_samples_per_plan: int
    refused: list[str] = field(default_factory=list)
    _asked: bool = False

    def plans(self, table: FeatureTable, *, run_id: str) -> list[Plan]:
        """The failed samples' new plans, once: what fails again stays failed."""
        if self._asked:
            return []
        self._asked = True
        return table.plan_retry(
            table.failed(codes=self.codes, dataset=self.dataset),
            allowed=self._allowed,
            run_id=run_id,
            max_samples_per_plan=self.max_samples_per_plan,
        )

    def worked(self, num_samples: int) -> None:
        """Nothing to note."""

    def num_left(self, table: FeatureTable) -> int | None:  # noqa: ARG002
        """None: there is no budget."""
        return None

    def _allowed(self, rows: pa.Table) -> np.ndarray:
        """(N,) bool; of inline media, the file that holds it is what is read."""
        reads = [row["data_file"] or row["uri"] for row in rows.select(["data_file", "uri"]).to_pylist()]
        refusals = [self.policy.refusal(uri) for uri in reads]
        self.refused += [refusal for refusal in refusals if refusal]
        return np.array([refusal is None for refusal in refusals], bool)
