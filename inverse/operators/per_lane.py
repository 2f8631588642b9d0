r"""Operators that differ from row to row of a batch, so that many problems go through a network together.

    (A x)_k = A_k x_k,      k: the last batch axis of x (*extra, lanes, *in_shape)

Operators of one kind and structure are merged: scaled, composed, diagonal, dense, and masks, whose rows are padded with
zeros where one observes fewer entries than another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inverse.operators.algebra import Compose, Scaled
from inverse.operators.base import LinearOperator
from inverse.operators.decomposition import SVD
from inverse.operators.dense import Dense
from inverse.operators.events import flatten_event, numel, over_event
from inverse.operators.mask import Diagonal, Identity, Mask
from ppl.errors import CapabilityError

__all__ = ["PerLane", "UnlikeError", "per_lane_operator"]

PROBES = 2


class UnlikeError(CapabilityError):
    """Problems are too unlike each other to be solved in one batch."""


def per_lane_operator(operators: Sequence[LinearOperator], which: Tensor, dtype: torch.dtype) -> LinearOperator:
    """The operator whose row k acts as `operators[which[k]]`; the first of them where all are the same map.

    Args:
        operators: one for each problem.
        which: (lanes,) problem of every row.
        dtype: in which operators are compared at random points.

    Raises:
        UnlikeError: they differ in kind or structure.

    Example:
        >>> masks = [Mask(torch.tensor([True, False])), Mask(torch.tensor([False, True]))]
        >>> per_lane_operator(masks, torch.tensor([0, 1, 1]), torch.float32)(torch.tensor([[1.0, 2.0]] * 3))[:, 0]
        tensor([1., 2., 2.])
    """
    merged = _merge(list(operators), which, dtype)
    if isinstance(merged, PerLane):
        merged.members = tuple(operators)
    return merged


class PerLane(LinearOperator):
    """What operators that differ from lane to lane share.

    Args:
        in_shape: of one x.
        out_shape: of one A x.
        which: (lanes,) problem of every row.
    """

    which: Tensor
    members: tuple[LinearOperator, ...] = ()

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], which: Tensor) -> None:
        super().__init__(in_shape, out_shape)
        self.register_buffer("which", which)

    @property
    def gram_diagonal(self) -> Tensor | None:
        """(lanes, *out_shape) the diagonal of A A^T where that is all there is of it."""
        return None

    @property
    def decomposed(self) -> bool:
        """Whether `compute_svd` has an answer."""
        return False

    @property
    def capabilities(self) -> frozenset[str]:
        """A decomposition only where the kind has one for every row."""
        return frozenset({"linear", "svd"} if self.decomposed else {"linear"})

    def compute_svd(self) -> SVD:
        """A decomposition with s (lanes, r), made by kinds that have one."""
        raise UnlikeError(f"{type(self).__name__} has no decomposition for every row")

    def solve_gram(self, r: Tensor, noise_var: float | Tensor, prior_var: float | Tensor, **limits: Any) -> Tensor:
        """A division where A A^T is diagonal."""
        diagonal = self.gram_diagonal
        if diagonal is None:
            return super().solve_gram(r, noise_var, prior_var, **limits)
        noise, prior = (over_event(value, r, len(self.out_shape)) for value in (noise_var, prior_var))
        return r / (noise + prior * diagonal.to(r))

    def norm(self, *, steps: int = 200) -> Tensor:
        """(lanes,) largest singular value of every row's operator."""
        norms = torch.stack([member.norm(steps=steps) for member in self.members])
        return norms[self.which.to(norms.device)]

    def dense(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """There is no one matrix."""
        raise UnlikeError("the operators of the problems differ, so there is no one matrix for all rows")


class _Scaled(PerLane):
    """c_k A, with A shared or per lane."""

    factors: Tensor

    def __init__(self, operator: LinearOperator, factors: Tensor, which: Tensor) -> None:
        super().__init__(operator.in_shape, operator.out_shape, which)
        self.operator = operator
        self.register_buffer("factors", factors)

    @property
    def decomposed(self) -> bool:
        return "svd" in self.operator.capabilities and bool((self.factors != 0).all())

    @property
    def gram_diagonal(self) -> Tensor | None:
        inner = _gram_diagonal(self.operator)
        return None if inner is None else self._times(self.operator.out_shape).square() * inner

    def _times(self, shape: tuple[int, ...]) -> Tensor:
        return self.factors.reshape(-1, *[1] * len(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self._times(self.out_shape).to(x) * self.operator.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        self.check_shape(y, self.out_shape, "data")
        return self._times(self.in_shape).to(y) * self.operator.adjoint(y)

    def solve_gram(self, r: Tensor, noise_var: float | Tensor, prior_var: float | Tensor, **limits: Any) -> Tensor:
        """(n I + v c^2 A A^T)^{-1} r, by the solve of A."""
        prior = prior_var * self.factors.to(r).square()
        return self.operator.solve_gram(r, noise_var, prior, **limits)

    def compute_svd(self) -> SVD:
        inner, sign = self.operator.svd(), self.factors.sign()[:, None]
        return SVD(
            inner.s * self.factors.abs()[:, None].to(inner.s),
            inner.to_spectral,
            inner.from_spectral,
            lambda y: sign.to(y) * inner.to_spectral_data(y),
            lambda z: inner.from_spectral_data(sign.to(z) * z),
        )


class _Composed(PerLane):
    """A_k B_k, one of them possibly shared."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator, which: Tensor) -> None:
        super().__init__(inner.in_shape, outer.out_shape, which)
        self.outer, self.inner = outer, inner

    @property
    def gram_diagonal(self) -> Tensor | None:
        inner = _gram_diagonal(self.inner)
        if inner is None:
            return None
        if isinstance(self.outer, _Masked) and bool((inner == inner.flatten()[0]).all()):
            return self.outer.gram_diagonal * inner.flatten()[0]
        weights = self.outer.weights if isinstance(self.outer, Diagonal | _Diagonal) else None
        return None if weights is None else weights.square() * inner

    def forward(self, x: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        self.check_shape(y, self.out_shape, "data")
        return self.inner.adjoint(self.outer.adjoint(y))


class _Diagonal(PerLane):
    """Weights (lanes, *shape)."""

    weights: Tensor

    def __init__(self, weights: Tensor, which: Tensor) -> None:
        super().__init__(tuple(weights.shape[1:]), tuple(weights.shape[1:]), which)
        self.register_buffer("weights", weights)

    @property
    def gram_diagonal(self) -> Tensor:
        return self.weights.square()

    def forward(self, x: Tensor) -> Tensor:
        return self.weights.to(x) * x

    def adjoint(self, y: Tensor) -> Tensor:
        self.check_shape(y, self.out_shape, "data")
        return self.weights.to(y) * y


class _Masked(PerLane):
    """Observed entries: places (lanes, m), of which the first `counts` are real and the others zero."""

    places: Tensor
    real: Tensor

    def __init__(self, places: Tensor, real: Tensor, in_shape: tuple[int, ...], which: Tensor) -> None:
        super().__init__(in_shape, (places.shape[-1],), which)
        self.register_buffer("places", places)
        self.register_buffer("real", real)

    @property
    def decomposed(self) -> bool:
        return True

    @property
    def gram_diagonal(self) -> Tensor:
        return self.real.double()

    def forward(self, x: Tensor) -> Tensor:
        flat = flatten_event(x, len(self.in_shape))
        found = flat.gather(-1, self.places.expand(*flat.shape[:-1], -1))
        return torch.where(self.real, found, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        self.check_shape(y, self.out_shape, "data")
        zero = y.new_zeros(*y.shape[:-1], numel(self.in_shape))
        # Places of padding repeat one that is real, to which they add nothing.
        filled = zero.scatter_add(-1, self.places.expand(y.shape), torch.where(self.real, y, 0.0))
        return filled.reshape(*y.shape[:-1], *self.in_shape)

    def compute_svd(self) -> SVD:
        # Directions of padding count one, with data zero; nothing of them reaches x.
        s = torch.ones(self.places.shape, dtype=torch.float64, device=self.places.device)
        return SVD(s, self.forward, self.adjoint, lambda y: y, lambda z: torch.where(self.real, z, 0.0))


class _Dense(PerLane):
    """Matrices (lanes, m, d)."""

    matrix: Tensor

    def __init__(
        self, matrix: Tensor, in_shape: tuple[int, ...], out_shape: tuple[int, ...], rows: Tensor, which: Tensor
    ) -> None:
        super().__init__(in_shape, out_shape, which)
        self.register_buffer("matrix", matrix)
        self._each = rows  # (problem, m, d), to be factored once each

    def forward(self, x: Tensor) -> Tensor:
        flat = flatten_event(x, len(self.in_shape))
        y = torch.einsum("kmd,...kd->...km", self.matrix.to(x), flat)
        return y.reshape(*flat.shape[:-1], *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        self.check_shape(y, self.out_shape, "data")
        flat = flatten_event(y, len(self.out_shape))
        x = torch.einsum("kmd,...km->...kd", self.matrix.to(y), flat)
        return x.reshape(*flat.shape[:-1], *self.in_shape)

    @property
    def decomposed(self) -> bool:
        ranks = {member.svd().rank for member in self._factored()}
        return len(ranks) == 1

    def _factored(self) -> list[Dense]:
        return [Dense(matrix, self.in_shape, self.out_shape) for matrix in self._each]

    def compute_svd(self) -> SVD:
        rank = self._factored()[0].svd().rank
        u, s, vh = torch.linalg.svd(self._each.double(), full_matrices=False)
        u, s, vh = (part[self.which] for part in (u[..., :rank], s[:, :rank], vh[:, :rank]))
        n_in, n_out = len(self.in_shape), len(self.out_shape)

        def product(equation: str, matrix: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
            y = torch.einsum(equation, matrix.to(x), x)
            return y.reshape(*y.shape[:-1], *shape)

        return SVD(
            s,
            lambda x: product("krd,...kd->...kr", vh, flatten_event(x, n_in), (rank,)),
            lambda z: product("krd,...kr->...kd", vh, z, self.in_shape),
            lambda y: product("kmr,...km->...kr", u, flatten_event(y, n_out), (rank,)),
            lambda z: product("kmr,...kr->...km", u, z, self.out_shape),
        )


def _merge(operators: list[Any], which: Tensor, dtype: torch.dtype) -> LinearOperator:
    """The shared operator, or one with a part for every lane."""
    first = operators[0]
    if all(other is first or _same(first, other, dtype) for other in operators[1:]):
        return first
    kinds = sorted({type(operator).__name__ for operator in operators})
    if len(kinds) > 1:
        raise UnlikeError(f"their operators are of several kinds: {', '.join(kinds)}")
    if len({operator.in_shape for operator in operators}) > 1:
        raise UnlikeError("their operators act on unlike shapes")
    if isinstance(first, Mask):
        return _masked(operators, which)
    if len({operator.out_shape for operator in operators}) > 1 and not isinstance(first, Scaled | Compose):
        raise UnlikeError("they have unlike numbers of measurements")
    if isinstance(first, Scaled):
        factors = torch.stack([operator.factor.double() for operator in operators])
        return _Scaled(_merge([operator.operator for operator in operators], which, dtype), factors[which], which)
    if isinstance(first, Compose):
        inner = _merge([operator.inner for operator in operators], which, dtype)
        ragged = len({operator.out_shape for operator in operators}) > 1
        if ragged and not isinstance(first.outer, Mask):
            raise UnlikeError("they have unlike numbers of measurements")
        outer = _merge([operator.outer for operator in operators], which, dtype)
        return outer if isinstance(inner, Identity) else _Composed(outer, inner, which)
    if isinstance(first, Diagonal):
        return _Diagonal(torch.stack([operator.weights for operator in operators])[which], which)
    if isinstance(first, Dense):
        rows = torch.stack([operator.matrix for operator in operators])
        return _Dense(rows[which], first.in_shape, first.out_shape, rows, which)
    raise UnlikeError(f"their operators are unlike ones of the kind {kinds[0]}")


def _masked(operators: list[Mask], which: Tensor) -> _Masked:
    counts = torch.tensor([len(operator.keep) for operator in operators], device=operators[0].keep.device)
    most = int(counts.max())
    places = torch.stack([torch.cat([o.keep, o.keep[:1].expand(most - len(o.keep))]) for o in operators])
    real = torch.arange(most, device=counts.device) < counts[:, None]
    return _Masked(places[which], real[which], operators[0].in_shape, which)


def _same(a: LinearOperator, b: LinearOperator, dtype: torch.dtype) -> bool:
    """Whether two operators are one map, seen at random points."""
    if type(a) is not type(b) or a.in_shape != b.in_shape or a.out_shape != b.out_shape:
        return False
    x = torch.randn(PROBES, *a.in_shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(a._device())
    with torch.no_grad():
        for point in x:
            one, other = a.forward(point), b.forward(point)
            if not bool((one - other).norm() <= 100 * torch.finfo(dtype).eps * one.norm()):
                return False
    return True


def _gram_diagonal(operator: LinearOperator) -> Tensor | None:
    """Of any operator, per lane or not; shared ones are (*out_shape,)."""
    if isinstance(operator, PerLane):
        return operator.gram_diagonal
    if isinstance(operator, Diagonal):
        return operator.weights.square()
    if operator.gram_scale is None:
        return None
    scale = torch.as_tensor(operator.gram_scale, dtype=torch.float64)
    return scale.expand(operator.out_shape).to(operator._device())
