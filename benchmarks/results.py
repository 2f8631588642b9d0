"""Results of long benchmarks, one JSON line each: a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["append", "read"]


def read(path: Path, settings: str | None = None) -> list[dict[str, Any]]:
    """Stored results, those made with `settings` if it is given; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if settings is None or row.get("settings") == settings:
            rows.append(row)
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Store one result at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(row) + "\n")
