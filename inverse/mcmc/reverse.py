"""Draws of x_0 given x_s by the reverse diffusion, for chains: the noise is drawn first, and a lane that leaves is NaN.

x_0 ~ p(x_0 | x_s = x) by `steps` solver steps from level s to 0. Problems side by side may start at levels of their
own: the denoiser takes all rows at once, and steps are those of each level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from inverse.chunks import Chunks
from inverse.many import Streams
from inverse.problem import DiffusionProblem
from inverse.samplers.lanes import Noise
from inverse.side_by_side import ChainNoise
from ppl.errors import OptionError
from sde import CovarianceCorrected, DPMSolver2MSDE, Solver

__all__ = ["ReverseDiffusion", "check_solver"]


def check_solver(solver: Solver | None) -> None:
    """Raise OptionError unless the solver adds noise."""
    if solver is not None and not solver.stochastic:
        raise OptionError(
            f"{solver!r} adds no noise, but x_0 given x_s has to be drawn: the probability flow gives one point; "
            "use DPMSolver2MSDE(), Ancestral() or CovarianceCorrected()"
        )


class ProblemNoise(Noise, Protocol):
    """Noise of which that of some problems can be had alone."""

    def some(self, members: Sequence[int]) -> Noise:
        """For the rows of some of the problems."""
        ...


class _Path:
    """The rows of all problems that start from one level.

    Args:
        levels: noise levels from there to 0.
        members: the problems.
        x: their rows.
        noise: their noise.
    """

    def __init__(self, levels: Tensor, members: list[int], x: Tensor, noise: Noise) -> None:
        self.levels, self.members, self.x, self.noise = levels, members, x, noise
        self.state: Any = None


class ReverseDiffusion:
    """The reverse diffusion of a prior as a draw from p(x_0 | x_s).

    Args:
        problem: whose prior is meant.
        solver: a stochastic step; None takes `CovarianceCorrected` where the prior has an exact covariance, which is
            exact for a Gaussian prior at any number of steps, else `DPMSolver2MSDE`.
        steps: solver steps.
        chunk: most rows of one denoiser call.
    """

    def __init__(self, problem: DiffusionProblem, solver: Solver | None, steps: int, chunk: int | None) -> None:
        self.problem, self.steps, self._chunks = problem, steps, Chunks(chunk)
        self.known = "exact_covariance" in problem.prior.capabilities
        default: Solver = CovarianceCorrected() if self.known else DPMSolver2MSDE()
        self.solver = default if solver is None else solver
        self.plates = problem.shape[: len(problem.shape) - len(problem.prior.event_shape)]

    def levels(self, sigma: float) -> Tensor:
        """(steps + 1,) float64 noise levels from sigma to exactly 0."""
        low = self.problem.prior.sigma_min
        if self.known:
            low = min(low, sigma / 10)
        if low >= sigma * (1 - 1e-6):  # the prior denoises nothing in between
            return torch.tensor([sigma, 0.0], dtype=torch.float64)
        return self.problem.prior.grid(sigma, low, self.steps)

    def __call__(self, x: Tensor, sigma: float | Sequence[float], generator: torch.Generator | Streams) -> Tensor:
        """x_0 given x at level sigma, or at a level of every problem; rows that are not finite come back as NaN.

        Args:
            x: (rows, *shape), problem after problem.
            sigma: one level for all, or one for each stream.
            generator: of the run, or the streams of many problems.
        """
        streams = Streams.around(generator)
        starts = [float(sigma)] * len(streams) if isinstance(sigma, int | float) else list(sigma)
        noise = ChainNoise(self.problem, len(x) // len(streams), streams)
        return self.carry(x, [self.levels(s) for s in starts], noise)

    def carry(
        self,
        x: Tensor,
        levels: Sequence[Tensor],
        noise: Noise,
        watch: Callable[[Tensor, float], None] | None = None,
    ) -> Tensor:
        """x_0 given x, down the levels of every problem.

        Args:
            x: (rows, *shape), problem after problem.
            levels: for each problem, the last one 0.
            noise: for the rows; of several problems with unlike levels, one that has `some`.
            watch: is told x after every step and its level.
        """
        paths = self._paths(x, levels, noise)
        for step in range(max(len(path.levels) for path in paths) - 1):
            live = [path for path in paths if step < len(path.levels) - 1]
            for path, moments in zip(live, self._moments(live, step), strict=True):
                self._step(path, path.levels[step], path.levels[step + 1], *moments)
                if watch is not None:
                    watch(path.x, float(path.levels[step + 1]))
        if len(paths) == 1:
            return paths[0].x
        whole = torch.empty_like(x).reshape(len(levels), -1, *x.shape[1:])
        for path in paths:
            whole[path.members] = path.x.reshape(len(path.members), -1, *x.shape[1:])
        return whole.flatten(0, 1)

    def _paths(self, x: Tensor, levels: Sequence[Tensor], noise: Noise) -> list[_Path]:
        """Problems by the levels that they share."""
        shared: dict[tuple[float, ...], list[int]] = {}
        for i, own in enumerate(levels):
            shared.setdefault(tuple(own.tolist()), []).append(i)
        if len(shared) == 1:
            return [_Path(levels[0], list(range(len(levels))), x, noise)]
        rows = x.reshape(len(levels), -1, *x.shape[1:])
        assert hasattr(noise, "some")
        return [_Path(levels[m[0]], m, rows[m].flatten(0, 1), noise.some(m)) for m in shared.values()]

    def _moments(self, paths: list[_Path], step: int) -> list[tuple[Tensor, Any]]:
        """E[x_0 | x] for every path by one call for all, with Cov[x_0 | x] where the solver needs it."""
        corrected = getattr(self.solver, "needs_covariance", False)
        if len(paths) == 1 or (corrected and not self.known):  # a covariance of a network costs no call for all
            return [self._moments_of(path.x, path.levels[step], corrected) for path in paths]
        sizes = [len(path.x) for path in paths]
        sigma = torch.cat([path.levels[step].to(path.x).expand(len(path.x)) for path in paths])
        x = torch.cat([path.x for path in paths])
        mean, covariance = self._moments_of(x, sigma.reshape(-1, *[1] * len(self.plates)), corrected)
        places = torch.arange(len(x), device=x.device).split(sizes)
        parts = [covariance.select(own) if corrected else None for own in places]
        return list(zip(mean.split(sizes), parts, strict=True))

    def _moments_of(self, x: Tensor, sigma: Tensor, corrected: bool) -> tuple[Tensor, Any]:
        """Those of one batch."""
        if not corrected:
            return self.denoise(x, sigma), None
        bad = _not_finite(x)
        covariance = self.problem.prior.covariance(torch.where(bad, 0.0, x), sigma)
        return torch.where(bad, torch.nan, covariance.mean), covariance

    def _step(self, path: _Path, a: Tensor, b: Tensor, denoised: Tensor, covariance: Any) -> None:
        """One solver step of a path."""
        extra = {"denoiser": self.denoise} if covariance is None else {"covariance": covariance}
        move = self.solver.step(path.x, a, b, denoised, path.state, **extra)
        path.state = move.state
        if not isinstance(move.covariance, Tensor):
            path.x = move.sample(path.noise.normal(Size(self.plates + move.covariance.noise_shape)))
        elif float(move.covariance) > 0:
            path.x = move.sample(path.noise.normal(self.problem.shape))
        else:
            path.x = move.mean

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x, sigma) by parts of the batch, sigma 0-d or one for every row; NaN for the rows that are not finite."""
        bad = _not_finite(x)
        clean, denoise = torch.where(bad, 0.0, x), self.problem.prior.denoise
        out = (
            self._chunks(denoise, clean, sigma)
            if sigma.ndim
            else self._chunks(lambda part: denoise(part, sigma), clean)
        )
        return torch.where(bad, torch.nan, out)


def _not_finite(x: Tensor) -> Tensor:
    """(rows, 1, ...) which rows are not finite."""
    return ~x.flatten(1).isfinite().all(1).reshape(-1, *[1] * (x.ndim - 1))
