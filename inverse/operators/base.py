"""Linear operators as torch modules: A x, A^T y, A^+ y, A = U diag(s) V^T, and solves with sigma^2 I + v A A^T.

Everything is real. A complex measurement is stored with a last axis (re, im), so that a Normal likelihood has one
standard deviation per real number.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from inverse.operators.linear_solve import conjugate_gradient
from ppl.errors import CapabilityError, DataError, OptionError, ShapeError

if TYPE_CHECKING:
    from inverse.operators.algebra import Compose, Scaled, Sum

__all__ = ["DENSE_LIMIT", "SVD", "CallRecord", "LinearOperator", "numel", "record_calls"]

DENSE_LIMIT = 2**22
"""Largest number of matrix entries for which `svd` falls back to a dense factorisation."""

Self = TypeVar("Self", bound="LinearOperator")


class CallRecord(NamedTuple):
    """One call of an operator: operator, input (*batch, *in_shape), output (*batch, *out_shape)."""

    operator: LinearOperator
    input: Tensor
    output: Tensor


_RECORDS: ContextVar[list[CallRecord] | None] = ContextVar("operator_calls", default=None)


@contextmanager
def record_calls() -> Iterator[list[CallRecord]]:
    """Collect every outermost operator call made inside the block, in order.

    The parts of a composed operator are not listed: `(A @ B)(x)` is one record, of `A @ B`.

    Returns:
        A list that fills with CallRecord(operator, input, output).

    Example:
        >>> from inverse.operators import Identity
        >>> A = Identity((3,))
        >>> with record_calls() as calls:
        ...     _ = A(torch.ones(3))
        >>> calls[0].operator is A
        True
    """
    calls: list[CallRecord] = []
    token = _RECORDS.set(calls)
    try:
        yield calls
    finally:
        _RECORDS.reset(token)


def numel(shape: tuple[int, ...]) -> int:
    """Number of entries of one event; 1 for a scalar."""
    return math.prod(shape)


def flatten_event(x: Tensor, event_ndim: int) -> Tensor:
    """(*batch, *event) -> (*batch, size), also when the batch is empty."""
    batch = x.shape[: x.ndim - event_ndim]
    return x.reshape(*batch, math.prod(x.shape[x.ndim - event_ndim :]))


def scatter_index(keep: Tensor, size: int) -> Tensor:
    """For each of `size` places, its position in `keep`, or len(keep) where it is absent: adjoint of x[..., keep]."""
    index = torch.full((size,), len(keep), dtype=torch.long, device=keep.device)
    index[keep] = torch.arange(len(keep), device=keep.device)
    return index


def scatter(z: Tensor, index: Tensor) -> Tensor:
    """(*batch, kept) -> (*batch, size) with zeros at absent places; a gather, so it is safe under every transform."""
    kept = z.shape[-1]
    if kept == 0:
        return z.new_zeros(*z.shape[:-1], len(index))
    return torch.where(index < kept, z.index_select(-1, index.clamp(max=kept - 1)), 0.0)


@dataclass(frozen=True)
class SVD:
    """A thin singular value decomposition A = U diag(s) V^T, with fast maps in place of matrices.

    Every s is strictly positive and the order is the operator's own, so r = len(s) is the rank. What V leaves out is
    the null space of A, reached by `complement`.

    Args:
        s: (r,) float64 singular values; (lanes, r) of an operator that differs from lane to lane.
        to_spectral: V^T x, (*batch, *in_shape) -> (*batch, r).
        from_spectral: V z, (*batch, r) -> (*batch, *in_shape).
        to_spectral_data: U^T y, (*batch, *out_shape) -> (*batch, r).
        from_spectral_data: U z, (*batch, r) -> (*batch, *out_shape).

    Example:
        >>> from inverse.operators import Dense
        >>> svd = Dense(torch.tensor([[3.0, 0.0], [0.0, 0.0]])).svd()
        >>> svd.rank, svd.s
        (1, tensor([3.], dtype=torch.float64))
    """

    s: Tensor
    to_spectral: Callable[[Tensor], Tensor]
    from_spectral: Callable[[Tensor], Tensor]
    to_spectral_data: Callable[[Tensor], Tensor]
    from_spectral_data: Callable[[Tensor], Tensor]

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return self.s.shape[-1]

    def complement(self, x: Tensor) -> Tensor:
        """Part of x that the operator does not see, x - V V^T x: (*batch, *in_shape) -> the same."""
        return x - self.from_spectral(self.to_spectral(x))


class LinearOperator(nn.Module):
    """A linear map between tensors of fixed shape, with any number of leading batch axes.

    A member writes `forward` and `adjoint`; all else has a default. Values follow the dtype of the argument: buffers
    are cast where they are used, and `.to(device)` moves them.

    Args:
        in_shape: shape of one x.
        out_shape: shape of one A x.

    Class data:
        linear: True, unless a FunctionOperator says otherwise.
        structure: what a member knows of itself. "fast_svd": decomposed without a dense matrix. "diagonal": every
            output reads at most one entry of x, so A^T A is diagonal and the decomposition is an index.

    Example:
        >>> from inverse.operators import Downsample, Mask
        >>> A = Mask(torch.tensor([[True, False], [True, True]])) @ Downsample(2, (4, 4))
        >>> A(torch.ones(7, 4, 4)).shape, A.adjoint(torch.ones(3)).shape
        (torch.Size([7, 3]), torch.Size([4, 4]))
    """

    linear: bool = True
    structure: frozenset[str] = frozenset()

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.in_shape = tuple(int(n) for n in in_shape)
        self.out_shape = tuple(int(n) for n in out_shape)
        for name, shape in (("in_shape", self.in_shape), ("out_shape", self.out_shape)):
            if any(n < 1 for n in shape):
                raise ShapeError(f"{name} of {type(self).__name__} must have positive sizes, got {shape}")
        # Operators without tensors of their own still follow .to(device).
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self._svd: SVD | None = None

    # ---- the door -----------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A x, (*batch, *in_shape) -> (*batch, *out_shape); noted by `record_calls`."""
        self.check_shape(x, self.in_shape, "input")
        calls = _RECORDS.get()
        if calls is None:
            return super().__call__(x, *args, **kwargs)
        token = _RECORDS.set(None)  # the parts of a composition are not calls of the model
        try:
            y = super().__call__(x, *args, **kwargs)
        finally:
            _RECORDS.reset(token)
        calls.append(CallRecord(self, x, y))
        return y

    def check_shape(self, x: Tensor, shape: tuple[int, ...], what: str) -> None:
        """Raise ShapeError or DataError unless x is a real tensor of shape (*batch, *shape)."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"{what} of {type(self).__name__} must be a real floating-point tensor, got {found}; "
                "turn complex numbers into a last axis (re, im) with torch.view_as_real, integers with .double()"
            )
        if x.ndim < len(shape) or tuple(x.shape[x.ndim - len(shape) :]) != shape:
            raise ShapeError(
                f"{what} of {type(self).__name__} has shape {tuple(x.shape)}, expected (*batch, {str(shape)[1:-1]}); "
                "put batch axes first, reshape it, or build the operator for this shape"
            )

    def forward(self, x: Tensor) -> Tensor:
        """A x, (*batch, *in_shape) -> (*batch, *out_shape)."""
        raise CapabilityError(f"{type(self).__name__} has no forward map; write forward(x) in the subclass")

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (*batch, *out_shape) -> (*batch, *in_shape)."""
        raise CapabilityError(f"{type(self).__name__} has no adjoint; write adjoint(y) in the subclass")

    # ---- what it offers -----------------------------------------------------------------------------------------

    @property
    def gram_scale(self) -> float | Tensor | None:
        """c where A A^T = c I, which makes every gram solve a division; None where it is not so or not known."""
        return None

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of what the operator offers: "linear", "svd", "fast_svd", "diagonal"."""
        if not self.linear:
            return frozenset()
        names = self.structure | {"linear"}
        if "diagonal" in names:
            names |= {"fast_svd"}
        small = numel(self.in_shape) * numel(self.out_shape) <= DENSE_LIMIT
        return frozenset(names | {"svd"}) if small or "fast_svd" in names else frozenset(names)

    def _apply(self: Self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Moving the buffers outdates the decomposition."""
        super()._apply(fn, recurse)
        self._svd = None
        return self

    def _device(self) -> torch.device:
        """Device of the tensors it holds, or else the one it was moved to."""
        for name, tensor in (*self.named_buffers(), *self.named_parameters()):
            if not name.endswith("_anchor"):
                return tensor.device
        return next(self.buffers()).device

    def dense(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix of the operator on flattened vectors.

        Args:
            dtype: of the result.

        Returns:
            (dy, d) with dy and d the sizes of out_shape and in_shape.

        Raises:
            OptionError: if the matrix would have more than 2^28 entries.
        """
        d, dy = numel(self.in_shape), numel(self.out_shape)
        if d * dy > 2**28:
            raise OptionError(f"{type(self).__name__} has {dy} x {d} entries, too many to write down; use its products")
        eye = torch.eye(d, dtype=dtype, device=self._device())
        return self.forward(eye.reshape(d, *self.in_shape)).reshape(d, dy).T.contiguous()

    def svd(self) -> SVD:
        """Singular value decomposition with maps, kept until the operator is moved.

        Diagonal, Fourier and pooling members have a fast one; others are factorised densely in float64 when they have
        at most DENSE_LIMIT matrix entries.

        Raises:
            CapabilityError: if the operator is large and has no structure.
        """
        if self._svd is not None:
            return self._svd
        tensors = [*self.buffers(), *self.parameters()]
        if any(t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
            return self.compute_svd()  # learned or traced: it belongs to this call alone
        with _outside_transforms():
            self._svd = self.compute_svd()
        return self._svd

    def compute_svd(self) -> SVD:
        """Build the decomposition; a member with structure overrides this."""
        if "svd" not in self.capabilities:
            raise CapabilityError(
                f"{type(self).__name__} from {self.in_shape} to {self.out_shape} has no fast decomposition and is too "
                "large for a dense one; use solve_gram and pinv, which fall back on conjugate gradients"
            )
        return _diagonal_svd(self) if "diagonal" in self.capabilities else _dense_svd(self)

    def pinv(self, y: Tensor, *, rcond: float | None = None) -> Tensor:
        """The shortest x among those that bring A x closest to y, A^+ y = V diag(1/s) U^T y.

        Without a decomposition it runs conjugate gradients on A^T A x = A^T y from zero.

        Args:
            y: (*batch, *out_shape).
            rcond: singular values below rcond * max(s) count as zero; only those that rounding made when None.

        Returns:
            (*batch, *in_shape).
        """
        self.check_shape(y, self.out_shape, "data")
        if "svd" in self.capabilities:
            svd = self.svd()
            inverse = 1 / svd.s
            if rcond is not None:
                inverse = torch.where(svd.s < rcond * svd.s.amax(-1, keepdim=True), torch.zeros_like(inverse), inverse)
            return svd.from_spectral(svd.to_spectral_data(y) * inverse.to(y))
        if rcond is not None:
            raise OptionError("rcond needs a decomposition, which this operator is too large for; leave rcond None")
        gram = lambda x: self.adjoint(self.forward(x))  # noqa: E731
        return conjugate_gradient(gram, self.adjoint(y), event_ndim=len(self.in_shape)).x

    def solve_gram(
        self,
        r: Tensor,
        noise_var: float | Tensor,
        prior_var: float | Tensor,
        *,
        tolerance: float | None = None,
        max_steps: int | None = None,
    ) -> Tensor:
        """(noise_var I + prior_var A A^T)^{-1} r, the solve of every Gaussian closure with a scalar prior variance.

        Args:
            r: (*batch, *out_shape).
            noise_var: sigma_y^2 >= 0, a number, 0-d or (*batch,). Zero needs A of full row rank. For noise that differs
                between measurements, whiten: `Diagonal(1 / sigma) @ A` with noise_var 1.
            prior_var: v >= 0, a number, 0-d or (*batch,).
            tolerance: of conjugate gradients, where they are needed.
            max_steps: of conjugate gradients.

        Returns:
            (*batch, *out_shape).

        Raises:
            ConvergenceError: if conjugate gradients do not get there.

        Example:
            >>> from inverse.operators import Identity
            >>> Identity((2,)).solve_gram(torch.ones(2), 1.0, 3.0)
            tensor([0.2500, 0.2500])
        """
        self.check_shape(r, self.out_shape, "residual")
        if self.gram_scale is not None:
            ndim, scale = len(self.out_shape), torch.as_tensor(self.gram_scale).to(r)
            return r / (_over_event(noise_var, r, ndim) + _over_event(prior_var, r, ndim) * scale)
        noise, prior = _over_event(noise_var, r, 1), _over_event(prior_var, r, 1)
        if "svd" in self.capabilities:
            svd = self.svd()
            z = svd.to_spectral_data(r)
            out = svd.from_spectral_data(z / (noise + prior * svd.s.to(r).square()))
            if svd.rank == numel(self.out_shape):
                return out  # U is square: nothing is left over, and noise_var may be zero
            return out + (r - svd.from_spectral_data(z)) / _over_event(noise_var, r, len(self.out_shape))
        ndim = len(self.out_shape)
        noise, prior = _over_event(noise_var, r, ndim), _over_event(prior_var, r, ndim)
        gram = lambda u: noise * u + prior * self.forward(self.adjoint(u))  # noqa: E731
        return conjugate_gradient(gram, r, event_ndim=ndim, tolerance=tolerance, max_steps=max_steps).x

    def norm(self, *, steps: int = 200) -> Tensor:
        """Largest singular value: exact with a decomposition, otherwise from below by power iteration.

        Args:
            steps: power iterations, from a fixed start.

        Returns:
            0-d float64 tensor.
        """
        if "svd" in self.capabilities:
            s = self.svd().s
            return s.max() if len(s) else s.new_zeros(())
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.in_shape, generator=generator, dtype=torch.float64).to(self._device())
        value = x.new_zeros(())
        for _ in range(steps):
            x = self.adjoint(self.forward(x / x.norm()))
            value = x.norm().sqrt()
            if value == 0:
                break
        return value

    # ---- algebra ------------------------------------------------------------------------------------------------

    def __matmul__(self, other: LinearOperator) -> Compose:
        """A @ B: first B, then A."""
        from inverse.operators.algebra import Compose

        return Compose(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __add__(self, other: LinearOperator) -> Sum:
        """(A + B) x = A x + B x."""
        from inverse.operators.algebra import Sum

        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float | Tensor) -> Scaled:
        """Scalar multiple."""
        from inverse.operators.algebra import Scaled

        return Scaled(self, factor) if isinstance(factor, int | float | Tensor) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Scaled:
        return self * -1.0

    def __sub__(self, other: LinearOperator) -> Sum:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def extra_repr(self) -> str:
        """Shapes."""
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}"


@contextmanager
def _outside_transforms() -> Iterator[None]:
    """Suspend vmap, grad and tracing, so that what is computed from constants may be kept after they end."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with ExitStack() as stack:
        proxy = sys.modules.get("torch.fx.experimental.proxy_tensor")  # not imported: nothing is being traced
        if proxy is not None:
            stack.enter_context(proxy.disable_proxy_modes_tracing())
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.inference_mode(False))
        yield


