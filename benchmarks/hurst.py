"""The Hurst index of exact fractional Gaussian noise: maximum likelihood, Whittle, and the posterior by SVI.

`python -m benchmarks.hurst`: 20 series of 1024 for each index by Davies and Harte, their scale unknown. SVI runs on a
program whose likelihood is the Markov approximation refitted to the grid; what the approximation does to the posterior
of H is read off densities on a grid of H, the scale integrated out, which no engine touches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ppl
from benchmarks.results import append, read
from sde import FractionalGaussianNoise, MarkovIncrements, hurst_mle, hurst_whittle, refitted_noise

ONE = torch.ones((), dtype=torch.float64)
HURST = (0.2, 0.5, 0.7, 0.9)
FIT = ppl.SVI(guide=ppl.FullRank(), steps=120, particles=4, lr=0.05)
COLUMNS = ("mle", "whittle", "exact", "sd", "markov", "markov_sd", "svi", "svi_sd")
STORED = Path("runs/hurst.jsonl")


def law(hurst: Tensor, n: int, scale: Tensor | float = 1.0) -> MarkovIncrements:
    """The Markov approximation of n increments, refitted to their grid."""
    return MarkovIncrements(refitted_noise(hurst, 1.0, n, kind="I"), n, scale=scale)


def program(x: Tensor) -> ppl.Program:
    """H and scale of a record under the Markov approximation."""

    def model(x: Tensor) -> None:
        h = pyro.sample("h", dist.Beta(ONE, ONE))
        scale = pyro.sample("scale", dist.LogNormal(0 * ONE, 1.0))
        pyro.sample("y", law(h, x.shape[-1], scale), obs=x)

    return ppl.Program(model, x, compile="never")


@torch.no_grad()
def on_grid(one: FractionalGaussianNoise | MarkovIncrements, grid: Tensor, x: Tensor) -> tuple[float, float]:
    """Posterior mean and sd of H for flat priors on H and log scale, which is integrated out in closed form."""
    at_zero = one.log_prob(torch.zeros_like(x))
    square = 2 * (at_zero - one.log_prob(x))
    p = (at_zero - 0.5 * x.shape[-1] * square.log()).softmax(0)
    mean = (p * grid).sum()
    return float(mean), float((p * (grid - mean) ** 2).sum().sqrt())


def rows(hurst: float, count: int, n: int) -> list[dict[str, float]]:
    """Every estimate of every series; series that are stored are not fitted again."""
    settings = f"{hurst} {n} {FIT}"
    done = read(STORED, settings)
    seeds = range(round(1000 * hurst), round(1000 * hurst) + count)
    x = torch.stack([FractionalGaussianNoise(hurst * ONE, n).draw((), torch.Generator().manual_seed(s)) for s in seeds])
    todo = x[len(done) :]
    if len(todo):
        mle, whittle, one = hurst_mle(todo).hurst, hurst_whittle(todo).hurst, program(x[0])
    for i, record in enumerate(todo):
        start = float(mle[i])
        grid = torch.linspace(max(start - 0.1, 0.011), min(start + 0.1, 0.989), 41, dtype=torch.float64)
        mean, sd = on_grid(FractionalGaussianNoise(grid, n), grid, record)
        markov, markov_sd = on_grid(law(grid, n), grid, record)
        posterior = ppl.infer(one.with_data(x=record), FIT, draws=400, seed=i, progress=False)
        found = {"mle": start, "whittle": float(whittle[i]), "exact": mean, "sd": sd, "markov": markov}
        found |= {"markov_sd": markov_sd, "svi": float(posterior.mean("h")), "svi_sd": float(posterior.sd("h"))}
        append(STORED, {"settings": settings, **found})
        done.append(found)
    return done[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=20)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--hurst", type=float, nargs="*", default=HURST)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("mle", "whittle", "exact", "svi")
    print("| H | " + " | ".join(f"RMSE {name}" for name in names), end=" | ")
    print("SVI over MLE | mean distance SVI to MLE | shift of the posterior in sd, mean (largest) | sd ratio |")
    print("|---" * 9 + "|")
    every: list[dict[str, Tensor]] = []
    for hurst in options.hurst:
        found = rows(hurst, options.series, options.n)
        table = {k: torch.tensor([row[k] for row in found], dtype=torch.float64) for k in COLUMNS}
        table |= {f"{k} error": table[k] - hurst for k in names}
        every.append(table)
        print(line(f"{hurst}", table, names), flush=True)
    print(line("all", {k: torch.cat([t[k] for t in every]) for k in every[0]}, names))


def line(label: str, table: dict[str, Tensor], names: tuple[str, ...]) -> str:
    """One row of the table."""
    rmse = {name: float(table[f"{name} error"].square().mean().sqrt()) for name in names}
    shift = (table["markov"] - table["exact"]) / table["sd"]
    cells = [f"{rmse[name]:.4f}" for name in names] + [
        f"{rmse['svi'] / rmse['mle']:.2f}",
        f"{float((table['svi'] - table['mle']).abs().mean()):.4f}",
        f"{float(shift.mean()):+.3f} ({float(shift.abs().max()):.3f})",
        f"{float((table['markov_sd'] / table['sd']).mean()):.3f}",
    ]
    return f"| {label} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
