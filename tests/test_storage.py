import asyncio
import contextlib
import gzip
import io
import json
import mmap
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pytest
from fsspec.asyn import get_loop
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import infer_storage_options
from hypothesis import given, settings
from hypothesis import strategies as st

from featurex_ray.errors import FetchError, RefusedUriError, RequestError
from featurex_ray.storage import Fetched, Fetcher, ReadPolicy, filesystem, parse, redact, resolve, uri_of
from featurex_ray.storage.objects import WebObjects
from featurex_ray.storage.web import web_filesystem
from tests.faulty_store import FaultyStore, use_store

HOME = "s3://bkt/manifests/m.parquet"
NAMES = Path(__file__).parents[1].parent / "shared" / "data" / "awkward" / "names.json"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    with FaultyStore() as server:
        use_store(server, monkeypatch)
        yield server


class HostedFileSystem(MemoryFileSystem):
    """`hosted://host:port/path`, as hdfs and ftp: one store a host, which is no part of the path."""

    stores: ClassVar[dict[str, dict[str, object]]] = {}

    def __init__(self, host: str, port: int, **options: object) -> None:
        super().__init__(**options)
        self.store, self.pseudo_dirs = self.stores.setdefault(host, {}), [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(infer_storage_options(path)["path"]).strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, object]:
        found = infer_storage_options(path)
        return {"host": found["host"], "port": found["port"]}


def fetcher(home: str = HOME, **options: object) -> Fetcher:
    policy = ReadPolicy(home, options.pop("allow", ()), options.pop("only", ()))
    return Fetcher(policy, **{"backoff_seconds": 0.01, "max_attempts": 4, **options})


def failure(uri: str, **options: object) -> FetchError:
    with pytest.raises(FetchError, match=r"\w+: ") as caught, fetcher(**options) as reader:
        reader.fetch(uri)
    return caught.value


