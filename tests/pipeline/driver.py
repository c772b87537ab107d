"""A program that drives Ray in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.conftest import CHECKOUT


def run_driver(program: str, *arguments: str, seconds: float) -> dict[str, Any]:
    """What the program prints last, as JSON; it must end well, and in time."""
    driver = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    found: dict[str, Any] = json.loads(driver.stdout.splitlines()[-1])
    return found
