r"""Split Gibbs sampling: the prior and the data in turn, coupled by z ~ N(x, rho^2 I).

    x | z        a draw of p(x_0 | x_rho = z): the reverse diffusion from (z, rho) to 0
    z | x, d     ~ N(z; x, rho^2 I) p(d | z), for whitened data d = B x + n

With p(d | z) = N(B z, I) the x-marginal is p(x) N(d; B x, I + rho^2 B B^T). With p(d | z) = N(B z, I - rho^2 B B^T)
in its place it is the posterior itself, whatever rho <= 1 / ||B||, and the second draw needs no solve:

    z = x + rho^2 B^T (d - B x) + rho (I - rho^2 B^T B)^{1/2} xi
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Size, Tensor

from inverse.problem import DiffusionProblem
from inverse.samplers.guided import check_steps, residual_chi
from inverse.samplers.lanes import Noise
from inverse.samplers.trajectory import SpectralData, check_level
from ppl.backend import Exactness, register
from ppl.cost import Cost
from ppl.errors import NotFiniteError, OptionError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import CovarianceCorrected, DPMSolver2MSDE, Solver

__all__ = ["Closed", "SplitGibbs", "Splitting", "check_sweeps", "run_sweeps"]

FAR_ABOVE = 2.0
"""From this many times the last coupling a note says that the warmup ends too high."""


@register
@dataclass(frozen=True)
class SplitGibbs:
    r"""Split Gibbs with the corrected likelihood, for linear data with Gaussian noise: no bias from rho.

    Chains are a random walk of size rho, so that they mix slowly where the data are precise; warmup comes down from
    wide couplings, where modes still mix (those sweeps are biased and are not kept). Exact as draws and steps grow,
    and for a Gaussian prior with an exact covariance at any number of steps.

    Args:
        rho: width of the coupling, in the prior's units; None takes 0.9 / ||B|| (0.9 sigma_y / ||A|| for equal noise).
        steps: noise levels of the reverse diffusion in every sweep.
        warmup: sweeps before draws are kept.
        decay: factor on the coupling from one sweep of the warmup to the next, from the prior's sigma_max down to rho.
        thin: sweeps per draw.
        solver: a stochastic step; None takes `CovarianceCorrected` where the prior has an exact covariance, else
            `DPMSolver2MSDE`.

    Raises:
        CapabilityError: on run, if the likelihood is not linear and Gaussian, or the operator has no decomposition.
        OptionError: on run, if rho is above 1 / ||B|| or not above what the prior can denoise.

    Source: Vono, Dobigeon & Chainais (2019) for the splitting, Wu et al. (2024) for the reverse diffusion [read]; the
    corrected likelihood [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), SplitGibbs(steps=1), draws=200, chains=20)
        >>> [abs(round(v, 1)) for v in posterior.mean("x").tolist()]               # the exact mean is (0.8, 0)
        [0.8, 0.0]
    """

    rho: float | None = None
    steps: int = 20
    warmup: int = 100
    decay: float = 0.9
    thin: int = 1
    solver: Solver | None = None

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("draws", "steps")
    exact_when: ClassVar[tuple[str, ...]] = ("linear_gaussian_likelihood",)
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    default_chains: ClassVar[int] = 4
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sweeps(self)

    def splitting(self, problem: DiffusionProblem, cost: Cost | None = None) -> Corrected:
        """The two draws of a sweep on a problem."""
        return Corrected(self, problem, Cost() if cost is None else cost)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """All chains side by side."""
        problem = DiffusionProblem.of(program)
        return run_sweeps(self, self.splitting(problem, monitor.cost), problem, draws, chains, generator, monitor)


class SweepOptions(Protocol):
    """Options that all variants share; `SplitGibbs` says what they mean."""

    @property
    def rho(self) -> float | None: ...
    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def decay(self) -> float: ...
    @property
    def thin(self) -> int: ...
    @property
    def solver(self) -> Solver | None: ...


def check_sweeps(options: SweepOptions) -> None:
    """Raise OptionError unless the options that both share are in range."""
    check_steps(options.steps)
    if options.rho is not None and not (options.rho > 0 and math.isfinite(options.rho)):
        raise OptionError(f"rho must be positive, or None, got {options.rho}")
    if options.warmup < 0 or options.thin < 1:
        raise OptionError(f"expected warmup >= 0 and thin >= 1, got {options.warmup} and {options.thin}")
    if not 0 < options.decay < 1:
        raise OptionError(f"decay must lie in (0, 1), got {options.decay}")
    if options.solver is not None and not options.solver.stochastic:
        raise OptionError(
            f"{options.solver!r} adds no noise, but x given z has to be drawn: the probability flow gives one point; "
            "use DPMSolver2MSDE(), Ancestral() or CovarianceCorrected()"
        )


class Splitting(ABC):
    """The two draws of a sweep on one problem; x given z is the same for all variants."""

    metropolis: ClassVar[bool] = False

    def __init__(self, options: SweepOptions, problem: DiffusionProblem, cost: Cost, rho: float) -> None:
        self.options, self.problem, self.cost, self.rho = options, problem, cost, rho
        prior = problem.prior
        known = "exact_covariance" in prior.capabilities
        default: Solver = CovarianceCorrected() if known else DPMSolver2MSDE()
        self.solver = default if options.solver is None else options.solver
        self.low = min(prior.sigma_min, rho / 10) if known else prior.sigma_min
        if not self.low < rho:
            raise OptionError(
                f"rho={rho:.3g} is not above {self.low:.3g}, the lowest noise level that the prior can denoise; the "
                "data are too precise for this coupling: use inverse.TwistedSMC, or raise rho"
            )
        if rho > prior.sigma_max:
            raise OptionError(f"rho={rho:.3g} is above the prior's sigma_max={prior.sigma_max:.3g}; lower it")
        self.plates = problem.shape[: len(problem.shape) - len(prior.event_shape)]

    def start(self, chains: int, noise: Noise) -> Tensor:
        """A draw of the prior."""
        top = self.problem.prior.sigma_max
        return self.clean(self.problem.prior.start(noise.normal(self.problem.shape), top), top, noise)

    def sweep(self, x: Tensor, rho: float, noise: Noise) -> tuple[Tensor, Tensor]:
        """z given x and the data, then x given z; with the share of moves of z that were accepted, (chains,)."""
        z, accepted = self.split(x, rho, noise)
        return self.clean(z, rho, noise), accepted

    @abstractmethod
    def split(self, x: Tensor, rho: float, noise: Noise) -> tuple[Tensor, Tensor]:
        """z given x and the data, and the share of accepted moves (chains,)."""

    def clean(self, z: Tensor, rho: float, noise: Noise) -> Tensor:
        """x given z: the reverse diffusion from level rho."""
        prior, state, x = self.problem.prior, None, z
        levels = prior.grid(rho, self.low, self.options.steps)
        corrected = getattr(self.solver, "needs_covariance", False)
        for a, b in pairwise(levels):
            if corrected:
                covariance = prior.covariance(x, a)
                move = self.solver.step(x, a, b, covariance.mean, state, covariance=covariance)
            else:
                move = self.solver.step(x, a, b, prior.denoise(x, a), state, denoiser=prior.denoise)
            state = move.state
            if not isinstance(move.covariance, Tensor):
                x = move.sample(noise.normal(self.plates + move.covariance.noise_shape))
            else:
                x = move.sample(noise.normal(self.problem.shape)) if float(move.covariance) > 0 else move.mean
            check_level(x, float(b))
        return x


class Closed(Splitting):
    """z by Matheron's rule: u + rho^2 B^T (I + rho^2 B B^T)^{-1} (d - B u - n), u ~ N(x, rho^2 I)."""

    def __init__(self, options: SweepOptions, problem: DiffusionProblem, cost: Cost, rho: float) -> None:
        gaussian = problem.likelihood.gaussian
        super().__init__(options, problem, cost, rho)
        self._operator = gaussian.operator
        self._data = gaussian.data.to(problem.device, problem.dtype)

    def split(self, x: Tensor, rho: float, noise: Noise) -> tuple[Tensor, Tensor]:
        """One solve with I + rho^2 B B^T."""
        u = x + rho * noise.normal(self.problem.shape)
        gap = self._data - self._operator(u) - noise.normal(self._data.shape)
        self.cost.likelihood_evals += len(x)
        return u + rho**2 * self._operator.adjoint(self._operator.solve_gram(gap, 1.0, rho**2)), x.new_ones(len(x))


