"""MAML against gradients by hand and differences."""

from __future__ import annotations

import pytest
import torch
from gaussian_reference import F, hierarchy
from torch import Tensor

from models.meta import MAML, Episodes, Gaussian, mlp
from ppl.errors import DataError, OptionError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scalars() -> Episodes:
    """Support 1 and query 2 for one episode, 3 and 5 for another, of a single weight with input 1."""
    one = torch.ones(2, 1, 1, **F)
    return Episodes(one, torch.tensor([[1.0], [3.0]], **F), one, torch.tensor([[2.0], [5.0]], **F))


@pytest.mark.parametrize("order", ["first", "second"])
def test_gradient_of_one_weight(order: str) -> None:
    """theta' = theta - a (theta - s): the slope of (theta' - q)^2 / 2 has the factor 1 - a for each step, or not."""
    network, likelihood = hierarchy().network, Gaussian(1.0)
    options = MAML(inner_steps=2, inner_lr=0.1, order=order)  # type: ignore[arg-type]
    start = torch.tensor([0.5], **F, requires_grad=True)
    (slope,) = torch.autograd.grad(options.losses(network, likelihood, start, scalars()).mean(), start)
    adapted = torch.tensor([1.0, 3.0], **F) + 0.9**2 * (0.5 - torch.tensor([1.0, 3.0], **F))
    factor = 0.9**2 if order == "second" else 1.0
    assert float(slope) == pytest.approx(float((adapted - torch.tensor([2.0, 5.0], **F)).mean()) * factor)


def test_second_order_gradient_of_a_network() -> None:
    """By central differences of the query loss."""
    network = mlp([1, 4, 1])
    network.module.double()
    x = torch.randn(3, 8, 1, generator=seeded(), **F)
    episodes = Episodes(x[:, :4], x[:, :4, 0].sin(), x[:, 4:], x[:, 4:, 0].sin())
    options = MAML(inner_steps=3, inner_lr=0.2)

    def loss(start: Tensor) -> Tensor:
        return options.losses(network, Gaussian(0.5), start, episodes).mean()

    start = network.start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(start), start)
    for i in (0, 5, 9):
        step = 1e-5 * torch.eye(len(start), **F)[i]
        difference = (loss(start.detach() + step) - loss(start.detach() - step)) / 2e-5
        assert float(slope[i]) == pytest.approx(float(difference), rel=1e-5, abs=1e-8)


def test_training_lowers_the_query_loss() -> None:
    """Lines of random slope: after training, five steps on four points leave little error."""

    def lines(number: int, generator: torch.Generator) -> Episodes:
        x = torch.randn(number, 8, 1, generator=generator)
        y = (2 + torch.randn(number, 1, generator=generator)) * x[..., 0]
        return Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])

    fitted = MAML(inner_steps=5, inner_lr=0.2, steps=100, batch=16, lr=0.05).fit(mlp([1, 1]), Gaussian(1.0), lines)
    new = lines(64, seeded())
    error = (fitted.predict(new).mean - new.query.y).square().mean()
    before = (fitted.predict(new, inner_steps=0).mean - new.query.y).square().mean()
    assert float(error) < 0.5 * float(before)


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="order"):
        MAML(order="third")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="inner_lr"):
        MAML(inner_lr=0.0)
    with pytest.raises(DataError, match="query"):
        MAML(steps=1).fit(mlp([1, 1]), Gaussian(), Episodes(torch.ones(2, 1, 1), torch.ones(2, 1)))
