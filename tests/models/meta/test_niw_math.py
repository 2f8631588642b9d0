"""Closed forms of the global law, against Monte Carlo, conjugacy and the reference value."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from models.meta import NormalInverseGamma, NormalInverseWishart
from models.meta.niw_math import GlobalLaw, kl_inverse_gamma, kl_inverse_wishart
from ppl.errors import OptionError, ShapeError

F = {"dtype": torch.float64}
SCALE = torch.tensor([[2.0, 0.6], [0.6, 3.0]], **F)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def wishart(df: float = 7.0, count: float = 3.0) -> NormalInverseWishart:
    return NormalInverseWishart(torch.tensor([0.5, -1.0], **F), torch.tensor(count, **F), torch.tensor(df, **F), SCALE)


def gamma(df: float = 7.0, count: float = 3.0) -> NormalInverseGamma:
    scale = SCALE.diagonal().clone()
    return NormalInverseGamma(torch.tensor([0.5, -1.0], **F), torch.tensor(count, **F), torch.tensor(df, **F), scale)


def log_density(law: GlobalLaw, mu: Tensor, precision: Tensor) -> Tensor:
    """Of (mu, Sigma^-1), by torch's distributions."""
    if isinstance(law, NormalInverseGamma):
        one = dist.Gamma(law.df / 2, law.scale / 2).log_prob(precision).sum(-1)
        return one + dist.Normal(law.mean, (law.count * precision).rsqrt()).log_prob(mu).sum(-1)
    one = torch.distributions.Wishart(law.df, precision_matrix=law.scale).log_prob(precision)
    return one + dist.MultivariateNormal(law.mean, precision_matrix=law.count * precision).log_prob(mu)


def test_expected_kl_reference_value() -> None:
    """The number of the method's reference example: 2.2493."""
    scale = torch.diag(torch.tensor([2.0, 3.0], **F))
    law = NormalInverseWishart(wishart().mean, wishart().count, wishart().df, scale)
    other = torch.diag(torch.tensor([0.3, 0.7], **F))
    value = law.expected_kl(torch.tensor([[1.0, 0.0]], **F), other[None], other.logdet()[None])
    assert abs(float(value) - 2.2493) < 5e-5


@pytest.mark.parametrize("law", [wishart(), gamma()], ids=lambda v: type(v).__name__)
def test_expectations_against_draws(law: GlobalLaw) -> None:
    """Expected KL, KL of two laws and expected precision are averages over draws; 5 standard errors, 3e-6 in all."""
    mu, precision = law.sample(40_000, seeded())
    mean, root = torch.tensor([1.0, 0.0], **F), torch.tensor([[0.5, 0.0], [0.2, 0.8]], **F)
    full = isinstance(law, NormalInverseWishart)
    covariance = root @ root.mT if full else root.diagonal().square()
    if full:
        q = dist.MultivariateNormal(mean, scale_tril=root)
        p = dist.MultivariateNormal(mu, precision_matrix=precision)
        log_det = covariance.logdet()
    else:
        q = dist.Normal(mean, root.diagonal()).to_event(1)
        p = dist.Normal(mu, precision.rsqrt()).to_event(1)
        log_det = covariance.log().sum()
    each = torch.distributions.kl_divergence(q.expand((len(mu),)), p)
    exact = law.expected_kl(mean[None], covariance[None], log_det[None])[0]
    assert abs(float((each.mean() - exact) / (each.std() / len(each) ** 0.5))) < 5

    other = law.replaced(law.mean + 0.3, law.count / 2, law.df - 3, 1.5 * law.scale)
    ratio = log_density(law, mu, precision) - log_density(other, mu, precision)
    assert abs(float((ratio.mean() - law.kl(other)) / (ratio.std() / len(ratio) ** 0.5))) < 5

    off = (precision.mean(0) - law.precision()) / (precision.std(0) / len(mu) ** 0.5)
    assert float(off.abs().max()) < 5


