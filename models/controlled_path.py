r"""A controlled path as a Pyro distribution: the law of X where the driving noise has a mean of its own at every step.

    z_n ~ N(u(X_n, Y_n, h_n) sqrt(dt), s_n^2),   Y+ = e^(-gamma dt) Y + m sqrt(dt) z_n,   X+ = X + f dt + g w . (Y+ - Y)

Beside the prior `sde.Path`, log q - log p of a draw has mean E sum of u^2 dt / 2 where s = 1, as in continuous time,
and (s^2 - 1) / 2 - log s more for every number otherwise [derived]. Data sharper than a step ask for s below 1. Noise
of type I starts from random Y_0, which are given: they are an unknown of their own, with a guide of its own.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn

from inverse.paths.factors import Factors
from ppl.errors import CapabilityError
from sde.incomplete_gamma import constant
from sde.increments import starts_random
from sde.path import Path

__all__ = ["Control", "ControlledPath", "Sight"]


class Sight:
    """What a control sees: the state, and the factors in units of their spread at the noise's horizon, or always (I).

    The horizon, not the path's end: a path that is followed for longer looks the same.
    """

    def __init__(self, path: Path, like: Tensor) -> None:
        noise = path.process.noise
        rates = np.array(noise.rates) if noise.size else np.zeros(0)  # type: ignore[attr-defined]
        spread = np.where(rates > 0, 0.0, 1.0) if starts_random(noise) else np.ones_like(rates)
        self.unit = constant(np.sqrt(2 * rates + spread / noise.horizon), like).to(like)

    def __call__(self, x: Tensor, factors: Factors) -> Tensor:
        """(batch, latent) and the factors -> (batch, latent (1 + K))."""
        return torch.cat([x, (factors.y * self.unit).flatten(1)], 1)


class Control(nn.Module):
    """u sqrt(dt) from the state, the factors and the context: linear with gains from the context, plus a network.

    The linear part alone is the best control of a linear process with Gaussian data. Zero at first, and bounded.

    Args:
        seen: numbers of the state and the factors together.
        context: numbers of the context.
        latent: numbers of u.
        width: units in each of two hidden layers.
        scales: read s off the context as well; 1 otherwise.
        bound: largest absolute value of u sqrt(dt).
    """

    def __init__(
        self, seen: int, context: int, latent: int, width: int, scales: bool = False, bound: float = 5.0
    ) -> None:
        super().__init__()
        self.bound, self.shape = bound, (latent, 1 + seen)
        self.log_scale = nn.Linear(context, latent) if scales else None
        self.given, self.gain = nn.Linear(context, width), nn.Linear(context, latent * (1 + seen))
        self.seen = nn.Linear(seen, width, bias=False)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, latent, bias=False)
        with torch.no_grad():
            for weight in (self.gain.weight, self.gain.bias, self.out.weight):
                weight.zero_()
            for weight in () if self.log_scale is None else self.log_scale.parameters():
                weight.zero_()

    def read(self, context: Tensor) -> Tensor:
        """What the context contributes, for all steps at once: (batch, steps, context) -> (batch, steps, units)."""
        parts = [self.given(context), self.gain(context)]
        return torch.cat(parts if self.log_scale is None else [*parts, self.log_scale(context)], -1)

    def scale(self, given: Tensor) -> Tensor:
        """s from (..., units), (..., latent)."""
        latent = self.shape[0]
        return given.new_ones(*given.shape[:-1], latent) if self.log_scale is None else given[..., -latent:].exp()

    def forward(self, seen: Tensor, given: Tensor) -> Tensor:
        """u sqrt(dt) from (batch, seen) and (batch, units), (batch, latent)."""
        own = given[..., : self.hidden.in_features]
        gain = given[..., own.shape[-1] : own.shape[-1] + self.gain.out_features].unflatten(-1, self.shape)
        hidden = torch.tanh(self.hidden(torch.tanh(self.seen(seen) + own)))
        linear = gain[..., 0] + (gain[..., 1:] @ seen[..., None])[..., 0]
        return self.bound * torch.tanh((linear + self.out(hidden)) / self.bound)


class ControlledPath(TorchDistribution):
    """A path under control, every coordinate with its own noise, every step in the value.

    Args:
        path: the prior, (*batch) = (series,), without steps between its times.
        control: from latent (1 + K) numbers of state and factors to u sqrt(dt); None is the prior, given `first`.
        given: (series, steps, units), what the control knows at each step; None without a control.
        first: (series, latent, K) normal numbers that start the factors of type I; None for others.

    Raises:
        CapabilityError: a path whose driving numbers cannot be told from its values.

    Example:
        >>> from sde import Process
        >>> path = Path(Process(), torch.linspace(0.1, 1, 10), torch.zeros(4, 2))
        >>> control = Control(seen=2, context=1, latent=2, width=8)
        >>> steered = ControlledPath(path, control, control.read(torch.zeros(4, 10, 1)))
        >>> bool(torch.allclose(steered.log_prob(x := steered.rsample()), path.log_prob(x), atol=1e-4))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True
    capabilities: ClassVar[frozenset[str]] = frozenset({"noise_space", "log_prob"})

    def __init__(
        self,
        path: Path,
        control: Control | None,
        given: Tensor | None,
        first: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        process = path.process
        if len(path.times) != path.steps or process.general or process.sense != "ito":
            raise CapabilityError(
                "a controlled path needs a prior path with all its steps in the value (dt=None), one noise for each "
                "coordinate, and Ito's sense"
            )
        if starts_random(process.noise) and first is None:
            raise CapabilityError(
                "noise of type I starts from random factors: give their normal numbers, first=(series, latent, K), as "
                "a site of its own, or take type II"
            )
        self.path, self.control, self.given, self.first = path, control, given, first
        super().__init__(path.batch_shape, path.event_shape, validate_args=validate_args)

    @property
    def noise_shape(self) -> Size:
        """(steps latent,) driving numbers."""
        return Size((self.event_shape.numel(),))

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """(*sample_shape, series, steps, latent) differentiable draws from torch's global generator."""
        like = self.path.initial
        shape = (*Size(sample_shape), *self.batch_shape, *self.noise_shape)
        return self.from_noise(torch.randn(shape, dtype=like.dtype, device=like.device))

    def from_noise(self, z: Tensor) -> Tensor:
        """The path of standard normal numbers: (*sample, series, steps latent) -> (*sample, series, steps, latent)."""
        lead = z.shape[:-1]
        eps, (x, factors, given) = z.reshape(-1, *self.event_shape), self._start(lead)
        sight, found = Sight(self.path, x), []
        for n, at in enumerate(self._times):
            mean, scale = self._law(n, sight, x, factors, given)
            x = self.path.process.step(x, at, self._dts[n], factors.move(n, mean + scale * eps[:, n]))
            found.append(x)
        return torch.stack(found, 1).reshape(*lead, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the path, (*sample, series): the driving numbers are read off its moves."""
        process, lead = self.path.process, value.shape[:-2]
        states, (x, factors, given) = value.reshape(-1, *self.event_shape), self._start(lead)
        sight, total = Sight(self.path, x), x.new_zeros(len(x))
        for n, at in enumerate(self._times):
            g = process.g(x, at)
            increment = (states[:, n] - x - process.f(x, at) * self._dts[n]) / g
            mean, scale = self._law(n, sight, x, factors, given)
            z, weight = _driving(factors, n, increment)
            white, log_unit = (z - mean) / scale, (g * weight).abs().log() + scale.log()
            total = total - (0.5 * white.square() + 0.5 * math.log(2 * math.pi) + log_unit).sum(1)
            factors.move(n, z)
            x = states[:, n]
        return total.reshape(lead)

    def _start(self, lead: Size) -> tuple[Tensor, Factors, Tensor | None]:
        """State and factors before the first step and what the control is given, with one row for each of `lead`."""
        x = self.path.initial.expand(*lead, -1).reshape(-1, self.event_shape[1])
        rows = [
            None if part is None else part.expand(*lead, *part.shape[-2:]).reshape(-1, *part.shape[-2:])
            for part in (self.first, self.given)
        ]
        return x, Factors(self.path, x, rows[0]), rows[1]

    def _law(self, n: int, sight: Sight, x: Tensor, factors: Factors, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and scale of the driving numbers of a step, (rows, latent)."""
        if self.control is None or given is None:
            return torch.zeros_like(x), torch.ones_like(x)
        return self.control(sight(x, factors), given[:, n]), self.control.scale(given[:, n])

    @property
    def _times(self) -> tuple[Tensor, ...]:
        """The time before every step."""
        grid = torch.from_numpy(self.path.increments.grid[:-1]).to(self.path.initial)
        return grid.unbind()

    @property
    def _dts(self) -> list[float]:
        """Lengths of the steps."""
        return self.path.increments.dt.tolist()

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> ControlledPath:
        """Independent paths over batch_shape, the same control."""
        shape = Size(batch_shape)
        if shape == self.batch_shape:
            return self
        given, first = (None if p is None else p.expand(*shape, *p.shape[-2:]) for p in (self.given, self.first))
        return ControlledPath(self.path.expand(shape), self.control, given, first, validate_args=False)


def _driving(factors: Factors, n: int, increment: Tensor) -> tuple[Tensor, Tensor]:
    """The driving numbers of step n from the increments of the noise, and what one of them moves it by."""
    if not factors.y.shape[-1]:
        return increment / factors.scale[n], factors.scale[n]
    before, after = factors.before[..., n, :], factors.after[..., n, :]
    lead = (after * factors.gain[n]).sum(-1) * factors.scale[n]
    carried = ((after * factors.decay[n] - before) * factors.y).sum(-1)
    return (increment - carried) / lead, lead
