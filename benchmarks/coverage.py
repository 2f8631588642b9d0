"""Coverage of a learned prior: how often 90 % intervals of twisted SMC hold the truth, on 8x8 digits.

`python -m benchmarks.coverage` solves 200 problems whose truth is drawn from the prior itself, with the sampler's own
solver and number of steps, so that an exact sampler must cover; then the same with held-out images, where the prior's
own error shows as well. Results are appended one problem at a time: a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import inverse
import models
import ppl
from benchmarks import results
from inverse.operators import Mask
from ppl.diagnostics import central_coverage, ranks
from sde import DiffusionPrior
from sde.solvers import DPMSolver2MSDE

STEPS, PARTICLES, RUNS, DRAWS = 25, 256, 2, 256
SEEN, SIGMA, PROJECTIONS = 8, 0.7, 20


def backend() -> inverse.TwistedSMC:
    """Particles led by PiGDM in the solver that the truth was drawn with."""
    guide = inverse.PiGDMGuide()
    return inverse.TwistedSMC(
        steps=STEPS, particles=PARTICLES, runs=RUNS, guide=guide, solver=DPMSolver2MSDE(), chunk=128
    )


def prior() -> DiffusionPrior:
    """Digits, discretised as the sampler discretises them."""
    return models.load("digits8x8", steps=STEPS, solver=DPMSolver2MSDE())


def solve(index: int, source: str, prior: DiffusionPrior, held_out: Tensor | None = None) -> dict[str, Any]:
    """One problem: 8 random pixels under noise 0.7; ranks of random projections of the 56 hidden ones.

    Args:
        index: of the problem; seeds its truth, mask, noise and directions.
        source: "prior" or "held-out".
        prior: to draw from and to infer with.
        held_out: images, for "held-out".
    """
    generator = torch.Generator().manual_seed(index)
    truth = prior.draw((1,), generator)[0] if held_out is None else held_out[index].to(prior.dtype)
    seen = torch.zeros(truth.numel(), dtype=torch.bool)
    seen[torch.randperm(len(seen), generator=generator)[:SEEN]] = True
    mask = Mask(seen.reshape(truth.shape))
    y = mask(truth)
    y = y + SIGMA * torch.randn(y.shape, generator=generator)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(mask(x), SIGMA).to_event(1), obs=y)

    start = time.perf_counter()
    # Another seed than the truth's: equal ones would start a particle at the very noise that made the truth.
    posterior = ppl.infer(ppl.Program(model, y), backend(), draws=DRAWS, seed=1_000_000 + index)
    seconds = time.perf_counter() - start
    hidden = ~seen
    directions = torch.randn(int(hidden.sum()), PROJECTIONS, generator=generator, dtype=torch.float64)
    x = posterior.flatten("x").reshape(DRAWS, -1)[:, hidden].double() @ directions
    t = truth.reshape(-1)[hidden].double() @ directions
    return {
        "index": index,
        "source": source,
        "settings": settings(),
        "ranks": ranks(x, t, generator=generator).tolist(),
        "root_ess": float(posterior.info["root_ess"].sum()),
        "log_evidence": float(posterior.log_evidence.value) if posterior.log_evidence else math.nan,
        "seconds": seconds,
    }


def settings() -> str:
    """What a stored result must have been made with to count."""
    return f"{backend()!r} draws={DRAWS} seen={SEEN} sigma={SIGMA} projections={PROJECTIONS}"


def stored(path: Path) -> list[dict[str, Any]]:
    """Results made with the present settings."""
    return results.read(path, settings())


def run(path: Path, source: str, problems: int) -> Iterator[dict[str, Any]]:
    """Solve the problems that are not stored yet, and store each as it is done."""
    done = {row["index"] for row in stored(path) if row["source"] == source}
    discretised = prior()
    held_out = None if source == "prior" else models.digits().held_out
    if held_out is not None:
        problems = min(problems, len(held_out))
    for index in range(problems):
        if index in done:
            continue
        row = solve(index, source, discretised, held_out)
        results.append(path, row)
        yield row


def summary(rows: list[dict[str, Any]], level: float = 0.9) -> dict[str, float]:
    """Share inside the central interval over all problems and projections.

    Projections of one problem go together, so the standard error comes from the spread between problems.
    """
    found = torch.tensor([row["ranks"] for row in rows])
    coverage = central_coverage(found, DRAWS, (level,))
    k = round((1 - level) * (DRAWS + 1) / 2)
    each = ((found >= k) & (found <= DRAWS - k)).double().mean(1)
    root = torch.tensor([row["root_ess"] for row in rows])
    return {
        "problems": len(rows),
        "nominal": float(coverage.nominal),
        "observed": float(coverage.observed.mean()),
        "stderr": float(each.std() / math.sqrt(len(rows))) if len(rows) > 1 else math.nan,
        "root_ess_median": float(root.median()),
        "root_ess_least": float(root.min()),
        "seconds": sum(row["seconds"] for row in rows) / len(rows),
    }


def show(path: Path, source: str) -> None:
    """The lines of the table for one source of truths."""
    rows = [row for row in stored(path) if row["source"] == source]
    if not rows:
        return
    for level in (0.5, 0.8, 0.9, 0.95):
        s = summary(rows, level)
        print(
            f"truth from {source:8s}  {s['problems']:4.0f} problems   {100 * s['nominal']:5.1f} % interval holds "
            f"{100 * s['observed']:5.1f} ± {100 * s['stderr']:3.1f} %   root ESS median {s['root_ess_median']:.0f}, "
            f"least {s['root_ess_least']:.0f}   {s['seconds']:.1f} s per problem",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--sources", nargs="*", default=["prior", "held-out"], choices=["prior", "held-out"])
    parser.add_argument("--results", type=Path, default=Path("runs/coverage.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for source in options.sources:
        for row in run(options.results, source, options.problems):
            print(f"{source} {row['index']}: root ESS {row['root_ess']:.0f}, {row['seconds']:.1f} s", flush=True)
        show(options.results, source)


if __name__ == "__main__":
    main()
