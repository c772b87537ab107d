"""featurex-ray: archives of images and videos into feature tables.

    import featurex_ray as fx

    job = fx.ExtractionJob(manifest="photos.parquet", output="features", extractor="torchvision/resnet18")
    report = fx.run(job)
    table = fx.open_table("features/torchvision-resnet18")

Importing it imports neither torch nor Ray; what needs them is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurex_ray.job import ExtractionJob as ExtractionJob
    from featurex_ray.manifest import build_manifest as build_manifest
    from featurex_ray.media.preprocess import InputSpec as InputSpec
    from featurex_ray.models.spec import ExtractorSpec as ExtractorSpec
    from featurex_ray.pipeline.report import RunReport as RunReport
    from featurex_ray.pipeline.run import run as run
    from featurex_ray.table.read import open_table as open_table
    from featurex_ray.table.verify import verify_table as verify_table

_HOMES = {
    "ExtractionJob": "featurex_ray.job",
    "ExtractorSpec": "featurex_ray.models.spec",
    "InputSpec": "featurex_ray.media.preprocess",
    "RunReport": "featurex_ray.pipeline.report",
    "build_manifest": "featurex_ray.manifest",
    "open_table": "featurex_ray.table.read",
    "run": "featurex_ray.pipeline.run",
    "verify_table": "featurex_ray.table.verify",
}

__all__ = [*_HOMES]  # noqa: PLE0604  names that `__getattr__` finds


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featurex_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
