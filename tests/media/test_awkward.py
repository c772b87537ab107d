"""Every file of the shared collection of odd and hostile media gives what its list says."""

import json
import math
from typing import Any

import pytest

from featurex_ray.errors import SampleError
from featurex_ray.media.image import decode_image
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.sniff import sniff
from featurex_ray.media.video import ClipRequest, DecodedVideo, DecoderPolicy, decode_video
from tests.media.barcode import SHARED

_LIST = SHARED / "awkward" / "awkward.json"
ENTRIES: list[dict[str, Any]] = json.loads(_LIST.read_text()) if _LIST.exists() else []
ENTRIES = [entry for entry in ENTRIES if (SHARED / "awkward" / entry["file"]).exists()]

CODES = {
    "empty",
    "unsupported_container",
    "no_video",
    "truncated",
    "undecodable",
    "unsupported_codec",
    "too_large",
    "no_frames",
}

pytestmark = pytest.mark.skipif(not ENTRIES, reason="the shared collection of odd media is not here")


def step(data: bytes) -> int:
    return 600 if len(data) > 800_000 else 1  # one file holds sixty thousand frames


def decode(data: bytes, policy: DecoderPolicy) -> DecodedVideo | None:
    if sniff(data).media_type == "image":
        decode_image(data, inputs=[InputSpec(32, 32)])
        return None
    request = ClipRequest(Sampling("every", step(data)))
    return decode_video(data, request, inputs=[InputSpec(32, 32)], policy=policy)


def check(video: DecodedVideo, entry: dict[str, Any], data: bytes) -> None:
    clip = video.clips[0]
    if "frames" in entry:
        assert clip.num_frames == math.ceil(entry["frames"] / step(data))
        assert video.complete
    if "header_frames" in entry:
        assert clip.num_frames < entry["header_frames"]
        assert not video.complete
    # One entry's size is not the one that its own file states.
    (observed,) = entry["observed"].values()
    if "width" in entry and {entry["width"], entry["height"]} == set(observed["size"]):
        assert (video.width, video.height) == (entry["width"], entry["height"])


@pytest.mark.parametrize("policy", ["auto", "pyav"])
@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["file"] for entry in ENTRIES])
def test_awkward(entry: dict[str, Any], policy: DecoderPolicy, capfd: pytest.CaptureFixture[str]) -> None:
    data = (SHARED / "awkward" / entry["file"]).read_bytes()
    video, code = None, None
    try:
        video = decode(data, policy)
    except SampleError as error:
        code = error.code
    if entry["tolerance"] == "strict":
        assert (code is None) == (entry["expected"] == "ok")
    assert code is None or code in CODES
    if video is not None:
        check(video, entry, data)
    assert capfd.readouterr() == ("", "")
