"""Other people's operators: physics objects of deepinv and any torch callable, used as they are.

An object counts as physics when it has `A(x)`. What has `A_adjoint(y)` too and passes a probe is linear, and its
adjoint is then checked: a wrong one is refused, since every guide would quietly follow it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inverse.operators.base import LinearOperator
from inverse.operators.dense import FunctionOperator, probe_linear
from inverse.operators.events import event_shape
from ppl.errors import CapabilityError, DataError, OptionError, ShapeError

__all__ = ["WrappedPhysics", "adjoint_error", "wrap"]


def adjoint_error(A: LinearOperator, generator: torch.Generator, *, dtype: torch.dtype = torch.float64) -> float:
    """How far an adjoint is from the transpose, max |<A x, y> - <x, A^T y>| / (|A x| |y|) over random x and y.

    Rounding leaves about 1e-15 in float64 and 1e-6 in float32; a wrong adjoint about 1 / sqrt(size), or more.

    Args:
        A: a linear operator.
        generator: draws eight pairs.
        dtype: of the pairs.

    Returns:
        The relative error.

    Raises:
        CapabilityError: A is not linear.
        OptionError: A is no operator.

    Example:
        >>> from inverse.operators import GaussianBlur
        >>> adjoint_error(GaussianBlur(1.0, (6, 6)), torch.Generator().manual_seed(0)) < 1e-12
        True
    """
    if not isinstance(A, LinearOperator):
        raise OptionError(f"adjoint_error takes an operator, got {A!r}; make one: inverse.operators.wrap(A, in_shape)")
    if not A.linear:
        raise CapabilityError(f"{type(A).__name__} is not linear, so it has no adjoint")
    x = torch.randn((8, *A.in_shape), generator=generator, device=generator.device, dtype=dtype)
    y = torch.randn((8, *A.out_shape), generator=generator, device=generator.device, dtype=dtype)
    with torch.no_grad():
        image, back = A(x).double().reshape(8, -1), A.adjoint(y).double().reshape(8, -1)
    x, y = x.double().reshape(8, -1), y.double().reshape(8, -1)
    error = ((image * y).sum(-1) - (x * back).sum(-1)).abs()
    # Both sides, so that an operator that is zero with an adjoint that is not is found out.
    size = torch.maximum(image.norm(dim=-1) * y.norm(dim=-1), x.norm(dim=-1) * back.norm(dim=-1))
    return float((error / size.clamp_min(torch.finfo(torch.float64).tiny)).max())


class WrappedPhysics(LinearOperator):
    """A deepinv physics object as an operator: `A` forward, `A_adjoint` back; its noise model is not looked at.

    The object sees one batch axis, its own precision, and its own kind of number: complex measurements get a last
    axis (re, im).

    Args:
        physics: has `A(x)`, and `A_adjoint(y)` if it is linear.
        in_shape: shape of one x, without the batch axis.
        linear: True or False, declared; None takes what has `A_adjoint` and passes a probe.
        generator: draws the probes, on the physics' device; seeded with 0 when None.

    Raises:
        OptionError: A_adjoint is not the transpose of A, or A is not linear though it was declared to be.
        DataError: A returns something other than one tensor with a batch axis.

    Example:
        >>> class Halve:
        ...     def A(self, x): return x / 2
        ...     def A_adjoint(self, y): return y / 2
        >>> A = WrappedPhysics(Halve(), (1, 2, 2))
        >>> A(torch.ones(5, 1, 2, 2)).shape, A.linear
        (torch.Size([5, 1, 2, 2]), True)
    """

    def __init__(
        self,
        physics: Any,
        in_shape: int | tuple[int, ...],
        *,
        linear: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        in_shape = event_shape(in_shape)
        native, device = _home(physics)
        generator = torch.Generator(device).manual_seed(0) if generator is None else generator
        dtype = native or torch.float32
        probe = torch.randn((1, *in_shape), generator=generator, device=generator.device, dtype=dtype)
        with torch.no_grad():
            y = physics.A(probe)
        if not isinstance(y, Tensor) or y.ndim < 1 or y.shape[0] != 1:
            found = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise DataError(
                f"{type(physics).__name__}.A must map a batch (1, {str(in_shape)[1:-1]}) to one tensor with the "
                f"same batch axis, got {found}; in_shape is the shape of one x without it"
            )
        out_shape = tuple(y.shape[1:])
        super().__init__(in_shape, (*out_shape, 2) if y.is_complex() else out_shape)
        self.physics, self.native, self.complex_data = physics, native, y.is_complex()
        self.to(generator.device)
        self.linear = self._check(linear, generator, dtype)

    def _check(self, declared: bool | None, generator: torch.Generator, dtype: torch.dtype) -> bool:
        """Whether it is linear; refuses adjoints that are not transposes."""
        name, rtol = type(self.physics).__name__, 1e4 * torch.finfo(dtype).eps
        if declared is False or (declared is None and not hasattr(self.physics, "A_adjoint")):
            return False
        if not hasattr(self.physics, "A_adjoint"):
            raise OptionError(
                f"{name} was declared linear, but has no A_adjoint; wrap(lambda x: physics.A(x[None])[0], "
                "in_shape, linear=True) finds it by differentiation"
            )
        if not probe_linear(lambda x: self.forward(x), self.in_shape, generator, rtol=rtol, dtype=dtype):
            if declared is None:
                return False
            raise OptionError(f"{name}.A was declared linear, but is not; pass linear=False")
        self.linear = True
        error = adjoint_error(self, generator, dtype=dtype)
        if error > rtol:
            raise OptionError(
                f"{name}.A_adjoint is not the transpose of A: <A x, y> and <x, A^T y> differ by {error:.1e} of their "
                "size; correct it, or have it found by differentiation: "
                "wrap(lambda x: physics.A(x[None])[0], in_shape, linear=True)"
            )
        return True

    def forward(self, x: Tensor) -> Tensor:
        """physics.A on one batch axis."""
        batch = x.shape[: x.ndim - len(self.in_shape)]
        if 0 in batch:
            return x.new_zeros((*batch, *self.out_shape))
        y = self.physics.A(x.reshape(-1, *self.in_shape).to(self.native or x.dtype))
        y = torch.stack([y.real, y.imag], -1) if self.complex_data else y
        # Where A is the identity it may return its argument, whose memory must not be shared.
        return y.to(x.dtype).reshape((*batch, *self.out_shape)).clone()

    def adjoint(self, y: Tensor) -> Tensor:
        """physics.A_adjoint on one batch axis; for real x only the real part of A^H y acts."""
        self.check_shape(y, self.out_shape, "data")
        if not self.linear:
            raise CapabilityError(
                f"{type(self.physics).__name__} is not linear, so it has no adjoint; use its vector-Jacobian product "
                "at a point, torch.func.vjp(A, x)"
            )
        batch = y.shape[: y.ndim - len(self.out_shape)]
        if 0 in batch:
            return y.new_zeros((*batch, *self.in_shape))
        flat = y.reshape(-1, *self.out_shape).to(self.native or y.dtype)
        x = self.physics.A_adjoint(torch.complex(flat[..., 0], flat[..., 1]) if self.complex_data else flat)
        return (x.real if x.is_complex() else x).to(y.dtype).reshape((*batch, *self.in_shape)).clone()


def wrap(
    source: Any,
    in_shape: int | tuple[int, ...],
    *,
    linear: bool | None = None,
    batched: bool = False,
    generator: torch.Generator | None = None,
) -> LinearOperator:
    """An operator from whatever there is: one of ours, a physics object of deepinv, or any torch callable.

    Args:
        source: a LinearOperator, an object with `A(x)` and perhaps `A_adjoint(y)`, or a function or module of one x.
        in_shape: shape of one x, without batch axes.
        linear: True or False, declared by you; None probes it.
        batched: a callable takes leading batch axes itself, so it is called without vmap.
        generator: draws the probes; seeded with 0 when None.

    Returns:
        An operator; the adjoint of a callable is found by differentiation.

    Raises:
        OptionError: the source cannot be called, or is not what it was declared to be.
        ShapeError: an operator of ours is for another shape.

    Example:
        >>> A = wrap(lambda x: x.diff(dim=-1), (4,))
        >>> A.linear, A.adjoint(torch.tensor([1.0, 0.0, 0.0]))
        (True, tensor([-1.,  1.,  0.,  0.]))
        >>> wrap(torch.sigmoid, (4,)).linear
        False
    """
    in_shape = event_shape(in_shape)
    if isinstance(source, LinearOperator):
        if source.in_shape != in_shape:
            raise ShapeError(f"{type(source).__name__} acts on {source.in_shape}, got in_shape {in_shape}")
        if linear is not None and linear != source.linear:
            raise OptionError(f"{type(source).__name__} says linear={source.linear}, got linear={linear}")
        return source
    if callable(getattr(source, "A", None)):
        return WrappedPhysics(source, in_shape, linear=linear, generator=generator)
    if not callable(source):
        raise OptionError(f"expected an operator, an object with A(x), or a callable, got {type(source).__name__}")
    native, device = _home(source)
    generator = torch.Generator(device).manual_seed(0) if generator is None else generator
    dtype = native or torch.float64

    def fn(x: Tensor) -> Tensor:
        y = source(x.to(native or x.dtype))
        y = torch.stack([y.real, y.imag], -1) if y.is_complex() else y
        return y.to(x.dtype)

    if linear is None:
        linear = probe_linear(fn, in_shape, generator, rtol=1e4 * torch.finfo(dtype).eps, dtype=dtype)
    A = FunctionOperator(fn, in_shape, linear=linear, batched=batched, generator=generator, dtype=dtype)
    if isinstance(source, nn.Module):
        A.add_module("source", source)  # so that it moves along and its parameters are seen
    return A


def _home(source: Any) -> tuple[torch.dtype | None, torch.device]:
    """Precision and device of the tensors of a module; (None, CPU) where there are none."""
    tensors = [*source.parameters(), *source.buffers()] if isinstance(source, nn.Module) else []
    dtypes = (t.dtype for t in tensors if t.is_floating_point() or t.is_complex())
    native = next((torch.empty(0, dtype=d).abs().dtype for d in dtypes), None)
    return native, next((t.device for t in tensors), torch.device("cpu"))
