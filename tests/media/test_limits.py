"""Limits on what a header may claim, and the lists of what is decoded at all."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from featurex_ray.errors import DecodeError, SampleError
from featurex_ray.media.image import decode_image, set_bomb_check
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import DecodeOptions, Partial, SampleRequest, decode_sample
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, decode_video, plan_clips
from tests.media.barcode import encoded, film, photograph
from tests.media.test_video import media

INPUT = InputSpec(32, 32)
REQUEST = ClipRequest(Sampling("uniform", 2))


def plan(data: bytes, **limits: float) -> None:
    plan_clips(data, REQUEST, limits=MediaLimits(**limits))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": 320 * 240 - 1}, "320x240 pixels; the limit is 76,799"),
        ({"max_seconds": 2.3}, "2 seconds; the limit is 2"),
        ({"max_frames": 59}, "over 59 frames, the limit"),
        ({"max_streams": 0}, "1 streams; the limit is 0"),
        ({"max_ratio": 10}, "over 10 to 1"),
    ],
)
def test_video_limits_fail(limits: dict[str, float], message: str) -> None:
    enough = {"max_pixels": 320 * 240, "max_seconds": 2.5, "max_frames": 60, "max_streams": 1}
    plan(media("mpeg4.avi"), **enough, max_ratio=999)
    with pytest.raises(DecodeError, match=f"too_large: .*{message}"):
        plan(media("mpeg4.avi"), **limits)


def test_frames_are_counted_where_packets_do_not_tell() -> None:
    with pytest.raises(DecodeError, match="too_large: over 30 frames"):
        plan(media("mpeg2.ts"), max_frames=30)


def test_image_ratio_fails() -> None:
    data = encoded(Image.new("1", (4000, 4000)), "PNG")
    with pytest.raises(DecodeError, match="too_large: 16,000,000 pixels out of"):
        decode_image(data, inputs=[INPUT], limits=MediaLimits(max_ratio=100))
    decode_image(data, inputs=[INPUT])


def test_a_large_picture_inside_an_icon_fails() -> None:
    inner = encoded(Image.new("L", (3000, 3000)), "PNG")
    entry = bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(inner).to_bytes(4, "little") + (22).to_bytes(4, "little")
    icon = bytes([0, 0, 1, 0, 1, 0]) + entry + inner
    options = DecodeOptions((INPUT,), limits=MediaLimits(max_pixels=1_000_000))
    outcome = decode_sample(SampleRequest(REQUEST), icon, options).outcome
    assert isinstance(outcome, SampleError)
    assert outcome.code == "too_large"


def test_pillow_refuses_bombs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (1100, 1000)), "PNG")
    Image.open(io.BytesIO(data))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    set_bomb_check(MediaLimits(max_pixels=1_000_000))
    with pytest.raises(Image.DecompressionBombError, match="1100000 pixels"):
        Image.open(io.BytesIO(data))


def test_alpha_and_16_bits_in_bands_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 4), np.uint8)
    gray = np.random.default_rng(0).integers(0, 65536, (200, 300), np.uint16)
    files = [encoded(Image.fromarray(noise), "PNG"), encoded(Image.fromarray(gray), "PNG")]
    files.append(encoded(photograph(300, 200).quantize(16), "PNG", transparency=3))
    whole = [decode_image(data, inputs=[INPUT]).frames[0] for data in files]
    monkeypatch.setattr("featurex_ray.media.image._BAND_PIXELS", 300 * 7)
    for data, expected in zip(files, whole, strict=True):
        assert np.array_equal(decode_image(data, inputs=[INPUT]).frames[0], expected)


@pytest.mark.parametrize(("partial", "ok"), [("use", True), ("fail", False)])
@pytest.mark.parametrize("cut", [False, True])
def test_partial(partial: Partial, ok: bool, cut: bool) -> None:
    options = DecodeOptions((INPUT,), partial=partial)
    data = media("mpeg4.avi")
    assert not isinstance(decode_sample(SampleRequest(REQUEST, cut=cut), data, options).outcome, SampleError)
    outcome = decode_sample(SampleRequest(REQUEST, cut=cut), data[: len(data) * 2 // 3], options).outcome
    assert isinstance(outcome, SampleError) != ok
    if isinstance(outcome, SampleError):
        assert (outcome.code, "--partial use" in outcome.message) == ("truncated", True)


def test_a_codec_off_the_list_fails() -> None:
    with pytest.raises(DecodeError, match="unsupported_codec: the codec flashsv is not on the list"):
        plan(film("flv", "flashsv", num_frames=3, pixel_format="bgr24"))


def test_sound_beside_it_is_not_decoded() -> None:
    """Audio codecs are on no list; that they are there changes nothing."""
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as output:
        video, audio = output.add_stream("mpeg4", rate=25), output.add_stream("aac", rate=48_000)
        video.width = video.height = 64
        for number in range(10):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number, np.uint8), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            output.mux(video.encode(picture))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 48_000, 0
        output.mux(audio.encode(sound))
        output.mux(audio.encode(None))
        output.mux(video.encode(None))
    decoded = decode_video(target.getvalue(), ClipRequest(Sampling("every", 1)), inputs=[INPUT])
    assert (decoded.clips[0].num_frames, decoded.complete) == (10, True)
