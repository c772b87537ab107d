"""The card's decoder. Without a card the same code runs on torchcodec's CPU decoder, where it is here."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from PIL import Image

from featurex_ray.errors import RequestError
from featurex_ray.job import ExtractionJob
from featurex_ray.media import nvdec_backend, video
from featurex_ray.media.decoder import Shown, TimelineDisagreementError
from featurex_ray.media.nvdec_backend import NvdecDecoder, check, is_installed, reads_exactly
from featurex_ray.media.pyav_backend import PyavDecoder
from featurex_ray.media.sniff import sniff
from featurex_ray.media.video import resolve_policy
from featurex_ray.pipeline.tables import settle
from tests.media.barcode import HEIGHT, WIDTH
from tests.media.test_video import decode, media, mirrored, numbers, request

EXACT = ["h264.mp4", "h264.mkv", "h264-open-gop.mp4", "hevc.mp4", "vp8.webm", "vp9.webm", "av1.mkv"]


def loads() -> bool:
    """Whether torchcodec is here and finds FFmpeg's libraries, which no wheel of its brings."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


needs_torchcodec = pytest.mark.skipif(
    not loads(), reason="torchcodec, or the FFmpeg that it needs, is not here"
)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be decoded on a card is decoded by torchcodec on CPUs."""
    monkeypatch.setattr(video, "_try_nvdec", partial(video._try_nvdec, device="cpu"))


def opened(name: str) -> PyavDecoder:
    data = media(name)
    return PyavDecoder(data, sniff(data))


@needs_torchcodec
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sampling", ["every:1", "every:13", "uniform:4"])
def test_frames_are_the_right_ones(name: str, sampling: str, on_cpu: None) -> None:
    found = decode(media(name), request(sampling), policy="nvdec")
    expected = decode(media(name), request(sampling), policy="pyav")
    assert (found.decoder, expected.decoder) == ("nvdec", "pyav")
    assert numbers(found) == numbers(expected)
    assert np.abs(found.frames[0].astype(int) - expected.frames[0]).max() <= 2
    assert found.clips[0].frame_pts_seconds.tolist() == expected.clips[0].frame_pts_seconds.tolist()


@needs_torchcodec
@pytest.mark.parametrize("name", ["h264.ts", "h264.avi", "h264-10-bit.mp4", "mpeg4.avi"])
def test_what_the_header_does_not_promise_is_left_to_pyav(name: str, on_cpu: None) -> None:
    assert not reads_exactly(opened(name).header)
    assert decode(media(name), request(), policy="nvdec").decoder == "pyav"


@needs_torchcodec
def test_frames_of_other_times_are_refused() -> None:
    timeline = opened("h264.mp4").timeline
    later = dataclasses.replace(timeline, ticks=timeline.ticks + 1000, end_tick=timeline.end_tick + 1000)
    with pytest.raises(TimelineDisagreementError, match="other times"):
        list(NvdecDecoder(media("h264.mp4"), later, device="cpu").frames(np.array([0])))
    fewer = dataclasses.replace(timeline, ticks=timeline.ticks[:-1], keyframes=timeline.keyframes[:-1])
    with pytest.raises(TimelineDisagreementError, match="lists 60 frames"):
        NvdecDecoder(media("h264.mp4"), fewer, device="cpu")


class Greenish:
    """A card that reads YUV in another way."""

    name = "nvdec"

    def __init__(self, data: bytes, timeline: object, *, device: str) -> None:
        pass

    def frames(self, indices: np.ndarray) -> "list[Shown]":
        return iter([Shown(int(i), Image.new("RGB", (WIDTH, HEIGHT), "green"), True) for i in indices])  # type: ignore[return-value]


def test_a_card_that_shows_other_colours_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec_backend, "NvdecDecoder", Greenish)
    monkeypatch.setattr(nvdec_backend, "is_installed", lambda: True)
    found = decode(media("h264.mp4"), request(), policy="nvdec")
    assert found.decoder == "pyav"
    assert numbers(found) == list(range(60))


def test_a_card_that_may_not_turn_pictures_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A black picture would look alike either way."""
    monkeypatch.setattr(nvdec_backend, "NvdecDecoder", Greenish)
    monkeypatch.setattr(nvdec_backend, "is_installed", lambda: True)
    monkeypatch.setattr(video, "_NVDEC_TOLERANCE", 255.0)
    assert decode(media("h264.mp4"), request(), policy="nvdec").decoder == "nvdec"
    assert decode(mirrored(media("h264.mp4")), request(), policy="nvdec").decoder == "pyav"


@pytest.mark.skipif(is_installed(), reason="torchcodec is installed")
def test_without_torchcodec_it_is_refused() -> None:
    with pytest.raises(RequestError, match=r"pip install 'featurex-ray\[nvdec\]'"):
        resolve_policy("nvdec")
    with pytest.raises(RequestError, match="needs torchcodec"):
        check()


def test_a_confined_process_can_not_have_it() -> None:
    job = ExtractionJob(manifest="m.csv", output="out", extractor="cnn_lstm", decoder="nvdec")
    with pytest.raises(RequestError, match="needs --isolation none"):
        settle(job, {})
    recorded = dataclasses.replace(job, decoder="auto")
    with pytest.raises(RequestError, match="needs --isolation none"):
        settle(recorded, {"decoder": "nvdec+pyav"})
