"""Linear operators as torch modules: A x, A^T y, A^+ y, A = U diag(s) V^T, and solves with sigma^2 I + v A A^T.

Everything is real. A complex measurement is stored with a last axis (re, im), so that a Normal likelihood has one
standard deviation per real number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from inverse.operators.calls import noted
from inverse.operators.decomposition import SVD, dense_svd, diagonal_svd
from inverse.operators.eager import outside_transforms
from inverse.operators.events import event_shape, numel, over_event
from inverse.operators.linear_solve import conjugate_gradient
from ppl.errors import CapabilityError, DataError, OptionError, ShapeError

if TYPE_CHECKING:
    from inverse.operators.algebra import Compose, Scaled, Sum

__all__ = ["DENSE_LIMIT", "LinearOperator"]

DENSE_LIMIT = 2**22
"""Largest number of matrix entries for which `svd` falls back to a dense factorisation."""

Self = TypeVar("Self", bound="LinearOperator")


class LinearOperator(nn.Module):
    """A linear map between tensors of fixed shape, with any number of leading batch axes.

    A member writes `forward` and `adjoint`; all else has a default. Values follow the dtype of the argument: buffers
    are cast where they are used, and `.to(device)` moves them.

    Args:
        in_shape: shape of one x; n for a vector of n entries, (n,).
        out_shape: shape of one A x, likewise.

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

    def __init__(self, in_shape: int | tuple[int, ...], out_shape: int | tuple[int, ...]) -> None:
        super().__init__()
        self.in_shape, self.out_shape = event_shape(in_shape), event_shape(out_shape, "out_shape")
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
        return noted(self, lambda: super(LinearOperator, self).__call__(x, *args, **kwargs), x)

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
        with outside_transforms():
            self._svd = self.compute_svd()
        return self._svd

    def compute_svd(self) -> SVD:
        """Build the decomposition; a member with structure overrides this."""
        if "svd" not in self.capabilities:
            raise CapabilityError(
                f"{type(self).__name__} from {self.in_shape} to {self.out_shape} has no fast decomposition and is too "
                "large for a dense one; use solve_gram and pinv, which fall back on conjugate gradients"
            )
        return diagonal_svd(self) if "diagonal" in self.capabilities else dense_svd(self)

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
            if rcond is not None and inverse.numel():  # nothing is left of an operator that sees nothing
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
            return r / (over_event(noise_var, r, ndim) + over_event(prior_var, r, ndim) * scale)
        noise, prior = over_event(noise_var, r, 1), over_event(prior_var, r, 1)
        if "svd" in self.capabilities:
            svd = self.svd()
            z = svd.to_spectral_data(r)
            out = svd.from_spectral_data(z / (noise + prior * svd.s.to(r).square()))
            if svd.rank == numel(self.out_shape):
                return out  # U is square: nothing is left over, and noise_var may be zero
            return out + (r - svd.from_spectral_data(z)) / over_event(noise_var, r, len(self.out_shape))
        ndim = len(self.out_shape)
        noise, prior = over_event(noise_var, r, ndim), over_event(prior_var, r, ndim)
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
