"""What looks wrong with a program before anything is inferred."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.lint import branches, out_of_range
from ppl.lint_guide import Runner, baselines, guide_findings, sample_nodes
from ppl.sites import unwrap
from ppl.trace import Run, log_prob_of, seeded

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["findings"]


def findings(
    program: Program, generator: torch.Generator, draws: int, guide: Callable[..., Any] | None = None
) -> list[str]:
    """`Program.check`: one sentence for each thing that looks wrong."""
    if program.problems is not None:
        program = program.problem(0)
    found = out_of_range(program)
    try:
        found = [*far_outside(program, program.simulate(generator, draws)), *found]
    except Exception as error:  # a scale below zero, mostly, which has been named
        found = found or [f"the prior predictive cannot be simulated ({type(error).__name__}: {str(error)[:120]})"]
    given = _values(program)
    traces: list[Any] = []

    def once() -> None:
        with torch.no_grad(), seeded(generator):
            traces.append(program.trace_one({}, program.shared_inputs(), Run(values=given))[0])

    jumps = branches(once, "model")
    # Through a jump no gradient flows, so that only the others can be asked by gradient.
    with suppress(ValueError, IndexError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found += unused(program, frozenset(jumps))
    found += chain.from_iterable(jumps.values())
    if any("baseline" in node["infer"] or "estimator" in node["infer"] for node in sample_nodes(traces[0])):
        found += baselines(Runner(program, program.model, generator), "model")
    if guide is not None:
        found += guide_findings(program, guide, generator)
    return found


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


def unused(program: Program, jumps: frozenset[str] = frozenset()) -> list[str]:
    """Latent sites from which no path leads to the data: by gradient, and by another value where discrete."""
    values = _values(program)
    soft = [n for n, s in program.latents.items() if not s.discrete]
    for name in soft:
        values[name].requires_grad_()
    terms = _terms(program, values)
    # Who a term depends on: from the data backwards through the priors of what they depend on.
    on = {term: {n for n in soft if n != term and _depends(value, values[n])} for term, value in terms.items()}
    for name in program.discrete:
        moved = _moved(program, name, values)
        other: dict[str, Tensor] = {}
        if moved is not None:
            other = _terms(program, {n: v.detach() for n, v in values.items()} | {name: moved})
        for term, value in terms.items():
            if term != name and (moved is None or not _equal(value, other[term])):
                on[term].add(name)
    reached: set[str] = set()
    waiting = ["", *jumps]
    while waiting:
        for name in on[waiting.pop()] - reached:
            reached.add(name)
            waiting.append(name)
    return [
        f"latent site {name!r} is never used: no path leads from it to the data, whose density does not depend on it. "
        "Use it, or remove it"
        for name in program.latents
        if name not in reached | jumps
    ]


def _values(program: Program) -> dict[str, Tensor]:
    """Values of all latents at full size; rows that a subsampled plate did not show repeat those it did."""
    out = {}
    for name, value in program.first_values.items():
        value = value.detach().clone()
        for axis, size in enumerate(program.sites[name].shape):
            if value.shape[axis] != size:
                value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
        out[name] = value
    return out


def _terms(program: Program, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log density of the data, under "", and of each latent site."""
    trace, _ = program.trace_one({}, program.shared_inputs(), Run(values=values))
    data = log_prob_of(trace, lambda node: bool(node["is_observed"]), enumerated=False, nesting=0)
    return {"": data, **{n: _prior_term(trace, n) for n in program.latents}}


def _moved(program: Program, name: str, values: dict[str, Tensor]) -> Tensor | None:
    """Another value of a discrete site; None where none is known."""
    site, value = program.sites[name], values[name]
    if "enumerable" not in site.capabilities or site.event_dim:
        return None
    with suppress(ValueError, RuntimeError):
        states = site.distribution.enumerate_support(expand=False).flatten()
        place = (value[..., None] == states.to(value)).to(torch.int8).argmax(-1)
        return states.to(value)[(place + 1) % len(states)]
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.detach(), b.detach()))


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
