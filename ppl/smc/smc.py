"""Sequential Monte Carlo from the prior, or a fit, to the posterior, by powers of the likelihood found on the way.

    pi_beta(z) = q(z) exp(beta r(z)),     beta = 0 < beta_1 < ... < 1,     w = exp((beta_{t+1} - beta_t) r(z))
    Z_{t+1} / Z_t = mean w                next beta: (sum w)^2 / (P sum w^2) = share

After every power the particles are resampled and moved. Evidence comes with the error that the ancestry shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.diagnostics.ess import kish_ess, merge_root_ess
from ppl.errors import NotFiniteError, OptionError, ProgramError
from ppl.mcmc.target import fixed_density
from ppl.option_checks import check_integers
from ppl.posterior import Estimate, Posterior
from ppl.smc.moves import CrossedWhitening, Moves
from ppl.smc.reference import Reference, check_source, in_chunks, reference_of
from ppl.weighted import systematic

if TYPE_CHECKING:
    from ppl.monitor import Monitor
    from ppl.program import Program

__all__ = ["SMC", "next_power", "worst_ess"]

LEAST = 200  # particles when fewer draws are asked for
TRANSITIONS = {"hmc": 3, "random_walk": 20}
HALVINGS = 80
TYPICAL_STAGES = 12  # decides whether compiling pays


@register
@dataclass(frozen=True)
class SMC:
    """Tempered sequential Monte Carlo: draws, weights of modes, and the evidence, with no tuning.

    Powers of the likelihood are chosen so that each step keeps `share` of the particles' worth; the moves learn their
    step size and covariance from the population. Whole runs are repeated, and merged by evidence, while their draws
    are worth less than half of the number asked for. Adaptation makes the evidence of one run consistent in the number
    of particles, and its bias smaller than its error.

    Draws are equally weighted. `info["root_ess"]` is the smallest number of independent draws that the mean of a flat
    coordinate or of its square is worth, from the spread between descendants of different first particles; it sees
    modes between which nothing moves.

    Args:
        particles: particles of one run; None takes the number of draws asked for, 200 at least.
        start: where particles begin: None for the prior, a fitted guide, or a backend that fits one
            (`ppl.Laplace()`, `ppl.Pathfinder()`, `ppl.SVI()`), for priors that are improper or far from the data.
        share: conditional effective sample size of one step as a part of the particles.
        kernel: "hmc", or "random_walk" where gradients cost too much.
        moves: transitions after each step; None takes 3 of HMC, 20 of the random walk.
        max_steps: leapfrog steps of one transition at most.
        runs: at most this many runs per chain; 1 never repeats.
        stages: powers at most; a run that needs more stops with an error.
        chunk: particles per density call; changes memory, nothing else.

    Raises:
        OptionError: an option is out of range.

    Source: Del Moral, Doucet & Jasra (2006) [inferred]; conditional ESS: Zhou, Johansen & Aston (2016) [inferred];
    errors from the ancestry: Lee & Whiteley (2018) [inferred].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), SMC(), draws=1000)
        >>> bool((posterior.log_evidence.value + 2.2655).abs() < 0.2)                  # log N(2; 0, 2)
        True
    """

    particles: int | None = None
    start: Any = None
    share: float = 0.7
    kernel: Literal["hmc", "random_walk"] = "hmc"
    moves: int | None = None
    max_steps: int = 32
    runs: int = 4
    stages: int = 1000
    chunk: int | None = None

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("particles",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_source(self.start, "start")
        least = {"particles": 2, "moves": 1, "max_steps": 1, "runs": 1, "stages": 1, "chunk": 1}
        left = {n for n in ("particles", "moves", "chunk") if getattr(self, n) is None}
        check_integers(self, **{n: v for n, v in least.items() if n not in left})
        if not 0 < self.share < 1:
            raise OptionError(f"share must lie between 0 and 1, a part of the particles, got {self.share!r}")
        if self.kernel not in TRANSITIONS:
            raise OptionError(f'kernel must be "hmc" or "random_walk", got {self.kernel!r}')

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the particles once or more for every chain; see `ppl.infer`."""
        fixed_density(program, "SMC", monitor)
        reference = reference_of(self.start, program, generator, monitor)
        particles = self.particles or max(draws, LEAST)
        found: list[list[_Run]] = []
        for chain in range(chains):
            done = self._chain(reference, particles, draws, chain, generator, monitor)
            if not done:
                break
            found.append(done)
        flat = reference.flat
        attrs: dict[str, Any] = {"complete": len(found) == chains and not monitor.interrupted, "independent": "roots"}
        if not found:
            monitor.note("SMC: stopped before its first run reached the posterior: no draws")
            z = torch.zeros(1, 0, flat.dim, dtype=program.dtype, device=program.device)
            return Posterior(draws=_values(reference, z), attrs=attrs)
        z = torch.stack([_choose(runs, draws, generator) for runs in found])
        return Posterior(
            draws=_values(reference, z),
            log_evidence=_evidence([run for runs in found for run in runs]),
            parameters=dict(reference.program.parameters),
            guide=reference.guide,
            info=_info(found),
            attrs=attrs,
        )

    def _chain(
        self,
        reference: Reference,
        particles: int,
        draws: int,
        chain: int,
        generator: torch.Generator,
        monitor: Monitor,
    ) -> list[_Run]:
        """Whole runs until their merge is worth half of the draws."""
        runs: list[_Run] = []
        target = 0.5 * min(draws, particles)
        for r in range(self.runs):
            if monitor.interrupted:
                return runs
            with monitor.section(f"chain {chain}, run {r}"):
                saved = monitor.finished("run")
                run = self._one(reference, particles, generator, monitor) if saved is None else _Run.unpack(saved)
                if run is None:
                    return runs
                monitor.finish("run", run.pack())
            runs.append(run)
            worth = float(_merged_ess(runs))
            monitor.report(root_ess=worth)
            if worth >= target:
                return runs
        if self.runs > 1:
            monitor.note(
                f"SMC: after {len(runs)} runs of {particles} particles the draws are worth {worth:.0f} independent "
                f"ones (root ESS), asked for {draws}; raise particles or moves"
            )
        return runs

    def _one(self, reference: Reference, particles: int, generator: torch.Generator, monitor: Monitor) -> _Run | None:
        """One run from beta = 0 to 1; None when it was interrupted."""
        moves = Moves(self.kernel, self.moves or TRANSITIONS[self.kernel], self.max_steps)
        saved = monitor.resume()
        if saved is None:
            moves.start(reference.flat.dim)
            run = _Run.start(reference.draw(particles, generator))
            run.ratio = self._ratio(reference, run, monitor)
        else:
            run = _Run.unpack(saved)
            moves.log_step = float(saved["log_step"])
        if self.kernel == "hmc":
            reference.prepare(run.z[: self.chunk or particles], TYPICAL_STAGES * moves.count * 4)
        first = 0 if saved is None else int(saved["step"])
        for stage in monitor.steps(self.stages, "powers", start=first):
            if run.beta < 1:
                self._advance(reference, run, moves, generator, monitor)
                monitor.report(beta=run.beta, acceptance=run.accepted[-1])
                monitor.checkpoint(
                    stage + 1, lambda: {**run.pack(), "log_step": torch.tensor(moves.log_step, dtype=torch.float64)}
                )
            if run.beta == 1:
                return run
        if monitor.interrupted:
            return None
        raise ProgramError(
            f"after {self.stages} powers SMC has reached beta = {run.beta:.2e} of 1: the posterior is far from where "
            "the particles began. Start from a fit (start=ppl.Laplace()), or raise stages or lower share"
        )

    def _advance(
        self, reference: Reference, run: _Run, moves: Moves, generator: torch.Generator, monitor: Monitor
    ) -> None:
        """The next power: weigh, resample, move."""
        particles = len(run.z)
        beta = next_power(run.ratio, run.beta, self.share)
        log_weight = torch.where(run.ratio > -math.inf, (beta - run.beta) * run.ratio, run.ratio)
        run.log_z = run.log_z + torch.logsumexp(log_weight, 0) - math.log(particles)
        run.ess.append(float(kish_ess(log_weight)))
        weights = torch.softmax(log_weight, 0)
        # As weighed and not as resampled: weights that are nearly equal leave all counts at one.
        run.shares = torch.zeros_like(weights).index_add(0, run.roots, weights)
        index = systematic(weights[None], particles, particles, 1, generator)[0].to(run.z.device)
        white = CrossedWhitening.of(run.z, weights, run.roots % 2 == 1, run.roots[index] % 2 == 1)
        z, run.roots = run.z[index], run.roots[index]

        def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
            if self.kernel == "hmc":
                monitor.cost.add(gradient_evals=len(z))
                value, gradient = in_chunks(lambda part: reference.tempered(part, beta), z, self.chunk)
                return value, gradient
            monitor.cost.add(density_evals=len(z))
            log_q, ratio = in_chunks(reference.split, z, self.chunk)
            return log_q + beta * ratio, torch.zeros_like(z)

        run.z = moves(z, white, evaluate, generator)
        run.accepted.append(sum(moves.accepted) / len(moves.accepted))
        run.betas.append(beta)
        run.beta = beta
        run.ratio = self._ratio(reference, run, monitor)

    def _ratio(self, reference: Reference, run: _Run, monitor: Monitor) -> Tensor:
        """Log likelihood, or log weight, of the particles, in float64."""
        monitor.cost.add(density_evals=len(run.z))
        ratio = in_chunks(reference.split, run.z, self.chunk)[1].double()
        # Minus infinity is a weight of zero; anything else that is not a number is a fault.
        monitor.check_finite("log likelihood", ratio.masked_fill(ratio == -math.inf, 0.0), f"beta = {run.beta:.3g}")
        if not bool((ratio > -math.inf).any()):
            raise NotFiniteError(
                f"the data are impossible for all {len(ratio)} particles: the likelihood is zero everywhere they are; "
                "check its support, use more particles, or start from a fit (start=ppl.Laplace())"
            )
        return ratio


