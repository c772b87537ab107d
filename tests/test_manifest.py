import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from featurex_ray.errors import (
    FetchError,
    ManifestError,
    RefusedUriError,
    RequestError,
    StoreUnavailableError,
)
from featurex_ray.manifest import InlineMedia, Manifest, build_manifest, read_inline, read_manifest
from featurex_ray.manifest.files import ManifestFile
from featurex_ray.schemas import SAMPLE, sample_schema
from featurex_ray.storage import Fetcher, ReadPolicy, filesystem
from tests.faulty_store import FaultyStore, use_store

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), out)
    return out.getvalue()


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pa_csv.write_csv(pq.read_table(io.BytesIO(parquet_bytes(rows))), out)
    return out.getvalue()


def jsonl_bytes(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


ENCODERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".parquet": parquet_bytes,
    ".csv": csv_bytes,
    ".jsonl": jsonl_bytes,
    ".parquet.gz": lambda rows: gzip.compress(parquet_bytes(rows)),
    ".csv.gz": lambda rows: gzip.compress(csv_bytes(rows)),
    ".jsonl.gz": lambda rows: gzip.compress(jsonl_bytes(rows)),
    ".ndjson": jsonl_bytes,
}

ROWS = [
    {"uri": "a b.jpg", "dataset": "cats", "sample_id": "007", "label": 1, "version": "v1", "extra": 0.5},
    {
        "uri": "percent%03d?#.jpg",
        "dataset": "cats",
        "sample_id": "8",
        "label": 2,
        "version": None,
        "extra": None,
    },
    {"uri": "x.mp4", "dataset": "dogs", "media_type": "video", "start_seconds": 1.5, "end_seconds": 2.0},
]


def put(uri: str, data: bytes) -> str:
    files, path = filesystem(uri)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, data)
    return uri


def read(uri: str | Path, **options: Any) -> tuple[Manifest, list[dict[str, Any]]]:
    manifest = read_manifest(str(uri), policy=options.pop("policy", None) or ReadPolicy(str(uri)), **options)
    batches = list(manifest.batches())
    assert all(batch.schema == sample_schema(manifest.carried) for batch in batches)
    return manifest, [row for batch in batches for row in batch.to_pylist()]


def refusal(uri: str | Path, **options: Any) -> str:
    with pytest.raises(ManifestError, match=r"manifest|read") as caught:
        read(uri, **options)
    return str(caught.value)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3_root"))


