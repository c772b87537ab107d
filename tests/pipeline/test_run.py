"""Whole runs on a real Ray: from a manifest to tables that other tools read."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import featurex_ray as fx
from featurex_ray.errors import RequestError, RevisionMismatchError, RunError
from featurex_ray.manifest import build_manifest, read_manifest
from featurex_ray.media.image import decode_image
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, decode_video
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import resolve
from featurex_ray.pipeline.progress import Silent
from featurex_ray.pipeline.run import plan_only
from featurex_ray.storage import ReadPolicy
from featurex_ray.table.store import open_store
from featurex_ray.table.table import FeatureTable
from featurex_ray.table.verify import verify_table

pytestmark = pytest.mark.usefixtures("local_ray")


def job(manifest: Path | str, output: Path | str, **changes: Any) -> fx.ExtractionJob:
    plain = {"extractor": "attention_convnet", "extract_actors": "1", "decode_actors": "1"}
    return fx.ExtractionJob(manifest=str(manifest), output=str(output), **(plain | changes))


def embedded_alone(extractor: str, image: Path) -> np.ndarray:
    resolved = resolve(extractor)
    frame = decode_image(image.read_bytes(), inputs=[resolved.spec.input]).frames[0]
    return Embedder(resolved, precision="fp32").embed(frame[None], np.array([1])).feature[0]


def test_images_become_a_table_that_other_tools_read(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.parquet"
    build_manifest(str(photos), str(manifest), dataset="photos")
    report = fx.run(job(manifest, tmp_path / "out", precision="fp32"))

    assert (report.planned, report.failed, report.num_clips) == (12, 0, 12)
    rows = fx.open_table(str(tmp_path / "out/attention_convnet")).to_arrow().to_pylist()
    assert [row["sample_id"] for row in rows] == sorted(row["sample_id"] for row in rows)
    assert {row["label"] for row in rows} == {"even", "odd"}
    for row in rows:
        assert row["attention_shape"] == [5, 5]
        assert sum(row["attention"]) == pytest.approx(1, abs=1e-5)
        assert row["start_seconds"] is row["frame_pts_seconds"] is None
        assert row["run_id"] == report.run_id
        alone = embedded_alone("attention_convnet", photos / row["sample_id"])
        np.testing.assert_allclose(row["feature"], alone, atol=1e-5)

    glob = str(tmp_path / "out/attention_convnet/**/*.parquet")
    counted = duckdb.sql(f"SELECT dataset, count(*), typeof(any_value(feature)) FROM '{glob}' GROUP BY ALL")
    assert counted.fetchall() == [("photos", 12, "FLOAT[]")]
    assert len(pd.read_parquet(tmp_path / "out/attention_convnet")) == 12
    assert pl.scan_parquet(glob, hive_partitioning=True).collect()["dataset"].to_list() == ["photos"] * 12
    (file,) = (tmp_path / "out/attention_convnet/dataset=photos").iterdir()
    spec = json.loads(pq.read_metadata(file).metadata[b"featurex.extractor"])
    assert (spec["name"], spec["precision"]) == ("attention_convnet", "fp32")
    assert spec["weights"]["source"] == "bundled attention_convnet.safetensors"


def test_a_second_run_does_nothing_and_reads_no_media(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    build_manifest(str(photos), str(manifest))
    fx.run(job(manifest, tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/attention_convnet").rglob("*.parquet")}
    for media in photos.rglob("*.png"):
        media.unlink()
    again = fx.run(job(manifest, tmp_path / "out"))
    assert (again.planned, again.num_units, again.tables[0].skipped) == (0, 0, 12)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_that_may_not_tidy_up_is_done_all_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heard(Silent):
        told: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.told.append(text)

    def refused(self: FeatureTable) -> None:
        raise RequestError("uploads s3://bucket/out was refused: AccessDenied")

    monkeypatch.setattr(FeatureTable, "collect", refused)
    build_manifest(str(photos), str(tmp_path / "m.csv"))
    report = fx.run(job(tmp_path / "m.csv", tmp_path / "out"), progress=Heard())
    assert (report.planned, report.failed) == (12, 0)
    assert (tmp_path / f"out/_featurex/attention_convnet/runs/{report.run_id}.json").is_file()
    assert "left to a later run to collect: uploads s3://bucket/out was refused" in Heard.told[-1]


def test_bundled_media_on_s3(bundled_media: Path, s3_root: str) -> None:
    """Images and videos, good and broken, through S3: every sample in exactly one of the tables."""
    import fsspec

    fsspec.filesystem("s3").put(f"{bundled_media}/", f"{s3_root}/media/", recursive=True)
    manifest = f"{s3_root}/m.parquet"
    build_manifest(f"{s3_root}/media", manifest, dataset="all")
    report = fx.run(job(manifest, f"{s3_root}/out", sampling="uniform:4", clip_seconds=5.0))

    failures = fx.open_table(f"{s3_root}/out/attention_convnet").failures().to_pylist()
    assert {row["sample_id"]: row["error"] for row in failures} == {
        "images/cut-off.jpg": "truncated",
        "videos/error-page.mp4": "unsupported_container",
    }
    assert (report.tables[0].done, report.tables[0].failed) == (15, 2)
    assert verify_table(f"{s3_root}/out/attention_convnet", manifest=manifest).ok
    rows = fx.open_table(f"{s3_root}/out/attention_convnet").query(
        "SELECT clip_index, num_clips, start_seconds, end_seconds, frame_pts_seconds, version FROM features "
        "WHERE sample_id = 'videos/bikes.mp4' ORDER BY clip_index"
    )
    assert rows["clip_index"].to_pylist() == [0, 1]
    assert rows["num_clips"].to_pylist() == [2, 2]
    assert rows["start_seconds"].to_pylist() == [0.0, 5.0]
    assert all(len(pts) == 4 for pts in rows["frame_pts_seconds"].to_pylist())
    assert None not in rows["version"].to_pylist()


def test_cutting_a_video_into_units_changes_no_feature(bundled_media: Path, tmp_path: Path) -> None:
    """Overlapping windows of 224x224 frames: 150 MB, so several units; and all in one go, without Ray."""
    video, manifest = bundled_media / "videos" / "bikes.mp4", tmp_path / "m.csv"
    build_manifest(str(video), str(manifest), dataset="v")
    name = "tests.pipeline.own:LargeMean"
    windows = {"sampling": "every:1", "clip_seconds": 1.0, "clip_stride_seconds": 0.25}
    fx.run(job(manifest, tmp_path / "out", extractor=name, precision="fp32", **windows))
    staged = (tmp_path / "out/_featurex/tests.pipeline.own-LargeMean/staging").rglob("*.parquet")
    units = {row["unit_index"] for path in staged for row in pq.read_table(path).to_pylist()}
    assert units == {0, 1, 2}

    resolved = resolve(name)
    request = ClipRequest(Sampling.parse("every:1"), clip_seconds=1.0, clip_stride_seconds=0.25)
    whole = decode_video(video.read_bytes(), request, inputs=[resolved.spec.input], max_unit_bytes=2**30)
    lengths = np.array([clip.num_frames for clip in whole.clips])
    alone = Embedder(resolved, precision="fp32").embed(whole.frames[0], lengths).feature
    rows = fx.open_table(str(tmp_path / "out/tests.pipeline.own-LargeMean")).to_arrow().to_pylist()
    assert [row["clip_index"] for row in rows] == list(range(len(whole.clips)))
    np.testing.assert_array_equal(np.array([row["feature"] for row in rows], np.float32), alone)
    assert [row["frame_pts_seconds"] for row in rows] == [c.frame_pts_seconds.tolist() for c in whole.clips]


def test_two_extractors_share_one_decode(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    build_manifest(str(photos), str(manifest))
    names = ("attention_convnet", "torchvision/squeezenet1_1")
    both = job(manifest, tmp_path / "out", extractor=names, weights=("torchvision/squeezenet1_1=none",))
    report = fx.run(both)
    assert report.num_units == 12  # each picture went through once
    for table, dimension in (("attention_convnet", 84), ("torchvision-squeezenet1_1", 512)):
        rows = fx.open_table(str(tmp_path / "out" / table)).to_arrow()
        assert rows.num_rows == 12
        assert {len(feature) for feature in rows["feature"].to_pylist()} == {dimension}
    assert fx.run(both).planned == 0


INSIDE = ("etag", "stage", "error", "message", "unit_index", "target", "failed_in", "assignment", "plan_row")


def test_inline_media_and_failures_keep_their_neighbours(photos: Path, tmp_path: Path) -> None:
    pictures = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    pictures[3] = pictures[3][:100]
    pictures[7] = b""
    manifest = pa.table(
        {
            "sample_id": [f"{i:03d}" for i in range(12)],
            "data": pictures,
            "dataset": ["a" if i < 6 else "b" for i in range(12)],
            "note": [f"note {i}" for i in range(12)],
        }
        # What columns are called on the way, and in staged parts.
        | {name: [f"own {i}" for i in range(12)] for name in INSIDE}
    )
    pq.write_table(manifest, tmp_path / "m.parquet")
    report = fx.run(job(tmp_path / "m.parquet", tmp_path / "out", keep_columns=("note", *INSIDE)))
    assert report.tables[0].failures_by_code == {"truncated": 1, "empty": 1}
    table = fx.open_table(str(tmp_path / "out/attention_convnet"))
    assert sorted(table.to_arrow()["note"].to_pylist()) == sorted(
        f"note {i}" for i in range(12) if i not in (3, 7)
    )
    for row in table.to_arrow().to_pylist():
        assert {row[name] for name in INSIDE} == {f"own {int(row['sample_id'])}"}
    assert sorted(table.failures()["sample_id"].to_pylist()) == ["003", "007"]
    assert report.failure_rate == pytest.approx(2 / 12)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that holds one sample."""
    folder = tmp_path_factory.mktemp("begun")
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    (folder / "m.csv").write_text("uri,dataset\nred.png,d\n")
    fx.run(job(folder / "m.csv", folder / "out"))
    return folder / "out"


