"""Results on disk, one JSON line per run, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.inverse.problems import Score

DEFAULT = Path("runs/inverse.jsonl")


@dataclass(frozen=True)
class Key:
    """What was run: `phase` is "tune" or "score", `seed` the problem's."""

    phase: str
    cell: str
    package: str
    method: str
    setting: str
    seed: int
    draws: int


class Records:
    """An append-only file; several processes may append to one.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[Key, Score] = {}
        self.errors: dict[Key, str] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._read(json.loads(line))

    def _read(self, row: dict[str, Any]) -> None:
        key = Key(**{f.name: row[f.name] for f in fields(Key)})
        if row.get("error"):
            self.errors[key] = row["error"]
        self.scores[key] = Score(**{f.name: _number(row[f.name]) for f in fields(Score)})

    def add(self, key: Key, score: Score, error: str = "") -> None:
        """Remember and write down one run; a failed one has infinite distance and says why."""
        self.scores[key] = score
        row = {**asdict(key), **{k: _text(v) for k, v in asdict(score).items()}, "error": error}
        if error:
            self.errors[key] = error
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def by_seed(self, phase: str, cell: str, package: str, method: str, setting: str, draws: int) -> dict[int, Score]:
        """Problem seed -> score, in order."""
        want = (phase, cell, package, method, setting, draws)
        found = {
            key.seed: score
            for key, score in self.scores.items()
            if (key.phase, key.cell, key.package, key.method, key.setting, key.draws) == want
        }
        return dict(sorted(found.items()))


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _text(value: float) -> float | str | None:
    """JSON has no nan and no infinity."""
    if math.isnan(value):
        return None
    return "inf" if math.isinf(value) else value