class TestFormats:
    @pytest.mark.parametrize("extension", ENCODERS)
    def test_every_format_gives_the_same_samples(self, root: str, extension: str) -> None:
        uri = put(f"{root}/m/all{extension}", ENCODERS[extension](ROWS))
        manifest, rows = read(uri)
        nothing = dict.fromkeys(SAMPLE.names)
        assert rows == [
            nothing
            | {
                "dataset": "cats",
                "sample_id": "007",
                "uri": f"{root}/m/a b.jpg",
                "version": "v1",
                "label": 1,
            },
            nothing | {"dataset": "cats", "sample_id": "8", "uri": f"{root}/m/percent%03d?#.jpg", "label": 2},
            nothing
            | {"dataset": "dogs", "sample_id": "x.mp4", "uri": f"{root}/m/x.mp4", "media_type": "video"}
            | {"start_seconds": 1.5, "end_seconds": 2.0, "label": None},
        ]
        assert manifest.datasets == {"cats": 2, "dogs": 1}
        assert manifest.num_samples == 3
        assert manifest.carried == pa.schema([("label", pa.int64())])

    @pytest.mark.parametrize("named", ["", "/", "/*.csv", "/part-?.csv", "/dt=[12]/*"])
    def test_folders_and_globs(self, root: str, named: str) -> None:
        folder = "m/dt=1" if "dt" in named else "m"
        put(f"{root}/{folder}/part-1.csv", csv_bytes(ROWS[:1]))
        put(f"{root}/{folder}/part-2.csv", csv_bytes(ROWS[1:]))
        put(f"{root}/{folder}/_SUCCESS", b"")
        put(f"{root}/{folder}/.part-3.csv.crc", b"x")
        manifest, rows = read(f"{root}/m{named}")
        assert [row["sample_id"] for row in rows] == ["007", "8", "x.mp4"]
        assert [file.uri for file in manifest.files] == [f"{root}/{folder}/part-{i}.csv" for i in (1, 2)]

    def test_a_file_whose_name_looks_like_a_glob(self, tmp_path: Path) -> None:
        _, rows = read(put(f"{tmp_path}/m[1]*.csv", csv_bytes(ROWS)))
        assert len(rows) == 3

    def test_numbers_may_have_room_around_them(self, tmp_path: Path) -> None:
        text = "uri,dataset,start_seconds,end_seconds\na.mp4,d, 1.5 ,\t2\n"
        (row,) = read(put(f"{tmp_path}/m.csv", text.encode()))[1]
        assert (row["start_seconds"], row["end_seconds"]) == (1.5, 2.0)

    @pytest.mark.parametrize(
        "nothing", [b"uri,dataset", b"uri,dataset\n", b"\n", b"", b"\xef\xbb\xbfuri,dataset"]
    )
    def test_a_part_without_rows_is_no_obstacle(self, tmp_path: Path, nothing: bytes) -> None:
        put(f"{tmp_path}/m/1.csv", csv_bytes(ROWS))
        put(f"{tmp_path}/m/2.csv", nothing)
        assert len(read(f"{tmp_path}/m")[1]) == 3

    def test_inline_media_of_no_rows_and_without_statistics(self, tmp_path: Path) -> None:
        rows = pa.table({"data": pa.array([b"x"]), "sample_id": ["a"], "dataset": ["d"]})
        (tmp_path / "m").mkdir()
        pq.write_table(rows, tmp_path / "m" / "1.parquet")
        pq.write_table(rows.slice(0, 0), tmp_path / "m" / "2.parquet", write_statistics=False)
        assert len(read(f"{tmp_path}/m")[1]) == 1

    def test_two_columns_of_one_name_fail(self, tmp_path: Path) -> None:
        twice = pa.table([["a.jpg"], ["b.jpg"], ["d"]], names=["uri", "uri", "dataset"])
        pq.write_table(twice, tmp_path / "m.parquet")
        with pytest.raises(ManifestError, match="two columns have one name"):
            read(f"{tmp_path}/m.parquet")

    def test_a_folder_whose_name_looks_like_a_glob(self, root: str) -> None:
        put(f"{root}/set[1]/m.csv", csv_bytes(ROWS))
        assert len(read(f"{root}/set[1]")[1]) == 3

    def test_batches_can_be_read_again(self, tmp_path: Path) -> None:
        manifest, _ = read(put(f"{tmp_path}/m.csv", csv_bytes(ROWS)))
        assert list(manifest.batches()) == list(manifest.batches())

    def test_relative_to_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        put(f"{tmp_path}/m.csv", csv_bytes(ROWS))
        assert read("m.csv")[1][0]["uri"] == f"{tmp_path}/a b.jpg"

    def test_awkward_csv(self, tmp_path: Path) -> None:
        text = '\ufeffuri,dataset,label\r\n"a,""b"".jpg",d,x\r\n"=cmd().jpg",d,\r\n'
        _, rows = read(put(f"{tmp_path}/m.csv", text.encode()))
        assert [(row["uri"], row["label"]) for row in rows] == [
            (f'{tmp_path}/a,"b".jpg', "x"),
            (f"{tmp_path}/=cmd().jpg", None),
        ]

    @pytest.mark.parametrize(
        ("name", "data", "why"),
        [
            ("m.csv", b"uri,dataset\na\n", "Expected 2 columns"),
            ("m.csv", b"uri,dataset\na,\xff\xfe\n", "UTF8"),
            ("m.csv", b"uri,uri,dataset\na,b,c\n", "one name"),
            ("m.csv.gz", b"uri,dataset\na,b\n", "gzip"),
            ("m.csv.gz", gzip.compress(b"uri,dataset\na,b\n" * 999, mtime=0)[:-20], "ended before"),
            ("m.jsonl", b'{"uri": "a", "dataset": "d"}\n{"uri": \n', "row 2 is not JSON"),
            ("m.jsonl", b'{"uri": "a", "dataset": "d"}\n["a"]\n', "row 2 is not a JSON object"),
            ("m.jsonl", b'{"uri": "\\ud800", "dataset": "d"}\n', "surrogates"),
            ("m.jsonl", b'{"uri": ["a"], "dataset": "d"}\n', "'uri' is list"),
            ("m.parquet", b"PAR1 but not really", "not readable as parquet"),
            ("m.parquet", parquet_bytes(ROWS)[:-30], "not readable as parquet"),
            ("m.csv", b"", "no samples"),
            ("m.csv", b"uri,dataset\n", "no samples"),
            ("m.jsonl", b"\n\n", "no samples"),
            ("m.parquet", parquet_bytes([{"uri": None, "dataset": None}])[:0], "not readable"),
            ("m.txt", b"uri,dataset\na,b\n", "no manifest by its name"),
        ],
    )
    def test_unreadable_fails(self, tmp_path: Path, name: str, data: bytes, why: str) -> None:
        assert why in refusal(put(f"{tmp_path}/{name}", data))

    def test_nothing_there_fails(self, root: str) -> None:
        put(f"{root}/m/readme.txt", b"")
        for name in ("none.csv", "m", "m/*.csv"):
            assert "no manifest at" in refusal(f"{root}/{name}")

    def test_a_store_that_is_away_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("featurex_ray.storage.filesystems._LISTING_ATTEMPTS", 2)
        with FaultyStore() as store:
            use_store(store, monkeypatch)
            store.objects["/bkt/m.csv"] = csv_bytes(ROWS)
            assert read("s3://bkt/m.csv")[0].num_samples == 3
            store.faults["/bkt/m.csv"] = [503] * 99
            with pytest.raises(StoreUnavailableError, match=r"m\.csv"):
                read("s3://bkt/m.csv")
            store.faults["/bkt/m.csv"] = [403] * 99
            assert "may not read" in refusal("s3://bkt/m.csv")

    def test_a_missing_bucket_fails(self, s3_root: str) -> None:
        assert "no manifest at" in refusal("s3://bucket-that-is-not-there/m.csv")


