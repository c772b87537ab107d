"""How cost grows: the same extraction over more samples, longer or larger media, or more actors."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image

from featurex_ray.benchmark.contenders import ours
from featurex_ray.benchmark.work import Pieces, Scratch
from featurex_ray.errors import RequestError

Axis = Literal["samples", "length", "size", "actors"]
UNITS: dict[Axis, str] = {
    "samples": "samples",
    "length": "seconds of each video",
    "size": "megapixels of each image",
    "actors": "actors of each pool",
}
SAMPLES = (1_000, 3_000, 10_000, 30_000, 100_000)
LENGTHS = (5, 10, 20, 40, 80)
WIDTHS = (250, 500, 1000, 2000, 4000)
ACTORS = (1, 2, 3, 4)
FRAME_RATE = 25


@dataclass(frozen=True)
class Case:
    """One run of a sweep: its place on the axis, and what to run."""

    value: float
    samples: int
    pieces: Pieces
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """What one run cost.

    Attributes:
        value: Its place on the axis.
        samples: Of its manifest.
        seconds: From the first staged clip on: start-up is left out, and what was decoded meanwhile.
        startup_seconds: Until then.
        stage_seconds: Of all workers together, by stage: the work, whenever it was done.
        driver_cpu_ms: CPU of the driver, a sample, start-up included.
        peak_bytes: The most memory of a process, by `decode`, `extract` and `driver`.
        failures: What part of the samples failed and why; empty where none did.
    """

    value: float
    samples: int
    seconds: float
    startup_seconds: float
    stage_seconds: dict[str, float]
    driver_cpu_ms: float
    peak_bytes: dict[str, int]
    failures: str = ""

    @property
    def work(self) -> float:
        """Seconds of all workers and stages together."""
        return sum(self.stage_seconds.values())


@dataclass(frozen=True)
class Sweep:
    """The points of one axis, ascending."""

    axis: Axis
    points: list[Point]

    @property
    def exponent(self) -> float:
        """p of work ~ value^p, by least squares on the logarithms: 1 is linear."""
        work = [max(point.work, 1e-3) for point in self.points]
        return float(np.polyfit(np.log([p.value for p in self.points]), np.log(work), 1)[0])

    def lines(self) -> Iterator[str]:
        """A table, as a person reads it."""
        stages = ", ".join(self.points[0].stage_seconds)
        yield (
            f"{UNITS[self.axis]:>24} | samples | seconds | start-up | workers' seconds: {stages} | "
            "driver ms/sample | memory MiB"
        )
        for p in self.points:
            memory = ", ".join(f"{name} {size >> 20}" for name, size in p.peak_bytes.items())
            work = ", ".join(f"{seconds:.2f}" for seconds in p.stage_seconds.values())
            yield (
                f"{p.value:>24,g} | {p.samples:>7,} | {p.seconds:7.1f} | {p.startup_seconds:8.1f} | {work} | "
                f"{p.driver_cpu_ms:.3f} | {memory}"
            )
        for p in self.points:
            if p.failures:
                yield f"{p.value:g} {UNITS[self.axis]}: {p.failures}"
        yield f"workers' seconds grow as {self.axis} to the power of {self.exponent:.2f}"

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return asdict(self) | {"exponent": self.exponent}

    def plot(self) -> bytes:
        """A PNG of the stages' work, memory and the driver's CPU over the axis, all logarithmic."""
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        time, memory, driver = figure.subplots(1, 3)
        values = [p.value for p in self.points]
        last = self.points[-1]
        for name in last.stage_seconds:
            time.plot(values, [p.stage_seconds[name] for p in self.points], "o-", label=name)
        time.plot(values, [p.work for p in self.points], "ko-", label=f"all (power {self.exponent:.2f})")
        time.plot(values, [last.work * v / last.value for v in values], "k:", label="linear")
        time.plot(values, [p.seconds for p in self.points], "k--", label="wall clock after start-up")
        time.set_title("workers' seconds", fontsize=9)
        time.legend(fontsize=8)
        for name in last.peak_bytes:
            memory.plot(values, [p.peak_bytes[name] / 2**20 for p in self.points], "o-", label=name)
        memory.set_title("peak memory of a process, MiB", fontsize=9)
        memory.legend(fontsize=8)
        driver.plot(values, [p.driver_cpu_ms for p in self.points], "o-")
        driver.set_title("driver CPU, ms a sample (start-up included)", fontsize=9)
        for each in (time, memory, driver):
            each.set(xscale="log", yscale="log", xlabel=UNITS[self.axis])
            each.grid(alpha=0.3, which="both")
        return _png(figure)


def sweep(
    axis: Axis,
    media: str,
    options: Sequence[str],
    *,
    samples: int,
    work: Scratch,
    say: Callable[[str], None],
) -> Sweep:
    """Run an extraction at each place of an axis.

    Args:
        axis: What grows.
        media: For `samples` and `actors`, as for `benchmark`; the other axes make their own.
        options: Of `featurex extract`.
        samples: Of each run; of the largest one for the axis `samples`.
        work: Where manifests, tables and media that are made lie.
        say: Told of each run.

    Raises:
        RequestError: There are no media, none that an extractor embeds, or too few samples for two places on
            the axis.
        RunError: A run failed.
    """
    if axis == "samples" and samples < SAMPLES[1]:
        raise RequestError(f"--sweep samples begins at {SAMPLES[0]:,}: give --samples {SAMPLES[1]} or more")
    points = []
    for number, case in enumerate(_cases(axis, media, samples, work)):
        points.append(_measured(case, options, work, number))
        say(f"{UNITS[axis]} {case.value:g}: {points[-1].seconds:.1f} s")
    return Sweep(axis, points)


def _measured(case: Case, options: Sequence[str], work: Scratch, number: int) -> Point:
    manifest = work.put(case.pieces.manifest(work.folder / f"manifest-{number}.parquet", case.samples))
    allowed = ["--allow-prefix", case.pieces.prefix] if case.pieces.prefix else []
    run = ours([*options, *case.options, *allowed])
    timed = run.timed(manifest, case.samples, f"{work.uri}/{number}")
    report = timed.report or {}
    return Point(
        case.value,
        case.samples,
        seconds=report["seconds"] - report["startup_seconds"],
        startup_seconds=report["startup_seconds"],
        stage_seconds=report["stage_seconds"],
        driver_cpu_ms=1000 * report["driver_cpu_seconds"] / case.samples,
        peak_bytes=report["peak_bytes"],
        failures=timed.failures,
    )


def _cases(axis: Axis, media: str, samples: int, work: Scratch) -> Iterator[Case]:
    if axis == "samples":
        pieces = Pieces.of(media, work.folder)
        yield from (Case(count, count, pieces) for count in SAMPLES if count <= samples)
    elif axis == "actors":
        pieces = Pieces.of(media, work.folder)
        for count in ACTORS:
            pools = ("--decode-actors", str(count), "--extract-actors", str(count))
            yield Case(count, samples, pieces, pools)
    else:
        values, make = (LENGTHS, write_video) if axis == "length" else (WIDTHS, write_photograph)
        for value in values:
            path, place = make(work.folder / f"{value}", value)
            yield Case(place, samples, Pieces(pa.table({"uri": [work.put(path)]})))


def picture(width: int, height: int) -> Image.Image:
    """A picture with detail at every scale, as photographs have."""
    chance, pixels = np.random.default_rng(5), np.zeros((height, width, 3), np.float32)
    for level in range(2, int(math.log2(width)) + 1):
        across = 2**level
        noise = chance.normal(0, 1, (max(across * height // width, 1), across, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) * 80 / level**1.5
    return Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))


def write_photograph(path: Path, width: int) -> tuple[Path, float]:
    """A JPEG of 3:2; where it lies, and its megapixels."""
    path = path.with_suffix(".jpg")
    height = width * 2 // 3
    picture(width, height).save(path, quality=88)
    return path, width * height / 1e6


def write_video(path: Path, seconds: int) -> tuple[Path, float]:
    """An MPEG-4 video of 320x240 that pans over a picture; where it lies, and its length in seconds."""
    path, wide = path.with_suffix(".mp4"), np.asarray(picture(640, 240))
    with io.BytesIO() as held, av.open(held, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FRAME_RATE)
        stream.width, stream.height, stream.bit_rate = 320, 240, 600_000
        for number in range(seconds * FRAME_RATE):
            left = abs(320 - 2 * number % 640)
            pixels = np.ascontiguousarray(wide[:, left : left + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
        container.close()
        path.write_bytes(held.getvalue())
    return path, float(seconds)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()
