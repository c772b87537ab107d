"""Timed runs, ours and the peers': each a fresh process on the same manifest, timed from outside."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from featurex_ray.errors import RequestError, RunError
from featurex_ray.storage import filesystem

PEER_NAMES = {"dataloader": "torch DataLoader loop", "ray-data": "Ray Data as its docs show"}


@dataclass(frozen=True)
class Timed:
    """One run of one contender.

    Attributes:
        samples: Of its manifest.
        seconds: From the process's start to its end.
        report: Its run report, where it is ours.
    """

    samples: int
    seconds: float
    report: dict[str, Any] | None = None

    @property
    def failures(self) -> str:
        """What part of its samples failed and why, for people; nothing where none did or none is known."""
        if self.report is None or not self.report["failed"]:
            return ""
        share = self.report["failed"] / self.report["planned"]
        return f"{share:.1%} of the samples failed: {_codes(self.report['tables'])}"


@dataclass
class Contender:
    """Somebody who does the work, and the runs that were timed: a small and a large one each time.

    Attributes:
        name: As people know it.
        command: Its process, but for manifest and output.
        small: Runs over few samples.
        large: Runs over many.
    """

    name: str
    command: Sequence[str]
    is_ours: bool = False
    small: list[Timed] = field(default_factory=list)
    large: list[Timed] = field(default_factory=list)

    @property
    def steady_rate(self) -> float:
        """Samples a second once it runs: what the large run did more than the small one, over the time
        that it took longer. Start and end are in both, and cancel. The median of all repeats; NaN where a
        large run took no longer, so that nothing can be told."""
        pairs = list(zip(self.small, self.large, strict=True))
        if any(large.seconds <= small.seconds for small, large in pairs):
            return math.nan
        return statistics.median(
            (large.samples - small.samples) / (large.seconds - small.seconds) for small, large in pairs
        )

    @property
    def whole_rate(self) -> float:
        """Samples a second of the large run from start to end; the median."""
        return statistics.median(run.samples / run.seconds for run in self.large)

    @property
    def startup_seconds(self) -> float:
        """What a run takes beyond its samples at the steady rate; the median."""
        return statistics.median(run.seconds for run in self.large) - self.large[0].samples / self.steady_rate

    def run(self, small: str, large: str, sizes: tuple[int, int], below: str) -> None:
        """Do both once, on manifests of the two sizes; the outputs lie below a URI."""
        self.small.append(self.timed(small, sizes[0], f"{below}/small-{len(self.small)}"))
        self.large.append(self.timed(large, sizes[1], f"{below}/large-{len(self.large)}"))

    def timed(self, manifest: str, samples: int, output: str) -> Timed:
        """One run over a manifest of so many samples.

        Raises:
            RunError: It failed.
            RequestError: It is ours, and an extractor failed on every sample: nothing was measured.
        """
        output = f"{output}-{self.name.replace(' ', '-')}"
        command = [word.format(manifest=manifest, output=output) for word in self.command]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RunError(f"{self.name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        if not self.is_ours:
            return Timed(samples, seconds)
        report = _report(output)
        for table in report["tables"]:
            if table["failed"] == table["planned"]:
                raise RequestError(
                    f"{table['extractor']} failed on all {samples:,} samples: {_codes([table])}"
                )
        return Timed(samples, seconds, report)

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        rates = {"steady_rate": self.steady_rate, "startup_seconds": self.startup_seconds}
        known = {name: None if math.isnan(value) else value for name, value in rates.items()}
        return asdict(self) | known | {"whole_rate": self.whole_rate}


def _report(output: str) -> dict[str, Any]:
    """The run report, of the first table: what it counts of the run is the same in each."""
    store, path = filesystem(output)
    report: dict[str, Any] = json.loads(store.cat_file(min(store.glob(f"{path}/_featurex/*/runs/*.json"))))
    return report


def _codes(tables: Sequence[dict[str, Any]]) -> str:
    """Failures of tables by code, the most frequent first."""
    counts = sum((Counter(table["failures_by_code"]) for table in tables), Counter[str]())
    return ", ".join(f"{code} {count:,}" for code, count in counts.most_common())


def ours(options: Sequence[str]) -> Contender:
    """`featurex extract` with these options, as people run it."""
    command = [sys.executable, "-m", "featurex_ray.cli", "extract", "{manifest}", "--output", "{output}"]
    return Contender("featurex extract", [*command, *options], is_ours=True)


def peer(name: str, extractor: str, weights: str, num_cpus: int) -> Contender:
    """One of `PEER_NAMES`."""
    module = [sys.executable, "-m", "featurex_ray.benchmark.peers"]
    return Contender(
        PEER_NAMES[name], [*module, name, "{manifest}", "{output}", extractor, weights, str(num_cpus)]
    )
