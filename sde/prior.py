"""What all diffusion priors share: a Pyro distribution over x_0 that can be denoised at any noise level."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor

from sde.covariance import TweedieCovariance
from sde.denoiser import CallCount
from sde.log_density import Estimate, i_mmse
from sde.schedule import log_grid
from sde.solvers import DPMSolver2M, sample
from sde.solvers.transition import Solver

__all__ = ["DenoisingPrior"]


def can_look(*tensors: Tensor) -> bool:
    """Whether values may be looked at: not inside a vmap, a grad transform or a trace, where they are symbols."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


class DenoisingPrior(TorchDistribution):
    """A distribution of x_0 that knows E[x_0 | x_0 + sigma n] at every sigma; the base of all diffusion priors.

    Args:
        event_shape: shape of one draw.
        sigma_min: last positive noise level of the grid.
        sigma_max: first noise level of the grid.
        data_std: standard deviation of the data along their widest direction.
        steps: default number of steps of `sigmas`.
        noise_steps: steps of the deterministic sampler in `from_noise`.
        noise_solver: that sampler.
        grid: (sigma_max, sigma_min, steps) -> noise levels.
        validate_args: as in all distributions; None follows the global setting.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        event_shape: Size | tuple[int, ...],
        *,
        sigma_min: float,
        sigma_max: float,
        data_std: float,
        steps: int,
        noise_steps: int,
        noise_solver: Solver | None,
        grid: Callable[[float, float, int], Tensor] = log_grid,
        validate_args: bool | None = None,
    ) -> None:
        noise_solver = DPMSolver2M() if noise_solver is None else noise_solver
        if noise_solver.stochastic:
            raise ValueError(f"noise_solver must be deterministic, got {noise_solver}; use DDIM() or DPMSolver2M()")
        if not (math.isfinite(data_std) and data_std > 0):
            raise ValueError(f"data_std must be positive and finite, got {data_std}")
        try:
            shape = Size(event_shape)
        except TypeError:
            shape = Size((-1,))
        if min(shape, default=1) < 1:
            raise ValueError(f"event_shape must be the shape of one draw, such as (1, 28, 28), got {event_shape!r}")
        if not callable(grid):
            raise ValueError(f"grid must be a function such as sde.log_grid or sde.edm_grid, got {grid!r}")
        for number in (steps, noise_steps):
            grid(sigma_max, sigma_min, number)
        self.sigma_min, self.sigma_max, self.data_std = float(sigma_min), float(sigma_max), float(data_std)
        self.steps, self.noise_steps, self.noise_solver, self.grid = steps, noise_steps, noise_solver, grid
        self.counters: list[CallCount] = []
        super().__init__(Size(), shape, validate_args=validate_args)

    # What a subclass provides.

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Data type of draws."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of draws."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What engines may ask of this distribution."""
        return frozenset({"denoiser", "noise_space", "log_prob"})

    @abstractmethod
    def _denoise(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Denoise x: (rows, *event) at sigma: 0-d or (rows,)."""

    @abstractmethod
    def covariance(self, x: Tensor, sigma: Tensor | float) -> TweedieCovariance:
        """Cov[x_0 | x_0 + sigma n = x] for x: (*batch, *event)."""

    @abstractmethod
    def draw(self, shape: Size | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """(*shape, *batch_shape, *event_shape) draws from an explicit generator; None takes torch's global one."""

    # The distribution.

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event's shape."""
        dims = len(self.event_shape)
        return constraints.independent(constraints.real, dims) if dims else constraints.real

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> Self:
        """Independent copies over batch_shape; parameters and counters are shared."""
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        return new

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, *batch_shape, *event_shape) draws from torch's global generator, as Pyro wants them."""
        return self.draw(Size(sample_shape), None)

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"{type(self).__name__}(event_shape={tuple(self.event_shape)}{batch})"

    # Denoising.

    def denoise(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """E[x_0 | x_0 + sigma n = x].

        Args:
            x: (*batch, *event).
            sigma: positive; 0-d, or broadcastable over the batch axes.
            label: (*batch) classes, where the prior knows any.

        Returns:
            (*batch, *event).

        Raises:
            ValueError: if x has the wrong shape or type, or x or sigma a value that cannot be denoised.
        """
        sigma = self._checked(x, sigma)
        batch = x.shape[: x.ndim - len(self.event_shape)]
        rows = x.reshape(batch.numel(), *self.event_shape)
        if sigma.ndim:
            sigma = sigma.expand(batch).reshape(-1)
        if label is not None:
            label = torch.as_tensor(label, device=x.device).expand(batch).reshape(-1)
        return self._denoise(rows, sigma, label).reshape(x.shape)

    def score(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """grad log p_sigma(x) = (D(x, sigma) - x) / sigma^2, for x: (*batch, *event)."""
        denoised = self.denoise(x, sigma, label)
        s = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return (denoised - x) / s.square().reshape(*s.shape, *[1] * len(self.event_shape))

    def _checked(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Sigma as a tensor; shapes and types always checked, values where that is possible."""
        dims = len(self.event_shape)
        if x.shape[x.ndim - dims :] != self.event_shape or x.ndim < dims:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but events of this prior have shape {tuple(self.event_shape)}; "
                "give (*batch, *event)"
            )
        if x.dtype != self.dtype:
            raise ValueError(
                f"x is {x.dtype}, but this prior computes in {self.dtype}; use x.to({self.dtype}) or prior.to"
            )
        # A Python float would become float32 and lose half of its digits.
        level = sigma if isinstance(sigma, Tensor) else torch.as_tensor(sigma, dtype=torch.float64)
        try:
            torch.broadcast_shapes(level.shape, x.shape[: x.ndim - dims])
        except RuntimeError:
            fits = False
        else:
            fits = level.ndim <= x.ndim - dims
        if not fits:
            raise ValueError(
                f"sigma has shape {tuple(level.shape)}, which does not broadcast over the batch axes of x, "
                f"{tuple(x.shape[: x.ndim - dims])}; give one level, or one per row"
            )
        if self._validate_args and can_look(x, level):
            if not bool((level > 0).all() & level.isfinite().all()):
                raise ValueError(
                    f"sigma must be positive and finite, got {_extremes(level)}; "
                    f"the grid of this prior goes down to sigma_min={self.sigma_min:.3g}"
                )
            # The sum is one cheap pass; only if it overflows is every entry looked at.
            if not bool(x.detach().sum().isfinite()) and not bool(x.isfinite().all()):
                bad = int((~x.isfinite()).sum())
                raise ValueError(
                    f"x at sigma={_extremes(level)} has {bad} entries that are not finite; look at the step before"
                )
        return level.to(x.device, x.dtype)

    # Noise levels and noise space.

    def sigmas(self, steps: int | None = None) -> Tensor:
        """(steps + 1,) float64 noise levels on the CPU, from sigma_max to sigma_min and then exactly 0."""
        return self.grid(self.sigma_max, self.sigma_min, self.steps if steps is None else steps)

    @property
    def noise_shape(self) -> Size:
        """Shape of the standard normal noise that makes one draw."""
        return self.event_shape

    def start(self, noise: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """x at the first noise level from standard normal noise: (*batch, *event); sigma defaults to sigma_max."""
        return noise * (self.sigma_max if sigma is None else sigma)

    def from_noise(self, z: Tensor) -> Tensor:
        """The draw that standard normal noise makes, by the deterministic sampler; differentiable in z.

        Args:
            z: (*batch, *noise_shape).

        Returns:
            (*batch, *event).
        """
        return self._flow(z, self.denoise)

    def _flow(self, z: Tensor, denoise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Run the deterministic sampler with one leading axis."""
        rows = self.start(z.reshape(-1, *self.event_shape))
        return sample(self.noise_solver, denoise, rows, self._noise_sigmas()).reshape(z.shape)

    def _noise_sigmas(self) -> Tensor:
        """Noise levels of the deterministic sampler."""
        return self.sigmas(self.noise_steps)

    def log_prob_estimate(
        self, value: Tensor, generator: torch.Generator | None = None, *, levels: int = 32, repeats: int = 8
    ) -> Estimate:
        """Log density with a standard error, from denoising errors alone (I-MMSE): no Jacobian, no ODE.

        Exact in expectation for the optimal denoiser, up to what lies outside (sigma_min, sigma_max); a network's own
        error enters as well and is not in the standard error.

        Args:
            value: (*batch, *event).
            generator: source of the noise, which all rows share; None takes torch's global one.
            levels: noise levels of one repeat, stratified in log sigma; two network calls each.
            repeats: independent repeats, at least 2; the standard error comes from their spread.

        Returns:
            Estimate(value, stderr), each (*batch).
        """
        batch = value.shape[: value.ndim - len(self.event_shape)]
        rows = value.reshape(batch.numel(), *self.event_shape)
        estimate = i_mmse(self.denoise, rows, self.sigma_min, self.sigma_max, generator, levels=levels, repeats=repeats)
        return Estimate(estimate.value.reshape(batch), estimate.stderr.reshape(batch))


def _extremes(level: Tensor) -> str:
    """A noise level, or the range of several, for a message."""
    if level.numel() == 1:
        return f"{float(level):.4g}"
    return f"values from {float(level.min()):.4g} to {float(level.max()):.4g}"
