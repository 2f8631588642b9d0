"""Draws from a program's joint distribution, and of its data given posterior draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl.errors import OptionError, ProgramError
from ppl.option_checks import whole_number
from ppl.trace import Run, seeded, values_of

if TYPE_CHECKING:
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["predict", "simulate"]


def simulate(program: Program, generator: torch.Generator, size: int | None = None) -> dict[str, Tensor]:
    """`Program.simulate`: latents, data and deterministic values from the joint distribution, (size, *shape)."""
    if not isinstance(generator, torch.Generator):
        raise OptionError(
            f"simulate takes a torch.Generator, got {generator!r}; make one: torch.Generator().manual_seed(0)"
        )
    values: dict[str, Tensor] = {}
    rows = 1 if size is None else whole_number("size", size, 1)
    with seeded(generator), torch.no_grad():
        for site in program.latents.values():
            if site.static and "denoiser" in site.capabilities:  # one call of the network for all draws
                values[site.name] = site.distribution.sample((rows,))
        draws = []
        for i in range(rows):
            run = Run(values={n: v[i] for n, v in values.items()}, predict=True)
            draws.append(values_of(program.trace_one({}, program.shared_inputs(), run)[0]))
    if size is None:
        return draws[0]
    return {n: torch.stack([d[n] for d in draws]) for n in draws[0]}


def predict(program: Program, posterior: Posterior, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """`Program.predict`: data and deterministic values given each posterior draw, (chain, draw, *shape)."""
    if program.problems is not None:
        raise ProgramError("predict takes one problem at a time; use the program that `over` was called on")
    given_sites = getattr(posterior, "draws", None)
    if not given_sites or not any(n in program.latents for n in given_sites):
        found = f"one of {list(given_sites)}" if given_sites else f"{type(posterior).__name__}"
        raise OptionError(f"predict takes a ppl.Posterior of the latent sites {list(program.latents)}, got {found}")
    generator = generator or torch.Generator(program.device).manual_seed(0)
    draws = {n: v for n, v in posterior.draws.items() if n in program.latents}
    lead = next(iter(draws.values())).shape[:2]
    flat = {n: v.reshape(-1, *v.shape[2:]) for n, v in draws.items()}
    fitted = {n: posterior.parameters.get(n, p) for n, p in program.parameters.items()}
    shared = program.shared_inputs(params=fitted)
    rows = []
    with seeded(generator), torch.no_grad():
        for i in range(lead[0] * lead[1]):
            given = {n: v[i] for n, v in flat.items()}
            trace, _ = program.trace_one({}, shared, Run(values=given, predict=True))
            rows.append({n: v for n, v in values_of(trace).items() if n not in given})
    return {n: torch.stack([r[n] for r in rows]).reshape(*lead, *rows[0][n].shape) for n in rows[0]}
