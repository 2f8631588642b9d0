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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from inverse.many import require_even
from inverse.mcmc.reverse import ReverseDiffusion, check_solver
from inverse.samplers.guided import check_steps, residual_chi
from inverse.samplers.lanes import Noise
from inverse.samplers.trajectory import SpectralData, check_level
from inverse.side_by_side import ChainNoise, SideBySide, run_side_by_side
from ppl.backend import Exactness, register
from ppl.cost import Cost
from ppl.errors import NotFiniteError, OptionError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from sde import Solver

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
    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sweeps(self)

    def splitting(self, side: SideBySide, chains: int = 1, cost: Cost | None = None) -> Corrected:
        """The two draws of a sweep on problems side by side."""
        return Corrected(self, side, chains, Cost() if cost is None else cost)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """All chains side by side, those of all problems together."""
        return run_sweeps(self, program, draws, chains, generator, monitor)


class SweepOptions(Protocol):
    """Options that all variants share; `SplitGibbs` says what they mean."""

    def splitting(self, side: SideBySide, chains: int = 1, cost: Cost | None = None) -> Splitting: ...

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
    check_solver(options.solver)


class Splitting(ABC):
    """The two draws of a sweep on problems side by side; x given z is the same for all variants.

    Args:
        options: of the backend.
        side: the problems.
        chains: of each.
        cost: counts evaluations of the likelihood.
        rhos: the last coupling of each problem.
    """

    metropolis: ClassVar[bool] = False

    def __init__(self, options: SweepOptions, side: SideBySide, chains: int, cost: Cost, rhos: Sequence[float]) -> None:
        self.options, self.side, self.chains, self.cost, self.rhos = options, side, chains, cost, list(rhos)
        self.problem, prior = side.rows(chains), side.first.prior
        self.reverse = ReverseDiffusion(side.first, options.solver, options.steps, side.chunk(None))
        known = self.reverse.known
        self.lows = [min(prior.sigma_min, rho / 10) if known else prior.sigma_min for rho in rhos]
        for rho, low in zip(rhos, self.lows, strict=True):
            if not low < rho:
                raise OptionError(
                    f"rho={rho:.3g} is not above {low:.3g}, the lowest noise level that the prior can denoise; the "
                    "data are too precise for this coupling: use inverse.TwistedSMC, or raise rho"
                )
            if rho > prior.sigma_max:
                raise OptionError(f"rho={rho:.3g} is above the prior's sigma_max={prior.sigma_max:.3g}; lower it")

    def start(self, noise: Noise) -> Tensor:
        """A draw of the prior."""
        prior = self.problem.prior
        x = prior.start(noise.normal(self.problem.shape), prior.sigma_max)
        return self.clean(x, [prior.sigma_max] * len(self.side), noise)

    def sweep(self, x: Tensor, rhos: Sequence[float], noise: Noise) -> tuple[Tensor, Tensor]:
        """z given x and the data, then x given z; with the share of moves of z that were accepted, (rows,)."""
        z, accepted = self.split(x, rhos, noise)
        return self.clean(z, rhos, noise), accepted

    @abstractmethod
    def split(self, x: Tensor, rhos: Sequence[float], noise: Noise) -> tuple[Tensor, Tensor]:
        """z given x and the data, and the share of accepted moves (rows,)."""

    def clean(self, z: Tensor, rhos: Sequence[float], noise: Noise) -> Tensor:
        """x given z: the reverse diffusion from level rho; of many problems, NaN where one left the numbers."""
        prior, steps = self.problem.prior, self.options.steps
        levels = [prior.grid(rho, low, steps) for rho, low in zip(rhos, self.lows, strict=True)]
        return self.reverse.carry(z, levels, noise, check_level if self.side.many is None else None)

    def of_rows(self, values: Sequence[float], x: Tensor) -> Tensor:
        """A number of every problem for its rows, to go with x."""
        each = len(x) // len(values)
        return torch.tensor(values, dtype=torch.float64).to(x).repeat_interleave(each).reshape(-1, *[1] * (x.ndim - 1))


