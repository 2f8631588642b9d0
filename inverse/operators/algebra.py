"""New operators from old ones: A @ B, A + B, c A, and A over B."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inverse.operators.base import LinearOperator
from inverse.operators.decomposition import SVD
from inverse.operators.events import flatten_event, numel
from ppl.errors import OptionError, ShapeError

__all__ = ["Compose", "Scaled", "Stack", "Sum", "stack"]


def _require_linear(*parts: LinearOperator) -> None:
    for part in parts:
        if not part.linear:
            raise OptionError(
                f"{type(part).__name__} was not declared linear, so it cannot be combined; say linear=True"
            )


class Compose(LinearOperator):
    """(A B) x = A (B x), adjoint B^T A^T. Written `A @ B`.

    Example:
        >>> from inverse.operators import Dense
        >>> A = Dense(torch.tensor([[1.0, 2.0]])) @ Dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> A.dense(dtype=torch.float32)
        tensor([[2., 1.]])
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        _require_linear(outer, inner)
        if outer.in_shape != inner.out_shape:
            raise ShapeError(
                f"cannot compose: {type(inner).__name__} returns {inner.out_shape}, but {type(outer).__name__} expects "
                f"{outer.in_shape}; build the outer operator for the shape that the inner one returns"
            )
        super().__init__(inner.in_shape, outer.out_shape)
        self.outer, self.inner = outer, inner
        self.structure = frozenset({"diagonal"}) & outer.structure & inner.structure

    def forward(self, x: Tensor) -> Tensor:
        """A (B x)."""
        return self.outer.forward(self.inner.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """B^T (A^T y)."""
        self.check_shape(y, self.out_shape, "data")
        return self.inner.adjoint(self.outer.adjoint(y))


class Sum(LinearOperator):
    """(A + B) x = A x + B x. Written `A + B`."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        _require_linear(left, right)
        if (left.in_shape, left.out_shape) != (right.in_shape, right.out_shape):
            raise ShapeError(
                f"cannot add {type(left).__name__} from {left.in_shape} to {left.out_shape} and {type(right).__name__} "
                f"from {right.in_shape} to {right.out_shape}; both shapes must agree"
            )
        super().__init__(left.in_shape, left.out_shape)
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """A x + B x."""
        return self.left.forward(x) + self.right.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y + B^T y."""
        self.check_shape(y, self.out_shape, "data")
        return self.left.adjoint(y) + self.right.adjoint(y)


class Scaled(LinearOperator):
    """(c A) x = c (A x), c a number. Written `c * A`.

    Args:
        operator: A.
        factor: c, finite; a 0-d tensor may be learned or traced.
    """

    factor: Tensor

    def __init__(self, operator: LinearOperator, factor: float | Tensor) -> None:
        _require_linear(operator)
        value = factor if isinstance(factor, Tensor) else torch.tensor(float(factor), dtype=torch.float64)
        if value.ndim:
            raise ShapeError(f"a scalar multiple takes a number, got shape {tuple(value.shape)}; use Diagonal(...) @ A")
        super().__init__(operator.in_shape, operator.out_shape)
        self.operator = operator
        self.register_buffer("factor", value.to(operator._device()))
        self.structure = operator.structure

    @property
    def gram_scale(self) -> Tensor | None:
        """c^2 times that of A."""
        inner = self.operator.gram_scale
        return None if inner is None else self.factor.square() * inner

    def forward(self, x: Tensor) -> Tensor:
        """The forward map times c."""
        return self.factor.to(x) * self.operator.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """The adjoint times c."""
        self.check_shape(y, self.out_shape, "data")
        return self.factor.to(y) * self.operator.adjoint(y)

    def compute_svd(self) -> SVD:
        """The singular values of A times |c|; the sign goes to U."""
        if "svd" not in self.operator.capabilities:
            return super().compute_svd()
        inner, factor = self.operator.svd(), self.factor.double()
        if factor == 0:
            none = torch.zeros(0, dtype=torch.float64, device=factor.device)
            return SVD(
                none,
                lambda x: inner.to_spectral(x)[..., :0],
                lambda z: inner.from_spectral(z.new_zeros(*z.shape[:-1], inner.rank)),
                lambda y: inner.to_spectral_data(y)[..., :0],
                lambda z: inner.from_spectral_data(z.new_zeros(*z.shape[:-1], inner.rank)),
            )
        sign = factor.sign()
        return SVD(
            inner.s * factor.abs(),
            inner.to_spectral,
            inner.from_spectral,
            lambda y: sign.to(y) * inner.to_spectral_data(y),
            lambda z: inner.from_spectral_data(sign.to(z) * z),
        )


class Stack(LinearOperator):
    """Several operators on one x: (A x, B x, ...) flattened and joined into one vector.

    Example:
        >>> from inverse.operators import Downsample, Identity
        >>> stack(Identity((2, 2)), Downsample(2, (2, 2)))(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        tensor([1., 2., 3., 6., 3.])
    """

    def __init__(self, *parts: LinearOperator) -> None:
        if not parts:
            raise OptionError("stack needs one operator or more, got none")
        _require_linear(*parts)
        shapes = {part.in_shape for part in parts}
        if len(shapes) > 1:
            raise ShapeError(
                f"stacked operators must act on one shape, got {sorted(shapes)}; rebuild them for one shape"
            )
        self_sizes = [numel(part.out_shape) for part in parts]
        super().__init__(parts[0].in_shape, (sum(self_sizes),))
        self.parts = nn.ModuleList(parts)
        self.sizes = self_sizes
        if all("diagonal" in part.structure for part in parts):
            self.structure = frozenset({"diagonal"})

    def _members(self) -> list[LinearOperator]:
        return [part for part in self.parts if isinstance(part, LinearOperator)]

    def forward(self, x: Tensor) -> Tensor:
        """The joined outputs, (*batch, total)."""
        return torch.cat([flatten_event(part.forward(x), len(part.out_shape)) for part in self._members()], -1)

    def adjoint(self, y: Tensor) -> Tensor:
        """Sum of the adjoints of the pieces."""
        self.check_shape(y, self.out_shape, "data")
        pieces = torch.split(y, self.sizes, -1)
        terms = [
            part.adjoint(piece.reshape((*piece.shape[:-1], *part.out_shape)))
            for part, piece in zip(self._members(), pieces, strict=True)
        ]
        return torch.stack(terms).sum(0)


def stack(*parts: LinearOperator) -> Stack:
    """Join operators that see the same x: stack(A, B) x = (A x, B x) as one vector.

    Args:
        parts: operators with one common in_shape.

    Returns:
        An operator with out_shape (sum of sizes,).
    """
    return Stack(*parts)
