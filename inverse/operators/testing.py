"""The contract of an operator as one check, for the members here and for your own.

<A x, y> = <x, A^T y>,   A A^+ A = A,   A = U diag(s) V^T,   (sigma^2 I + v A A^T) u = r
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator
from inverse.operators.events import numel
from ppl.errors import DataError, ShapeError

__all__ = ["check_operator"]


def _close(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-9) -> None:
    """Relative to the largest entry, since both sides are sums of many terms."""
    if found.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if found.numel() == 0:
        return
    error = float((found - expected).abs().max())
    scale = float(expected.abs().max()) + 1e-300
    if not error <= rtol * max(scale, 1e-6):
        raise AssertionError(
            f"{what}: largest difference {error:.2e} at scale {scale:.2e}, allowed {rtol:.0e} relative"
        )


def check_operator(A: LinearOperator, generator: torch.Generator, *, rtol: float = 1e-9) -> None:
    """Check everything that a LinearOperator promises; the matrix is written down, so keep the example small.

    Shapes and batches (none, one, zero, several), dtypes, inputs left alone, linearity, adjoint, derivatives, vmap,
    tracing, dense matrix, decomposition, pseudo-inverse, gram solve, norm, errors at the door.

    Args:
        A: the operator, on the device of the generator.
        generator: draws the probes.
        rtol: largest relative error in float64.

    Raises:
        AssertionError: that names the broken promise.

    Example:
        >>> from inverse.operators import Downsample
        >>> check_operator(Downsample(2, (4, 4)), torch.Generator().manual_seed(0))
    """
    device = generator.device

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if not A.linear or "linear" not in A.capabilities:
        raise AssertionError(f"{A!r} does not declare itself linear")
    cpu_state = torch.get_rng_state()
    _check_batches(A, draw)
    x, u = draw(3, *A.in_shape), draw(3, *A.in_shape)
    y = draw(3, *A.out_shape)

    _close(A(0.3 * x - 2 * u), 0.3 * A(x) - 2 * A(u), "A(a x + b u) = a A x + b A u", rtol)
    left = (A(x) * y).reshape(3, -1).sum(-1)
    _close((x * A.adjoint(y)).reshape(3, -1).sum(-1), left, "<A x, y> = <x, A^T y>", max(rtol, 1e-9) * 10)

    matrix = A.dense()
    flat = x.reshape(3, -1)
    _close(A(x).reshape(3, -1), flat @ matrix.T, "dense() agrees with A x", rtol)
    _close(A.adjoint(y).reshape(3, -1), y.reshape(3, -1) @ matrix, "dense() agrees with A^T y", rtol)

    _check_transforms(A, x, u, y, rtol)

    for batch in ((), (3,)):
        b = A(x[0] if batch == () else x)
        _close(A(A.pinv(b)), b, "A A^+ A = A", rtol * 1e3)
    _close(A.adjoint(A(A.pinv(y)) - y), torch.zeros_like(x), "A^T (A A^+ y - y) = 0", rtol * 1e3)
    _close(A.pinv(A(A.pinv(y))), A.pinv(y), "A^+ A A^+ = A^+", rtol * 1e3)
    _check_svd(A, matrix, x, y, rtol)

    exact = torch.linalg.matrix_norm(matrix, 2)
    _close(
        A.norm().to(exact), exact, "norm() is the largest singular value", 1e-3 if "svd" not in A.capabilities else 1e-8
    )
    gram = matrix @ matrix.T
    noise, prior = 0.3 * float(exact**2) + 0.01, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    system = noise * torch.eye(len(gram), dtype=gram.dtype, device=device) + prior[:, None, None] * gram
    expected = torch.linalg.solve(system, y.reshape(3, -1, 1)).reshape(y.shape)
    _close(A.solve_gram(y, noise, prior), expected, "solve_gram solves (sigma^2 I + v A A^T) u = r", max(rtol, 1e-8))
    _check_errors(A, x)
    if not torch.equal(cpu_state, torch.get_rng_state()):
        raise AssertionError("the operator drew from the global random state")


def _check_batches(A: LinearOperator, draw: object) -> None:
    """Every batch shape, both dtypes, inputs unchanged."""
    assert callable(draw)
    for dtype in (torch.float64, torch.float32):
        for batch in ((), (1,), (0,), (2, 3), (2, 0)):
            x, y = draw(*batch, *A.in_shape, dtype=dtype), draw(*batch, *A.out_shape, dtype=dtype)
            for name, value, argument, shape in (
                ("A x", A(x), x, A.out_shape),
                ("A^T y", A.adjoint(y), y, A.in_shape),
                ("A^+ y", A.pinv(y), y, A.in_shape),
            ):
                if tuple(value.shape) != (*batch, *shape):
                    raise AssertionError(
                        f"{name} on batch {batch}: shape {tuple(value.shape)}, expected {(*batch, *shape)}"
                    )
                if value.dtype != dtype or value.device != argument.device:
                    raise AssertionError(f"{name} of {dtype} on {argument.device} gave {value.dtype} on {value.device}")
            before = x.clone()
            A(x).mul_(0)
            if not torch.equal(x, before):
                raise AssertionError("A(x) shares memory with x")


def _check_transforms(A: LinearOperator, x: Tensor, u: Tensor, y: Tensor, rtol: float) -> None:
    """vmap, jvp, vjp, grad and make_fx."""
    from torch.fx.experimental.proxy_tensor import make_fx

    _close(torch.func.vmap(A)(x), A(x), "vmap agrees with the batch", rtol)
    _close(torch.func.vmap(A.adjoint)(y), A.adjoint(y), "vmap of the adjoint", rtol)
    _close(torch.func.jvp(A, (x,), (u,))[1], A(u), "jvp is A u", rtol)
    _close(torch.func.vjp(A, x)[1](y)[0], A.adjoint(y), "vjp is A^T y", rtol)
    per_lane = torch.func.vmap(torch.func.grad(lambda v, w: 0.5 * (A(v) - w).square().sum()))(x, y)
    _close(per_lane, A.adjoint(A(x) - y), "gradient of 1/2 ||A x - y||^2 is A^T (A x - y)", rtol)
    traced = make_fx(lambda v, w: (A(v), A.adjoint(w)))(x, y)
    forward, back = traced(u, y)
    _close(forward, A(u), "make_fx of A", rtol)
    _close(back, A.adjoint(y), "make_fx of A^T", rtol)


def _check_svd(A: LinearOperator, matrix: Tensor, x: Tensor, y: Tensor, rtol: float) -> None:
    """Orthonormal factors, the right values, and the product is A."""
    if "svd" not in A.capabilities:
        return
    svd = A.svd()
    s = svd.s
    if s.dtype != torch.float64 or bool((s <= 0).any()):
        raise AssertionError("svd().s must be float64 and strictly positive")
    true = torch.linalg.svdvals(matrix)
    floor = max(matrix.shape) * torch.finfo(torch.float64).eps * true.max()
    found = torch.cat([s.sort(descending=True).values, s.new_zeros(max(0, len(true) - len(s)))])
    if len(s) > len(true) or len(s) > int((true > floor * 1e-3).sum()):
        raise AssertionError(f"svd() has {len(s)} values, the matrix has rank {int((true > floor).sum())}")
    # Values near rounding may be kept or dropped.
    _close(found, true, "singular values", max(rtol, 1e-10))
    eye = torch.eye(svd.rank, dtype=torch.float64, device=x.device)
    v, u = svd.from_spectral(eye), svd.from_spectral_data(eye)
    _close(svd.to_spectral(v), eye, "V^T V = I", rtol)
    _close(svd.to_spectral_data(u), eye, "U^T U = I", rtol * 10)
    _close(svd.to_spectral(x), x.reshape(3, -1) @ v.reshape(svd.rank, numel(A.in_shape)).T, "to_spectral is V^T", rtol)
    _close(
        svd.to_spectral_data(y),
        y.reshape(3, -1) @ u.reshape(svd.rank, numel(A.out_shape)).T,
        "to_spectral_data is U^T",
        rtol * 10,
    )
    _close(svd.from_spectral_data(s * svd.to_spectral(x)), A(x), "U diag(s) V^T x = A x", rtol * 10)
    _close(
        A(svd.complement(x)), torch.zeros_like(A(x)), "A (I - V V^T) x = 0", rtol * 10 * math.sqrt(numel(A.in_shape))
    )


def _check_errors(A: LinearOperator, x: Tensor) -> None:
    """A wrong shape or kind of number is refused by name."""
    for call, shape in ((A, A.in_shape), (A.adjoint, A.out_shape), (A.pinv, A.out_shape)):
        wrong = x.new_zeros(*shape[:-1], shape[-1] + 1) if shape else None
        if wrong is None:
            continue
        try:
            call(wrong)
        except ShapeError:
            pass
        else:
            raise AssertionError(f"{call} accepted an argument of shape {tuple(wrong.shape)}")
    try:
        A(torch.zeros(A.in_shape, dtype=torch.complex128, device=x.device))
    except DataError:
        pass
    else:
        raise AssertionError("a complex argument was accepted")
