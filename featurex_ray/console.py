"""Rows as a person reads them on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST_LIST = 3
DIGITS_IN_LISTS = 3
WIDTH_OF_LOGS = 140


def print_rows(rows: Sequence[dict[str, Any]], *, title: str | None = None) -> None:
    """Print rows as a table; long lists are shown by their beginning and length."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_LOGS
    if not rows:
        console.print(f"{title or 'rows'}: none")
        return
    table = Table(title=title and Text(title), title_justify="left", header_style="bold", title_style="bold")
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(show(value)) for value in row.values()))  # a name in brackets is no markup
    console.print(table)


def show(value: Any, *, digits: int = 7) -> str:
    """A value, short enough for a cell.

    Args:
        value: It.
        digits: Of a float; seven are whole seconds of a day with their hundredths, and all that a
            float32 has.
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list | tuple):
        shown = ", ".join(show(item, digits=DIGITS_IN_LISTS) for item in value[:LONGEST_LIST])
        return f"[{shown}]" if len(value) <= LONGEST_LIST else f"[{shown}, ..{len(value)}]"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return str(value)
