"""Wrappers against an exact denoiser: each network is built from the closed form in its own coordinate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sde import (
    Cosine,
    DiffusionPrior,
    EDMDenoiser,
    EpsDenoiser,
    GaussianMixture,
    RectifiedFlow,
    Schedule,
    ScoreDenoiser,
    VarianceExploding,
    VariancePreserving,
    VDenoiser,
    VelocityDenoiser,
    count_calls,
)
from sde.testing import check_denoiser

F64 = torch.float64
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-1.0, 0.5, 0.0], [1.0, 0.0, 2.0]], dtype=F64),
    torch.tensor([0.2, 0.5], dtype=F64),
)
SCHEDULES = [VariancePreserving(), Cosine(), VarianceExploding(), RectifiedFlow()]


def network(schedule: Schedule, output: str, scale: float = 1.0) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The exact network of MIXTURE in the coordinates of a schedule."""

    def answer(x_t: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        t = time / scale
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x_0 = MIXTURE.denoise(x_t / alpha, schedule.noise_to_signal(t))
        eps = (x_t - alpha * x_0) / sigma
        return {"eps": eps, "v": alpha * eps - sigma * x_0, "score": -eps / sigma, "velocity": eps - x_0}[output]

    return answer


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("wrapper", "output"),
    [(EpsDenoiser, "eps"), (VDenoiser, "v"), (ScoreDenoiser, "score"), (VelocityDenoiser, "velocity")],
)
def test_wrappers_recover_the_denoiser(wrapper: type, output: str, schedule: Schedule) -> None:
    x = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * 3
    sigma = torch.tensor([0.02, 0.1, 0.7, 2.0, 9.0, 30.0], dtype=F64)
    denoiser = wrapper(network(schedule, output, 999.0), schedule, time_scale=999.0)
    torch.testing.assert_close(denoiser(x, sigma), MIXTURE.denoise(x, sigma), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(denoiser(x, 0.7), MIXTURE.denoise(x, 0.7), rtol=1e-8, atol=1e-8)


def test_edm_preconditioning_and_loss() -> None:
    """With the network that inverts the preconditioning the loss is that of the exact denoiser, weighted."""
    sd = 0.6

    def exact(x_in: Tensor, level: Tensor, label: Tensor | None) -> Tensor:
        s = (4 * level).exp()[:, None]
        total = s**2 + sd**2
        x = x_in * total.sqrt()
        return (MIXTURE.denoise(x, s[:, 0]) - sd**2 / total * x) * total.sqrt() / (s * sd)

    denoiser = EDMDenoiser(exact, sigma_data=sd)
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(5, 3, dtype=F64, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.01, 0.1, 1.0, 5.0, 40.0], dtype=F64)
    torch.testing.assert_close(denoiser(x, sigma), MIXTURE.denoise(x, sigma), rtol=1e-9, atol=1e-9)
    error = (MIXTURE.denoise(x + sigma[:, None] * noise, sigma) - x).square().mean(1)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    torch.testing.assert_close(denoiser.loss(x, sigma, noise), weight * error, rtol=1e-7, atol=1e-9)


class Blur(nn.Module):
    """A small network with a class embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.embedding = nn.Embedding(3, 6)

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None) -> Tensor:
        shift = 0.0 if label is None else self.embedding(label).reshape(x.shape)
        return torch.tanh(self.linear(x.flatten(1)).reshape(x.shape) + level.reshape(-1, 1, 1) + shift)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("label", [None, 2])
def test_contract_of_wrappers(dtype: torch.dtype, label: int | None) -> None:
    schedule = VariancePreserving()
    for denoiser in (
        EDMDenoiser(Blur()),
        EpsDenoiser(Blur(), schedule),
        VDenoiser(Blur(), schedule),
        ScoreDenoiser(Blur(), schedule),
        VelocityDenoiser(Blur()),
    ):
        check_denoiser(denoiser.to(dtype), (2, 3), dtype=dtype, label=label)


def test_contract_of_a_mixture_and_a_prior() -> None:
    check_denoiser(MIXTURE.denoise, (3,), dtype=F64)
    check_denoiser(DiffusionPrior(MIXTURE.denoise, (3,), chunk=2).denoise, (3,), dtype=F64)


def column(sigma: Tensor) -> Tensor:
    return sigma.reshape(-1, 1)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (lambda x, sigma: x[:, :2], "gives shape"),
        (lambda x, sigma: x.double(), "gives torch.float64"),
        (lambda x, sigma: x / 0, "not finite"),
        (lambda x, sigma: x - x.mean(0), "a row on its own"),
        (lambda x, sigma: x + torch.rand(()), "two calls disagree"),
        (lambda x, sigma: x / (1 + sigma.max() ** 2), "noise level of other rows"),
        (lambda x, sigma: x * (sigma.ndim + 1), "one level per row"),
        (lambda x, sigma: x.mul_(0.5), "changed in place"),
        (lambda x, sigma: x[:1] + 0 * x if len(x) else x[:0, :0], "empty batch"),
    ],
)
def test_contract_finds_what_is_broken(denoiser: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_denoiser(denoiser, (3,))


def test_calls_are_counted_in_priors_and_modules() -> None:
    module = EDMDenoiser(Blur())
    prior = DiffusionPrior(module, (2, 3), steps=7, chunk=4)
    copy = prior.expand((2,))
    x = torch.zeros(10, 2, 3)
    with count_calls(prior) as outer, count_calls(module) as inner, count_calls(prior) as twin:
        prior.denoise(x, 1.0)
        copy.denoise(x[:1], 1.0)
    assert (outer.calls, outer.evals) == (4, 11) == (inner.calls, inner.evals) == (twin.calls, twin.evals)
    with count_calls(prior) as count:
        prior.draw((3,), torch.Generator().manual_seed(0))
        prior.covariance(x[:2], 1.0).matvec(x[:2])
    assert count.calls == 7 + 2
    assert count.vjps == 4
    prior.denoise(x, 1.0)
    assert count.calls == 9
    with pytest.raises(ValueError, match="wrap the function"), count_calls(lambda x, sigma: x):
        pass


def test_options_of_wrappers_are_checked() -> None:
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        EDMDenoiser(Blur(), sigma_data=0.0)
    with pytest.raises(ValueError, match="one noise level, or one per row"):
        EDMDenoiser(Blur())(torch.zeros(3, 2, 3), torch.ones(2))
