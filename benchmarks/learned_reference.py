"""References on learned priors: two different exact backends run longer and longer until they agree.

`python -m benchmarks.learned_reference` takes the linear tasks of `benchmarks.learned` on the first digits. One side is
`TwistedSMC`, runs of many particles merged by evidence, its errors by jackknife over runs; the other `SplitGibbs` with
the corrected likelihood, its errors over independent chains. Both come back through the prior's own noise levels, but
from different ones: they have one target as steps grow and for a denoiser that is that of some density, which a network
is only nearly.

They agree where the squared difference of all pixels and 20 projections, in squared standard errors, is below the 99 %
point of what Monte Carlo error gives, for means and for standard deviations. Then every backend is scored against
either side: distance of its mean in units of the posterior's total sd, sqrt(1 / 32) = 0.18 for exact draws, and ratio
of total sds.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor

import inverse
import models
import ppl
from benchmarks import results
from benchmarks.learned import DRAWS, LINEAR, backends, directions_of, draw, problem

PARTICLES, RUNS = 256, 8
CHAINS, SWEEPS = 32, 150
AGREE = {True: "agree", False: "apart"}
SHARP = 0.25  # agreement says something where the error of the difference is below this share of the sd


@dataclass(frozen=True)
class Side:
    """Moments of (groups, features) from runs or chains, and weights of the groups that sum to one."""

    first: Tensor
    second: Tensor
    weight: Tensor

    def moments(self, weight: Tensor | None = None) -> Tensor:
        """(2, features): means, and logs of sds."""
        w = (self.weight if weight is None else weight / weight.sum()).double()
        mean = w @ self.first
        return torch.stack([mean, 0.5 * (w @ self.second - mean.square()).clamp(min=1e-12).log()])

    def replicates(self) -> Tensor:
        """(groups, 2, features) jackknife values, scaled so that their second moments are those of the error."""
        groups = len(self.weight)
        left = torch.stack([self.moments(self.weight * (torch.arange(groups) != k)) for k in range(groups)])
        return (left - left.mean(0)) * math.sqrt((groups - 1) / groups)

    @property
    def ess(self) -> float:
        """How many groups of equal weight they are worth."""
        return float(1 / self.weight.square().sum())


def features(x: Tensor, directions: Tensor) -> Tensor:
    """(draws, pixels + projections) of draws."""
    flat = x.reshape(len(x), -1).double()
    return torch.cat([flat, flat @ directions / math.sqrt(len(directions))], 1)


def by_particles(program: ppl.Program, directions: Tensor, seeds: range) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of every run, and its log evidence."""
    first, second, log_evidence = [], [], []
    for seed in seeds:
        backend = inverse.TwistedSMC(steps=50, particles=PARTICLES, runs=1)
        posterior = ppl.infer(program, backend, draws=PARTICLES, chains=1, seed=seed)
        f = features(posterior.flatten("x"), directions)
        first.append(f.mean(0))
        second.append(f.square().mean(0))
        log_evidence.append(posterior.info["run_log_evidence"].double().reshape(()))
    return torch.stack(first), torch.stack(second), torch.stack(log_evidence)


def by_sweeps(program: ppl.Program, directions: Tensor, sweeps: int) -> Side:
    """Moments of every chain."""
    backend = inverse.SplitGibbs(steps=5, warmup=60, decay=0.9)
    x = ppl.infer(program, backend, draws=sweeps, chains=CHAINS, seed=77)["x"]
    f = torch.stack([features(chain, directions) for chain in x])
    return Side(f.mean(1), f.square().mean(1), torch.full((CHAINS,), 1 / CHAINS, dtype=torch.float64))


def compared(a: Side, b: Side) -> dict[str, Any]:
    """How far two sides are apart, for means and for logs of sds."""
    gap = a.moments() - b.moments()
    noise = torch.cat([a.replicates(), b.replicates()])
    sd = b.moments()[1].exp()
    row: dict[str, Any] = {}
    for k, name in enumerate(("mean", "sd")):
        error = noise[:, k].square().sum(0).sqrt()
        scaled = noise[:, k] / error
        correlation = scaled.mT @ scaled
        freedom = len(correlation) ** 2 / float(correlation.square().sum())
        unit = sd if name == "mean" else torch.ones_like(sd)
        row |= {
            f"{name}_z2": float((gap[k] / error).square().mean()),
            f"{name}_bound": float(chi2.ppf(0.99, freedom)) / freedom,
            f"{name}_gap": float((gap[k] / unit).square().mean().sqrt()),
            f"{name}_error": float((error / unit).square().mean().sqrt()),
            f"{name}_errors": [
                float((side.replicates()[:, k].square().sum(0).sqrt() / unit).square().mean().sqrt()) for side in (a, b)
            ],
        }
    row["agree"] = all(row[f"{n}_z2"] < row[f"{n}_bound"] and row[f"{n}_error"] < SHARP for n in ("mean", "sd"))
    return row


