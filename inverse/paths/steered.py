r"""What guides that steer a path share: the walk along it, and a full-rank Gaussian for all other unknowns.

    z_n ~ N(mean(t_n, X_n, Y_n, r), R_n R_n')   given all before,   r ~ N(loc, L L')

Prior and guide move state and factors alike, so that log p - log q is that of the discretised process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from inverse.paths.factors import Factors, ProgramPath, path_leaf
from inverse.paths.linear_control import LinearControl
from ppl.errors import CapabilityError, OptionError
from ppl.program import Program
from ppl.sites import Layout
from ppl.vi.guides import FullRank
from ppl.vi.guides.guide import LOG_2PI, PROGRAM, Params, detached, standard_normal
from sde.incomplete_gamma import constant
from sde.path import Path

__all__ = ["FIRST", "Laws", "Steered", "part"]

FIRST = "first."  # parameters of the guide of everything but the driving numbers


class Laws(NamedTuple):
    """What a guide knows of one path before it walks.

    Args:
        roots: (steps, m, m) lower triangular factors of the covariances of the driving numbers.
        features: (steps, size) of the data, or None.
        control: a known control that the learned one is added to, or None; in its law of the start, the guide's
            Gaussian is that of whitened numbers.
    """

    roots: Tensor
    features: Tensor | None = None
    control: LinearControl | None = None


class Now(NamedTuple):
    """What a guide sees before a step: its number, time (0-d), states (lanes, d), factors, and other unknowns."""

    n: int
    time: Tensor
    x: Tensor
    factors: Factors
    others: Tensor


@dataclass(frozen=True)
class Steered(ABC):
    """A guide of one path's driving numbers, after a full-rank Gaussian for all other unknowns.

    Args:
        path: a path with the grid and sizes of the program's, on which to keep count of the state; None follows the
            program's own.
        site: its name; None where the program has one path.
    """

    path: Path | None = None
    site: str | None = None
    places: tuple[int, ...] = field(default=(), repr=False, kw_only=True)
    own: ProgramPath | None = field(default=None, repr=False, compare=False, kw_only=True)
    program: Program | None = field(default=None, repr=False, compare=False, kw_only=True)
    read: bool = field(default=False, repr=False, kw_only=True)
    memo: dict[str, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    reads_program: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.path is not None and not isinstance(self.path, Path):
            raise OptionError(f"path must be a sde.Path, such as the one in the program, or None, got {self.path!r}")
        if self.path is not None and self.path.batch_shape:
            raise OptionError(f"the path of a control has no batch shape, got {tuple(self.path.batch_shape)}")

    def found(self, layout: Layout, program: Program | None) -> tuple[str, Path, ProgramPath | None, tuple[int, ...]]:
        """The path that is steered: its name, itself, where it is found when it moves, and its places in a vector.

        Raises:
            CapabilityError: no lifted path of this size, several and no name, or one with a batch shape.
            OptionError: it has to be read off a program, and there is none.
        """
        path = None if self.read else self.path  # one that was read off another program is read again
        if program is None and path is None:
            raise OptionError("a control without a path of its own needs the program it is for")
        size = None if path is None else path.noise_shape.numel()
        name = path_leaf(layout, size, self.site, program, type(self).__name__)
        own = None
        if path is None:
            assert program is not None
            own = ProgramPath(program, layout, name)
            path = own.first
            own = None if own.fixed else own
        if path.batch_shape:
            raise CapabilityError(f"a control steers a path without a batch shape, got {tuple(path.batch_shape)}")
        leaf = layout.leaves[name]
        return name, path, own, (leaf.start, leaf.start + path.noises * path.steps, leaf.stop)

    # What a guide says.

    @abstractmethod
    def laws(self, params: Params, path: Path, like: Tensor) -> Laws:
        """What is known of a path before the walk, in the type of `like`."""

    @abstractmethod
    def mean(self, params: Params, laws: Laws, path: Path, now: Now) -> Tensor:
        """(lanes, m) mean of the driving numbers of a step."""

    # The guide.

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim) standard normal."""
        return standard_normal(lanes, dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        z, log_q, _ = self.drawn(params, noise, path)
        return z, self.log_prob(detached(params), z) if path else log_q

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        driving, rest = self._split(z)
        _, first, log_q, _ = self._follow(params, rest, driving, True)
        return FullRank().log_prob(part(params, FIRST), first) + log_q

    def drawn(self, params: Params, noise: Tensor, path: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draws, their log density, and how much more than the energy it subtracts from the bound."""
        own, rest = self._split(noise)
        first, log_first = FullRank().rsample_and_log_prob(part(params, FIRST), rest, path=path)
        driving, rest, log_q, excess = self._follow(params, first, own, False)
        return self._join(driving, rest), log_first + log_q, excess

    def rest(self, params: Params) -> tuple[Tensor, Tensor]:
        """Mean and lower triangular factor of all other unknowns, such as the normal numbers of Y(0)."""
        first = part(params, FIRST)
        loc, scale, lower = first["loc"], first["log_scale"].exp(), first["lower"].tril(-1)
        factor = scale[:, None] * (lower + torch.eye(len(loc)).to(loc))
        control, (a, b, c) = self._laws(params, loc).control, self.places
        if control is None or c == b:
            return loc, factor
        root = torch.eye(len(loc)).to(loc)
        root[a : a + c - b, a : a + c - b] = control.start_factor.to(loc)
        mean = torch.zeros_like(loc)
        mean[a : a + c - b] = control.start_mean.to(loc)
        return mean + root @ loc, root @ factor

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
        path, laws, (a, b, c) = self._path, self._laws(params, x), self.places
        factors = Factors(path, x, None)
        factors.y = y
        others = torch.cat([rest[:, :a], rest[:, a + c - b :]], 1)
        now = Now(n, x.new_tensor(path.increments.grid[n]), x, factors, others)
        return self.mean(params, laws, path, now), laws.roots[n].to(x)

    @property
    def _path(self) -> Path:
        """The path on which a bound guide keeps count."""
        if self.path is None or not self.places:
            raise OptionError("this control is for no program yet: give it to ppl.NoiseSpace(ppl.SVI(guide=...))")
        return self.path

    def _laws(self, params: Params, like: Tensor) -> Laws:
        """`laws` on the guide's path, kept while the parameters are the same."""
        if self.memo.get("params") is not params:
            self.memo.update(params=params, laws=self.laws(params, self._path, like))
        found = self.memo["laws"]
        assert isinstance(found, Laws)
        return found

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
        if self.own is None:
            return self._walk(self._path, params, rest, value, given)

        def action(path: Path, rest: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            return tuple(part[0] for part in self._walk(path, params, rest[None], value[None], given))

        z = self._join(torch.zeros_like(value), rest)
        found: tuple[Tensor, ...] = self.own.each(z, part(params, PROGRAM), action, rest, value)
        return found

    def _walk(
        self, path: Path, params: Params, rest: Tensor, value: Tensor, given: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Follow the path under control.

        Args:
            path: the path.
            params: of the guide.
            rest: (lanes, rest) everything but the driving numbers.
            value: (lanes, m steps) driving numbers, or the noise that makes them.
            given: whether both are values of the program; else they are noise, and draws of the Gaussian.

        Returns:
            Driving numbers (lanes, m steps), rest in the other of its two forms, their log density without that of the
            Gaussian, and how much more than the energy it subtracts from the bound.
        """
        lanes, dts, m, (a, b, c) = len(value), path.increments.dt.tolist(), path.noises, self.places
        laws = self.laws(params, path, value)
        start, others = rest[:, a : a + c - b], torch.cat([rest[:, :a], rest[:, a + c - b :]], 1)
        start, other_start, log_q = _started(laws.control, start, given)
        times = constant(path.increments.grid, value).to(value)
        x, factors = path.initial.to(value).expand(lanes, -1), Factors(path, value, start)
        numbers, found, means = value.reshape(lanes, m, path.steps), [], []
        for n, own in enumerate(numbers.unbind(-1)):
            mean = self.mean(params, laws, path, Now(n, times[n], x, factors, others))
            z = own if given else mean + own @ laws.roots[n].mT
            means.append(mean)
            found.append(z)
            x = path.process.step(x, times[n], dts[n], factors.move(n, z))
        z, mean, white = torch.stack(found, -1), torch.stack(means, -1), numbers
        if given:
            miss = (z - mean).movedim(-1, 0).mT
            white = torch.linalg.solve_triangular(laws.roots, miss, upper=False).mT.movedim(0, -1)
        square, size = white.square().sum((1, 2)), m * path.steps
        log_q = log_q - 0.5 * (square + size * LOG_2PI) - laws.roots.diagonal(dim1=-2, dim2=-1).log().sum()
        energy = 0.5 * (mean.square().sum((1, 2)) + laws.roots.square().sum() - size)
        rest = torch.cat([rest[:, :a], other_start, rest[:, a + c - b :]], 1)
        return z.reshape(lanes, -1), rest, log_q, 0.5 * (square - z.square().sum((1, 2))) + energy


def _started(control: LinearControl | None, start: Tensor, given: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers that start the factors, their other form, and minus log |det| from whitened to own."""
    if control is None or not start.shape[1]:
        return start, start, start.new_zeros(())
    root, mean = control.start_factor.to(start), control.start_mean.to(start)
    log_det = -root.diagonal().log().sum()
    if given:
        return start, torch.linalg.solve_triangular(root, (start - mean).mT, upper=False).mT, log_det
    moved = mean + start @ root.mT
    return moved, moved, log_det


def part(params: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameters whose names start with a prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}
