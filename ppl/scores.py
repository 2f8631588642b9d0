"""Numbers that judge one posterior: against exact draws, against the truth, and against its own cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.diagnostics import inside_central, ranks, sliced_over_floor
from ppl.errors import OptionError, PilotlightError, ShapeError
from ppl.posterior import Posterior
from ppl.sites import unwrap

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = [
    "NO_MEAN",
    "Reference",
    "ReferenceSource",
    "cost_scores",
    "mean_and_sd",
    "own_scores",
    "reference_scores",
    "residual_score",
    "truth_scores",
]

ReferenceSource = Posterior | Mapping[str, Tensor] | Tensor | Callable[[int, torch.Generator], Any]

SETS = 6
ENTRIES = 64  # numbers of a site whose ESS and R-hat are looked at
FEWEST = 19  # draws whose central 90 % interval is not just all of the line
NAN = math.nan


@dataclass(frozen=True)
class Reference:
    """Independent sets of exact draws.

    Args:
        sets: site -> `SETS` tensors (problem or 1, draws, *event).
    """

    sets: dict[str, list[Tensor]]

    @classmethod
    def of(cls, source: ReferenceSource, program: Program, draws: int, generator: torch.Generator) -> Reference:
        """Sets of `draws` draws from a function, or as large as a finite number of reference draws allows.

        Args:
            source: (draws, generator) -> site -> (draws, *event); or a posterior; or site -> (draws, *event), with
                chains in front if there are any; a bare tensor belongs to the only latent site. With many problems
                there is a problem axis in front.
            program: whose sites these are.
            draws: number of draws in each set.
            generator: draws the sets, or the way a finite number is split.

        Raises:
            OptionError: too few draws, or a site that the program does not have.
        """
        if callable(source) and not isinstance(source, Mapping):
            found = [_by_site(source(draws, generator), program) for _ in range(SETS)]
            return cls({n: [one[n] for one in found] for n in found[0]})
        if isinstance(source, Posterior):
            names = [n for n in program.latents if n in source]
            if not names:
                raise OptionError(f"the reference has sites {list(source.draws)}, the program {list(program.latents)}")
            if source.log_weight is not None:
                source = source.resampled(generator)
            pool = {n: source._lanes(n) for n in names}
        else:
            pool = _by_site(source, program)
        sets = {}
        for name, values in pool.items():
            size = min(draws, values.shape[1] // SETS)
            if size < 2:
                raise OptionError(
                    f"the reference has {values.shape[1]} draws of {name!r}, but {SETS} sets of two or more are "
                    "compared; give more draws, or a function that makes them"
                )
            order = torch.randperm(values.shape[1], generator=generator, device=generator.device).to(values.device)
            sets[name] = list(values[:, order[: SETS * size]].split(size, 1))
        return cls(sets)

    def first(self, problems: int) -> Reference:
        """The same of the first problems alone."""
        return Reference({n: [s[:problems] for s in sets] for n, sets in self.sets.items()})

    def moments(self, site: str) -> tuple[Tensor, Tensor]:
        """Mean and variance over all sets, (problem or 1, entries) in float64."""
        pool = torch.cat(self.sets[site], 1).double()
        pool = pool.reshape(*pool.shape[:2], -1)
        return pool.mean(1), pool.var(1)


def _by_site(source: Any, program: Program) -> dict[str, Tensor]:
    """Draws as (problem or 1, draws, *event) by latent site."""
    if isinstance(source, Tensor):
        if len(program.latents) != 1:
            raise OptionError(f"the program has the latent sites {list(program.latents)}; give the reference by site")
        source = {next(iter(program.latents)): source}
    unknown = set(source) - set(program.latents)
    if unknown or not source:
        raise OptionError(f"the reference has sites {list(source)}, the program {list(program.latents)}")
    out = {}
    for name, values in source.items():
        event = program.sites[name].shape
        lead = 2 if program.problems is not None else 1
        if values.ndim < lead + len(event) or values.shape[values.ndim - len(event) :] != event:
            axes = "(problem, draw)" if lead == 2 else "(draw,)"
            raise ShapeError(
                f"reference draws of {name!r} must have {axes} in front of {tuple(event)}, got {tuple(values.shape)}"
            )
        out[name] = values.reshape(program.problems or 1, -1, *event)
    return out


def cost_scores(posterior: Posterior) -> dict[str, float]:
    """Seconds, and evaluations per draw of one problem."""
    cost, draws = posterior.cost, len(posterior) * (posterior.problems or 1)
    share = 1 / draws if draws else NAN
    return {
        "seconds": cost.seconds,
        "evals_per_draw": cost.denoiser_evals * share,
        "vjps_per_draw": cost.vjps * share,
        "gradients_per_draw": cost.gradient_evals * share,
    }


def own_scores(posterior: Posterior, exact: str, sites: Sequence[str]) -> dict[str, float]:
    """ESS and R-hat over some sites; evidence, ELBO and k-hat as the engine gives them."""
    out = dict.fromkeys(("ess", "r_hat", "log_evidence", "log_evidence_stderr", "elbo", "k_hat"), NAN)
    if exact == "always":
        out["ess"] = float(len(posterior))
    elif exact != "never":
        out["ess"] = _ess(posterior, sites)
    if posterior.chains > 1 and posterior.log_weight is None and exact == "in_the_limit":
        out["r_hat"] = _statistic(posterior, sites, "r_hat", max)
    if posterior.log_evidence is not None:
        out["log_evidence"] = float(posterior.log_evidence.value.sum())
        out["log_evidence_stderr"] = float(posterior.log_evidence.stderr.square().sum().sqrt())
    problems = posterior.problems or 1
    if "elbo" in posterior.info:
        out["elbo"] = float(posterior.info["elbo"].double().reshape(problems, -1).amax(1).sum())
    if "pareto_k" in posterior.info:
        out["k_hat"] = float(posterior.info["pareto_k"].double().max())
    return out


def _ess(posterior: Posterior, sites: Sequence[str]) -> float:
    """Smallest effective sample size over sites and entries; the mean over problems."""
    if posterior.log_weight is not None or "root_ess" in posterior.info:
        site = min(sites, key=lambda n: posterior.draws[n].numel())
        return float(posterior.ess(site).reshape(posterior.problems or 1, -1)[:, 0].mean())
    return _statistic(posterior, sites, "ess_bulk", min)


def _statistic(posterior: Posterior, sites: Sequence[str], name: Any, worst: Callable[..., float]) -> float:
    """An ArviZ statistic at its worst over sites and some entries; the mean over problems."""
    from ppl.summary import arviz_statistic

    by_problem: list[list[float]] = []
    for values in (posterior[site] for site in sites):
        if not values.is_floating_point() or values.numel() == 0:
            continue
        lanes = values.reshape(posterior.problems or 1, *posterior.shape[-2:], -1)
        size = lanes.shape[-1]
        index = torch.arange(min(size, ENTRIES)) * size // min(size, ENTRIES)
        found = [arviz_statistic(name, lane[..., index]) for lane in lanes]
        by_problem.append([worst(f[~f.isnan()].tolist(), default=NAN) for f in found])
    if not by_problem:
        return NAN
    return sum(worst(column) for column in zip(*by_problem, strict=True)) / len(by_problem[0])


# What data without a mean or a spread answer, as a factor or an unusual distribution does. (A distribution that lacks
# one raises NotImplementedError, which is a RuntimeError.)
NO_MEAN = (PilotlightError, RuntimeError, AttributeError)


def mean_and_sd(trace: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each observed site of a trace; for `Program.batched`."""
    found = {}
    for name, node in trace.nodes.items():
        # Deterministic sites and factors count as observed in Pyro, but hold no data.
        if node["type"] == "sample" and node["is_observed"] and not node["infer"].get("_deterministic", False):
            fn, shape = node["fn"], node["value"].shape
            if hasattr(fn, "event_shape") and not isinstance(unwrap(fn), dist.Unit):
                found[name] = (fn.mean.expand(shape), fn.stddev.expand(shape))
    return found


