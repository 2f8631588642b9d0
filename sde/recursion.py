r"""The recursion of a path, x_{n+1} = x_n + f(x_n, t_n) dt + g(x_n, t_n) dB_n, as it is or in compiled pieces.

Between the calls of a small drift, what costs time is Python and one kernel for each operation. A compiler sees a piece
of many steps at once and makes few kernels of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sde.prior import can_look
from sde.process import Process

__all__ = ["PIECE", "Recursion"]

PIECE = 10  # steps that are compiled as one


class Recursion:
    """All states of a path from where it starts and the increments of its noise.

    Args:
        process: drift, diffusion and noise.
        compile: run pieces of `PIECE` steps through `torch.compile`.

    Example:
        >>> follow = Recursion(Process(lambda x, t: -x))
        >>> dt = torch.full((3,), 0.5)
        >>> follow(torch.ones(1), torch.zeros(1, 3), torch.zeros(3), dt)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """

    def __init__(self, process: Process, compile: bool = False) -> None:
        self.process, self._steps = process, _steps_of(process)
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        if compile:
            steps = _steps_of(process)
            # The compiler counts versions by code object, few for each: this one shares them with no other path.
            steps.__code__ = steps.__code__.replace()
            self._compiled = torch.compile(steps)

    def __call__(self, x: Tensor, increments: Tensor, times: Tensor, dt: Tensor) -> Tensor:
        """X after every step.

        Args:
            x: (*batch, d), before the first.
            increments: (*batch, m, steps).
            times: (steps,), before each step.
            dt: (steps,), their lengths.

        Returns:
            (*batch, steps, d).
        """
        process = self.process
        if not callable(process.drift) and not callable(process.diffusion):  # nothing depends on the state: a sum
            g = process.g(x, times[0])
            moves = increments.mT @ g.mT if process.general else increments.mT * g[..., None, :]
            return x[..., None, :] + (process.f(x, times[0])[..., None, :] * dt[:, None] + moves).cumsum(-2)
        moves = increments.movedim(-1, 0).contiguous()
        # Compiled code is for values: not for symbols of a trace, tangents or transforms.
        plain = self._compiled is None or not can_look(x, moves) or forward_ad._current_level >= 0
        if self._compiled is None or plain or len(moves) < PIECE:
            return self._steps(x, moves, times, dt)[0]
        x, found = x.contiguous(), []  # one memory layout for every piece: each layout is another version
        with warnings.catch_warnings():
            # The compiler looks at the gradients of its inputs, of which those after the first piece have none.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            for part in zip(moves.split(PIECE), times.split(PIECE), dt.split(PIECE), strict=True):
                states, x = (self._compiled if len(part[0]) == PIECE else self._steps)(x, *part)
                found.append(states)
        return torch.cat(found, -2)


def _steps_of(process: Process) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The loop over steps: x, increments (steps, *batch, m), times and lengths -> (*batch, steps, d) and the last."""
    ahead = not callable(process.diffusion) and not process.general  # the noise's part of all steps at once

    def steps(x: Tensor, moves: Tensor, times: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        if ahead:
            moves = moves * process.g(x, times[0])
        found: list[Tensor] = []
        for move, t, length in zip(moves.unbind(), times.unbind(), dt.unbind(), strict=True):
            x = torch.addcmul(x + move, process.f(x, t), length) if ahead else process.step(x, t, length, move)
            found.append(x)
        return torch.stack(found, -2), x

    return steps
