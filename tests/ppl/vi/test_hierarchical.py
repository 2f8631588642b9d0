"""The hierarchical guide: its density, a posterior it holds exactly, its places and files."""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import ppl
from ppl import SVI, FittedGuide, Hierarchical
from ppl.errors import OptionError
from ppl.sites import Layout

F64 = torch.float64
MANY, NOISE = 6, 0.5


def groups(y: Tensor) -> None:
    """Many numbers around one mean: given the mean they are independent, with one variance."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 2.0))
    with pyro.plate("groups", MANY):
        b = pyro.sample("b", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(b, NOISE), obs=y)


def data() -> Tensor:
    return torch.linspace(0.5, 2.5, MANY, dtype=F64)


def test_a_hierarchical_normal_posterior_is_reached_exactly() -> None:
    """The bound is the evidence, and the draws of the bound are one number: path gradients leave no noise there."""
    covariance = 4.0 * torch.ones(MANY, MANY, dtype=F64) + (1 + NOISE**2) * torch.eye(MANY, dtype=F64)
    evidence = MultivariateNormal(torch.zeros(MANY, dtype=F64), covariance).log_prob(data())
    fitted = SVI(guide=Hierarchical(), steps=1500, lr=0.03).fit(ppl.Program(groups, data()), seed=0)
    elbo = fitted.elbo(64, seed=1)
    assert abs(float(elbo.value - evidence)) < 1e-4
    assert float(elbo.stderr) < 1e-3
    sd = (1 / (1 + NOISE**-2)) ** 0.5
    torch.testing.assert_close(fitted.params["log_sd"].exp(), torch.full((MANY,), sd, dtype=F64), rtol=1e-3, atol=0)


def test_density_of_draws_is_that_of_the_change_of_variables() -> None:
    """log q = log N(noise) - log |det dz / dnoise|, by autograd, at parameters that mean nothing."""
    generator = torch.Generator().manual_seed(0)
    guide = Hierarchical(upper=("a", "c")).bind(_layout())
    params = guide.init(7, F64, torch.device("cpu"), generator)
    params = {n: v + 0.3 * torch.randn(v.shape, dtype=F64, generator=generator) for n, v in params.items()}
    noise = guide.noise(3, 7, F64, generator)
    z, log_q = guide.rsample_and_log_prob(params, noise)
    torch.testing.assert_close(guide.log_prob(params, z), log_q)
    jacobian = torch.vmap(torch.func.jacrev(lambda e: guide.rsample_and_log_prob(params, e[None])[0][0]))(noise)
    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1)
    torch.testing.assert_close(log_q, log_normal - torch.linalg.slogdet(jacobian).logabsdet)
    other = guide.rsample_and_log_prob(params, torch.cat([noise[:, :1] + 1, noise[:, 1:]], 1))[0]
    assert bool((other[:, 2:6] != z[:, 2:6]).all()), "the many follow the few"


def _layout() -> Layout:
    """Of sites a (2), b (4), c (1)."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(4, dtype=F64), 1.0).to_event(1))
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("y", dist.Normal(a.sum() + b.sum() + c, 1.0), obs=y)

    return ppl.Program(model, torch.tensor(0.0, dtype=F64)).flat().layout


def test_the_largest_site_follows_all_others_unless_told() -> None:
    assert Hierarchical().bind(_layout()).places == (2, 3, 4, 5)
    assert Hierarchical(upper=("b", "c")).bind(_layout()).places == (0, 1)
    for upper in (("nothing",), ("a", "b", "c")):
        with pytest.raises(OptionError, match="some of the sites"):
            Hierarchical(upper=upper).bind(_layout())
    with pytest.raises(OptionError, match="ascent"):
        Hierarchical(ascent=-1)
    with pytest.raises(OptionError, match="init_scale"):
        Hierarchical(init_scale=0.0)


def test_a_fit_comes_back_from_its_file(tmp_path: Path) -> None:
    program = ppl.Program(groups, data())
    fitted = SVI(guide=Hierarchical(upper="mu", ascent=1), steps=20).fit(program, seed=0)
    fitted.save(tmp_path / "fit.safetensors")
    again = FittedGuide.load(tmp_path / "fit.safetensors", program)
    assert again.guide == fitted.guide
    z = torch.randn(4, MANY + 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.log_prob(z), fitted.log_prob(z))
