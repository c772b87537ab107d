import io
import mmap
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featurex_ray.errors import DecodeError, ProbeError, SampleError
from featurex_ray.media import image
from featurex_ray.media.image import decode_image
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec, fit
from tests.media.barcode import SHARED, encoded, film, photograph

SMALL = InputSpec(48, 64)
PHOTO = photograph(640, 480)


def pixels(data: bytes, spec: InputSpec = SMALL) -> np.ndarray:
    return decode_image(data, inputs=[spec]).frames[0]


def gray_ramp() -> np.ndarray:
    return np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_are_exact(image_format: str) -> None:
    assert np.array_equal(pixels(encoded(PHOTO, image_format)), fit(PHOTO, SMALL))


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats_are_close(image_format: str) -> None:
    difference = pixels(encoded(PHOTO, image_format, quality=95)).astype(int) - fit(PHOTO, SMALL)
    assert np.abs(difference).mean() < 3


def test_several_inputs_from_one_decode() -> None:
    decoded = decode_image(encoded(PHOTO, "PNG"), inputs=[SMALL, InputSpec(32, 32, resize=40)])
    assert [frame.shape for frame in decoded.frames] == [(48, 64, 3), (32, 32, 3)]
    assert (decoded.width, decoded.height, decoded.complete) == (640, 480, True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose members that undo each value
    stored = PHOTO if orientation == 1 else PHOTO.transpose(Image.Transpose(undone[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(stored, "PNG", exif=exif), inputs=[SMALL])
    assert (decoded.width, decoded.height) == (640, 480)
    assert np.array_equal(decoded.frames[0], fit(PHOTO, SMALL))


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_orientation_that_is_invalid_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encoded(PHOTO, "PNG", exif=exif)), fit(PHOTO, SMALL))


def test_alpha_is_composited_over_white() -> None:
    hidden = Image.new("RGBA", (64, 48), (255, 0, 255, 0))
    half = Image.new("RGBA", (64, 48), (0, 0, 0, 128))
    assert np.all(pixels(encoded(hidden, "PNG")) == 255)
    assert np.all(pixels(encoded(half, "PNG")) == 127)


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (64, 48), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert np.all(pixels(encoded(image, "PNG")) == [0, 0, 255])
    assert np.all(pixels(encoded(image, "PNG", transparency=1)) == 255)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(image_format: str) -> None:
    decoded = pixels(encoded(Image.fromarray(gray_ramp()), image_format))
    expected = np.round(gray_ramp() / 257)
    assert np.abs(decoded - expected[..., None]).max() <= 1
    assert (decoded.min(), decoded.max()) == (0, 255)


def test_16_bit_pgm_is_scaled() -> None:
    data = b"P5 64 48 65535\n" + gray_ramp().astype(">u2").tobytes()
    assert np.array_equal(pixels(data), pixels(encoded(Image.fromarray(gray_ramp()), "PNG")))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "CMYK", "P", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    decoded = pixels(encoded(PHOTO.convert(mode), "TIFF"))
    expected = fit(PHOTO.convert(mode).convert("RGB"), SMALL)
    assert decoded.shape == (48, 64, 3)
    assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_picture_of_several(image_format: str) -> None:
    red, blue = (Image.new("RGB", (64, 48), color) for color in ("#ff0000", "#0000ff"))
    data = encoded(red, image_format, save_all=True, append_images=[blue])
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(("width", "height"), [(1000, 800), (2400, 1800), (4000, 3000), (1200, 4000)])
def test_reduced_scale(width: int, height: int) -> None:
    data, spec = encoded(photograph(width, height), "JPEG", quality=92), InputSpec(224, 224, resize=224)
    full = decode_image(data, inputs=[spec], full_decode=True)
    reduced = decode_image(data, inputs=[spec])
    assert (reduced.width, reduced.height) == (full.width, full.height) == (width, height)
    difference = np.abs(reduced.frames[0].astype(int) - full.frames[0])
    assert difference.mean() < 0.75
    assert np.any(difference) == (min(width, height) >= 2 * 2.75 * 224)


def test_reduced_scale_keeps_real_photographs_close() -> None:
    files = sorted((SHARED / "awkward" / "images").glob("real_Portrait_*.jpg"))
    if not files:
        pytest.skip("the shared photographs are not here")
    for file in files:
        data, spec = file.read_bytes(), InputSpec(112, 112, resize=128)
        full = decode_image(data, inputs=[spec], full_decode=True).frames[0]
        difference = np.abs(decode_image(data, inputs=[spec]).frames[0].astype(int) - full)
        assert difference.mean() < 1.5


def test_memoryview_and_mmap_equal_bytes(tmp_path: Path) -> None:
    data = encoded(PHOTO, "JPEG")
    (tmp_path / "photo").write_bytes(data)
    with (tmp_path / "photo").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for other in (memoryview(data), mapped):
        assert np.array_equal(decode_image(other, inputs=[SMALL]).frames[0], pixels(data))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_truncated_fails(image_format: str) -> None:
    data = encoded(PHOTO, image_format)
    with pytest.raises(DecodeError, match="truncated: image file is truncated"):
        pixels(data[: len(data) // 2])


def test_too_large_fails() -> None:
    data = encoded(Image.new("1", (3000, 3000)), "PNG")
    with pytest.raises(DecodeError, match="too_large: 3000x3000 pixels; the limit is 1,000,000"):
        decode_image(data, inputs=[SMALL], limits=MediaLimits(max_pixels=1_000_000))


def test_bomb_fails() -> None:
    data = bytearray(encoded(Image.new("L", (8, 8)), "GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    with pytest.raises(DecodeError, match="too_large"):
        pixels(bytes(data))


def test_damaged_fails() -> None:
    data = bytearray(encoded(PHOTO, "PNG"))
    data[500:600] = bytes(100)
    with pytest.raises(DecodeError, match="undecodable"):
        pixels(bytes(data))


def test_floating_point_fails() -> None:
    data = encoded(Image.new("F", (8, 8)), "TIFF")
    with pytest.raises(DecodeError, match="unsupported_codec: floating-point pixels have no known range"):
        pixels(data)


def a_png(depth: int, colour: int, row: bytes, transparent: bytes | None = None) -> bytes:
    """8x8, every row the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *([chunk(b"tRNS", transparent)] if transparent else [])]
    chunks += [chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def a_tiff(bits: int, photometric: int, data: bytes, sample_format: int = 1) -> bytes:
    """8x8 gray in one strip."""
    shorts = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 8, 339: sample_format}
    entries = {tag: struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in shorts.items()}
    entries |= {273: struct.pack("<HHII", 273, 4, 1, 8), 279: struct.pack("<HHII", 279, 4, 1, len(data))}
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        a_png(16, 0, b"\x12\x34" * 8, b"\x12\x34"),
        a_png(16, 2, b"\x80\x01" * 24, b"\x80\x01" * 3),
        a_png(4, 0, b"\x55" * 4, b"\0\x05"),
        a_png(2, 0, b"\x55" * 2, b"\0\x01"),
        a_png(1, 0, b"\0", b"\0\0"),
        a_png(8, 0, b"\x55" * 8, b"\0\x55"),
    ],
)
def test_a_transparent_value_shows_the_ground_whatever_the_depth(data: bytes) -> None:
    assert (decode_image(data, inputs=[InputSpec(8, 8)]).frames[0] == 255).all()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (a_tiff(12, 1, b"\xff\xff\xff" * 32), 255),
        (a_tiff(16, 0, bytes(128)), 255),
        (a_tiff(16, 1, bytes(128)), 0),
        (a_tiff(8, 0, bytes(64)), 255),
    ],
)
def test_gray_tiffs_have_their_range(data: bytes, value: int) -> None:
    assert (decode_image(data, inputs=[InputSpec(8, 8)]).frames[0] == value).all()


@pytest.mark.parametrize(
    "data",
    [a_tiff(32, 1, struct.pack("<I", 255) * 64), a_tiff(16, 1, struct.pack("<h", 32767) * 64, 2)],
)
def test_integers_without_a_known_range_fail(data: bytes) -> None:
    with pytest.raises(DecodeError, match="unsupported_codec: integer pixels beyond 16 bits, or signed"):
        decode_image(data, inputs=[InputSpec(8, 8)])


def test_wide_integers_fail() -> None:
    data = encoded(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF")
    with pytest.raises(DecodeError, match="unsupported_codec: integer pixels beyond 16 bits"):
        pixels(data)


def test_video_fails() -> None:
    with pytest.raises(DecodeError, match="unsupported_codec: a mp4 video, not an image"):
        pixels(film("mp4", "mpeg4", num_frames=2))


def test_text_fails() -> None:
    with pytest.raises(ProbeError, match="unsupported_container"):
        pixels(b"not an image")


def test_nothing_is_printed_and_warnings_are_no_errors() -> None:
    folder = SHARED / "awkward" / "images"
    files = [
        *folder.glob("real_*memory_error.jpg"),
        *folder.glob("real_image*.jpg"),
        *folder.glob("real_oom*.tif"),
    ]
    if not files:
        pytest.skip("the shared images with odd metadata are not here")
    program = (
        "import pathlib, sys\n"
        "from featurex_ray.errors import SampleError\n"
        "from featurex_ray.media.image import InputSpec, decode_image\n"
        "for name in sys.argv[1:]:\n"
        "    try: decode_image(pathlib.Path(name).read_bytes(), inputs=[InputSpec(8, 8)])\n"
        "    except SampleError: pass\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def encoded_jpeg(
    mode: str, size: tuple[int, int], *, quality: int, subsampling: int, progressive: bool
) -> bytes:
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    options = {} if mode == "L" else {"subsampling": subsampling}
    picture = Image.fromarray(noise).resize(size).convert(mode)
    picture.save(file, "JPEG", quality=quality, progressive=progressive, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_plain_jpegs_have_the_pixels_that_pillow_gives_without_asking_it(
    mode: str, subsampling: int, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in [(1, 1), (7, 3), (32, 32), (45, 130)]:
        data = encoded_jpeg(mode, size, quality=75, subsampling=subsampling, progressive=progressive)
        whole = InputSpec(size[1], size[0])
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", None)
            assert np.array_equal(pixels(data, whole), expected)


def test_a_jpeg_of_a_subsampling_without_a_name_is_decoded() -> None:
    """4:4:1, as losslessly rotated 4:1:1 has it: here, the blocks of 4:2:0 in another order."""
    usual = encoded_jpeg("RGB", (32, 32), quality=75, subsampling=2, progressive=False)
    data = usual.replace(b"\x03\x01\x22\x00", b"\x03\x01\x14\x00")
    assert data != usual
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels(data, InputSpec(32, 32)), expected)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_jpegs_end_as_they_do_with_pillow(data: st.DataObject) -> None:
    """Broken off, or with bytes that are others."""
    mode = data.draw(st.sampled_from(["RGB", "L", "CMYK"]))
    jpeg = encoded_jpeg(mode, (40, 30), quality=75, subsampling=2, progressive=data.draw(st.booleans()))
    damaged = bytearray(jpeg)
    for place in data.draw(st.lists(st.integers(3, len(jpeg) - 1), max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(3, len(jpeg))) :]
    found = outcome(bytes(damaged))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "_plain_jpeg", lambda *_, **__: None)
        assert found == outcome(bytes(damaged))


def outcome(data: bytes) -> bytes | str:
    try:
        return pixels(data).tobytes()
    except SampleError as error:
        return error.code