class TestColumns:
    @pytest.mark.parametrize("extension", ENCODERS)
    def test_keep_columns(self, tmp_path: Path, extension: str) -> None:
        uri = put(f"{tmp_path}/m{extension}", ENCODERS[extension](ROWS))
        manifest, rows = read(uri, keep_columns=["extra", "label", "uri"])
        assert manifest.carried.names == ["label", "extra"]
        assert [float(row["extra"]) if row["extra"] else None for row in rows] == [0.5, None, None]

    @pytest.mark.parametrize(
        ("labels", "kind"),
        [
            ([1, 2], pa.int64()),
            (["cat", 2], pa.string()),
            (["007", 2], pa.string()),
            ([None, 3], pa.int64()),
            ([None, None], pa.null()),
        ],
    )
    def test_label_types(self, tmp_path: Path, labels: list[Any], kind: pa.DataType) -> None:
        for part, label in enumerate(labels):
            text = f"uri,dataset,label\n{part}.jpg,d,{'' if label is None else label}\n"
            put(f"{tmp_path}/m/{part}.csv", text.encode())
        manifest, rows = read(f"{tmp_path}/m")
        assert manifest.carried.field("label").type == kind
        wanted = [None if v is None else str(v) if pa.types.is_string(kind) else v for v in labels]
        assert [row["label"] for row in rows] == wanted

    @pytest.mark.parametrize(
        ("column", "kind"),
        [
            (pa.array(["a", "b"]).dictionary_encode(), pa.string()),
            (pa.array([1, 2], pa.uint8()), pa.int64()),
            (pa.array([1, 2**64 - 1], pa.uint64()), pa.decimal128(20, 0)),
            (pa.array([0.5, 1], pa.float32()), pa.float64()),
            (pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)), pa.list_(pa.int64())),
            (pa.array(["a", "b"], pa.large_string()), pa.string()),
        ],
    )
    def test_carried_types_are_portable(self, tmp_path: Path, column: pa.Array, kind: pa.DataType) -> None:
        table = pa.table({"uri": ["a", "b"], "dataset": ["d", "d"], "kept": column})
        pq.write_table(table, tmp_path / "m.parquet")
        manifest, rows = read(tmp_path / "m.parquet", keep_columns=["kept"])
        assert manifest.carried.field("kept").type == kind
        assert [row["kept"] for row in rows] == column.to_pylist()

    def test_lists_that_are_empty_at_first(self, tmp_path: Path) -> None:
        rows = [{"uri": str(i), "dataset": "d", "boxes": [] if i < 9_000 else [i]} for i in range(9_001)]
        path = put(f"{tmp_path}/m.jsonl", jsonl_bytes(rows))
        manifest, found = read(path, keep_columns=["boxes"])
        assert manifest.carried.field("boxes").type == pa.list_(pa.int64())
        assert [row["boxes"] for row in found] == [row["boxes"] for row in rows]

    def test_numbers_as_names(self, tmp_path: Path) -> None:
        table = pa.table({"uri": ["a"], "dataset": ["d"], "sample_id": [7], "version": [pa.scalar(20261101)]})
        pq.write_table(table, tmp_path / "m.parquet")
        (row,) = read(tmp_path / "m.parquet")[1]
        assert (row["sample_id"], row["version"]) == ("7", "20261101")

    def test_files_may_lack_optional_columns(self, tmp_path: Path) -> None:
        put(f"{tmp_path}/m/1.csv", b"uri,dataset,label\na,d,1\n")
        put(f"{tmp_path}/m/2.parquet", parquet_bytes([{"uri": "b", "dataset": "d", "sample_id": "b"}]))
        put(f"{tmp_path}/m/3.json", b"")
        manifest, rows = read(f"{tmp_path}/m")
        assert [row["label"] for row in rows] == [1, None]
        assert "label" in manifest.warnings[0]

    def test_dataset_option(self, tmp_path: Path) -> None:
        uri = put(f"{tmp_path}/m.csv", b"uri,dataset\na,\nb,cats\n")
        assert read(uri, dataset="cats")[0].datasets == {"cats": 2}
        assert "row 2: dataset 'cats' contradicts --dataset 'dogs'" in refusal(uri, dataset="dogs")
        with pytest.raises(RequestError, match="--dataset 'a/b'"):
            read(uri, dataset="a/b")

    @pytest.mark.parametrize(
        ("rows", "options", "why"),
        [
            ([{"url": "a", "dataset": "d"}], {}, "'url' may be the `uri`"),
            ([{"URI": "a", "dataset": "d"}], {}, "'URI' may be the `uri`"),
            ([{"image": b"a", "dataset": "d"}], {}, "'image' may be the `data`"),
            ([{"uri": "a"}], {}, "--dataset; it has uri"),
            ([{"data": "a", "dataset": "d"}], {}, "`data` must be binary"),
            ([{"uri": "a", "dataset": "d"}], {"keep_columns": ["nope"]}, "there are dataset, uri"),
            ([{"uri": "a", "dataset": "d", "k": {"x": 1}}], {"keep_columns": ["k"]}, "'k': struct"),
        ],
    )
    def test_columns_fail(
        self, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], why: str
    ) -> None:
        assert why in refusal(put(f"{tmp_path}/m.parquet", parquet_bytes(rows)), **options)

    def test_columns_of_two_kinds_fail(self, tmp_path: Path) -> None:
        put(f"{tmp_path}/m/1.jsonl", b'{"uri": "a", "dataset": "d", "k": 1}\n')
        put(f"{tmp_path}/m/2.jsonl", b'{"uri": "b", "dataset": "d", "k": [1]}\n')
        assert "2.jsonl: column 'k': is int64 here" in refusal(f"{tmp_path}/m", keep_columns=["k"])

    def test_keep_columns_fails(self, tmp_path: Path) -> None:
        uri = put(f"{tmp_path}/m.csv", csv_bytes(ROWS))
        with pytest.raises(RequestError, match="feature, width"):
            read(uri, keep_columns=["width", "feature"])


