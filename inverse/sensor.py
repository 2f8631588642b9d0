"""What a sensor reports of a noisy value: clipped at the ends of its range, or rounded to its steps.

z ~ N(mu, sigma^2)     Censored: y = min(max(z, low), high)     Quantised: y = step round(z / step), clipped as well

Where y says only that z lies in an interval, its density is log(Phi(b) - Phi(a)), computed in the lighter tail, so that
it keeps its digits and its gradient forty sigma away.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

__all__ = ["Censored", "Quantised", "log_normal_cdf", "log_normal_mass"]

_ROOT_HALF = math.sqrt(0.5)


def log_normal_cdf(x: Tensor) -> Tensor:
    """log Phi(x), accurate in both tails; unlike torch.special.log_ndtr it has a batching rule.

    Example:
        >>> log_normal_cdf(torch.tensor([0.0, -40.0])).int().tolist()
        [0, -804]
    """
    left = x < -1
    low, high = torch.where(left, x, -1.0), torch.where(left, -1.0, x)  # each branch sees what it can bear
    tail = torch.log(0.5 * torch.special.erfcx(-low * _ROOT_HALF)) - 0.5 * low.square()
    return torch.where(left, tail, torch.log1p(-0.5 * torch.special.erfc(high * _ROOT_HALF)))


def log_normal_mass(a: Tensor, b: Tensor) -> Tensor:
    """log(Phi(b) - Phi(a)) for finite a < b, turned so that the tail with the small numbers is used.

    Example:
        >>> log_normal_mass(torch.tensor([-1.0, 39.0]), torch.tensor([1.0, 40.0])).int().tolist()
        [0, -765]
    """
    turn = a + b > 0
    a, b = torch.where(turn, -b, a), torch.where(turn, -a, b)
    top = log_normal_cdf(b)
    return top + torch.log(-torch.expm1(log_normal_cdf(a) - top))


class Codes(constraints.Constraint):
    """Multiples of a step in a closed range, up to a thousandth of the step.

    Example:
        >>> Codes(0.5, 0.0, 2.0).check(torch.tensor([1.5, 1.6, 2.5])).tolist()
        [True, False, False]
    """

    def __init__(self, step: float, low: float, high: float) -> None:
        self.step, self.low, self.high = step, low, high
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which values are codes."""
        slack = 1e-3 * self.step
        grid = (value - torch.round(value / self.step) * self.step).abs() <= slack
        return grid & (value >= self.low - slack) & (value <= self.high + slack)

    def __repr__(self) -> str:
        return f"multiples of {self.step:g} in [{self.low:g}, {self.high:g}]"


class _Sensor(TorchDistribution):
    """Location, scale and range; a member says what it reports and how probable that is."""

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = False

    def __init__(
        self,
        loc: float | Tensor,
        scale: float | Tensor,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not low < high:
            raise ValueError(f"the range of a sensor needs low < high, got low {low}, high {high}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.low, self.high = float(low), float(high)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> Any:
        """The same distribution for a larger batch."""
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("loc", "scale")})
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        TorchDistribution.__init__(new, Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _check(self, value: Tensor) -> None:
        if self._validate_args:
            self._validate_sample(value)

    def _noisy(self, sample_shape: Size | list[int] | tuple[int, ...]) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)


class Censored(_Sensor):
    """A normal value clipped to [low, high]: what lies beyond is reported as the end of the range.

    log p(y) = log N(y; mu, sigma) inside, log Phi((low - mu) / sigma) at low, log Phi((mu - high) / sigma) at high:
    a density inside and point masses at the ends.

    Args:
        loc: mu, (*batch).
        scale: sigma, positive.
        low: lower end of the range; -inf for none.
        high: upper end; inf for none.
        validate_args: as in all distributions.

    Raises:
        ValueError: low is not below high.

    Source: Tobin (1958) [inferred].

    Example:
        >>> float(Censored(0.0, 1.0, high=0.0).log_prob(torch.tensor(0.0)).exp())
        0.5
    """

    @property
    def support(self) -> Any:
        """The closed range."""
        return constraints.interval(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        """Density inside the range, log of the mass at its ends."""
        self._check(value)
        z = (value - self.loc) / self.scale
        inside = -0.5 * z.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)
        inside = torch.where(value <= self.low, log_normal_cdf(z), inside)
        return torch.where(value >= self.high, log_normal_cdf(-z), inside)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """A noisy value, clipped."""
        with torch.no_grad():
            return self._noisy(sample_shape).clamp(self.low, self.high)


class Quantised(_Sensor):
    """A normal value rounded to the nearest multiple of step, as an analogue-to-digital converter reports it.

    log p(y) = log(Phi((y + step / 2 - mu) / sigma) - Phi((y - step / 2 - mu) / sigma)); the first and the last code
    take all that lies beyond.

    Args:
        loc: mu, (*batch).
        scale: sigma, positive.
        step: distance of two codes.
        low: first code, a multiple of step; -inf for none.
        high: last code, a multiple of step; inf for none.
        validate_args: as in all distributions.

    Raises:
        ValueError: step is not positive, or low and high are not multiples of it with low below high.

    Source: [derived].

    Example:
        >>> codes = torch.arange(-2.0, 3.0)
        >>> Quantised(0.3, 0.5, low=-2.0, high=2.0).log_prob(codes).exp().sum()
        tensor(1.)
    """

    def __init__(
        self,
        loc: float | Tensor,
        scale: float | Tensor,
        step: float = 1.0,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not (step > 0 and math.isfinite(step)):
            raise ValueError(f"step must be positive and finite, got {step}")
        for name, end in (("low", low), ("high", high)):
            if math.isfinite(end) and abs(end / step - round(end / step)) > 1e-6:
                raise ValueError(f"{name} must be a multiple of step {step}, got {end}")
        self.step = float(step)
        super().__init__(loc, scale, low, high, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Multiples of the step, from the first code to the last."""
        return Codes(self.step, self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability of a code."""
        self._check(value)
        a = (value - 0.5 * self.step - self.loc) / self.scale
        b = (value + 0.5 * self.step - self.loc) / self.scale
        mass = log_normal_mass(a, b)
        mass = torch.where(value < self.low + 0.5 * self.step, log_normal_cdf(b), mass)
        return torch.where(value > self.high - 0.5 * self.step, log_normal_cdf(-a), mass)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """A noisy value, rounded and clipped."""
        with torch.no_grad():
            return (torch.round(self._noisy(sample_shape) / self.step) * self.step).clamp(self.low, self.high)
