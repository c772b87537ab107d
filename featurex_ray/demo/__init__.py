"""The demo: the whole way on bundled media and an S3 server of its own."""

from featurex_ray.demo.walkthrough import run_demo

__all__ = ["run_demo"]
