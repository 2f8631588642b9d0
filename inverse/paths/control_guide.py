r"""A guide that steers a path: its driving numbers have a mean that depends on the state.

    dW -> dW + u(t, X, Y, r) dt,   z_n ~ N(u_n sqrt(dt), s_n^2)   given all before

u sqrt(dt) is linear in what it sees, with gains of its own for every step, plus a network: linear programs with
Gaussian data need no more than the first. In continuous time s = 1 and the divergence from the prior is
E int u^2 dt / 2. Prior and guide move the factors alike, so the bound is a true one for the discretised process, at any
step; a learned s_n is what data sharper than a step ask for. Two estimates of the divergence have the same mean:

    pathwise    int u dW + int u^2 dt / 2     log q - log p of the path that was drawn: one number at the best control
    energy      int u^2 dt / 2                its expectation given what came before each step

Source: Daems et al. (ICLR 2024), the public code, a network with s = 1 and the energy [read]; gains, scales, other
latents and the start of the factors in a Gaussian of their own [derived].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inverse.paths.factors import Factors, ProgramPath, path_leaf
from inverse.paths.linear_control import LinearControl
from ppl.errors import CapabilityError, OptionError, ShapeError
from ppl.program import Program
from ppl.sites import Layout
from ppl.vi.guides import FullRank
from ppl.vi.guides.guide import LOG_2PI, PROGRAM, Params, detached, standard_normal
from sde.incomplete_gamma import constant
from sde.path import Path

__all__ = ["ControlGuide"]

FIRST, CONTEXT = "first.", "context."  # parameters of the guide of everything but the driving numbers; of the context


@dataclass(frozen=True)
class ControlGuide:
    """A neural control of one path's driving numbers, after a full-rank Gaussian for all other unknowns.

    For `ppl.NoiseSpace(ppl.SVI(guide=ControlGuide()))`. The control sees time, the state, the factors of the noise and
    the other unknowns. Drift, diffusion and Hurst index may depend on other latents and on learned parameters: the
    guide then follows the program's own path at their values, draw by draw, and the parameters climb the same bound.

    Args:
        path: a path with the same grid and numbers of coordinates, noises and factors, on which the guide keeps count
            of the state: any gives a valid guide, a near one a good one, and it is cheaper. None follows the program's.
        site: its name; None where the program has one path.
        width: units in each of two hidden layers.
        bound: largest absolute value of the learned part of u sqrt(dt), which keeps early steps finite.
        elbo: the divergence in the bound that is climbed, "pathwise" or "energy".
        around: a control to start from and to learn a correction of, such as `linear_control_of(program)`.
        context: a module that turns the data, a dict by observed site, into features (size,) or (steps, size) for the
            network; its parameters are learned with the guide, which then fits other data too.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Process
        >>> path = Path(Process(lambda x, t: -x), torch.linspace(0.2, 1, 5))
        >>> def model(y):
        ...     x = pyro.sample("x", path)
        ...     pyro.sample("y", dist.Normal(x[-1, 0], 0.5), obs=y)
        >>> engine = ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(width=16), steps=50, lr=0.01))
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), engine, draws=10, progress=False)
        >>> posterior.draws["x"].shape
        torch.Size([1, 10, 5, 1])
    """

    path: Path | None = None
    site: str | None = None
    width: int = 64
    bound: float = 5.0
    elbo: Literal["pathwise", "energy"] = "pathwise"
    around: LinearControl | None = field(default=None, repr=False)
    context: torch.nn.Module | None = field(default=None, repr=False)
    places: tuple[int, ...] = field(default=(), repr=False)
    own: ProgramPath | None = field(default=None, repr=False, compare=False)
    program: Program | None = field(default=None, repr=False, compare=False)

    reads_program: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.path is not None and not isinstance(self.path, Path):
            raise OptionError(f"path must be a sde.Path, such as the one in the program, or None, got {self.path!r}")
        if self.path is not None and self.path.batch_shape:
            raise OptionError(f"the path of a control has no batch shape, got {tuple(self.path.batch_shape)}")
        if self.width < 1 or not (math.isfinite(self.bound) and self.bound > 0):
            raise OptionError(f"width and bound must be positive, got {self.width} and {self.bound}")
        if self.elbo not in ("pathwise", "energy"):
            raise OptionError(f'elbo must be "pathwise" or "energy", got {self.elbo!r}')
        if self.around is not None and not isinstance(self.around, LinearControl):
            raise OptionError(f"around must be a control, such as linear_control_of(program), got {self.around!r}")
        if self.context is not None and not isinstance(self.context, torch.nn.Module):
            raise OptionError(f"context must be a torch.nn.Module, got {self.context!r}")

    def bind(self, layout: Layout, program: Program | None = None) -> ControlGuide:
        """The guide, told where the path's driving numbers are.

        Raises:
            CapabilityError: no lifted path of this size, or several and no name.
            OptionError: options that need a program without one, or a control of another path.
        """
        if program is None and (self.path is None or self.context is not None):
            raise OptionError("a control without a path of its own, or with a context, needs the program it is for")
        size = None if self.path is None else self.path.noise_shape.numel()
        name = path_leaf(layout, size, self.site, program, "ControlGuide")
        path, own = self.path, None
        if path is None:
            assert program is not None
            own = ProgramPath(program, layout, name)
            path = own.first
            own = None if own.fixed else own
        if path.batch_shape:
            raise CapabilityError(f"a control steers a path without a batch shape, got {tuple(path.batch_shape)}")
        if self.around is not None and self.around.offset.shape != (path.steps, path.noises):
            raise OptionError(
                f"`around` controls {tuple(self.around.offset.shape)} steps and noises, but the path has "
                f"{(path.steps, path.noises)}; make it for this path"
            )
        leaf = layout.leaves[name]
        places = (leaf.start, leaf.start + path.noises * path.steps, leaf.stop)
        return replace(self, path=path, places=places, own=own, program=program)

    # The guide.

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """No control beyond `around`: without it, the prior of the path."""
        path, a, b, c = self._path, *self.places
        first = FullRank().init(dim - (b - a), dtype, device, generator)
        first["log_scale"][a : a + c - b] = 0.0  # the factors' start: its prior
        if self.around is not None and c > b:
            factor = self.around.start_factor.detach().to(first["lower"])
            first["loc"][a : a + c - b] = self.around.start_mean.detach().to(first["loc"])
            first["log_scale"][a : a + c - b] = factor.diagonal().log()
            first["lower"][a : a + c - b, a : a + c - b] = (factor / factor.diagonal()[:, None]).tril(-1)
        params = {FIRST + n: v for n, v in first.items()}
        if self.context is not None:
            named = self.context.named_parameters()
            params |= {CONTEXT + n: v.detach().clone().to(device=device, dtype=dtype) for n, v in named}
        features = self._features(params)
        more = 0 if features is None else features.shape[1]
        inputs = 1 + path.event_shape[1] + path.noises * path.process.noise.size + dim - (c - a) + more
        for i, (size, out) in enumerate([(inputs, self.width), (self.width, self.width)]):
            weight = torch.randn(size, out, dtype=dtype, device=device, generator=generator)
            params[f"w{i}"] = weight / math.sqrt(size)
            params[f"b{i}"] = torch.zeros(out, dtype=dtype, device=device)
        params["w2"] = torch.zeros(self.width, path.noises, dtype=dtype, device=device)
        params["b2"] = torch.zeros(path.noises, dtype=dtype, device=device)
        params["gain"] = torch.zeros(path.steps, inputs, path.noises, dtype=dtype, device=device)
        params["log_scale"] = torch.zeros(path.noises, path.steps, dtype=dtype, device=device)
        return params

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim) standard normal."""
        return standard_normal(lanes, dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        z, log_q, _ = self._draw(params, noise, path)
        return z, self.log_prob(detached(params), z) if path else log_q

    def rsample_and_cost(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws and what the bound subtracts from log p: log q, or with the same mean what leaves the energy."""
        if self.elbo == "pathwise":
            return self.rsample_and_log_prob(params, noise, path=path)
        z, log_q, excess = self._draw(params, noise, False)  # its parameters count where the draw is not seen
        return z, log_q + excess

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        driving, first = self._split(z)
        return FullRank().log_prob(_part(params, FIRST), first) + self._follow(params, first, driving, True)[1]

    def _draw(self, params: Params, noise: Tensor, path: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draws, their log density, and pathwise less energy."""
        own, rest = self._split(noise)
        first, log_first = FullRank().rsample_and_log_prob(_part(params, FIRST), rest, path=path)
        driving, log_driving, excess = self._follow(params, first, own, False)
        return self._join(driving, first), log_first + log_driving, excess

    @property
    def _path(self) -> Path:
        """The path on which a bound guide keeps count."""
        if self.path is None or not self.places:
            raise OptionError("this control is for no program yet: give it to ppl.NoiseSpace(ppl.SVI(guide=...))")
        return self.path

    def _features(self, params: Params) -> Tensor | None:
        """(steps, size) what the context makes of the data."""
        if self.context is None or self.program is None:
            return None
        found: Tensor = torch.func.functional_call(self.context, _part(params, CONTEXT), (dict(self.program.data),))
        if found.ndim not in (1, 2) or (found.ndim == 2 and len(found) != self._path.steps):
            raise ShapeError(f"a context gives (size,) or ({self._path.steps}, size), got {tuple(found.shape)}")
        return found.expand(self._path.steps, -1)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Driving numbers (lanes, m steps) and everything else (lanes, rest)."""
        a, b, _ = self.places
        return z[:, a:b], torch.cat([z[:, :a], z[:, b:]], 1)

    def _join(self, driving: Tensor, rest: Tensor) -> Tensor:
        """The inverse of `_split`."""
        a = self.places[0]
        return torch.cat([rest[:, :a], driving, rest[:, a:]], 1)

    def _follow(self, params: Params, rest: Tensor, value: Tensor, given: bool) -> tuple[Tensor, ...]:
        """The walk on one path for all lanes, or on the program's own in each."""
        features = self._features(params)
        if self.own is None:
            return self._walk(self._path, params, features, rest, value, given)

        def action(path: Path, rest: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            return tuple(part[0] for part in self._walk(path, params, features, rest[None], value[None], given))

        z = self._join(torch.zeros_like(value), rest)
        found: tuple[Tensor, ...] = self.own.each(z, _part(params, PROGRAM), action, rest, value)
        return found

    def _walk(
        self, path: Path, params: Params, features: Tensor | None, rest: Tensor, value: Tensor, given: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Follow the path under control.

        Args:
            path: the path.
            params: of the guide.
            features: (steps, size) of the data, or None.
            rest: (lanes, rest) everything but the driving numbers.
            value: (lanes, m steps) driving numbers, or the noise that makes them.
            given: whether they are driving numbers.

        Returns:
            Driving numbers, their log density, and pathwise less energy: (lanes, m steps), (lanes,), (lanes,).
        """
        lanes, dts, m = len(value), path.increments.dt.tolist(), path.noises
        (a, b, c), grid = self.places, path.increments.grid
        start, others = rest[:, a : a + c - b], torch.cat([rest[:, :a], rest[:, a + c - b :]], 1)
        times = constant(grid, value).to(value)
        x, factors = path.initial.to(value).expand(lanes, -1), Factors(path, value, start)
        roots = self._roots(params).to(value)  # (steps, m, m)
        given_z, means = value.reshape(lanes, m, path.steps), []
        found: list[Tensor] = []
        for n, own in enumerate(given_z.unbind(-1)):
            mean = self._mean(params, n, 1 + times[n] / grid[-1], x, factors, others, features)
            z = own if given else mean + own @ roots[n].mT
            means.append(mean)
            found.append(z)
            x = path.process.step(x, times[n], dts[n], factors.move(n, z))
        z, mean = torch.stack(found, -1), torch.stack(means, -1)
        white = given_z
        if given:
            white = torch.linalg.solve_triangular(roots, (z - mean).movedim(-1, 0).mT, upper=False).mT.movedim(0, -1)
        square, size = white.square().sum((1, 2)), m * path.steps
        log_q = -0.5 * (square + size * LOG_2PI) - roots.diagonal(dim1=-2, dim2=-1).log().sum()
        excess = 0.5 * (square - z.square().sum((1, 2)) + mean.square().sum((1, 2)) + roots.square().sum() - size)
        return z.reshape(lanes, -1), log_q, excess

    def _roots(self, params: Params) -> Tensor:
        """(steps, m, m) lower triangular factors of the covariances of the driving numbers."""
        scales = params["log_scale"].exp().mT
        return torch.diag_embed(scales) if self.around is None else self.around.factor.to(scales) * scales[:, None]

    def _mean(
        self, params: Params, n: int, time: Tensor, x: Tensor, factors: Factors, others: Tensor, features: Tensor | None
    ) -> Tensor:
        """u sqrt(dt) of step n, (lanes, m); of what it sees the first, the time, is never zero."""
        parts = [time.expand(len(x), 1), x, factors.seen.flatten(1), others]
        parts += [] if features is None else [features[n].expand(len(x), -1)]
        seen = torch.cat(parts, 1)
        hidden = torch.tanh(seen @ params["w0"] + params["b0"])
        hidden = torch.tanh(hidden @ params["w1"] + params["b1"])
        value = seen @ params["gain"][n] + hidden @ params["w2"] + params["b2"]
        value = self.bound * torch.tanh(value / self.bound)
        return value if self.around is None else value + self.around.mean(n, x.double(), factors.y.double()).to(value)

    # What others read of it.

    def rest(self, params: Params) -> tuple[Tensor, Tensor]:
        """Mean and lower triangular factor of all other unknowns, such as the normal numbers of Y(0)."""
        first = _part(params, FIRST)
        eye = torch.eye(len(first["loc"]), dtype=first["loc"].dtype, device=first["loc"].device)
        return first["loc"], first["log_scale"].exp()[:, None] * (first["lower"].tril(-1) + eye)

    def at(self, params: Params, n: int, x: Tensor, y: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and lower triangular factor of the driving numbers of step n.

        Args:
            params: of the guide.
            n: the step.
            x: (lanes, d) states before it.
            y: (lanes, m, K) factors before it, their start included.
            rest: (lanes, rest) all other unknowns, that start included.

        Returns:
            (lanes, m) and (m, m).
        """
        path, (a, b, c), grid = self._path, self.places, self._path.increments.grid
        factors = Factors(path, x, None)
        factors.y = y
        others = torch.cat([rest[:, :a], rest[:, a + c - b :]], 1)
        time = x.new_tensor(1 + grid[n] / grid[-1])
        return self._mean(params, n, time, x, factors, others, self._features(params)), self._roots(params)[n].to(x)


def _part(params: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameters whose names start with a prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}
