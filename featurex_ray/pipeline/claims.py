"""Several runs, the same work: each takes plans that no other run works on, and waits for the rest."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from featurex_ray.pipeline.source import Assignment
from featurex_ray.table.table import FeatureTable

WINDOW_SAMPLES = 2_000_000
"""Samples that a run takes at a time, so that others find some as well, and what it holds stays bounded."""

CLAIMS_AT_ONCE = 16


class Claims:
    """What one run works on, over all its tables."""

    def __init__(self, tables: Sequence[FeatureTable], run_id: str) -> None:
        self._tables = tables
        self._leases = [table.leases(run_id) for table in tables]

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Tells other runs that this one lives."""
        with ExitStack() as hearts:
            for leases in self._leases:
                hearts.enter_context(leases.beating())
            yield

    def take(
        self, waiting: Sequence[Assignment], *, most_samples: int = WINDOW_SAMPLES
    ) -> tuple[list[Assignment], list[Assignment]]:
        """Claims the next assignments of about `most_samples` samples.

        Returns:
            What this run works on now, perhaps nothing; and what is still waiting.
        """
        start = 0
        while start < len(waiting):
            stop = _window(waiting, start, most_samples)
            with ThreadPoolExecutor(CLAIMS_AT_ONCE) as threads:
                claimed = list(threads.map(self._claim, waiting[start:stop]))
            mine = [ours for ours, _ in claimed if ours.plans]
            if mine:
                others = [theirs for _, theirs in claimed if theirs.plans]
                return mine, [*waiting[:start], *others, *waiting[stop:]]
            start = stop
        return [], list(waiting)

    def free_ones(self, waiting: Sequence[Assignment]) -> list[Assignment]:
        """Those that nobody works on; nothing is claimed."""

        def is_free(assignment: Assignment) -> bool:
            return all(self._leases[i].is_free(plan) for i, plan in assignment.plans.items())

        with ThreadPoolExecutor(CLAIMS_AT_ONCE) as threads:
            free = threads.map(is_free, waiting)
            return [assignment for assignment, is_so in zip(waiting, free, strict=True) if is_so]

    def open_ones(self, waiting: Sequence[Assignment]) -> list[Assignment]:
        """What is not done yet, by whomever."""
        done = [table.done_plans() for table in self._tables]
        left = [
            Assignment({i: p for i, p in one.plans.items() if (p.dataset, p.number) not in done[i]})
            for one in waiting
        ]
        return [assignment for assignment in left if assignment.plans]

    def _claim(self, assignment: Assignment) -> tuple[Assignment, Assignment]:
        """Its plans that are this run's now, and those that are another's."""
        mine = {i: plan for i, plan in assignment.plans.items() if self._leases[i].claim(plan)}
        theirs = {i: plan for i, plan in assignment.plans.items() if i not in mine}
        return Assignment(mine), Assignment(theirs)


def _window(waiting: Sequence[Assignment], start: int, most_samples: int) -> int:
    """Where the window that begins at `start` ends: at least one assignment further."""
    num_samples = 0
    for stop in range(start, len(waiting)):
        num_samples += waiting[stop].num_samples
        if num_samples >= most_samples:
            return stop + 1
    return len(waiting)
