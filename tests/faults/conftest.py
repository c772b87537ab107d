"""Figures of the campaigns: printed, and kept in README.md where that is asked for."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = Path(__file__).with_name("README.md")
Record = Callable[[str, str], None]


@pytest.fixture
def record(capsys: pytest.CaptureFixture[str]) -> Record:
    """Notes a campaign's figure. `FEATUREX_FIGURES=1` replaces its row in README.md."""

    def note(campaign: str, figure: str) -> None:
        with capsys.disabled():
            print(f"\n{campaign}: {figure}")
        if os.environ.get("FEATUREX_FIGURES"):
            keep(campaign, figure)

    return note


def keep(campaign: str, figure: str) -> None:
    """Replaces the campaign's row of the table, or adds it in its place."""
    text = README.read_text()
    start, end = text.index("<!-- figures -->"), text.index("<!-- end of figures -->")
    head, *rows = text[start:end].split("\n| ")
    names = {row.partition(" | ")[0]: row.rstrip("\n") for row in rows[2:]}
    names[campaign] = f"{campaign} | {figure} |"
    ordered = sorted(names.values(), key=lambda row: [int(n) for n in re.findall(r"\d+", row[:4])])
    table = "\n| ".join([head, *(row.rstrip("\n") for row in rows[:2]), *ordered])
    README.write_text(f"{text[:start]}{table}\n{text[end:]}")