class Corrected(Closed):
    """z under the corrected likelihood where rho <= 1 / ||B||, and as published above, in warmup."""

    def __init__(self, options: SplitGibbs, problem: DiffusionProblem, cost: Cost) -> None:
        self.data = SpectralData.of(problem, "SplitGibbs")
        norm = float(self.data.s.max()) if len(self.data.s) else 0.0
        self.most = 1 / norm if norm > 0 else math.inf
        rho = min(0.9 * self.most, problem.prior.sigma_max) if options.rho is None else options.rho
        if rho > self.most * (1 + 1e-6):
            raise OptionError(
                f"rho={rho:.4g} is above 1 / ||B|| = {self.most:.4g} (sigma_y / ||A|| for equal noise), where the "
                "corrected likelihood does not exist; lower rho, leave it None, or use inverse.PnPDM, which is biased"
            )
        super().__init__(options, problem, cost, rho)

    def split(self, x: Tensor, rho: float, noise: Noise) -> tuple[Tensor, Tensor]:
        """One step along the gradient of the likelihood, and noise of covariance rho^2 (I - rho^2 B^T B)."""
        if rho > self.most * (1 + 1e-6):
            return super().split(x, rho, noise)
        s, xi = self.data.s, noise.normal(self.problem.shape)
        self.cost.likelihood_evals += len(x)
        here, spread = self.data.of_x(x), (1 - (rho * s).square()).clamp(min=0).sqrt()
        seen = here + rho**2 * s * (self.data.u - s * here) + rho * spread * self.data.of_x(xi)
        return self.data.replace(x + rho * xi, seen), x.new_ones(len(x))


