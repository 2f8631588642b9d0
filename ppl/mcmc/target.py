"""What the Markov chains of this package share: the density they walk on, and the posterior made of their walks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import ProgramError
from ppl.mcmc.convergence import note_disagreement
from ppl.posterior import Posterior

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.monitor import Monitor
    from ppl.program import Program

__all__ = ["fixed_density", "posterior_of"]

DRAWS_AT_ONCE = 1024  # draws times lanes that are mapped back to site values in one call


def fixed_density(program: Program, engine: str, monitor: Monitor) -> FlatDensity:
    """The density of a program on R^n, for an engine that needs the same one at every step.

    Raises:
        ProgramError: a plate is subsampled, or a latent site cannot be flattened.
    """
    refuse_subsampling(program, engine)
    if program.parameters:
        monitor.note(f"learnable parameters {sorted(program.parameters)} were held at their values; SVI fits them")
    return program.flat()


def refuse_subsampling(program: Program, engine: str) -> None:
    """Raise where a plate shows only part of its data."""
    if program.subsampled:
        plates = ", ".join(f"{n!r} (shows {a} of {b})" for n, (a, b) in program.subsampled.items())
        raise ProgramError(
            f"{engine} needs one fixed density, but the plate {plates} is subsampled and each subsample has another; "
            "drop subsample_size for this engine, or use ppl.SVI"
        )


def posterior_of(
    program: Program, flat: FlatDensity, z: Tensor, info: Mapping[str, Tensor], monitor: Monitor, **attrs: Any
) -> Posterior:
    """Site values of unconstrained draws, with the statistics of the run and R-hat.

    Args:
        program: the program.
        flat: its density.
        z: unconstrained draws (draw, lanes, dim), lanes problem-major.
        info: statistics (draw, lanes) by ArviZ name, or of any other shape.
        monitor: gets a note when chains disagree.
        **attrs: facts for the posterior.
    """
    problems = program.problems
    lead = (-1,) if problems is None else (problems, -1)
    step = max(1, DRAWS_AT_ONCE // max(z.shape[1], 1))
    parts: list[dict[str, Tensor]] = []
    for block in z.split(step) if len(z) else [z]:
        # (draw, lanes) -> lanes first: chains, or problems and chains, with their draws behind.
        rows = block.transpose(0, 1).reshape(-1, block.shape[-1])
        values = flat.constrain(rows)
        sizes = (*lead[:-1], z.shape[1] // (problems or 1), len(block))
        parts.append({n: v.reshape(*sizes, *v.shape[1:]) for n, v in values.items()})
    axis = len(lead)
    draws = {n: torch.cat([p[n] for p in parts], dim=axis) for n in parts[0]}

    def lanes_first(value: Tensor) -> Tensor:
        if value.shape[:2] != z.shape[:2]:
            return value
        rest = value.shape[2:]
        return value.transpose(0, 1).reshape(*lead[:-1], z.shape[1] // (problems or 1), len(z), *rest)

    out = {n: lanes_first(v) for n, v in info.items()}
    if problems is not None:
        attrs["problems"] = problems
    r_hat = note_disagreement(draws, monitor, problems is not None)
    if r_hat is not None:
        out["r_hat"] = r_hat
    return Posterior(draws=draws, info=out, parameters=dict(program.parameters), attrs=attrs)
