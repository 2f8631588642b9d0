"""The fit of a transition against the Gaussian that minimises the KL divergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Size, Tensor

from inverse.samplers.mean_field import MeanField
from ppl.errors import OptionError

F64 = torch.float64
H = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=F64)
TOWARDS = torch.tensor([1.0, -2.0], dtype=F64)


class Seeded:
    def __init__(self, lanes: int, seed: int = 0) -> None:
        self.lanes, self.generator = lanes, torch.Generator().manual_seed(seed)

    def normal(self, shape: Size | tuple[int, ...]) -> Tensor:
        return torch.randn((self.lanes, *shape), generator=self.generator, dtype=F64)


def slope(x: Tensor) -> Tensor:
    """log g = -(x - t)^T H (x - t) / 2."""
    return (TOWARDS - x) @ H


@pytest.mark.parametrize(("optimizer", "share"), [("sgd", 0.2), ("adam", 1.0)])
def test_long_fits_reach_the_optimum(optimizer: str, share: float) -> None:
    """mean (I / c^2 + H)^{-1} (m / c^2 + H t), variances 1 / (1 / c^2 + H_ii), and not those of the true product.

    For "sgd" H is a fifth as large: the gradients of widths have heavy tails, and shortening them is a bias.

    4000 lanes of 2 entries: the error of a mean is sd / 63, that of a variance 2.2 %; six of them are allowed, and 5 %
    for the fit's own noise.
    """
    c, mean, curved = 0.8, torch.tensor([0.5, 1.0], dtype=F64), share * H
    fit = MeanField(600, 0.02, optimizer)  # type: ignore[arg-type]
    x = fit.draw(mean.expand(4000, 2), c, lambda x: share * slope(x), Seeded(4000))
    precision = torch.eye(2, dtype=F64) / c**2 + curved
    exact = torch.linalg.solve(precision, mean / c**2 + curved @ TOWARDS)
    variance = 1 / precision.diagonal()
    assert bool(((x.mean(0) - exact).abs() < (6 / 63 + 0.05) * variance.sqrt()).all())
    torch.testing.assert_close(x.var(0), variance, rtol=6 * 0.022 + 0.05, atol=0)
    assert abs(float(x.T.corrcoef()[0, 1])) < 0.1


def test_one_step_by_hand() -> None:
    mean, start, c = torch.tensor([[0.5, 1.0], [40.0, 0.0]], dtype=F64), torch.full((2, 2), 0.1, dtype=F64), 0.05
    noise = Seeded(2)
    found = MeanField(1, 0.5, "sgd").draw(mean, c, slope, noise, start)
    again = Seeded(2)
    z, after = again.normal((2,)), again.normal((2,))
    g = c * slope(mean + c * (start + z))
    first, second = start - g, -z * g
    u = start - 0.5 * first / first.norm(dim=1, keepdim=True).clamp(min=1)
    r = -0.5 * second / second.norm(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(found, mean + c * (u + r.exp() * after))
    assert float(first[0].norm()) < 1 < float(first[1].norm())  # one gradient is shortened, the other is not


def test_adam_is_that_of_torch() -> None:
    mean, c = torch.tensor([[0.5, 1.0]], dtype=F64), 0.3
    found = MeanField(7, 0.1, "adam").draw(mean, c, slope, Seeded(1))
    u = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    r = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    adam, noise = torch.optim.Adam([u, r], lr=0.1), Seeded(1)
    for _ in range(7):
        adam.zero_grad()
        x = mean + c * (u + r.exp() * noise.normal((2,)))
        kl = 0.5 * u.square().sum() + 0.5 * ((2 * r).exp() - 2 * r).sum()
        loss = kl + 0.5 * ((x - TOWARDS) @ H * (x - TOWARDS)).sum()
        loss.backward()
        adam.step()
    torch.testing.assert_close(found, (mean + c * (u + r.exp() * noise.normal((2,)))).detach(), rtol=1e-7, atol=1e-9)


def test_no_step_is_the_transition() -> None:
    mean = torch.ones(3, 2, dtype=F64)
    found = MeanField(0, 1.0, "sgd").draw(mean, 0.5, slope, Seeded(3))
    torch.testing.assert_close(found, mean + 0.5 * Seeded(3).normal((2,)))
    for bad in ((-1, 1.0, "sgd"), (1, 0.0, "sgd"), (1, math.nan, "sgd"), (1, 1.0, "lbfgs")):
        with pytest.raises(OptionError):
            MeanField(*bad)