class Closed(Splitting):
    """z by Matheron's rule: u + rho^2 B^T (I + rho^2 B B^T)^{-1} (d - B u - n), u ~ N(x, rho^2 I)."""

    def __init__(self, options: SweepOptions, side: SideBySide, chains: int, cost: Cost, rhos: Sequence[float]) -> None:
        require_even(side.rows(chains), type(options).__name__)
        gaussian = side.rows(chains).likelihood.gaussian
        super().__init__(options, side, chains, cost, rhos)
        self._operator = gaussian.operator
        self._data = gaussian.data.to(self.problem.device, self.problem.dtype)

    def split(self, x: Tensor, rhos: Sequence[float], noise: Noise) -> tuple[Tensor, Tensor]:
        """One solve with I + rho^2 B B^T."""
        u = x + self.of_rows(rhos, x) * noise.normal(self.problem.shape)
        self.cost.likelihood_evals += len(x)
        return self._pulled(u, rhos, noise.normal(self._operator.out_shape)), x.new_ones(len(x))

    def _pulled(self, u: Tensor, rhos: Sequence[float], n: Tensor) -> Tensor:
        """z from a draw u about x and noise n of the data."""
        wide = self.of_rows(rhos, u).square()
        gap = self._data - self._operator(u) - n
        return u + wide * self._operator.adjoint(self._operator.solve_gram(gap, 1.0, wide.flatten()))


