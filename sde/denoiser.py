r"""Denoisers D(x, sigma) = E[x_0 | x_0 + sigma n = x], and the wrappers that turn any diffusion network into one.

Conversions, with x_t = alpha_t x_0 + sigma_t eps, s = sigma_t / alpha_t and x = x_t / alpha_t:

    noise     x_0 = x - s eps            velocity  x_0 = (x_t - sigma_t u) / (alpha_t + sigma_t),   u = eps - x_0
    score     x_0 = (x_t + sigma_t^2 score) / alpha_t
    v         x_0 = (alpha_t x_t - sigma_t v) / (alpha_t^2 + sigma_t^2),   v = alpha_t eps - sigma_t x_0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sde.schedule import RectifiedFlow, Schedule

__all__ = [
    "CallCount",
    "Denoiser",
    "EDMDenoiser",
    "EpsDenoiser",
    "ScoreDenoiser",
    "VDenoiser",
    "VelocityDenoiser",
    "call_denoiser",
    "count_calls",
    "noise_levels",
]

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Denoiser(Protocol):
    """E[x_0 | x_0 + sigma n = x] for every row; any callable `(x, sigma)` will do when there are no labels."""

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """Denoise x: (batch, *event) at sigma: 0-d or (batch,); the answer has the shape of x."""
        ...


def call_denoiser(denoiser: Callable[..., Tensor], x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """Call a denoiser, naming the label only when there is one, so that plain `(x, sigma)` callables fit.

    Example:
        >>> call_denoiser(lambda x, sigma: x / (1 + sigma**2), torch.ones(2, 3), torch.tensor(1.0)).mean().item()
        0.5
    """
    return denoiser(x, sigma) if label is None else denoiser(x, sigma, label=label)


def noise_levels(x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
    """Sigma as (batch,) for a network and as (batch, 1, ...) for arithmetic with x, in the dtype of x.

    Raises:
        ValueError: if sigma is neither one level nor one per row.

    Example:
        >>> [tuple(s.shape) for s in noise_levels(torch.zeros(2, 3, 3), 1.0)]
        [(2,), (2, 1, 1)]
    """
    s = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if s.ndim > 1 or (s.ndim == 1 and s.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"sigma has shape {tuple(s.shape)}, but x has {x.shape[0]} rows; give one noise level, or one per row"
        )
    rows = s.expand(x.shape[0])
    return rows, rows.reshape(-1, *[1] * (x.ndim - 1))


class _Wrapper(nn.Module):
    """A network and the coordinate it was trained in."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network


class EDMDenoiser(_Wrapper):
    r"""D = c_skip x + c_out F(c_in x, ln(sigma) / 4, label), the preconditioning of EDM.

    c_skip = sd^2 / (s^2 + sd^2),  c_out = s sd / sqrt(s^2 + sd^2),  c_in = 1 / sqrt(s^2 + sd^2), with sd = sigma_data.

    Args:
        network: maps (x: (batch, *event), noise level: (batch,), label: (batch,) or None) to (batch, *event).
        sigma_data: standard deviation of one entry of the data.

    Source: Karras et al. (2022), table 1 [read].

    Example:
        >>> denoiser = EDMDenoiser(lambda x, level, label: torch.zeros_like(x), sigma_data=1.0)
        >>> denoiser(torch.ones(2, 3), torch.tensor(1.0)).mean().item()
        0.5
    """

    def __init__(self, network: Network, sigma_data: float = 0.5) -> None:
        super().__init__(network)
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise x: (batch, *event) at sigma: 0-d or (batch,)."""
        rows, s = noise_levels(x, sigma)
        total = s.square() + self.sigma_data**2
        output = self.network(x * total.rsqrt(), rows.log() / 4, label)
        return x * (self.sigma_data**2 / total) + output * (s * self.sigma_data * total.rsqrt())

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(s^2 + sd^2) / (s sd)^2, which gives every noise level the same weight at initialisation."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def loss(self, clean: Tensor, sigma: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Weighted squared error of every row, mean over the event; minimise its mean over rows.

        Args:
            clean: (batch, *event) data.
            sigma: (batch,) noise levels, usually exp(N(-1.2, 1.2^2)).
            noise: (batch, *event) standard normal.
            label: (batch,) classes, or None.

        Returns:
            (batch,) losses.
        """
        noisy = clean + sigma.reshape(-1, *[1] * (clean.ndim - 1)) * noise
        error = (self(noisy, sigma, label) - clean).square().flatten(1).mean(1)
        return self.loss_weight(sigma) * error


