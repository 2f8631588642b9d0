"""A diffusion model as a Pyro distribution: sample by the reverse process, score by one network call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Size, Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sde.denoiser import call_denoiser
from sde.log_density import Estimate, flow_log_prob, rademacher
from sde.network_covariance import NetworkCovariance
from sde.prior import DenoisingPrior, can_look
from sde.schedule import log_grid
from sde.solvers import DPMSolver2MSDE, sample
from sde.solvers.transition import Solver

__all__ = ["DiffusionPrior"]


class DiffusionPrior(DenoisingPrior):
    r"""The law of the reverse diffusion that a denoiser defines, from N(0, sigma_max^2 I) down to clean data.

    The parameters of the denoiser never receive gradients through a prior; x does where the caller asks for them.

    Args:
        denoiser: (x: (rows, *event), sigma: 0-d or (rows,)[, label: (rows,)]) -> E[x_0 | x]. Any callable; a module
            is put to use as it is (call `.eval()` first).
        event_shape: shape of one draw.
        data_range: range of the data, which nothing rescales or clips; noise levels are in its units.
        sigma_min: last positive noise level.
        sigma_max: first noise level; about 5 times the standard deviation of the data along their widest direction.
        steps: solver steps of `sample`.
        solver: sampler of `sample`; None takes `DPMSolver2MSDE()`.
        label: classes of a conditional prior, any shape, which becomes the batch shape; usually set by
            `prior(label=c)`.
        noise_steps: steps of the deterministic sampler in `from_noise`.
        noise_solver: that sampler; None takes `DPMSolver2M()`.
        grid: (sigma_max, sigma_min, steps) -> noise levels.
        data_std: standard deviation of the data along their widest direction; None takes sigma_max / 5.
        compile: run the denoiser through `torch.compile` where nobody differentiates: about a seventh faster for the
            shipped 28x28 network on a CPU, for a minute of compilation at the first call with each number of rows, by
            a C++ compiler that must be there. Calls that are differentiated, where it gained nothing, run as they are.
            Results differ by rounding.
        chunk: most rows per network call; None is no limit. It changes memory and nothing else.
        checkpointing: store only the inputs of network calls in `from_noise`, and compute the rest again in the
            backward pass.
        log_prob_steps: Runge-Kutta steps of `log_prob`, four network calls each.
        probes: sign vectors of the trace in `log_prob`; 0 takes the exact trace (d vjps per call); None means exact
            up to 32 entries and 4 beyond.
        probe_seed: seed of these vectors, so that `log_prob` is a function.
        dtype: type of draws, for denoisers that do not show theirs.
        device: device of draws, for denoisers that do not show theirs.
        validate_args: as in all distributions.

    Raises:
        ValueError: if an option has a value it cannot have.

    Example:
        >>> prior = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (3,), steps=20)      # N(0, I)
        >>> prior.draw((2,), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        event_shape: Size | tuple[int, ...],
        data_range: tuple[float, float] = (-1.0, 1.0),
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        steps: int = 50,
        solver: Solver | None = None,
        *,
        label: Tensor | int | None = None,
        noise_steps: int = 20,
        noise_solver: Solver | None = None,
        grid: Callable[[float, float, int], Tensor] = log_grid,
        data_std: float | None = None,
        compile: bool = False,
        chunk: int | None = None,
        checkpointing: bool = False,
        log_prob_steps: int = 50,
        probes: int | None = None,
        probe_seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not callable(denoiser):
            raise ValueError(f"denoiser must be callable as (x, sigma), got {type(denoiser).__name__}")
        if len(data_range) != 2:
            raise ValueError(f"data_range must be (low, high) with low < high, got {data_range}")
        low, high = data_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"data_range must be (low, high) with low < high, got {data_range}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least one row, or None for no limit, got {chunk}")
        if log_prob_steps < 1:
            raise ValueError(f"log_prob_steps must be positive, got {log_prob_steps}")
        if probes is not None and probes < 0:
            raise ValueError(f"probes must be zero (exact trace) or more, got {probes}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating type, such as torch.float32, got {dtype!r}")
        if solver is not None and (isinstance(solver, type) or not callable(getattr(solver, "step", None))):
            raise ValueError(f"solver must be one of sde's solvers, such as sde.DPMSolver2MSDE(), got {solver!r}")
        found_dtype, found_device = _home(denoiser)
        self._dtype = dtype or found_dtype
        self._device = torch.device(device) if device is not None else found_device
        self.denoiser, self.data_range = denoiser, (float(low), float(high))
        self._compiled = torch.compile(denoiser, dynamic=False) if compile else None
        self.solver = DPMSolver2MSDE() if solver is None else solver
        self.chunk, self.checkpointing = chunk, checkpointing
        self.log_prob_steps, self.probes, self.probe_seed = log_prob_steps, probes, probe_seed
        self.label: Tensor | None = None
        super().__init__(
            event_shape,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            data_std=sigma_max / 5 if data_std is None else data_std,
            steps=steps,
            noise_steps=noise_steps,
            noise_solver=noise_solver,
            grid=grid,
            validate_args=validate_args,
        )
        if label is not None:
            self.label = torch.as_tensor(label, device=self._device)
            self._batch_shape = self.label.shape

    @property
    def dtype(self) -> torch.dtype:
        """Data type of draws: that of the denoiser's parameters."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of draws: that of the denoiser's parameters."""
        return self._device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A prior on another device or in another precision; a module moves along, in place as torch modules do."""
        new = copy.copy(self)
        if isinstance(self.denoiser, nn.Module):
            self.denoiser.to(device=device, dtype=dtype)
        elif hasattr(_owner(self.denoiser), "denoise"):
            new.denoiser = _owner(self.denoiser).to(device, dtype).denoise
            if self._compiled is not None:
                new._compiled = torch.compile(new.denoiser, dynamic=False)
        new._device = self._device if device is None else torch.device(device)
        new._dtype = self._dtype if dtype is None else dtype
        if self.label is not None:
            new.label = self.label.to(new._device)
        return new

    def __call__(self, sample_shape: Size | tuple[int, ...] = (), *, label: Tensor | int | None = None) -> Any:
        """`prior(label=c)` is the distribution given class c; `prior()` draws, as all Pyro distributions do.

        Args:
            sample_shape: leading shape of a draw.
            label: class, or classes of any shape that broadcasts with the batch shape; may be a latent value.
        """
        if label is None:
            return self.sample(sample_shape)
        new = copy.copy(self)
        new.label = torch.as_tensor(label, device=self.device)
        new._batch_shape = torch.broadcast_shapes(self.batch_shape, new.label.shape)
        return new

    def _denoise(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """The only place that calls the network; x: (rows, *event), sigma: 0-d or (rows,)."""
        wants_grad = torch.is_grad_enabled() and (_tracked(x) or sigma.requires_grad)
        size = max(1, len(x)) if self.chunk is None else self.chunk
        # Compiled code is for values: not for symbols of a trace, tangents or transforms, nor for an empty batch.
        plain = wants_grad or not can_look(x, sigma) or forward_ad._current_level >= 0 or not len(x)
        denoiser = self.denoiser if plain or self._compiled is None else self._compiled
        parts = []
        with torch.set_grad_enabled(wants_grad):
            for at in range(0, max(1, len(x)), size):
                rows = x[at : at + size]
                level = sigma[at : at + size] if sigma.ndim else sigma
                for count in self.counters:
                    count.calls += 1
                    count.evals += len(rows)
                denoised = call_denoiser(denoiser, rows, level, None if label is None else label[at : at + size])
                if not isinstance(denoised, Tensor) or denoised.dtype != rows.dtype:
                    found = denoised.dtype if isinstance(denoised, Tensor) else type(denoised).__name__
                    raise ValueError(
                        f"the denoiser returned {found} for x of {rows.dtype}; it must return a tensor like x, so end "
                        "it with .to(x.dtype), or give the prior the network's dtype="
                    )
                if denoised.shape != rows.shape:
                    raise ValueError(
                        f"the denoiser returned shape {tuple(denoised.shape)} for x of shape {tuple(rows.shape)}; "
                        "it must return one clean estimate per row, with sigma of shape () or (rows,)"
                    )
                parts.append(denoised)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def denoise(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """E[x_0 | x_0 + sigma n = x], by one network call for all rows (or one per chunk).

        Args:
            x: (*batch, *event).
            sigma: positive; 0-d, or broadcastable over the batch axes.
            label: (*batch) classes; by default those of the prior.

        Returns:
            (*batch, *event).

        Raises:
            ValueError: if x has the wrong shape or type, or x or sigma a value that cannot be denoised.
        """
        return super().denoise(x, sigma, self.label if label is None else label)

    def covariance(self, x: Tensor, sigma: Tensor | float) -> NetworkCovariance:
        """Cov[x_0 | x] = sigma^2 dD/dx, symmetrised, as an operator whose `mean` is D(x, sigma).

        Args:
            x: (*batch, *event).
            sigma: positive; 0-d, or broadcastable over the batch axes.
        """
        level = self._checked(x, sigma)
        batch = x.shape[: x.ndim - len(self.event_shape)]

        def at(index: Tensor) -> NetworkCovariance:
            given = self._given(None if self.label is None else self.label.expand(batch)[index])
            return given.covariance(x[index], level.expand(batch)[index] if level.ndim else level)

        # The parameters of the network must not be tracked when nobody asked for gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and _tracked(x)):
            return NetworkCovariance(
                lambda x: self.denoise(x, level), x, level, self.event_shape, on_product=self._count_products, at=at
            )

    def _count_products(self, rows: int) -> None:
        """Count rows differentiated."""
        for count in self.counters:
            count.vjps += rows

    def draw(self, shape: Size | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """(*shape, *batch_shape, *event_shape) draws by the reverse process; None is torch's global generator."""
        lead = Size(shape) + self.batch_shape
        rows = Size([lead.numel()]) + self.event_shape
        device = self.device if generator is None else generator.device
        label = self._row_labels(lead)
        with torch.no_grad():
            noise = torch.randn(rows, generator=generator, dtype=self.dtype, device=device).to(self.device)
            draws = sample(
                self.solver,
                lambda x, sigma: self.denoise(x, sigma, label),
                self.start(noise),
                self.sigmas(),
                generator,
                covariance=lambda x, sigma: self._given(label).covariance(x, sigma),
            )
        return draws.reshape(lead + self.event_shape)

    def _row_labels(self, lead: Size) -> Tensor | None:
        """The labels of the prior, one for each of lead.numel() rows."""
        return None if self.label is None else self.label.expand(lead).reshape(-1)

    def _given(self, label: Tensor | None) -> Self:
        """The same prior with other labels."""
        if label is None:
            return self
        new = copy.copy(self)
        new.label = label
        return new

    def from_noise(self, z: Tensor) -> Tensor:
        """The draw that standard normal noise makes, by the deterministic sampler; differentiable in z.

        Args:
            z: (*batch, *noise_shape).

        Returns:
            (*batch, *event).
        """
        label = self._row_labels(z.shape[: z.ndim - len(self.event_shape)])

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            if self.checkpointing and torch.is_grad_enabled() and x.requires_grad:
                return checkpoint(self.denoise, x, sigma, label, use_reentrant=False)
            return self.denoise(x, sigma, label)

        return self._flow(z, denoise)

    def log_prob(self, value: Tensor) -> Tensor:
        """(*batch) normalised log density by the probability-flow ODE: a deterministic, differentiable function.

        It is the density of x_0 + sigma_min n. With probes the trace is unbiased over probe seeds, not exact for one.
        """
        if self._validate_args:
            self._validate_sample(value)
        dims = len(self.event_shape)
        lead = torch.broadcast_shapes(value.shape[: value.ndim - dims], self.batch_shape)
        lead_in = value.shape[: value.ndim - dims] if self.label is None else lead
        rows = value.expand(lead_in + self.event_shape).reshape(lead_in.numel(), *self.event_shape)
        d = self.event_shape.numel()
        count = (0 if d <= 32 else 4) if self.probes is None else self.probes
        probes = rademacher(count, self.event_shape, self.probe_seed, rows) if count else None
        label = self._row_labels(lead_in)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _tracked(rows)):
            log_prob = flow_log_prob(
                lambda x, sigma: self.denoise(x, sigma, label),
                rows,
                self.sigma_min,
                self.sigma_max,
                self.log_prob_steps,
                probes,
                self._count_products,
            )
        return log_prob.reshape(lead_in).expand(lead)

    def log_prob_estimate(
        self, value: Tensor, generator: torch.Generator | None = None, *, levels: int = 32, repeats: int = 8
    ) -> Estimate:
        """Log density with a standard error, from denoising errors alone (I-MMSE); see `DenoisingPrior`.

        Args:
            value: (*batch, *event).
            generator: source of the noise; None takes torch's global one.
            levels: noise levels of one repeat; two network calls each.
            repeats: independent repeats, at least 2.
        """
        batch = value.shape[: value.ndim - len(self.event_shape)]
        lead = torch.broadcast_shapes(batch, Size() if self.label is None else self.label.shape)
        prior = self._given(self._row_labels(lead))
        rows = value.expand(lead + self.event_shape).reshape(lead.numel(), *self.event_shape)
        estimate = DenoisingPrior.log_prob_estimate(prior, rows, generator, levels=levels, repeats=repeats)
        return Estimate(*(part.reshape(lead) for part in estimate))


def _tracked(x: Tensor) -> bool:
    """Whether someone differentiates in x, by autograd or by a function transform."""
    return x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _owner(denoiser: Callable[..., Tensor]) -> Any:
    """The object behind a bound method, or the callable itself."""
    return getattr(denoiser, "__self__", denoiser)


def _home(denoiser: Callable[..., Tensor]) -> tuple[torch.dtype, torch.device]:
    """Data type and device of a denoiser's parameters; torch's defaults for plain functions."""
    owner = _owner(denoiser)
    if isinstance(owner, nn.Module):
        for tensor in [*owner.parameters(), *owner.buffers()]:
            if tensor.is_floating_point():
                return tensor.dtype, tensor.device
    elif isinstance(getattr(owner, "dtype", None), torch.dtype):
        return owner.dtype, torch.device(getattr(owner, "device", "cpu"))
    return torch.get_default_dtype(), torch.device("cpu")