def residual_score(posterior: Posterior, program: Program, generator: torch.Generator) -> dict[str, float]:
    """Root mean square of (y - mean) / sd over all data, for single draws: about one for draws that fit and no more."""
    if any(n not in posterior for n in program.latents) or program.subsampled:
        return {}
    problems, n = posterior.problems or 1, min(len(posterior), ENTRIES)
    if problems != (program.problems or 1):
        return {}
    state = generator.get_state()
    values = {}
    for name in program.latents:  # equal states keep the joint law of the sites
        generator.set_state(state)
        values[name] = posterior.sample(name, n, generator).reshape(problems * n, *program.sites[name].shape)
    try:
        with torch.no_grad():
            seen = program.batched(mean_and_sd)(values)
    except NO_MEAN:
        return {}  # the data have no mean, as with a factor or an unusual distribution
    total, count = 0.0, 0
    for name, (mean, sd) in seen.items():
        y = program.observed_data()[name].to(mean)
        y = y.repeat_interleave(n, 0) if y.ndim == mean.ndim else y
        z = ((y - mean) / sd).double()
        total, count = total + float(z.square().sum()), count + z.numel()
    return {"residual": math.sqrt(total / count)} if count and math.isfinite(total) else {}


def reference_scores(posterior: Posterior, reference: Reference, generator: torch.Generator) -> dict[str, float]:
    """Distance over its floor, error of the mean and variance ratio, each at the worst site.

    distance: sliced Wasserstein to the exact sets, over the same between them.
    mean_error: |mean - exact mean| / sqrt(tr exact covariance).
    variance_ratio: tr covariance / tr exact covariance.
    """
    distance, mean_error, ratio = [], [], []
    for name, sets in reference.sets.items():
        if name not in posterior:
            continue
        problems, size = posterior.problems or 1, sets[0].shape[1]
        # Draws of equal weight are thinned to the size of the sets; those of unequal weight are resampled to it.
        size = size if posterior.log_weight is not None else min(size, len(posterior))
        drawn = posterior.sample(name, size, generator).reshape(problems, size, -1)
        found = [
            _over_floor(drawn[p], [s[p].reshape(s.shape[1], -1) for s in sets], generator) for p in range(problems)
        ]
        distance.append(sum(found) / problems)
        mean, variance = reference.moments(name)
        own_mean = posterior.mean(name).double().reshape(problems, -1)
        own_variance = posterior.sd(name).double().reshape(problems, -1).square()
        total = variance.sum(1)
        mean_error.append(float(((own_mean - mean).square().sum(1) / total).sqrt().mean()))
        ratio.append(float((own_variance.sum(1) / total).mean()))
    if not distance:
        return {}
    return {
        "distance": max(distance),
        "mean_error": max(mean_error),
        "variance_ratio": max(ratio, key=lambda r: abs(math.log(r)) if r > 0 else math.inf),
    }