def reference(program: ppl.Program, directions: Tensor, rounds: int) -> tuple[dict[str, Any], Tensor]:
    """Both sides, doubled until they agree; (side, 2, pixels) means and sds."""
    start = time.process_time()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    row: dict[str, Any] = {}
    for k in range(rounds):
        done = sum(len(f[0]) for f in found)
        found.append(by_particles(program, directions, range(1000 + done, 1000 + RUNS * 2**k)))
        first, second, log_evidence = (torch.cat(parts) for parts in zip(*found, strict=True))
        a = Side(first, second, log_evidence.softmax(0))
        b = by_sweeps(program, directions, SWEEPS * 2**k)
        row = compared(a, b) | {"runs": len(a.weight), "runs_worth": a.ess, "sweeps": SWEEPS * 2**k}
        print({n: round(v, 3) if isinstance(v, float) else v for n, v in row.items()}, flush=True)
        if row["agree"]:
            break
    both = torch.stack([side.moments()[:, : len(directions)] for side in (a, b)])
    return row | {"cpu": time.process_time() - start}, torch.stack([both[:, 0], both[:, 1].exp()], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=list(LINEAR), choices=LINEAR)
    parser.add_argument("--results", type=Path, default=Path("runs/learned_reference.jsonl"))
    parser.add_argument("--show", action="store_true", help="print what is stored, run nothing")
    parser.add_argument("--costly", action="store_true", help="score MomentMatching too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prior = models.load("digits8x8")
    for index in range(0 if options.show else options.problems):
        for name in options.tasks:
            rows = [r for r in results.read(options.results) if (r["task"], r["index"]) == (name, index)]
            truth, program, generator = problem(prior, name, index)
            directions = directions_of(truth, generator)
            known = [r for r in rows if r["backend"] == "reference"]
            if not known:
                print(name, index, flush=True)
                row, moments = reference(program, directions, options.rounds)
                known = [row | {"task": name, "index": index, "backend": "reference", "moments": moments.tolist()}]
                results.append(options.results, known[0])
            sides = torch.tensor(known[0]["moments"], dtype=torch.float64)
            for label, backend in backends(name).items():
                if (label == "MomentMatching" and not options.costly) or label in {r["backend"] for r in rows}:
                    continue
                x = draw(program, backend, index).flatten("x").reshape(DRAWS, -1).double()
                row = {
                    "mean_error": [float((x.mean(0) - mean).norm() / sd.norm()) for mean, sd in sides],
                    "sd_ratio": [float(x.std(0).norm() / sd.norm()) for _, sd in sides],
                }
                results.append(options.results, row | {"task": name, "index": index, "backend": label})
    show(results.read(options.results))


def show(rows: list[dict[str, Any]]) -> None:
    """Agreement of the two sides, and the score of every backend."""
    print("\n| task | problem | mean: z^2 / bound, gap, s.e. | sd: z^2 / bound, gap, s.e. | runs (worth), sweeps | |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        if r["backend"] == "reference":
            parts = [
                f"{r[f'{n}_z2']:.2f} / {r[f'{n}_bound']:.2f}, {r[f'{n}_gap']:.2f}, {r[f'{n}_error']:.2f}"
                for n in ("mean", "sd")
            ]
            lengths = f"{r['runs']} ({r['runs_worth']:.1f}), {r['sweeps']}"
            print(f"| {r['task']} | {r['index']} | {parts[0]} | {parts[1]} | {lengths} | {AGREE[r['agree']]} |")
    for k, side in enumerate(("particles", "sweeps")):
        print(f"\nagainst {side}\n\n| backend | {' | '.join(LINEAR)} |\n|---|{'---|' * len(LINEAR)}")
        for label in dict.fromkeys(r["backend"] for r in rows if r["backend"] != "reference"):
            cells = []
            for name in LINEAR:
                mine = [r for r in rows if (r["task"], r["backend"]) == (name, label)]
                if not mine:
                    cells.append("-")
                    continue
                error = sum(r["mean_error"][k] for r in mine) / len(mine)
                ratio = math.exp(sum(math.log(r["sd_ratio"][k]) for r in mine) / len(mine))
                cells.append(f"{error:.2f}, {ratio:.2f} ({len(mine)})")
            print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