@dataclass
class _Run:
    """The particles of one run, and what was seen on their way."""

    z: Tensor
    roots: Tensor
    ratio: Tensor
    shares: Tensor  # of the first particles in the last weights
    log_z: Tensor
    beta: float = 0.0
    betas: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, z: Tensor) -> _Run:
        """Particles at beta = 0."""
        zero = torch.zeros((), dtype=torch.float64, device=z.device)
        return cls(z, torch.arange(len(z), device=z.device), zero, zero, zero)

    def pack(self) -> dict[str, Tensor]:
        """Tensors from which `unpack` builds the run again."""
        lists = {n: torch.tensor(getattr(self, n), dtype=torch.float64) for n in ("betas", "ess", "accepted")}
        return {**{n: getattr(self, n) for n in ("z", "roots", "ratio", "shares", "log_z")}, **lists}

    @classmethod
    def unpack(cls, saved: dict[str, Tensor]) -> _Run:
        """The run that `pack` described."""
        lists = {n: saved[n].tolist() for n in ("betas", "ess", "accepted")}
        beta = lists["betas"][-1] if lists["betas"] else 0.0
        tensors = {n: saved[n] for n in ("z", "roots", "ratio", "shares", "log_z")}
        return cls(**tensors, beta=beta, betas=lists["betas"], ess=lists["ess"], accepted=lists["accepted"])

    @property
    def root_ess(self) -> Tensor:
        """1 / sum of the squared shares of the first particles: what the evidence is worth."""
        return 1 / self.shares.square().sum()


