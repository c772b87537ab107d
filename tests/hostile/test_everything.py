"""All of the shared data, good, odd and hostile together: every file is accounted for."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import featurex_ray as fx
from featurex_ray.errors import SampleError
from featurex_ray.media.contained import ContainedDecoder
from featurex_ray.media.image import DecodedImage
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import DecodeOptions, InProcessDecoder, SampleRequest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, DecodedVideo
from featurex_ray.table.verify import verify_table
from tests.hostile.campaign import FULL, report

REQUEST = SampleRequest(ClipRequest(Sampling("uniform", 2)))


@pytest.fixture(scope="module")
def files(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*") if path.is_file())


def is_odd(path: Path) -> bool:
    return "awkward" in path.parts or path.suffix not in (".jpg", ".jpeg", ".avi")


def test_a_child_makes_of_them_what_this_process_makes(files: list[Path]) -> None:
    """All odd files, and of the others every eighth unless at full count."""
    odd = [path for path in files if is_odd(path)]
    others = [path for path in files if not is_odd(path)]
    chosen = odd + (others if FULL else others[::8])
    options = DecodeOptions((InputSpec(64, 64),), "decord+pyav")
    contained, own = ContainedDecoder(options), InProcessDecoder(options)
    codes: Counter[str] = Counter()
    for first in range(0, len(chosen), 32):
        requests = [(REQUEST, path.read_bytes()) for path in chosen[first : first + 32]]
        both = zip(contained.decode(requests), own.decode(requests), strict=True)
        for path, (one, other) in zip(chosen[first : first + 32], both, strict=True):
            assert type(one.outcome) is type(other.outcome), (path, one.outcome, other.outcome)
            if isinstance(one.outcome, SampleError):
                assert one.outcome.code != "decoder_error", (path, one.outcome)
                assert str(one.outcome) == str(other.outcome), path
                codes[one.outcome.code] += 1
                continue
            assert isinstance(one.outcome, DecodedImage | DecodedVideo)
            assert isinstance(other.outcome, DecodedImage | DecodedVideo)
            assert np.array_equal(one.outcome.frames[0], other.outcome.frames[0]), path
            codes["features"] += 1
    assert sum(codes.values()) == len(chosen)
    report("all shared data, decoded", files=len(chosen), outcomes=dict(codes))
    contained.process.close()


@pytest.mark.skipif(not FULL, reason="a run over all of the shared data takes minutes: make torture-hostile")
@pytest.mark.usefixtures("local_ray")
def test_a_run_accounts_for_every_file(files: list[Path], data: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"uri": str(path), "sample_id": str(path.relative_to(data)), "dataset": "all"})
        for path in files
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    job = fx.ExtractionJob(
        manifest=str(tmp_path / "m.jsonl"),
        output=str(tmp_path / "out"),
        extractor="attention_convnet",
        sampling="uniform:2",
    )
    result = fx.run(job)
    table = fx.open_table(str(tmp_path / "out" / "attention_convnet"))
    good = set(table.to_arrow()["sample_id"].to_pylist())
    failed = {row["sample_id"]: row["error"] for row in table.failures().to_pylist()}
    assert good | failed.keys() == {str(path.relative_to(data)) for path in files}
    assert not good & failed.keys()
    assert verify_table(str(tmp_path / "out" / "attention_convnet"), manifest=job.manifest).ok
    listed = json.loads((data / "awkward" / "awkward.json").read_text())
    for entry in listed:
        if entry["tolerance"] == "strict":
            assert (f"awkward/{entry['file']}" in good) == (entry["expected"] == "ok"), entry["file"]
    outcomes = dict(Counter(failed.values()))
    assert "decoder_error" not in outcomes
    report("all shared data, run", files=len(files), good=len(good), failed=outcomes, seconds=result.seconds)
