r"""Several sources in one measurement: (A, B)(x_1, x_2) = A x_1 + B x_2 on the joined vector, the row [A B]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inverse.operators.algebra import Scaled, _require_linear
from inverse.operators.base import LinearOperator
from inverse.operators.decomposition import SVD
from inverse.operators.dense import Dense
from inverse.operators.events import flatten_event, numel
from ppl.errors import OptionError, ShapeError

__all__ = ["Beside", "Zero", "beside"]


class Beside(LinearOperator):
    """[A B ...] x = A x_1 + B x_2 + ..., where x joins the flattened x_i.

    Multiples of one and the same operator keep its decomposition: [c A, e A] has singular values sqrt(c^2 + e^2) s.

    Example:
        >>> from inverse.operators import Identity
        >>> beside(Identity((2,)), Dense(torch.tensor([[1.0], [3.0]])))(torch.tensor([10.0, 20.0, 1.0]))
        tensor([11., 23.])
    """

    def __init__(self, *parts: LinearOperator) -> None:
        if not parts:
            raise OptionError("beside needs one operator or more, got none")
        _require_linear(*parts)
        shapes = {part.out_shape for part in parts}
        if len(shapes) > 1:
            raise ShapeError(
                f"operators side by side must return one shape, got {sorted(shapes)}; their results are added"
            )
        sizes = [numel(part.in_shape) for part in parts]
        super().__init__((sum(sizes),), parts[0].out_shape)
        self.parts = nn.ModuleList(parts)
        self.sizes = sizes
        common = _common(parts)
        if common is not None and "fast_svd" in common[0].capabilities:
            self.structure = frozenset({"fast_svd"})

    def _members(self) -> list[LinearOperator]:
        return [part for part in self.parts if isinstance(part, LinearOperator)]

    @property
    def gram_scale(self) -> float | Tensor | None:
        """Sum of those of the parts."""
        scales = [part.gram_scale for part in self._members()]
        if any(scale is None for scale in scales):
            return None
        return torch.stack([torch.as_tensor(s, dtype=torch.float64, device=self._device()) for s in scales]).sum()

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the parts' outputs, (*batch, *out_shape)."""
        pieces = zip(self._members(), x.split(self.sizes, -1), strict=True)
        return torch.stack([p.forward(v.reshape(*v.shape[:-1], *p.in_shape)) for p, v in pieces]).sum(0)

    def adjoint(self, y: Tensor) -> Tensor:
        """The parts' adjoints, joined."""
        self.check_shape(y, self.out_shape, "data")
        return torch.cat([flatten_event(p.adjoint(y), len(p.in_shape)) for p in self._members()], -1)

    def compute_svd(self) -> SVD:
        """That of the common operator, where all parts are multiples of one."""
        common = _common(self._members())
        if common is None or "svd" not in common[0].capabilities:
            return super().compute_svd()
        operator, factors = common
        inner, norm = operator.svd(), math.hypot(*factors)
        share = [c / norm for c in factors]
        shape = operator.in_shape

        def to_spectral(x: Tensor) -> Tensor:
            pieces = zip(share, x.split(self.sizes, -1), strict=True)
            return torch.stack([c * inner.to_spectral(v.reshape(*v.shape[:-1], *shape)) for c, v in pieces]).sum(0)

        def from_spectral(z: Tensor) -> Tensor:
            one = flatten_event(inner.from_spectral(z), len(shape))
            return torch.cat([c * one for c in share], -1)

        return SVD(inner.s * norm, to_spectral, from_spectral, inner.to_spectral_data, inner.from_spectral_data)


def beside(*parts: LinearOperator) -> LinearOperator:
    """The row [A B ...] of operators that return one shape; a matrix where all parts are matrices.

    Args:
        parts: operators with one common out_shape.

    Returns:
        An operator with in_shape (sum of sizes,).
    """
    if parts and all(isinstance(part, Dense) for part in parts) and len({part.out_shape for part in parts}) == 1:
        matrix = torch.cat([part.matrix for part in parts if isinstance(part, Dense)], 1)
        return Dense(matrix, out_shape=parts[0].out_shape)
    return Beside(*parts)


def _common(parts: tuple[LinearOperator, ...] | list[LinearOperator]) -> tuple[LinearOperator, list[float]] | None:
    """The operator that all parts are multiples of, with the factors; None where there is none."""
    found = [_unscaled(part) for part in parts]
    first = found[0][0]
    factors = [c for _, c in found]
    same = all(operator is first or _same(operator, first) for operator, _ in found)
    return (first, factors) if same and any(factors) else None


def _unscaled(operator: LinearOperator) -> tuple[LinearOperator, float]:
    factor = 1.0
    while isinstance(operator, Scaled) and not operator.factor.requires_grad:
        factor, operator = factor * float(operator.factor), operator.operator
    return operator, factor


def _same(a: LinearOperator, b: LinearOperator) -> bool:
    """Whether two operators with no tensors of their own are the same map; identities are made anew by each reader."""
    from inverse.operators.mask import Identity

    return isinstance(a, Identity) and isinstance(b, Identity) and a.in_shape == b.in_shape


class Zero(LinearOperator):
    """A x = 0: a source that a measurement does not see.

    Example:
        >>> Zero((3,), (2,))(torch.ones(3))
        tensor([0., 0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zeros, (*batch, *out_shape)."""
        return x.new_zeros((*x.shape[: x.ndim - len(self.in_shape)], *self.out_shape))

    def adjoint(self, y: Tensor) -> Tensor:
        """Zeros, (*batch, *in_shape)."""
        self.check_shape(y, self.out_shape, "data")
        return y.new_zeros((*y.shape[: y.ndim - len(self.out_shape)], *self.in_shape))
