"""From unconstrained draws to a posterior, weighted where the density of the draws is known: w = p(z, y) / q(z)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ppl.amortised.family import singles_of
from ppl.backend import stack_problems
from ppl.flat import FlatDensity
from ppl.monitor import Monitor
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from ppl.vi.full_data import full_log_density

__all__ = ["Trained", "posterior_of"]

LANES = 512


class Trained(Protocol):
    """What is read of a trained posterior; it becomes the guide."""

    @property
    def options(self) -> Any:
        """The backend."""
        ...

    @property
    def history(self) -> Tensor:
        """(steps,) training losses."""
        ...

    @property
    def loss(self) -> tuple[float, float]:
        """Loss on fresh simulations, with its standard error."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the training ran to its end."""
        ...


def log_joint(flat: FlatDensity, z: Tensor) -> Tensor:
    """Log density (draws,) of the program on unconstrained vectors."""
    return full_log_density(flat, z, LANES)[0]


def posterior_of(
    fitted: Trained,
    program: Program,
    z: Tensor,
    log_q: Tensor | None,
    monitor: Monitor,
    densities: Sequence[Callable[[FlatDensity, Tensor], Tensor]] | None = None,
) -> Posterior:
    """The posterior of unconstrained draws.

    Args:
        fitted: kept as the guide.
        program: one problem or many.
        z: (problems, chains, draws, dim).
        log_q: (problems, chains, draws) their log density, for weighted draws.
        monitor: cost and notes.
        densities: for each problem its log density, where it is not that of the program.
    """
    singles = singles_of(program)
    shape = z.shape[1:3]
    parts = []
    for i, one in enumerate(singles):
        flat = FlatDensity(one, coordinates=True)
        rows = z[i].reshape(-1, z.shape[-1])
        draws = {n: v.reshape(*shape, *v.shape[1:]) for n, v in flat.constrain(rows).items()}
        extra: dict[str, Any] = {}
        if log_q is not None:
            log_p = (log_joint if densities is None else densities[i])(one.flat(), rows)
            monitor.cost.add(density_evals=len(rows))
            log_weight = (log_p - log_q[i].reshape(-1)).double()
            extra = _weighted(log_weight.reshape(shape), log_p.reshape(shape), log_q[i])
        parts.append(Posterior(draws=draws, **extra))
    made = parts[0] if program.problems is None else stack_problems(parts, len(singles))
    k_hat = made.info.get("pareto_k")
    if k_hat is not None and bool((k_hat > 0.7).any()):
        monitor.note(
            f"k-hat of the importance weights is {float(k_hat.max()):.2f}, above 0.7: the trained posterior misses "
            "part of the true one; train longer, or with more width"
        )
    attrs = {"backend": type(fitted.options).__name__, "exact": fitted.options.exact}
    attrs["complete"] = fitted.complete and not monitor.interrupted
    return replace(
        made,
        parameters=dict(program.parameters),
        guide=fitted,
        info={**made.info, "loss_history": fitted.history, "loss": torch.tensor(fitted.loss, dtype=torch.float64)},
        observed=dict(program.observed_data()),
        attrs={**made.attrs, **attrs},
    )


def _weighted(log_weight: Tensor, log_p: Tensor, log_q: Tensor) -> dict[str, Any]:
    """Weights, evidence and k-hat of draws (chain, draw)."""
    from ppl.diagnostics import pareto_khat

    flat = log_weight.reshape(-1)
    value = flat.logsumexp(0) - math.log(len(flat))
    relative = (flat - value).exp()
    spread = relative.std() / math.sqrt(len(flat)) if len(flat) > 1 else torch.tensor(math.inf)
    fit = len(flat) >= 25 and bool(torch.isfinite(flat).all())
    k_hat = pareto_khat(flat) if fit else torch.tensor(math.nan, dtype=torch.float64)
    info = {"lp": log_p, "log_q": log_q, "pareto_k": k_hat}
    return {"log_weight": log_weight, "log_evidence": Estimate(value, spread), "info": info}
