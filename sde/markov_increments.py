r"""Increments of the Markov approximation on a regular grid, with their exact density: what an inferred H is judged by.

    x = L eps + P Y(0),   L_nj = kappa_{n-j},   kappa_0 = sum_k w_k g_k,   kappa_m = -sum_k w_k g_k (1 - l_k) l_k^(m-1)

with Y_k+ = l_k Y_k + g_k eps and P_nk = -w_k (1 - l_k) l_k^n. L^-1 is the power series 1 / kappa, so that with
Q = L^-1 P F, F F' the covariance of Y(0) (type I; 0 for type II), and e = L^-1 x,

    log p(x) = log N(e; 0, I + Q Q') - n log kappa_0

costs K convolutions and a K x K factor [derived].
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from sde.incomplete_gamma import constant
from sde.increments import starts_random
from sde.markov import MarkovNoise
from sde.toeplitz import convolve

__all__ = ["MarkovIncrements"]


class MarkovIncrements(TorchDistribution):
    r"""n successive increments of a `MarkovNoise` over steps of dt: the approximation's own density of a whole record.

    Beside `FractionalGaussianNoise` it shows what the approximation does to an inferred Hurst index;
    `refitted_noise(hurst, dt, n, kind="I")` is the noise to give it.

    Args:
        noise: with one Hurst index or one for each of a batch; not one that depends on time.
        n: how many increments.
        dt: time between two values.
        scale: standard deviation of an increment over time 1, for a unit noise.

    Raises:
        ValueError: fewer than one increment, steps beyond the noise's horizon, an index that depends on time.

    Example:
        >>> noise = MarkovNoise(0.7, horizon=64.0, kind="I")
        >>> law = MarkovIncrements(noise, 64)
        >>> law.sample().shape, bool(law.log_prob(torch.zeros(64)) > -64)
        (torch.Size([64]), True)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        noise: MarkovNoise,
        n: int,
        dt: float = 1.0,
        scale: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a positive integer, the number of increments, got {n!r}")
        if callable(noise.hurst):
            raise ValueError("the increments of a Hurst index that depends on time are not stationary; use sde.Path")
        if not (dt > 0 and n * dt <= noise.horizon * (1 + 1e-9)):
            raise ValueError(
                f"{n} steps of {dt:g} leave the noise's horizon of {noise.horizon:g}; give "
                f"MarkovNoise(..., horizon={n * dt:g})"
            )
        self.noise, self.n, self.dt = noise, n, dt
        weights = noise.weights(dtype=torch.float64)
        scale = torch.as_tensor(scale, dtype=noise.dtype)
        batch = torch.broadcast_shapes(weights.shape[:-1], scale.shape)
        self.weights, self.scale = weights.expand(*batch, -1), scale.expand(batch)
        super().__init__(batch, Size([n]), validate_args=validate_args)

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> MarkovIncrements:
        """The same law with the batch shape widened."""
        new = self._get_checked_instance(MarkovIncrements, _instance)
        shape = Size(batch_shape)
        new.noise, new.n, new.dt = self.noise, self.n, self.dt
        new.weights, new.scale = self.weights.expand(*shape, -1), self.scale.expand(shape)
        super(MarkovIncrements, new).__init__(shape, self.event_shape, validate_args=False)
        return new

    @cached_property
    def _responses(self) -> tuple[Tensor, Tensor]:
        """To a unit of noise, (*batch, n), and of unit weights to a unit of each factor, (K, n): float64."""
        decay, gain = self.noise.transition(self.dt)
        fade = constant(decay[:, None] ** torch.arange(self.n).numpy() * (decay - 1)[:, None], self.weights)
        unit = constant(gain * math.sqrt(self.dt), self.weights)
        later = (self.weights * unit) @ fade[:, : self.n - 1]
        return torch.cat([(self.weights * unit).sum(-1, keepdim=True), later], -1), fade

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, *batch, n) differentiable draws from torch's global generator."""
        return self.draw(Size(sample_shape))

    def draw(self, shape: Size | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """(*shape, *batch, n) draws from an explicit generator; None takes torch's global one."""
        like: dict[str, Any] = {"dtype": self.weights.dtype, "device": self.weights.device, "generator": generator}
        response, fade = self._responses
        x = convolve(response, torch.randn(*shape, *self.batch_shape, self.n, **like))
        if starts_random(self.noise):
            start = torch.randn(*shape, *self.batch_shape, self.noise.size, **like)
            start = start @ constant(self.noise.initial_factor.T, start)
            x = x + (self.weights * start) @ fade
        return x.to(self.scale) * self.scale[..., None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log density of (*, n) increments under the approximation, (*,)."""
        if self._validate_args:
            self._validate_sample(value)
        response, fade = self._responses
        inverse = reciprocal(response)
        white = convolve(inverse, value.double() / self.scale.double()[..., None])
        log_p = -0.5 * white.square().sum(-1) - self.n * (response[..., 0].log() + self.scale.double().log())
        if starts_random(self.noise):
            pull = convolve(inverse[..., None, :], fade) * self.weights[..., None]  # (*batch, K, n)
            pull = constant(self.noise.initial_factor.T, pull) @ pull
            eye = torch.eye(self.noise.size, dtype=pull.dtype, device=pull.device)
            factor = torch.linalg.cholesky(pull @ pull.mT + eye)
            seen = torch.linalg.solve_triangular(factor, pull @ white[..., None], upper=False)
            log_p = log_p + 0.5 * seen.square().sum((-2, -1)) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (log_p - 0.5 * self.n * math.log(2 * math.pi)).to(torch.promote_types(self.scale.dtype, value.dtype))


def reciprocal(series: Tensor) -> Tensor:
    """The first coefficients of 1 / a for a power series a, (*batch, n), by Newton's doubling.

    Example:
        >>> [round(v, 4) for v in reciprocal(torch.tensor([1.0, -0.5, 0.0])).tolist()]
        [1.0, 0.5, 0.25]
    """
    n = series.shape[-1]
    found = 1 / series[..., :1]
    while found.shape[-1] < n:
        size = min(2 * found.shape[-1], n)
        wide = torch.nn.functional.pad(found, (0, size - found.shape[-1]))
        found = 2 * wide - convolve(convolve(series[..., :size], wide), wide)
    return found
