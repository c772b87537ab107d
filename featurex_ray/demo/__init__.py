"""The demo: the whole way on bundled media and an S3 server of its own."""

from pathlib import Path

MEDIA = Path(__file__).parent / "media"
"""Images and videos that come with the package; SOURCES.md beside them names sources and licences."""