def _over_floor(drawn: Tensor, sets: list[Tensor], generator: torch.Generator) -> float:
    """Distance of draws to the sets over the distance between these."""
    left = iter(sets)

    def following(draws: int, generator: torch.Generator) -> Tensor:
        return next(left)

    return sliced_over_floor(drawn, following, generator=generator, references=SETS).ratio


def truth_scores(posterior: Posterior, truth: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, float]:
    """Distance of the mean to the truth, spread over error, and the share of true numbers inside the 90 % interval.

    rmse: root mean square of mean - truth, over the site with most numbers.
    spread_error: sqrt(mean variance (1 + 1/n) / mean squared error), near one for a calibrated posterior.
    coverage_90: of the central interval of each number, over all sites.
    """
    inside: list[Tensor] = []
    rmse, spread = NAN, NAN
    largest = 0
    for name, true in truth.items():
        if name not in posterior:
            continue
        problems = posterior.problems or 1
        lanes = posterior._lanes(name)
        n = lanes.shape[1]
        expected = lanes.shape[2:]
        if true.shape not in (expected, (problems, *expected)):
            raise ShapeError(f"truth of {name!r} has shape {tuple(true.shape)}, the site has {tuple(expected)}")
        true = true.to(lanes).double().expand(problems, *expected)
        if n < 2:
            continue
        drawn = posterior.sample(name, n, generator).double().reshape(problems, n, *expected)
        rank = ranks(drawn, true, generator=generator, dim=1)
        if n >= FEWEST:
            inside.append(inside_central(rank, n, 0.9).double().flatten())
        if true[0].numel() > largest:
            largest = true[0].numel()
            error = (posterior.mean(name).double().reshape(true.shape) - true).square().mean()
            variance = posterior.sd(name).double().square().mean() * (1 + 1 / n)
            rmse = float(error.sqrt())
            spread = float((variance / error).sqrt()) if error > 0 else NAN
    coverage = float(torch.cat(inside).mean()) if inside else NAN
    return {"rmse": rmse, "spread_error": spread, "coverage_90": coverage}
