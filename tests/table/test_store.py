import pickle
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from featurex_ray.errors import RequestError, StoreRefusedError, StoreUnavailableError, TableDamagedError
from featurex_ray.table import store as stores
from featurex_ray.table.store import (
    LocalStore,
    ObjectStore,
    S3Store,
    UnsettledWriteError,
    filesystem_of,
    open_store,
)
from tests.table.conftest import observed


def test_create(store: ObjectStore) -> None:
    etag = store.create("a/b/c", b"one")
    assert store.read("a/b/c") == (b"one", etag)
    assert store.head("a/b/c") == etag
    assert store.head("a/b") is None


def test_create_fails(store: ObjectStore) -> None:
    store.create("a", b"one")
    with pytest.raises(UnsettledWriteError, match="a"):
        store.create("a", b"two")
    assert store.read("a")[0] == b"one"


def test_replace(store: ObjectStore) -> None:
    first = store.create("a", b"one")
    second = store.replace("a", b"two", etag=first)
    assert store.read("a") == (b"two", second)
    assert first != second


def test_replace_fails(store: ObjectStore) -> None:
    first = store.create("a", b"one")
    store.replace("a", b"two", etag=first)
    with pytest.raises(UnsettledWriteError, match="a"):
        store.replace("a", b"three", etag=first)
    with pytest.raises(UnsettledWriteError, match="b"):
        store.replace("b", b"three", etag=first)
    assert store.read("a")[0] == b"two"


