"""Labels and splits: what is refused, and that groups never stand on both sides."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurex_ray.errors import ManifestError, RequestError
from featurex_ray.manifest import Manifest, read_manifest
from featurex_ray.storage import ReadPolicy
from featurex_ray.training.labels import LabelledSamples, read_labelled, refuse_shared, split


def manifest(folder: Path, labels: list[object], *, groups: list[str] | None = None) -> Manifest:
    rows = [
        {"uri": f"{i}.png", "dataset": "d"}
        | ({} if label == "absent" else {"label": label})
        | ({"group": groups[i]} if groups else {})
        for i, label in enumerate(labels)
    ]
    path = folder / "m.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    keep = ("group",) if groups else ()
    return read_manifest(str(path), keep_columns=keep, policy=ReadPolicy(str(path)))


def test_classes_are_sorted_numbers_by_value(tmp_path: Path) -> None:
    found = read_labelled(manifest(tmp_path, [10, 9, 10, 2]))
    assert found.classes == ("2", "9", "10")
    assert found.targets.tolist() == [2, 1, 2, 0]


@pytest.mark.parametrize("labels", [[1.0, 0.5, 1.0], [True, False, True]])
def test_labels_of_any_kind_have_their_places(tmp_path: Path, labels: list[object]) -> None:
    found = read_labelled(manifest(tmp_path, labels))
    assert found.targets.tolist() == [1, 0, 1]
    assert len(found.classes) == 2


def test_the_hash_changes_with_a_label(tmp_path: Path) -> None:
    first, same, other = (
        read_labelled(manifest(tmp_path, labels)).sha256() for labels in (["a", "b"], ["a", "b"], ["b", "a"])
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["absent", "absent"], "no `label` column"),
        (["a", "a"], "only one class, 'a'"),
        ([["a"], ["a", "b"]], "`label` is list<.*string>: one label a sample is needed"),
        (["a", None, "b", None], "2 samples have no label, such as '1.png', '3.png'"),
    ],
)
def test_labels_fail(labels: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=message):
        read_labelled(manifest(tmp_path, labels))


def test_labels_that_training_lacks_fail(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="lack: 'c'; these have 'a', 'b'"):
        read_labelled(manifest(tmp_path, ["a", "c"]), classes=("a", "b"))


def test_split_takes_its_share_of_each_class(tmp_path: Path) -> None:
    found = read_labelled(manifest(tmp_path, ["a"] * 40 + ["b"] * 10))
    rows, held = split(found, share=0.2, group_column=None)
    assert sorted([*rows, *held]) == list(range(50))
    assert [(found.targets[held] == t).sum() for t in (0, 1)] == [8, 2]
    again = split(found, share=0.2, group_column=None)
    assert held.tolist() == again[1].tolist()


def test_split_keeps_groups_together(tmp_path: Path) -> None:
    groups = [f"g{i // 4}" for i in range(40)]
    found = read_labelled(manifest(tmp_path, ["a", "b"] * 20, groups=groups))
    rows, held = split(found, share=0.25, group_column="group")
    assert len(held) >= 10
    assert not {groups[row] for row in rows} & {groups[row] for row in held}


def test_split_that_leaves_a_class_without_training_fails(tmp_path: Path) -> None:
    found = read_labelled(manifest(tmp_path, ["a"] * 4 + ["b"], groups=["x"] * 5))
    with pytest.raises(RequestError, match="nothing to train on of 'a'"):
        split(found, share=0.5, group_column="group")


def parts(folder: Path, rows: list[dict[str, object]], name: str = "parts.parquet") -> LabelledSamples:
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows), path)
    return read_labelled(read_manifest(str(path), dataset="d", policy=ReadPolicy(str(path))))


def test_split_keeps_parts_of_the_same_media_together(tmp_path: Path) -> None:
    """Segments of a video, and rows that give it another name; inline media stand alone, however called."""
    rows: list[dict[str, object]] = [
        {
            "uri": f"{i // 4}.mp4",
            "sample_id": f"s{i}",
            "label": "ab"[i // 4 % 2],
            "start_seconds": i % 4 + 0.0,
        }
        for i in range(40)
    ]
    found = parts(tmp_path, rows)
    train, held = split(found, share=0.25, group_column=None)
    assert len(held) >= 10
    assert not {row // 4 for row in train} & {row // 4 for row in held}
    inline: list[dict[str, object]] = [
        {"uri": "frame", "data": b"x", "sample_id": f"s{i}", "label": "ab"[i % 2]} for i in range(40)
    ]
    assert len(split(parts(tmp_path, inline), share=0.25, group_column=None)[1]) == 10


def test_split_takes_time_in_proportion_to_the_samples() -> None:
    """50,000 samples of one class, which take minutes where each of them counts all others."""
    count = 50_000
    names = [f"{i}.png" for i in range(count)]
    nulls = {"data_file": pa.nulls(count, pa.string()), "data_row": pa.nulls(count, pa.int64())}
    samples = pa.table({"sample_id": names, "uri": names, **nulls})
    found = LabelledSamples(samples, np.zeros(count, np.int64), ("a",))
    assert len(split(found, share=0.5, group_column=None)[1]) == count / 2


def test_validation_on_what_is_trained_on_fails(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"uri": f"{i}.png", "label": "ab"[i % 2]} for i in range(4)]
    found = parts(tmp_path, rows)
    others = parts(tmp_path, [{**row, "uri": f"other/{row['uri']}"} for row in rows], "others.parquet")
    refuse_shared(found, others)
    with pytest.raises(RequestError, match=r"trained on: '.*/2.png' and 1 more"):
        refuse_shared(
            found,
            parts(
                tmp_path, [{**row, "sample_id": "s" + str(row["uri"])} for row in rows[2:]], "again.parquet"
            ),
        )


def test_inline_media_are_the_same_by_their_place_and_not_by_their_name(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"uri": f"{i}.png", "data": b"x", "label": "ab"[i]} for i in range(2)]
    found, others = parts(tmp_path, rows), parts(tmp_path, rows, "others.parquet")
    refuse_shared(found, others)
    with pytest.raises(RequestError, match=r"trained on: '.*parts.parquet#0' and 1 more"):
        refuse_shared(found, found)
