"""Backends on learned priors: six tasks on held-out digits and Fashion-MNIST images, one row per backend.

`python -m benchmarks.learned` prints, per task and backend: PSNR of the posterior mean and of single draws, the share
of 20 random projections inside their central interval, CRPS per pixel, the kernel Stein discrepancy against the
posterior score at noise 0.1 (`ksd_test`'s statistic: zero for exact draws, first problems of the digits only),
evaluations, vjps and processor time per draw. Results are stored one problem at a time; a run that was killed goes on
where it stopped, and `--part 0/2` and `--part 1/2` side by side share the problems.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
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
from inverse.metrics import image_scores
from inverse.operators import Downsample, FourierMask, GaussianBlur, Mask, PhaseRetrieval
from ppl.diagnostics import central_coverage, crps, ksd_test, ranks
from sde import DiffusionPrior

DRAWS, PROJECTIONS, SCORE_LEVEL = 32, 20, 0.1

Model = Callable[[Tensor], None]


def _gaussian(prior: DiffusionPrior, operator: Any, sigma: float) -> tuple[Callable[..., Tensor], Model]:
    """y = A x + sigma n."""

    def observe(truth: Tensor, generator: torch.Generator) -> Tensor:
        mean = operator(truth)
        return mean + sigma * torch.randn(mean.shape, generator=generator)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), sigma).to_event(len(operator.out_shape)), obs=y)

    return observe, model


def _poisson(prior: DiffusionPrior, peak: float) -> tuple[Callable[..., Tensor], Model]:
    """Photon counts of rate peak (x + 1) / 2, and two in the dark; the rate bends smoothly where x < -1."""

    def rate(x: Tensor) -> Tensor:
        return peak * torch.nn.functional.softplus(10 * (x + 1)) / 20 + 2

    def observe(truth: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(rate(truth), generator=generator)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(rate(x)).to_event(x.ndim), obs=y)

    return observe, model


def task(name: str, prior: DiffusionPrior, generator: torch.Generator) -> tuple[Callable[..., Tensor], Model]:
    """How data of a task are made, and its program; masks are drawn anew for every problem."""
    shape = tuple(prior.event_shape)
    side = shape[-1]
    if name == "inpainting":
        return _gaussian(prior, Mask(torch.rand(shape, generator=generator) < 0.3), 0.2)
    if name == "deblurring":
        return _gaussian(prior, GaussianBlur(side / 8, shape), 0.1)
    if name == "super-resolution x4":
        return _gaussian(prior, Downsample(4, shape), 0.1)
    if name == "Fourier sampling":
        return _gaussian(prior, FourierMask(torch.rand(shape[-2:], generator=generator) < 0.25, shape), 0.2)
    if name == "phase retrieval":
        return _gaussian(prior, PhaseRetrieval(shape), 0.1)
    if name == "Poisson":
        return _poisson(prior, 20.0)
    raise ValueError(f"there is no task {name!r}; choose from {TASKS}")


LINEAR = ("inpainting", "deblurring", "super-resolution x4", "Fourier sampling")
TASKS = (*LINEAR, "phase retrieval", "Poisson")
COSTLY = ("MomentMatching",)  # a vjp for every direction at every level: a few problems are enough to see the row
COSTLY_PROBLEMS, STEIN_PROBLEMS = 6, 10


def backends(name: str) -> dict[str, Any]:
    """What is compared; 50 noise levels where a method has no reason for more, and warmups that reach the last one."""
    if name in LINEAR:
        return {
            "TwistedSMC": inverse.TwistedSMC(steps=50, particles=64, runs=1),
            "MomentMatching": inverse.MomentMatching(steps=50),
            "PiGDM": inverse.PiGDM(steps=50),
            "DPS": inverse.DPS(steps=100),
            "DDRM": inverse.DDRM(steps=50),
            "DDNM+": inverse.DDNM(steps=50),
            "DDNM+, code": inverse.DDNM(steps=50, form="code"),
            "DiffPIR": inverse.DiffPIR(steps=50),
            "DAPS": inverse.DAPS(steps=20),
            "SplitGibbs": inverse.SplitGibbs(warmup=25, decay=0.8, steps=5),
            "RED-diff": inverse.REDDiff(steps=100),
        }
    return {
        "TwistedSMC, LGD": inverse.TwistedSMC(steps=50, particles=64, runs=1, guide=inverse.LGDGuide()),
        "DPS": inverse.DPS(steps=100),
        "DPS, likelihood": inverse.DPS(steps=100, weight="likelihood"),
        "DAPS": inverse.DAPS(steps=20),
        "PnP-DM": inverse.PnPDM(warmup=25, decay=0.8, steps=5),
        "RED-diff": inverse.REDDiff(steps=100),
    }


def stein(posterior: ppl.Posterior, program: ppl.Program, generator: torch.Generator) -> float:
    """KSD of the draws, noised to `SCORE_LEVEL`, against the score of the posterior there.

    The score of the data at the noised draw comes from moment matching where the data are linear, and from the
    likelihood at the denoised point elsewhere: both are approximations, good at low noise.
    """
    problem = inverse.DiffusionProblem.of(program)
    guide: Any = inverse.DPSGuide(weight="likelihood")
    if problem.likelihood.is_gaussian:
        guide = inverse.MomentMatchingGuide()
    x = posterior.flatten("x").reshape(-1, *problem.shape)
    x = x + SCORE_LEVEL * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    level = torch.tensor(SCORE_LEVEL)
    guided = guide.bind(problem)(x, level)
    return ksd_test(x, (guided.posterior - x) / SCORE_LEVEL**2, generator=generator, replicates=1).statistic


@functools.cache
def fashion() -> Tensor:
    """The held-out images that ship with the package, then the other test images in their order."""
    shipped, everything = models.held_out_fashion()[0], models.fashion_mnist().held_out
    same = torch.stack([(everything == image).flatten(1).all(1) for image in shipped]).any(0)
    return torch.cat([shipped, everything[~same]])


def problem(prior: DiffusionPrior, name: str, index: int) -> tuple[Tensor, ppl.Program, torch.Generator]:
    """Held-out image, its program, and the generator that goes on from there: all follow from the index."""
    digits = tuple(prior.event_shape)[-1] == 8
    held_out = models.digits().held_out if digits else fashion()
    generator = torch.Generator().manual_seed(index)
    truth = held_out[index].to(prior.dtype)
    observe, model = task(name, prior, generator)
    return truth, ppl.Program(model, observe(truth, generator)), generator


def directions_of(truth: Tensor, generator: torch.Generator) -> Tensor:
    """(pixels, projections) random directions."""
    return torch.randn(truth.numel(), PROJECTIONS, generator=generator, dtype=torch.float64)


def draw(program: ppl.Program, backend: Any, index: int) -> ppl.Posterior:
    """`DRAWS` draws; two from each chain of a backend that is one."""
    chains = DRAWS // 2 if backend.default_chains > 1 else 1
    return ppl.infer(program, backend, draws=DRAWS // chains, chains=chains, seed=10_000 + index)


def solve(prior_name: str, name: str, label: str, backend: Any, index: int) -> dict[str, Any]:
    """One problem by one backend."""
    prior = models.load(prior_name)
    truth, program, generator = problem(prior, name, index)
    directions = directions_of(truth, generator)
    start, started = time.perf_counter(), time.process_time()
    posterior = draw(program, backend, index)
    seconds, cpu = time.perf_counter() - start, time.process_time() - started
    x = posterior.flatten("x").reshape(-1, *truth.shape)
    finite = bool(x.isfinite().all()) and len(x) == DRAWS
    row: dict[str, Any] = {
        "prior": prior_name, "task": name, "backend": label, "index": index, "settings": repr(backend),
        "finite": finite, "seconds": seconds / DRAWS, "cpu": cpu / DRAWS,
        "evals": posterior.cost.denoiser_evals / DRAWS, "vjps": posterior.cost.vjps / DRAWS,
    }  # fmt: skip
    if finite:
        scores = image_scores(x, truth, prior.data_range)
        flat = x.reshape(DRAWS, -1).double() @ directions
        row |= {
            "psnr_mean": scores.psnr_mean,
            "psnr_draws": scores.psnr_draws,
            "crps": float(crps(x.double(), truth.double()).mean()),
            "ranks": ranks(flat, truth.reshape(-1).double() @ directions, generator=generator).tolist(),
        }
        # Beyond a hundred pixels the score of the data would take a vjp for every direction of every draw.
        if index < STEIN_PROBLEMS and (truth.numel() <= 100 or name not in LINEAR):
            row["ksd"] = stein(posterior, program, generator)
    if "root_ess" in posterior.info:
        row["root_ess"] = float(posterior.info["root_ess"].sum())
    return row


def summary(rows: list[dict[str, Any]]) -> str:
    """One line of the table: means over problems with a standard error for the coverage."""
    good = [row for row in rows if row["finite"]]
    if not good:
        return f"no finite result in {len(rows)} problems"
    found = torch.tensor([row["ranks"] for row in good])
    coverage = central_coverage(found, DRAWS, (0.9,))
    k = round(0.1 * (DRAWS + 1) / 2)
    each = ((found >= k) & (found <= DRAWS - k)).double().mean(1)
    error = float(each.std() / math.sqrt(len(good))) if len(good) > 1 else math.nan

    def mean(key: str) -> float:
        found = [row[key] for row in good if key in row]
        return sum(found) / len(found) if found else math.nan

    return (
        f"{mean('psnr_mean'):6.2f} | {mean('psnr_draws'):6.2f} | {100 * float(coverage.observed.mean()):5.1f} ± "
        f"{100 * error:3.1f} | {mean('crps'):.4f} | {mean('ksd'):8.4f} | {mean('evals'):5.0f} | {mean('vjps'):5.0f} | "
        f"{1000 * mean('cpu'):6.1f} | {len(good)}/{len(rows)}"
    )


def complete(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of one prior and task on problems that all its backends have done, so that cells compare."""
    done = [
        {row["index"] for row in rows if row["backend"] == label} for label in backends(name) if label not in COSTLY
    ]
    return [row for row in rows if row["index"] in set.intersection(*done)]


