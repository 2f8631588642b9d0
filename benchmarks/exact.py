"""Samplers against exact posteriors: the table behind the word "exact".

`make bench-exact` prints it. Gaussian problem: 16 dimensions, 6 observations, two noise levels. Mixture: 25 components,
d = 8, observations 1, 2, 4, ten operators and two seeds per cell, distances over the floor averaged over six exact
reference sets. Cells are judged by their mean, never by one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import inverse
import ppl
from inverse.metrics import mode_weight_tv
from models.references import ExactProblem, gaussian_problem, mixture_problem
from ppl.diagnostics import sliced_over_floor
from ppl.diagnostics.ess import ess_of


@dataclass
class Row:
    """One backend on one Gaussian problem."""

    name: str
    sigma: float
    mean_z: float
    low: float
    high: float
    stderr: float
    evals: float
    seconds: float


def gaussian_row(name: str, backend: ppl.Backend, sigma: float, draws: int, chains: int) -> Row:
    """Largest z of the mean and range of variance ratios over coordinates."""
    problem = gaussian_problem(sigma)
    start = time.perf_counter()
    posterior = ppl.infer(problem.program, backend, draws=draws, chains=chains, seed=0)
    seconds = time.perf_counter() - start
    x = posterior["x"]
    mean, variance = problem.posterior.mean, problem.posterior.covariance_matrix.diagonal()
    total = x.shape[0] * x.shape[1]
    root = float(posterior.info["root_ess"].sum()) if "root_ess" in posterior.info else None
    independent = posterior.attrs["exact"] != "in_the_limit" or root is not None
    size = torch.full_like(mean, min(total, root or total)) if independent else ess_of(x)
    flat = x.reshape(-1, x.shape[-1])
    z = (flat.mean(0) - mean) / (variance / size).sqrt()
    squares = (x - mean).square()
    spread = size if independent else ess_of(squares)
    ratio = squares.reshape(flat.shape).mean(0) / variance
    evals = posterior.cost.denoiser_evals / total
    return Row(
        name, sigma, float(z.abs().max()), float(ratio.min()), float(ratio.max()), float((2 / spread).sqrt().max()),
        evals, seconds,
    )  # fmt: skip


def gaussian_table(names: dict[str, tuple[Callable[[], ppl.Backend], int, int]]) -> list[Row]:
    """Every backend at both noise levels."""
    rows = []
    for name, (make, draws, chains) in names.items():
        for sigma in (0.05, 0.01):
            rows.append(gaussian_row(name, make(), sigma, draws, chains))
            r = rows[-1]
            print(
                f"{r.name:34s} sigma {r.sigma:<5g} mean |z| max {r.mean_z:8.2f}   "
                f"variance ratio {r.low:6.3f} .. {r.high:<8.3f} (s.e. {r.stderr:.3f})   "
                f"{r.evals:7.1f} evals/draw  {r.seconds:6.1f} s",
                flush=True,
            )
    return rows


@dataclass
class Cell:
    """Results of one backend in one cell of the mixture problem."""

    ratio: Tensor
    tv: Tensor
    floor_tv: Tensor
    error: Tensor
    z: Tensor
    root: Tensor
    evals: Tensor


def mixture_cell(
    backend: ppl.Backend, dim: int, observations: int, *, operators: int, seeds: int, draws: int, references: int = 6
) -> Cell:
    """Sliced Wasserstein over the floor, mode weights and evidence over operators and seeds."""
    rows = []
    for operator in range(operators):
        problem = mixture_problem(dim, observations, seed=operator)
        for seed in range(seeds):
            posterior = ppl.infer(problem.program, backend, draws=draws, seed=seed)
            rows.append(_judge(problem, posterior, seed, draws, references))
    columns = torch.tensor(rows, dtype=torch.float64).T
    return Cell(*columns)


def _judge(problem: ExactProblem, posterior: ppl.Posterior, seed: int, draws: int, references: int) -> list[float]:
    """One run: ratio, mode TV, floor TV, error and z of log Z, root ESS, evaluations per draw."""
    generator = torch.Generator().manual_seed(1000 + seed)
    exact = problem.posterior

    def sample(n: int, generator: torch.Generator) -> Tensor:
        return exact.draw((n,), generator)

    x = posterior.flatten("x")
    ratio = sliced_over_floor(x, sample, generator=generator, references=references).ratio
    means, covariances, weights = exact.means, exact.covariances, exact.weights
    tv = float(mode_weight_tv(x, weights, means, covariances))
    floor_tv = float(mode_weight_tv(sample(draws, generator), weights, means, covariances))
    error, z, root = float("nan"), float("nan"), float("nan")
    if posterior.log_evidence is not None:
        error = float(posterior.log_evidence.value - problem.log_evidence)
        stderr = float(posterior.log_evidence.stderr)
        z = error / stderr if stderr > 0 else 0.0
    if "root_ess" in posterior.info:
        root = float(posterior.info["root_ess"].sum())
    return [ratio, tv, floor_tv, error, z, root, posterior.cost.denoiser_evals / draws]


def show(name: str, dim: int, observations: int, cell: Cell) -> None:
    """One line of the table."""
    n = len(cell.ratio)
    print(
        f"{name:28s} d={dim:<4d} dy={observations}  "
        f"SW/floor {cell.ratio.mean():5.2f} ± {cell.ratio.std() / n**0.5:4.2f} "
        f"(worst {cell.ratio.max():5.2f})   mode TV {cell.tv.mean():.3f} (floor {cell.floor_tv.mean():.3f})   "
        f"log Z {cell.error.mean():+.3f} ± {cell.error.std():.3f}, z rms {cell.z.square().mean().sqrt():.2f} "
        f"(max {cell.z.abs().max():.1f})   root ESS {cell.root.mean():5.0f}   {cell.evals.mean():5.0f} evals/draw",
        flush=True,
    )


def gaussian_backends() -> dict[str, tuple[Callable[[], ppl.Backend], int, int]]:
    """Name -> (backend, draws per chain, chains): those that claim to be exact first."""
    return {
        "Exact": (inverse.Exact, 10_000, 1),
        "TwistedSMC (10 levels)": (lambda: inverse.TwistedSMC(steps=10), 10_000, 1),
        "MomentMatching (3 levels)": (lambda: inverse.MomentMatching(steps=3), 10_000, 1),
        # The noise posterior is 30 and 150 times as long as wide, along turned axes.
        "NoiseSpace(NUTS, low rank)": (lambda: ppl.NoiseSpace(ppl.NUTS(warmup=500, low_rank=True)), 1500, 4),
        "NoiseSpace(HMC)": (lambda: ppl.NoiseSpace(ppl.HMC(warmup=300)), 100, 64),
        "NoiseSpace(EllipticalSlice)": (lambda: ppl.NoiseSpace(ppl.EllipticalSlice()), 100, 256),
        "NoiseSpace(SVI full rank)": (lambda: ppl.NoiseSpace(ppl.SVI(guide=ppl.FullRank())), 10_000, 1),
        "PiGDM (100 levels)": (inverse.PiGDM, 5000, 1),
        "DPS (1000 levels)": (inverse.DPS, 1000, 1),
        "REDDiff (learned variance)": (lambda: inverse.REDDiff(scale="likelihood"), 1000, 1),
        "REDDiff (as published)": (inverse.REDDiff, 1000, 1),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operators", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--dims", type=int, nargs="*", default=[8])
    parser.add_argument("--skip-gaussian", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.skip_gaussian:
        print("Gaussian problem, d = 16, 6 observations")
        gaussian_table(gaussian_backends())
    print("\n25-component mixture")
    backends: dict[str, ppl.Backend] = {
        "TwistedSMC, one run": inverse.TwistedSMC(steps=50, runs=1),
        "TwistedSMC, merged": inverse.TwistedSMC(steps=50),
        "Exact": inverse.Exact(),
    }
    for dim in options.dims:
        for name, backend in backends.items():
            for observations in (1, 2, 4):
                cell = mixture_cell(
                    backend, dim, observations, operators=options.operators, seeds=options.seeds, draws=options.draws
                )
                show(name, dim, observations, cell)


if __name__ == "__main__":
    main()
