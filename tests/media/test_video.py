import functools
import mmap
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurex_ray.errors import DecodeError, ProbeError, RequestError
from featurex_ray.media import decord_backend
from featurex_ray.media import video as videos
from featurex_ray.media.decoder import DecoderPolicy
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import (
    ClipPlan,
    ClipRequest,
    DecodedVideo,
    cut_units,
    decode_video,
    plan_clips,
    resolve_policy,
)
from tests.media.barcode import HEIGHT, SHARED, WIDTH, encoded, film, photograph, read

FULL = InputSpec(HEIGHT, WIDTH)
X264 = {"preset": "veryfast", "bf": "2"}
needs_decord = pytest.mark.skipif(not decord_backend.is_installed(), reason="decord is not installed")

FILMS: dict[str, dict[str, object]] = {
    "h264.mp4": {"container": "mp4", "codec": "libx264", "options": X264},
    "h264.mkv": {"container": "matroska", "codec": "libx264", "options": X264},
    "h264.ts": {"container": "mpegts", "codec": "libx264", "options": X264},
    "h264.avi": {"container": "avi", "codec": "libx264", "options": X264},
    "h264.flv": {"container": "flv", "codec": "libx264", "options": X264},
    "h264-open-gop.mp4": {
        "container": "mp4", "codec": "libx264", "options": {**X264, "x264-params": "open-gop=1"},
    },
    "h264-two-frame-gop.mp4": {
        "container": "mp4", "codec": "libx264", "gop": 2,
        "options": {**X264, "x264-params": "open-gop=1:keyint-min=1"},
    },
    "h264-intra-refresh.mkv": {
        "container": "matroska", "codec": "libx264", "options": {**X264, "x264-params": "intra-refresh=1"},
    },
    "h264-10-bit.mp4": {
        "container": "mp4", "codec": "libx264", "pixel_format": "yuv420p10le", "options": X264,
    },
    "hevc.mp4": {
        "container": "mp4", "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": "log-level=none"},
    },
    "vp8.webm": {
        "container": "webm", "codec": "libvpx",
        "options": {"auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "good", "cpu-used": "5"},
    },
    "vp9.webm": {
        "container": "webm", "codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"},
    },
    "av1.mkv": {
        "container": "matroska", "codec": "libsvtav1",
        "options": {"preset": "12", "svtav1-params": "lookahead=0"},
    },
    "mpeg4.avi": {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2.ts": {"container": "mpegts", "codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg2.mpg": {"container": "mpeg", "codec": "mpeg2video", "options": {"bf": "2"}},
    "mjpeg.avi": {"container": "avi", "codec": "mjpeg", "pixel_format": "yuvj420p"},
    "prores.mov": {"container": "mov", "codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "hevc.ts": {
        "container": "mpegts", "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3"},
    },
    "hevc-10-bit.mkv": {
        "container": "matroska", "codec": "libx265", "pixel_format": "yuv420p10le",
        "options": {"preset": "ultrafast", "x265-params": "log-level=none"},
    },
    "vp9.mp4": {
        "container": "mp4", "codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"},
    },
    "av1.mp4": {
        "container": "mp4", "codec": "libsvtav1",
        "options": {"preset": "12", "svtav1-params": "lookahead=0"},
    },
    "h264.mov": {"container": "mov", "codec": "libx264", "options": X264},
    "mpeg4.mp4": {"container": "mp4", "codec": "mpeg4", "options": {"bf": "2"}},
    "h264-interlaced.mp4": {
        "container": "mp4", "codec": "libx264", "options": X264 | {"flags": "+ildct+ilme"},
    },
    "mpeg2-interlaced.mkv": {
        "container": "matroska", "codec": "mpeg2video", "options": {"flags": "+ildct+ilme", "bf": "2"},
    },
    "mjpeg.mov": {"container": "mov", "codec": "mjpeg", "pixel_format": "yuvj422p"},
    "prores.mkv": {"container": "matroska", "codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "flv1.flv": {"container": "flv", "codec": "flv"},
    "ffv1.mkv": {"container": "matroska", "codec": "ffv1"},
    "msmpeg4.avi": {"container": "avi", "codec": "msmpeg4"},
    "wmv2.asf": {"container": "asf", "codec": "wmv2"},
}  # fmt: skip
VARIABLE = [number if number < 20 else 20 + 3 * (number - 20) for number in range(60)]


@functools.cache
def media(name: str) -> bytes:
    return film(**FILMS[name])


@functools.cache
def variable_rate() -> bytes:
    return film("matroska", "libx264", options=X264, pts=VARIABLE)


def request(sampling: str = "every:1", **windows: float) -> ClipRequest:
    return ClipRequest(Sampling.parse(sampling), **windows)


def decode(data: bytes, asked: ClipRequest, **options: object) -> DecodedVideo:
    return decode_video(data, asked, inputs=[FULL], **options)