def test_replace_with_the_same_bytes_is_another_generation(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = store.create("a", b"one")
    assert store.replace("a", b"one", etag=first) != first


def test_open_reads_ranges_of_one_generation(store: ObjectStore, tmp_path: Path) -> None:
    body = bytes(range(256)) * 6000  # larger than the tail that comes with opening, and than one buffer
    source = tmp_path / "body"
    source.write_bytes(body)
    with store.scratch() as folder:
        (folder / "body").write_bytes(body)
        store.create("a", folder / "body")
    with store.open("a") as opened:
        assert opened.num_bytes == len(body)
        for start, length in ((0, 10), (len(body) - 5, 100), (1000, 1_200_000), (len(body), 1)):
            opened.file.seek(start)
            assert opened.file.read(length) == body[start : start + length]


def test_open_while_replaced(store: ObjectStore) -> None:
    etag = store.create("a", b"1" * 200_000)
    with store.open("a") as opened:
        store.replace("a", b"2" * 200_000, etag=etag)
        if isinstance(store, S3Store):  # which doesn't keep the old one, but never mixes the two
            with pytest.raises(TableDamagedError, match="was replaced while it was read"):
                opened.file.read()
        else:
            assert opened.file.read() == b"1" * 200_000


def test_open_empty(store: ObjectStore) -> None:
    store.create("a", b"")
    with store.open("a") as opened:
        assert opened.file.read() == b""


@pytest.mark.parametrize("operation", ["read", "open"])
def test_missing_object_fails(store: ObjectStore, operation: str) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        getattr(store, operation)("nothing")


def test_list(store: ObjectStore) -> None:
    for key in ("t/a", "t/b/c", "t.x/a", "u/a"):
        store.create(key, b"12")
    assert [item.key for item in store.list("t/")] == ["t/a", "t/b/c"]
    assert [(item.key, item.num_bytes) for item in store.list("t.x/")] == [("t.x/a", 2)]
    assert list(store.list("nothing/")) == []


def test_list_pages(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LIST_PAGE_KEYS", 2)
    store = open_store(s3_root)
    keys = [f"_featurex/p/{n}" for n in range(5)]
    for key in keys:
        store.put(key, b"")
    assert [item.key for item in store.list("_featurex/p/")] == keys


def test_a_token_that_expired_ends_a_run_that_can_be_run_again(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_root)
    answer = {"Error": {"Code": "ExpiredToken"}, "ResponseMetadata": {"HTTPStatusCode": 400}}

    def expired(*_: object, **__: object) -> None:
        raise ClientError(answer, "GetObject")  # type: ignore[arg-type]

    with pytest.raises(StoreUnavailableError, match="ExpiredToken"):
        store._once("get", "a", expired)  # type: ignore[attr-defined]


def test_put_and_delete(store: ObjectStore) -> None:
    store.put("_featurex/a", b"1")
    etag = store.put("_featurex/a", b"2")
    assert store.read("_featurex/a") == (b"2", etag)
    store.delete("_featurex/a")
    store.delete("_featurex/a")
    assert store.head("_featurex/a") is None


def test_public_objects_are_never_deleted_fails(store: ObjectStore) -> None:
    store.create("t/a", b"1")
    with pytest.raises(ValueError, match="t/a is public"):
        store.delete("t/a")
    with pytest.raises(ValueError, match="t/a is public"):
        store.put("t/a", b"2")
    assert store.read("t/a")[0] == b"1"


def test_multipart(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "UPLOAD_PART_BYTES", 5 * 2**20)
    store = S3Store(*s3_root.removeprefix("s3://").split("/"), single_put_bytes=2**20)
    body = bytes(12 * 2**20)
    operations: list[str] = []
    watched = observed(store, lambda operation, moment, key: operations.append(f"{moment} {operation}"))
    watched.create("a", body)
    assert operations.count("after upload_part") == 3
    assert store.read("a")[0] == body
    with pytest.raises(UnsettledWriteError, match="a"):
        watched.create("a", body)
    assert operations[-1] == "after abort"


def test_hook_sees_every_operation(store: ObjectStore) -> None:
    seen: list[tuple[str, str, str]] = []
    watched = observed(store, lambda *moment: seen.append(moment))
    etag = watched.create("t/a", b"1")
    watched.replace("t/a", b"2", etag=etag)
    watched.read("t/a")
    watched.head("t/a")
    list(watched.list("t/"))
    assert {"before", "after"} == {moment for _, moment, _ in seen}
    assert len(seen) >= 10


def test_stores_can_be_pickled(store: ObjectStore) -> None:
    store.create("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert again.read("a")[0] == b"1"


@pytest.mark.parametrize("uri", ["{}", "file://{}", "{}/"])
def test_open_store(tmp_path: Path, uri: str) -> None:
    assert open_store(uri.format(tmp_path)) == LocalStore(tmp_path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "to a local disk or to s3://bucket/prefix"),
        ("http://host/x", "to a local disk or to s3://bucket/prefix"),
        ("s3:///x", "to a local disk or to s3://bucket/prefix"),
        ("file://host/x", "to a local disk or to s3://bucket/prefix"),
        ("/proc/version", "is a file"),
    ],
)
def test_open_store_fails(uri: str, message: str) -> None:
    with pytest.raises(StoreRefusedError, match=message):
        open_store(uri)


MOUNTS = """\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 21 0:30 / /mnt/nfs rw shared:2 - nfs4 host:/export rw
31 21 0:31 / /mnt/my\\040disk rw - fuse.sshfs host: rw
32 30 254:1 / /mnt/nfs/local rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home", "ext4"),
        ("/mnt/nfs/a/b", "nfs4"),
        ("/mnt/nfsx", "ext4"),
        ("/mnt/my disk/a", "fuse.sshfs"),
        ("/mnt/nfs/local/a", "xfs"),
    ],
)
def test_filesystem_of(path: str, kind: str) -> None:
    assert filesystem_of(Path(path), MOUNTS) == kind


def test_network_filesystem_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        stores, "NETWORK_FILESYSTEMS", {filesystem_of(tmp_path, Path("/proc/self/mountinfo").read_text())}
    )
    with pytest.raises(StoreRefusedError, match="network filesystem"):
        open_store(str(tmp_path))


def test_missing_bucket_fails(s3_server: str) -> None:
    with pytest.raises(RequestError, match="NoSuchBucket"):
        list(open_store("s3://there-is-no-such-bucket/x").list(""))


def test_unreachable_endpoint_fails(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(stores, "TIME_LIMIT_SECONDS", 0.3)
    with pytest.raises(StoreUnavailableError, match="no get in 0 s"):
        open_store("s3://bucket/x").read("a")


def test_full_disk_fails(tmp_path: Path) -> None:
    """A write that breaks off leaves the old generation, and nothing beside it."""
    store = open_store(str(tmp_path))
    etag = store.create("t/a", b"old")

    def full(operation: str, moment: str, key: str) -> None:
        if (operation, moment) == ("rename", "before"):
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreUnavailableError, match=r"can't rename t/a: .*No space left"):
        observed(store, full).replace("t/a", b"new", etag=etag)
    assert store.read("t/a") == (b"old", etag)
    assert list(store.list("_featurex/tmp/")) == []
