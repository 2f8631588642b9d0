"""What the covariance of a network is worth to particles: closure, moment matching and PiGDM at equal evaluations.

`python -m benchmarks.covariance` gives every method the same number of network evaluations per run: a row denoised
counts one, and a row differentiated (a vjp or a jvp) counts one. Particles are what the budget leaves at that number of
levels. Each problem is solved by all methods, in `RUNS` runs: root ESS per run, spread of the log evidence between
runs, the share of 20 random projections of the hidden pixels inside their 90 % interval, and CRPS per hidden pixel.
Results are stored one run at a time; a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import inverse
import models
import ppl
from benchmarks import results
from inverse.operators import Mask
from ppl.diagnostics import crps, ranks

BUDGET, RUNS, DRAWS, PROJECTIONS, TRUTH_STEPS = 16_000, 2, 128, 20, 50


@dataclass(frozen=True)
class Method:
    """A backend and what one particle costs it at one level, for m measurements."""

    name: str
    levels: int
    products: int
    """vjps per particle and level; those along the data are m more where `measured`."""
    measured: bool
    guide: Any

    def particles(self, m: int, budget: int) -> int:
        """Particles of one run."""
        return max(2, round(budget / self.levels / (1 + self.products + m * self.measured)))

    def backend(self, m: int, budget: int) -> inverse.TwistedSMC:
        """One run with this budget."""
        return inverse.TwistedSMC(
            steps=self.levels, particles=self.particles(m, budget), runs=1, chunk=128, guide=self.guide
        )


METHODS = (
    Method("moment matching, 25 levels", 25, 0, True, inverse.MomentMatchingGuide()),
    Method("moment matching, 12 levels", 12, 0, True, inverse.MomentMatchingGuide()),
    Method("closure, 25 levels", 25, 2, True, inverse.MomentClosure(2)),
    Method("closure, 12 levels", 12, 2, True, inverse.MomentClosure(2)),
    Method("closure, 8 levels", 8, 2, True, inverse.MomentClosure(2)),
    Method("PiGDM, 25 levels", 25, 1, False, inverse.PiGDMGuide()),
    Method("PiGDM, 12 levels", 12, 1, False, inverse.PiGDMGuide()),
)
TASKS = {
    "digits, 8 of 64 pixels, noise 0.7": ("digits8x8", 8, 0.7, BUDGET),
    "digits, 8 of 64 pixels, noise 0.2": ("digits8x8", 8, 0.2, BUDGET),
    "fashion, 4 of 784 pixels, noise 0.3": ("fashion28x28", 4, 0.3, 6_000),
}


def solve(task: str, index: int, wanted: list[tuple[Method, int]]) -> Iterator[dict[str, Any]]:
    """One problem by these methods and runs; its truth is drawn from the prior, in finer steps than theirs."""
    name, count, sigma, budget = TASKS[task]
    prior = models.load(name, steps=TRUTH_STEPS)
    generator = torch.Generator().manual_seed(index)
    truth = prior.draw((1,), generator)[0]
    seen = torch.zeros(truth.numel(), dtype=torch.bool)
    seen[torch.randperm(len(seen), generator=generator)[:count]] = True
    mask = Mask(seen.reshape(truth.shape))
    y = mask(truth)
    y = y + sigma * torch.randn(y.shape, generator=generator)

    def model(y: torch.Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(mask(x), sigma).to_event(1), obs=y)

    program = ppl.Program(model, y)
    directions = torch.randn(int((~seen).sum()), PROJECTIONS, generator=generator, dtype=torch.float64)
    hidden = truth.reshape(-1)[~seen].double()
    for method, run in wanted:
        start = time.process_time()
        backend = method.backend(count, budget)
        posterior = ppl.infer(program, backend, draws=DRAWS, seed=1_000_000 + 100 * index + run)
        x = posterior.flatten("x").reshape(DRAWS, -1)[:, ~seen].double()
        assert posterior.log_evidence is not None
        yield {
            "task": task,
            "index": index,
            "method": method.name,
            "settings": settings(),
            "run": run,
            "particles": method.particles(count, budget),
            "evaluations": posterior.cost.denoiser_evals + posterior.cost.vjps,
            "root_ess": float(posterior.info["root_ess"].sum()),
            "log_evidence": float(posterior.log_evidence.value),
            "ranks": ranks(x @ directions, hidden @ directions, generator=generator).tolist(),
            "crps": float(crps(x, hidden).mean()),
            "seconds": time.process_time() - start,
        }


def settings() -> str:
    """What a stored result must have been made with to count."""
    return f"budget={BUDGET} runs={RUNS} draws={DRAWS} projections={PROJECTIONS} truth_steps={TRUTH_STEPS}"


def show(path: Path) -> None:
    """One row per task and method: medians over problems, spread and coverage pooled."""
    rows = results.read(path, settings())
    for task in TASKS:
        found = [row for row in rows if row["task"] == task]
        if not found:
            continue
        problems = {row["index"] for row in found}
        print(f"\n{task}: {len(problems)} problems, {RUNS} runs each")
        print("| method | particles | evaluations | root ESS | sd log Z | in 90 % | CRPS | CPU s |")
        print("|---|---|---|---|---|---|---|---|")
        for method in METHODS:
            own = [row for row in found if row["method"] == method.name]
            if not own:
                continue
            evidence = [[r["log_evidence"] for r in own if r["index"] == i] for i in problems]
            variance = torch.tensor([float(torch.tensor(v).double().var()) for v in evidence if len(v) > 1])
            k = round(0.05 * (DRAWS + 1))
            rank = torch.tensor([row["ranks"] for row in own])
            inside = ((rank >= k) & (rank <= DRAWS - k)).double().mean(1)

            def median(key: str, own: list[dict[str, Any]] = own) -> float:
                return float(torch.tensor([float(row[key]) for row in own]).median())

            print(
                f"| {method.name} | {own[0]['particles']} | {median('evaluations'):.0f} | {median('root_ess'):.0f} | "
                f"{math.sqrt(float(variance.mean())):.2f} | {100 * float(inside.mean()):.0f} | {median('crps'):.3f} | "
                f"{median('seconds'):.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=[m.name for m in METHODS], choices=[m.name for m in METHODS])
    parser.add_argument("--results", type=Path, default=Path("runs/covariance.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["task"], row["index"], row["method"], row["run"]) for row in results.read(options.results, settings())}
    chosen = [method for method in METHODS if method.name in options.methods]
    for index in range(options.problems):
        for task in options.tasks:
            wanted = [(m, run) for m in chosen for run in range(RUNS) if (task, index, m.name, run) not in done]
            for row in solve(task, index, wanted) if wanted else ():
                results.append(options.results, row)
            print(f"{task}, problem {index}", flush=True)
    show(options.results)


if __name__ == "__main__":
    main()