class Corrected(Closed):
    """z under the corrected likelihood where rho <= 1 / ||B||, and as published above, in warmup."""

    def __init__(self, options: SplitGibbs, side: SideBySide, chains: int, cost: Cost) -> None:
        self.data = SpectralData.of(side.rows(chains), "SplitGibbs")
        spectra = self.data.s.expand(len(side), -1) if self.data.s.ndim == 1 else self.data.s[::chains]
        norms = [float(s.max()) if len(s) else 0.0 for s in spectra]
        self.most = [1 / norm if norm > 0 else math.inf for norm in norms]
        top = side.first.prior.sigma_max
        rhos = [min(0.9 * most, top) if options.rho is None else options.rho for most in self.most]
        for rho, most in zip(rhos, self.most, strict=True):
            if rho > most * (1 + 1e-6):
                raise OptionError(
                    f"rho={rho:.4g} is above 1 / ||B|| = {most:.4g} (sigma_y / ||A|| for equal noise), where the "
                    "corrected likelihood does not exist; lower rho, leave it None, or use inverse.PnPDM, which is "
                    "biased"
                )
        super().__init__(options, side, chains, cost, rhos)

    def split(self, x: Tensor, rhos: Sequence[float], noise: Noise) -> tuple[Tensor, Tensor]:
        """One step along the gradient of the likelihood, and noise of covariance rho^2 (I - rho^2 B^T B)."""
        wide = [i for i, (rho, most) in enumerate(zip(rhos, self.most, strict=True)) if rho > most * (1 + 1e-6)]
        if len(wide) == len(rhos):
            return super().split(x, rhos, noise)
        xi, rho = noise.normal(self.problem.shape), self.of_rows(rhos, x)
        s, flat = self.data.s, rho.reshape(-1, 1)
        here, spread = self.data.of_x(x), (1 - (flat * s).square()).clamp(min=0).sqrt()
        seen = here + flat.square() * s * (self.data.u - s * here) + flat * spread * self.data.of_x(xi)
        z = self.data.replace(x + rho * xi, seen)
        self.cost.likelihood_evals += len(x)
        if not wide:
            return z, x.new_ones(len(x))
        # Some problems are still above: they take the draw as published, and noise that the others do not draw.
        assert isinstance(noise, ChainNoise)
        n = x.new_zeros(len(rhos), len(x) // len(rhos), *self._operator.out_shape)
        n[wide] = noise.some(wide).normal(self._operator.out_shape).reshape(len(wide), *n.shape[1:])
        far = self.of_rows([float(i in wide) for i in range(len(rhos))], x) > 0
        return torch.where(far, self._pulled(x + rho * xi, rhos, n.flatten(0, 1)), z), x.new_ones(len(x))


def run_sweeps(
    options: SweepOptions, program: Program, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
) -> Posterior:
    """Warmup down the couplings, then draws at rho, of one problem or of many; resumes from a checkpoint."""
    return run_side_by_side(
        options,
        program,
        lambda side: _sweeps(options, side, draws, chains, monitor),
        lambda side: options.splitting(side),
        draws=draws,
        chains=chains,
        generator=generator,
        monitor=monitor,
    )


def _sweeps(
    options: SweepOptions, side: SideBySide, draws: int, chains: int, monitor: Monitor
) -> list[Posterior | NotFiniteError]:
    """The sweeps of problems side by side."""
    splitting, noise = options.splitting(side, chains, monitor.cost), side.noise(chains)
    problem, total = side.first, options.warmup + draws * options.thin
    top = problem.prior.sigma_max
    stored = monitor.resume()
    if stored is None:
        first, x = 0, splitting.start(noise)
        kept = x.new_zeros(len(side) * chains, draws, *problem.shape)
        accepted = x.new_zeros(len(side) * chains, draws)
        stopped = torch.zeros(len(side), dtype=torch.long)  # sweep at which a problem left the numbers
    else:
        first, x, kept, accepted = int(stored["step"]), stored["x"], stored["kept"], stored["accepted"]
        stopped = stored["stopped"].cpu()
        side.streams.unpack(stored["streams"])
    done, broken = first, ""
    try:
        for sweep in monitor.steps(total, "sweeps", start=first):
            rhos = splitting.rhos
            if sweep < options.warmup:
                rhos = [max(rho, top * options.decay**sweep) for rho in rhos]
            x, share = splitting.sweep(x, rhos, noise)
            bad = ~x.isfinite().reshape(len(side), -1).all(1)
            if bool(bad.any()):
                if side.many is None:
                    monitor.check_finite("x", x, f"sweep {sweep + 1} of {total}")
                stopped = torch.where(bad.cpu() & (stopped == 0), sweep + 1, stopped)
                if bool((stopped > 0).all()):
                    break
                x = torch.where(bad.repeat_interleave(chains).reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)
            done = sweep + 1
            place, rest = divmod(done - options.warmup, options.thin)
            if done > options.warmup and rest == 0:
                kept[:, place - 1], accepted[:, place - 1] = x, share
            now = {"x": x, "kept": kept, "accepted": accepted, "stopped": stopped}
            monitor.checkpoint(done, lambda: {**now, "streams": side.streams.pack()})  # noqa: B023
    except NotFiniteError as error:  # of one problem by itself
        stopped[0], broken = done + 1, str(error)
    parts: list[Posterior | NotFiniteError] = []
    for i, single in enumerate(side.singles):
        own = slice(i * chains, (i + 1) * chains)
        swept = done if not stopped[i] else int(stopped[i]) - 1
        why = broken or f"'x' is not finite at sweep {swept + 1} of {total}; check the denoiser there, or try float64"
        length = max(swept - options.warmup, 0) // options.thin
        if stopped[i] and not length:
            parts.append(NotFiniteError(why))
            continue
        if stopped[i]:
            side.note(monitor, i, f"stopped: {why}")
        for remark in _remarks(options, problem.prior, splitting.rhos[i], length):
            side.note(monitor, i, remark)
        x = kept[own, :length]
        info = residual_chi(single, x)
        if splitting.metropolis:
            info["acceptance_rate"] = accepted[own, :length]
            rate = float(info["acceptance_rate"].mean()) if length else 1.0
            if rate < 0.1:
                side.note(monitor, i, f"{rate:.1%} of the moves of z were accepted: lower step_size")
        attrs = {"complete": not stopped[i] and length == draws, "rho": float(splitting.rhos[i])}
        parts.append(Posterior(draws=single.results(x), info=info, attrs=attrs))
    return parts


def _remarks(options: SweepOptions, prior: Any, rho: float, length: int) -> Iterator[str]:
    """What to say of a run: a warmup that ends too high, and chains that are too short."""
    top = prior.sigma_max
    needed = 1 + math.ceil(math.log(max(top / rho, 1.0)) / -math.log(options.decay))
    end = top * options.decay ** max(options.warmup - 1, 0)
    # Couplings wider than the prior are all alike: nothing is lost by leaving them out.
    if min(end, prior.data_std) > FAR_ABOVE * rho:
        yield (
            f"the warmup ends at a coupling of {end:.3g}, {end / rho:.3g} times the last one of rho={rho:.3g}: chains "
            "fall the rest of the way at once and may stay in the mode that they happen to be in; "
            f"warmup={needed} comes down to it at decay={options.decay:g}"
        )
    # In a direction that the data leave open, x -> z -> x keeps sd^2 / (sd^2 + rho^2) of x.
    apart = 1 + 2 * (prior.data_std / rho) ** 2
    if length * options.thin < 10 * apart:
        yield (
            f"{length * options.thin} sweeps at a coupling of rho={rho:.3g} are few: along the widest direction of the "
            f"prior an independent draw takes about {apart:.0f}; take more draws or thin, or inverse.TwistedSMC"
        )
