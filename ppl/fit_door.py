"""What the `fit` of every backend begins with: one problem, a source of randomness, a monitor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ppl.errors import ProgramError
from ppl.monitor import Monitor

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["open_fit"]


def open_fit(
    name: str, program: Program, generator: torch.Generator | None, seed: int, monitor: Monitor | None
) -> tuple[torch.Generator, Monitor]:
    """The generator, made from the seed when None, and the monitor, a quiet one when None.

    Args:
        name: of the backend, for the message.
        program: what is to be fitted.
        generator: source of all randomness.
        seed: see generator.
        monitor: progress, checkpoints, Ctrl-C.

    Raises:
        ProgramError: the program holds several problems.
    """
    if program.problems is not None:
        raise ProgramError(
            f"{name}.fit takes one problem at a time; ppl.infer runs the problems of program.over in turn"
        )
    generator = generator or torch.Generator(program.device).manual_seed(seed)
    return generator, monitor or Monitor(generator=generator)
