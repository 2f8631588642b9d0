"""Colour filter arrays: every pixel of a camera measures one of its colours.

(A x)_ij = x_{c(i, j), i, j} with c a pattern that repeats over the image; A A^T = I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.events import event_shape
from ppl.errors import DataError, OptionError, ShapeError

__all__ = ["ColourMosaic"]

_LETTERS = {"R": 0, "G": 1, "B": 2}


class ColourMosaic(LinearOperator):
    """The mosaic of a colour image behind a colour filter array: demosaicing is its inverse problem.

    A mask with a colour axis: entries keep their place in the image, and `adjoint` writes them back into their colour.

    Args:
        in_shape: (*lead, colours, height, width); the colours are (red, green, blue) for a pattern of letters.
        pattern: four letters, row by row, of a two by two Bayer cell ("RGGB", "BGGR", "GRBG", "GBRG"); or an integer
            tensor (rows, columns) of colour numbers for any other cell. It repeats over the image and may be cut at
            its edges.

    out_shape is (*lead, height, width).

    Example:
        >>> A = ColourMosaic((3, 2, 2))
        >>> A(torch.arange(12.0).reshape(3, 2, 2))
        tensor([[ 0.,  5.],
                [ 6., 11.]])
    """

    structure = frozenset({"diagonal"})
    mask: Tensor

    def __init__(self, in_shape: tuple[int, ...], pattern: str | Tensor = "RGGB") -> None:
        in_shape = event_shape(in_shape)
        if len(in_shape) < 3:
            raise ShapeError(f"in_shape must end in (colours, height, width), got {tuple(in_shape)}")
        colours, h, w = in_shape[-3:]
        if isinstance(pattern, str):
            if len(pattern) != 4 or not set(pattern.upper()) <= set(_LETTERS):
                raise OptionError(f'pattern must be four letters of R, G, B such as "RGGB", got {pattern!r}')
            if colours != 3:
                raise ShapeError(f"a pattern of letters needs three colours, got in_shape {tuple(in_shape)}")
            cell = torch.tensor([_LETTERS[letter] for letter in pattern.upper()]).reshape(2, 2)
        else:
            cell = pattern
            if cell.ndim != 2 or cell.numel() == 0 or cell.is_floating_point() or cell.is_complex():
                raise DataError(
                    f"pattern must be integer of shape (rows, columns), got {cell.dtype} of shape {tuple(cell.shape)}"
                )
            if bool((cell < 0).any()) or bool((cell >= colours).any()):
                raise DataError(f"pattern must name colours 0 to {colours - 1}, got {cell.tolist()}")
        super().__init__(in_shape, (*in_shape[:-3], h, w))
        rows, columns = torch.arange(h) % cell.shape[0], torch.arange(w) % cell.shape[1]
        tiled = cell.long().cpu()[rows][:, columns]
        self.register_buffer("mask", tiled == torch.arange(colours)[:, None, None])

    @property
    def gram_scale(self) -> float:
        """Every pixel reads an entry of its own: A A^T = I."""
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        """One colour per pixel, (*batch, *lead, height, width)."""
        # `where` and not a product: what is not measured may be infinite.
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(-3)

    def adjoint(self, y: Tensor) -> Tensor:
        """Each pixel in its own colour, zeros elsewhere."""
        self.check_shape(y, self.out_shape, "data")
        return torch.where(self.mask, y[..., None, :, :], torch.zeros((), dtype=y.dtype, device=y.device))
