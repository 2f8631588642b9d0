"""The cells, the problem as a peer sees it, and the score of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inverse.metrics import mode_weight_tv, variance_ratio
from inverse.operators import Dense
from models.references import ExactProblem, gaussian_problem, mixture_problem
from ppl.diagnostics import random_directions, sliced_wasserstein

TUNING_SEED = 100  # problems that settings are chosen on: this seed and those after it


@dataclass(frozen=True)
class Cell:
    """One row of problems: a Gaussian prior where `sigma` is given, else the mixture of 25 components.

    Args:
        dim: of x.
        observations: of y.
        sigma: noise of the Gaussian problem.
        problems: scored problems, seeds 0, 1, ..., of our recommended default.
        best: of them, those that peers at their best setting and our other backends are scored on.
        defaults: of them, those that peers at their defaults are scored on.
        tuning: problems to choose settings on, seeds from TUNING_SEED.
        closer: more of them, for methods that come close to the floor somewhere.
        taken: (peer, setting) of the peers that are run where choosing settings would take hours: one setting each,
            the best of the same number of observations in fewer dimensions, of 250 steps or fewer, and deepinv's
            moment matching at its default, for half the time.
    """

    dim: int
    observations: int
    sigma: float | None = None
    problems: int = 10
    best: int = 10
    defaults: int = 10
    tuning: int = 2
    closer: int = 0
    taken: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        if self.sigma is not None:
            return f"Gaussian d={self.dim} sigma={self.sigma:g}"
        return f"mixture d={self.dim} dy={self.observations}"

    def problem(self, seed: int) -> ExactProblem:
        if self.sigma is not None:
            return gaussian_problem(self.sigma, seed, dim=self.dim, observations=self.observations)
        return mixture_problem(self.dim, self.observations, seed)

    def tuning_seeds(self, *, close: bool = False) -> range:
        return range(TUNING_SEED, TUNING_SEED + self.tuning + (self.closer if close else 0))


_SLOWER = (
    ("azula MMPS", "ve, 250 steps, 5 CG steps"),
    ("deepinv PosteriorDiffusion, MomentMatching", "default"),
)
_TWO = (("deepinv DPS", "weight=300, 250 steps"), ("azula TDS", "default"), *_SLOWER)
_FOUR = (("deepinv DPS", "weight=100, 250 steps"), ("azula TDS", "component variance"), *_SLOWER)

CELLS = [
    Cell(16, 6, 0.05),
    Cell(16, 6, 0.01),
    *(Cell(8, m, closer=4) for m in (1, 2, 4)),
    *(Cell(80, m, defaults=5, closer=4) for m in (1, 2, 4)),
    Cell(800, 1, problems=6, best=2, defaults=1, tuning=1),  # minutes per run
    Cell(800, 2, problems=6, best=2, defaults=0, tuning=0, taken=_TWO),
    Cell(800, 4, problems=6, best=2, defaults=0, tuning=0, taken=_FOUR),
]


@dataclass
class Task:
    """One problem as a peer sees it: data in [-1, 1], a counted denoiser, no program.

    Peers are written for images in [-1, 1] or [0, 1] and their settings have that unit. `half` is the number that x is
    divided by: the largest mean plus five standard deviations, so that nothing is ever cut off.
    """

    problem: ExactProblem
    evals: int = 0
    half: float = field(init=False)
    smallest: float = field(init=False)
    variance: float = field(init=False)

    def __post_init__(self) -> None:
        prior = self.problem.prior
        covariances = prior.covariances
        sd = covariances.diagonal(dim1=-2, dim2=-1).max().sqrt() if covariances.ndim == 3 else covariances.max().sqrt()
        self.half = float(prior.means.abs().max() + 5 * sd)
        self.smallest = 2 * prior.sigma_min / self.half  # smallest sd of a component, in units of `half`
        self.variance = float(prior.variance.mean()) / self.half**2  # of one entry

    @property
    def dim(self) -> int:
        return len(self.problem.truth)

    @property
    def y(self) -> Tensor:
        """(m,) data of x / half."""
        return self.problem.program.data["y"] / self.half

    @property
    def sigma(self) -> float:
        """Noise of `y`."""
        return self.problem.sigma / self.half

    @property
    def largest(self) -> float:
        """First noise level: five times the largest principal sd of the prior."""
        return float(self.problem.prior.sigma_max) / self.half

    @property
    def lowest(self) -> float:
        """A level below which neither prior nor data resolve anything."""
        norm = float(torch.linalg.matrix_norm(self.problem.matrix, 2))
        return 0.05 * min(self.smallest, self.sigma / norm)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x_0 | x_0 + sigma n = x], all divided by `half`; (rows, d) and one level for all rows."""
        self.evals += len(x)
        level = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)[0] * self.half
        exact = self.problem.prior.denoise(x.double() * self.half, level.clamp_min(1e-9 * self.half))
        return (exact / self.half).to(x.dtype)


@dataclass
class Score:
    """One run on one problem; see `columns`."""

    ratio: float
    mean_error: float
    row: float
    null: float
    tv: float
    evals: float
    seconds: float


class Judge:
    """Scores draws against exact reference sets, which are drawn once per problem.

    Args:
        problem: with its exact posterior.
        draws: size of samples and reference sets.
        references: exact sets that distances and floor are averaged over.
    """

    def __init__(self, problem: ExactProblem, draws: int, references: int = 6, projections: int = 100) -> None:
        generator = torch.Generator().manual_seed(1000)
        exact = problem.posterior
        self.problem, self.draws = problem, draws
        self.sets = [exact.draw((draws,), generator) for _ in range(references)]
        self.directions = random_directions(projections, self.sets[0].shape[1], generator)
        pairs = [self._distance(a, b) for i, a in enumerate(self.sets) for b in self.sets[:i]]
        self.floor = sum(pairs) / len(pairs)
        self.mean, self.covariance = exact.mean, exact.covariance_matrix
        self.operator = Dense(problem.matrix)
        self.floor_tv = self._tv(self.sets[0])

    def _distance(self, a: Tensor, b: Tensor) -> float:
        return float(sliced_wasserstein(a, b, directions=self.directions))

    def _tv(self, x: Tensor) -> float:
        exact = self.problem.posterior
        if len(exact.weights) == 1:
            return math.nan
        return float(mode_weight_tv(x, exact.weights, exact.means, exact.covariances))

    def score(self, x: Tensor, evals: float, seconds: float) -> Score:
        """Columns of the table for draws x, (draws, d)."""
        if tuple(x.shape) != (self.draws, len(self.mean)):
            raise ValueError(f"expected draws {(self.draws, len(self.mean))}, got {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            return Score(math.inf, math.inf, math.inf, math.inf, math.nan, evals, seconds)
        distance = sum(self._distance(x, s) for s in self.sets) / len(self.sets)
        error = float((x.mean(0) - self.mean).norm() / self.covariance.trace().sqrt())
        spread = variance_ratio(x, self.operator, self.covariance)
        row, null = (math.nan if v is None else v for v in (spread.row, spread.null))
        return Score(distance / self.floor, error, row, null, self._tv(x), evals, seconds)
