"""What a file's header may claim: larger media are refused before anything is decoded."""

from dataclasses import dataclass

from featurex_ray.errors import DecodeError


@dataclass(frozen=True)
class MediaLimits:
    """The most that is decoded. What a header keeps silent about, or lies about, ends here too.

    Args:
        max_pixels: Of a picture or frame.
        max_seconds: Of a video.
        max_frames: Of a video.
        max_streams: Of a container.
        max_ratio: Bytes that come out (3 a pixel) for each encoded byte; a black film has 100,000.
    """

    max_pixels: int = 64_000_000
    max_seconds: float = 86_400.0
    max_frames: int = 1_000_000
    max_streams: int = 128
    max_ratio: float = 1_000_000.0

    def check_size(self, width: int, height: int) -> None:
        """Refuse a picture or frame of too many pixels.

        Raises:
            DecodeError: `too_large`, as for all of these checks.
        """
        if width * height > self.max_pixels:
            raise DecodeError("too_large", f"{width}x{height} pixels; the limit is {self.max_pixels:,}")

    def check_container(self, *, num_streams: int, seconds: float | None) -> None:
        """Refuse too many streams, and a length that is too long, if there is one."""
        if num_streams > self.max_streams:
            raise DecodeError("too_large", f"{num_streams} streams; the limit is {self.max_streams}")
        if seconds is not None and seconds > self.max_seconds:
            raise DecodeError("too_large", f"{seconds:,.0f} seconds; the limit is {self.max_seconds:,.0f}")

    def check_frames(self, num_frames: int) -> None:
        """Refuse too many frames."""
        if num_frames > self.max_frames:
            raise DecodeError("too_large", f"over {self.max_frames:,} frames, the limit")

    def check_ratio(self, *, num_pixels: int, num_bytes: int) -> None:
        """Refuse much picture out of few bytes."""
        if num_pixels * 3 > self.max_ratio * max(num_bytes, 1):
            raise DecodeError(
                "too_large",
                f"{num_pixels:,} pixels out of {num_bytes:,} bytes: over {self.max_ratio:,.0f} to 1",
            )


DEFAULT_LIMITS = MediaLimits()
