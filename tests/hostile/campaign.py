"""Sizes and figures of the campaigns: a seeded subset by default, full counts for `make torture-hostile`."""

import json
import os
from pathlib import Path
from typing import Any

FULL = os.environ.get("FEATUREX_TORTURE") == "1"
_FIGURES = os.environ.get("FEATUREX_FIGURES")


def count(subset: int, full: int) -> int:
    """How many cases to run."""
    return full if FULL else subset


def report(campaign: str, **figures: Any) -> None:
    """Note what was measured, where `FEATUREX_FIGURES` names a file."""
    line = json.dumps({"campaign": campaign, "full": FULL, **figures})
    print(line)
    if _FIGURES:
        with Path(_FIGURES).open("a") as file:
            file.write(line + "\n")
