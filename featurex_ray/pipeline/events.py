"""Structured logs: one JSON object a line on stderr, with run id, plan id and sample id where there is one.

Workers always write them (Ray keeps the lines with the node's logs, and a cluster's job log has them too);
the driver does with `FEATUREX_LOG=json`, and talks to people otherwise.
"""

import json
import os
import sys
from datetime import UTC, datetime
from typing import Any

_bound: dict[str, str] = {}


def bind(**fields: str) -> None:
    """Have every later event of this process carry these fields."""
    _bound.update(fields)


def is_json() -> bool:
    """Whether the driver is to write events instead of lines for people."""
    return os.environ.get("FEATUREX_LOG") == "json"


def emit(event: str, **fields: Any) -> None:
    """Write an event."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event, **_bound, **fields})
    sys.stderr.write(f"{line}\n")  # in one piece: print() would let another thread in before the line's end
    sys.stderr.flush()
