"""Where bytes come from: URIs, what may be read, bounded retries, many fetches in flight.

A URI is `scheme://rest` or a plain path, and `rest` is taken literally: no percent-decoding, no
fragments, no globbing, so that every name a store can hold can be read. A member of an
uncompressed tar is `s3://bucket/shard-000.tar::inner/name.jpg`.
"""

from featurex_ray.storage.fetch import Fetched, Fetcher
from featurex_ray.storage.filesystems import (
    NO_CREDENTIALS,
    Filesystem,
    filesystem,
    is_away,
    uri_of,
    version_of,
)
from featurex_ray.storage.policy import ReadPolicy
from featurex_ray.storage.tar import TarIndex
from featurex_ray.storage.uri import Location, parse, redact, resolve, without_secrets

__all__ = [
    "NO_CREDENTIALS",
    "Fetched",
    "Fetcher",
    "Filesystem",
    "Location",
    "ReadPolicy",
    "TarIndex",
    "filesystem",
    "is_away",
    "parse",
    "redact",
    "resolve",
    "uri_of",
    "version_of",
    "without_secrets",
]