def next_power(ratio: Tensor, beta: float, share: float) -> float:
    """The power above beta at which the weights of the living particles are worth `share` of them; 1 if that is above.

    Args:
        ratio: (particle,) log likelihoods; minus infinity is dead at any power.
        beta: the power now, below 1.
        share: in (0, 1).

    Example:
        >>> ratio = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> step = next_power(10 * ratio, 0.0, 0.5)          # exp(-(10 step)^2) = 0.5
        >>> abs(step - 0.0833) < 0.005, next_power(0.1 * ratio, 0.5, 0.5)
        (True, 1.0)
    """
    alive = ratio[ratio > -math.inf]
    alive = alive - alive.max()

    def worth(step: float) -> float:
        return float(kish_ess(step * alive))

    target = share * len(alive)
    if worth(1.0 - beta) >= target:
        return 1.0
    low, high = 0.0, 1.0 - beta
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if worth(middle) >= target else (low, middle)
    # A step lost in rounding would stand still for ever.
    return min(max(beta + low, math.nextafter(beta, 1.0)), 1.0)


def worst_ess(z: Tensor, roots: Tensor) -> Tensor:
    """Independent draws that means of the coordinates of z and of their squares are worth, the smallest; float64.

        ESS = var(f) / (R / (R - 1) sum_a (1/P sum_{i from a} (f_i - mean f))^2)

    R is the root ESS. Descendants of one particle that have moved apart count as several, those that have not as one.

    Args:
        z: (particle, dim), equally weighted.
        roots: (particle,) first particle each descends from.

    Source: variance estimate of Chan & Lai (2013) and Lee & Whiteley (2018) [inferred], its correction [derived].

    Example:
        >>> z = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> own = torch.arange(1000)
        >>> bool(worst_ess(z, own) > 800), float(worst_ess(z[:10].repeat_interleave(100, 0), own // 100)) < 12
        (True, True)
    """
    count = len(z)
    f = z.double() - z.double().mean(0)
    f = torch.cat([f, f.square() - f.square().mean(0)], 1)
    sums = torch.zeros_like(f).index_add(0, roots, f) / count
    shares = torch.bincount(roots, minlength=count).double() / count
    size = 1 / shares.square().sum()
    if float(size) <= 1 + 1e-9:
        return size  # one ancestor: nothing to compare it with
    error = sums.square().sum(0) * size / (size - 1)
    variance = f.square().mean(0)
    worth = torch.where(variance > 0, variance / error, torch.full_like(error, float(count)))
    return worth.amin().clamp(1.0, float(count))