class TestRows:
    BAD = (
        b"uri,dataset,media_type,start_seconds,end_seconds\n"
        b"good.jpg,d,image,,\n"
        b",d,,,\n"
        b"a,,,,\n"
        b"b,a/b,,,\n"
        b"c,d,audio,,\n"
        b"e,d,,-1,\n"
        b"f,d,,nan,\n"
        b"g,d,,soon,\n"
        b"h,d,,3,2\n"
        b"i,d,,,0\n"
        b"http://host/j,d,,,\n"
        b"good.jpg,d,,,\n"
    )

    def test_the_first_offenders_are_listed_by_row(self, tmp_path: Path) -> None:
        uri = put(f"{tmp_path}/m.csv", self.BAD)
        message = refusal(uri)
        assert "has 11 problems (the first 10):" in message
        rows = [int(line.split(" row ")[1].partition(":")[0]) for line in message.splitlines()[1:]]
        assert rows == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
        for what in (
            "no uri",
            "no dataset",
            "'a/b' is not",
            "'audio'",
            "'-1'",
            "'nan'",
            "'soon'",
            "2.0 is not",
        ):
            assert what in message

    @pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
    def test_every_format_is_checked(self, tmp_path: Path, extension: str) -> None:
        bad = {"uri": "x", "dataset": "d", "sample_id": "x", "start_seconds": 2.0, "end_seconds": 1.0}
        uri = put(f"{tmp_path}/m{extension}", ENCODERS[extension]([*ROWS, bad, bad]))
        message = refusal(uri)
        assert f"{uri} row 4: end_seconds 1.0 is not after" in message
        assert f"{uri} row 5: 'x' of dataset 'd' is already in {uri} row 4" in message

    def test_duplicates_across_files_fail(self, tmp_path: Path) -> None:
        put(f"{tmp_path}/m/1.csv", b"uri,dataset,sample_id\na,d,1\nb,d,2\n")
        put(f"{tmp_path}/m/2.jsonl", b'{"uri": "c", "dataset": "e", "sample_id": 1}\n')
        put(f"{tmp_path}/m/3.parquet", parquet_bytes([{"uri": "c", "dataset": "d", "sample_id": 2}]))
        message = refusal(f"{tmp_path}/m")
        assert "1 problem:" in message
        assert f"3.parquet row 1: '2' of dataset 'd' is already in {tmp_path}/m/1.csv row 2" in message

    def test_many_duplicates_are_counted(self, tmp_path: Path) -> None:
        uri = put(f"{tmp_path}/m.csv", b"uri,dataset\n" + b"a,d\n" * 5 + b"b,d\n" * 50)
        assert "has 53 problems (the first 10)" in refusal(uri)

    def test_refused_uris_fail(self, s3_root: str) -> None:
        uri = put(
            f"{s3_root}/m.csv", b"uri,dataset\nfile:///etc/passwd,d\ns3://other/x,d\n../x,d\nok.jpg,d\n"
        )
        message = refusal(uri)
        assert [f"row {row}: " in message for row in (1, 2, 3, 4)] == [True, True, True, False]
        allowing = ReadPolicy(uri, allow_prefixes=("s3://other",))
        assert "has 2 problems" in refusal(uri, policy=allowing)

    def test_secrets_stay_out_of_messages(self, tmp_path: Path) -> None:
        uri = put(f"{tmp_path}/m.csv", b"uri,dataset\nhttps://u:hunter2@h/x?X-Amz-Signature=hunter2,d\n")
        assert "hunter2" not in refusal(uri)


