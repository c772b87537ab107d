"""Feature tables: the write protocol (PROTOCOL.md), S3 and local disk, reading. Knows no Ray and no torch."""

from featurex_ray.table.compare import Work
from featurex_ray.table.facts import TableFacts
from featurex_ray.table.log import Plan
from featurex_ray.table.probe import probe_store
from featurex_ray.table.store import ObjectStore, open_store
from featurex_ray.table.table import FeatureTable

__all__ = ["FeatureTable", "ObjectStore", "Plan", "TableFacts", "Work", "open_store", "probe_store"]
