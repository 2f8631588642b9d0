"""Operators given by a matrix or by any torch function that is linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.events import event_shape, flatten_event, numel
from ppl.errors import CapabilityError, DataError, OptionError, ShapeError
from ppl.numbers import as_tensor

__all__ = ["Dense", "FunctionOperator", "probe_affine", "probe_linear"]


class Dense(LinearOperator):
    """A x = M x on flattened vectors.

    A complex matrix is stored as real: the output then has a last axis (re, im).

    Args:
        matrix: (dy, d), real or complex.
        in_shape: shape of one x, with d entries; (d,) when None.
        out_shape: shape of one A x, with dy entries; (dy,) when None. A complex matrix appends the axis (re, im).

    Example:
        >>> Dense(torch.tensor([[1.0, 1.0]]))(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3.],
                [7.]])
    """

    matrix: Tensor

    def __init__(
        self,
        matrix: Tensor,
        in_shape: int | tuple[int, ...] | None = None,
        out_shape: int | tuple[int, ...] | None = None,
    ) -> None:
        matrix = as_tensor(matrix)
        if matrix.ndim != 2:
            raise ShapeError(f"matrix must have shape (dy, d), got {tuple(matrix.shape)}; a row vector is matrix[None]")
        dy, d = matrix.shape
        in_shape = (d,) if in_shape is None else event_shape(in_shape)
        out_shape = (dy,) if out_shape is None else event_shape(out_shape, "out_shape")
        for name, shape, size in (("in_shape", in_shape, d), ("out_shape", out_shape, dy)):
            if numel(shape) != size:
                raise ShapeError(
                    f"{name} {shape} has {numel(shape)} entries, but the matrix of shape {(dy, d)} has {size}"
                )
        if matrix.is_complex():
            matrix = torch.view_as_real(matrix).movedim(-1, 1).reshape(2 * dy, d)
            out_shape = (*out_shape, 2)
        if not matrix.is_floating_point():
            raise DataError(f"matrix must be real or complex floating point, got {matrix.dtype}; write matrix.double()")
        super().__init__(in_shape, out_shape)
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """M x."""
        y = flatten_event(x, len(self.in_shape)) @ self.matrix.T.to(x)
        return y.reshape((*y.shape[:-1], *self.out_shape))

    def adjoint(self, y: Tensor) -> Tensor:
        """M^T y."""
        self.check_shape(y, self.out_shape, "data")
        x = flatten_event(y, len(self.out_shape)) @ self.matrix.to(y)
        return x.reshape((*x.shape[:-1], *self.in_shape))


class FunctionOperator(LinearOperator):
    """Any torch function of one x, with its adjoint by automatic differentiation when it is linear.

    Linearity is declared or probed, never assumed: with linear=False it can only be called.

    Args:
        fn: (*in_shape) -> (*out_shape), pure and differentiable; batches go through torch.func.vmap.
        in_shape: shape of one x.
        linear: True, declared by you; False; or None, probed with `probe_linear`.
        batched: fn takes leading batch axes itself, so it is called without vmap.
        generator: draws the probes when linear is None.
        dtype: in which fn is tried at construction.

    Raises:
        OptionError: if linear is None and no generator came.

    Example:
        >>> A = FunctionOperator(lambda x: x.cumsum(-1), (3,), linear=True)
        >>> A.adjoint(torch.tensor([1.0, 1.0, 1.0]))
        tensor([3., 2., 1.])
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        in_shape: int | tuple[int, ...],
        *,
        linear: bool | None = False,
        batched: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        in_shape = event_shape(in_shape)
        if linear is None:
            if generator is None:
                raise OptionError("probing linearity draws random inputs; pass a generator, or declare linear=True")
            linear = probe_linear(fn, in_shape, generator, dtype=dtype)
        device = torch.device("cpu") if generator is None else generator.device
        origin = torch.zeros(in_shape, dtype=dtype, device=device)
        super().__init__(in_shape, tuple(fn(origin).shape))
        self.fn, self.batched, self.linear = fn, batched, linear
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        """fn(x) for every batch member."""
        batch = x.shape[: x.ndim - len(self.in_shape)]
        if self.batched or not batch:
            return self.fn(x)
        if 0 in batch:
            return x.new_zeros((*batch, *self.out_shape))
        y = torch.func.vmap(self.fn)(x.reshape(-1, *self.in_shape))
        return y.reshape((*batch, *self.out_shape))

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, the vector-Jacobian product at zero."""
        self.check_shape(y, self.out_shape, "data")
        if not self.linear:
            raise CapabilityError(
                "this function was not declared linear, so it has no adjoint; pass linear=True if it is linear, "
                "otherwise use its vector-Jacobian product at a point"
            )
        batch = y.shape[: y.ndim - len(self.out_shape)]
        if 0 in batch:
            return y.new_zeros((*batch, *self.in_shape))
        pull = torch.func.vjp(self.forward, y.new_zeros((*batch, *self.in_shape)))[1]
        return pull(y)[0]


def probe_linear(
    fn: Callable[[Tensor], Tensor],
    in_shape: int | tuple[int, ...],
    generator: torch.Generator,
    *,
    probes: int = 3,
    rtol: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> bool:
    """Whether fn(a u + b v) = a fn(u) + b fn(v) at random points, over six orders of magnitude.

    A function that differs from a linear one only on a rare set can pass; declare linearity where you know it.

    Args:
        fn: (*in_shape) -> (*out_shape).
        in_shape: shape of one x.
        generator: draws the probes, on the device of fn.
        probes: pairs (u, v) per magnitude.
        rtol: largest relative error that counts as rounding; for float32 functions use about 1e-3.
        dtype: of the probes.

    Returns:
        True if every probe agrees.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> probe_linear(lambda x: 2 * x, (3,), g), probe_linear(torch.relu, (3,), g)
        (True, False)
    """
    return _probe(fn, in_shape, generator, probes, rtol, dtype, affine=False)


def probe_affine(
    fn: Callable[[Tensor], Tensor],
    in_shape: int | tuple[int, ...],
    generator: torch.Generator,
    *,
    probes: int = 3,
    rtol: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> bool:
    """Whether fn(x) - fn(0) is linear, as `probe_linear` tests it; same arguments.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> probe_linear(lambda x: x + 1, (3,), g), probe_affine(lambda x: x + 1, (3,), g)
        (False, True)
    """
    return _probe(fn, in_shape, generator, probes, rtol, dtype, affine=True)


def _probe(
    fn: Callable[[Tensor], Tensor],
    in_shape: int | tuple[int, ...],
    generator: torch.Generator,
    probes: int,
    rtol: float,
    dtype: torch.dtype,
    *,
    affine: bool,
) -> bool:
    """Superposition at scales 1e-3, 1 and 1e3, each judged alone: a large scale would hide a small offset."""

    shape = event_shape(in_shape)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)

    with torch.no_grad():
        origin = fn(torch.zeros(shape, dtype=dtype, device=generator.device))
        if not affine and bool((origin != 0).any()):
            return False
        for scale in (1e-3, 1.0, 1e3):
            for _ in range(probes):
                u, v = scale * draw(), scale * draw()
                a, b = 0.7, -1.9
                left = fn(a * u + b * v) - origin
                right = a * (fn(u) - origin) + b * (fn(v) - origin)
                # Rounding is relative to the terms, which include the offset.
                size = fn(u).norm() + fn(v).norm() + origin.norm()
                if not bool((left - right).norm() <= rtol * size):
                    return False
    return True