def numbers(video: DecodedVideo) -> list[int]:
    return [read(frame) for frame in video.frames[0]]


@pytest.mark.parametrize("policy", ["auto", "pyav"])
@pytest.mark.parametrize("name", FILMS)
def test_every_frame_in_order(name: str, policy: DecoderPolicy) -> None:
    video = decode(media(name), request(), policy=policy)
    assert numbers(video) == list(range(60))
    assert video.complete
    (clip,) = video.clips
    assert np.allclose(clip.frame_pts_seconds - clip.frame_pts_seconds[0], np.arange(60) / 25, atol=0.0011)
    assert clip.end_seconds - clip.start_seconds == pytest.approx(60 / 25, abs=0.0011)


@pytest.mark.parametrize("policy", ["auto", "pyav"])
@pytest.mark.parametrize("name", FILMS)
def test_frames_out_of_the_middle(name: str, policy: DecoderPolicy) -> None:
    data = media(name)
    first = plan_clips(data, request()).clips[0].start_seconds
    origin = 0 if name.endswith((".ts", ".mpg")) else first
    for number in (1, 11, 12, 13, 35, 59):
        moment = origin + number / 25
        asked = request("uniform:1", start_seconds=moment - 0.01, end_seconds=moment + 0.01)
        assert numbers(decode(data, asked, policy=policy)) == [number]
    assert numbers(decode(data, request("uniform:4"), policy=policy)) == [0, 20, 39, 59]


@needs_decord
@pytest.mark.parametrize(
    "name", ["h264.mp4", "h264-open-gop.mp4", "h264-intra-refresh.mkv", "vp8.webm", "vp9.webm"]
)
def test_decord_gives_the_same_pixels(name: str) -> None:
    pyav = decode(media(name), request(), policy="pyav")
    decord = decode(media(name), request(), policy="auto")
    assert (pyav.decoder, decord.decoder) == ("pyav", "decord")
    difference = np.abs(pyav.frames[0].astype(int) - decord.frames[0])
    assert difference.max() <= 2
    assert difference.mean() < 0.1
    sparse = decode(media(name), request("every:13"), policy="decord")
    assert sparse.decoder == "decord"
    assert numbers(sparse) == list(range(0, 60, 13))


@needs_decord
@pytest.mark.parametrize(
    "name",
    ["h264.ts", "h264.avi", "h264-interlaced.mp4", "mpeg2.ts", "mpeg4.avi", "hevc.mp4", "av1.mkv"],
)
def test_decord_where_it_is_not_exact_fails(name: str) -> None:
    assert decode(media(name), request()).decoder == "pyav"
    with pytest.raises(DecodeError, match="unsupported_codec: decord is not frame-exact on this"):
        decode(media(name), request(), policy="decord")


def mirrored(data: bytes) -> bytes:
    """An mp4 whose pictures are to be shown with left and right exchanged."""
    upright = (1 << 16).to_bytes(4, "big") + bytes(12) + (1 << 16).to_bytes(4, "big")
    at = data.index(upright, data.index(b"tkhd"))
    return data[:at] + (-1 << 16).to_bytes(4, "big", signed=True) + data[at + 4 :]


