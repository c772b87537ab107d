"""Fixtures that several parts share: real data, an S3 server in a process of its own, a small Ray."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest

from featurex_ray.demo import MEDIA, server

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared real media, where the checkout has it."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    return folder


@pytest.fixture(scope="session")
def bundled_media() -> Path:
    """The demo's media: images and videos, two of them broken."""
    return MEDIA


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server in a process of its own; the environment points at it."""
    with server.s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def local_ray(s3_server: str) -> Iterator[None]:
    """Ray with two CPUs and a logical GPU; its workers know the S3 server."""
    import ray

    assert os.environ["AWS_ENDPOINT_URL"] == s3_server
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def s3_root(s3_server: str) -> str:
    """The URI of a prefix in a fresh bucket."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    botocore.session.get_session().create_client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/out"
