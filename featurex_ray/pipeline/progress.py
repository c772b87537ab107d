"""Progress of a run: a bar on a terminal, plain lines in a log."""

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from featurex_ray.pipeline import events

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What a run tells of itself while it works."""

    def say(self, text: str) -> None:
        """Note a step in words."""

    def begin(self, num_samples: int) -> None:
        """Work on this many samples begins."""

    def advance(self, *, samples: int, clips: int, failed: int) -> None:
        """So many more are staged."""

    def end(self) -> None:
        """Work on samples is over."""


class Silent:
    """Tells nothing; the default of the Python API."""

    def say(self, text: str) -> None:
        """Nothing."""

    def begin(self, num_samples: int) -> None:
        """Nothing."""

    def advance(self, *, samples: int, clips: int, failed: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class _Counts:
    """Samples, clips and failures so far, and the rate since work on them began."""

    def __init__(self) -> None:
        self.total = self.samples = self.clips = self.failed = 0
        self.began = time.monotonic()

    def begin(self, num_samples: int) -> None:
        """Work on so many more samples begins; a run can have several rounds."""
        if not self.samples:
            self.began = time.monotonic()
        self.total = self.samples + num_samples

    def add(self, samples: int, clips: int, failed: int) -> None:
        self.samples += samples
        self.clips += clips
        self.failed += failed

    @property
    def rate(self) -> float:
        """Samples a second, the start of the actors included."""
        return self.samples / max(time.monotonic() - self.began, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """Time left at that rate; None before there is one."""
        return (self.total - self.samples) / self.rate if self.rate else None

    def line(self) -> str:
        """All of it for people."""
        left = self.seconds_left
        eta = "" if left is None else f", {self.rate:,.1f} samples/s, about {left:.0f} s left"
        return f"{self.samples:,}/{self.total:,} samples, {self.clips:,} clips, {self.failed:,} failed{eta}"

    def fields(self) -> dict[str, float | None]:
        """All of it for machines."""
        left = self.seconds_left
        return {
            "samples": self.samples,
            "num_samples": self.total,
            "clips": self.clips,
            "failed": self.failed,
            "samples_per_second": round(self.rate, 3),
            "seconds_left": None if left is None else round(left, 1),
        }


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self) -> None:
        self._counts = _Counts()
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print the step."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

    def _report(self) -> None:
        self.say(self._counts.line())

    def begin(self, num_samples: int) -> None:
        """Set the total."""
        self._counts.begin(num_samples)

    def advance(self, *, samples: int, clips: int, failed: int) -> None:
        """Count, and print when it is time."""
        self._counts.add(samples, clips, failed)
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._report()

    def end(self) -> None:
        """Nothing: the report that follows says where it ended."""


class JsonLines(Lines):
    """The same as events, for machines."""

    def say(self, text: str) -> None:
        """Write the step."""
        events.emit("step", text=text)

    def _report(self) -> None:
        events.emit("progress", **self._counts.fields())

    def end(self) -> None:
        """Write where it ended."""
        self._report()


class Bar:
    """A progress bar with time left, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bar = RichProgress(
            TextColumn("extract"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples  {task.fields[clips]:,} clips  {task.fields[failed]:,} failed"),
            TextColumn("{task.fields[rate]:,.1f}/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._counts = _Counts()
        self._task = self._bar.add_task("extract", total=None, clips=0, failed=0, rate=0.0)

    def say(self, text: str) -> None:
        """Print the step above the bar."""
        self._bar.console.print(text, style="dim", highlight=False, markup=False, emoji=False)

    def begin(self, num_samples: int) -> None:
        """Show the bar."""
        self._counts.begin(num_samples)
        self._bar.update(self._task, total=self._counts.total)
        self._bar.start()

    def advance(self, *, samples: int, clips: int, failed: int) -> None:
        """Move the bar."""
        self._counts.add(samples, clips, failed)
        now = self._counts
        self._bar.update(self._task, advance=samples, clips=now.clips, failed=now.failed, rate=now.rate)

    def end(self) -> None:
        """Take the bar away; the report says the rest."""
        self._bar.stop()


def console_progress() -> Progress:
    """A bar where stderr is a terminal, else lines; events where they are asked for."""
    if events.is_json():
        return JsonLines()
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()
