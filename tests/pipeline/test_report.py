"""What a run counts of itself."""

import math

from featurex_ray.errors import DecodeError
from featurex_ray.media.request import Decoded
from featurex_ray.pipeline.decode import _columns_of
from featurex_ray.pipeline.report import failures_by_code
from featurex_ray.storage import Fetched


def test_failures_of_all_rounds_of_a_run_are_counted() -> None:
    first = failures_by_code(["timeout", "empty", "timeout"], before={})
    assert first == {"timeout": 2, "empty": 1}
    assert failures_by_code(["empty", "empty"], before=first) == {"empty": 3, "timeout": 2}
    assert failures_by_code([], before=first) == first


def test_media_without_an_etag_have_their_hash_for_one() -> None:
    """Units of two generations of a video would else be one sample."""
    failed = Decoded(DecodeError("truncated", "breaks off"), 0.5)
    made = [_columns_of(Fetched(data, "", attempts=1, seconds=0.1), failed) for data in (b"old", b"new")]
    assert [each["etag"] for each in made] == [each["media_sha256"] for each in made]
    assert made[0]["etag"] != made[1]["etag"]


def test_a_sample_that_lost_its_decoder_leaves_the_decode_time_known() -> None:
    media = Fetched(b"x", "etag", attempts=1, seconds=0.1)
    lost = _columns_of(media, Decoded(DecodeError("decoder_crashed", "ended by SIGSEGV"), math.nan))
    assert lost["decode_seconds"] is None
    assert _columns_of(media, Decoded(DecodeError("truncated", "breaks off"), 0.5))["decode_seconds"] == 0.5
