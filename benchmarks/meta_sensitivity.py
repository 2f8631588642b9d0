"""How NIW-Meta's results depend on the iterations of SGLD, the steps at test time and the predictive draws.

    python -m benchmarks.meta_sensitivity --steps 300 --tests 128

Sinusoids of `benchmarks.meta`, 5 shots, a network 1-32-32-1. Training is short and alike for all rows: differences
between rows tell, not their level. A variance takes two iterates, so that 2 stands for 1 iteration of SGLD. Rows go to
runs/meta_sensitivity.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.meta import scores
from benchmarks.meta_learners import NOISE, seeded, tasks
from benchmarks.results import append
from models.meta import (
    SGLD,
    ClosedForm,
    Episodes,
    FittedMeta,
    Gaussian,
    GaussNewton,
    Hierarchy,
    NIWMeta,
    NormalInverseGamma,
    Variational,
    adapt,
    mlp,
)
from models.meta.adaptation import Adaptation
from models.meta.local import LocalFit

RESULTS = Path(__file__).parents[1] / "runs" / "meta_sensitivity.jsonl"
SHOTS, DRAWS = 5, 50


def fit(local: LocalFit, steps: int, **options: Any) -> FittedMeta:
    """A short fit with the options of `benchmarks.meta`."""
    network = mlp([1, 32, 32, 1])
    prior = NormalInverseGamma.around(network.start, 1.0, 10.0, 0.05)
    hierarchy = Hierarchy(network, Gaussian(NOISE["sinusoid"]), prior)
    return NIWMeta(local=local, steps=steps, batch=8, lr=5e-3, **options).fit(
        hierarchy, tasks("sinusoid", SHOTS, 20 - SHOTS)
    )


def show(what: str, value: int, seconds: float, new: Episodes, found: Any) -> None:
    """One row, printed and kept; seconds are of the processor."""
    row: dict[str, Any] = {"what": what, "value": value, "seconds": seconds} | scores(found, new)
    append(RESULTS, row)
    cells = " | ".join(f"{row[n][0]:.3f} ± {row[n][1]:.3f}" for n in ("squared error", "log-likelihood", "PIT error"))
    print(f"| {what} | {value} | {cells} | {seconds:.1f} |", flush=True)


def test(
    what: str, value: int, fitted: FittedMeta, new: Episodes, how: Adaptation, draws: int, linearised: bool
) -> None:
    """Adapt, predict and show."""
    begin = time.process_time()
    found = adapt(fitted, new, how).predict(new.query.x, draws, linearised=linearised)
    show(what, value, time.process_time() - begin, new, found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tests", type=int, default=128)
    parser.add_argument("--sgld-step", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    new = tasks("sinusoid", SHOTS, 40)(options.tests, seeded(2026))
    print("| varied | value | squared error | log-likelihood | PIT error | seconds |\n|---|---|---|---|---|---|")
    fitted = fit(GaussNewton(2), options.steps, expectation="quadratic")
    for steps in (0, 1, 3, 10, 30, 100):
        test("gradient steps at test time", steps, fitted, new, Variational(steps=steps), DRAWS, False)
    for steps in (1, 2, 5, 10):
        how = ClosedForm(GaussNewton(steps))
        test("Gauss-Newton steps at test time", steps, fitted, new, how, DRAWS, True)
    for draws in (1, 2, 5, 10, 50, 200):
        test("draws of the closed form", draws, fitted, new, ClosedForm(GaussNewton(5)), draws, True)
    for iterations in (2, 3, 5, 10, 50):
        begin = time.process_time()
        local = SGLD(iterations, step=options.sgld_step)
        trained = fit(local, options.steps)
        print(f"<!-- SGLD({iterations}): trained in {time.process_time() - begin:.1f} s -->", flush=True)
        test("SGLD, gradient steps at test time", iterations, trained, new, Variational(steps=30), DRAWS, False)
        test("SGLD, closed form at test time", iterations, trained, new, ClosedForm(), DRAWS, False)


if __name__ == "__main__":
    main()
