"""Common random numbers for the enumerated states of a sample: plain noise is drawn once for all of them.

The states are extra samples of one batch, state by state; sums over them then differ by what the states do, not by
noise. Draws by rejection (gamma, beta) keep noise of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["SharedNoise"]

FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_)


class SharedNoise(TorchFunctionMode):
    """Inside, `torch.rand`, `bernoulli`, `normal` and tensors filled in place repeat their noise along an axis.

    Args:
        axis: axis of the samples, from the left.
        states: repetitions; the axis is a multiple of it.
    """

    def __init__(self, axis: int, states: int) -> None:
        super().__init__()
        self.axis, self.states = axis, states

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Draw for one state and repeat."""
        kwargs = kwargs or {}
        if func in FILLS and self._fits(args[0].shape):
            one = func(args[0].new_empty(self._one(args[0].shape)), *args[1:], **kwargs)
            return args[0].copy_(self._all(one))
        if func is torch.rand and len(args) == 1 and self._fits(args[0]):
            return self._all(func(self._one(args[0]), **kwargs))
        if func is torch.bernoulli and self._fits(args[0].shape):
            probs = args[0]
            uniform = torch.rand(self._one(probs.shape), dtype=probs.dtype, device=probs.device)
            return (self._all(uniform) < probs).to(probs.dtype)
        if func is torch.normal and isinstance(args[0], Tensor) and self._fits(args[0].shape):
            mean, std = args
            return mean + std * self._all(mean.new_empty(self._one(mean.shape)).normal_())
        return func(*args, **kwargs)

    def _fits(self, shape: Any) -> bool:
        return isinstance(shape, torch.Size) and len(shape) > self.axis and shape[self.axis] % self.states == 0

    def _one(self, shape: torch.Size) -> torch.Size:
        return torch.Size([n // self.states if i == self.axis else n for i, n in enumerate(shape)])

    def _all(self, noise: Tensor) -> Tensor:
        return torch.cat([noise] * self.states, self.axis)
