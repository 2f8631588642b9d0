"""References on learned priors: two exact backends with one target, run longer and longer until they agree.

`python -m benchmarks.learned_reference` takes the linear tasks of `benchmarks.learned` on the first digits. A network
is only nearly the denoiser of some density, so that what is exact depends on how one comes back through it. The target
here is the chain of 50 levels of `DPMSolver2MSDE`, weighed by the likelihood of its end. Two particle methods have it
at any number of levels, as particles grow: `TwistedSMC`, led by gradients through the network, and `DDSMC`, which asks
for none. Runs are merged by evidence, errors are by jackknife over runs.

The two agree where the squared difference of all pixels and 20 projections, in squared standard errors, is below the
99 % point of what Monte Carlo error gives, for means and for standard deviations, and the error of the difference is
below a quarter of an sd. The reference is then the mean of both. Every backend is scored against it: distance of its
mean in units of the posterior's total sd, sqrt(1 / 32) = 0.18 for exact draws, and ratio of total sds. `--laws`
compares it with other ways back through the same network.

Every run is stored when it is done, and a benchmark that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
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

STEPS, RUNS, CHUNK = 50, 8, 128
AGREE = {True: "agree", False: "apart"}
SHARP = 0.25  # agreement says something where the error of the difference is below this share of the sd
PAIR = ("TwistedSMC", "DDSMC")


@dataclass(frozen=True)
class Engine:
    """How one run is made.

    Args:
        backend: with its options.
        draws: per chain.
        chains: every chain is a group of its own where there are several.
    """

    backend: Any
    draws: int
    chains: int = 1


def particles(kind: Callable[..., Any], count: int, **options: Any) -> Engine:
    """One run of so many particles, of which all are looked at."""
    return Engine(kind(**{"steps": STEPS, "particles": count, "runs": 1, "chunk": CHUNK} | options), count)


def engines() -> dict[str, Engine]:
    """The pair with one target, and others that come back through the same network by another way."""
    return {
        "TwistedSMC": particles(inverse.TwistedSMC, 512),
        "DDSMC": particles(inverse.DDSMC, 2048),
        "DDSMC, 200 levels": particles(inverse.DDSMC, 512, steps=200),
        "DDSMC, flow": particles(inverse.DDSMC, 512, steps=20, reconstruction="flow"),
        "SplitGibbs": Engine(inverse.SplitGibbs(steps=5, warmup=60, decay=0.9), 150, 32),
        "SplitGibbs, 20 levels": Engine(inverse.SplitGibbs(steps=20, warmup=60, decay=0.9), 50, 32),
    }


@dataclass(frozen=True)
class Side:
    """Moments of (groups, features) from runs or chains, and weights of the groups that sum to one."""

    first: Tensor
    second: Tensor
    weight: Tensor

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> Side:
        """From stored runs; chains of one run have equal weight."""
        first, second = (
            torch.cat([torch.tensor(r[n], dtype=torch.float64) for r in rows]) for n in ("first", "second")
        )
        evidence = [torch.full((len(r["first"]),), r["log_evidence"], dtype=torch.float64) for r in rows]
        return cls(first, second, torch.cat(evidence).softmax(0))

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


def one_run(program: ppl.Program, engine: Engine, directions: Tensor, seed: int) -> dict[str, Any]:
    """Moments of a run, or of its chains, and its log evidence where it has one."""
    start = time.process_time()
    posterior = ppl.infer(program, engine.backend, draws=engine.draws, chains=engine.chains, seed=seed)
    f = torch.stack([features(chain, directions) for chain in posterior["x"]])
    return {
        "first": f.mean(1).tolist(),
        "second": f.square().mean(1).tolist(),
        "log_evidence": 0.0 if posterior.log_evidence is None else float(posterior.log_evidence.value),
        "root_ess": float(posterior.info["root_ess"].sum()) if "root_ess" in posterior.info else math.nan,
        "cpu": time.process_time() - start,
    }


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
        }
    row["agree"] = all(row[f"{n}_z2"] < row[f"{n}_bound"] and row[f"{n}_error"] < SHARP for n in ("mean", "sd"))
    return row


@dataclass(frozen=True)
class Case:
    """One task on one digit, with what is stored of it."""

    name: str
    index: int
    path: Path
    known: list[dict[str, Any]] | None = None  # what is stored, if nothing will be added; None reads it every time

    def rows(self, label: str) -> list[dict[str, Any]]:
        """Stored rows of a backend, oldest first."""
        stored = results.read(self.path) if self.known is None else self.known
        return [r for r in stored if (r["task"], r["index"], r["backend"]) == (self.name, self.index, label)]

    def extend(self, label: str, runs: int) -> None:
        """Make the runs that are missing."""
        truth, program, generator = problem(models.load("digits8x8"), self.name, self.index)
        directions = directions_of(truth, generator)
        for seed in range(1000 + len(self.rows(label)), 1000 + runs):
            row = one_run(program, engines()[label], directions, seed)
            results.append(self.path, row | {"task": self.name, "index": self.index, "backend": label, "seed": seed})
            said = f"log Z {row['log_evidence']:.2f}, root ESS {row['root_ess']:.1f}, {row['cpu']:.0f} s"
            print(f"{self.index} {self.name} {label} {seed}: {said}", flush=True)

    def agreement(self) -> dict[str, Any]:
        """Of the pair."""
        return compared(*(Side.of(self.rows(label)) for label in PAIR))

    def reference(self) -> Tensor:
        """(2, features) means and sds, halfway between both."""
        mean, log_sd = torch.stack([Side.of(self.rows(label)).moments() for label in PAIR]).mean(0)
        return torch.stack([mean, log_sd.exp()])

    def score(self, label: str, backend: Any) -> None:
        """Moments of one backend's draws, unless they are stored."""
        if self.rows(f"score {label}"):
            return
        truth, program, _ = problem(models.load("digits8x8"), self.name, self.index)
        x = draw(program, backend, self.index).flatten("x").reshape(DRAWS, truth.numel()).double()
        row = {"mean": x.mean(0).tolist(), "sd": x.std(0).tolist()}
        results.append(
            self.path,
            row | {"task": self.name, "index": self.index, "backend": f"score {label}", "settings": repr(backend)},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="8 runs of each side, doubled until they agree")
    parser.add_argument("--tasks", nargs="*", default=list(LINEAR), choices=LINEAR)
    parser.add_argument("--laws", nargs="*", default=[], help="other ways back, RUNS runs of each (one of chains)")
    parser.add_argument("--results", type=Path, default=Path("runs/learned_reference.jsonl"))
    parser.add_argument("--show", action="store_true", help="print what is stored, run nothing")
    parser.add_argument("--costly", action="store_true", help="score MomentMatching too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for index in range(0 if options.show else options.problems):
        for name in options.tasks:
            case = Case(name, index, options.results)
            for k in range(options.rounds):
                for label in PAIR:
                    case.extend(label, RUNS * 2**k)
                row = case.agreement()
                print({n: round(v, 3) if isinstance(v, float) else v for n, v in row.items()}, flush=True)
                if row["agree"]:
                    break
            for label in options.laws:
                case.extend(label, 1 if engines()[label].chains > 1 else RUNS)
            for label, backend in backends(name).items():
                if label != "MomentMatching" or options.costly:
                    case.score(label, backend)
    show(options.results)


def show(path: Path) -> None:
    """Agreement of the pair, distance of other laws from it, and the score of every backend."""
    rows = results.read(path)
    known = {(r["task"], r["index"]) for r in rows if r["backend"] == PAIR[1]}
    cases = [
        Case(name, index, path, rows)
        for index in sorted({i for _, i in known})
        for name in LINEAR
        if (name, index) in known
    ]
    print("\n| task | digit | means: z^2 / bound, gap, s.e. | sds: z^2 / bound, gap, s.e. | runs, worth | root ESS | |")
    print("|---|---|---|---|---|---|---|")
    agreed: list[Case] = []
    for case in cases:
        sides = [case.rows(label) for label in PAIR]
        worth = " and ".join(f"{len(s)}, {Side.of(s).ess:.1f}" for s in sides)
        roots = " and ".join(f"{sum(r['root_ess'] for r in s) / len(s):.1f}" for s in sides)
        row = case.agreement()
        agreed += [case] if row["agree"] else []
        print(f"| {case.name} | {case.index} | {_gaps(row)} | {worth} | {roots} | {AGREE[row['agree']]} |")
    print("\nother ways back through the network, against DDSMC with 50 levels\n")
    for case in cases:
        for label in engines():
            if label not in PAIR and sum(len(r["first"]) for r in case.rows(label)) > 1:
                row = compared(Side.of(case.rows(label)), Side.of(case.rows(PAIR[1])))
                print(f"| {case.name} | {case.index} | {label} | {_gaps(row)} |")
    print(f"\n| backend | {' | '.join(LINEAR)} |\n|---|{'---|' * len(LINEAR)}")
    labels = dict.fromkeys(r["backend"] for r in rows if r["backend"].startswith("score "))
    for label in labels:
        cells = []
        for name in LINEAR:
            found = [_score(case, label) for case in agreed if case.name == name and case.rows(label)]
            error, ratio = (sum(part) / len(found) for part in zip(*found, strict=True)) if found else (math.nan,) * 2
            cells.append(f"{error:.2f}, {math.exp(ratio):.2f}" if found else "-")
        print(f"| {label.removeprefix('score ')} | {' | '.join(cells)} |")


def _gaps(row: dict[str, Any]) -> str:
    return " | ".join(
        f"{row[f'{n}_z2']:.1f} / {row[f'{n}_bound']:.1f}, {row[f'{n}_gap']:.2f}, {row[f'{n}_error']:.2f}"
        for n in ("mean", "sd")
    )


def _score(case: Case, label: str) -> tuple[float, float]:
    """Distance of the mean in total sds, and log of the ratio of total sds."""
    row = case.rows(label)[-1]
    found = torch.tensor([row["mean"], row["sd"]], dtype=torch.float64)
    mean, sd = case.reference()[:, : found.shape[1]]  # pixels come first
    return float((found[0] - mean).norm() / sd.norm()), float((found[1].norm() / sd.norm()).log())


if __name__ == "__main__":
    main()
