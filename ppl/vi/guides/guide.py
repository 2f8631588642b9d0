"""What a guide is: a family of densities q(z; phi) on R^n whose draws are differentiable in phi.

z = t(noise; phi),   noise fixed  =>  d E_q[f(z)] / d phi = E[ f'(z) dt/dphi ]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["PROGRAM", "Guide", "Params", "check_init_scale", "detached", "standard_normal", "with_program"]

Params = Mapping[str, Tensor]
LOG_2PI = math.log(2 * math.pi)
PROGRAM = "program."


@runtime_checkable
class Guide(Protocol):
    """A family of densities on the unconstrained vectors of a program; a frozen dataclass whose fields are its options.

    A guide may also offer `bind(layout)`, or `bind(layout, program)` with a true `reads_program`, when it needs the
    places of the sites or the program; its parameters then hold the learned ones of the program under "program.". Also
    `log_prob_each(params, z) -> (lanes, dim)`, when its coordinates are independent, and
    `rsample_and_cost(params, noise, path=...)`, draws and what the bound subtracts where that is not log q itself; and
    a true `near`, when it starts so near the posterior that the score term of log q only adds noise.
    """

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters to start from, unconstrained; the entry "loc" (dim,), where there is one, is the centre."""
        ...

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """What makes `lanes` draws: a tensor with a leading lane axis."""
        ...

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws z (lanes, dim), differentiable in the parameters, and log q(z) (lanes,), normalised.

        Args:
            params: the parameters.
            noise: of `noise(...)`.
            path: log q depends on the parameters through z alone (for the path gradient, "sticking the landing").
        """
        ...

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        ...


def detached(params: Params) -> dict[str, Tensor]:
    """The same parameters, through which no gradient flows."""
    return {n: v.detach() for n, v in params.items()}


def with_program(guide: Any, params: Params, parameters: Params) -> dict[str, Tensor]:
    """The guide's parameters, and learned ones of the program for a guide that reads them."""
    more = parameters if getattr(guide, "reads_program", False) else {}
    return {**params, **{PROGRAM + n: v for n, v in more.items()}}


def standard_normal(lanes: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """(lanes, size) standard normal numbers."""
    return torch.randn(lanes, size, dtype=dtype, device=generator.device, generator=generator)


def check_init_scale(init_scale: float) -> None:
    """Raise unless the starting scale is positive and finite."""
    from ppl.errors import OptionError

    if not (math.isfinite(init_scale) and init_scale > 0):
        raise OptionError(f"init_scale must be positive and finite, got {init_scale}; 0.1 is usual")
