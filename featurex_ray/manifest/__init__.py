"""Manifests: which media make up a dataset. Read, validate, build.

A manifest is Parquet, CSV or JSON Lines (also `.gz`): one file, a folder or a glob, on any store.
"""

from featurex_ray.manifest.build import ManifestCounts, build_manifest
from featurex_ray.manifest.files import ManifestFile
from featurex_ray.manifest.inline import InlineMedia, read_inline
from featurex_ray.manifest.read import Manifest, read_manifest

__all__ = [
    "InlineMedia",
    "Manifest",
    "ManifestCounts",
    "ManifestFile",
    "build_manifest",
    "read_inline",
    "read_manifest",
]
