"""Which programs a training serves: those with the same sites, covariates and parameters, whatever their data.

Another program is told by its simulations: their deciles, and the loss on them, are those of the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ppl.amortised.pairs import givens
from ppl.errors import ProgramError, ShapeError
from ppl.program import Program

__all__ = ["IfCorrected", "check_same", "described_sites", "recognise", "singles_of"]

FAR = 6.0  # standard errors between two losses that belong to different programs


class IfCorrected:
    """Class data that holds for an object whose draws are weighted; the class itself promises nothing.

    Args:
        corrected: for objects with `correct=True`.
        otherwise: for the others, and for the class.
    """

    def __init__(self, corrected: Any, otherwise: Any) -> None:
        self.corrected, self.otherwise = corrected, otherwise

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self.corrected if owner is not None and owner.correct else self.otherwise


def described_sites(program: Program) -> dict[str, str]:
    """What has to agree between the program that was simulated and the one to be solved."""
    return {
        n: f"{'data' if s.observed else 'noise' if n in program.lifted else 'latent'} {tuple(s.shape)} in {s.support}"
        for n, s in program.sites.items()
    }


def singles_of(program: Program) -> list[Program]:
    """The problems of a program, one by one."""
    return [program] if program.problems is None else [program.problem(i) for i in range(program.problems)]


def check_same(trained: Program, given: tuple[list[str], str], singles: Sequence[Program], what: str) -> None:
    """Raise unless all problems have the sites, covariates and parameters that were simulated.

    Args:
        trained: the program of the training.
        given: names of its other inputs, and a hash of their values.
        singles: the problems.
        what: of the trained thing, for the message.

    Raises:
        ShapeError: other sites.
        ProgramError: other covariates or parameters.
    """
    names, hashed = given
    for one in singles:
        ours, theirs = described_sites(trained), described_sites(one)
        if theirs != ours:
            raise ShapeError(f"the {what} was trained on the sites {ours}, the program has {theirs}")
        if givens(one, names)[1] != hashed:
            raise ProgramError(
                f"the {what} was trained with other values of {names}; only observed data may differ from those of the "
                "training: train again, or make them latent sites or data"
            )


def recognise(judged: tuple[float, float, float], loss: tuple[float, float], where: str) -> None:
    """Refuse a program that simulates other data, or on whose simulations the network errs otherwise.

    Args:
        judged: loss on this program's simulations, its standard error, and their distance to those of the training.
        loss: loss at the end of the training, and its standard error.
        where: what was loaded.

    Raises:
        ProgramError: the program is another one.
    """
    mean, stderr, distance = judged
    gap = abs(mean - loss[0]) / math.hypot(stderr, loss[1])
    if max(gap, distance) > FAR:
        raise ProgramError(
            f"{where} was trained on another program: simulations of this one differ by {distance:.1f} standard "
            f"errors from those of the training, and the loss on them by {gap:.1f}; only observed data may differ, not "
            "priors, noise or the forward model"
        )