def test_a_killed_runs_plan_finds_inline_media_in_a_file_that_was_rewritten(
    photos: Path, begun: Path, tmp_path: Path
) -> None:
    """The night's export writes its rows in another order, and without one of them."""
    pictures = {f"{i:03d}": path.read_bytes() for i, path in enumerate(sorted(photos.rglob("*.png")))}
    path, output = tmp_path / "m.parquet", str(tmp_path / "out")

    def write(names: list[str]) -> None:
        data = [pictures[name] for name in names]
        pq.write_table(pa.table({"sample_id": names, "data": data, "dataset": ["d"] * len(names)}), path)

    shutil.copytree(begun, output)
    names = list(pictures)
    write(names)
    manifest = read_manifest(str(path), policy=ReadPolicy(str(path)))
    (left,) = FeatureTable.open(open_store(output), "attention_convnet").plan(manifest.batches, run_id="gone")
    assert left.num_samples == len(names)
    write(names[:2:-1])
    report = fx.run(job(path, output))
    assert report.tables[0].failures_by_code == {"not_found": 3}
    rows = fx.open_table(f"{output}/attention_convnet").to_arrow().to_pylist()
    assert {row["sample_id"] for row in rows} == {"red.png", *names[3:]}
    for row in (row for row in rows if row["sample_id"] in pictures):
        assert row["media_sha256"] == hashlib.sha256(pictures[row["sample_id"]]).hexdigest()