class _ChainNoise:
    """Noise of all chains from the generator of the run."""

    def __init__(self, problem: DiffusionProblem, chains: int, generator: torch.Generator) -> None:
        self.problem, self.chains, self.generator = problem, chains, generator

    def normal(self, shape: Size | tuple[int, ...]) -> Tensor:
        """(chains, *shape)."""
        kind = self.generator.device
        noise = torch.randn((self.chains, *shape), generator=self.generator, dtype=self.problem.dtype, device=kind)
        return noise.to(self.problem.device)


def run_sweeps(
    options: SweepOptions,
    splitting: Splitting,
    problem: DiffusionProblem,
    draws: int,
    chains: int,
    generator: torch.Generator,
    monitor: Monitor,
) -> Posterior:
    """Warmup down the couplings, then draws at rho; resumes from a checkpoint."""
    noise, total = _ChainNoise(problem, chains, generator), options.warmup + draws * options.thin
    top, complete = problem.prior.sigma_max, True
    with torch.no_grad(), problem.running(monitor):
        stored = monitor.resume()
        if stored is None:
            first, x = 0, splitting.start(chains, noise)
            kept = x.new_zeros(chains, draws, *problem.shape)
            accepted = x.new_zeros(chains, draws)
        else:
            first, x, kept, accepted = int(stored["step"]), stored["x"], stored["kept"], stored["accepted"]
        done = first
        try:
            for sweep in monitor.steps(total, "sweeps", start=first):
                rho = splitting.rho
                if sweep < options.warmup:
                    rho = max(rho, top * options.decay**sweep)
                x, share = splitting.sweep(x, rho, noise)
                monitor.check_finite("x", x, f"sweep {sweep + 1} of {total}")
                done = sweep + 1
                place, rest = divmod(done - options.warmup, options.thin)
                if done > options.warmup and rest == 0:
                    kept[:, place - 1], accepted[:, place - 1] = x, share
                now = {"x": x, "kept": kept, "accepted": accepted}
                monitor.checkpoint(done, now)
        except NotFiniteError as error:
            if done - options.warmup < options.thin:
                raise
            monitor.note(f"stopped: {error}")
            complete = False
        length = max(done - options.warmup, 0) // options.thin
        kept, accepted = kept[:, :length], accepted[:, :length]
        needed = 1 + math.ceil(math.log(max(top / splitting.rho, 1.0)) / -math.log(options.decay))
        end = top * options.decay ** max(options.warmup - 1, 0)
        # Couplings wider than the prior are all alike: nothing is lost by leaving them out.
        if min(end, problem.prior.data_std) > FAR_ABOVE * splitting.rho:
            monitor.note(
                f"the warmup ends at a coupling of {end:.3g}, {end / splitting.rho:.3g} times the last one of "
                f"rho={splitting.rho:.3g}: chains fall the rest of the way at once and may stay in the mode that they "
                f"happen to be in; warmup={needed} comes down to it at decay={options.decay:g}"
            )
        # In a direction that the data leave open, x -> z -> x keeps sd^2 / (sd^2 + rho^2) of x.
        apart = 1 + 2 * (problem.prior.data_std / splitting.rho) ** 2
        if length * options.thin < 10 * apart:
            monitor.note(
                f"{length * options.thin} sweeps at a coupling of rho={splitting.rho:.3g} are few: along the widest "
                f"direction of the prior an independent draw takes about {apart:.0f}; take more draws or thin, or "
                "inverse.TwistedSMC"
            )
        results = problem.results(kept)
        info = residual_chi(problem, kept)
    if splitting.metropolis:
        info["acceptance_rate"] = accepted
        rate = float(accepted.mean()) if accepted.numel() else 1.0
        if rate < 0.1:
            monitor.note(f"{rate:.1%} of the moves of z were accepted: lower step_size")
    return Posterior(
        draws=results, info=info, attrs={"complete": complete and length == draws, "rho": float(splitting.rho)}
    )
