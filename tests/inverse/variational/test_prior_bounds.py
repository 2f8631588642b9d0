"""Bounds on the log density of a prior: their values and gradients against closed forms."""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor

from inverse.variational.prior_bounds import PriorDensity
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64
LOW = 0.05
VARIANCES = torch.tensor([0.1, 1.0, 2.5], dtype=F64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), VARIANCES[None])


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5]], dtype=F64)
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=F64), means, torch.tensor([0.2, 0.4], dtype=F64))


def test_the_denoising_bound_of_a_gaussian() -> None:
    """Entries N(0, l) against a reference N(0, v), integrated over gamma from 1 / high^2 to 1 / low^2: [derived]

        log p(x) = -log(2 pi v) / 2 + F(v) - F(l) - x^2 (1/v + G(l) - G(v)) / 2,
        F(l) = [log(1 + l gamma) + 1 / (1 + l gamma)] / 2,   G(l) = 1 / (l + low^2) - 1 / (l + high^2).

    20 000 lanes; value and three gradients within 6 standard errors: a false alarm in 1e-8 of runs.
    """
    prior = gaussian()
    density = PriorDensity(prior, Size([3]), "immse", LOW)
    high, v = prior.sigma_max, density.spread

    def log_part(variance: Tensor) -> Tensor:
        ends = [variance / s**2 for s in (high, LOW)]
        return 0.5 * (torch.log1p(ends[1]) + 1 / (1 + ends[1]) - torch.log1p(ends[0]) - 1 / (1 + ends[0]))

    def slope(variance: Tensor) -> Tensor:
        return 1 / (variance + LOW**2) - 1 / (variance + high**2)

    point = torch.tensor([0.2, -1.0, 2.0], dtype=F64)
    precision = 1 / v + slope(VARIANCES) - slope(v)
    constant = -0.5 * (2 * math.pi * v).log() + log_part(v) - log_part(VARIANCES)
    expected = (constant - 0.5 * point.square() * precision).sum()
    n = 20_000
    x = point.expand(n, 3).clone().requires_grad_()
    for levels in (1, 3):
        values = density.immse(x, levels, seeded())
        (gradient,) = torch.autograd.grad(values.sum(), x)
        assert (values.mean() - expected).abs() < 6 * values.std() / math.sqrt(n)
        assert ((gradient.mean(0) + point * precision).abs() < 6 * gradient.std(0) / math.sqrt(n)).all()
    # Near the exact density: what is left lies below the lowest level.
    assert abs(expected - prior.log_prob(point)) < 0.03


def test_the_denoising_bound_of_a_mixture_is_its_density() -> None:
    """Two points, with plates, 20 000 lanes at 6 standard errors; 2e-3 for what lies beyond the levels."""
    prior = mixture()
    wide = GaussianMixture(prior.weights, prior.means, torch.tensor([0.2, 0.4], dtype=F64), sigma_max=1e3)
    density = PriorDensity(wide, Size([2, 2]), "immse", 1e-3)
    point = torch.tensor([[0.3, 0.2], [-2.0, 1.0]], dtype=F64)
    values = density.immse(point.expand(20_000, 2, 2), 4, seeded())
    room = 6 * float(values.std()) / math.sqrt(20_000) + 2e-3
    assert abs(float(values.mean() - prior.log_prob(point).sum())) < room
    assert room < 0.1


def test_a_worse_denoiser_has_a_lower_bound() -> None:
    """On average over the data: a denoiser that shrinks too much loses what its extra error costs."""
    prior = mixture()
    x = prior.draw((4000,), seeded(1))
    values = []
    for factor in (1.0, 0.9):
        network = DiffusionPrior(
            lambda x, sigma, factor=factor: factor * prior.denoise(x, sigma),
            (2,),
            sigma_min=LOW,
            sigma_max=prior.sigma_max,
            data_std=prior.data_std,
            dtype=F64,
        )
        values.append(PriorDensity(network, Size([2]), "immse", LOW).immse(x, 8, seeded(2)))
    gap = values[0] - values[1]
    assert gap.mean() > 6 * gap.std() / math.sqrt(4000)


def test_the_score_is_the_gradient_and_takes_no_derivative() -> None:
    prior = mixture()
    network = DiffusionPrior(prior.denoise, (2,), sigma_min=LOW, sigma_max=prior.sigma_max, dtype=F64)
    x = prior.draw((3, 2), seeded()).requires_grad_()
    expected = prior.score(x.detach(), LOW)
    for source in (prior, network):
        density = PriorDensity(source, Size([2, 2]), "score", LOW)
        (found,) = torch.autograd.grad(density.surrogate(x, seeded()).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        high = density.at_level(0.5)
        (found,) = torch.autograd.grad(high.surrogate(x, seeded()).sum(), x)
        torch.testing.assert_close(found, prior.score(x.detach(), 0.5), rtol=1e-6, atol=1e-9)
        assert density.at_level(0.0).level == LOW


def test_values() -> None:
    """Exact where there is a density, blurred where it is degenerate; else a function of x alone."""
    prior = mixture()
    x = prior.draw((5, 2), seeded())
    exact = PriorDensity(prior, Size([2, 2]), "immse", LOW)
    torch.testing.assert_close(exact.value(x), prior.log_prob(x).sum(1))
    flat = GaussianMixture(
        torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    )
    degenerate = PriorDensity(flat, Size([2]), "score", LOW)
    torch.testing.assert_close(degenerate.value(x[:, 0]), flat.log_prob_at(x[:, 0], LOW))
    network = DiffusionPrior(prior.denoise, (2,), sigma_min=LOW, sigma_max=prior.sigma_max, dtype=F64)
    estimate = PriorDensity(network, Size([2, 2]), "immse", LOW)
    first = estimate.value(x)
    assert torch.equal(first, estimate.value(x))
    assert not torch.equal(first[1:], estimate.value(x.flip(0)).flip(0)[1:])


def test_values_are_of_the_prior_itself_whatever_the_level_of_the_fit() -> None:
    """5000 lanes at 6 standard errors and 0.02 for what lies below the floor; the level of the fit is off by more."""
    prior = mixture()
    network = DiffusionPrior(prior.denoise, (2,), sigma_min=LOW, sigma_max=20.0, data_std=prior.data_std, dtype=F64)
    density = PriorDensity(network, Size([2]), "immse", 0.5, check=8, floor=LOW)
    point = torch.tensor([-1.5, 0.0], dtype=F64)
    x = point.expand(5000, 2)
    exact = prior.log_prob(point)
    values, rough = density.value(x), density.immse(x, 8, seeded())
    assert (values.mean() - exact).abs() < 6 * values.std() / math.sqrt(5000) + 0.02
    assert (rough.mean() - exact).abs() > 6 * rough.std() / math.sqrt(5000) + 0.02
