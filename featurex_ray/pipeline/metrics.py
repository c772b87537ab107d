"""What a run tells Prometheus, by way of Ray: every metric is declared here and nowhere else.

Ray serves them at each node's metrics port and puts `ray_` before their names. Counters are sums over
processes that come and go: look at their `rate()`. A stage that runs without Ray tells nobody.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge, Histogram


class Declared(NamedTuple):
    """A metric: what kind it is, what it means, and its labels."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()


METRICS = {
    "featurex_samples_total": Declared("counter", "Samples that are wholly staged, failed ones included."),
    "featurex_samples_left": Declared("gauge", "Samples of the run that are not staged yet."),
    "featurex_failures_total": Declared(
        "counter", "Units that became failure rows, by table, stage and code.", ("table", "stage", "code")
    ),
    "featurex_clips_total": Declared("counter", "Clips that a stage has done.", ("stage",)),
    "featurex_stage_seconds_total": Declared("counter", "Seconds that workers spent in a stage.", ("stage",)),
    "featurex_wait_seconds_total": Declared(
        "counter", "Seconds that a pool's actors had nothing to do between two calls.", ("stage",)
    ),
    "featurex_fetched_bytes_total": Declared("counter", "Bytes of encoded media that were fetched."),
    "featurex_batch_rows_total": Declared("counter", "Rows of device batches that held a frame or clip."),
    "featurex_batch_slots_total": Declared("counter", "Rows that those batches had room for."),
    "featurex_queued_blocks": Declared("gauge", "Blocks that wait before a stage.", ("stage",)),
    "featurex_pool_workers": Declared("gauge", "Actors of a stage, by state.", ("stage", "state")),
    "featurex_object_store_bytes": Declared("gauge", "Bytes of the object store that the run uses."),
    "featurex_spilled_bytes": Declared("gauge", "Bytes that Ray has spilled to disk, whole cluster."),
    "featurex_publish_seconds": Declared(
        "histogram", "How long it took to publish a plan, by table.", ("table",)
    ),
}

PUBLISH_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
"""Upper bounds of the publish latency's buckets."""


@lru_cache
def _counter(name: str) -> "Counter":
    from ray.util.metrics import Counter

    return Counter(name, METRICS[name].description, METRICS[name].labels)


@lru_cache
def _gauge(name: str) -> "Gauge":
    from ray.util.metrics import Gauge

    return Gauge(name, METRICS[name].description, METRICS[name].labels)


@lru_cache
def _histogram(name: str) -> "Histogram":
    from ray.util.metrics import Histogram

    declared = METRICS[name]
    return Histogram(name, declared.description, boundaries=PUBLISH_SECONDS, tag_keys=declared.labels)


def _has_ray() -> bool:
    """Whether this process is part of a Ray cluster; stages are measured where Ray isn't even installed."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def count(name: str, value: float = 1, **labels: str) -> None:
    """Add to a counter; nothing is nothing.

    Raises:
        KeyError: It is not declared above; so with the others.
    """
    if value > 0 and _has_ray():
        _counter(name).inc(value, labels)


def show(name: str, value: float, **labels: str) -> None:
    """Set a gauge."""
    if _has_ray():
        _gauge(name).set(value, labels)


@contextmanager
def published(table: str) -> Iterator[None]:
    """Note how long what happens inside takes: the publishing of a plan."""
    start = time.perf_counter()
    yield
    if _has_ray():
        _histogram("featurex_publish_seconds").observe(time.perf_counter() - start, {"table": table})


def count_decoded(units: pa.Table) -> None:
    """Tell what a decode call did.

    Args:
        units: In the schema `decoded_schema`.
    """
    for stage in ("fetch", "decode"):
        seconds = pc.sum(units[f"{stage}_seconds"]).as_py() or 0.0
        count("featurex_stage_seconds_total", seconds, stage=stage)
    count("featurex_fetched_bytes_total", pc.sum(units["fetched_bytes"]).as_py() or 0)
    clips = pc.sum(pc.list_value_length(units["clips"])).as_py() or 0
    count("featurex_clips_total", clips, stage="decode")


def count_extracted(*, clips: int, seconds: float, waited: float) -> None:
    """Tell what an extract call did, and how long its actor had nothing to do before."""
    count("featurex_clips_total", clips, stage="extract")
    count("featurex_stage_seconds_total", seconds, stage="extract")
    count("featurex_wait_seconds_total", waited, stage="extract")


def count_batches(*, rows: int, slots: int) -> None:
    """Tell how full device batches were."""
    count("featurex_batch_rows_total", rows)
    count("featurex_batch_slots_total", slots)


def count_staged(*, clips: int, seconds: float) -> None:
    """Tell what a write call did."""
    count("featurex_clips_total", clips, stage="write")
    count("featurex_stage_seconds_total", seconds, stage="write")


def count_failure(*, table: str, stage: str, code: str) -> None:
    """Tell of a unit that became a failure row."""
    count("featurex_failures_total", table=table, stage=stage, code=code)