def read_rows(path: object, *rows: int) -> list[bytes | FetchError]:
    """The media of samples that are named after their rows."""
    return read_inline([InlineMedia(str(path), row, "d", f"{path}#{row}") for row in rows])


class TestInline:
    TABLE = pa.table(
        {
            "data": pa.array([b"zero", b"one", None, b"three", b"four"]),
            "uri": ["a", None, "/x/c.jpg", "d", None],
            "sample_id": ["s0", None, None, None, "s4"],
        }
    )

    @pytest.mark.parametrize("group", [1, 2, 5])
    @pytest.mark.parametrize("statistics", [True, False])
    def test_data_is_addressed_and_read(self, root: str, group: int, statistics: bool) -> None:
        out = io.BytesIO()
        pq.write_table(self.TABLE, out, row_group_size=group, write_statistics=statistics)
        uri = put(f"{root}/m.parquet", out.getvalue())
        rows = read(uri, dataset="d", policy=ReadPolicy(uri, allow_prefixes=("/x",)))[1]
        assert [row["sample_id"] for row in rows] == ["s0", f"{uri}#1", "/x/c.jpg", "d", "s4"]
        assert [row["uri"] for row in rows] == ["a", f"{uri}#1", "/x/c.jpg", "d", f"{uri}#4"]
        assert [row["data_row"] for row in rows] == [0, 1, None, 3, 4]
        assert [row["data_file"] for row in rows] == [uri, uri, None, uri, uri]
        wanted = [InlineMedia(uri, row, rows[row]["dataset"], rows[row]["sample_id"]) for row in (4, 0, 1, 0)]
        assert read_inline(wanted) == [b"four", b"zero", b"one", b"zero"]

    def test_image_structs(self, tmp_path: Path) -> None:
        images = pa.array([{"bytes": b"jpeg", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}])
        pq.write_table(pa.table({"data": images, "uri": ["a", "b"]}), tmp_path / "m.parquet")
        rows = read(tmp_path / "m.parquet", dataset="d")[1]
        assert [row["data_row"] for row in rows] == [0, None]
        assert read_inline([InlineMedia(rows[0]["data_file"], 0, "d", "a")]) == [b"jpeg"]

    def test_large_row_groups_are_streamed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("featurex_ray.manifest.inline.LARGE_GROUP_BYTES", 100)
        data = [b"%d" % i * 9 for i in range(500)]
        pq.write_table(pa.table({"data": data}), tmp_path / "m.parquet", row_group_size=200)
        wanted = [499, 3, 198, 201, 3]
        assert read_rows(tmp_path / "m.parquet", *wanted) == [data[row] for row in wanted]

    def test_a_large_row_group_is_read_once_for_later_and_later_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("featurex_ray.manifest.inline.LARGE_GROUP_BYTES", 100)
        opened: list[str] = []
        real = ManifestFile.open
        monkeypatch.setattr(ManifestFile, "open", lambda file: opened.append(file.uri) or real(file))
        data = [b"%d" % i * 9 for i in range(1000)]
        path = str(tmp_path / "m.parquet")
        pq.write_table(pa.table({"data": data}), path)

        def check(*rows: int) -> None:
            assert read_rows(path, *rows) == [data[row] for row in rows]

        check(0)
        opened.clear()  # its footer is known by now
        for first in (10, 60, 300, 900):  # what others read lies between
            check(*range(first, first + 50))
        assert opened == []
        check(5, 950)  # a retry goes back
        assert opened == [path]

    def test_a_large_row_group_that_is_shorter_than_its_footer_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("featurex_ray.manifest.inline.LARGE_GROUP_BYTES", 100)
        path = tmp_path / "m.parquet"
        pq.write_table(pa.table({"data": [b"%d" % i * 9 for i in range(100)]}), path)
        monkeypatch.setattr(
            "featurex_ray.manifest.inline._batches", lambda *_: iter([pa.array([b"a", b"b"])])
        )
        (good,), (bad,) = read_rows(path, 1), read_rows(path, 50)
        assert good == b"b"
        assert isinstance(bad, FetchError)
        assert "fewer rows than its footer says" in bad.message

    def test_a_large_row_group_can_be_read_after_its_store_was_away(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("featurex_ray.manifest.inline.LARGE_GROUP_BYTES", 100)
        path = tmp_path / "m.parquet"
        pq.write_table(pa.table({"data": [b"%d" % i * 9 for i in range(100)]}), path)
        assert read_rows(path, 90) == [b"90" * 9]
        path.rename(tmp_path / "away")
        (error,) = read_rows(path, 0)
        assert isinstance(error, FetchError)
        (tmp_path / "away").rename(path)
        assert read_rows(path, 3) == [b"3" * 9]

    def test_read_inline_fails_row_by_row(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"data": [b"a", None]}), tmp_path / "m.parquet")
        (tmp_path / "x.parquet").write_bytes(b"no Parquet")
        here = str(tmp_path / "m.parquet")
        found = [
            *read_rows(f"{tmp_path}/none.parquet", 0),
            *read_rows(here, 0, 1, 2),
            *read_rows(f"{tmp_path}/x.parquet", 0),
        ]
        assert found[1] == b"a"
        errors = [error for error in found if isinstance(error, FetchError)]
        assert [error.code for error in errors] == ["not_found"] * 4

    @pytest.mark.parametrize("group", [2, 3])
    @pytest.mark.parametrize("large", [1, 1 << 30])
    def test_media_are_those_of_the_sample_wherever_they_lie_by_now(
        self, root: str, group: int, large: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A plan that a killed run left may be older than the file."""
        monkeypatch.setattr("featurex_ray.manifest.inline.LARGE_GROUP_BYTES", large)
        uri = f"{root}/m.parquet"

        def write(*rows: tuple[str, str, bytes]) -> None:
            dataset, names, data = zip(*rows, strict=True)
            table = pa.table({"dataset": dataset, "sample_id": names, "data": data})
            out = io.BytesIO()
            pq.write_table(table, out, row_group_size=group)
            put(uri, out.getvalue())

        write(("one", "a", b"1a"), ("one", "b", b"1b"), ("two", "a", b"2a"), ("two", "c", b"2c"))
        planned = [InlineMedia(uri, r["data_row"], r["dataset"], r["sample_id"]) for r in read(uri)[1]]
        assert read_inline(planned) == [b"1a", b"1b", b"2a", b"2c"]
        new, newer = (("one", name, b"??") for name in ("new", "newer"))
        write(new, ("two", "a", b"2A"), ("one", "a", b"1A"), ("one", "b", b"1B"), newer)
        *found, gone = read_inline(planned)
        assert found == [b"1A", b"1B", b"2A"]
        assert isinstance(gone, FetchError)
        assert gone.code == "not_found"
        assert "does not hold sample 'c'" in gone.message

    def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "m.parquet"
        pq.write_table(pa.table({"sample_id": ["a", "b"], "data": [b"1", b"2"]}), path)
        real = ManifestFile.version
        asked: list[str] = []

        def replaces(file: ManifestFile) -> str:
            version = real(file)
            if len(asked) < 2:  # between the question and the first opening, then once more
                pq.write_table(
                    pa.table({"sample_id": ["b", "a"], "data": [b"b" * 9 ** len(asked), b"a"]}), path
                )
            asked.append(version)
            return version

        monkeypatch.setattr(ManifestFile, "version", replaces)
        wanted = [InlineMedia(str(path), 0, "d", "a"), InlineMedia(str(path), 1, "d", "b")]
        assert read_inline(wanted) == [b"a", b"b" * 9]
        assert len(asked) > 3

    @pytest.mark.parametrize("extension", [".csv", ".jsonl"])
    def test_data_in_text_fails(self, tmp_path: Path, extension: str) -> None:
        late = [{"uri": str(i), "dataset": "d"} for i in range(9000)] if extension == ".jsonl" else []
        rows = [*late, {"uri": "a", "dataset": "d", "data": "aGk="}]
        assert "only be in Parquet" in refusal(put(f"{tmp_path}/m{extension}", ENCODERS[extension](rows)))

    def test_data_in_gzipped_parquet_fails(self, tmp_path: Path) -> None:
        uri = put(f"{tmp_path}/m.parquet.gz", gzip.compress(parquet_bytes([{"data": b"a", "dataset": "d"}])))
        assert "unpack it" in refusal(uri)

    def test_columns_of_every_kind_over_small_row_groups(self, tmp_path: Path) -> None:
        """Among them lists of dictionary values, which pyarrow can't read over several groups at once."""
        tags = pa.array([["a", "b"], ["c"], None, []] * 5).cast(
            pa.list_(pa.dictionary(pa.int32(), pa.string()))
        )
        table = pa.table(
            {
                "data": [b"x", None, b"y", b"z"] * 5,
                "uri": [f"{i}.jpg" for i in range(20)],
                "tags": tags,
                "kind": pa.array(["k", "l"] * 10).dictionary_encode(),
            }
        )
        pq.write_table(table, tmp_path / "m.parquet", row_group_size=3)
        for keep in (["tags", "kind"], ["kind"]):
            rows = read(tmp_path / "m.parquet", dataset="d", keep_columns=keep)[1]
            assert [row["data_row"] for row in rows] == [None if i % 4 == 1 else i for i in range(20)]
            assert [row["kind"] for row in rows] == ["k", "l"] * 10
        assert [
            row.get("tags") for row in read(tmp_path / "m.parquet", dataset="d", keep_columns=["tags"])[1]
        ] == (table["tags"].to_pylist())

    def test_media_of_null_structs_are_none(self, tmp_path: Path) -> None:
        kind = pa.struct([pa.field("bytes", pa.binary(), nullable=False)])
        data = pa.array([{"bytes": b"jpeg"}, None, {"bytes": b"png"}], kind)
        pq.write_table(pa.table({"data": data, "uri": ["a", "b", "c"]}), tmp_path / "m.parquet")
        rows = read(tmp_path / "m.parquet", dataset="d")[1]
        assert [row["data_row"] for row in rows] == [0, None, 2]

    @pytest.mark.skipif(not DATA.exists(), reason="shared/data is not there")
    def test_cifar(self, tmp_path: Path) -> None:
        table = pq.read_table(DATA / "cifar10" / "test.parquet").rename_columns(
            ["sample_id", "data", "label", "label_name"]
        )
        pq.write_table(table, tmp_path / "m.parquet", row_group_size=1500)
        manifest, rows = read(tmp_path / "m.parquet", dataset="cifar10", keep_columns=["label_name"])
        assert manifest.carried == pa.schema([("label", pa.int64()), ("label_name", pa.string())])
        places = ("data_file", "data_row", "dataset", "sample_id")
        wanted = [InlineMedia(*(row[name] for name in places)) for row in rows]
        assert read_inline(wanted) == table["data"].to_pylist()


class TestScale:
    def test_a_million_rows_stay_small(self, tmp_path: Path) -> None:
        with pq.ParquetWriter(tmp_path / "m.parquet", pa.schema([("uri", pa.string())])) as writer:
            for start in range(0, 1_000_000, 100_000):
                ids = pa.array(range(start, start + 100_000)).cast(pa.string())
                uris = pc.binary_join_element_wise("s3://bucket/images", ids, "/")
                writer.write_table(pa.table({"uri": uris}))
        grown = subprocess.run(
            [sys.executable, "-c", _READ_AND_WEIGH, str(tmp_path / "m.parquet")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(grown.stdout) < 150 << 20


_READ_AND_WEIGH = """
import os, resource, sys
from featurex_ray.manifest import read_manifest
from featurex_ray.storage import ReadPolicy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = read_manifest(sys.argv[1], dataset="d", policy=ReadPolicy(sys.argv[1]))
assert manifest.num_samples == sum(batch.num_rows for batch in manifest.batches()) == 1_000_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


class TestBuild:
    TREE = ("cat/1.jpg", "cat/2 ü%.JPEG", "dog/3.png", "dog/4.mp4")

    def tree(self, root: str, names: tuple[str, ...] = TREE) -> str:
        for name in names:
            put(f"{root}/pics/{name}", name.encode())
        return f"{root}/pics"

    @pytest.mark.parametrize("extension", [".parquet", ".csv", ".jsonl", ".csv.gz", ".jsonl.gz"])
    def test_what_is_listed_can_be_read(self, root: str, extension: str) -> None:
        source = self.tree(root, (*self.TREE, "cat/notes.txt", "README"))
        output = f"{root}/out/m{extension}"
        counts = build_manifest(source, output, dataset="pets")
        assert (counts.dataset, counts.num_samples, counts.media) == ("pets", 4, {"image": 3, "video": 1})
        assert (counts.labels, counts.skipped) == ({"cat": 2, "dog": 2}, {".txt": 1, "(none)": 1})
        _, rows = read(output)
        assert [row["sample_id"] for row in rows] == sorted(self.TREE)
        assert [row["label"] for row in rows] == ["cat", "cat", "dog", "dog"]
        assert all(row["version"] and row["media_type"] is None for row in rows)
        with Fetcher(ReadPolicy(output)) as reader:
            media = dict(reader.fetch_many(row["uri"] for row in rows))
        assert {rows[i]["sample_id"]: m.data.decode() for i, m in media.items()} == {n: n for n in self.TREE}

    def test_version_follows_the_content(self, root: str) -> None:
        source = self.tree(root)
        versions = []
        for content in (b"one", b"other"):
            put(f"{source}/cat/1.jpg", content)
            build_manifest(source, f"{root}/m.csv")
            versions.append({row["sample_id"]: row["version"] for row in read(f"{root}/m.csv")[1]})
        assert {name for name in versions[0] if versions[0][name] != versions[1][name]} == {"cat/1.jpg"}

    def test_splits(self, tmp_path: Path) -> None:
        source = self.tree(str(tmp_path), ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg"))
        build_manifest(source, f"{tmp_path}/m.parquet")
        _, rows = read(f"{tmp_path}/m.parquet", keep_columns=["split"])
        assert [(row["label"], row["split"]) for row in rows] == [
            ("cat", "train"),
            ("dog", "train"),
            ("cat", "val"),
        ]
        assert rows[0]["dataset"] == "pics"

    @pytest.mark.parametrize(
        "names", [("1.jpg", "cat/2.jpg"), ("a/1.jpg", "a/2.jpg"), ("2026/11/1.jpg", "2026/12/1.jpg")]
    )
    def test_other_folders_are_no_labels(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        build_manifest(self.tree(str(tmp_path), names), f"{tmp_path}/m.csv")
        assert "label" not in read(f"{tmp_path}/m.csv")[0].carried.names

    def test_labels_can_be_left_out_or_demanded(self, tmp_path: Path) -> None:
        source = self.tree(str(tmp_path))
        build_manifest(source, f"{tmp_path}/m.csv", labels=False)
        assert "label" not in read(f"{tmp_path}/m.csv")[0].carried.names
        build_manifest(f"{source}", f"{tmp_path}/m.csv", labels=True)
        put(f"{source}/loose.jpg", b"")
        with pytest.raises(ManifestError, match="class folder"):
            build_manifest(source, f"{tmp_path}/m.csv", labels=True)

    def test_tar_shards(self, root: str) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name in ("cat/1.jpg", "dog/2.jpg", "cat/1.txt"):
                info = tarfile.TarInfo(name)
                info.size = len(name)
                tar.addfile(info, io.BytesIO(name.encode()))
        put(f"{root}/shards/000.tar", packed.getvalue())
        for source, prefix in ((f"{root}/shards", ""), (f"{root}/shards/000.tar", "")):
            counts = build_manifest(source, f"{root}/m.jsonl")
            assert (counts.num_samples, counts.labels) == (2, {"cat": 1, "dog": 1})
            _, rows = read(f"{root}/m.jsonl")
            assert [row["sample_id"] for row in rows] == [f"{prefix}000.tar::cat/1.jpg", "000.tar::dog/2.jpg"]
            with Fetcher(ReadPolicy(f"{root}/m.jsonl")) as reader:
                assert reader.fetch(rows[1]["uri"]).data == b"dog/2.jpg"

    def test_more_keys_than_a_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with FaultyStore() as store:
            use_store(store, monkeypatch)
            store.objects = {f"/bkt/many/{i:02} &.jpg": b"x" for i in range(60)}
            assert build_manifest("s3://bkt/many", f"{tmp_path}/m.parquet").num_samples == 60
        assert read(f"{tmp_path}/m.parquet")[1][59]["uri"] == "s3://bkt/many/59 &.jpg"

    def test_an_unusable_name_is_passed_over(self, tmp_path: Path) -> None:
        source = self.tree(str(tmp_path))
        (Path(source) / "line\nbreak.jpg").touch()
        (Path(os.fsdecode(os.fsencode(source) + b"/latin\xe9.jpg"))).touch()
        assert build_manifest(source, f"{tmp_path}/m.csv").skipped == {"(unusable name)": 2}

    def test_build_fails(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        put(f"{tmp_path}/x/s.tar", b"no tar" * 1000)
        source = self.tree(str(tmp_path))
        output = f"{tmp_path}/out/m.csv"
        for error, why, arguments in [
            (ManifestError, "no media below", (f"{tmp_path}/empty", output)),
            (ManifestError, "no manifest at|no such|No such", (f"{tmp_path}/none", output)),
            (ManifestError, "can't list", (f"{tmp_path}/x", output)),
            (ManifestError, "by its name", (source, f"{tmp_path}/out/m.txt")),
            (RequestError, "leave out the .gz", (source, f"{tmp_path}/out/m.parquet.gz")),
            (RefusedUriError, "bucket", ("s3://", output)),
        ]:
            with pytest.raises(error, match=why):
                build_manifest(*arguments)
        with pytest.raises(RequestError, match="--dataset 'a/b'"):
            build_manifest(source, output, dataset="a/b")
        assert not (tmp_path / "out").exists()
