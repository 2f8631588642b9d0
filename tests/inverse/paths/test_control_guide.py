"""The neural control of a path: a normalised guide, and a bound that reaches the exact evidence of linear programs."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.paths import ControlGuide
from ppl.errors import CapabilityError, OptionError
from sde import BrownianNoise, MarkovNoise, Path, Process

DOUBLE = torch.float64


def path_of(noise: object, steps: int = 6) -> Path:
    process = Process(lambda x, t: -x, 1.0, noise)  # type: ignore[arg-type]
    return Path(process, torch.linspace(1 / steps, 1, steps, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))


def program_of(path: Path) -> ppl.Program:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], 0.3), obs=y)

    return ppl.Program(model, torch.tensor(1.2, dtype=DOUBLE))


NOISES = {"brownian": BrownianNoise(), "II": MarkovNoise(0.3, 1.0), "I": MarkovNoise(0.7, 1.0, "I", 3)}


@pytest.mark.parametrize("name", list(NOISES))
def test_guide_is_normalised_and_its_density_is_that_of_its_draws(name: str) -> None:
    """log q against the Jacobian of the map from noise to draws, at three points and random parameters."""
    program = program_of(path_of(NOISES[name], 4)).noise_space()
    flat = program.flat()
    guide = ControlGuide(path_of(NOISES[name], 4), width=8).bind(flat.layout)
    generator = torch.Generator().manual_seed(0)
    params = guide.init(flat.dim, DOUBLE, torch.device("cpu"), generator)
    params = {n: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=DOUBLE) for n, v in params.items()}
    noise = guide.noise(3, flat.dim, DOUBLE, generator)
    z, log_q = guide.rsample_and_log_prob(params, noise)
    torch.testing.assert_close(guide.log_prob(params, z), log_q)

    def draw(e: Tensor) -> Tensor:
        return guide.rsample_and_log_prob(params, e[None])[0][0]

    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(draw, noise[i])
        expected = dist.Normal(0.0, 1.0).log_prob(noise[i]).sum() - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_q[i], expected)


@pytest.mark.parametrize("name", list(NOISES))
def test_bound_reaches_the_evidence(name: str) -> None:
    """ELBO of 2000 draws within 0.02 nat below the exact evidence, and never above it by 4.5 standard errors."""
    path = path_of(NOISES[name])
    program = program_of(path)
    exact = ppl.infer(program, inverse.Exact(), draws=4, progress=False).log_evidence
    assert exact is not None
    engine = ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(path, width=32), steps=400, lr=0.02, particles=64))
    posterior = ppl.infer(program, engine, draws=2000, progress=False)
    value = posterior.info["lp"].double() - posterior.info["log_q"].double()
    stderr = float(value.std()) / 2000**0.5
    gap = float(exact.value) - float(value.mean())
    assert -4.5 * stderr < gap < 0.02 + 4.5 * stderr
    assert float(posterior.info["pareto_k"].max()) < 0.7


def test_without_training_it_is_the_prior() -> None:
    path = path_of(BrownianNoise())
    guide = ControlGuide(path).bind(program_of(path).noise_space().flat().layout)
    params = guide.init(6, DOUBLE, torch.device("cpu"), torch.Generator().manual_seed(0))
    noise = torch.randn(5, 6, dtype=DOUBLE)
    z, log_q = guide.rsample_and_log_prob(params, noise)
    torch.testing.assert_close(z, noise)
    torch.testing.assert_close(log_q, dist.Normal(0.0, 1.0).log_prob(noise).sum(1))


def test_bad_input() -> None:
    path = path_of(BrownianNoise())
    with pytest.raises(OptionError, match="path must be a"):
        ControlGuide(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="width and bound must be positive"):
        ControlGuide(path, width=0)
    with pytest.raises(CapabilityError, match=r"steers one path of 20 driving numbers.*found none"):
        ppl.infer(
            program_of(path), ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(path_of(BrownianNoise(), 20)), steps=2)),
            draws=2, progress=False,
        )  # fmt: skip
