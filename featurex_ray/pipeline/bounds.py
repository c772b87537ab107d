"""What bounds a run: pure accounting over what was seen of its stages."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MOST_LOOKS = 400
"""At how busy the stages are, that a run keeps."""


@dataclass(frozen=True)
class StageState:
    """One stage at one moment.

    Attributes:
        workers: Actors that run.
        tasks: Calls in flight, those that wait inside an actor included.
        queued: Blocks that wait before the stage.
        is_held_back: Whether Ray lets its calls start or go on no further, for what comes after is full.
    """

    workers: int
    tasks: int
    queued: int
    is_held_back: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether every worker has something to do, and may do it."""
        return 0 < self.workers <= self.tasks and not self.is_held_back

    @property
    def is_behind(self) -> bool:
        """Whether every worker is busy and more work waits, before the stage or inside its actors."""
        return self.is_busy and (self.queued > 0 or self.tasks > self.workers)


@dataclass
class Occupancy:
    """How busy each stage was over time: a few hundred looks at most, however long the run.

    Attributes:
        seconds: When, since the first look.
        busy: By stage, the workers that had something to do.
        samples: Samples that were staged by then.
    """

    seconds: list[float] = field(default_factory=list)
    busy: dict[str, list[int]] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def add(self, seconds: float, stages: dict[str, StageState], samples: int) -> None:
        """Note one look, unless so many were noted that only each second, fourth ... one is."""
        if self._seen % self._every == 0:
            self.seconds.append(round(seconds, 1))
            self.samples.append(samples)
            for name, stage in stages.items():
                before = self.busy.setdefault(name, [0] * (len(self.seconds) - 1))
                before.append(min(stage.workers, stage.tasks))
        self._seen += 1
        if len(self.seconds) == MOST_LOOKS:
            self._every *= 2
            self.seconds, self.samples = self.seconds[::2], self.samples[::2]
            self.busy = {name: counts[::2] for name, counts in self.busy.items()}

    def to_json(self) -> dict[str, list[Any]]:
        """Columns of equal length."""
        return {"seconds": self.seconds, **self.busy, "samples": self.samples}


@dataclass
class Watched:
    """What was seen of a run.

    Attributes:
        bounds: Looks at which a stage was what held the run up.
        most_workers: The most workers that each stage had at a time.
        fewest_workers: The fewest, once it had one.
        object_store_peak_bytes: The most that the run used of the object store, by Ray's account.
        spilled_bytes: What Ray spilled of the run's blocks, by Ray's account.
        occupancy: How busy the stages were over time.
        samples: Samples that are staged by now.
    """

    bounds: Counter[str] = field(default_factory=Counter)
    most_workers: dict[str, int] = field(default_factory=dict)
    fewest_workers: dict[str, int] = field(default_factory=dict)
    object_store_peak_bytes: int = 0
    spilled_bytes: int = 0
    occupancy: Occupancy = field(default_factory=Occupancy)
    samples: int = 0

    def see(
        self, stages: dict[str, StageState], *, seconds: float, object_store_bytes: int, spilled_bytes: int
    ) -> None:
        """Note one look at the run, so many seconds after the first."""
        self.occupancy.add(seconds, stages, self.samples)
        self.object_store_peak_bytes = max(self.object_store_peak_bytes, object_store_bytes)
        self.spilled_bytes = max(self.spilled_bytes, spilled_bytes)
        for name, stage in stages.items():
            self.most_workers[name] = max(self.most_workers.get(name, 0), stage.workers)
            if stage.workers:
                fewest = self.fewest_workers.get(name, stage.workers)
                self.fewest_workers[name] = min(fewest, stage.workers)
        if (bound := bound_of(stages)) is not None:
            self.bounds[bound] += 1


def bound_of(stages: dict[str, StageState]) -> str | None:
    """The stage that holds a run up now.

    That is the last one whose workers are all busy while work waits for them, or while nothing comes
    from before. Decoding needs neither: its source is as fast as it likes. None where no stage is at
    its limit, as while actors start.
    """
    for name, before in (("write", ("decode", "extract")), ("extract", ("decode",))):
        idle_before = not any(stages[b].is_busy for b in before if b in stages)
        if name in stages and (stages[name].is_behind or (stages[name].is_busy and idle_before)):
            return name
    return "decode" if "decode" in stages and stages["decode"].is_busy else None


def shares(bounds: dict[str, int], *, fetch_seconds: float, decode_seconds: float) -> dict[str, float]:
    """What bounded a run, as shares of the looks at it, the largest first.

    A decode actor fetches its next block while it decodes one. Where fetching takes longer than
    decoding, the storage is what it waits for.
    """
    total = sum(bounds.values())
    found = {name: count / total for name, count in bounds.items() if count}
    if "decode" in found and fetch_seconds > decode_seconds:
        found["storage"] = found.pop("decode")
    return {name: round(found[name], 3) for name in sorted(found, key=lambda name: -found[name])}
