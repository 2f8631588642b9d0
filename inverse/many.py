r"""Many problems in one batch: each lane has the data of its problem and, where they differ, its operator.

Problem i is drawn with a generator of its own, so that its draws are those of `ppl.infer(program.problem(i), backend,
seed=seeds[i])`, `seeds` being the posterior's attrs["problem_seeds"]; the denoiser is called for all lanes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor

from inverse.gaussian_likelihood import GaussianLikelihood
from inverse.likelihood import Likelihood
from inverse.operators.per_lane import PerLane, UnlikeError, per_lane_operator
from inverse.problem import DiffusionProblem
from inverse.remarks import remarks
from ppl.monitor import Monitor
from ppl.program import Program
from ppl.sites import same_distribution
from sde.joint import JointPrior

__all__ = [
    "LaneProblem",
    "ManyProblems",
    "Streams",
    "UnlikeError",
    "lane_zeros",
    "lanes_at_a_time",
    "require_alike",
    "require_even",
]

LANES = {"cpu": 512, "cuda": 4096}
"""Lanes of one batch where nothing else is asked for: beyond, a device gains nothing and only memory grows."""

LEVELS_RTOL = 1e-9


class Streams:
    """One generator for every problem, in place of the one of a run.

    Args:
        generators: in the order of the problems of a batch, all on one device.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = list(generators)
        self.device = self.generators[0].device

    @classmethod
    def of(cls, seeds: Sequence[int], device: torch.device) -> Streams:
        """From one seed per problem."""
        return cls([torch.Generator(device).manual_seed(seed) for seed in seeds])

    @classmethod
    def around(cls, source: torch.Generator | Streams) -> Streams:
        """Streams as they are, or the one generator of a run."""
        return source if isinstance(source, Streams) else cls([source])

    def __len__(self) -> int:
        return len(self.generators)

    def some(self, members: Sequence[int]) -> Streams:
        """Those of some of the problems."""
        return Streams([self.generators[i] for i in members])

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(problem, *shape) standard normal noise."""
        size = tuple(shape)
        return torch.stack([torch.randn(size, generator=g, dtype=dtype, device=g.device) for g in self.generators])

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(problem, *shape) uniform numbers between 0 and 1."""
        size = tuple(shape)
        return torch.stack([torch.rand(size, generator=g, dtype=dtype, device=g.device) for g in self.generators])

    def pack(self) -> Tensor:
        """Where the streams stand, (problem, bytes)."""
        return torch.stack([g.get_state() for g in self.generators])

    def unpack(self, states: Tensor) -> None:
        """Go on from `pack`."""
        for g, state in zip(self.generators, states.cpu(), strict=True):
            g.set_state(state.clone())  # it reads from the start of the storage, whatever the view


@dataclass(frozen=True)
class ManyProblems:
    """The problems of a program that is over many, alike enough for one batch.

    Args:
        program: from `program.over(...)`.
        singles: every problem by itself.
    """

    program: Program
    singles: tuple[DiffusionProblem, ...]

    @classmethod
    def of(cls, program: Program) -> ManyProblems:
        """Read all problems.

        Raises:
            UnlikeError: their priors or kinds of likelihood differ.
        """
        assert program.problems is not None
        singles = tuple(DiffusionProblem.of(program.problem(i)) for i in range(program.problems))
        first = singles[0]
        for other in singles[1:]:
            if other.shape != first.shape or not _same_prior(first.prior, other.prior):
                raise UnlikeError("their priors differ")
            if other.likelihood.is_gaussian != first.likelihood.is_gaussian:
                raise UnlikeError("some are linear with Gaussian noise and others are not")
        return cls(program, singles)

    def lanes(self, which: Tensor) -> LaneProblem:
        """The problem whose lane k is of problem which[k], (lanes,) integers.

        Raises:
            UnlikeError: the operators differ in kind or structure.
        """
        first = self.singles[0]
        likelihood = LaneLikelihood(self.program.spread(which), first.likelihood.sites, {}, self, which)
        return LaneProblem(likelihood.program, first.sites, first.prior, likelihood, self, which)

    @contextmanager
    def running(self, monitor: Monitor) -> Iterator[None]:
        """A run of all: denoiser calls are counted, and what the draws of each would not show is noted."""
        for i, single in enumerate(self.singles):
            for remark in remarks(single.likelihood):
                monitor.note(f"problem {i}: {remark}")
        with self.singles[0].counting(monitor.cost):
            yield

    def level(self, read: Callable[[DiffusionProblem], float]) -> float:
        """A noise level that all problems must share."""
        levels = [read(single) for single in self.singles]
        if max(levels) - min(levels) > LEVELS_RTOL * max(levels):
            raise UnlikeError(f"they ask for unlike noise levels, down to {min(levels):.4g} or to {max(levels):.4g}")
        return levels[0]