class _Scheduled(_Wrapper):
    """A network that was trained in the time of a schedule."""

    def __init__(self, network: Network, schedule: Schedule, time_scale: float = 1.0) -> None:
        super().__init__(network)
        self.schedule = schedule
        self.time_scale = time_scale

    def _query(self, x: Tensor, sigma: Tensor | float, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The network's answer at x_t = alpha x, with (s, alpha_t, sigma_t) shaped for arithmetic with x."""
        rows, s = noise_levels(x, sigma)
        t = self.schedule.time(rows)
        column = [-1] + [1] * (x.ndim - 1)
        alpha = self.schedule.alpha(t).reshape(column)
        # s alpha, not sigma(t): exact at the level asked for, and steady when t is close to 0 or 1.
        return self.network(alpha * x, t * self.time_scale, label), s, alpha, s * alpha


class EpsDenoiser(_Scheduled):
    """Denoiser from a network that predicts the noise eps: x_0 = x - s eps.

    Args:
        network: maps (x_t, time * time_scale: (batch,), label) to eps.
        schedule: the schedule that it was trained with.
        time_scale: what the network counts time in, e.g. 999 for DDPM networks of 1000 steps.

    Example:
        >>> from sde.schedule import VariancePreserving
        >>> schedule = VariancePreserving()
        >>> eps = lambda x, t, label: x * schedule.sigma(t)[:, None]          # exact for x_0 ~ N(0, I)
        >>> EpsDenoiser(eps, schedule)(torch.ones(2, 3), 1.0).mean().item()
        0.5
    """

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise x: (batch, *event) at sigma: 0-d or (batch,)."""
        eps, s, _, _ = self._query(x, sigma, label)
        return x - s * eps


class VDenoiser(_Scheduled):
    """Denoiser from a network that predicts v = alpha_t eps - sigma_t x_0.

    Args:
        network: maps (x_t, time * time_scale: (batch,), label) to v.
        schedule: the schedule that it was trained with.
        time_scale: what the network counts time in.

    Source: Salimans & Ho (2022), appendix D [read].

    Example:
        >>> from sde.schedule import VariancePreserving
        >>> zero = VDenoiser(lambda x, t, label: torch.zeros_like(x), VariancePreserving())    # exact for N(0, I)
        >>> round(zero(torch.ones(2, 3), 1.0).mean().item(), 6)
        0.5
    """

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise x: (batch, *event) at sigma: 0-d or (batch,)."""
        v, _, alpha, sigma_t = self._query(x, sigma, label)
        return (alpha.square() * x - sigma_t * v) / (alpha.square() + sigma_t.square())


class ScoreDenoiser(_Scheduled):
    """Denoiser from a network that predicts the score of x_t: x_0 = (x_t + sigma_t^2 score) / alpha_t.

    Args:
        network: maps (x_t, time * time_scale: (batch,), label) to grad log p_t(x_t).
        schedule: the schedule that it was trained with.
        time_scale: what the network counts time in.

    Example:
        >>> from sde.schedule import VariancePreserving
        >>> normal = ScoreDenoiser(lambda x, t, label: -x, VariancePreserving())    # exact for N(0, I)
        >>> round(normal(torch.ones(2, 3), 1.0).mean().item(), 6)
        0.5
    """

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise x: (batch, *event) at sigma: 0-d or (batch,)."""
        score, s, _, sigma_t = self._query(x, sigma, label)
        return x + s * sigma_t * score


class VelocityDenoiser(_Scheduled):
    """Denoiser from a flow-matching network that predicts u = eps - x_0.

    Args:
        network: maps (x_t, time * time_scale: (batch,), label) to u; time 0 is clean. A network with data at time 1
            is wrapped by the caller: `lambda x, t, label: -network(x, 1 - t, label)`.
        schedule: the path that it was trained on.
        time_scale: what the network counts time in.

    Example:
        >>> gaussian = lambda x, t, label: x * ((2 * t - 1) / (t**2 + (1 - t) ** 2))[:, None]    # exact for N(0, I)
        >>> round(VelocityDenoiser(gaussian)(torch.ones(2, 3), 1.0).mean().item(), 6)
        0.5
    """

    def __init__(self, network: Network, schedule: Schedule | None = None, time_scale: float = 1.0) -> None:
        super().__init__(network, RectifiedFlow() if schedule is None else schedule, time_scale)

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise x: (batch, *event) at sigma: 0-d or (batch,)."""
        u, _, alpha, sigma_t = self._query(x, sigma, label)
        return (alpha * x - sigma_t * u) / (alpha + sigma_t)


@dataclass
class CallCount:
    """What a denoiser was asked for while it was counted."""

    calls: int = 0
    """Calls of the denoiser, whatever the batch."""

    evals: int = 0
    """Rows denoised."""

    vjps: int = 0
    """Rows differentiated: vector-Jacobian and Jacobian-vector products made by this package."""


@contextmanager
def count_calls(denoiser: Any) -> Iterator[CallCount]:
    """Count the calls of a prior (`DiffusionPrior`, `GaussianMixture`) or of a torch module inside a `with` block.

    Args:
        denoiser: a prior, counted in its `denoise`, or a module, counted at its `forward`.

    Raises:
        ValueError: for a plain function, which cannot be watched.

    Example:
        >>> denoiser = EDMDenoiser(lambda x, level, label: x)
        >>> with count_calls(denoiser) as count:
        ...     _ = denoiser(torch.ones(5, 2), 1.0)
        >>> count.calls, count.evals
        (1, 5)
    """
    count = CallCount()
    if hasattr(denoiser, "counters"):
        denoiser.counters.append(count)
        try:
            yield count
        finally:
            # By identity: two counts with equal numbers compare equal.
            denoiser.counters[:] = [c for c in denoiser.counters if c is not count]
    elif isinstance(denoiser, nn.Module):

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            count.calls += 1
            count.evals += args[0].shape[0]

        handle = denoiser.register_forward_hook(hook)
        try:
            yield count
        finally:
            handle.remove()
    else:
        raise ValueError(
            f"expected a prior or a torch module to count, got {type(denoiser).__name__}; "
            "wrap the function in a DiffusionPrior and count that"
        )
