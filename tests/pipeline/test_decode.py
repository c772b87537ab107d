"""Units and their media, without Ray."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.sampling import Sampling
from featurex_ray.pipeline.decode import CutUnits, DecodeMedia, DecodeSettings
from featurex_ray.pipeline.units import PLANNED, to_table
from featurex_ray.storage import ReadPolicy


@pytest.mark.parametrize("inline", [False, True])
def test_a_video_that_is_replaced_after_it_was_cut_fails(
    inline: bool, bundled_media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its units would be of two videos."""
    monkeypatch.setattr("featurex_ray.pipeline.decode.limit_threads", lambda _: None)  # of this very process
    film = (bundled_media / "videos" / "bikes.mp4").read_bytes()
    path = tmp_path / ("m.parquet" if inline else "film.mp4")

    def write(data: bytes) -> None:
        if inline:
            pq.write_table(pa.table({"data": [data], "sample_id": ["s"]}), path)
        else:
            path.write_bytes(data)

    write(film)
    settings = DecodeSettings(
        policy=ReadPolicy(str(tmp_path / "m.csv")),
        inputs=(InputSpec(224, 224),),
        sampling=Sampling.parse("every:1"),
        clip_seconds=1.0,
        clip_stride_seconds=0.25,
        decoder="pyav",
        isolation="none",
    )
    place = {"data_file": str(path), "data_row": 0} if inline else {"uri": str(path)}
    sample = {"assignment": 0, "plan_row": 0, "dataset": "d", "sample_id": "s"}
    units = CutUnits(settings)(to_table([sample | place], PLANNED))
    assert units["num_units"].to_pylist() == [3, 3, 3]
    decode = DecodeMedia(settings)
    (first,) = decode(units.slice(0, 1)).to_pylist()
    assert first["error"] is None
    assert len(first["etag"]) >= 10
    write(film + b"\0" * 9)
    rows = decode(units.slice(1)).to_pylist()
    assert [row["error"]["code"] for row in rows] == ["changed", "changed"]
    assert "was replaced" in rows[0]["error"]["message"]
    assert rows[0]["frames_0"] is None
