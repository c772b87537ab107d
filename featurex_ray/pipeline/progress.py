"""Progress of a run: a bar on a terminal, plain lines in a log."""

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

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
    """Samples, clips and failures so far, and the rate at which they came."""

    def __init__(self) -> None:
        self.total = self.samples = self.clips = self.failed = 0
        self.first: float | None = None

    def add(self, samples: int, clips: int, failed: int) -> None:
        self.first = self.first or time.monotonic()
        self.samples += samples
        self.clips += clips
        self.failed += failed

    @property
    def seconds_left(self) -> float | None:
        spent = time.monotonic() - self.first if self.first else 0.0
        rate = self.samples / spent if spent else 0.0
        return (self.total - self.samples) / rate if rate else None

    def line(self) -> str:
        left = self.seconds_left
        eta = "" if left is None else f", about {left:.0f} s left"
        return f"{self.samples:,}/{self.total:,} samples, {self.clips:,} clips, {self.failed:,} failed{eta}"


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self) -> None:
        self._counts = _Counts()
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print the step."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

    def begin(self, num_samples: int) -> None:
        """Set the total."""
        self._counts.total = num_samples

    def advance(self, *, samples: int, clips: int, failed: int) -> None:
        """Count, and print when it is time."""
        self._counts.add(samples, clips, failed)
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.say(self._counts.line())

    def end(self) -> None:
        """Nothing: the report that follows says where it ended."""


class Bar:
    """A progress bar with time left, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bar = RichProgress(
            TextColumn("extract"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples  {task.fields[clips]:,} clips  {task.fields[failed]:,} failed"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._counts = _Counts()
        self._task = self._bar.add_task("extract", total=None, clips=0, failed=0)

    def say(self, text: str) -> None:
        """Print the step above the bar."""
        self._bar.console.print(text, style="dim", highlight=False)

    def begin(self, num_samples: int) -> None:
        """Show the bar."""
        self._bar.update(self._task, total=num_samples)
        self._bar.start()

    def advance(self, *, samples: int, clips: int, failed: int) -> None:
        """Move the bar."""
        self._counts.add(samples, clips, failed)
        self._bar.update(self._task, advance=samples, clips=self._counts.clips, failed=self._counts.failed)

    def end(self) -> None:
        """Take the bar away; the report says the rest."""
        self._bar.stop()


def console_progress() -> Progress:
    """A bar where stderr is a terminal, else lines."""
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()
