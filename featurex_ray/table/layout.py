"""Where everything of a table lies: keys below the output's root, built here and nowhere else."""

import re
from dataclasses import dataclass

from featurex_ray.errors import RequestError
from featurex_ray.table.store import PRIVATE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Dataset values and table names, so that keys need no escaping and show the value itself."""

_OTHERS = {"clock", "doctor", "locks", "probe", "store.json", "tmp"}
"""What else lies below `PRIVATE`, where each table has a folder of its name."""

_PART = re.compile(r"dataset=(?P<dataset>[^/]+)/(?P<number>\d{10})/[^/]+")

_NUMBERED = re.compile(r"dataset=(?P<dataset>[^/]+)/(?P<number>\d{10})\.[a-z]+")


@dataclass(frozen=True)
class Keys:
    """The keys of one table.

    Raises:
        RequestError: The name can't be a table's.
    """

    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name.endswith(".failures"):
            raise RequestError(
                f"{self.name!r} can't be a table's name: use letters, digits, '.', '_' and '-', begin with a "
                "letter or digit, and don't end in '.failures'"
            )
        if self.name in _OTHERS:
            raise RequestError(
                f"{self.name!r} can't be a table's name: {PRIVATE}{self.name} holds what belongs to no table"
            )

    @property
    def features(self) -> str:
        """The prefix of the public feature objects."""
        return f"{self.name}/"

    @property
    def failures(self) -> str:
        """The prefix of the public failure objects."""
        return f"{self.name}.failures/"

    @property
    def private(self) -> str:
        """The prefix of everything that is not for readers."""
        return f"{PRIVATE}{self.name}/"

    @property
    def facts(self) -> str:
        """The table's facts."""
        return f"{self.private}table.json"

    @property
    def plans(self) -> str:
        """The prefix of the log."""
        return f"{self.private}plans/"

    @property
    def done(self) -> str:
        """The prefix of the done records."""
        return f"{self.private}done/"

    @property
    def parts(self) -> str:
        """The prefix of all plans' parts."""
        return f"{self.private}staging/"

    @property
    def leases(self) -> str:
        """The prefix of the leases."""
        return f"{self.private}leases/"

    @property
    def beats(self) -> str:
        """The prefix of the counters of runs that hold leases."""
        return f"{self.private}beats/"

    def feature_object(self, dataset: str, number: int) -> str:
        """A public feature object; `number` is that of the plan that created it."""
        return f"{self.features}dataset={dataset}/{number:010d}.parquet"

    def failure_object(self, dataset: str, number: int) -> str:
        """The public failure object of a plan."""
        return f"{self.failures}dataset={dataset}/{number:010d}.parquet"

    def plan(self, dataset: str, number: int) -> str:
        """An entry of the log."""
        return f"{self.plans}dataset={dataset}/{number:010d}.parquet"

    def done_record(self, dataset: str, number: int) -> str:
        """The record that a plan is done."""
        return f"{self.done}dataset={dataset}/{number:010d}.json"

    def staging(self, dataset: str, number: int) -> str:
        """The prefix of a plan's parts."""
        return f"{self.parts}dataset={dataset}/{number:010d}/"

    def lease(self, dataset: str, number: int) -> str:
        """A plan's lease."""
        return f"{self.leases}dataset={dataset}/{number:010d}.json"

    def beat(self, run_id: str) -> str:
        """The counter of a run that holds leases."""
        return f"{self.beats}{run_id}.json"

    def report(self, run_id: str) -> str:
        """A run's report."""
        return f"{self.private}runs/{run_id}.json"


def numbered(key: str, prefix: str) -> tuple[str, int] | None:
    """(dataset, plan number) of a key below a prefix, or None where it isn't of that form."""
    match = _NUMBERED.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
    return (match["dataset"], int(match["number"])) if match else None


def part_place(key: str, prefix: str) -> tuple[str, int] | None:
    """(dataset, plan number) of a staged part below `Keys.parts`, or None where it isn't of that form."""
    match = _PART.fullmatch(key, len(prefix))
    return (match["dataset"], int(match["number"])) if match else None
