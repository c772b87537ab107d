"""Into a cluster: what is said where there is none. In processes of their own, which have no Ray yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT


@pytest.mark.parametrize("how", ["option", "environment"])
def test_no_cluster_at_the_address_exits_2_at_once(how: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"uri,dataset\n{photos}/even/000.png,d\n")
    extract = [tmp_path / "m.csv", "--output", tmp_path / "out", "--extractor", "attention_convnet"]
    environment = {"PYTHONPATH": str(CHECKOUT)} | (
        {"RAY_ADDRESS": "127.0.0.1:1"} if how == "environment" else {}
    )
    found = subprocess.run(
        [
            sys.executable, "jobs/extract.py", *extract,
            *(["--address", "127.0.0.1:1"] if how == "option" else []),
        ],
        cwd=CHECKOUT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert "featurex: no Ray cluster at 127.0.0.1:1: nothing listens there" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
