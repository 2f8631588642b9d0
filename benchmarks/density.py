"""Gradients of the eight schools density for 64 particles: Pyro's handlers, the graph as it is, the graph compiled.

Three honest baselines run Pyro's handlers at every call: one particle after the other, vmap over the handlers, and a
model vectorised by hand with a particle plate. All give the same gradient. Rounds are interleaved, so that a busy
machine slows all of them alike; the table shows medians over rounds, and medians of ratios within a round.

    python benchmarks/density.py [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.program import Program

LANES = 64
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


def vectorised(y: Tensor, sigma: Tensor) -> None:
    with pyro.plate("particles", LANES, dim=-2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8, dim=-1):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


def log_density(z: Tensor) -> Tensor:
    """One particle: Pyro's trace at the values of z, log density and Jacobian."""
    values = {"mu": z[0], "tau": z[1].exp(), "theta": z[2:]}
    trace = pyro.poutine.trace(pyro.poutine.condition(eight_schools, values)).get_trace(EFFECT, SIGMA)
    return trace.log_prob_sum() + z[1]


def loop(z: Tensor) -> Tensor:
    grads = []
    for row in z:
        x = row.detach().requires_grad_()
        grads.append(torch.autograd.grad(log_density(x), x)[0])
    return torch.stack(grads)


def plate(z: Tensor) -> Tensor:
    x = z.detach().requires_grad_()
    values = {"mu": x[:, 0:1], "tau": x[:, 1:2].exp(), "theta": x[:, 2:]}
    trace = pyro.poutine.trace(pyro.poutine.condition(vectorised, values)).get_trace(EFFECT, SIGMA)
    return torch.autograd.grad(trace.log_prob_sum() + x[:, 1].sum(), x)[0]


def timed(fn: Callable[[Tensor], Tensor], z: Tensor, repeats: int) -> float:
    """Milliseconds of one call, averaged over the repeats."""
    start = time.perf_counter()
    for _ in range(repeats):
        fn(z)
    return (time.perf_counter() - start) / repeats * 1e3


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    z = torch.randn(LANES, 10, generator=torch.Generator().manual_seed(0))
    flats = {}
    for name, compile in (("graph", "never"), ("compiled", "inductor")):
        program = Program(eight_schools, EFFECT, SIGMA, compile=compile)  # type: ignore[arg-type]
        flats[name] = program.flat()
        print(f"{name}: runs as {flats[name].prepare(z, calls=10**6)}")
    with pyro.validation_enabled(False):
        ways: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
            "Pyro, one by one": (loop, 1),
            "Pyro, vmap over handlers": (torch.vmap(torch.func.grad(log_density)), 20),
            "Pyro, plate by hand": (plate, 20),
            "graph": (lambda z: flats["graph"].log_density_and_grad(z)[1], 100),
            "compiled": (lambda z: flats["compiled"].log_density_and_grad(z)[1], 500),
        }
        expected = loop(z)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for fn, _ in ways.values():
            torch.testing.assert_close(fn(z), expected, rtol=1e-9, atol=1e-9)
        for _ in range(rounds):
            for name, (fn, repeats) in ways.items():
                times[name].append(timed(fn, z, repeats))
    print(f"\n{'':26s}{'ms per batch':>14s}{'graph is':>12s}{'compiled is':>14s}   (median of {rounds} rounds)")
    for name, values in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(values, times[n], strict=True)) for n in ("graph", "compiled")
        ]
        print(f"{name:26s}{statistics.median(values):14.3f}{ratios[0]:11.1f}x{ratios[1]:13.1f}x faster")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
