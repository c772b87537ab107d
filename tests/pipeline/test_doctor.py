"""What the doctor says of stores that keep their promises, of one that doesn't, and of a cluster."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import botocore.session
import pytest

from featurex_ray.errors import RequestError, RunError, StoreRefusedError
from featurex_ray.pipeline import doctor
from featurex_ray.pipeline.doctor import Check, examine, raise_if_failed
from featurex_ray.table.probe import probe_store
from featurex_ray.table.store import S3Store, Upload, open_store
from tests.faults.proxy import Proxy, careless_proxy, running


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
        checks = list(examine(s3_root))
    assert verdicts(checks)["conditional writes"] == "FAIL"
    with pytest.raises(RunError, match="runs would fail here: conditional writes"):
        raise_if_failed(checks)


def test_an_unreachable_store_fails(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    assert verdicts(list(examine("s3://bucket/out")))["access"] == "FAIL"
    assert time.monotonic() - start < 60  # an S3 client left to itself tries for minutes


def test_a_missing_bucket_fails(s3_server: str) -> None:
    (access, *_) = examine("s3://there-is-no-such-bucket/out")
    assert (access.verdict, "NoSuchBucket" in access.detail) == ("FAIL", True)


def test_versioning_is_noted(s3_root: str, s3_server: str) -> None:
    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_server)
    bucket = s3_root.split("/")[2]
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert verdicts(list(examine(s3_root)))["versioning"] == "note"


def test_a_bucket_without_the_right_to_delete_fails(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(s3_server)
    proxy.forbids_deletes = True
    with running(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        access = next(check for check in examine(s3_root) if check.name == "access")
        assert access.verdict == "FAIL"
        assert "delet" in access.detail.lower()
        with pytest.raises(RequestError, match=r"(?i)delet"):
            probe_store(open_store(s3_root))


def test_uploads_that_may_not_be_listed_are_noted(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdicts(list(examine(s3_root)))["abandoned uploads"] == "ok"

    def refused(self: S3Store, prefix: str) -> Iterator[Upload]:
        raise RequestError(f"uploads {prefix} was refused: AccessDenied")

    monkeypatch.setattr(S3Store, "uploads", refused)
    checks = list(examine(s3_root))
    raise_if_failed(checks)
    assert verdicts(checks)["abandoned uploads"] == "note"


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(0, "ok"), (-30, "ok"), (120, "note"), (-120, "note"), (1000, "FAIL")]
)
def test_clock_skew(seconds: int, verdict: str) -> None:
    assert doctor._skew(datetime.now(UTC) + timedelta(seconds=seconds))[0] == verdict


def test_no_such_store_fails() -> None:
    with pytest.raises(StoreRefusedError, match="gs://"):
        list(examine("gs://bucket/out"))


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ({}, "ok"),
        ({"torch": "2.15.0+cu130"}, "note"),
        ({"numpy": "2.0.1", "python": "3.11.4"}, "note"),
        ({"torch": "2.14.0"}, "FAIL"),
        ({"python": "3.12.1"}, "FAIL"),
    ],
)
def test_a_node_fails_for_what_a_run_would_refuse(theirs: dict[str, str], verdict: str) -> None:
    mine = {"python": "3.11.7", "torch": "2.15.0+cpu", "numpy": "2.0.0"}
    assert doctor._compared(mine | theirs, mine)[0] == verdict


@pytest.mark.usefixtures("local_ray")
def test_examine_cluster(s3_root: str) -> None:
    found = verdicts(list(examine(s3_root, address="auto")))
    assert found["cluster"] == "ok"
    assert {name.split()[-1] for name in found} >= {"versions", "store", "/dev/shm"}
    assert "FAIL" not in found.values()
