"""The tables, and the verdict on each goal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from benchmarks.inverse.methods import FIFTY, RECOMMENDED, Method, Ours
from benchmarks.inverse.problems import Cell, Score
from benchmarks.inverse.run import Runner

HEAD = (
    "| method | setting | SW / floor (worst) | mean error | variance, row | null | mode TV | evals | s | problems |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
# Largest mean of SW / floor over the problems of a cell that meets the goal.
MERGED_GOAL, FIFTY_GOAL, WIDE_GOAL, PEER_FACTOR = 1.2, 1.25, 1.25, 3.0


@dataclass(frozen=True)
class Row:
    """One line: scores of a method at a setting, by problem."""

    package: str
    method: str
    setting: str
    scores: dict[int, Score]

    @property
    def ratio(self) -> float:
        return statistics.fmean(s.ratio for s in self.scores.values())

    @property
    def label(self) -> str:
        return self.method if self.package == "pilotlight" else f"{self.package} {self.method}"

    def over(self, seeds: Iterable[int]) -> float:
        """Mean ratio over some of the problems."""
        return statistics.fmean(self.scores[seed].ratio for seed in seeds)


def rows(runner: Runner, cell: Cell, ours: Sequence[Ours], peers: Sequence[Method]) -> list[Row]:
    """Ours, then peers at best and at default."""
    found = []
    everything: list[Ours | Method] = [*ours, *peers]
    for method in everything:
        best = runner.best(cell, method) if isinstance(method, Method) else None
        settings = {"default": method.default} | ({f"best: {best}": best} if best not in (None, method.default) else {})
        if best == method.default:
            settings = {"default, the best": best}
        taken = dict(cell.taken).get(f"{method.package} {method.name}")
        if taken is not None:
            settings = {f"taken: {taken}": taken}
        for label, setting in settings.items():
            assert setting is not None
            scores = runner.records.by_seed("score", cell.name, method.package, method.name, setting, runner.draws)
            if scores:
                found.append(Row(method.package, method.name, label, scores))
    return found


def _line(row: Row) -> str:
    scores = list(row.scores.values())
    mean = {f.name: _mean(getattr(s, f.name) for s in scores) for f in fields(Score)}
    worst = max(s.ratio for s in scores)
    setting = "" if row.package == "pilotlight" else row.setting
    return (
        f"| {row.label} | {setting} | {_short(mean['ratio'])} ({_short(worst)}) | {_short(mean['mean_error'])} | "
        f"{_short(mean['row'])} | {_short(mean['null'])} | {_short(mean['tv'], 3)} | {mean['evals']:.0f} | "
        f"{mean['seconds']:.1f} | {len(scores)} |"
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _short(value: float, digits: int = 2) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"


def matrix(found: dict[Cell, list[Row]]) -> list[str]:
    """SW / floor of every method in every cell; peers at default / at best."""
    cells = list(found)
    lines = ["| method | " + " | ".join(cell.name for cell in cells) + " |", "|---" * (len(cells) + 1) + "|"]
    labels = dict.fromkeys(row.label for table in found.values() for row in table)
    for label in labels:
        entries = []
        for cell in cells:
            lined = [row for row in found[cell] if row.label == label]
            default = next((_short(row.ratio) for row in lined if row.setting.startswith("default")), "-")
            chosen = (row for row in lined if "best" in row.setting or row.setting.startswith("taken"))
            best = next((_short(row.ratio) for row in chosen), None)
            entries.append(default if best is None else f"{default} / {best}")
        lines.append(f"| {label} | {' | '.join(entries)} |")
    return lines


def show(runner: Runner, cells: Sequence[Cell], ours: Sequence[Ours], peers: Sequence[Method]) -> None:
    """Print a table per cell, then the goals."""
    found = {cell: rows(runner, cell, ours, peers) for cell in cells}
    for cell, lines in found.items():
        print(f"\n{cell.name}\n\n{HEAD}")
        for row in lines:
            print(_line(row))
    print("\nSW / floor by cell; peers at default / at the setting chosen on other problems\n")
    print("\n".join(matrix(found)))
    for error in sorted({f"{k.package} {k.method} ({k.setting}): {v}" for k, v in runner.records.errors.items()}):
        print(f"failed: {error}")
    print("\nGoals\n")
    for verdict in verdicts(found):
        print(f"- {verdict}")


def verdicts(found: dict[Cell, list[Row]]) -> list[str]:
    """One line per goal and cell."""
    lines = []
    for cell, table in found.items():
        by_name = {row.method: row for row in table if row.package == "pilotlight"}
        merged, fifty = by_name.get(RECOMMENDED), by_name.get(FIFTY)
        if cell.sigma is not None or merged is None:
            continue
        if cell.dim == 8:
            lines.append(_verdict(f"{cell.name}: {RECOMMENDED}", merged.ratio, MERGED_GOAL))
            if fifty:
                lines.append(_verdict(f"{cell.name}: {FIFTY}", fifty.ratio, FIFTY_GOAL))
        if cell.dim == 800:
            lines.append(_verdict(f"{cell.name}: {RECOMMENDED}", merged.ratio, WIDE_GOAL))
        others = [
            (_factor(r, merged), r) for r in table if r.package != "pilotlight" and set(r.scores) & set(merged.scores)
        ]
        if others:
            factor, peer = min(others, key=lambda pair: pair[0])
            common = set(peer.scores) & set(merged.scores)
            line = (
                f"{cell.name}: closest peer {peer.label} ({peer.setting}) {peer.over(common):.2f} "
                f"against {merged.over(common):.2f} on {len(common)} problems, {factor:.1f} times"
            )
            if cell.dim == 80:
                line += f" (goal {PEER_FACTOR:g}): {'met' if factor >= PEER_FACTOR else 'NOT met'}"
            lines.append(line)
    return lines


def _factor(peer: Row, ours: Row) -> float:
    """How many times farther from the exact posterior, on the problems that both were run on."""
    common = set(peer.scores) & set(ours.scores)
    return peer.over(common) / ours.over(common)


def _verdict(name: str, value: float, goal: float) -> str:
    return f"{name} {value:.2f} (goal {goal:g}): {'met' if value <= goal else 'NOT met'}"
