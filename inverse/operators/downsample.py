"""Average pooling: super-resolution.

The blocks do not overlap, so A A^T = I / factor^2 and every singular value is 1 / factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.decomposition import SVD
from inverse.operators.events import event_shape, flatten_event, numel
from ppl.errors import ShapeError
from ppl.option_checks import whole_number

__all__ = ["Downsample"]


class Downsample(LinearOperator):
    """(A x)_ij = mean of x over block (i, j) of factor by factor pixels.

    Args:
        factor: side of a block, one or more.
        in_shape: (*channels, height, width), both divisible by factor.

    Example:
        >>> Downsample(2, (2, 4))(torch.arange(8.0).reshape(2, 4))
        tensor([[2.5000, 4.5000]])
    """

    structure = frozenset({"fast_svd"})

    def __init__(self, factor: int, in_shape: tuple[int, ...]) -> None:
        factor = whole_number("factor", factor, 1)
        in_shape = event_shape(in_shape)
        if len(in_shape) < 2 or in_shape[-1] % factor or in_shape[-2] % factor:
            raise ShapeError(
                f"in_shape must end in (height, width) divisible by {factor}, got {tuple(in_shape)}; crop or pad x"
            )
        super().__init__(in_shape, (*in_shape[:-2], in_shape[-2] // factor, in_shape[-1] // factor))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Block means."""
        *lead, h, w = x.shape
        f = self.factor
        return x.reshape(*lead, h // f, f, w // f, f).mean((-3, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        """Each mean spread over its block, divided by factor^2."""
        self.check_shape(y, self.out_shape, "data")
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2) / self.factor**2

    def compute_svd(self) -> SVD:
        """U = I, s = 1 / factor, V = factor A^T."""
        ndim, f = len(self.out_shape), self.factor
        s = torch.full((numel(self.out_shape),), 1 / f, dtype=torch.float64, device=self._device())
        shape = self.out_shape
        return SVD(
            s,
            lambda x: flatten_event(f * self.forward(x), ndim),
            lambda z: f * self.adjoint(z.reshape((*z.shape[:-1], *shape))),
            lambda y: flatten_event(y, ndim),
            lambda z: z.reshape((*z.shape[:-1], *shape)),
        )
