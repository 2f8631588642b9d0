r"""Noise schedules x_t = alpha_t x_0 + sigma_t eps and grids of the noise coordinate s_t = sigma_t / alpha_t.

Everything else in this package works in x_s = x_0 + s n; a schedule is only needed where a network was trained in
another coordinate (`EpsDenoiser`, `VDenoiser`, ...) or where a grid is wanted that is regular in its time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Cosine",
    "RectifiedFlow",
    "Schedule",
    "VarianceExploding",
    "VariancePreserving",
    "edm_grid",
    "log_grid",
]


@runtime_checkable
class Schedule(Protocol):
    """What a noise schedule offers; time runs from 0 (clean) to 1 (noise)."""

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at time t."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t."""
        ...

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t)."""
        ...

    def time(self, s: Tensor) -> Tensor:
        """The t with noise_to_signal(t) = s."""
        ...

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) float64 noise levels s, regular in time, descending, the last exactly 0."""
        ...


def _check_steps(steps: int) -> None:
    """Refuse anything but a positive whole number of steps."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")


def _check_levels(sigma_max: float, sigma_min: float) -> None:
    """Refuse noise levels that are not finite, positive and ordered."""
    if not (math.isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max < inf, got sigma_min={sigma_min} and sigma_max={sigma_max}; "
            "sigma_max should be about 5 times the spread of the data, sigma_min well below its smallest detail"
        )


def _regular_in_time(schedule: Schedule, steps: int, t_min: float, t_max: float) -> Tensor:
    """Noise levels at `steps` equal times from t_max down to t_min, then 0."""
    _check_steps(steps)
    t = torch.linspace(t_max, t_min, steps, dtype=torch.float64)
    return torch.cat([schedule.noise_to_signal(t), t.new_zeros(1)])


@dataclass(frozen=True)
class VariancePreserving:
    r"""log alpha_t = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2,  sigma_t^2 = 1 - alpha_t^2.

    Source: Song et al. (2021), appendix B, the continuous limit of DDPM [read].

    Args:
        beta_min: noise rate at t = 0.
        beta_max: noise rate at t = 1.
        t_min: smallest positive time of `grid`.

    Example:
        >>> schedule = VariancePreserving()
        >>> s = schedule.noise_to_signal(torch.tensor(0.5))
        >>> round(float(schedule.time(s)), 5)
        0.5
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"expected 0 < beta_min < beta_max, got {self.beta_min} and {self.beta_max}")
        if not 0 < self.t_min < 1:
            raise ValueError(f"t_min must lie in (0, 1), got {self.t_min}")

    def _log_alpha(self, t: Tensor) -> Tensor:
        """Logarithm of alpha."""
        return -t.square() * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at time t."""
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t."""
        # expm1 keeps the digits near t = 0, where 1 - alpha^2 cancels.
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t)."""
        return torch.sqrt(torch.expm1(-2 * self._log_alpha(t)))

    def time(self, s: Tensor) -> Tensor:
        """The t with noise_to_signal(t) = s; the stable root of a quadratic."""
        half_log = torch.log1p(s.square()) / 2
        half_beta = self.beta_min / 2
        return 2 * half_log / (half_beta + torch.sqrt(half_beta**2 + (self.beta_max - self.beta_min) * half_log))

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) float64 noise levels, regular in time from t = 1 to t_min, then 0."""
        return _regular_in_time(self, steps, self.t_min, 1.0)


@dataclass(frozen=True)
class Cosine:
    r"""alpha_t = cos(theta_t) / cos(theta_0),  theta_t = (t + offset) / (1 + offset) pi / 2, sigma_t^2 = 1 - alpha_t^2.

    Source: Nichol & Dhariwal (2021), equation 17, in continuous time [read].

    Args:
        offset: shift that keeps the first noise levels from being too small.
        t_min: smallest positive time of `grid`.
        t_max: largest time of `grid`; at t = 1 nothing is left of the signal and s is infinite.

    Example:
        >>> bool(Cosine().alpha(torch.tensor(0.0)) == 1)
        True
    """

    offset: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ValueError(f"offset must be zero or more, got {self.offset}")
        if not 0 < self.t_min < self.t_max < 1:
            raise ValueError(f"expected 0 < t_min < t_max < 1, got {self.t_min} and {self.t_max}")

    @property
    def _theta_0(self) -> float:
        """Angle at t = 0."""
        return self.offset / (1 + self.offset) * math.pi / 2

    def _theta(self, t: Tensor) -> Tensor:
        """Angle at time t."""
        return (t + self.offset) / (1 + self.offset) * (math.pi / 2)

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at time t."""
        return torch.cos(self._theta(t)) / math.cos(self._theta_0)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t."""
        # sin^2 a - sin^2 b = sin(a + b) sin(a - b): no cancellation near t = 0.
        excess = t / (1 + self.offset) * (math.pi / 2)
        product = torch.sin(self._theta(t) + self._theta_0) * torch.sin(excess)
        return torch.sqrt(product) / math.cos(self._theta_0)

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t)."""
        return self.sigma(t) / self.alpha(t)

    def time(self, s: Tensor) -> Tensor:
        """The t with noise_to_signal(t) = s."""
        sine = torch.sqrt(s.square() + math.sin(self._theta_0) ** 2)
        theta = torch.atan2(sine, torch.full_like(sine, math.cos(self._theta_0)))
        return theta * (2 / math.pi) * (1 + self.offset) - self.offset

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) float64 noise levels, regular in time from t_max to t_min, then 0."""
        return _regular_in_time(self, steps, self.t_min, self.t_max)


