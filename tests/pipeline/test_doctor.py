"""What the doctor says of stores that keep their promises, of one that doesn't, and of a cluster."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import botocore.session
import pytest

from featurex_ray.errors import RunError, StoreRefusedError
from featurex_ray.pipeline import doctor
from featurex_ray.pipeline.doctor import Check, examine, raise_if_failed
from featurex_ray.table.store import open_store
from tests.faults.proxy import careless_proxy


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def test_examine(root: str) -> None:
    checks = list(examine(root))
    raise_if_failed(checks)
    found = verdicts(checks)
    assert (found["access"], found["conditional writes"], found["clock"]) == ("ok", "ok", "ok")
    left = [item.key for item in open_store(root).list("") if not item.key.startswith("_featurex/locks/")]
    assert left == []


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_root")


def test_a_store_that_lets_all_win_fails(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with careless_proxy(s3_server) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        start = time.monotonic()
        checks = list(examine(s3_root))
        assert time.monotonic() - start < 10
    assert verdicts(checks)["conditional writes"] == "FAIL"
    with pytest.raises(RunError, match="runs would fail here: conditional writes"):
        raise_if_failed(checks)


def test_an_unreachable_store_fails(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    assert verdicts(list(examine("s3://bucket/out")))["access"] == "FAIL"
    assert time.monotonic() - start < 10


def test_a_missing_bucket_fails(s3_server: str) -> None:
    (access, *_) = examine("s3://there-is-no-such-bucket/out")
    assert (access.verdict, "NoSuchBucket" in access.detail) == ("FAIL", True)


def test_versioning_is_noted(s3_root: str, s3_server: str) -> None:
    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_server)
    bucket = s3_root.split("/")[2]
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert verdicts(list(examine(s3_root)))["versioning"] == "note"


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(0, "ok"), (-30, "ok"), (120, "note"), (-120, "note"), (1000, "FAIL")]
)
def test_clock_skew(seconds: int, verdict: str) -> None:
    assert doctor._skew(datetime.now(UTC) + timedelta(seconds=seconds))[0] == verdict


def test_no_such_store_fails() -> None:
    with pytest.raises(StoreRefusedError, match="gs://"):
        list(examine("gs://bucket/out"))


@pytest.mark.usefixtures("local_ray")
def test_examine_cluster(s3_root: str) -> None:
    found = verdicts(list(examine(s3_root, address="auto")))
    assert found["cluster"] == "ok"
    assert {name.split()[-1] for name in found} >= {"versions", "store", "/dev/shm"}
    assert "FAIL" not in found.values()
