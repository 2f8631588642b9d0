"""The runs of a cell: ours, settings of the peers on problems of their own, peers at best and at default."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import lru_cache

from benchmarks.inverse.methods import FIFTY, RECOMMENDED, Method, Ours
from benchmarks.inverse.problems import Cell, Judge, Score
from benchmarks.inverse.records import Key, Records
from models.references import ExactProblem

DRAWS, TUNING_DRAWS = 1000, 400
FIRST = (RECOMMENDED, FIFTY)  # judged against the goals, so on all problems of a cell
SLOW, SLOW_PROBLEMS = "DPS", 3  # a thousand steps by default: last, and on fewer problems


@lru_cache(maxsize=12)
def judged(cell: Cell, seed: int, draws: int) -> tuple[ExactProblem, Judge]:
    """A problem with its reference sets."""
    problem = cell.problem(seed)
    return problem, Judge(problem, draws)


class Runner:
    """Runs what the file does not have yet.

    Args:
        records: results so far.
        draws: per run; settings are chosen on `tuning_draws`.
        until: time.time() after which nothing new starts.
    """

    def __init__(
        self, records: Records, draws: int = DRAWS, tuning_draws: int = TUNING_DRAWS, until: float = math.inf
    ) -> None:
        self.records, self.draws, self.tuning_draws, self.until = records, draws, tuning_draws, until

    def one(self, phase: str, cell: Cell, method: Method | Ours, setting: str, seed: int) -> None:
        """One run on one problem, unless it is on file."""
        draws = self.draws if phase == "score" else self.tuning_draws
        key = Key(phase, cell.name, method.package, method.name, setting, seed, draws)
        if key in self.records.scores or time.time() > self.until:
            return
        problem, judge = judged(cell, seed, draws)
        try:
            self.records.add(key, method.run(problem, judge, setting, draws, seed))
        except (RuntimeError, ValueError, ArithmeticError) as error:
            failed = Score(math.inf, math.inf, math.inf, math.inf, math.nan, math.nan, math.nan)
            self.records.add(key, failed, f"{type(error).__name__}: {error}")
        score = self.records.scores[key]
        print(
            f"{phase} {cell.name}, problem {seed}: {method.package} {method.name} ({setting}) "
            f"{score.ratio:.2f}, {score.seconds:.1f} s",
            flush=True,
        )

    def ours(self, cell: Cell, methods: Sequence[Ours], *, first: bool) -> None:
        """Our backends: those with goals on all problems, or the others on those of the peers."""
        chosen = [m for m in methods if (m.name in FIRST) == first and cell.dim <= m.widest]
        for seed in range(cell.problems if first else cell.best):
            for method in chosen:
                if first or seed < _at_most(cell.best, method):
                    self.one("score", cell, method, method.default, seed)

    def tune(self, cell: Cell, peers: Sequence[Method]) -> None:
        """Every setting of every peer on the problems set apart."""
        for seed in cell.tuning_seeds(close=True):
            for method in peers:
                if seed not in cell.tuning_seeds(close=method.close):
                    continue
                for setting in method.settings:
                    self.one("tune", cell, method, setting, seed)

    def best(self, cell: Cell, method: Method) -> str | None:
        """Label of the setting with the least mean distance on the tuning problems; None until they were tried."""
        found = {
            setting: self.records.by_seed(
                "tune", cell.name, method.package, method.name, setting, self.tuning_draws
            )
            for setting in method.settings
        }  # fmt: skip
        found = {setting: scores for setting, scores in found.items() if len(scores) >= max(cell.tuning, 1)}
        if method.default not in found:
            return None
        common = set.intersection(*(set(scores) for scores in found.values()))
        return min(found, key=lambda setting: statistics.fmean(found[setting][seed].ratio for seed in common))

    def peers(self, cell: Cell, peers: Sequence[Method]) -> None:
        """Peers at their best, then at their defaults, problem by problem so that a stop leaves all with the same."""
        if cell.taken:
            by_name = {f"{m.package} {m.name}": m for m in peers}
            for seed in range(cell.best):
                for name, taken in cell.taken:
                    if name in by_name:
                        self.one("score", cell, by_name[name], taken, seed)
            return
        for seed in range(cell.best):
            for method in peers:
                setting = self.best(cell, method)
                if setting is not None:
                    self.one("score", cell, method, setting, seed)
        for method in sorted(peers, key=lambda m: m.name == SLOW):
            for seed in range(_at_most(cell.best if method.close else cell.defaults, method)):
                self.one("score", cell, method, method.default, seed)


def _at_most(problems: int, method: Method | Ours) -> int:
    return min(problems, SLOW_PROBLEMS) if method.name == SLOW else problems
