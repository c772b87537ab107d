"""Does the store let exactly one of many racing writers win? Found out, never believed.

The protocol publishes by one conditional request, so a store that answers "done" to two racers
loses or doubles rows. Some servers that speak S3 do just that.
"""

import json
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from featurex_ray.errors import RequestError, StoreRefusedError
from featurex_ray.table.store import PRIVATE, ObjectStore, UnsettledWriteError

NUM_RACERS = 12
RESULT_KEY = PRIVATE + "store.json"


@dataclass(frozen=True)
class ProbeResult:
    """What a store was seen to honour at one endpoint.

    The multipart two matter only for objects above 5 GiB, see `require_multipart`.
    """

    uri: str
    endpoint: str
    create: bool
    replace: bool
    multipart_create: bool
    multipart_replace: bool


def probe_store(store: ObjectStore) -> ProbeResult:
    """Races conditional creates and replaces, single and multipart, once per root and endpoint.

    Raises:
        StoreRefusedError: More, or fewer, than one racer won a race that the protocol relies on.
    """
    known = _remembered(store)
    if known is not None:
        return known
    create, replace = race(store, multipart=False)
    if not (create and replace):
        races = {"create": create, "replace": replace}
        lost = " and ".join(name for name, won in races.items() if not won)
        raise StoreRefusedError(
            f"{store.uri}: of {NUM_RACERS} racing conditional writes not exactly one won ({lost}); this "
            "store would lose or double rows. Use one that honours If-None-Match and If-Match"
        )
    result = ProbeResult(store.uri, store.endpoint, create, replace, *race(store, multipart=True))
    store.put(RESULT_KEY, json.dumps(asdict(result), indent=1).encode())
    return result


def require_multipart(store: ObjectStore) -> None:
    """Refuses an object too large for one PUT where multipart conditions aren't honoured.

    Raises:
        StoreRefusedError: They aren't, by what the probe saw.
    """
    result = probe_store(store)
    if not (result.multipart_create and result.multipart_replace):
        raise StoreRefusedError(
            f"{store.uri}: the store ignores the conditions of multipart uploads, and this object is larger "
            "than one PUT may be. Use a smaller --max-samples-per-plan"
        )


def race(store: ObjectStore, *, multipart: bool) -> tuple[bool, bool]:
    """Races creates, then replaces, and removes what they wrote.

    Returns:
        Whether exactly one racer won each.
    """
    key = f"{PRIVATE}probe/{uuid.uuid4().hex}"
    try:
        created = _one_winner(store, key, lambda body: store.create(key, body, multipart=multipart))
        etag = store.head(key)
        if etag is None:
            return False, False
        replaced = _one_winner(
            store, key, lambda body: store.replace(key, body, etag=etag, multipart=multipart)
        )
        return created, replaced
    finally:
        store.delete(key)


def _remembered(store: ObjectStore) -> ProbeResult | None:
    try:
        result = ProbeResult(**json.loads(store.read(RESULT_KEY)[0]))
    except FileNotFoundError:
        return None
    return result if (result.uri, result.endpoint) == (store.uri, store.endpoint) else None


def _one_winner(store: ObjectStore, key: str, write: Callable[[bytes], str]) -> bool:
    """Whether one racer was told that it won, and it is its body that lies there."""
    barrier = threading.Barrier(NUM_RACERS)
    bodies = [f"{uuid.uuid4()}".encode() for _ in range(NUM_RACERS)]

    def race(body: bytes) -> bytes | None:
        barrier.wait()
        try:
            write(body)
        except UnsettledWriteError:
            return None
        except RequestError as error:
            raise StoreRefusedError(f"{store.uri}: a conditional write was refused: {error}") from error
        return body

    with ThreadPoolExecutor(NUM_RACERS) as racers:
        winners = [body for body in racers.map(race, bodies) if body is not None]
    return len(winners) == 1 and store.read(key)[0] == winners[0]
