"""Linear paths are Gaussian: exact posterior and evidence, against reference values of the continuous problem."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from ppl.errors import CapabilityError
from sde import FractionalGaussianNoise, MarkovNoise, Path, Process, fbm_covariance
from sde.fractional import Kind

DOUBLE = torch.float64

# log p(y), mean and sd of X(1), for dX = -theta X dt + dB with X(0) = 0 and y = X(2) + 0.1 n = 1; five factors of the
# published grid in the kernel normalisation.
REFERENCES = [
    ("II", 0.3, 0.0, -1.500494, 0.46078, 0.90959),
    ("II", 0.7, 0.0, -1.545778, 0.47883, 0.57657),
    ("II", 0.7, 1.0, -1.557860, 0.43758, 0.51288),
    ("I", 0.3, 1.0, -1.480816, 0.16899, 0.78106),
    ("I", 0.7, 0.0, -1.540700, 0.49773, 0.56550),
]


def linear_program(kind: Kind, hurst: float, theta: float, steps: int) -> ppl.Program:
    """X at times 1 and 2, in `steps` steps."""
    noise = MarkovNoise(torch.tensor(hurst, dtype=DOUBLE), 2.0, kind, 5, "paper", unit=False, zero=False, max_error=2.0)
    path = Path(Process(lambda x, t: -theta * x, 1.0, noise), torch.tensor([1.0, 2.0], dtype=DOUBLE), dt=2 / steps)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], 0.1), obs=y)

    return ppl.Program(model, torch.tensor(1.0, dtype=DOUBLE))


@pytest.mark.parametrize(("kind", "hurst", "theta", "log_p", "mean", "sd"), REFERENCES)
def test_evidence_and_posterior_of_linear_paths(
    kind: Kind, hurst: float, theta: float, log_p: float, mean: float, sd: float
) -> None:
    """100 steps: the evidence is within 0.05 nat of the continuous one, and here within 0.005."""
    posterior = ppl.infer(linear_program(kind, hurst, theta, 100), inverse.Exact(), draws=4, progress=False)
    assert posterior.log_evidence is not None
    assert float(posterior.log_evidence.value) == pytest.approx(log_p, abs=0.005)
    law = posterior.guide
    assert float(law.mean[0, 0]) == pytest.approx(mean, abs=0.003)
    assert float(law.variance[0, 0].sqrt()) == pytest.approx(sd, rel=0.01)


def test_bridge_of_fractional_brownian_motion() -> None:
    """Two hundred steps at the default factors, against the exact process: sd within 1.4 % and the scheme's step."""
    times = torch.tensor([0.25, 0.5, 1.0, 1.5, 1.9, 2.0], dtype=DOUBLE)
    noise = MarkovNoise(0.7, 2.0, "I")
    path = Path(Process(noise=noise), times, torch.zeros(1, dtype=DOUBLE), dt=0.01)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], 0.1), obs=y)

    posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0, dtype=DOUBLE)), inverse.Exact(), draws=4, progress=False)
    c = fbm_covariance(times[:, None], times, 0.7)
    exact = c.diagonal() - c[:, -1] ** 2 / (c[-1, -1] + 0.01)
    torch.testing.assert_close(posterior.guide.variance[:, 0].sqrt(), exact.sqrt(), rtol=0.02, atol=0.0)


def test_other_engines_agree_on_the_same_program() -> None:
    """HMC in noise space and on the states themselves: mean and sd of X(1) within 4.5 standard errors of the exact."""
    path = Path(Process(lambda x, t: -x, 1.0, MarkovNoise(0.3, 1.0)), torch.linspace(0.25, 1, 4, dtype=DOUBLE))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)

    program = ppl.Program(model, torch.tensor([0.4, -0.2, 0.9, 1.2], dtype=DOUBLE))
    exact = ppl.infer(program, inverse.Exact(), draws=4, progress=False).guide
    engines = (
        ppl.NoiseSpace(ppl.HMC(warmup=150)),
        ppl.HMC(warmup=150),
        ppl.NoiseSpace(ppl.EllipticalSlice(warmup=100)),
    )
    for engine in engines:
        posterior = ppl.infer(program, engine, draws=150, chains=8, seed=1, progress=False)
        table = posterior.summary()
        table = table.loc[[name for name in table.index if name.startswith("x[")]]
        z = (torch.tensor(table["mean"].to_numpy()) - exact.mean[:, 0]) / torch.tensor(table["mcse"].to_numpy())
        assert float(z.abs().max()) < 4.5, engine
        ratio = torch.tensor(table["sd"].to_numpy()) / exact.variance[:, 0].sqrt()
        assert float((ratio - 1).abs().max()) < 4.5 / math.sqrt(2 * float(table["ess_bulk"].min())), engine


def test_law_of_a_path_is_that_of_its_draws() -> None:
    """Increments of a driftless path of type I against fractional Gaussian noise: log densities within the error."""
    steps = 16
    noise = MarkovNoise(0.7, 1.0, "I")
    law = Path(Process(noise=noise), torch.arange(1, steps + 1, dtype=DOUBLE) / steps).gaussian()
    exact = FractionalGaussianNoise(torch.tensor(0.7, dtype=DOUBLE), steps, dt=1 / steps)
    increments = exact.draw((200,), torch.Generator().manual_seed(0))
    found = law.log_prob(increments.cumsum(-1)[..., None])
    assert abs(float((found - exact.log_prob(increments)).mean())) < 0.2


def test_a_path_that_is_not_linear_is_refused() -> None:
    path = Path(Process(lambda x, t: torch.sin(x), 1.0), torch.tensor([0.5, 1.0]))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], 0.1), obs=y)

    assert "condition_linear" not in path.capabilities
    with pytest.raises(CapabilityError, match="Exact needs"):
        ppl.infer(ppl.Program(model, torch.tensor(1.0)), inverse.Exact(), draws=2, progress=False)
    with pytest.raises(ValueError, match="linear in its noise"):
        path.gaussian()
