r"""A guide that steers a path: its driving numbers have a mean that depends on the state.

    dW -> dW + u(t, X, Y, r) dt,   z_n ~ N(u_n sqrt(dt), s_n^2)   given all before

u sqrt(dt) is linear in what it sees, with gains of its own for every step, plus a network: linear programs with
Gaussian data need no more than the first. In continuous time s = 1 and the divergence from the prior is
E int u^2 dt / 2. Prior and guide move the factors alike, so the bound is a true one for the discretised process, at any
step; a learned s_n is what data sharper than a step ask for. At the best control log p - log q is one number for all
paths.

Source: Daems et al. (ICLR 2024), the public code, a network with s = 1 [read]; gains, scales, other latents and the
start of the factors in a Gaussian of their own [derived].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.errors import CapabilityError, OptionError
from ppl.vi.guides import FullRank
from ppl.vi.guides.guide import LOG_2PI, Params, detached, standard_normal
from sde.incomplete_gamma import constant
from sde.path import Path

__all__ = ["ControlGuide"]

FIRST = "first."  # parameters of the guide of everything but the driving numbers


@dataclass(frozen=True)
class ControlGuide:
    """A neural control of one path's driving numbers, after a full-rank Gaussian for all other unknowns.

    For `ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(path)))`. The control sees time, the state, the factors of the noise
    and the other unknowns (parameters, and the start of the factors of type I). Where the process of the program
    depends on other latents, `path` is a representative of it: any control makes a valid guide, a near one a good one.

    Args:
        path: the path in the program, or one with the same grid and numbers of coordinates, noises and factors.
        site: its name; None where the program has one path.
        width: units in each of two hidden layers.
        bound: largest absolute value of u sqrt(dt), which keeps early steps finite.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Process
        >>> path = Path(Process(lambda x, t: -x), torch.linspace(0.2, 1, 5))
        >>> def model(y):
        ...     x = pyro.sample("x", path)
        ...     pyro.sample("y", dist.Normal(x[-1, 0], 0.5), obs=y)
        >>> engine = ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(path, width=16), steps=50, lr=0.01))
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), engine, draws=10, progress=False)
        >>> posterior.draws["x"].shape
        torch.Size([1, 10, 5, 1])
    """

    path: Path
    site: str | None = None
    width: int = 64
    bound: float = 5.0
    places: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, Path):
            raise OptionError(f"path must be a sde.Path, such as the one in the program, got {self.path!r}")
        if self.path.batch_shape:
            raise OptionError(f"the path of a control has no batch shape, got {tuple(self.path.batch_shape)}")
        if self.width < 1 or not (math.isfinite(self.bound) and self.bound > 0):
            raise OptionError(f"width and bound must be positive, got {self.width} and {self.bound}")

    def bind(self, layout: Any) -> ControlGuide:
        """The guide, told where the path's driving numbers are.

        Raises:
            CapabilityError: no lifted path of this size, or several and no name.
        """
        size = self.path.noise_shape.numel()
        fits = [n for n, leaf in layout.leaves.items() if leaf.noise and leaf.stop - leaf.start == size]
        names = [n for n in fits if self.site in (None, n)]
        if len(names) != 1:
            raise CapabilityError(
                f"ControlGuide steers one path of {size} driving numbers in noise space, found {names or 'none'} among "
                f"{list(layout.leaves)}; run it by ppl.NoiseSpace(ppl.SVI(guide=...)), give it the program's path, and "
                "name the site where there are several"
            )
        start = layout.leaves[names[0]].start
        return replace(self, places=(start, start + self.path.noises * self.path.steps))

    # The guide.

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """No control: the prior of the path."""
        driving = self.places[1] - self.places[0]
        rest = FullRank().init(dim - driving, dtype, device, generator)
        size = self.path.process.noise.size
        inputs = 1 + self.path.event_shape[1] + self.path.noises * size + dim - driving
        params = {FIRST + n: v for n, v in rest.items()}
        for i, (a, b) in enumerate([(inputs, self.width), (self.width, self.width)]):
            params[f"w{i}"] = torch.randn(a, b, dtype=dtype, device=device, generator=generator) / math.sqrt(a)
            params[f"b{i}"] = torch.zeros(b, dtype=dtype, device=device)
        params["w2"] = torch.zeros(self.width, self.path.noises, dtype=dtype, device=device)
        params["b2"] = torch.zeros(self.path.noises, dtype=dtype, device=device)
        params["gain"] = torch.zeros(self.path.steps, inputs, self.path.noises, dtype=dtype, device=device)
        params["log_scale"] = torch.zeros(self.path.noises, self.path.steps, dtype=dtype, device=device)
        return params

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim) standard normal."""
        return standard_normal(lanes, dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        own, rest = self._split(noise)
        first, log_first = FullRank().rsample_and_log_prob(_first(params), rest, path=path)
        driving, log_driving = self._walk(params, first, noise=own)
        z = self._join(driving, first)
        return z, self.log_prob(detached(params), z) if path else log_first + log_driving

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        driving, first = self._split(z)
        return FullRank().log_prob(_first(params), first) + self._walk(params, first, driving=driving)[1]

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Driving numbers (lanes, m steps) and everything else (lanes, rest)."""
        a, b = self.places
        return z[:, a:b], torch.cat([z[:, :a], z[:, b:]], 1)

    def _join(self, driving: Tensor, rest: Tensor) -> Tensor:
        """The inverse of `_split`."""
        a = self.places[0]
        return torch.cat([rest[:, :a], driving, rest[:, a:]], 1)

    def _walk(
        self, params: Params, rest: Tensor, *, noise: Tensor | None = None, driving: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Follow the path under control: driving numbers from noise, or given; and their log density."""
        path, increments = self.path, self.path.increments
        given = driving if driving is not None else noise
        assert given is not None
        lanes, dts, m = len(given), increments.dt.tolist(), path.noises
        each = given.reshape(lanes, m, path.steps).unbind(-1)
        times = constant(increments.grid / increments.grid[-1], given).to(given)
        x, factors = path.initial.to(given).expand(lanes, -1), Factors(path, given)
        found: list[Tensor] = []
        square = given.new_zeros(lanes)
        for n, value in enumerate(each):
            seen = torch.cat([1 + times[n].expand(lanes, 1), x, factors.seen.flatten(1), rest], 1)
            mean, scale = self._mean(params, seen, n), params["log_scale"][:, n].exp()
            z = mean + scale * value if driving is None else value
            square = square + ((z - mean) / scale).square().sum(1)
            found.append(z)
            x = path.process.step(x, times[n] * increments.grid[-1], dts[n], factors.move(n, z))
        log_q = -0.5 * (square + m * path.steps * LOG_2PI) - params["log_scale"].sum()
        return torch.stack(found, -1).reshape(lanes, -1), log_q

    def _mean(self, params: Params, seen: Tensor, n: int) -> Tensor:
        """u sqrt(dt) of step n, (lanes, m), for features (lanes, inputs); the first is never zero."""
        hidden = torch.tanh(seen @ params["w0"] + params["b0"])
        hidden = torch.tanh(hidden @ params["w1"] + params["b1"])
        value = seen @ params["gain"][n] + hidden @ params["w2"] + params["b2"]
        return self.bound * torch.tanh(value / self.bound)


class Factors:
    """The factors of a path's noise as they move, from zero: the control sees their start as an unknown of its own."""

    def __init__(self, path: Path, like: Tensor) -> None:
        noise, grid = path.process.noise, path.increments
        decay, gain = noise.transition(grid.dt)
        self.decay, self.gain = constant(decay, like).to(like), constant(gain, like).to(like)
        self.scale = constant(grid.dt, like).to(like).sqrt()
        before, after = grid.weights(like)
        self.before, self.after = (w.expand(*w.shape[:-2], path.steps, -1).to(like) for w in (before, after))
        self.y = like.new_zeros(len(like), path.noises, noise.size)
        rates = np.array(noise.rates) if noise.size else np.zeros(0)  # type: ignore[attr-defined]
        self.unit = constant(np.sqrt(2 * rates + 1 / path.increments.grid[-1]), like).to(like)

    @property
    def seen(self) -> Tensor:
        """The factors in units of their spread, (lanes, m, K)."""
        return self.y * self.unit

    def move(self, n: int, z: Tensor) -> Tensor:
        """One step by driving numbers (lanes, m); the increments of the noise, (lanes, m)."""
        if not self.y.shape[-1]:
            return self.scale[n] * z
        new = self.decay[n] * self.y + self.gain[n] * self.scale[n] * z[..., None]
        increment = (self.after[..., n, :] * new - self.before[..., n, :] * self.y).sum(-1)
        self.y = new
        return increment


def _first(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the guide of everything but the driving numbers."""
    return {n.removeprefix(FIRST): v for n, v in params.items() if n.startswith(FIRST)}