def _over_event(value: float | Tensor, like: Tensor, event_ndim: int) -> Tensor:
    """A number per batch member, with trailing axes to multiply an event."""
    v = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return v.reshape(*v.shape, *(1,) * event_ndim) if v.ndim else v


def _diagonal_svd(A: LinearOperator) -> SVD:
    """A^T A = diag(g): V picks the entries with g > 0, s = sqrt(g), U = A V / s."""
    ndim, size = len(A.in_shape), numel(A.in_shape)
    ones = torch.ones(A.in_shape, dtype=torch.float64, device=A._device())
    gram = A.adjoint(A.forward(ones)).reshape(size)
    keep = torch.nonzero(gram > (size * torch.finfo(gram.dtype).eps) ** 2 * gram.max()).squeeze(-1)
    s, index = gram[keep].sqrt(), scatter_index(keep, size)

    def to_spectral(x: Tensor) -> Tensor:
        return flatten_event(x, ndim).index_select(-1, keep)

    def from_spectral(z: Tensor) -> Tensor:
        return scatter(z, index).reshape((*z.shape[:-1], *A.in_shape))

    return SVD(
        s,
        to_spectral,
        from_spectral,
        lambda y: to_spectral(A.adjoint(y)) / s.to(y),
        lambda z: A.forward(from_spectral(z / s.to(z))),
    )


def _dense_svd(A: LinearOperator) -> SVD:
    """Factorise the matrix in float64; values below the rounding of the largest are dropped."""
    matrix = A.dense()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = s > max(matrix.shape) * torch.finfo(s.dtype).eps * s.max()
    u, s, v = u[:, keep], s[keep], vh[keep].T.contiguous()
    n_in, n_out = len(A.in_shape), len(A.out_shape)
    return SVD(
        s,
        lambda x: flatten_event(x, n_in) @ v.to(x),
        lambda z: (z @ v.T.to(z)).reshape((*z.shape[:-1], *A.in_shape)),
        lambda y: flatten_event(y, n_out) @ u.to(y),
        lambda z: (z @ u.T.to(z)).reshape((*z.shape[:-1], *A.out_shape)),
    )