def test_a_killed_runs_plan_of_media_that_may_not_be_read_is_left_to_it(
    photos: Path, begun: Path, tmp_path: Path
) -> None:
    """To do it by this run's rules would make failures of samples that are none of its own."""
    names = [str(path) for path in sorted(photos.rglob("*.png"))]

    def manifest(name: str, uris: list[str]) -> Path:
        path = tmp_path / f"{name}.csv"
        path.write_text("uri,dataset\n" + "".join(f"{uri},d\n" for uri in uris))
        return path

    output = str(tmp_path / "out")
    shutil.copytree(begun, output)
    outside = tmp_path / "outside.png"
    outside.write_bytes(Path(names[1]).read_bytes())
    theirs = manifest("theirs", [names[1], str(outside)])
    read = read_manifest(str(theirs), policy=ReadPolicy(str(theirs)))
    assert FeatureTable.open(open_store(output), "attention_convnet").plan(read.batches, run_id="gone")
    ours = job(manifest("ours", names[:5]), output, only_prefix=(str(photos),))
    with pytest.raises(RunError, match=r"run gone broke off.*outside\.png.*--only-prefix"):
        fx.run(ours)
    # Nor does this run's claim keep it from whoever may do it.
    assert not list(Path(output).glob("_featurex/attention_convnet/leases/*/0000000001.json"))
    table = fx.open_table(f"{output}/attention_convnet")
    assert sorted(table.to_arrow()["sample_id"].to_pylist()) == sorted([names[0], *names[2:5], "red.png"])
    assert len(table.failures()) == 0
    assert fx.run(dataclasses.replace(ours, only_prefix=())).tables[0].done == 2


