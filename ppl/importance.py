"""Importance sampling: weighted draws of the prior, or of a fitted guide, and the evidence they average to.

    w_i = p(z_i, y) / q(z_i),   z_i ~ q        p(y) = E[w]        se(log Z) = sd(w) / (mean(w) sqrt(n))

k-hat, the tail index of the weights, tells whether n draws are enough: above 0.7 they are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import NotFiniteError, OptionError, ProgramError
from ppl.mcmc.target import refuse_subsampling
from ppl.pareto import smooth_tail
from ppl.posterior import Estimate, Posterior
from ppl.smc.reference import Reference, check_source, reference_of
from ppl.vi.full_data import full_log_density, full_values
from ppl.weighted import kish_ess

if TYPE_CHECKING:
    from ppl.monitor import Monitor
    from ppl.program import Program

__all__ = ["Importance", "weighted_posterior"]

LANES = 512  # draws of one density call
RELIABLE = 0.7


@register
@dataclass(frozen=True)
class Importance:
    """Weighted draws of a proposal: the prior, a fitted guide, or what a backend fits.

    Draws are weighted by `log_weight`; means, quantiles and summaries use the weights. All chains draw from one fit.
    The evidence is that of the raw weights, whose mean is unbiased.

    Args:
        proposal: None for the prior; a fitted guide (`SVI().fit(program)`, a loaded file); or a backend with `fit`:
            `ppl.SVI(guide=ppl.FullRank())`, `ppl.Laplace()`, `ppl.Pathfinder()`. It has to be wide enough for the
            posterior: a mean-field fit of correlated latents is not.
        smooth: replace the largest weights by the quantiles of the Pareto law fitted to them. Less noise, a little
            bias, which vanishes as draws grow.

    Raises:
        OptionError: the proposal is none of these.

    Source: smoothing and k-hat: Vehtari et al. (2024) [inferred].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), Importance(), draws=4000)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.1), bool((posterior.log_evidence.value + 2.2655).abs() < 0.1)
        (True, True)
    """

    proposal: Any = None
    smooth: bool = False

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("draws",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_source(self.proposal, "proposal")
        if not isinstance(self.smooth, bool):
            raise OptionError(f"smooth must be true or false, got {self.smooth!r}")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Draw, weigh; see `ppl.infer`."""
        if self.proposal is None:
            refuse_subsampling(program, "Importance with the prior as its proposal")
            if program.parameters:
                monitor.note(f"learnable parameters {sorted(program.parameters)} were held at their values")
        reference = reference_of(self.proposal, program, generator, monitor)
        return weighted_posterior(reference, draws, chains, generator, monitor, self.smooth)


def weighted_posterior(
    reference: Reference, draws: int, chains: int, generator: torch.Generator, monitor: Monitor, smooth: bool = False
) -> Posterior:
    """Draws of a reference with weights, evidence and k-hat.

    Args:
        reference: what is drawn from; it knows the program.
        draws: draws per chain.
        chains: chains of independent draws.
        generator: source of the draws.
        monitor: cost, notes, Ctrl-C (what was weighed is kept) and checkpoints.
        smooth: see `Importance`.

    Raises:
        NotFiniteError: a weight is NaN or infinite, or all are zero.
        ProgramError: plates are subsampled in such a way that the density of all data is not known.
    """
    flat = reference.flat
    saved = monitor.resume()
    if saved is None:
        z = reference.draw(draws * chains, generator)  # draw by draw: a part of them has whole rows of chains
        log_q, log_weight, first = z.new_zeros(0), torch.zeros(0, dtype=torch.float64, device=z.device), 0
        _refuse_noise(reference, z)
    else:
        z, log_q, log_weight, first = saved["z"], saved["log_q"], saved["log_weight"], int(saved["step"])
    # What fits into memory where a network builds lifted sites is what the fit used.
    lanes = reference.guide.lanes if flat._outside and reference.guide is not None else LANES
    parts = z.split(max(lanes, chains) // chains * chains)
    for step in monitor.steps(len(parts), "weights", start=first):
        block, weight = reference.split(parts[step])
        monitor.cost.add(density_evals=len(parts[step]))
        log_q, log_weight = torch.cat([log_q, block]), torch.cat([log_weight, weight.double()])
        bad = log_weight.masked_fill(log_weight == -math.inf, 0.0)
        monitor.check_finite("log weight", bad, f"draws {len(log_q) - len(block)} to {len(log_q)}")
        monitor.checkpoint(step + 1, {"z": z, "log_q": log_q, "log_weight": log_weight})
    kept = len(log_weight) // chains
    if kept and not bool((log_weight > -math.inf).any()):
        raise NotFiniteError(
            f"all {len(log_weight)} draws of the proposal have weight zero: the data are impossible for every one of "
            "them; use more draws, a proposal that is nearer (ppl.Laplace(), ppl.SVI()), or ppl.SMC"
        )

    def by_chain(value: Tensor) -> Tensor:
        """(draw * chain, ...) -> (chain, draw, ...)."""
        return value[: kept * chains].reshape(kept, chains, *value.shape[1:]).transpose(0, 1)

    info: dict[str, Tensor] = {}
    evidence = None
    shown = log_weight
    if kept:
        mean = torch.logsumexp(log_weight, 0) - math.log(len(log_weight))
        spread = (log_weight - mean).exp().std() if len(log_weight) > 1 else mean.new_tensor(math.inf)
        evidence = Estimate(mean, spread / math.sqrt(len(log_weight)))
        smoothed, k_hat = smooth_tail(log_weight)
        info = {"pareto_k": k_hat, "kish_ess": kish_ess(torch.softmax(log_weight, 0))}
        shown = smoothed if smooth else log_weight
        if float(k_hat) > RELIABLE:
            what = "the prior is" if reference.guide is None else "the proposal is"
            monitor.note(
                f"k-hat of the importance weights is {float(k_hat):.2f}, above {RELIABLE}: {what} too far from the "
                "posterior, and neither draws nor evidence can be trusted; use a wider or better fit, or ppl.SMC"
            )
    info |= {"lp": by_chain(log_weight + log_q), "log_q": by_chain(log_q)}
    return Posterior(
        draws={n: by_chain(v) for n, v in full_values(flat, z[: kept * chains]).items()},
        log_weight=by_chain(shown),
        log_evidence=evidence,
        parameters=dict(reference.program.parameters),
        guide=reference.guide,
        info=info,
        attrs={"complete": kept == draws and (reference.guide is None or reference.guide.complete)},
    )


def _refuse_noise(reference: Reference, z: Tensor) -> None:
    """Raise where the density is only known up to the noise of a subsample."""
    if reference.program.subsampled and not full_log_density(reference.flat, z[:1], 1)[1]:
        raise ProgramError(
            f"the plates {list(reference.program.subsampled)} are subsampled in parts that do not divide them, so that "
            "the density of all data is not known and weights would be noise; choose a subsample_size that divides "
            "the plate"
        )
