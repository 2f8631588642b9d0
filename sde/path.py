r"""The path of a stochastic differential equation as a Pyro distribution, built from its driving noise.

    x_{n+1} = x_n + f(x_n, t_n) dt + g(x_n, t_n) (B(t_{n+1}) - B(t_n))

on a grid that holds all times asked for. The driving numbers are its noise space, on which `ppl.NoiseSpace` runs any
engine.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.utils.checkpoint import checkpoint

from sde.incomplete_gamma import Array, constant
from sde.increments import Increments, starts_random
from sde.markov import MarkovNoise
from sde.mixture import GaussianMixture
from sde.prior import can_look
from sde.process import Process
from sde.recursion import Recursion

__all__ = ["Path"]


class Path(TorchDistribution):
    r"""X at given times, for a process that starts at `initial` at time `start`.

    Draws are exact for the discretised process. So is `log_prob`, where every step ends at a time asked for (`dt=None`)
    and every coordinate has its own noise.

    Args:
        process: drift, diffusion and noise.
        times: (n,) strictly increasing, after `start`, within the noise's horizon.
        initial: (d,) or (*batch, d), X at `start`; a number is one coordinate.
        start: the time of `initial`.
        dt: longest step; None takes one step from time to time.
        checkpoint_steps: store the state every so many steps and compute the rest again in the backward pass, which
            bounds memory for long paths. None stores everything.
        compile: run pieces of ten steps through `torch.compile`: faster where the drift is a small network, for some
            ten seconds of compilation at the first call with each shape, by a C++ compiler that must be there. Traces
            and transforms run as they are; gradients go once, not twice. Results differ by rounding.

    Raises:
        ValueError: times that do not increase or leave the horizon, shapes that do not fit, a drift that is not finite.

    Example:
        >>> path = Path(Process(lambda x, t: -x, 0.5), torch.linspace(0.1, 1, 10), initial=torch.zeros(2))
        >>> path.event_shape, path.sample((3,)).shape, path.noise_shape
        (torch.Size([10, 2]), torch.Size([3, 10, 2]), torch.Size([20]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        process: Process,
        times: Tensor,
        initial: Tensor | float = 0.0,
        *,
        start: float = 0.0,
        dt: float | None = None,
        checkpoint_steps: int | None = None,
        compile: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(process, Process):
            raise ValueError(f"process must be a Process, such as Process(drift, diffusion), got {process!r}")
        times = torch.as_tensor(times)
        known = np.asarray(times.tolist(), dtype=np.float64)  # numpy() has no data where a transform is under way
        increasing = known.ndim == 1 and len(known) > 0 and bool((np.diff(known, prepend=start) > 0).all())
        if not increasing or not np.isfinite([start, known[-1]]).all():
            raise ValueError(
                f"times, (n,), must be finite, strictly increasing and after the start at {start:g}, got "
                f"{np.atleast_1d(known).tolist()[:8]}; give `start` the time of `initial`, and make repeated times one"
            )
        if dt is not None and not (math.isfinite(dt) and dt > 0):
            raise ValueError(f"dt must be positive, the longest step, got {dt!r}")
        if checkpoint_steps is not None and not (isinstance(checkpoint_steps, int) and checkpoint_steps >= 1):
            raise ValueError(f"checkpoint_steps must be a positive integer or None, got {checkpoint_steps!r}")
        dtype = times.dtype if times.is_floating_point() else torch.get_default_dtype()
        initial = torch.as_tensor(initial, dtype=initial.dtype if isinstance(initial, Tensor) else dtype)
        initial = initial if initial.is_floating_point() else initial.to(dtype)
        self.initial = initial if initial.ndim else initial[None]
        self.process, self.times, self.start, self.dt = process, times, start, dt
        self.checkpoint_steps, self.recursion = checkpoint_steps, Recursion(process, compile)
        grid, self.ends = _grid(start, known, dt)
        self.increments = Increments(process.noise, grid)
        self.noises = process.size(self.initial.shape[-1])
        batch = self.initial.shape[:-1]
        if can_look(self.initial):
            process.check(self.initial, self.initial.new_tensor(start), float(known[-1]))
            if isinstance(process.noise, MarkovNoise):
                process.noise.check(start, float(known[-1]), self.noises, self.initial.device)
        super().__init__(batch, Size((len(times), self.initial.shape[-1])), validate_args=validate_args)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the path."""
        return self.initial.dtype

    @property
    def device(self) -> torch.device:
        """Device of the path."""
        return self.initial.device

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return self.increments.steps

    @property
    def capabilities(self) -> frozenset[str]:
        """Every path has a noise space; a density where all states are seen; a linear one is Gaussian."""
        density = {"log_prob"} if self._has_density else set()
        gaussian = {"condition_linear"} if can_look(self.initial) and self.is_linear else set()
        return frozenset({"noise_space", "path"} | density | gaussian)

    @cached_property
    def is_linear(self) -> bool:
        """Whether the path is linear in its noise, found at three probes, so that it is a Gaussian vector."""
        z = torch.randn(2, *self.noise_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z = torch.cat([z, z.sum(0, keepdim=True), torch.zeros_like(z[:1])]).to(self.initial)
        if self.batch_shape:
            z = z.reshape(4, *(1,) * len(self.batch_shape), -1)
        with torch.no_grad():
            one, other, both, origin = self.from_noise(z)
        error, scale = (both - one - other + origin).abs().max(), (both - origin).abs().max()
        return bool(error <= (1e-9 if self.dtype == torch.float64 else 1e-4) * scale)

    def gaussian(self) -> GaussianMixture:
        """The exact law of a linear path, with everything that conditions a Gaussian: one component over (n, d).

        Raises:
            ValueError: drift or diffusion are not linear in the state, there is a batch shape, or nothing moves.

        Example:
            >>> law = Path(Process(lambda x, t: -x), torch.tensor([0.5, 1.0])).gaussian()
            >>> [round(v, 3) for v in law.variance[:, 0].tolist()]
            [0.5, 0.625]
        """
        if self.batch_shape or not self.is_linear:
            raise ValueError(
                f"this path has no Gaussian law: it must be linear in its noise, without a batch shape, got batch "
                f"shape {tuple(self.batch_shape)}; run ppl.NoiseSpace(engine)"
            )
        size = self.noise_shape.numel()
        basis = torch.cat([torch.zeros(1, size), torch.eye(size)]).to(self.initial)
        with torch.no_grad():
            x = self.from_noise(basis).double()
        columns = (x[1:] - x[0]).flatten(1)
        if not bool((columns != 0).any()):
            raise ValueError(
                f"the diffusion of this path is zero from time {self.start:g} to {float(self.times[-1]):g}, so that no "
                "noise moves it; give Process(drift, diffusion) a diffusion, or compute the path without a site"
            )
        covariance = columns.mT @ columns
        mean, one = x[:1].to(self.dtype), torch.ones(1, dtype=self.dtype, device=self.device)
        return GaussianMixture(one, mean, covariance[None].to(self.dtype))

    @property
    def _has_density(self) -> bool:
        """Whether all states of the grid are in the value and coordinates have their own noise."""
        return len(self.ends) == self.steps and not self.process.general and self.process.sense == "ito"

    @property
    def noise_shape(self) -> Size:
        """(steps m,) driving numbers, then (m K,) for the factors' start where that is random."""
        more = self.process.noise.size if starts_random(self.process.noise) else 0
        return Size((self.noises * (self.steps + more),))

    def split_noise(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """(*batch, m, steps) driving numbers and (*batch, m, K) for the start of the factors, or None."""
        driving, rest = z.split([self.noises * self.steps, z.shape[-1] - self.noises * self.steps], -1)
        first = driving.reshape(*z.shape[:-1], self.noises, self.steps)
        return first, rest.reshape(*z.shape[:-1], self.noises, -1) if rest.shape[-1] else None

    def from_noise(self, z: Tensor) -> Tensor:
        """The path of standard normal numbers, differentiable: (*batch, noise) -> (*batch, n, d)."""
        if z.shape[-1:] != self.noise_shape:
            raise ValueError(f"driving numbers must end in {tuple(self.noise_shape)}, got shape {tuple(z.shape)}")
        x = self.follow(self.increments(*self.split_noise(z)))
        return x if len(self.ends) == self.steps else x[..., torch.from_numpy(self.ends).to(x.device), :]

    def follow(self, increments: Tensor) -> Tensor:
        """X after every step of the grid: (*batch, m, steps) increments of the noise -> (*batch, steps, d)."""
        batch = torch.broadcast_shapes(increments.shape[:-2], self.initial.shape[:-1])
        x = self.initial.expand(*batch, -1).to(increments.dtype)
        times, dt = (constant(part, x).to(x) for part in (self.increments.grid[:-1], self.increments.dt))
        if not self.checkpoint_steps or not torch.is_grad_enabled():
            return self.recursion(x, increments, times, dt)
        found: list[Tensor] = []
        parts = (whole.split(self.checkpoint_steps, -1) for whole in (increments, times, dt))
        for part in zip(*parts, strict=True):
            # Without the check that both passes made the same shapes, which costs a fifth of small steps.
            found.append(checkpoint(self.recursion, x, *part, use_reentrant=False, determinism_check="none"))
            x = found[-1][..., -1, :]
        return torch.cat(found, -2)

    # The distribution.

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> Path:
        """Independent paths over batch_shape."""
        shape = Size(batch_shape)
        new = Path(
            self.process, self.times, self.initial.expand(*shape, -1), start=self.start, dt=self.dt,
            checkpoint_steps=self.checkpoint_steps, validate_args=False,
        )  # fmt: skip
        new.recursion = self.recursion  # with what is compiled
        return new

    def draw(self, shape: Size | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """(*shape, *batch, n, d) draws from an explicit generator; None takes torch's global one.

        Raises:
            ValueError: a path that leaves the finite numbers, with the time and the state before.
        """
        z = torch.randn(
            *shape, *self.batch_shape, *self.noise_shape, generator=generator, dtype=self.dtype, device=self.device
        )
        x = self.from_noise(z)
        if can_look(x) and not bool(x.isfinite().all()):
            raise ValueError(self.why_not_finite(z))
        return x

    @torch.no_grad()
    def why_not_finite(self, z: Tensor) -> str:
        """What goes wrong first on the way from these driving numbers to a path that is not finite, in words."""
        later = self.follow(self.increments(*self.split_noise(z)))
        x = torch.cat([self.initial.expand_as(later[..., 0, :])[..., None, :].to(later), later], -2)
        lost = (~x.isfinite()).any(-1).reshape(-1, self.steps + 1)
        if not bool(lost.any()):
            return "the path is finite"
        n = int(lost.any(0).nonzero()[0, 0]) - 1
        which, t = int(lost[:, n + 1].nonzero()[0, 0]), float(self.increments.grid[n])
        state, now = x[..., n, :], x.new_tensor(t)
        where = f"at time {t:g} and state {state.reshape(-1, x.shape[-1])[which, :8].tolist()}"
        wider = f"; where states grow out of bounds, steps of {float(self.increments.dt.max()):.3g} may be too long"
        f, g = self.process.f(state, now), self.process.g(state, now).expand(*state.shape, *self._columns)
        for name, value in (("drift", f), ("diffusion", g)):
            if not bool(value.reshape(-1, *value.shape[state.ndim - 1 :])[which].isfinite().all()):
                return f"the {name} is not finite {where}{wider}"
        return f"the path is not finite one step after it was {where}{wider}: take a smaller dt"

    @property
    def _columns(self) -> tuple[int, ...]:
        """What a diffusion has beyond the shape of the state."""
        return (self.noises,) if self.process.general else ()

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, *batch, n, d) differentiable draws from torch's global generator."""
        return self.draw(Size(sample_shape))

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, *batch, n, d) draws from torch's global generator."""
        with torch.no_grad():
            return self.draw(Size(sample_shape))

    def noise_increments(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Increments of the noise that make a path whose states are all given, and log |det| of what they go through.

        Args:
            value: (*batch, n, d), of a path with a density.

        Returns:
            (*batch, m, steps) and (*batch).
        """
        if value.shape[-2:] != self.event_shape:
            raise ValueError(f"a value must end in {tuple(self.event_shape)}, got shape {tuple(value.shape)}")
        before = torch.cat(
            [self.initial[..., None, :].expand(*value.shape[:-2], 1, -1).to(value), value[..., :-1, :]], -2
        )
        increments, log_scale = [], torch.zeros((), dtype=value.dtype, device=value.device)
        times, dts = constant(self.increments.grid, value).to(value), self.increments.dt.tolist()
        for n, x in enumerate(before.unbind(-2)):
            g = self.process.g(x, times[n])
            if can_look(g) and bool((g == 0).any()):
                raise ValueError(
                    f"the diffusion vanishes at time {float(times[n]):g}, where the path has no density; run the "
                    "engine in noise space, ppl.NoiseSpace(engine)"
                )
            increments.append((value[..., n, :] - x - self.process.f(x, times[n]) * dts[n]) / g)
            log_scale = log_scale + g.abs().log().sum(-1)
        return torch.stack(increments, -1), log_scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the discretised path, (*batch).

        Raises:
            ValueError: steps between the times, or noises that coordinates share: then there is no closed form; a
                value of another shape; a diffusion that vanishes.
        """
        if not self._has_density:
            raise ValueError(
                "no density in closed form: this path has steps between its times, shared noises, or Heun's rule; "
                "run the engine in noise space, ppl.NoiseSpace(engine), or use dt=None"
            )
        b, log_scale = self.noise_increments(value)
        factor = self.increments.factor().to(value)
        white = torch.linalg.solve_triangular(factor, b[..., None], upper=False)[..., 0]
        half = factor.diagonal(dim1=-2, dim2=-1).log().expand(b.shape)
        return -(0.5 * white**2 + half + 0.5 * math.log(2 * math.pi)).sum((-2, -1)) - log_scale


def _grid(start: float, times: Array, dt: float | None) -> tuple[Array, Array]:
    """Times of all states, and which of the states after the first are asked for."""
    known = np.concatenate([[start], times])
    counts = np.ones(len(times), dtype=int)
    if dt is not None:
        counts = np.maximum(1, np.ceil(np.diff(known) / dt - 1e-9).astype(int))
    parts = [np.linspace(a, b, n + 1)[1:] for a, b, n in zip(known[:-1], known[1:], counts, strict=True)]
    return np.concatenate([[start], *parts]), counts.cumsum() - 1