def _merged_ess(runs: list[_Run]) -> Tensor:
    """Independent draws of runs merged by evidence."""
    return merge_root_ess(torch.stack([r.log_z for r in runs]), torch.stack([worst_ess(r.z, r.roots) for r in runs]))


def _evidence(runs: list[_Run]) -> Estimate:
    """The mean evidence of whole runs, with the error that their ancestry shows."""
    log_z = torch.stack([r.log_z for r in runs])
    size = merge_root_ess(log_z, torch.stack([r.root_ess for r in runs]))
    total = sum(len(r.z) for r in runs)
    return Estimate(torch.logsumexp(log_z, 0) - math.log(len(runs)), (1 / size - 1 / total).clamp_min(0).sqrt())


def _choose(runs: list[_Run], draws: int, generator: torch.Generator) -> Tensor:
    """Equally weighted draws (draws, dim) of runs merged by evidence."""
    share = torch.softmax(torch.stack([r.log_z for r in runs]), 0)
    weights = torch.cat([(s / len(r.z)).expand(len(r.z)) for s, r in zip(share, runs, strict=True)])
    index = systematic(weights[None], len(weights), draws, 1, generator)[0].to(weights.device)
    return torch.cat([r.z for r in runs])[index]


def _values(reference: Reference, z: Tensor) -> dict[str, Tensor]:
    """Site values of draws (chain, draw, dim)."""
    values = reference.flat.constrain(z.reshape(-1, z.shape[-1]))
    return {n: v.reshape(*z.shape[:2], *v.shape[1:]) for n, v in values.items()}


def _info(found: list[list[_Run]]) -> dict[str, Tensor]:
    """Diagnostics per chain, and per run: powers, ESS and acceptance of each, NaN behind the last."""
    runs = [run for chain in found for run in chain]

    def table(name: str) -> Tensor:
        rows = [torch.tensor(getattr(run, name), dtype=torch.float64) for run in runs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)

    return {
        "root_ess": torch.stack([_merged_ess(chain) for chain in found]),
        "evidence_root_ess": torch.stack([run.root_ess for run in runs]),
        "run_log_evidence": torch.stack([run.log_z for run in runs]),
        "runs": torch.tensor([len(chain) for chain in found]),
        "betas": table("betas"),
        "ess": table("ess"),
        "acceptance_rate": table("accepted"),
    }
