"""What looks wrong with a program before anything is inferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.sites import unwrap
from ppl.trace import Run, log_prob_of

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["findings"]


def findings(program: Program, generator: torch.Generator, draws: int) -> list[str]:
    """`Program.check`: one sentence for each thing that looks wrong."""
    try:
        predictive = program.simulate(generator, draws)
    except Exception as error:  # improper priors cannot be simulated
        return [f"the prior predictive cannot be simulated ({type(error).__name__}: {str(error)[:120]})"]
    return [*far_outside(program, predictive), *unused(program)]


def far_outside(program: Program, predictive: dict[str, Tensor]) -> list[str]:
    """Data further from the prior predictive draws than those spread."""
    found = []
    for name in program.observed:
        data, draw = program.data[name].double(), predictive[name].double()
        low, high = float(draw.min()), float(draw.max())
        margin = high - low
        outside = (data < low - margin) | (data > high + margin)
        if bool(outside.any()):
            found.append(
                f"observed site {name!r}: {int(outside.sum())} of {data.numel()} data lie far outside the prior "
                f"predictive: data in [{float(data.min()):.4g}, {float(data.max()):.4g}], prior predictive in "
                f"[{low:.4g}, {high:.4g}]. Check units and data range, or widen the prior"
            )
    return found


def unused(program: Program) -> list[str]:
    """Latent sites on which no other density depends, by gradient at one point."""
    latents = {n: s for n, s in program.latents.items() if not s.discrete}
    values = {n: program.first_values[n].detach().clone().requires_grad_() for n in latents}
    trace, _ = program.trace_one({}, program.shared_inputs(), Run(values=values))
    data = log_prob_of(trace, lambda node: bool(node["is_observed"]), enumerated=False, nesting=0)
    priors = {n: _prior_term(trace, n) for n in latents}
    found = []
    for name, value in values.items():
        others = [data, *(term for n, term in priors.items() if n != name)]
        if not any(_depends(term, value) for term in others):
            found.append(f"latent site {name!r} is never used: neither the data nor another site depend on it")
    return found


def _prior_term(trace: Any, name: str) -> Tensor:
    """Log density of one latent site; zero for a diffusion prior, on whose value alone its density depends."""
    node = trace.nodes[name]
    if "denoiser" in getattr(unwrap(node["fn"]), "capabilities", ()):
        return torch.zeros(())
    return node["fn"].log_prob(node["value"]).sum()


def _depends(term: Tensor, value: Tensor) -> bool:
    return (
        term.requires_grad and torch.autograd.grad(term, [value], allow_unused=True, retain_graph=True)[0] is not None
    )