@pytest.mark.parametrize("policy", ["auto", "pyav"])
@pytest.mark.parametrize("tolerance", [2, 255])
def test_mirrored_display_matrix(
    policy: DecoderPolicy, tolerance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first picture tells nothing, as one that is black."""
    monkeypatch.setattr(videos, "_DECORD_TOLERANCE", tolerance)
    data = media("h264.mp4")
    expected = decode(data, request("every:2"), policy="pyav").frames[0][:, :, ::-1]
    assert np.array_equal(decode(mirrored(data), request("every:2"), policy=policy).frames[0], expected)


@needs_decord
def test_decord_agrees_on_real_clips() -> None:
    files = sorted((SHARED / "videos" / "other").glob("*.mp4"), key=lambda file: file.stat().st_size)[:6]
    if not files:
        pytest.skip("the shared clips are not here")
    for file in files:
        options = {"inputs": [InputSpec(64, 64)]}
        pyav = decode_video(file.read_bytes(), request("every:2"), policy="pyav", **options)
        auto = decode_video(file.read_bytes(), request("every:2"), policy="auto", **options)
        assert np.abs(pyav.frames[0].astype(int) - auto.frames[0]).max() <= 2


def test_reference_frames_of_torchcodec() -> None:
    folder = SHARED / "videos" / "torchcodec"
    references = sorted(folder.glob("ref/nasa.stream3.*.png"))
    if not references:
        pytest.skip("the shared reference frames are not here")
    data = (folder / "nasa_13013.mp4").read_bytes()
    asked = request(end_seconds=36 * 1001 / 30000)
    video = decode_video(data, asked, inputs=[InputSpec(270, 480)])
    for reference in references:
        expected = np.asarray(Image.open(reference).convert("RGB")).astype(int)
        assert np.abs(video.frames[0][int(reference.stem[-6:])] - expected).max() <= 2


def test_colours_of_both_ranges_and_matrices_agree() -> None:
    folder = SHARED / "awkward" / "videos"
    if not folder.exists():
        pytest.skip("the shared pair is not here")
    names = ("full_range_bt709.mp4", "limited_range_bt601.mp4")
    full, limited = (decode((folder / name).read_bytes(), request()).frames[0] for name in names)
    assert np.abs(full.mean((0, 1, 2)) - limited.mean((0, 1, 2))).max() < 1.5


@pytest.mark.parametrize("sampling", ["uniform:5", "fps:5", "every:7", "keyframes"])
@pytest.mark.parametrize("name", ["h264-open-gop.mp4", "mpeg4.avi", "h264.ts", "h264-intra-refresh.mkv"])
def test_cut_into_units_equals_uncut(name: str, sampling: str) -> None:
    data, asked = media(name), request(sampling, clip_seconds=0.7, clip_stride_seconds=0.4)
    inputs = [InputSpec(64, 64), InputSpec(32, 32, resize=40)]
    plan = plan_clips(data, asked)
    whole = decode_video(data, asked, inputs=inputs)
    units = cut_units(plan, inputs, max_unit_bytes=6 * sum(spec.frame_bytes for spec in inputs))
    assert len(units) > 1
    assert [index for unit in units for index in unit] == list(range(len(plan.clips)))
    parts = [decode_video(data, asked, inputs=inputs, clips=unit) for unit in units]
    assert {part.num_clips for part in parts} == {whole.num_clips, len(plan.clips)}
    for place in range(2):
        assert np.array_equal(np.concatenate([part.frames[place] for part in parts]), whole.frames[place])
    clips = [clip for part in parts for clip in part.clips]
    for cut, uncut, planned in zip(clips, whole.clips, plan.clips, strict=True):
        assert cut.clip_index == uncut.clip_index == planned.clip_index
        assert np.array_equal(cut.frame_pts_seconds, uncut.frame_pts_seconds)
        assert (cut.start_seconds, cut.end_seconds) == (planned.start_seconds, planned.end_seconds)


def test_variable_rate() -> None:
    video = decode(variable_rate(), request("fps:5"))
    pts = np.array(VARIABLE) / 25
    shown = [
        int(np.searchsorted(pts, place / 5 + 1e-6, side="right")) - 1 for place in range(len(numbers(video)))
    ]
    assert numbers(video) == shown
    assert np.allclose(video.clips[0].frame_pts_seconds, pts[shown], atol=0.0011)


def test_windows_in_a_gap_give_no_clip() -> None:
    data = film("matroska", "libx264", num_frames=20, options=X264, pts=[*range(10), *range(110, 120)])
    video = decode(data, request("uniform:2", clip_seconds=1))
    assert [clip.start_seconds for clip in video.clips] == [0, 4]
    assert [clip.clip_index for clip in video.clips] == [0, 1]
    assert numbers(video) == [0, 9, 10, 19]


def test_short_video_repeats_its_last_frame() -> None:
    video = decode(film("mp4", "mpeg4", num_frames=3), request("uniform:6"))
    assert numbers(video) == [0, 1, 2, 2, 2, 2]
    assert list(video.clips[0].frame_pts_seconds) == pytest.approx([0, 0.04, 0.08, 0.08, 0.08, 0.08])


def test_sparse_sampling_decodes_little() -> None:
    data = film("mp4", "libx264", num_frames=1000, gop=25, options={"preset": "ultrafast"})
    asked = request("uniform:4")
    video = decode(data, asked, policy="auto")
    assert numbers(video) == [0, 333, 666, 999]
    assert video.num_decoded < 4 * 25 + 16


def test_request_of_a_part() -> None:
    video = decode(media("h264.mp4"), request(start_seconds=1, end_seconds=1.5))
    assert numbers(video) == list(range(25, 38))
    assert (video.clips[0].start_seconds, video.clips[0].end_seconds) == (1, 1.5)


def test_part_of_a_transport_stream_counts_from_its_first_frame() -> None:
    video = decode(media("mpeg2.ts"), request(start_seconds=1, end_seconds=1.5))
    assert numbers(video)[0] in (25, 26)
    assert video.clips[0].start_seconds > 1


def test_damaged_frames_are_not_made_up() -> None:
    data = bytearray(media("h264.mp4"))
    half = len(data) // 2
    data[half : half + 1500] = np.random.default_rng(0).bytes(1500)
    video = decode(bytes(data), request())
    seen = numbers(video)
    assert not video.complete
    assert len(seen) < 60
    assert len(np.unique(video.clips[0].frame_pts_seconds)) == len(seen)
    # What the decoder conceals may look like a frame before it, but never like one to come.
    pts = video.clips[0].frame_pts_seconds
    assert all(number <= round(shown * 25) for number, shown in zip(seen, pts, strict=True))
    assert seen[:20] == list(range(20))
    assert len(numbers(decode(bytes(data), request("uniform:8")))) == 8


@pytest.mark.parametrize("name", ["vp8.webm", "mpeg4.avi", "h264.ts"])
def test_cut_off_video_gives_its_readable_part(name: str) -> None:
    data = media(name)[: len(media(name)) * 2 // 3]
    video = decode(data, request())
    assert video.decoder == "pyav"
    seen = numbers(video)
    assert 10 < len(seen) < 60
    assert seen[:10] == list(range(10))
    if name != "h264.ts":  # a transport stream doesn't say how long it is
        assert not video.complete


@needs_decord
def test_decord_on_a_cut_off_video_fails() -> None:
    data = media("vp8.webm")
    with pytest.raises(DecodeError, match="unsupported_codec: decord is not safe on cut-off files"):
        decode(data[: len(data) * 2 // 3], request(), policy="decord")


def test_memoryview_and_mmap_equal_bytes(tmp_path: Path) -> None:
    data = media("mpeg4.avi")
    (tmp_path / "film").write_bytes(data)
    with (tmp_path / "film").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for other in (memoryview(data), mapped):
        assert numbers(decode_video(other, request("every:20"), inputs=[FULL])) == [0, 20, 40]


def test_threads_give_the_same_frames() -> None:
    one = decode(media("h264.mp4"), request("every:7"), policy="pyav", num_threads=1)
    two = decode(media("h264.mp4"), request("every:7"), policy="pyav", num_threads=2)
    assert np.array_equal(one.frames[0], two.frames[0])


def test_results_can_be_pickled() -> None:
    video = decode(media("mpeg4.avi"), request("uniform:2"))
    copied = pickle.loads(pickle.dumps(video))
    assert np.array_equal(copied.frames[0], video.frames[0])
    assert isinstance(pickle.loads(pickle.dumps(plan_clips(media("mpeg4.avi"), request()))), ClipPlan)


def test_cut_units_fails() -> None:
    plan = plan_clips(media("mpeg4.avi"), request())
    with pytest.raises(DecodeError, match=r"too_large: .* --sampling or a shorter --clip-seconds"):
        cut_units(plan, [FULL], max_unit_bytes=FULL.frame_bytes * 59)
    with pytest.raises(DecodeError, match="too_large: a clip's frames take"):
        decode(media("mpeg4.avi"), request(), max_unit_bytes=FULL.frame_bytes * 59)
    assert cut_units(plan, [FULL], max_unit_bytes=FULL.frame_bytes * 60) == [range(1)]


def test_too_many_clips_fails() -> None:
    with pytest.raises(DecodeError, match=r"too_large: .* clips; a longer --clip-stride-seconds makes fewer"):
        plan_clips(media("mpeg4.avi"), request(clip_seconds=1e-6, clip_stride_seconds=1e-6))


def test_window_outside_fails() -> None:
    with pytest.raises(DecodeError, match=r"no_frames: .* asked of \[0.000, 2.400\) s"):
        plan_clips(media("h264.mp4"), request(start_seconds=100))


def test_too_large_picture_fails() -> None:
    with pytest.raises(DecodeError, match="too_large: 320x240 pixels; the limit is 1,000"):
        plan_clips(media("h264.mp4"), request(), limits=MediaLimits(max_pixels=1000))


def test_header_cut_off_fails() -> None:
    data = media("h264.mp4")  # its index lies at the end
    with pytest.raises(ProbeError, match="truncated: the mp4 file breaks off"):
        plan_clips(data[: len(data) // 2], request())


def test_image_fails() -> None:
    with pytest.raises(DecodeError, match="unsupported_codec: a png image, not a video"):
        plan_clips(encoded(photograph(8, 8), "PNG"), request())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_seconds": 0}, "clip_seconds must be positive, not 0"),
        ({"clip_seconds": 1, "clip_stride_seconds": -1}, "clip_stride_seconds must be positive, not -1"),
        ({"clip_stride_seconds": 1}, "clip_stride_seconds needs clip_seconds"),
        ({"start_seconds": 2, "end_seconds": 2}, "start_seconds 2 is not before end_seconds 2"),
    ],
)
def test_request_fails(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request(**arguments)


def test_resolve_policy() -> None:
    assert resolve_policy("auto") == ("decord+pyav" if decord_backend.is_installed() else "pyav")
    assert resolve_policy("pyav") == "pyav"
    assert resolve_policy(resolve_policy("auto")) == resolve_policy("auto")
