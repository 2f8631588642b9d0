"""Chains in the coordinates of a guide: densities to rounding where they are known, exact means from bad guides."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import ppl
from models.references import gaussian_problem
from ppl import HMC, NUTS, Hierarchical, Transport
from ppl.diagnostics.ess import ess_of
from ppl.errors import CapabilityError, OptionError, ProgramError
from ppl.transport import _Moved

F64 = torch.float64
MANY, NOISE = 4, 0.2


def linear(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.stack([x[0] + x[1], x[1] - 2 * x[2]]), NOISE).to_event(1), obs=y)


def curved(y: Tensor) -> None:
    """Many numbers whose places are bent functions of one, seen sharply; given it they are independent normals."""
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(MANY, dtype=F64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(b + a.exp(), NOISE).to_event(1), obs=y)


def curved_data() -> Tensor:
    return torch.tensor([1.2, 0.7, 1.0, 0.4], dtype=F64)


def noise(lanes: int, size: int) -> Tensor:
    return torch.randn(lanes, size, dtype=F64, generator=torch.Generator().manual_seed(5))


def log_normal(e: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(e).sum(1)


def moved(program: ppl.Program, fitted: ppl.FittedGuide) -> Any:
    return _Moved(program, fitted).flat()


def test_a_gaussian_posterior_is_standard_normal_times_the_evidence() -> None:
    y = torch.tensor([0.4, -1.0], dtype=F64)
    program = ppl.Program(linear, y)
    flat = moved(program, ppl.Laplace().fit(program))
    A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, -2.0]], dtype=F64)
    evidence = MultivariateNormal(y * 0, A @ A.mT + NOISE**2 * torch.eye(2, dtype=F64)).log_prob(y)
    e = noise(7, 3)
    torch.testing.assert_close(flat.log_density(e) - log_normal(e), evidence.expand(7), rtol=0, atol=1e-8)
    torch.testing.assert_close(flat.log_density_and_grad(e)[1], -e, rtol=0, atol=1e-7)


def test_the_ascent_finds_the_conditional_mode_of_a_curved_posterior() -> None:
    """With the right conditional sd one step is Newton's: what is left depends on a alone, whatever mean and slope."""
    program = ppl.Program(curved, curved_data())
    fitted = ppl.SVI(guide=Hierarchical(upper="a", ascent=1), steps=2).fit(program, seed=0)
    fitted.params["log_sd"] = torch.full((MANY,), (1 / (1 + NOISE**-2)) ** 0.5, dtype=F64).log()
    fitted.params["tilt"] = torch.zeros_like(fitted.params["tilt"])
    fitted.params["slope"] = torch.ones_like(fitted.params["slope"])
    flat = moved(program, fitted)
    e = noise(5, 1 + MANY)
    other = torch.cat([e[:, :1], noise(6, 1 + MANY)[1:, 1:]], 1)
    rest = flat.log_density(e) - log_normal(e)
    torch.testing.assert_close(flat.log_density(other) - log_normal(other), rest, rtol=0, atol=1e-9)
    assert float(rest.std()) > 0.1
    values = flat.constrain(e)
    mode = (curved_data() - values["a"].exp()[:, None]) / (1 + NOISE**2)
    sd = fitted.params["log_sd"].exp()
    torch.testing.assert_close(values["b"], mode + sd * e[:, 1:], rtol=0, atol=1e-10)


GUIDES = {
    "Hierarchical": Hierarchical(upper="a", ascent=2),
    "LowRank": ppl.LowRank(2),  # of more numbers than there are unknowns
    "MeanField": ppl.MeanField(),
}


@pytest.mark.parametrize("name", GUIDES)
def test_gradients_are_those_of_the_density(name: str) -> None:
    program = ppl.Program(curved, curved_data())
    flat = moved(program, ppl.SVI(guide=GUIDES[name], steps=20).fit(program, seed=0))
    assert flat.dim == 1 + MANY + 2 * (name == "LowRank")
    e, way, step = noise(3, flat.dim), noise(4, flat.dim)[1:], 1e-6
    value, grad = flat.log_density_and_grad(e)
    torch.testing.assert_close(value, flat.log_density(e))
    change = (flat.log_density(e + step * way) - flat.log_density(e - step * way)) / (2 * step)
    torch.testing.assert_close((grad * way).sum(1), change, rtol=1e-6, atol=1e-6)
    point, at = flat.one_lane(), e[0].numpy()
    assert point(at)[0] == pytest.approx(float(value[0]))
    assert point(at)[1].tolist() == pytest.approx(grad[0].tolist())