@dataclass(frozen=True)
class VarianceExploding:
    r"""alpha_t = 1,  sigma_t = sigma_min (sigma_max / sigma_min)^t.

    Source: Song et al. (2021), appendix B [read].

    Args:
        sigma_min: noise at t = 0, in units of the data.
        sigma_max: noise at t = 1.

    Example:
        >>> VarianceExploding(0.01, 100.0).grid(2).tolist()
        [100.0, 0.01, 0.0]
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _check_levels(self.sigma_max, self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at time t: 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t)."""
        return self.sigma(t)

    def time(self, s: Tensor) -> Tensor:
        """The t with noise_to_signal(t) = s; negative below sigma_min."""
        return torch.log(s / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) float64 noise levels, regular in time, then 0: the log grid."""
        return log_grid(self.sigma_max, self.sigma_min, steps)


@dataclass(frozen=True)
class RectifiedFlow:
    r"""alpha_t = 1 - t,  sigma_t = t,  so s = t / (1 - t).

    Time follows the diffusion habit: t = 0 is clean, t = 1 is noise. Source: Liu et al. (2023) [read], with time
    reversed.

    Args:
        t_min: smallest positive time of `grid`.
        t_max: largest time of `grid`; s is infinite at t = 1.

    Example:
        >>> RectifiedFlow(t_max=0.75).grid(1).tolist()
        [3.0, 0.0]
    """

    t_min: float = 1e-3
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max < 1:
            raise ValueError(f"expected 0 < t_min < t_max < 1, got {self.t_min} and {self.t_max}")

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at time t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t."""
        return t

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t)."""
        return t / (1 - t)

    def time(self, s: Tensor) -> Tensor:
        """The t with noise_to_signal(t) = s."""
        return s / (1 + s)

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) float64 noise levels, regular in time from t_max to t_min, then 0."""
        return _regular_in_time(self, steps, self.t_min, self.t_max)


def edm_grid(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> Tensor:
    r"""s_i = (s_max^(1/rho) + i / (steps - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho for i < steps, then 0.

    Args:
        sigma_max: first noise level.
        sigma_min: last positive noise level.
        steps: number of solver steps.
        rho: larger values spend more steps at low noise.

    Returns:
        (steps + 1,) float64 levels, descending, on the CPU; the last is exactly 0. With one step: (sigma_max, 0).

    Raises:
        ValueError: if the levels are not positive and ordered, or steps or rho is not positive.

    Source: Karras et al. (2022), equation 5 [read].

    Example:
        >>> edm_grid(80.0, 0.002, 2).tolist()
        [80.0, 0.002, 0.0]
    """
    _check_steps(steps)
    _check_levels(sigma_max, sigma_min)
    if rho <= 0:
        raise ValueError(f"rho must be positive, got {rho}")
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64) ** rho
    return _pinned(ramp, sigma_max, sigma_min)


def log_grid(sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """Levels that are regular in log sigma: the default for posteriors, which need care at low noise.

    Args:
        sigma_max: first noise level.
        sigma_min: last positive noise level.
        steps: number of solver steps.

    Returns:
        (steps + 1,) float64 levels, descending, on the CPU; the last is exactly 0. With one step: (sigma_max, 0).

    Raises:
        ValueError: if the levels are not positive and ordered, or steps is not positive.

    Example:
        >>> [round(s, 6) for s in log_grid(100.0, 0.01, 3).tolist()]
        [100.0, 1.0, 0.01, 0.0]
    """
    _check_steps(steps)
    _check_levels(sigma_max, sigma_min)
    ramp = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()
    return _pinned(ramp, sigma_max, sigma_min)


def _pinned(ramp: Tensor, sigma_max: float, sigma_min: float) -> Tensor:
    """Ends free of rounding, and the exact 0 at the end."""
    if len(ramp) > 1:
        ramp[-1] = sigma_min
    ramp[0] = sigma_max
    return torch.cat([ramp, ramp.new_zeros(1)])
