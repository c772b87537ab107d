"""The image: hadolint finds nothing, versions are the tested ones, nothing runs as root.

No image is built here: that needs a container engine.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.rendered import CHECKOUT

DOCKERFILE = CHECKOUT / "cluster" / "Dockerfile"


def hadolint(path: Path) -> "subprocess.CompletedProcess[str]":
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "the dev dependencies bring hadolint"
    return subprocess.run(
        [tool, "--failure-threshold", "style", "--no-color", path], capture_output=True, text=True
    )


def instructions() -> list[tuple[str, str]]:
    """Instructions and their arguments, continuation lines joined, without comments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def arguments(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def test_hadolint_finds_nothing() -> None:
    found = hadolint(DOCKERFILE)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("line", "code"),
    [("FROM python:latest", "DL3007"), ("USER root", "DL3002"), ("RUN pip install torch", "DL3013")],
)
def test_hadolint_finds_a_mistake(line: str, code: str, tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace('CMD ["featurex"', f'{line}\nCMD ["featurex"'))
    assert code in hadolint(wrong).stdout


def test_versions_are_those_of_constraints() -> None:
    pins = dict(
        line.split("==", 1)
        for line in (CHECKOUT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    given = dict(item.split("=", 1) for item in arguments("ARG"))
    assert (given["TORCH"], given["TORCHVISION"]) == (pins["torch"], pins["torchvision"])
    assert re.fullmatch(r"3\.11\.\d+-slim-\w+", given["PYTHON"])
    assert given["VARIANT"] == "cpu"
    assert "--constraint constraints.txt ." in " ".join(arguments("RUN"))


def test_the_container_runs_as_a_user_that_is_not_root() -> None:
    last_stage = instructions()[max(i for i, (name, _) in enumerate(instructions()) if name == "FROM") :]
    users = [rest for name, rest in last_stage if name == "USER"]
    assert users == ["1000:1000"]
    assert [name for name, _ in last_stage[-3:]] == ["USER", "ENTRYPOINT", "CMD"]


def test_all_that_is_copied_is_there_and_let_through() -> None:
    allowed = {
        line[1:]
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = [item for line in arguments("COPY") if "--from" not in line for item in line.split()[:-1]]
    assert set(copied) == allowed
    for item in copied:
        assert (CHECKOUT / item).exists()