def test_a_request_that_is_refused_makes_no_table(begun: Path, tmp_path: Path) -> None:
    """Else the right one that follows would be held to the wrong one's facts."""
    output = tmp_path / "out"
    shutil.copytree(begun, output)
    wrong = job(begun.parent / "m.csv", output, precision="bf16")
    both = ("torchvision/squeezenet1_1", "attention_convnet")
    two = dataclasses.replace(wrong, extractor=both, weights=("torchvision/squeezenet1_1=none",))
    with pytest.raises(RevisionMismatchError, match="attention_convnet holds extractor revision"):
        fx.run(two)
    with pytest.raises(RequestError, match="the cluster has 1 GPUs"):
        fx.run(dataclasses.replace(wrong, table="new", gpus_per_extract_actor=9))
    made = {path.name for path in output.glob("_featurex/*") if (path / "table.json").exists()}
    assert made == {"attention_convnet"}


def test_changed_samples_are_done_again_and_new_ones_added(photos: Path, tmp_path: Path) -> None:
    names = [str(path) for path in sorted(photos.rglob("*.png"))]

    def write(versions: dict[str, str]) -> None:
        rows = [{"uri": name, "version": version, "dataset": "d"} for name, version in versions.items()]
        (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    write(dict.fromkeys(names[:6], "1"))
    fx.run(job(tmp_path / "m.jsonl", tmp_path / "out"))
    write(dict.fromkeys(names[:6], "1") | {names[0]: "2"} | dict.fromkeys(names[6:8], "1"))
    assert "new 2, changed 1, done 5" in "\n".join(plan_only(job(tmp_path / "m.jsonl", tmp_path / "out")))
    second = fx.run(job(tmp_path / "m.jsonl", tmp_path / "out"))
    assert second.planned == 3
    rows = fx.open_table(str(tmp_path / "out/attention_convnet")).to_arrow().to_pylist()
    assert {row["uri"]: row["version"] for row in rows}[names[0]] == "2"
    assert len(rows) == 8
    assert verify_table(str(tmp_path / "out/attention_convnet"), manifest=str(tmp_path / "m.jsonl")).ok


def test_an_own_extractor(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    build_manifest(str(photos), str(manifest))
    report = fx.run(job(manifest, tmp_path / "out", extractor="tests.pipeline.own:MeanColour"))
    assert (report.planned, report.failed) == (12, 0)
    rows = fx.open_table(str(tmp_path / "out/tests.pipeline.own-MeanColour")).to_arrow().to_pylist()
    assert {len(row["feature"]) for row in rows} == {3}
    assert all(0.3 < value < 0.7 for row in rows for value in row["feature"])


def test_another_revision_fails(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    build_manifest(str(photos), str(manifest))
    first = job(manifest, tmp_path / "out", table="t")
    fx.run(first)
    with pytest.raises(RevisionMismatchError, match="sampling"):
        fx.run(dataclasses.replace(first, sampling="uniform:3"))


def test_extractors_with_different_sampling_fail(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    build_manifest(str(photos), str(manifest))
    names = ("torchvision/mvit_v1_b", "tests.pipeline.own:EveryFifth")
    with pytest.raises(RequestError, match="give --sampling"):
        fx.run(job(manifest, tmp_path / "out", extractor=names, weights=("torchvision/mvit_v1_b=none",)))
    assert not (tmp_path / "out").exists()


def many_photos(folder: Path, count: int) -> Path:
    noise = np.random.default_rng(11)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{i:04d}.png")
    return folder
