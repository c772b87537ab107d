"""M2 and M3: decoders that crash or never end, on real Ray too. Only their files fail."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from featurex_ray.contained import ProcessLimits
from featurex_ray.errors import SampleError
from featurex_ray.media.contained import ContainedDecoder
from featurex_ray.media.image import DecodedImage
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import Decoded, DecodeOptions, SampleRequest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, DecodedVideo
from featurex_ray.pipeline.decode import DecodeMedia, DecodeSettings
from featurex_ray.pipeline.units import PLANNED
from featurex_ray.storage import ReadPolicy
from tests.hostile.campaign import count, report
from tests.hostile.decoders import DEFECTS
from tests.hostile.mutants import originals
from tests.media.barcode import encoded, photograph

OPTIONS = DecodeOptions((InputSpec(32, 32),))
REQUEST = SampleRequest(ClipRequest(Sampling("uniform", 2)))
HANDLER = "tests.hostile.decoders:DefectiveDecoder"
CRASHES = [name for name in DEFECTS if name not in (b"DEFECT:loop", b"DEFECT:sleep", b"DEFECT:stop")]


def defective(**limits: float) -> ContainedDecoder:
    return ContainedDecoder(OPTIONS, limits=ProcessLimits(**limits), handler=HANDLER)  # type: ignore[arg-type]


def run(decoder: ContainedDecoder, files: list[bytes]) -> list[Decoded]:
    return decoder.decode([(REQUEST, data) for data in files])


def pictures(number: int) -> list[bytes]:
    return [encoded(photograph(40 + n % 50, 40), "PNG") for n in range(number)]


def test_crashes_among_many() -> None:
    decoder = defective()
    files = pictures(count(200, 2000))
    expected = run(decoder, files)
    struck = {place: CRASHES[i % len(CRASHES)] for i, place in enumerate(range(7, len(files), 29))}
    start = time.monotonic()
    disturbed = run(decoder, [data + struck.get(place, b"") for place, data in enumerate(files)])
    seconds = time.monotonic() - start
    for place, (one, other) in enumerate(zip(disturbed, expected, strict=True)):
        if place in struck:
            assert isinstance(one.outcome, SampleError)
            assert (one.outcome.code, one.outcome.attempts) == ("decoder_crashed", 2)
        else:
            assert isinstance(one.outcome, DecodedImage)
            assert isinstance(other.outcome, DecodedImage)
            assert np.array_equal(one.outcome.frames[0], other.outcome.frames[0])
    each = seconds / len(struck)
    report("M2", samples=len(files), crashes=len(struck), seconds_each=round(each, 3))
    decoder.process.close()


ALONE = """
import sys
from tests.hostile.decoders import DEFECTS
DEFECTS[sys.argv[1].encode()]()
print("survived")
"""


@pytest.mark.parametrize("defect", CRASHES)
def test_the_same_defect_ends_a_process_that_decodes_itself(defect: bytes) -> None:
    """What isolation is for: with it off, the defect takes its process along."""
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, defect.decode()],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "survived" not in alone.stdout


@pytest.mark.parametrize("defect", [b"DEFECT:loop", b"DEFECT:sleep", b"DEFECT:stop"])
def test_what_never_ends_is_ended(defect: bytes) -> None:
    decoder = defective(item_seconds=0.5)
    run(decoder, pictures(1))
    overruns = []
    for data in pictures(count(2, 10)):
        start = time.monotonic()
        (done,) = run(decoder, [data + defect])
        overruns.append(time.monotonic() - start - 2 * 0.5)  # it has two tries
        assert isinstance(done.outcome, SampleError)
        assert done.outcome.code == "timeout"
    assert max(overruns) < 20  # how soon is in the figures; it would take for ever
    report(f"M3 {defect.decode()}", cases=len(overruns), most_seconds_after_deadlines=round(max(overruns), 3))
    decoder.process.close()


def test_cpu_seconds_end_it_too() -> None:
    """The kernel's own clock, for a parent that is stopped meanwhile."""
    from tests.contained.test_process import ChildLostError, answers, contained

    process = contained(item_seconds=0.2)
    process._limits = replace(process._limits, item_seconds=600)  # the parent's clock is late
    with pytest.raises(ChildLostError, match="timeout: took over 600 CPU seconds"):  # the child's had 0.2
        answers(process, "spin:")
    process.close()


def test_a_header_that_claims_an_hour() -> None:
    data = bytearray(originals()["avi"])
    at = data.index(b"avih") + 8 + 16
    data[at : at + 4] = (25 * 3600).to_bytes(4, "little")  # frames in all
    at = data.index(b"strh") + 8 + 32
    data[at : at + 4] = (25 * 3600).to_bytes(4, "little")  # the stream's length
    decoder = defective(item_seconds=30)
    (done,) = run(decoder, [bytes(data)])
    assert isinstance(done.outcome, DecodedVideo)
    assert done.outcome.clips[0].end_seconds < 1
    decoder.process.close()


@pytest.mark.usefixtures("local_ray")
def test_on_ray_the_job_ends_and_neighbours_are_equal(tmp_path: Path) -> None:
    import ray
    from ray.data import ActorPoolStrategy

    def decoded(files: list[bytes], folder: Path) -> dict[int, tuple[bytes | None, str | None]]:
        folder.mkdir()
        for place, data in enumerate(files):
            (folder / str(place)).write_bytes(data)
        rows = [
            {"assignment": 0, "plan_row": place, "sample_id": str(place), "uri": str(folder / str(place))}
            for place in range(len(files))
        ]
        settings = DecodeSettings(
            policy=ReadPolicy(str(folder / "m.csv")),
            inputs=OPTIONS.inputs,
            sampling=REQUEST.video.sampling,
            clip_seconds=None,
            clip_stride_seconds=None,
            decoder="pyav",
            limits=ProcessLimits(item_seconds=5),
            handler=HANDLER,
        )
        planned = pa.table([pa.array([row.get(f.name) for row in rows], f.type) for f in PLANNED], PLANNED)
        units = (
            ray.data.from_arrow(planned)
            .repartition(4)
            .map_batches(
                DecodeMedia,
                fn_constructor_args=(settings,),
                compute=ActorPoolStrategy(size=1),
                num_cpus=0.5,
                batch_size=None,
                batch_format="pyarrow",
            )
        )
        rows = units.select_columns(["plan_row", "frames_0", "error"]).take_all()
        return {row["plan_row"]: (row["frames_0"], row["error"] and row["error"]["code"]) for row in rows}

    files = pictures(40)
    expected = decoded(files, tmp_path / "good")
    struck = {5: b"DEFECT:segv", 17: b"DEFECT:exit", 18: b"DEFECT:loop", 33: b"DEFECT:free"}
    disturbed = decoded([data + struck.get(place, b"") for place, data in enumerate(files)], tmp_path / "bad")
    assert len(disturbed) == 40
    for place in range(40):
        if place in struck:
            assert disturbed[place] == (None, "timeout" if place == 18 else "decoder_crashed")
        else:
            assert disturbed[place] == expected[place]
            assert disturbed[place][1] is None
