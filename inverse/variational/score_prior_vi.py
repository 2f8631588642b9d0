r"""Variational inference with a diffusion prior under the evidence bound.

    ELBO = E_q[log p(y | x) + log p(x)] + H(q) <= log p(y),      q Gaussian or a flow

with log p(x), or only its gradient, from the denoiser (see `prior_bounds`). All else is `ppl.SVI`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from inverse.problem import DiffusionProblem
from inverse.samplers.guided import residual_chi
from inverse.variational.bounded_program import BoundedProgram
from inverse.variational.prior_bounds import Bound
from ppl.backend import Exactness, register
from ppl.cost import Cost
from ppl.errors import CheckpointError, OptionError
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from ppl.storage import load_tensors
from ppl.vi import SVI, FittedGuide, FullRank, Guide

__all__ = ["FittedScorePrior", "ScorePriorVI"]

ANNEALED = 0.5  # share of the steps in which the level of the score falls
START_DRAWS = 256  # for the ELBO that chooses between starts
NOISE_DRAWS = 32  # for the noise that an estimated log prior adds to the weights


@dataclass(frozen=True, eq=False)
class FittedScorePrior(FittedGuide):
    """A guide fitted by `ScorePriorVI`; `load` takes the original program.

    Args:
        start_elbo: (starts,) float64 ELBOs of the fits it was chosen from.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        >>> fitted = ScorePriorVI(steps=100).fit(Program(model, torch.ones(2)), seed=0)
        >>> fitted.posterior(10, seed=0)["x"].shape
        torch.Size([1, 10, 2])
    """

    start_elbo: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def _bounded(self) -> BoundedProgram:
        assert isinstance(self.program, BoundedProgram)
        return self.program

    def posterior(
        self,
        draws: int = 1000,
        chains: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        cost: Cost | None = None,
    ) -> Posterior:
        """Independent draws of the guide as a posterior, with ELBO and k-hat; see `FittedGuide.posterior`.

        `info["log_prior_noise"]` is the standard error of one draw's log weight where log p(x) is an estimate: far
        from zero, it makes k-hat larger than that of the guide alone. It is zero where the prior has a density.
        """
        cost = Cost() if cost is None else cost
        with self._bounded.counting(cost):
            posterior = super().posterior(draws, chains, generator, seed, cost)
            noise = self._noise(posterior)
        info = {**posterior.info, "start_elbo": self.start_elbo, "log_prior_noise": noise}
        if len(self.program.latents) == 1:
            problem = DiffusionProblem.of(self.program)
            info |= residual_chi(problem, posterior.draws[problem.site])
        return replace(posterior, info=info, attrs={**posterior.attrs, "backend": "ScorePriorVI"})

    def _noise(self, posterior: Posterior) -> Tensor:
        """Root mean square error of the estimates of log p(x), from a second estimate at some draws; 0-d float64."""
        total = torch.zeros((), dtype=torch.float64)
        generator = torch.Generator(self.program.device).manual_seed(0)
        for name, density in self._bounded.densities.items():
            if not density.is_exact:
                x = posterior.draws[name].flatten(0, 1)[:NOISE_DRAWS]
                with torch.no_grad():
                    first, second = (density.immse(x, density.check, generator, density.floor) for _ in range(2))
                total = total + 0.5 * (first - second).double().square().mean().cpu()
        return total.sqrt()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors from which `load` builds the same guide again."""
        meta, tensors = super().state()
        one = next(iter(self._bounded.densities.values()))
        lows = {n: d.low for n, d in self._bounded.densities.items()}
        bound = {"bound": one.bound, "levels": one.levels, "check": one.check, "low": lows}
        return {**meta, "prior_bound": bound}, {**tensors, "start_elbo": self.start_elbo}

    @classmethod
    def load(cls, path: str | Path, program: Program, guide: Guide | None = None) -> FittedScorePrior:
        """Read a file of `save`.

        Args:
            path: the file.
            program: the program it was fitted to, or one with the same latents and other data.
            guide: the family, where the file cannot name it.

        Raises:
            CheckpointError: the file is damaged, or not of such a guide.
            ShapeError: the program has other latents.
        """
        tensors, meta = load_tensors(path)
        return cls.from_state(meta, tensors, program, guide, str(path))

    @classmethod
    def from_state(
        cls,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        program: Program,
        guide: Guide | None = None,
        where: str = "the state",
    ) -> FittedScorePrior:
        """The inverse of `state`, for a program with the same latents."""
        made = meta.get("prior_bound") if isinstance(meta, Mapping) else None
        if made is None:
            raise CheckpointError(f"{where} does not hold a guide of ScorePriorVI; give the path that its save wrote")
        bounded = BoundedProgram.of(program, made["bound"], dict(made["low"]), made["levels"], made["check"])
        plain = FittedGuide.from_state(meta, tensors, bounded, guide, where)
        return cls(**_parts(plain), start_elbo=tensors["start_elbo"].cpu())


