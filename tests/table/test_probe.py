"""The probe, against stores that keep their promises and one that lets all racers win."""

import time
from collections.abc import Iterator

import pytest

from featurex_ray.errors import StoreRefusedError
from featurex_ray.table.probe import RESULT_KEY, probe_store, require_multipart
from featurex_ray.table.store import ObjectStore, open_store
from tests.faults.proxy import careless_proxy
from tests.table.conftest import observed


@pytest.fixture
def careless_endpoint(s3_server: str) -> Iterator[str]:
    """The same server behind a proxy that drops the conditions."""
    with careless_proxy(s3_server) as endpoint:
        yield endpoint


def test_probe_store(store: ObjectStore) -> None:
    result = probe_store(store)
    assert result.create
    assert result.replace
    assert result.multipart_create
    left = [item.key for item in store.list("") if not item.key.startswith("_featurex/locks/")]
    assert left == [RESULT_KEY]


def test_probe_store_is_remembered(store: ObjectStore) -> None:
    first = probe_store(store)
    operations: list[str] = []
    again = probe_store(observed(store, lambda operation, moment, key: operations.append(operation)))
    assert again == first
    assert len(operations) == 2


def test_probe_store_fails(s3_root: str, careless_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", careless_endpoint)
    start = time.monotonic()
    with pytest.raises(StoreRefusedError, match=r"of 12 racing conditional writes .* \(create and replace\)"):
        probe_store(open_store(s3_root))
    assert time.monotonic() - start < 60
    assert list(open_store(s3_root).list("")) == []


def test_require_multipart_fails(s3_root: str) -> None:
    """moto ignores If-Match when a multipart upload completes, so a replacement that needs one is refused."""
    with pytest.raises(StoreRefusedError, match="ignores the conditions of multipart uploads"):
        require_multipart(open_store(s3_root))
