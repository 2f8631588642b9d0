"""Operators that read entries: the identity, a mask, a diagonal.

For each, A^T A is diagonal in the entries of x, so its decomposition is an index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.events import event_shape, flatten_event, scatter, scatter_index
from ppl.errors import DataError, ShapeError
from ppl.numbers import as_tensor

__all__ = ["Diagonal", "Identity", "Mask"]


class Identity(LinearOperator):
    """A x = x: denoising.

    Args:
        in_shape: shape of one x.

    Example:
        >>> Identity((2,))(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    structure = frozenset({"diagonal"})

    def __init__(self, in_shape: int | tuple[int, ...]) -> None:
        super().__init__(in_shape, in_shape)

    @property
    def gram_scale(self) -> float:
        """A A^T = I."""
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        """A copy of x."""
        return x.clone()

    def adjoint(self, y: Tensor) -> Tensor:
        """A copy of y."""
        self.check_shape(y, self.out_shape, "data")
        return y.clone()


class Diagonal(LinearOperator):
    """(A x)_i = w_i x_i. With w = 1 / sigma it whitens measurements of unequal noise.

    Args:
        weights: (*in_shape) real numbers; zeros are allowed and lower the rank.

    Example:
        >>> Diagonal(torch.tensor([2.0, 0.5])).pinv(torch.tensor([2.0, 2.0]))
        tensor([1., 4.])
    """

    structure = frozenset({"diagonal"})
    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        if not weights.is_floating_point():
            raise DataError(f"weights must be real floating-point numbers, got {weights.dtype}; use Mask for booleans")
        super().__init__(tuple(weights.shape), tuple(weights.shape))
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        """Entrywise product with the weights."""
        return self.weights.to(x) * x

    def adjoint(self, y: Tensor) -> Tensor:
        """Entrywise product with the weights."""
        self.check_shape(y, self.out_shape, "data")
        return self.weights.to(y) * y


class Mask(LinearOperator):
    """A x = the observed entries of x as a vector, in row-major order: inpainting.

    The output holds observed entries only, so noise, residuals and counts of measurements live where data were taken.
    `adjoint` writes a vector back into an image of zeros.

    Args:
        mask: bool, True where observed; broadcast to in_shape.
        in_shape: shape of one x, the shape of mask when None.

    Example:
        >>> A = Mask(torch.tensor([[True, False], [False, True]]))
        >>> A(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([1., 4.])
    """

    structure = frozenset({"diagonal"})
    keep: Tensor
    places: Tensor

    def __init__(self, mask: Tensor, in_shape: int | tuple[int, ...] | None = None) -> None:
        mask = as_tensor(mask)
        if mask.dtype != torch.bool:
            raise DataError(
                f"mask must be boolean, True where observed, got {mask.dtype}; write mask.bool() or mask > 0"
            )
        shape = tuple(mask.shape) if in_shape is None else event_shape(in_shape)
        try:
            flat = torch.broadcast_to(mask, shape).reshape(-1)
        except RuntimeError:
            raise ShapeError(f"mask of shape {tuple(mask.shape)} does not broadcast to in_shape {shape}") from None
        keep = torch.nonzero(flat).squeeze(-1)
        if len(keep) == 0:
            raise DataError("mask observes nothing; at least one entry must be True")
        super().__init__(shape, (len(keep),))
        self.register_buffer("keep", keep)
        self.register_buffer("places", scatter_index(keep, flat.numel()))

    def forward(self, x: Tensor) -> Tensor:
        """Observed entries, (*batch, observed)."""
        return flatten_event(x, len(self.in_shape)).index_select(-1, self.keep)

    @property
    def gram_scale(self) -> float:
        """The observed entries are distinct: A A^T = I."""
        return 1.0

    def adjoint(self, y: Tensor) -> Tensor:
        """Entries back in place, zeros elsewhere."""
        self.check_shape(y, self.out_shape, "data")
        return scatter(y, self.places).reshape((*y.shape[:-1], *self.in_shape))
