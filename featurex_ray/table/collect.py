"""Collect what nobody refers to any more (protocol, step 6): inside `_featurex/` only, older than a day.

Invariant: a part is deleted only after its plan was seen done, and what is done needs no part. Public
objects are never deleted; an upload that is aborted never became an object.
"""

import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta

from featurex_ray.table.facts import TableFacts
from featurex_ray.table.layout import numbered, part_place
from featurex_ray.table.log import read_log
from featurex_ray.table.store import PRIVATE, ObjectStore

MIN_AGE = timedelta(days=1)
"""No request is under way for so long, and no worker sleeps for so long unnoticed."""

CLOCK = f"{PRIVATE}clock/"


def collect(store: ObjectStore, facts: TableFacts, *, min_age: timedelta = MIN_AGE) -> Counter[str]:
    """Deletes parts and leases of done plans, temporary files, and aborts abandoned uploads.

    Args:
        store: Where the table lies.
        facts: The table's.
        min_age: By the store's clock.

    Returns:
        How many of what.
    """
    before = now(store) - min_age
    counts: Counter[str] = Counter()
    for what, key in _collectable(store, facts, before):
        store.delete(key)
        counts[what] += 1
    for prefix in (facts.keys.private, facts.keys.features, facts.keys.failures):
        for upload in store.uploads(prefix):
            if upload.started < before:
                store.abort(upload)
                counts["uploads"] += 1
    return counts


def now(store: ObjectStore) -> datetime:
    """The time by the store's clock: that of an object which is written for it."""
    key = f"{CLOCK}{uuid.uuid4().hex}"
    store.put(key, b"")
    try:
        return next(item.modified for item in store.list(key))
    finally:
        store.delete(key)


def _collectable(store: ObjectStore, facts: TableFacts, before: datetime) -> Iterator[tuple[str, str]]:
    keys = facts.keys
    done = read_log(store, facts).done  # first: what is listed below may belong to plans done since
    for item in store.list(keys.parts):
        if item.modified < before and part_place(item.key, keys.parts) in done:
            yield "parts", item.key
    for item in store.list(keys.leases):
        if item.modified < before and numbered(item.key, keys.leases) in done:
            yield "leases", item.key
    for prefix in (keys.beats, f"{PRIVATE}tmp/", f"{PRIVATE}probe/", CLOCK):
        for item in store.list(prefix):
            if item.modified < before:
                yield "temporary files", item.key
