"""The `fit` of backends that keep what they learn: one problem, a source of randomness, a monitor, then their own work.

A backend says how it fits in `_fitted`, whose types are those that `fit` takes and returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ppl.errors import ProgramError
from ppl.monitor import Monitor

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["ContinuedFitDoor", "FitDoor", "open_fit"]

F_co = TypeVar("F_co", covariant=True)
S_contra = TypeVar("S_contra", contravariant=True)


class _Fits(Protocol[F_co]):
    def _fitted(self, program: Program, generator: torch.Generator, monitor: Monitor) -> F_co: ...


class _GoesOn(Protocol[S_contra, F_co]):
    def _one_problem(self, program: Program) -> Program: ...

    def _fitted(
        self, program: Program, generator: torch.Generator, monitor: Monitor, start: S_contra | None
    ) -> F_co: ...


class FitDoor:
    """Base of backends that fit once, and draw from what they found."""

    def fit(
        self: _Fits[F_co],
        program: Program,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
    ) -> F_co:
        """What `run` draws from, to be kept; the class tells what it holds.

        Args:
            program: the model and its data.
            generator: source of all randomness; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C; a quiet one when None.

        Raises:
            ProgramError: the program holds several problems, or is one that this backend cannot fit.
            NotFiniteError: no finite density was found.
        """
        return self._fitted(_one_of(self, program), *open_fit(program, generator, seed, monitor))


class ContinuedFitDoor:
    """Base of backends that fit by steps, and can go on from a fit."""

    def _one_problem(self, program: Program) -> Program:
        return _one_of(self, program)

    def fit(
        self: _GoesOn[S_contra, F_co],
        program: Program,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
        start: S_contra | None = None,
    ) -> F_co:
        """What `run` draws from, to be kept.

        Args:
            program: the model and its data. A network that is trained on simulations does not look at the data; it
                takes the first problem of `program.over(...)`.
            generator: source of all randomness, made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C, cost; a quiet one when None.
            start: a fit to go on from, of this program or of one with the same latents and other data. The learning
                rate starts again; moments of the optimiser are kept where the fit holds them.

        Raises:
            NotFiniteError: the density or its gradient is not finite at a draw of the guide.
            OptionError: `start` is of another family, form or network.
            ProgramError: the program holds several problems, or is one that this backend cannot fit.
        """
        program = self._one_problem(program)
        return self._fitted(program, *open_fit(program, generator, seed, monitor), start)


def _one_of(backend: Any, program: Program) -> Program:
    if program.problems is not None:
        name = type(backend).__name__
        raise ProgramError(
            f"{name}.fit takes one problem at a time; ppl.infer runs the problems of program.over in turn"
        )
    return program


def open_fit(
    program: Program, generator: torch.Generator | None, seed: int, monitor: Monitor | None
) -> tuple[torch.Generator, Monitor]:
    """The generator, made from the seed when None, and the monitor, a quiet one when None.

    Args:
        program: what is to be fitted.
        generator: source of all randomness.
        seed: see generator.
        monitor: progress, checkpoints, Ctrl-C.
    """
    generator = generator or torch.Generator(program.device).manual_seed(seed)
    return generator, monitor or Monitor(generator=generator)