def exact() -> tuple[float, float]:
    """Mean of a and of b_0, by quadrature over a, with b integrated out."""
    a = torch.linspace(-5, 5, 20001, dtype=F64)
    at = a.exp()[:, None]
    total = (1 + NOISE**2) ** 0.5
    log_p = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(at, total).log_prob(curved_data()).sum(1)
    weight = torch.softmax(log_p, 0)
    return float(weight @ a), float(weight @ ((curved_data()[0] - at[:, 0]) / (1 + NOISE**2)))


@pytest.mark.parametrize("name", GUIDES)
def test_bad_guides_give_exact_means(name: str) -> None:
    """A bent ridge and fits of few steps: means within 4 standard errors by ESS, false alarm about 4e-4 for all six."""
    program = ppl.Program(curved, curved_data())
    engine = Transport(HMC(warmup=200), ppl.SVI(guide=GUIDES[name], steps=100, lr=0.05))
    posterior = ppl.infer(program, engine, draws=200, chains=32, seed=0)
    for value, truth in zip((posterior["a"], posterior["b"][..., 0]), exact(), strict=True):
        assert float(ess_of(value)) > 100
        stderr = float(value.std() / ess_of(value).sqrt())
        assert abs(float(value.mean()) - truth) < 4 * stderr
    assert posterior.attrs["backend"] == "Transport(HMC)"


def test_nuts_runs_on_it_and_noise_space_goes_around_it() -> None:
    problem = gaussian_problem(0.3, dim=3, observations=2)
    engine = ppl.NoiseSpace(Transport(NUTS(warmup=60), ppl.SVI(guide=ppl.LowRank(1), steps=200)))
    posterior = ppl.infer(problem.program, engine, draws=200, chains=2, seed=0)
    stderr = problem.posterior.stddev / ess_of(posterior["x"]).sqrt()
    assert bool(((posterior.mean("x") - problem.posterior.mean).abs() < 4.5 * stderr).all())  # false alarm 2e-5
    assert posterior.draws["x_noise"].shape == (2, 200, 3)


def test_same_seed_same_draws() -> None:
    program = ppl.Program(linear, torch.tensor([0.4, -1.0], dtype=F64))
    engine = Transport(HMC(warmup=20), ppl.SVI(guide=ppl.MeanField(), steps=20))
    one, two = (ppl.infer(program, engine, draws=5, chains=2, seed=3)["x"] for _ in range(2))
    assert torch.equal(one, two)


def test_bad_input_is_refused() -> None:
    for engine in (ppl.SMC(), ppl.HMC(init=ppl.Laplace()), ppl.NoiseSpace(ppl.HMC()), ppl.HMC):
        with pytest.raises(OptionError, match="Transport runs"):
            Transport(engine, ppl.Laplace())  # type: ignore[arg-type]
    for guide in (None, 3, ppl.Laplace):
        with pytest.raises(OptionError, match="guide must be"):
            Transport(HMC(), guide)
    problem = gaussian_problem(0.3, dim=3, observations=2)
    engine = ppl.NoiseSpace(Transport(HMC(warmup=20), ppl.SVI(guide=Hierarchical(), steps=2)))
    with pytest.raises(OptionError, match="some of the sites"):  # one site: nothing for it to follow
        ppl.infer(problem.program, engine, draws=2, chains=2)
    program = ppl.Program(linear, torch.tensor([0.4, -1.0], dtype=F64))
    with pytest.raises(ProgramError, match="no coordinates"):
        moved(program, ppl.Laplace().fit(program)).ravel({"x": torch.zeros(1, 3, dtype=F64)})


def test_a_guide_that_follows_the_density_refuses_networks() -> None:
    prior = gaussian_problem(0.3, dim=3, observations=2).program.sites["x"].distribution

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.3))
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[:2], scale).to_event(1), obs=y)

    program = ppl.Program(model, torch.zeros(2, dtype=F64), compile="never")
    engine = ppl.NoiseSpace(Transport(HMC(warmup=20), ppl.SVI(guide=Hierarchical(), steps=2)))
    with pytest.raises(CapabilityError, match="through a network"):
        ppl.infer(program, engine, draws=2, chains=2)
