r"""Fractional Brownian motion of both types and its increments on a regular grid: exact laws.

    type I   (Mandelbrot-Van Ness)    Cov(s, t) = V/2 (t^2H + s^2H - |t - s|^2H),   V = 1 / (Gamma(2H + 1) sin(pi H))
    type II  (Riemann-Liouville)      Cov(s, t) = s^a t^(a-1) / (a Gamma(a)^2) 2F1(1 - a, 1; a + 1; s / t),   s <= t

with a = H + 1/2. Type I has stationary increments and an endless past; type II starts at 0 with nothing before. These
are in the *kernel* normalisation, that of the integral of (t - s)^(a-1) / Gamma(a) against dW; *unit* divides by the
standard deviation at time 1, so that Var B(t) = t^2H.

Source: Mandelbrot and Van Ness (1968) [inferred]; both covariances agree with quadrature of the kernels [derived].
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from sde.davies_harte import davies_harte
from sde.prior import can_look
from sde.toeplitz import stationary_log_density

__all__ = ["FractionalGaussianNoise", "Kind", "check_hurst", "fbm_covariance", "fgn_autocovariance", "unit_scale"]

Kind = Literal["I", "II"]


def check_hurst(hurst: Any, times: Tensor | None = None) -> None:
    """Refuse a Hurst index outside (0, 1), or indices of times; values inside a trace are not looked at."""
    value = torch.as_tensor(hurst)
    if not can_look(value) or bool(((value > 0) & (value < 1)).all()):
        return
    where = ""
    if times is not None and times.shape == value.shape:
        first = int((~((value > 0) & (value < 1))).nonzero()[0])
        hurst, where = float(value[first]), f" at time {float(times[first]):g}"
    raise ValueError(
        f"the Hurst index must lie in (0, 1), got {hurst}{where}; 1/2 is Brownian motion, less is rougher, more "
        "smoother"
    )


def check_kind(kind: str) -> None:
    """Refuse anything but the two types."""
    if kind not in ("I", "II"):
        raise ValueError(f"kind must be 'I' (stationary increments) or 'II' (starts at 0 without a past), got {kind!r}")


def unit_scale(hurst: Tensor | float, kind: Kind) -> Tensor:
    r"""c_H, which takes the kernel normalisation to Var B(t) = t^2H.

    Type I: sqrt(Gamma(2H + 1) sin(pi H)); type II: sqrt(2H) Gamma(H + 1/2) [derived].

    Example:
        >>> unit_scale(0.5, "I").item()
        1.0
    """
    h = torch.as_tensor(hurst, dtype=None if isinstance(hurst, Tensor) else torch.float64)
    if kind == "I":
        return (torch.lgamma(2 * h + 1).exp() * torch.sin(math.pi * h)).sqrt()
    return (2 * h).sqrt() * torch.lgamma(h + 0.5).exp()


def fbm_covariance(s: Tensor, t: Tensor, hurst: Tensor | float, kind: Kind = "I", *, unit: bool = True) -> Tensor:
    """Covariance of fractional Brownian motion at two times.

    Args:
        s: times of at least 0, any shape that broadcasts with t.
        t: times of at least 0.
        hurst: in (0, 1). Type II takes a number without gradient: its hypergeometric function comes from SciPy.
        kind: "I" or "II".
        unit: Var B(1) = 1; otherwise the kernel normalisation.

    Returns:
        The covariance, of the broadcast shape, in float64 for type II.

    Example:
        >>> round(fbm_covariance(torch.tensor(0.5), torch.tensor(1.0), 0.7).item(), 6)
        0.5
    """
    check_hurst(hurst)
    check_kind(kind)
    if kind == "I":
        covariance = (t ** (2 * hurst) + s ** (2 * hurst) - (t - s).abs() ** (2 * hurst)) / 2
        return covariance if unit else covariance / unit_scale(hurst, "I") ** 2
    from scipy.special import gamma, hyp2f1

    h = float(hurst)
    low, high = torch.minimum(s, t).double(), torch.maximum(s, t).double()
    ratio = torch.where(high > 0, low / high, 0.0)
    series = torch.as_tensor(hyp2f1(0.5 - h, 1.0, h + 1.5, ratio.cpu().numpy()), dtype=torch.float64, device=low.device)
    # s^a t^(a-1) is 0 at s = 0, where the second power alone is infinite.
    covariance = low ** (2 * h) * torch.where(high > 0, ratio, 1.0) ** (0.5 - h) / (h + 0.5) * series
    return covariance * (2 * h if unit else 1 / gamma(h + 0.5) ** 2)


def fgn_autocovariance(lags: Tensor, hurst: Tensor | float) -> Tensor:
    """rho(k) = (|k + 1|^2H + |k - 1|^2H - 2 |k|^2H) / 2, of increments over unit steps.

    Args:
        lags: k, any shape.
        hurst: in (0, 1); more than one value broadcasts against the lags.

    Returns:
        The covariance of two increments k steps apart; 1 at lag 0.

    Example:
        >>> fgn_autocovariance(torch.arange(3.0), 0.5).tolist()
        [1.0, 0.0, 0.0]
    """

    def power(x: Tensor) -> Tensor:  # 0^2H has no second derivative by H where torch forms it from log 0
        return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x.abs()) ** (2 * hurst))

    return (power(lags + 1) + power(lags - 1) - 2 * power(lags)) / 2


class FractionalGaussianNoise(TorchDistribution):
    r"""n successive increments of fractional Brownian motion of type I, exactly.

    x ~ N(0, scale^2 dt^2H R),  R_ij = rho(i - j)

    `log_prob` takes n^2 operations, in float64, and has first and second derivatives in everything
    (`sde.whittle_log_likelihood` takes n log n); draws are by Davies and Harte, n log n.

    Args:
        hurst: in (0, 1), a number or a tensor of the batch shape.
        n: how many increments.
        dt: time between two values.
        scale: standard deviation of an increment over time 1.

    Raises:
        ValueError: a Hurst index outside (0, 1), or fewer than one increment.

    Example:
        >>> noise = FractionalGaussianNoise(0.7, 64)
        >>> noise.sample().shape, bool(noise.log_prob(torch.zeros(64)) > -64)
        (torch.Size([64]), True)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"hurst": constraints.unit_interval, "scale": constraints.positive}
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        hurst: Tensor | float,
        n: int,
        dt: float = 1.0,
        scale: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        check_hurst(hurst)
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a positive integer, the number of increments, got {n!r}")
        if not dt > 0:
            raise ValueError(f"dt must be positive, the time between two values, got {dt!r}")
        dtype = next((v.dtype for v in (hurst, scale) if isinstance(v, Tensor)), torch.get_default_dtype())
        self.hurst, self.scale = torch.broadcast_tensors(
            torch.as_tensor(hurst, dtype=dtype), torch.as_tensor(scale, dtype=dtype)
        )
        self.n, self.dt = n, dt
        super().__init__(self.hurst.shape, torch.Size([n]), validate_args=validate_args)

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> FractionalGaussianNoise:
        """The same noise with the batch shape widened."""
        shape = Size(batch_shape)
        return FractionalGaussianNoise(
            self.hurst.expand(shape), self.n, self.dt, self.scale.expand(shape), validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return self.hurst.new_zeros(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """scale^2 dt^2H, for every increment."""
        return (self._step**2).unsqueeze(-1).expand(self.batch_shape + self.event_shape)

    @property
    def _step(self) -> Tensor:
        """Standard deviation of one increment."""
        return self.scale * self.dt**self.hurst

    @torch.no_grad()
    def draw(self, shape: Size | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """(*shape, *batch, n) exact draws from an explicit generator; None takes torch's global one."""
        like = {"dtype": self.hurst.dtype, "device": self.hurst.device}
        noise = torch.randn(2, *shape, *self.batch_shape, 2 * self.n, generator=generator, **like)
        lags = torch.arange(self.n + 1, **like)
        return self._step[..., None] * davies_harte(fgn_autocovariance(lags, self.hurst[..., None]), noise)[0]

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, *batch, n) exact draws from torch's global generator, as Pyro wants them."""
        return self.draw(Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log density of (*, n) increments, (*,)."""
        if self._validate_args:
            self._validate_sample(value)
        h = self.hurst.double()
        table = fgn_autocovariance(torch.arange(self.n, dtype=h.dtype, device=h.device), h[..., None])
        found = stationary_log_density(table, value, self.scale.double() * self.dt**h)
        return found.to(torch.promote_types(self.hurst.dtype, value.dtype))