def show(path: Path) -> None:
    """The tables of all stored results."""
    rows = results.read(path)
    k = round(0.1 * (DRAWS + 1) / 2)
    nominal = 100 * (1 - 2 * k / (DRAWS + 1))
    for prior in dict.fromkeys(row["prior"] for row in rows):
        for name in TASKS:
            mine = complete([row for row in rows if (row["prior"], row["task"]) == (prior, name)], name)
            if not mine:
                continue
            print(f"\n{prior}, {name}; nominal coverage {nominal:.1f} %\n")
            print("| backend | PSNR mean | PSNR draws | coverage % | CRPS | KSD | evals | vjps | CPU ms | problems |")
            print("|---|---|---|---|---|---|---|---|---|---|")
            for label in backends(name):
                if any(row["backend"] == label for row in mine):
                    print(f"| {label} | {summary([row for row in mine if row['backend'] == label])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prior", default="digits8x8", choices=["digits8x8", "fashion28x28"])
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--part", default="0/1", help="K/N: every Nth problem from the Kth, for N runs side by side")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--results", type=Path, default=Path("runs/learned.jsonl"))
    parser.add_argument("--show", action="store_true", help="print what is stored, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = results.read(options.results) if not options.show else []
    done = {(r["prior"], r["task"], r["backend"], r["index"], r["settings"]) for r in stored}
    first, stride = map(int, options.part.split("/"))
    for index in range(first, 0 if options.show else options.problems, stride):
        for name in options.tasks:
            for label, backend in backends(name).items():
                seen = (options.prior, name, label, index, repr(backend)) in done
                costly = label in COSTLY and (index >= COSTLY_PROBLEMS or options.prior != "digits8x8")
                if seen or costly:
                    continue
                row = solve(options.prior, name, label, backend, index)
                results.append(options.results, row)
                psnr = row.get("psnr_mean", math.nan)
                print(f"{index} {name} {label}: {psnr:.2f} dB, {1000 * row['seconds']:.1f} ms", flush=True)
    show(options.results)


if __name__ == "__main__":
    main()
