"""Log densities that carry their contract: of the density itself, of its reciprocal, or of both.

    Direct:      E[exp(xi)]  = Q(z)        as `density` of a marginal gives it
    Reciprocal:  E[exp(-xi)] = 1 / Q(z)    as `sim` of a marginal gives it, for the z that was drawn

An importance weight p(x, z) / q(z) is unbiased for the evidence with a direct numerator and a reciprocal denominator,
and with no other pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ppl.errors import ContractError
from ppl.objectives.downstream import Terms

__all__ = ["Direct", "Exact", "LogDensity", "Reciprocal"]


@dataclass(frozen=True, eq=False)
class LogDensity:
    """An estimate of a log density, for each particle and datum.

    Args:
        log: (*particles, samples, *data) the estimate as a tensor, without its contract.
        terms: site by site, where it is that of a draw of one program.
    """

    log: Tensor
    terms: Terms | None = field(default=None, repr=False)


class Direct(LogDensity):
    """xi with E[exp(xi)] = Q(z). `p - q` with a reciprocal q is a log importance weight.

    Raises:
        ContractError: what is subtracted is not an estimate of a reciprocal density.

    Example:
        >>> import torch
        >>> p, q = Direct(torch.tensor(-1.0)), Reciprocal(torch.tensor(-3.0))
        >>> p - q
        tensor(2.)
        >>> p - p
        Traceback (most recent call last):
        ppl.errors.ContractError: a weight needs the reciprocal of its denominator, ...
    """

    def __sub__(self, other: LogDensity) -> Tensor:
        if not isinstance(other, LogDensity):
            return NotImplemented
        if not isinstance(other, Reciprocal):
            raise ContractError(
                "a weight needs the reciprocal of its denominator, without bias: take the density that came with the "
                f"draw (ctx.sim(guide).density), not one from ctx.density, got {type(other).__name__}"
            )
        weight = self.log - other.log
        if self.terms is not None:  # the engine asks a cost for its terms; all that is computed from it has none
            weight.terms = self.terms.minus(other.terms)  # type: ignore[attr-defined]
        return weight


class Reciprocal(LogDensity):
    """xi with E[exp(-xi) | z] = 1 / Q(z): what a draw brings with it, fit for a denominator only."""

    def __sub__(self, other: LogDensity) -> Tensor:
        if isinstance(self, Direct):
            return Direct.__sub__(self, other)
        raise ContractError(
            "the density that came with a draw is unbiased as a reciprocal only and cannot be a numerator; use "
            "ctx.density(program, values)"
        )


class Exact(Direct, Reciprocal):
    """A log density without noise, which keeps both contracts."""


def direct(density: LogDensity, what: str) -> Tensor:
    """The log of a density that must be unbiased itself."""
    if not isinstance(density, Direct):
        raise ContractError(f"{what} must be an unbiased density (ctx.density), got {type(density).__name__}")
    return density.log


def reciprocal(density: LogDensity, what: str) -> Tensor:
    """The log of a density whose reciprocal must be unbiased."""
    if not isinstance(density, Reciprocal):
        raise ContractError(
            f"{what} must be an unbiased reciprocal density (of a draw of ctx.sim), got {type(density).__name__}"
        )
    return density.log
