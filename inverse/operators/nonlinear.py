"""Measurements that are no linear map: the base of phase retrieval, clipping, compression and scattering.

They are called like linear operators and have the same shapes and batches, but no adjoint: a guide takes the
vector-Jacobian product at its own point instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from ppl.errors import CapabilityError, OptionError

__all__ = ["Clip", "GammaBlur", "NonlinearOperator", "SaturatingBlur"]


class NonlinearOperator(LinearOperator):
    """A differentiable map between tensors of fixed shape, with leading batch axes; declares linear=False.

    A member writes `forward`. Guides, particles and NoiseSpace read it through the program like any function.

    Example:
        >>> A = Clip((2,), -1.0, 1.0)
        >>> A.linear, A.capabilities
        (False, frozenset())
    """

    linear = False

    def adjoint(self, y: Tensor) -> Tensor:
        """There is none.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(
            f"{type(self).__name__} is not linear, so it has no adjoint; use its vector-Jacobian product at a point, "
            "torch.func.vjp(A, x)"
        )

    def pinv(self, y: Tensor, *, rcond: float | None = None) -> Tensor:
        """There is none.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(f"{type(self).__name__} is not linear, so it has no pseudo-inverse")

    def solve_gram(
        self,
        r: Tensor,
        noise_var: float | Tensor,
        prior_var: float | Tensor,
        *,
        tolerance: float | None = None,
        max_steps: int | None = None,
    ) -> Tensor:
        """There is none.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(f"{type(self).__name__} is not linear, so it has no gram matrix to solve with")

    def norm(self, *, steps: int = 200) -> Tensor:
        """There is none.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(f"{type(self).__name__} is not linear, so it has no largest singular value")

    def dense(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """There is none.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(
            f"{type(self).__name__} is not linear, so it has no matrix; torch.func.jacrev(A)(x) is one at a point"
        )


class Clip(NonlinearOperator):
    """y = min(max(gain x, low), high): an overexposed picture, as in reconstruction of high dynamic range.

    Clipped entries have zero gradient, so only the noise model and the prior speak for them. Noise before the clipping
    is a censored likelihood instead, which knows that what was clipped lies beyond the edge.

    Args:
        in_shape: shape of one x.
        low: darkest value.
        high: brightest value.
        gain: exposure.

    Source: the high dynamic range task of Mardani et al. (2023) has gain 2 and the range (-1, 1) [inferred].

    Example:
        >>> Clip((3,), -1.0, 1.0, gain=2.0)(torch.tensor([-0.2, 0.4, 0.9]))
        tensor([-0.4000,  0.8000,  1.0000])
    """

    def __init__(
        self, in_shape: int | tuple[int, ...], low: float = -1.0, high: float = 1.0, *, gain: float = 1.0
    ) -> None:
        if not low < high:
            raise OptionError(f"clipping needs low < high, got low {low}, high {high}")
        if not (gain > 0 and math.isfinite(gain)):
            raise OptionError(f"gain must be positive and finite, got {gain}")
        super().__init__(in_shape, in_shape)
        self.low, self.high, self.gain = low, high, gain

    @property
    def limits(self) -> tuple[float, float]:
        """Range of the data without noise."""
        return self.low, self.high

    def forward(self, x: Tensor) -> Tensor:
        """Clipped values."""
        return (self.gain * x).clamp(self.low, self.high)


class SaturatingBlur(NonlinearOperator):
    """y = level tanh(B x / level): a blur seen by a sensor that saturates smoothly; linear for small B x.

    Args:
        blur: B, any linear operator.
        level: largest response, positive.

    Example:
        >>> from inverse.operators import GaussianBlur
        >>> SaturatingBlur(GaussianBlur(1.0, (4, 4)), level=2.0)(torch.full((4, 4), 100.0)).max()
        tensor(2.)
    """

    def __init__(self, blur: LinearOperator, level: float = 1.0) -> None:
        _require_linear(blur)
        if not (level > 0 and math.isfinite(level)):
            raise OptionError(f"level must be positive and finite, got {level}; for no saturation use the blur itself")
        super().__init__(blur.in_shape, blur.out_shape)
        self.blur, self.level = blur, level

    @property
    def limits(self) -> tuple[float, float]:
        """Range of the data without noise."""
        return -self.level, self.level

    def forward(self, x: Tensor) -> Tensor:
        """Blurred, then saturated."""
        return self.level * torch.tanh(self.blur.forward(x) / self.level)


class GammaBlur(NonlinearOperator):
    r"""y = e(B d(x)): light is blurred, but pictures store light to the power 1 / gamma.

    On a picture with values in [low, high], d(x) = u^gamma with u = (x - low) / (high - low), and e is its inverse.
    Both are continued below `toe` by straight lines through the origin with equal values there, as standard transfer
    curves are; without that e has infinite slope in the dark.

    Args:
        blur: B, any linear operator.
        gamma: exponent of the display, one or more; one is the blur itself, up to the offset that B makes of low.
        low: value of black.
        high: value of white.
        toe: light level u^gamma below which both curves are straight, in (0, 1).

    Example:
        >>> from inverse.operators import GaussianBlur
        >>> A = GammaBlur(GaussianBlur(1.0, (4, 4)))
        >>> A(torch.full((4, 4), 0.3)).mean()         # a flat picture stays as it is
        tensor(0.3000)
    """

    def __init__(
        self, blur: LinearOperator, gamma: float = 2.2, *, low: float = -1.0, high: float = 1.0, toe: float = 1e-3
    ) -> None:
        _require_linear(blur)
        if not (gamma >= 1 and math.isfinite(gamma)):
            raise OptionError(f"gamma must be one or more and finite, got {gamma}; use 1 / gamma for the other way")
        if not low < high:
            raise OptionError(f"the range needs low < high, got low {low}, high {high}")
        if not 0 < toe < 1:
            raise OptionError(f"toe must lie in (0, 1), got {toe}")
        super().__init__(blur.in_shape, blur.out_shape)
        self.blur, self.gamma, self.low, self.high, self.toe = blur, gamma, low, high, toe

    def _decode(self, u: Tensor) -> Tensor:
        """Stored value to light."""
        knee = self.toe ** (1 / self.gamma)
        return torch.where(u > knee, u.clamp_min(knee).pow(self.gamma), u * (self.toe / knee))

    def _encode(self, light: Tensor) -> Tensor:
        """Light to stored value."""
        knee = self.toe ** (1 / self.gamma)
        return torch.where(light > self.toe, light.clamp_min(self.toe).pow(1 / self.gamma), light * (knee / self.toe))

    def forward(self, x: Tensor) -> Tensor:
        """Decoded, blurred, encoded."""
        span = self.high - self.low
        return self.low + span * self._encode(self.blur.forward(self._decode((x - self.low) / span)))


def _require_linear(blur: LinearOperator) -> None:
    if not isinstance(blur, LinearOperator) or not blur.linear:
        raise OptionError(f"expected a linear operator such as GaussianBlur(1.0, (28, 28)), got {blur!r}")
