"""What bytes are, told from their first bytes alone: never from a name, never by asking a decoder.

A format that is not in these lists is refused here, before any library sees it. So playlists,
concat scripts, SVG, EPS and the like reach neither FFmpeg nor Pillow.
"""

import io
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from featurex_ray.errors import ProbeError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MediaType = Literal["image", "video"]
Buffer = bytes | bytearray | memoryview | mmap.mmap


@dataclass(frozen=True)
class Container:
    """What kind of media some bytes hold.

    Args:
        media_type: An animated GIF, WebP or PNG is an image: its first frame.
        format: Such as `jpeg`, `mp4` (MOV and 3GP too) or `matroska` (WebM too).
    """

    media_type: MediaType
    format: str


_SIGNATURES: list[tuple[re.Pattern[bytes], Container]] = [
    (re.compile(rb"\xff\xd8\xff", re.S), Container("image", "jpeg")),
    (re.compile(rb"\x89PNG\r\n\x1a\n", re.S), Container("image", "png")),
    (re.compile(rb"RIFF....WEBP", re.S), Container("image", "webp")),
    (re.compile(rb"GIF8[79]a", re.S), Container("image", "gif")),
    (re.compile(rb"BM....\x00\x00\x00\x00", re.S), Container("image", "bmp")),
    # Not Canon's CR2, which marks itself after the TIFF header.
    (re.compile(rb"(II[\x2a\x2b]\x00|MM\x00[\x2a\x2b])(?!....CR)", re.S), Container("image", "tiff")),
    (re.compile(rb"\x00\x00\x01\x00[^\x00]\x00", re.S), Container("image", "ico")),
    (re.compile(rb"P[1-6][\s#]", re.S), Container("image", "ppm")),
    (re.compile(rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", re.S), Container("image", "jpeg2000")),
    (re.compile(rb"....ftyp.{0,64}avi[fs]", re.S), Container("image", "avif")),
    (re.compile(rb"....ftyp(?!hei|hev|mif1|msf1|jxl |jp2 |crx )", re.S), Container("video", "mp4")),
    (re.compile(rb"....(moov|mdat|wide|free|skip|pnot|styp|moof)", re.S), Container("video", "mp4")),
    (re.compile(rb"\x1a\x45\xdf\xa3", re.S), Container("video", "matroska")),
    (re.compile(rb"RIFF....AVI[ X\x19]", re.S), Container("video", "avi")),
    (re.compile(rb"\x00\x00\x01\xba", re.S), Container("video", "mpeg")),
    (re.compile(rb"\x00\x00\x01\xb3", re.S), Container("video", "mpegvideo")),
    (re.compile(rb"FLV\x01", re.S), Container("video", "flv")),
    (re.compile(rb"OggS", re.S), Container("video", "ogg")),
    (re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", re.S), Container("video", "asf")),
    # Transport packets of 188, 192 (m2ts) or 204 bytes, whole or after a broken-off one.
    (re.compile(rb".{0,203}?\x47(.{187}\x47){4}", re.S), Container("video", "mpegts")),
    (re.compile(rb".{0,203}?\x47(.{191}\x47){4}", re.S), Container("video", "mpegts")),
    (re.compile(rb".{0,203}?\x47(.{203}\x47){4}", re.S), Container("video", "mpegts")),
]  # fmt: skip
"""Signature, media type and format; the first that matches at the first byte wins."""

_HEAD_BYTES = 2048
_TGA_FOOTER = b"TRUEVISION-XFILE.\x00"


def sniff(data: Buffer) -> Container:
    """Tell an image or video format by its signature.

    Args:
        data: The whole object. Only its first 2 KiB and last 18 bytes are looked at.

    Raises:
        ProbeError: `empty`, or `unsupported_container` for all that is not listed.
    """
    if len(data) == 0:
        raise ProbeError("empty", "the object holds no bytes")
    head = bytes(data[:_HEAD_BYTES])
    for signature, container in _SIGNATURES:
        if signature.match(head):
            return container
    if bytes(data[-len(_TGA_FOOTER) :]) == _TGA_FOOTER:
        return Container("image", "tga")
    raise ProbeError("unsupported_container", f"no supported image or video begins with {head[:16]!r}")


def breaks_off(data: Buffer, container: Container) -> bool:
    """Whether the file's own structure says that bytes are missing at its end.

    Known for mp4, matroska and avi; other formats don't say how long they are.
    """
    ends = {"mp4": _mp4_end, "matroska": _matroska_end, "avi": _riff_end}
    end = ends.get(container.format)
    return end is not None and end(data) > len(data)


def is_encrypted(data: Buffer, container: Container) -> bool:
    """Whether an mp4's pictures are encrypted (common encryption), which FFmpeg decodes to noise."""
    if container.format != "mp4":
        return False
    headers = [bytes(data[start:end]) for kind, start, end in _mp4_boxes(data) if kind == b"moov"]
    return any(b"encv" in header and b"schm" in header for header in headers)


def _mp4_boxes(data: Buffer) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and stated end of the top-level boxes that start inside the file."""
    start = 0
    while start + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        if size == 1 and start + 16 <= len(data):
            (size,) = struct.unpack(">Q", data[start + 8 : start + 16])
        if size < 8 or not kind.isalnum():  # 0: up to the end; else trailing bytes that are no box
            break
        yield kind, start, start + size
        start += size


def _mp4_end(data: Buffer) -> int:
    return max((end for _, _, end in _mp4_boxes(data)), default=0)


def _matroska_end(data: Buffer) -> int:
    """Where the segment says that it ends; 0 for a live recording, which doesn't say."""
    position = 4
    header_bytes, width = _ebml_size(data, position)
    position += width + (header_bytes or 0)
    if bytes(data[position : position + 4]) != b"\x18\x53\x80\x67":
        return 0
    segment_bytes, width = _ebml_size(data, position + 4)
    return 0 if segment_bytes is None else position + 4 + width + segment_bytes


def _ebml_size(data: Buffer, position: int) -> tuple[int | None, int]:
    """An EBML size (None: unknown) and the bytes that it takes."""
    first = data[position] if position < len(data) else 0
    width = 9 - first.bit_length()
    mask = (1 << (7 * width)) - 1
    value = int.from_bytes(data[position : position + width], "big") & mask
    return (None if value == mask else value), width


def _riff_end(data: Buffer) -> int:
    (size,) = struct.unpack("<I", data[4:8])
    # Recorders that never came to fill in the size leave 0 or all ones.
    return 0 if size in (0, 0xFFFFFFFF) else int(size) + 8


class BufferReader(io.RawIOBase):
    """A seekable file over bytes that are not copied."""

    def __init__(self, data: Buffer) -> None:
        self._view = memoryview(data).cast("B")
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Copy the next bytes into `buffer`; 0 at the end."""
        target = memoryview(buffer).cast("B")
        chunk = self._view[self._position : self._position + len(target)]
        target[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a place, which may lie past the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """The place of the next byte."""
        return self._position