def make_tar(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


class TestUri:
    @pytest.mark.parametrize(
        ("uri", "parts"),
        [
            ("s3://bkt/a b/c%03d?x#y[1]*.jpg", ("s3", "bkt", "a b/c%03d?x#y[1]*.jpg", None)),
            ("S3A://Bkt/k", ("s3", "Bkt", "k", None)),
            ("gcs://bkt/k", ("gs", "bkt", "k", None)),
            ("/data/colon:file.jpg", ("file", "", "/data/colon:file.jpg", None)),
            ("file:///data/x.jpg", ("file", "", "/data/x.jpg", None)),
            ("file://localhost/data/x.jpg", ("file", "", "/data/x.jpg", None)),
            ("file:/data/x.jpg", ("file", "", "/data/x.jpg", None)),
            ("https://Host.org/a?sig=1", ("https", "host.org", "a?sig=1", None)),
            ("s3://bkt/s-0.tar::in/a.jpg", ("s3", "bkt", "s-0.tar", "in/a.jpg")),
            ("s3://bkt/s.tar::a.tar::b.jpg", ("s3", "bkt", "s.tar", "a.tar::b.jpg")),
            ("s3://bkt/no::tar.jpg", ("s3", "bkt", "no::tar.jpg", None)),
        ],
    )
    def test_parse(self, uri: str, parts: tuple[str, str, str, str | None]) -> None:
        location = parse(uri)
        assert (location.scheme, location.root, location.path, location.member) == parts

    @settings(deadline=None, max_examples=50)
    @given(st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\%."), min_size=1))
    def test_parse_is_literal(self, name: str) -> None:
        assert parse(f"s3://bkt/dir/{name}.jpg").path == f"dir/{name}.jpg"
        assert parse(f"/dir/{name}.jpg").path == f"/dir/{name}.jpg"

    @pytest.mark.parametrize(
        ("uri", "why"),
        [
            ("", "empty"),
            ("s3://bkt/a\x00b", "control"),
            ("s3:///k", "bucket"),
            ("s3://user:pw@bkt/k", "bucket"),
            ("file://otherhost/etc/x", "another host"),
            ("http:/x", "neither"),
            ("s3://bkt/%2e%2e/k", "hides"),
            ("s3://bkt/s.tar.gz::a.jpg", "compressed"),
            ("s3://bkt/s.tar::", "'::'"),
        ],
    )
    def test_parse_fails(self, uri: str, why: str) -> None:
        with pytest.raises(RefusedUriError, match=why):
            parse(uri)

    def test_resolve(self) -> None:
        assert resolve("x/a.jpg", relative_to="s3://bkt/m/all.csv") == "s3://bkt/m/x/a.jpg"
        assert resolve("http:__evil.jpg", relative_to="/data/all.csv") == "/data/http:__evil.jpg"
        assert resolve("/x/a.jpg", relative_to="s3://bkt/m/all.csv") == "/x/a.jpg"
        assert resolve("a.jpg", relative_to="m.csv") == f"{Path.cwd()}/a.jpg"

    @pytest.mark.parametrize(
        "uri",
        [
            "https://me:hunter2@host/x",
            "https://host/x?X-Amz-Signature=hunter2",
            "s3://key:hunter2@bkt/x",
            "s3://bkt/x?X-Amz-Signature=hunter2",
        ],
    )
    def test_redact(self, uri: str) -> None:
        assert "hunter2" not in redact(uri)
        with pytest.raises(RefusedUriError, match=r"\*\*\*") as caught:
            ReadPolicy("s3://other/m.csv").check(uri)
        assert "hunter2" not in str(caught.value)


HOSTILE = [
    *("/etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "file:etc/passwd"),
    *(
        "File://localhost/etc/passwd",
        "file://evil/etc/passwd",
        "//etc/passwd",
        "/proc/self/environ",
        "file://",
    ),
    *("http://169.254.169.254/latest/meta-data/", "https://example.org/x.jpg", "HTTP://example.org/x.jpg"),
    *("http:/example.org/x.jpg", "http://[::1]/x", "http://0x7f000001/x", "http://bkt/manifests/x.jpg"),
    *(
        "ftp://example.org/x",
        "sftp://example.org/x",
        "ssh://example.org/x",
        "smb://example.org/x",
        "data://x/y",
    ),
    *("gs://bkt/x.jpg", "gcs://bkt/x.jpg", "az://bkt/x.jpg", "abfs://bkt/x.jpg", "hdfs://bkt/x.jpg"),
    *("s3://other/x.jpg", "S3://other/x.jpg", "s3a://other/x.jpg", "s3n://other/x.jpg", "s3://bkt2/x.jpg"),
    *(
        "s3://bkt.evil.org/x.jpg",
        "s3://BKT/x.jpg",
        "s3://bkt@other/x.jpg",
        "s3://user:pw@bkt/x",
        "s3://bkt:80/x",
    ),
    *(
        "s3://bkt%2fother/x",
        "s3://bkt\\other/x",
        "s3:///bkt/x.jpg",
        "s3://",
        "s3:/bkt/x.jpg",
        "s3://bkt",
        "s3://bkt/",
    ),
    *(
        "s3://bkt/../other/x.jpg",
        "s3://bkt/a/../../other/x",
        "s3://bkt/..",
        "s3://bkt/a/..",
        "../other/x.jpg",
    ),
    *("s3://bkt/%2e%2e/other/x", "s3://bkt/%2E%2E/x", "s3://bkt/.%2e/x", "s3://bkt/%252e%252e/x"),
    *(
        "s3://bkt/..%2fother/x",
        "s3://bkt/a%2f..%2f..%2fx",
        "s3://bkt/..\\other\\x",
        "s3://bkt/%c0%ae%c0%ae/x",
    ),
    *("s3://bkt/..%5cother", "a/../../x.jpg", "%2e%2e/x.jpg", "s3://bkt/s.tar::../../etc/passwd"),
    *("s3://bkt/a\x00.jpg", "s3://bkt/a\r\nHost: evil", "a\nb.jpg", "\x00", "", "/etc/passwd\x00.jpg"),
    *("simplecache::s3://bkt/x", "filecache::file:///etc/passwd", "zip://x.jpg::s3://bkt/a.zip"),
    *(
        "tar://x::file:///etc/x.tar",
        "memory://x/y",
        "local:///etc/passwd",
        "github://a:b@main/x",
        "reference://x/y",
    ),
    *("s3://bkt/s.tar.gz::x.jpg", "s3://bkt/s.tgz::x.jpg", "s3://bkt/s.tar::", "/etc/s.tar::x.jpg"),
    *("s3://arn:aws:s3:eu-west-1:1:accesspoint/x/y", "c:/windows/win.ini", "jar:/etc/x"),
]


class TestReadPolicy:
    def test_hostile_uris_are_refused_without_io(self, store: FaultyStore) -> None:
        assert len(set(HOSTILE)) >= 60
        opened: list[str] = []
        watching = threading.Event()
        sys.addaudithook(
            lambda event, args: opened.append(event) if watching.is_set() and event in _IO else None
        )
        with fetcher() as reader:
            watching.set()
            errors = dict(reader.fetch_many(resolve(uri, relative_to=HOME) for uri in HOSTILE))
            watching.clear()
        passed = [HOSTILE[i] for i, e in errors.items() if isinstance(e, Fetched) or e.code != "refused_uri"]
        assert passed == []
        assert len(errors) == len(HOSTILE)
        assert (opened, store.requests) == ([], [])

    @pytest.mark.parametrize("uri", HOSTILE)
    def test_a_quick_look_never_lets_hostile_uris_pass(self, uri: str) -> None:
        assert ReadPolicy(HOME).plainly_allowed(pa.array([uri])).to_pylist() == [False]

    @pytest.mark.parametrize(
        ("home", "allow", "only", "uri"),
        [
            (HOME, (), (), "s3://bkt/x.jpg"),
            (HOME, (), (), "s3a://bkt/deep/x%03d.jpg"),
            (HOME, ("s3://other/pics",), (), "s3://other/pics/x.jpg"),
            (HOME, ("s3://other",), (), "s3://other/x.jpg"),
            (HOME, ("gs://",), (), "gs://any/x.jpg"),
            (HOME, ("/mnt/media/",), (), "/mnt/media/x.jpg"),
            (HOME, ("https://host.org/pub",), (), "https://HOST.org/pub/x.jpg?sig=1"),
            (HOME, (), ("s3://bkt/only",), "s3://bkt/only/x.jpg"),
            ("/m.csv", (), (), "/etc/hostname"),
            ("m.csv", (), (), "s3://any/x.jpg"),
            ("/m.csv", (), (), "/data/../pics/x.jpg"),
            ("/m.csv", (), ("/pics",), "/data/../pics/x.jpg"),
            ("/m/*.csv", (), (), "/a/names...jpg"),
        ],
    )
    def test_check(self, home: str, allow: tuple[str, ...], only: tuple[str, ...], uri: str) -> None:
        ReadPolicy(home, allow, only).check(uri)

    @pytest.mark.parametrize(
        ("home", "allow", "only", "uri", "why"),
        [
            (HOME, ("s3://other/pics",), (), "s3://other/pics2/x.jpg", "--allow-prefix"),
            (HOME, ("s3://other/pics",), (), "s3://other/pics/../x.jpg", r"'\.\.'"),
            (HOME, ("https://host.org",), (), "https://host.org@evil.org/x", "--allow-prefix"),
            (HOME, ("https://host.org",), (), "https://host.org.evil.org/x", "--allow-prefix"),
            (HOME, ("/mnt/media",), (), "/mnt/media/../secret", "--allow-prefix"),
            (HOME, (), ("s3://bkt/only",), "s3://bkt/x.jpg", "--only-prefix"),
            (HOME, ("s3://other",), ("s3://bkt/only",), "s3://other/x.jpg", "--only-prefix"),
            ("/m.csv", (), ("/pics",), "/pics/../etc/passwd", "--only-prefix"),
            ("/m.csv", (), ("/pics",), "s3://bkt/pics/x.jpg", "--only-prefix"),
            ("/m.csv", (), (), "http://host/x.jpg", "--allow-prefix"),
            ("/m.csv", (), (), "sftp://host/x.jpg", "--allow-prefix"),
            ("https://host/m.csv", (), (), "https://host/x.jpg", "--allow-prefix"),
        ],
    )
    def test_check_fails(
        self, home: str, allow: tuple[str, ...], only: tuple[str, ...], uri: str, why: str
    ) -> None:
        with pytest.raises(RefusedUriError, match=why):
            ReadPolicy(home, allow, only).check(uri)

    @pytest.mark.parametrize(
        "host",
        [
            *(
                "127.0.0.1",
                "127.0.0.1:8080",
                "10.1.2.3",
                "172.16.0.1",
                "192.168.1.1",
                "100.64.0.1",
                "0.0.0.0",
            ),
            *(
                "169.254.169.254",
                "[::1]",
                "[::]",
                "[fe80::1]",
                "[fe80::1%25eth0]",
                "[fd00::1]",
                "[fd00:ec2::254]",
            ),
            *("[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]"),
            *(
                "2130706433",
                "0x7f000001",
                "017700000001",
                "127.1",
                "0x7f.1",
                "169.254.43518",
                "1.1.1.1@10.0.0.1",
            ),
            *("224.0.0.1", "255.255.255.255", "[ff02::1]", "[::1", "x.y@169.254.169.254:80", "10.0.0.1."),
        ],
    )
    def test_private_hosts_fail(self, host: str) -> None:
        policy = ReadPolicy(HOME, allow_prefixes=("http://", "https://"))
        policy.check("https://example.com/x.jpg")
        policy.check("http://8.8.8.8:8080/x.jpg")
        policy.check("https://[2606:4700::1111]/x.jpg")
        with pytest.raises(RefusedUriError, match=r"is refused|is malformed|has no valid"):
            policy.check(f"http://{host}/x.jpg")

    def test_a_private_address_may_be_named_but_no_link_local_one(self) -> None:
        ReadPolicy(HOME, ("http://10.0.0.5:80/media",)).check("http://10.0.0.5:80/media/x.jpg")
        with pytest.raises(RefusedUriError, match="link-local"):
            ReadPolicy(HOME, ("http://169.254.169.254",)).check("http://169.254.169.254/latest")

    def test_prefix_fails(self) -> None:
        with pytest.raises(RefusedUriError, match="bucket"):
            ReadPolicy(HOME, ("s3:///x",))

    @settings(deadline=None, max_examples=50)
    @given(st.text(st.sampled_from("ab/.:%\\é -_2e"), min_size=1, max_size=12))
    def test_plainly_allowed_agrees_with_check(self, name: str) -> None:
        for policy, uri in [(ReadPolicy(HOME), f"s3://bkt/{name}"), (ReadPolicy("/m.csv"), f"/{name}")]:
            if policy.plainly_allowed(pa.array([uri])).to_pylist() == [True]:
                policy.check(uri)

    def test_symlinks_are_judged_by_where_they_lead(self, tmp_path: Path) -> None:
        inside, outside = tmp_path / "in", tmp_path / "out"
        inside.mkdir()
        outside.mkdir()
        (outside / "secret.jpg").write_bytes(b"secret")
        (inside / "real.jpg").write_bytes(b"real")
        (inside / "link.jpg").symlink_to(outside / "secret.jpg")
        (inside / "dir").symlink_to(outside)
        (inside / "fine.jpg").symlink_to(inside / "real.jpg")
        (tmp_path / "alias").symlink_to(inside)
        for options in ({"home": HOME, "allow": (str(inside),)}, {"home": "/m.csv", "only": (str(inside),)}):
            with fetcher(**dict(options)) as reader:
                assert reader.fetch(f"{inside}/fine.jpg").data == b"real"
            assert failure(f"{inside}/link.jpg", **dict(options)).code == "refused_uri"
            assert failure(f"{inside}/dir/secret.jpg", **dict(options)).code == "refused_uri"
        with fetcher("/m.csv", only=(f"{tmp_path}/alias",)) as reader:
            assert reader.fetch(f"{tmp_path}/alias/real.jpg").data == b"real"
        with fetcher("/m.csv") as reader:
            assert reader.fetch(f"{inside}/link.jpg").data == b"secret"


_IO = {"open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"}


class TestRetries:
    @pytest.mark.parametrize("faults", [[503, 503], [500], [502, 504], [429], ["reset", "reset"], ["short"]])
    def test_transient_faults_are_overcome(self, store: FaultyStore, faults: list[int]) -> None:
        store.objects["/bkt/a.jpg"] = b"x" * 10_000
        store.faults["/bkt/a.jpg"] = list(faults)
        with fetcher() as reader:
            fetched = reader.fetch("s3://bkt/a.jpg")
        assert fetched.data == b"x" * 10_000
        assert len(store.requests) == len(faults) + 1
        # aiohttp itself asks once more when a connection is lost before any answer.
        assert fetched.attempts == len(faults) + 1 - ("reset" in faults)
        assert fetched.seconds > 0

    @pytest.mark.parametrize(
        ("faults", "code", "requests"),
        [
            ([403] * 9, "forbidden", 1),
            ([404] * 9, "not_found", 1),
            ([400] * 9, "bad_request", 1),
            ([503] * 9, "unavailable", 4),
            ([500] * 9, "unavailable", 4),
            (["short"] * 9, "unavailable", 4),
        ],
    )
    def test_fetch_fails(self, store: FaultyStore, faults: list[int], code: str, requests: int) -> None:
        store.objects["/bkt/a.jpg"] = b"x" * 1000
        store.faults["/bkt/a.jpg"] = list(faults)
        error = failure("s3://bkt/a.jpg")
        assert (error.code, error.attempts, len(store.requests)) == (code, requests, requests)

    def test_a_store_that_always_resets_fails(self, store: FaultyStore) -> None:
        store.faults["/bkt/a.jpg"] = ["reset"] * 99
        error = failure("s3://bkt/a.jpg")
        assert (error.code, error.attempts) == ("unavailable", 4)

    def test_a_hanging_store_times_out(self, store: FaultyStore) -> None:
        store.objects["/bkt/a.jpg"] = b"x"
        store.faults["/bkt/a.jpg"] = ["hang"] * 9
        store.hang_seconds = 1.0
        error = failure("s3://bkt/a.jpg", timeout_seconds=0.2, max_attempts=2)
        assert (error.code, error.attempts) == ("timeout", 2)

    def test_filesystem_retries_too(self, store: FaultyStore) -> None:
        store.objects["/bkt/m.csv"] = b"uri\n"
        store.faults["/bkt/m.csv"] = [500, "reset"]
        files, path = filesystem("s3://bkt/m.csv")
        assert files.cat_file(path) == b"uri\n"

    def test_options_fail(self) -> None:
        with pytest.raises(RequestError, match="max_in_flight=0"):
            fetcher(max_in_flight=0)


class TestFetchMany:
    def test_many_are_in_flight(self, store: FaultyStore) -> None:
        store.gathers, store.delay_seconds = 32, 0.2  # in which one more would show
        store.objects.update({f"/bkt/{i}.jpg": b"%d" % i for i in range(128)})
        with fetcher(max_in_flight=32) as reader:
            results = dict(reader.fetch_many(f"s3://bkt/{i}.jpg" for i in range(128)))
        assert {i: r.data for i, r in results.items()} == {i: b"%d" % i for i in range(128)}
        assert store.most_at_once == 32

    def test_errors_are_results(self, store: FaultyStore) -> None:
        store.objects["/bkt/a"] = b"a"
        with fetcher() as reader:
            results = dict(reader.fetch_many(["s3://bkt/none", "s3://bkt/a", "/etc/passwd"]))
        assert results[1].data == b"a"
        assert (results[0].code, results[2].code) == ("not_found", "refused_uri")

    def test_uris_are_taken_as_results_are(self, store: FaultyStore) -> None:
        store.objects["/bkt/a"] = b"a"
        taken = []
        with fetcher(max_in_flight=4) as reader:
            results = reader.fetch_many(taken.append(i) or "s3://bkt/a" for i in range(100))
            next(results)
            assert len(taken) == 4
            next(results)
            assert len(taken) == 5
            results.close()
        assert len(taken) == 5


class TestLargeObjects:
    SIZE = 40_000_001

    def test_they_come_in_parts_and_mapped(self, store: FaultyStore) -> None:
        store.objects["/bkt/v.mp4"] = data = os.urandom(1000) * (self.SIZE // 1000) + b"!"
        store.faults["/bkt/v.mp4"] = [503]
        with fetcher() as reader:
            fetched = reader.fetch("s3://bkt/v.mp4")
        assert isinstance(fetched.data, mmap.mmap)
        assert fetched.data[:] == data
        assert fetched.attempts == 2
        assert sorted(asked or "" for _, asked in store.requests[2:]) == [
            "bytes=0-16777215",
            "bytes=16777216-33554431",
            "bytes=33554432-40000000",
        ]

    def test_local_files_are_mapped(self, tmp_path: Path) -> None:
        (tmp_path / "v.mp4").write_bytes(b"ab" * 10_000_000)
        with fetcher("/m.csv") as reader:
            fetched = reader.fetch(str(tmp_path / "v.mp4"))
        assert isinstance(fetched.data, mmap.mmap)
        assert fetched.data[:4] == b"abab"

    def test_too_large_fails(self, store: FaultyStore) -> None:
        store.objects["/bkt/v.mp4"] = b"x" * 2000
        error = failure("s3://bkt/v.mp4", max_object_bytes=1000)
        assert (error.code, "1000" in error.message) == ("too_large", True)

    def test_a_part_that_stays_away_fails(self, store: FaultyStore) -> None:
        store.objects["/bkt/v.tar"] = make_tar({"v.mp4": b"x" * self.SIZE})
        with fetcher() as reader:
            reader.tar_index("s3://bkt/v.tar")
            store.faults["/bkt/v.tar"] = [503] * 99
            with pytest.raises(FetchError, match="unavailable") as caught:
                reader.fetch("s3://bkt/v.tar::v.mp4")
        assert caught.value.attempts == 4


class TestLocalFiles:
    def test_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "e.jpg").touch()
        with fetcher("/m.csv") as reader:
            assert reader.fetch(str(tmp_path / "e.jpg")).data == b""

    def test_etag_follows_the_content(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        with fetcher("/m.csv") as reader:
            path.write_bytes(b"one")
            first = reader.fetch(str(path)).etag
            path.write_bytes(b"other")
            assert reader.fetch(str(path)).etag != first

    def test_not_a_file_fails(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
        (tmp_path / "file").touch()
        for name in ("pipe.jpg", "", "none.jpg", "loop.jpg", "file/x.jpg", "x" * 300):
            assert failure(f"{tmp_path}/{name}", home="/m.csv").code == "not_found", name
        assert failure("/dev/zero", home="/m.csv").code == "not_found"


@pytest.mark.skipif(not NAMES.exists(), reason="shared/data is not there")
class TestAwkwardNames:
    def test_locally(self, tmp_path: Path) -> None:
        names = json.loads(NAMES.read_text())
        for name in names:
            (tmp_path / name).write_bytes(name.encode())
        with fetcher(str(tmp_path / "m.csv")) as reader:
            uris = [resolve(name, relative_to=str(tmp_path / "m.csv")) for name in names]
            assert {names[i]: r.data.decode() for i, r in reader.fetch_many(uris)} == {n: n for n in names}

    def test_on_s3(self, store: FaultyStore) -> None:
        names = json.loads(NAMES.read_text())
        store.objects.update({f"/bkt/d/{name}": name.encode() for name in names})
        with fetcher() as reader:
            results = reader.fetch_many(f"s3://bkt/d/{name}" for name in names)
            assert {names[i]: r.data.decode() for i, r in results} == {n: n for n in names}


class TestTar:
    MEMBERS = {f"inner/{i:04}.jpg": b"%d" % i * 5000 for i in range(40)}

    def test_members_are_read_by_range(self, store: FaultyStore) -> None:
        store.objects["/bkt/s.tar"] = tar = make_tar({f"{i}.mp4": b"%d" % i * 4_000_000 for i in range(8)})
        with fetcher() as reader:
            assert reader.fetch("s3://bkt/s.tar::3.mp4").data == b"3" * 4_000_000
            assert store.bytes_served < len(tar) / 4
            before = len(store.requests)
            assert reader.fetch("s3://bkt/s.tar::./7.mp4").data == b"7" * 4_000_000
        assert len(store.requests) == before + 1

    def test_small_members_cost_few_requests(self, store: FaultyStore) -> None:
        store.objects["/bkt/s.tar"] = tar = make_tar({f"{i}.jpg": b"x" * 20_000 for i in range(500)})
        with fetcher() as reader:
            assert len(reader.tar_index("s3://bkt/s.tar").members) == 500
        assert len(store.requests) < 10
        assert store.bytes_served < len(tar) * 1.1

    def test_one_index_serves_many_fetches(self, store: FaultyStore) -> None:
        store.objects["/bkt/s.tar"] = make_tar(self.MEMBERS)
        store.faults["/bkt/s.tar"] = [503, "reset"]
        names = list(self.MEMBERS)
        with fetcher() as reader:
            results = dict(reader.fetch_many(f"s3://bkt/s.tar::{name}" for name in names))
        assert {names[i]: r.data for i, r in results.items()} == self.MEMBERS
        assert len({r.etag for r in results.values()}) == len(names)

    @pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_names(self, tmp_path: Path, format: int) -> None:  # noqa: A002
        name = "déep/" * 60 + "x.jpg"
        (tmp_path / "s.tar").write_bytes(make_tar({name: b"long", "empty.jpg": b"", "z.jpg": b"z"}, format))
        with fetcher("/m.csv") as reader:
            assert reader.fetch(f"{tmp_path}/s.tar::{name}").data == b"long"
            assert reader.fetch(f"{tmp_path}/s.tar::empty.jpg").data == b""

    def test_large_members_are_mapped(self, store: FaultyStore) -> None:
        store.objects["/bkt/s.tar"] = make_tar({"a": b"a", "v.mp4": b"v" * 20_000_000, "z": b"z"})
        with fetcher() as reader:
            assert reader.fetch("s3://bkt/s.tar::v.mp4").data[:] == b"v" * 20_000_000

    def test_a_replaced_tar_is_indexed_again(self, store: FaultyStore) -> None:
        store.objects["/bkt/s.tar"] = make_tar({"a.jpg": b"old", "b.jpg": b"b"})
        with fetcher() as reader:
            assert reader.fetch("s3://bkt/s.tar::a.jpg").data == b"old"
            store.objects["/bkt/s.tar"] = make_tar({"b.jpg": b"b", "a.jpg": b"new"})
            assert reader.fetch("s3://bkt/s.tar::a.jpg").data == b"new"

    @pytest.mark.parametrize(
        ("data", "code"),
        [
            (make_tar(MEMBERS), "not_found"),
            (make_tar(MEMBERS)[:50_000], "bad_archive"),
            (b"not a tar" * 1000, "bad_archive"),
            (b"", "bad_archive"),
        ],
    )
    def test_member_fails(self, store: FaultyStore, tmp_path: Path, data: bytes, code: str) -> None:
        store.objects["/bkt/s.tar"] = data
        (tmp_path / "s.tar").write_bytes(data)
        assert failure("s3://bkt/s.tar::none.jpg").code == code
        assert failure(f"{tmp_path}/s.tar::none.jpg", home="/m.csv").code == code

    @pytest.mark.parametrize("record", ["GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.realsize"])
    def test_headers_that_are_no_numbers_fail_their_samples_only(self, tmp_path: Path, record: str) -> None:
        with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            odd = tarfile.TarInfo("a.jpg")
            odd.pax_headers = {record: "x,y"}
            tar.addfile(odd)
        (tmp_path / "ok.jpg").write_bytes(b"ok")
        with fetcher("/m.csv") as reader:
            found = dict(reader.fetch_many([f"{tmp_path}/s.tar::a.jpg", f"{tmp_path}/ok.jpg"]))
        assert getattr(found[0], "code", None) == "bad_archive"
        assert getattr(found[1], "data", None) == b"ok"

    def test_headers_that_only_lead_to_the_next_fail_their_samples_only(self, tmp_path: Path) -> None:
        named = tarfile.TarInfo("a.jpg")
        named.type, named.size = tarfile.GNUTYPE_LONGNAME, 6
        header = named.tobuf(tarfile.GNU_FORMAT) + b"a.jpg".ljust(tarfile.BLOCKSIZE, b"\0")
        (tmp_path / "s.tar").write_bytes(header * 2000)
        (tmp_path / "ok.jpg").write_bytes(b"ok")
        with fetcher("/m.csv") as reader:
            found = dict(reader.fetch_many([f"{tmp_path}/s.tar::a.jpg", f"{tmp_path}/ok.jpg"]))
        assert getattr(found[0], "code", None) == "bad_archive"
        assert getattr(found[1], "data", None) == b"ok"

    @pytest.mark.parametrize("size", [-512, 1 << 40])
    @pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
    def test_headers_of_impossible_sizes_end(self, tmp_path: Path, size: int, kind: bytes) -> None:
        second = tarfile.TarInfo("b.jpg")
        second.type = kind
        block = bytearray(second.tobuf())
        block[124:136] = (
            (size & ((1 << 96) - 1)).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
        )
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
        (tmp_path / "s.tar").write_bytes(make_tar({"a.jpg": b"a"})[:1024] + bytes(block) + bytes(10240))
        assert failure(f"{tmp_path}/s.tar::none.jpg", home="/m.csv").code in ("bad_archive", "not_found")

    @pytest.mark.parametrize("scheme", ["s3://bkt", "http"])
    def test_a_store_need_not_say_how_large_the_tar_is(self, store: FaultyStore, scheme: str) -> None:
        members = {"v.mp4": b"v" * 20_000_000, **self.MEMBERS}
        store.objects |= {"/bkt/s.tar": make_tar(members), "/bkt/cut.tar": make_tar(members)[:20_050_000]}
        store.totals = dict.fromkeys(store.objects, "*")
        home = f"{store.endpoint}/bkt" if scheme == "http" else scheme
        with fetcher(allow=(home,)) as reader:
            for name, data in members.items():
                assert reader.fetch(f"{home}/s.tar::{name}").data[:] == data
        assert failure(f"{home}/cut.tar::v.mp4", allow=(home,)).code == "bad_archive"

    def test_a_size_that_is_no_number_fails(self, store: FaultyStore) -> None:
        store.objects["/bkt/s.tar"] = make_tar(self.MEMBERS)
        store.totals["/bkt/s.tar"] = "many"
        assert failure("s3://bkt/s.tar::a.jpg").code == "bad_request"
        assert failure(f"{store.endpoint}/bkt/s.tar::a.jpg", allow=(store.endpoint,)).code == "bad_request"

    def test_links_are_no_members(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        assert failure(f"{tmp_path}/s.tar::link.jpg", home="/m.csv").code == "not_found"


class TestOtherStores:
    def test_http_where_allowed(self, store: FaultyStore) -> None:
        store.objects["/pub/a b%.jpg"] = b"web"
        store.faults["/pub/a b%.jpg"] = [503, "short"]
        with fetcher(allow=(f"{store.endpoint}/pub",)) as reader:
            fetched = reader.fetch(f"{store.endpoint}/pub/a%20b%25.jpg?sig=1")
        assert (fetched.data, fetched.attempts) == (b"web", 3)

    @pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "user@127.0.0.1"])
    def test_http_to_a_private_address_fails(self, store: FaultyStore, host: str) -> None:
        """The whole web is allowed, and names lead inside: refused by the address, before any connection."""
        store.objects["/x.jpg"] = b"internal"
        error = failure(store.endpoint.replace("127.0.0.1", host) + "/x.jpg", allow=("http://",))
        assert (error.code, error.attempts, store.requests) == ("refused_uri", 1, [])

    @pytest.mark.parametrize(
        "host", ["www..example.com", f"{'a' * 64}.example.com", ".", "h:8o80", "h:70000"]
    )
    def test_a_host_that_cannot_be_asked_fails_its_sample_only(self, store: FaultyStore, host: str) -> None:
        store.objects["/x.jpg"] = b"web"
        with fetcher(allow=("http://", store.endpoint)) as reader:
            found = dict(reader.fetch_many([f"http://{host}/x.jpg", f"{store.endpoint}/x.jpg"]))
        assert (getattr(found[0], "code", None), getattr(found[0], "attempts", None)) == ("bad_request", 1)
        assert getattr(found[1], "data", None) == b"web"

    def test_http_in_parts(self, store: FaultyStore) -> None:
        store.objects["/pub/v.mp4"] = b"v" * 20_000_000
        with fetcher(allow=(store.endpoint,)) as reader:
            assert len(reader.fetch(f"{store.endpoint}/pub/v.mp4").data) == 20_000_000

    def test_http_fails(self, store: FaultyStore) -> None:
        store.redirects["/pub/r.jpg"] = f"{store.endpoint}/secret"
        store.objects["/secret"] = b"secret"
        assert failure(f"{store.endpoint}/pub/r.jpg", allow=(f"{store.endpoint}/pub",)).code == "bad_request"
        assert failure(f"{store.endpoint}/pub/n.jpg", allow=(f"{store.endpoint}/pub",)).code == "not_found"
        assert [path for path, _ in store.requests] == ["/pub/r.jpg", "/pub/n.jpg"]

    def test_http_without_a_length(self, store: FaultyStore) -> None:
        store.objects |= {"/small": b"web", "/endless": b"x" * 20_000_000}
        store.lengthless = set(store.objects)
        with fetcher(allow=(store.endpoint,)) as reader:
            assert reader.fetch(f"{store.endpoint}/small").data == b"web"
        assert failure(f"{store.endpoint}/endless", allow=(store.endpoint,)).code == "too_large"

    @pytest.mark.parametrize("kind", ["packed", "more than asked for"])
    def test_a_server_does_not_decide_how_much_memory_a_fetch_takes(self, kind: str) -> None:
        class Generous(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = gzip.compress(bytes(1 << 24)) if kind == "packed" else bytes(1 << 25)
                ranged = kind != "packed" and self.headers.get("Range") == "bytes=0-1023"
                self.send_response(206 if ranged else 200)
                if kind == "packed":
                    self.send_header("Content-Encoding", "gzip")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Generous)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        store = WebObjects(web_filesystem(named=["127.0.0.1"]))
        part = None if kind == "packed" else range(1024)

        async def read() -> None:
            await store.read(parse(f"{address}/a.jpg"), part=part, etag=None, limit=1 << 20)

        with pytest.raises(FetchError) as failed:
            asyncio.run_coroutine_threadsafe(read(), get_loop()).result(30)
        assert failed.value.code == ("bad_request" if kind == "packed" else "too_large")
        server.shutdown()

    @pytest.mark.parametrize(
        ("code", "wanted"), [(429, "unavailable"), ("oops", "unavailable"), (403, "forbidden")]
    )
    def test_errors_of_a_store_of_its_own_fail_their_samples_only(
        self, monkeypatch: pytest.MonkeyPatch, code: object, wanted: str
    ) -> None:
        class HttpError(Exception):
            pass

        def refuses(*_: object, **__: object) -> None:
            error = HttpError("no")
            error.code = code  # type: ignore[attr-defined]
            raise error

        fsspec.filesystem("memory").pipe_file("/box/b.jpg", b"b")
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuses)
        assert failure("memory://box/b.jpg", allow=("memory://box",)).code == wanted

    def test_any_fsspec_store(self) -> None:
        fsspec.filesystem("memory").pipe_file("/box/a.jpg", b"memory" * 4_000_000)
        with fetcher(allow=("memory://box",)) as reader:
            assert reader.fetch("memory://box/a.jpg").data[:6] == b"memory"
        assert failure("memory://box/none.jpg", allow=("memory://box",)).code == "not_found"

    def test_a_store_on_a_host_is_asked_on_that_host(self) -> None:
        fsspec.register_implementation("hosted", HostedFileSystem, clobber=True)
        for host in ("one", "two"):
            filesystem(f"hosted://{host}:80/x")[0].pipe_file("/in/a b.jpg", host.encode())
        with fetcher(allow=("hosted://",)) as reader:
            assert reader.fetch("hosted://one:80/in/a b.jpg").data == b"one"
            assert reader.fetch("hosted://two:80/in/a b.jpg").data == b"two"
        store, path = filesystem("hosted://two:80/in")
        assert path == "/in"
        assert [uri_of(name, listed="hosted://two:80/in") for name in store.find(path)] == [
            "hosted://two:80/in/a b.jpg"
        ]

    def test_messages_hold_no_credentials(self, store: FaultyStore) -> None:
        fsspec.register_implementation("hosted", HostedFileSystem, clobber=True)
        filesystem("hosted://secret:80/x")[0].pipe_file("/s.tar", make_tar({"a.jpg": b"a"}))
        store.objects["/bkt/x?sig=hunter2.tar"] = b""
        for uri, code in (
            ("hosted://me:hunter2@secret:80/s.tar::b.jpg", "not_found"),
            ("s3://bkt/x?sig=hunter2.tar::b.jpg", "bad_archive"),
            ("s3://bkt/none?sig=hunter2", "not_found"),
        ):
            error = failure(uri, allow=("hosted://",))
            assert (error.code, "hunter2" in error.message) == (code, False)

    def test_an_unknown_store_fails(self) -> None:
        with pytest.raises(RequestError, match="nowhere"):
            filesystem("nowhere://x/y")
        assert failure("nowhere://x/y", allow=("nowhere://x",)).code == "bad_request"


def test_importing_loads_neither_torch_nor_ray() -> None:
    code = (
        "import featurex_ray.storage, featurex_ray.manifest, sys; print({'torch', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