@dataclass(frozen=True)
class _OfMany:
    """What belongs to several problems: all of them, and (lanes,) the problem of every lane."""

    many: ManyProblems
    which: Tensor


@dataclass(frozen=True)
class LaneProblem(_OfMany, DiffusionProblem):
    """Several problems as one, whose lanes are draws of this problem or that."""

    @property
    def lowest_level(self) -> float:
        """That of every problem."""
        return self.many.level(lambda single: single.lowest_level)

    @property
    def ragged(self) -> bool:
        """Whether problems have unlike numbers of measurements, those of the smaller ones being padded."""
        return len({single.likelihood.gaussian.size for single in self.many.singles}) > 1

    def noise(self, lanes: int, generator: torch.Generator | Streams, shape: Size | None = None) -> Tensor:
        """Standard normal noise, equally many rows from the stream of every problem."""
        if not isinstance(generator, Streams):
            return super().noise(lanes, generator, shape)
        each = lanes // len(generator.generators)
        return torch.cat([super(LaneProblem, self).noise(each, g, shape) for g in generator.generators])


@dataclass(frozen=True)
class LaneLikelihood(_OfMany, Likelihood):
    """The likelihood of every lane's own problem."""

    @cached_property
    def _reading(self) -> tuple[GaussianLikelihood | None, str]:
        first = self.many.singles[0].likelihood
        if not first.is_gaussian:
            return first._reading
        parts = [single.likelihood.gaussian for single in self.many.singles]
        which, dtype = self.which.to(parts[0].data.device), self.many.singles[0].dtype
        operator = per_lane_operator([part.operator for part in parts], which, dtype)
        measured = per_lane_operator([part.measured for part in parts], which, dtype)
        stddevs = [part.stddev for part in parts if part.stddev is not None]
        if 0 < len(stddevs) < len(parts):
            raise UnlikeError("the noise is correlated in some of them and independent in others")
        stddev = _rows(stddevs, 1.0)[which] if stddevs else None
        normaliser = torch.stack([part.log_normaliser for part in parts])[which]
        return GaussianLikelihood(
            operator, _rows([p.data for p in parts], 0.0)[which], normaliser, measured, stddev
        ), ""


def lanes_at_a_time(chunk: int | None, each: int, device: torch.device) -> int:
    """Most lanes of a batch: what was asked for, or what a device gains from; a larger problem by itself."""
    return chunk if chunk is not None else max(LANES.get(device.type, LANES["cpu"]), each)


def lane_zeros(problem: DiffusionProblem) -> Tensor:
    """Zeros (1, *site), or (lanes, *site) where every lane has an operator of its own."""
    own = isinstance(problem, LaneProblem) and isinstance(problem.likelihood.gaussian.operator, PerLane)
    lanes = len(problem.which) if own and isinstance(problem, LaneProblem) else 1
    return torch.zeros(lanes, *problem.shape, dtype=problem.dtype, device=problem.device)


def require_alike(problem: DiffusionProblem, what: str) -> None:
    """Raise UnlikeError where the operators differ from lane to lane, for methods that need one matrix."""
    if isinstance(problem, LaneProblem) and isinstance(problem.likelihood.gaussian.operator, PerLane):
        raise UnlikeError(f"{what} works with one operator, and theirs differ")


def require_even(problem: DiffusionProblem, what: str) -> None:
    """Raise UnlikeError where problems have unlike numbers of measurements, for methods that ask for equal ones."""
    if isinstance(problem, LaneProblem) and problem.ragged:
        raise UnlikeError(f"{what} takes equally many measurements of each, and they have unlike numbers")


def _same_prior(a: Any, b: Any) -> bool:
    """One object, or one that was built anew and starts and denoises alike at random points."""
    if isinstance(a, JointPrior) and isinstance(b, JointPrior):
        return len(a.priors) == len(b.priors) and all(map(_same_prior, a.priors, b.priors))
    if same_distribution(a, b):
        return True
    facts = [
        (type(p), p.event_shape, p.dtype, float(p.sigma_min), float(p.sigma_max), float(p.data_std)) for p in (a, b)
    ]
    if facts[0] != facts[1]:
        return False
    noise = torch.randn(4, *a.event_shape, generator=torch.Generator().manual_seed(0), dtype=a.dtype).to(a.device)
    with torch.no_grad():
        pairs = [
            (p.start(noise, p.sigma_max), *(p.denoise(s * noise, s) for s in (a.sigma_max, a.data_std))) for p in (a, b)
        ]
    return all(bool((u - v).norm() <= 100 * torch.finfo(u.dtype).eps * u.norm()) for u, v in zip(*pairs, strict=True))


def _rows(parts: list[Tensor], filled: float) -> Tensor:
    """Stack, with vectors of unlike length filled up."""
    if len({part.shape for part in parts}) > 1:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filled)
    return torch.stack(parts)
