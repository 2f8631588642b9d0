"""What an engine costs beside its denoiser calls: wall time against a bare loop of the same calls and vjps.

64 particles of 28x28, 50 steps, a mask of half the pixels. The bare loop makes the same calls and vjps and does
nothing else. Median of interleaved ratios, one thread. A second table gives milliseconds per step with a denoiser that
returns its input, which is all overhead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import inverse
import models
import ppl
from inverse.operators import Mask
from sde import DiffusionPrior

STEPS, PARTICLES = 50, 64


def program_of(prior: DiffusionPrior) -> ppl.Program:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(prior.event_shape, generator=generator) < 0.5
    operator = Mask(mask)
    truth = prior.data_std * 0.1 * torch.randn(prior.event_shape, generator=generator)
    y = operator(truth) + 0.1 * torch.randn(operator.out_shape, generator=generator)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), 0.1).to_event(1), obs=y)

    return ppl.Program(model, y)


def bare(prior: DiffusionPrior, *, vjp: bool) -> None:
    """The same denoiser calls, and vjps, with nothing around them."""
    x = torch.randn(PARTICLES, *prior.event_shape, generator=torch.Generator().manual_seed(0))
    sigmas = prior.sigmas(STEPS)
    with torch.no_grad():
        for sigma in sigmas[:-1]:
            level = sigma.float()
            if vjp:
                mean, pull = torch.func.vjp(lambda x, s=level: prior.denoiser(x, s), x)
                pull(mean)
            else:
                prior.denoiser(x, level)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def backends() -> dict[str, tuple[ppl.Backend, bool]]:
    """Name -> (backend, whether each step takes a vjp)."""
    return {
        "TwistedSMC(PiGDMGuide())": (inverse.TwistedSMC(steps=STEPS, particles=PARTICLES, runs=1), True),
        "TwistedSMC, no Jacobian": (
            inverse.TwistedSMC(
                steps=STEPS, particles=PARTICLES, runs=1, guide=inverse.PiGDMGuide(jacobian=False)
            ),
            False,
        ),
        "PiGDM": (inverse.PiGDM(steps=STEPS), True),
        "DPS": (inverse.DPS(steps=STEPS), True),
        "REDDiff": (inverse.REDDiff(steps=STEPS), False),
    }  # fmt: skip


class Identity(torch.nn.Module):
    """Returns its input: every step is overhead."""

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return x * 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    prior = models.load("fashion28x28")
    program = program_of(prior)
    print(f"wall time over a bare loop of the same calls: {PARTICLES} particles of 28x28, {STEPS} steps, one thread")
    for name, (backend, vjp) in backends().items():
        ppl.infer(program, backend, draws=PARTICLES)  # reads the likelihood once, warms caches
        ratios, walls = [], []
        for _ in range(pairs):
            wall = seconds(lambda b=backend: ppl.infer(program, b, draws=PARTICLES))
            ratios.append(wall / seconds(lambda v=vjp: bare(prior, vjp=v)))
            walls.append(wall)
        print(
            f"  {name:28s} median ratio {statistics.median(ratios):5.2f}   {statistics.median(walls):6.2f} s",
            flush=True,
        )
    identity = DiffusionPrior(Identity(), (1, 28, 28), sigma_min=0.01, sigma_max=50.0, data_std=10.0)
    program = program_of(identity)
    print("milliseconds per step with an identity denoiser")
    for name, (backend, _) in backends().items():
        short, long = [
            statistics.median(
                seconds(lambda b=backend, s=s: ppl.infer(program, replace_steps(b, s), draws=PARTICLES))
                for _ in range(pairs)
            )
            for s in (STEPS, 5 * STEPS)
        ]
        print(f"  {name:28s} {(long - short) / (4 * STEPS) * 1e3:6.3f} ms", flush=True)


def replace_steps(backend: ppl.Backend, steps: int) -> ppl.Backend:
    import dataclasses

    return dataclasses.replace(backend, steps=steps)  # type: ignore[type-var]


if __name__ == "__main__":
    main()