@register
@dataclass(frozen=True)
class ScorePriorVI(SVI):
    r"""Fits q(x) to the posterior of a diffusion prior by maximising the evidence lower bound; `run` is fit and draws.

    Other latents of the program are fitted along with x, in one guide. Options not listed are those of `ppl.SVI`.

    The fit follows p(y | x) p_s(x), s = sigma_min: for a Gaussian prior N(m, C) and linear Gaussian data its optimum
    with `FullRank` is the exact posterior for the prior covariance C + s^2 I, where the bound reaches

        log N(y; A m, A (C + s^2 I) A' + R) = log p(y) + s^2/2 (|A' S^-1 r|^2 - tr A' S^-1 A) + O(s^4),

    r = y - A m, S = A C A' + R. [derived] `info["elbo_history"]` follows this bound. Reported ELBOs and k-hat are for
    the prior itself: with the exact log p(x) of a `GaussianMixture`; for a network with that of the bound "immse", so
    that they bound the log evidence under the reverse process which the network drives, up to their standard error.
    A fit that goes on from another (`fit(start=...)`) is not annealed, and has `starts=1`.
    Reverse KL settles in one mode: give `starts`, and compare `info["start_elbo"]`. Problems of `program.over` are fits
    of their own and run in turn.

    Measured on a Gaussian, 16 entries, 6 data with noise 0.05, 1000 steps: largest error of the mean 1e-4 ("score") and
    7e-3 sd ("immse"), variances within 1e-4 and 0.7 % of the truth, ELBO 2e-6 and 2e-4 below the evidence, the noise of
    its estimate.

    Args:
        guide: the family of q: `FullRank` up to some 200 entries, `LowRank(rank)` or `MeanField` beyond, or `Flow`.
        bound: "score" takes the gradient of log p_s from one denoiser call per step without a derivative of the
            network; "immse" differentiates the denoising bound: 2 `levels` evaluations and vjps per draw.
        levels: noise levels per draw and step of "immse".
        sigma_min: s; None takes the lowest that the prior knows and the data ask for. For a network a higher one is
            more stable, since its errors enter the score divided by s^2: on the prior `digits8x8`, whose own is 0.01,
            0.05 halved the distance to the mean of `TwistedSMC`, and sd rose from 0.6 to 0.93 of its.
        anneal: stages in which the level of the score falls from the data's spread to s during the first half of the
            steps; 0 begins at s.
        starts: fits from different places, the first from the prior's mean, others from draws of the prior; the one
            with the highest ELBO is kept.
        check: noise levels per draw of reported ELBOs, two evaluations each, where log p(x) is an estimate.

    Raises:
        OptionError: an option is out of range.

    Source: score: Graikos et al. (2022), Mardani et al. (2023) without their weights [inferred]; bound: Kingma et al.
        (2021), Feng & Bouman (2023) [inferred], with a Gaussian reference and these noise levels [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        >>> posterior = ppl.infer(Program(model, torch.full((2,), 2.0)), ScorePriorVI(steps=200), draws=500)
        >>> bool((posterior.mean("x") - 1.0).abs().max() < 0.2)
        True
    """

    guide: Guide = field(default_factory=FullRank)
    bound: Bound = "score"
    levels: int = 4
    sigma_min: float | None = None
    anneal: int = 4
    starts: int = 1
    check: int = 16

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ("steps",)
    exact_when: ClassVar[tuple[str, ...]] = ("gaussian_prior", "linear_gaussian_likelihood", "full_rank")
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound not in ("score", "immse"):
            raise OptionError(f'bound must be "score" or "immse", got {self.bound!r}')
        for name, least in (("levels", 1), ("check", 1), ("starts", 1), ("anneal", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be {least} or more, got {value!r}")
        if self.sigma_min is not None and not (self.sigma_min > 0 and math.isfinite(self.sigma_min)):
            raise OptionError(f"sigma_min must be positive, or None, got {self.sigma_min}")

    def _fitted(
        self, program: Program, generator: torch.Generator, monitor: Monitor, start: FittedGuide | None
    ) -> FittedScorePrior:
        """Maximise the evidence lower bound from every start; a fit that goes on is not annealed."""
        if start is not None and self.starts > 1:
            raise OptionError(f"a fit that goes on has one start; use starts=1 instead of {self.starts}")
        # Reading the prior costs some denoiser calls, which belong to the run.
        bounded = BoundedProgram.of(program, self.bound, self.sigma_min, self.levels, self.check, monitor.cost)
        bounded.generator = generator
        with bounded.counting(monitor.cost):
            if self.starts == 1:
                return self._fit(bounded, generator, monitor, start)
            fits: list[FittedScorePrior] = []
            for i, place in enumerate(self._places(bounded, generator)):
                with monitor.section(f"start {i}"):
                    fits.append(self._fit(bounded, generator, monitor, place))
                if monitor.interrupted:
                    break
            # A seed of its own: what chooses must not move the draws of the run.
            elbos = torch.stack([f.elbo(START_DRAWS, seed=0).value.cpu() for f in fits])
        best = int(elbos.nan_to_num(nan=-math.inf).argmax())
        return replace(fits[best], start_elbo=elbos, complete=all(f.complete for f in fits))

    def _fit(
        self, program: BoundedProgram, generator: torch.Generator, monitor: Monitor, start: FittedGuide | None
    ) -> FittedScorePrior:
        """One fit: the levels of the score in turn, each from where the one before ended."""
        fresh = start is None or not int(start.optimizer["updates"])
        stages = self._stages(program) if fresh else []
        options = {f.name: getattr(self, f.name) for f in fields(SVI)}
        fitted, history = start, []
        for i, level in enumerate(stages):
            short = {"steps": self._stage_steps(len(stages)), "decay": "none", "patience": None, "average": 0.0}
            # While levels fall, q is not near its optimum, where path gradients would pay.
            stage = SVI(**{**options, **short, "path_gradient": False})
            with monitor.section(f"level {i}"):
                fitted = stage.fit(program.at_level(level), generator=generator, monitor=monitor, start=fitted)
            history.append(fitted.history)
            if monitor.interrupted:
                break
        else:
            left = self.steps - len(stages) * self._stage_steps(len(stages))
            last = SVI(**{**options, "steps": left})
            fitted = last.fit(program, generator=generator, monitor=monitor, start=fitted)
            history.append(fitted.history)
        assert fitted is not None
        parts = _parts(fitted) | {"program": _at_lowest(fitted.program), "history": torch.cat(history)}
        return FittedScorePrior(**parts)

    def _stages(self, program: BoundedProgram) -> list[float]:
        """Levels of the score before the lowest, descending."""
        count = min(self.anneal, int(ANNEALED * self.steps)) if self.bound == "score" else 0
        low = min(d.low for d in program.densities.values())
        high = max(d.scale for d in program.densities.values())
        return [high * (low / high) ** (i / count) for i in range(count)] if low < high else []

    def _stage_steps(self, stages: int) -> int:
        return int(ANNEALED * self.steps) // max(stages, 1)

    def _places(self, program: BoundedProgram, generator: torch.Generator) -> list[FittedGuide | None]:
        """Where fits start: the prior's mean, then draws of the prior; other latents start as they do in the first."""
        flat = program.flat()
        guide = self.guide
        places: list[FittedGuide | None] = [None]
        priors = {
            n: d.prior.draw((self.starts - 1, *d.shape[: len(d.shape) - len(d.prior.event_shape)]), generator)
            for n, d in program.densities.items()
        }
        for i in range(self.starts - 1):
            params = guide.init(flat.dim, program.dtype, program.device, generator)
            if "loc" not in params:
                raise OptionError(f"{guide!r} has no centre to start elsewhere; use starts=1, or a guide of ppl")
            for name, density in program.densities.items():
                leaf = flat.layout.leaves[name]
                place = (priors[name][i] - density.center) / density.scale
                params["loc"][leaf.start : leaf.stop] = place.reshape(-1)
            size = sum(v.numel() for v in (*params.values(), *program.parameters.values()))
            zero = torch.zeros(size, dtype=program.dtype, device=program.device)
            untouched = {"m": zero, "v": zero, "updates": torch.zeros((), dtype=torch.int64)}
            history = torch.zeros(0, dtype=torch.float64)
            places.append(FittedGuide(program, guide, params, history, untouched, self.particles))
        return places


def _parts(fitted: FittedGuide) -> dict[str, Any]:
    """The fields of a fitted guide by name."""
    return {f.name: getattr(fitted, f.name) for f in fields(FittedGuide)}


def _at_lowest(program: Program) -> BoundedProgram:
    assert isinstance(program, BoundedProgram)
    return program.at_level(0.0)
