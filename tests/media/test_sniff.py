import gzip
import io
import mmap
from pathlib import Path

import pytest

from featurex_ray.errors import ProbeError
from featurex_ray.media.sniff import BufferReader, Container, breaks_off, is_encrypted, sniff
from tests.media.barcode import encoded, film, photograph

PICTURE = photograph(64, 48)


@pytest.mark.parametrize(
    ("pillow_format", "name"),
    [
        ("JPEG", "jpeg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
        ("ICO", "ico"),
        ("PPM", "ppm"),
        ("TGA", "tga"),
        ("AVIF", "avif"),
        ("JPEG2000", "jpeg2000"),
    ],
)
def test_sniff_image(pillow_format: str, name: str) -> None:
    assert sniff(encoded(PICTURE, pillow_format)) == Container("image", name)


@pytest.mark.parametrize(
    ("muxer", "codec", "name"),
    [
        ("mp4", "mpeg4", "mp4"),
        ("mov", "mjpeg", "mp4"),
        ("matroska", "mpeg4", "matroska"),
        ("webm", "libvpx", "matroska"),
        ("avi", "mpeg4", "avi"),
        ("mpegts", "mpeg2video", "mpegts"),
        ("mpeg", "mpeg2video", "mpeg"),
        ("flv", "flv", "flv"),
        ("asf", "wmv2", "asf"),
    ],
)
def test_sniff_video(muxer: str, codec: str, name: str) -> None:
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = film(muxer, codec, num_frames=5, pixel_format=pixel_format)
    container = sniff(data)
    assert container == Container("video", name)
    assert not breaks_off(data, container)
    assert not is_encrypted(data, container)


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\n",
        b'<?xml version="1.0"?><MPD/>',
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.7\n",
        b"ID3\x04\x00\x00\x00\x00\x00\x00",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
        b"II*\x00\x10\x00\x00\x00CR\x02\x00",
        gzip.compress(b"x" * 100, mtime=0),
        b"\x00",
    ],
)
def test_sniff_fails(data: bytes) -> None:
    with pytest.raises(ProbeError, match="unsupported_container: no supported image or video begins with"):
        sniff(data)


def test_sniff_empty_fails() -> None:
    with pytest.raises(ProbeError, match="empty: the object holds no bytes"):
        sniff(b"")


def test_sniff_transport_stream_after_a_broken_packet() -> None:
    data = film("mpegts", "mpeg2video", num_frames=5)
    assert sniff(data[100:]).format == "mpegts"


@pytest.mark.parametrize(("muxer", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4")])
def test_breaks_off(muxer: str, codec: str) -> None:
    data = film(muxer, codec, num_frames=20)
    assert breaks_off(data[: len(data) // 2], sniff(data))


def test_breaks_off_ignores_trailing_bytes() -> None:
    data = film("mp4", "mpeg4", num_frames=5) + b"\x00\x00\x00\x00trailing"
    assert not breaks_off(data, sniff(data))


def test_buffer_reader(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(bytes(range(100)))
    with (tmp_path / "bytes").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for data in (bytes(range(100)), memoryview(bytes(range(100))), mapped):
        reader = BufferReader(data)
        assert reader.read(10) == bytes(range(10))
        assert reader.seek(-5, io.SEEK_END) == 95
        assert reader.read() == bytes(range(95, 100))
        assert reader.read(1) == b""
        assert reader.seek(200) == 200
        assert reader.read(1) == b""
        assert reader.tell() == 200