def test_kl_of_one_coordinate_is_that_of_the_gamma() -> None:
    """Both forms agree for d = 1, and vanish for equal laws."""
    a, b, n, m = (torch.tensor(v, **F) for v in (2.0, 0.7, 9.0, 4.0))
    one = kl_inverse_wishart(n, a.reshape(1, 1), m, b.reshape(1, 1))
    assert torch.isclose(one, kl_inverse_gamma(n, a.reshape(1), m, b.reshape(1))[0])
    assert abs(float(wishart().kl(wishart()))) < 1e-12
    assert abs(float(gamma().kl(gamma()))) < 1e-12


@pytest.mark.parametrize("prior", [wishart(), gamma()], ids=lambda v: type(v).__name__)
def test_observed_parameters_give_the_textbook_posterior(prior: GlobalLaw) -> None:
    """Where every theta_i is known the bound equals the evidence, the product of Student-t predictives: gap 0."""
    theta = torch.randn(5, 2, generator=seeded(), **F)
    law, evidence = prior, torch.zeros((), **F)
    for one in theta:
        evidence = evidence + law.predictive().log_prob(one)
        moment = torch.outer(one, one) if isinstance(prior, NormalInverseWishart) else one.square()
        law = law.updated(1.0, one, moment)
    full = isinstance(prior, NormalInverseWishart)
    moments = (theta[:, :, None] * theta[:, None]) if full else theta.square()
    once = prior.updated(5.0, theta.mean(0), moments.mean(0))
    for name in ("mean", "count", "df", "scale"):
        assert torch.allclose(getattr(once, name), getattr(law, name))
    tiny = 1e-9
    covariance = tiny * (torch.eye(2, **F).expand(5, 2, 2) if full else torch.ones(5, 2, **F))
    log_det = torch.full((5,), 2 * math.log(tiny), **F)
    entropy = 0.5 * log_det + 1 + math.log(2 * math.pi)
    bound = -law.kl(prior) - (law.expected_kl(theta, covariance, log_det) + entropy).sum()
    assert abs(float(bound - evidence)) < 1e-6


@pytest.mark.parametrize("law", [wishart(), gamma()], ids=lambda v: type(v).__name__)
def test_mode_is_stationary(law: GlobalLaw) -> None:
    """The joint density of (mu, Sigma) has no slope at the mode."""
    mu, sigma = (v.clone().requires_grad_() for v in law.mode())
    if isinstance(law, NormalInverseWishart):
        value = log_density(law, mu, torch.linalg.inv(sigma)) - (law.dim + 1) * torch.logdet(sigma)
    else:
        value = log_density(law, mu, 1 / sigma) - 2 * sigma.log().sum()
    for slope in torch.autograd.grad(value, (mu, sigma)):
        assert float(slope.abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (OptionError, "NormalInverseGamma", lambda: wishart(df=0.9)),
        (OptionError, "positive", lambda: wishart(count=0.0)),
        (
            OptionError,
            "positive definite",
            lambda: NormalInverseWishart(*(wishart().mean, wishart().count, wishart().df), -SCALE),
        ),
        (
            OptionError,
            "positive",
            lambda: NormalInverseGamma(torch.zeros(2), torch.tensor(1.0), torch.tensor(1.0), torch.tensor([1.0, 0.0])),
        ),
        (OptionError, "df", lambda: gamma(df=0.0)),
        (OptionError, "df inf", lambda: wishart(df=math.inf)),
        (
            OptionError,
            "4 values that are not",
            lambda: NormalInverseWishart(torch.zeros(2), 1.0, 5.0, SCALE * math.nan),
        ),
        (OptionError, "1 coordinates", lambda: NormalInverseGamma.around(torch.tensor([0.0, math.nan]), 1.0, 3.0, 1.0)),
        (
            ShapeError,
            "scale",
            lambda: NormalInverseWishart(torch.zeros(3), torch.tensor(1.0), torch.tensor(9.0), torch.eye(2)),
        ),
        (
            ShapeError,
            "vector",
            lambda: NormalInverseGamma(torch.zeros(2, 2), torch.tensor(1.0), torch.tensor(1.0), torch.ones(2)),
        ),
    ],
)
def test_bad_laws(error: type[Exception], words: str, make: object) -> None:
    """One clear error; too few degrees of freedom name the relaxation."""
    with pytest.raises(error, match=words):
        make()  # type: ignore[operator]
