"""A blur width that several images share: the hierarchy over an inverse problem, against a grid over the width.

With a Gaussian law of images, p(width | y) is known: p(width) prod_i N(y_i; A m, c A A' + s^2 I) on a grid.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse.operators import GaussianBlur
from inverse.particles import NoiseAndReturn, NuisanceSMC
from ppl.program import Program
from sde import GaussianMixture

SHAPE, WIDTH, SIGMA, IMAGES = (1, 4, 4), 0.6, 0.3, 3
ONE = torch.ones(1, dtype=torch.float64)
PRIOR = GaussianMixture(ONE, torch.zeros(1, *SHAPE, dtype=torch.float64), ONE)
LAW = dist.LogNormal(math.log(0.7) * ONE[0], 0.5)
REACH, RUNS = 1, 6


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, IMAGES, *SHAPE, dtype=torch.float64, generator=generator)
    return GaussianBlur(WIDTH * ONE[0], SHAPE, radius=REACH)(images) + SIGMA * noise


def model(y: Tensor) -> None:
    width = pyro.sample("width", LAW)
    blur = GaussianBlur(width, SHAPE, radius=REACH)
    for i in range(len(y)):
        x = pyro.sample(f"x{i}", PRIOR)
        pyro.sample(f"y{i}", dist.Normal(blur(x), SIGMA).to_event(3), obs=y[i])


def grid(y: Tensor) -> tuple[float, float, float]:
    """Mean and sd of the log width, and the log evidence."""
    z = torch.linspace(-3.5, 2.5, 151, dtype=torch.float64)
    eye = torch.eye(16, dtype=torch.float64)
    # Row j of each matrix is A e_j.
    blurs = torch.stack(
        [GaussianBlur(width, SHAPE, radius=REACH)(eye.reshape(16, *SHAPE)).reshape(16, 16) for width in z.exp()]
    )
    law = dist.MultivariateNormal(torch.zeros(16, dtype=torch.float64), blurs.mT @ blurs + SIGMA**2 * eye)
    joint = LAW.log_prob(z.exp()) + z + law.log_prob(y.reshape(len(y), 1, 16)).sum(0)
    weight = torch.softmax(joint, 0)
    mean = float((weight * z).sum())
    sd = float((weight * (z - mean).square()).sum().sqrt())
    return mean, sd, float(joint.logsumexp(0)) + math.log(float(z[1] - z[0]))


@pytest.mark.parametrize(
    ("steps", "particles", "runs"), [(6, 64, 8), pytest.param(12, 200, 6, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_particles_carry_the_shared_width(steps: int, particles: int, runs: int) -> None:
    """Width and evidence of the whole program, each within 7 standard errors of its runs: P(|t_5| > 7) = 1e-3.

    Data that were not looked at would leave the width's prior, whose variance is seven times that of the posterior.
    """
    mean, sd, evidence = grid(data())
    engine = NuisanceSMC(steps=steps, particles=particles, runs=1)
    found = ppl.infer(Program(model, data()), engine, draws=particles, chains=runs, seed=0)
    width, ratios = found["width"].log(), (found.info["run_log_evidence"] - evidence).exp()
    for each, exact, scale in (
        (width.mean(1), mean, sd),
        ((width - mean).square().mean(1), sd**2, sd**2),
        (ratios, 1.0, 1.0),
    ):
        assert len(each) == runs
        assert abs(float(each.mean()) - exact) < 7 * float(each.std()) / math.sqrt(runs) + 0.02 * scale


@pytest.mark.slow
def test_blocks_carry_the_shared_width() -> None:
    mean, sd, _ = grid(data())
    kernels = {("width",): ppl.SliceKernel(), **{(f"x{i}",): NoiseAndReturn(steps=6, particles=4) for i in range(3)}}
    chains = ppl.infer(Program(model, data()), ppl.Gibbs(kernels, warmup=10), draws=40, chains=RUNS, seed=0)
    means = chains["width"].log().mean(1)
    assert abs(float(means.mean()) - mean) < 7 * float(means.std()) / math.sqrt(RUNS) + 0.02 * sd
