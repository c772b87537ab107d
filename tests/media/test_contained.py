"""Decoding in a child gives the same bytes, and what a file does to it stays with that file."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurex_ray.contained import ProcessLimits
from featurex_ray.errors import DecodeError, SampleError
from featurex_ray.media.contained import ContainedDecoder
from featurex_ray.media.image import DecodedImage
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import Decoded, DecodeOptions, InProcessDecoder, SampleRequest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import Clip, ClipRequest, DecodedVideo
from featurex_ray.storage import Fetcher, ReadPolicy
from tests.hostile.decoders import DEFECTS
from tests.media.barcode import encoded, film, photograph
from tests.media.test_video import FILMS, media

OPTIONS = DecodeOptions((InputSpec(48, 64), InputSpec(32, 32, resize=40)))
REQUEST = SampleRequest(ClipRequest(Sampling("uniform", 5)))
DEFECTIVE = "tests.hostile.decoders:DefectiveDecoder"


@pytest.fixture(scope="module")
def decoder() -> Iterator[ContainedDecoder]:
    made = ContainedDecoder(OPTIONS)
    yield made
    made.process.close()


def assert_same(one: Decoded, other: Decoded) -> None:
    assert type(one.outcome) is type(other.outcome)
    if isinstance(one.outcome, SampleError):
        assert str(one.outcome) == str(other.outcome)
        return
    if isinstance(one.outcome, list):
        assert one.outcome == other.outcome
        return
    assert isinstance(one.outcome, DecodedImage | DecodedVideo)
    videos = isinstance(one.outcome, DecodedVideo)
    facts = ("width", "height", "complete", *(("decoder", "num_clips", "num_decoded") if videos else ()))
    for fact in facts:
        assert getattr(one.outcome, fact) == getattr(other.outcome, fact)
    for mine, theirs in zip(one.outcome.frames, other.outcome.frames, strict=True):
        assert mine.dtype == theirs.dtype == np.uint8
        assert np.array_equal(mine, theirs)
    if isinstance(one.outcome, DecodedVideo) and isinstance(other.outcome, DecodedVideo):
        assert [bounds(clip) for clip in one.outcome.clips] == [bounds(clip) for clip in other.outcome.clips]


def bounds(clip: Clip) -> tuple[int, float, float, list[float]]:
    return clip.clip_index, clip.start_seconds, clip.end_seconds, list(clip.frame_pts_seconds)


def mixed() -> list[bytes]:
    """Good, odd and broken images and videos."""
    forms = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000")
    pictures = [encoded(photograph(40 + n, 300 - n), form) for n, form in enumerate(forms)]
    cut_off = encoded(photograph(100, 100), "PNG")[:500]
    films = [media(name) for name in FILMS]
    return [*pictures, b"", b"#EXTM3U", cut_off, *films, media("h264.mp4")[:5000]]


@pytest.mark.parametrize(
    "asked",
    [
        REQUEST,
        SampleRequest(ClipRequest(Sampling("every", 3), clip_seconds=0.5)),
        SampleRequest(REQUEST.video, cut=True),
        SampleRequest(REQUEST.video, "image"),
    ],
)
def test_it_equals_decoding_here(decoder: ContainedDecoder, asked: SampleRequest) -> None:
    requests = [(asked, data) for data in mixed()]
    for one, other in zip(decoder.decode(requests), InProcessDecoder(OPTIONS).decode(requests), strict=True):
        assert_same(one, other)
        assert 0 <= one.seconds < 60


def test_clips_of_a_unit(decoder: ContainedDecoder) -> None:
    requests = [
        (
            SampleRequest(ClipRequest(Sampling("uniform", 2), clip_seconds=0.4), clips=range(2, 4)),
            media("h264.mp4"),
        )
    ]
    (one,), (other,) = decoder.decode(requests), InProcessDecoder(OPTIONS).decode(requests)
    assert_same(one, other)
    assert isinstance(one.outcome, DecodedVideo)
    assert [clip.clip_index for clip in one.outcome.clips] == [2, 3]


def test_many_results_go_through_a_small_outbox(decoder: ContainedDecoder) -> None:
    large = DecodeOptions((InputSpec(1024, 1024),))
    contained = ContainedDecoder(large)
    requests = [(REQUEST, encoded(photograph(64 + n, 64), "PNG")) for n in range(50)]  # 157 MB of frames
    for one, other in zip(contained.decode(requests), InProcessDecoder(large).decode(requests), strict=True):
        assert_same(one, other)
    contained.process.close()


def test_large_media_go_by_descriptor_or_copy(decoder: ContainedDecoder, tmp_path: Path) -> None:
    data = media("h264.mp4") + (40 << 20).to_bytes(4, "big") + b"free" + bytes((40 << 20) - 8)
    (tmp_path / "large.mp4").write_bytes(data)
    with Fetcher(ReadPolicy(str(tmp_path / "m.csv"))) as fetcher:
        mapped = fetcher.fetch(str(tmp_path / "large.mp4")).data
    assert not isinstance(mapped, bytes)
    assert mapped.descriptor > 2
    small = InProcessDecoder(OPTIONS).decode([(REQUEST, media("h264.mp4"))])
    for form in (mapped, data):
        assert_same(decoder.decode([(REQUEST, b""), (REQUEST, form), (REQUEST, b"")])[1], small[0])


def good(count: int) -> list[bytes]:
    return [encoded(photograph(50 + n, 50), "PNG") for n in range(count)]


def outcomes(contained: ContainedDecoder, files: Sequence[bytes]) -> list[Decoded]:
    return contained.decode([(REQUEST, data) for data in files])


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_stays_with_its_file(defect: bytes) -> None:
    endless = defect in (b"DEFECT:loop", b"DEFECT:sleep", b"DEFECT:stop")
    seconds = 0.5 if endless else 60.0  # where the process dies, no clock is to end it before
    contained = ContainedDecoder(OPTIONS, limits=ProcessLimits(item_seconds=seconds), handler=DEFECTIVE)
    files = good(20)
    undisturbed = outcomes(contained, files)
    files[3] += defect
    files[12] += defect
    disturbed = outcomes(contained, files)
    for place, (one, other) in enumerate(zip(disturbed, undisturbed, strict=True)):
        if place not in (3, 12):
            assert_same(one, other)
            continue
        assert isinstance(one.outcome, DecodeError)
        expected = "timeout" if endless else "decoder_crashed"
        assert (one.outcome.code, one.outcome.attempts) == (expected, 2)
        assert math.isnan(one.seconds)
    contained.process.close()


def test_many_crashes_in_a_row() -> None:
    contained = ContainedDecoder(OPTIONS, handler=DEFECTIVE)
    outcomes(contained, good(1))
    done = outcomes(contained, [data + b"DEFECT:segv" for data in good(20)])
    assert {done.outcome.code for done in done if isinstance(done.outcome, SampleError)} == {
        "decoder_crashed"
    }
    contained.process.close()


FORGERIES = [
    '["image", 8, 8, True, 64, 0.1, "more"]',
    '["image", -8, 8, True, 64, 0.1]',
    '["image", 8, 8, True, 0, 0.1]',
    '["image", 8, 8, True, 10**9, 0.1]',
    '["image", 8, 8, True, big, 0.1]',
    '["image", True, 8, True, 64, 0.1]',
    '["image", 8, 8, True, 64, nan]',
    '["image", 8, 8, True, 64, "1"]',
    '["image", 8, 8, True, (1 << 26) + (4 << 20), 0.1]',
    '["video", 8, 8, True, 64, "pyav", 1, 1, 1, 0.1]',
    '["video", 8, 8, True, 64, "other", 1, 1, 1, 0.1]',
    '["video", 8, 8, True, 64, "pyav", 1, 1, 1 << 30, 0.1]',
    '["video", 8, 8, True, 64, "pyav", 1, (1 << 31) - 1, 1, 0.1]',
    '["image", 8, 8, True, 64, 99, 0.1]',
    '["units", [[0, 1]], 0.1]',
    '["error", "fetch", "not_found", "", 0.1]',
    '["error", "decode", "a code of words", "", 0.1]',
    '["error", "decode", "x" * 1000, "", 0.1]',
    '["error", "decode", "x", "y" * 5000, 0.1]',
    '["error", "decode", "x", 7, 0.1]',
    '["else", 8, 8, True, 64, 0.1]',
    "[]",
    "{}",
    "None",
    "1",
    '"image"',
    '"[" * 100000',
]


@pytest.fixture(scope="module")
def forger() -> Iterator[ContainedDecoder]:
    made = ContainedDecoder(OPTIONS, handler="tests.hostile.decoders:Forger")
    yield made
    made.process.close()


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_cannot_be_true_fails(forger: ContainedDecoder, forgery: str) -> None:
    (done,) = outcomes(forger, [forgery.encode()])
    assert isinstance(done.outcome, DecodeError)
    assert done.outcome.code == "decoder_crashed"
    honest = b'["error", "decode", "truncated", "text", 0.5]'
    (after,) = outcomes(forger, [honest])
    assert str(after.outcome) == "truncated: text"


def forged_units(forger: ContainedDecoder, text: str) -> Any:
    return forger.decode([(SampleRequest(REQUEST.video, cut=True), text.encode())])[0].outcome


def test_units_that_cannot_be_true_fail(forger: ContainedDecoder) -> None:
    assert forged_units(forger, '["units", [[0, 2], [2, 5]], 0.1]') == [range(2), range(2, 5)]
    for bounds in ("[[1, 2]]", "[[0, 2], [3, 4]]", "[[0, 0]]", "[[0, 2, 3]]", "[[0, 1.5]]", "[0, 1]"):
        assert isinstance(forged_units(forger, f'["units", {bounds}, 0.1]'), DecodeError)


def test_film_of_no_frames(decoder: ContainedDecoder) -> None:
    asked = SampleRequest(ClipRequest(Sampling("uniform", 2), start_seconds=1000))
    (done,) = decoder.decode([(asked, film("mp4", "mpeg4", num_frames=2))])
    assert isinstance(done.outcome, DecodeError)
    assert done.outcome.code == "no_frames"


def test_the_template_has_one_thread(decoder: ContainedDecoder) -> None:
    decoder.decode([(REQUEST, good(1)[0])])
    template = Path(f"/proc/{decoder.process.child_pid}/status").read_text().split("PPid:")[1].split()[0]
    assert len(list(Path(f"/proc/{template}/task").iterdir())) == 1
