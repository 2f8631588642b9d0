"""What an inference paid: counted calls, seconds, memory; two runs add up field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch

from ppl.errors import OptionError

__all__ = ["Cost", "DenoiserCounter"]


@dataclass
class Cost:
    """Calls, rows, seconds and bytes of one run; an engine adds to it while it works.

    Args:
        denoiser_calls: calls of the denoising network, whatever their batch size.
        denoiser_evals: rows that went through the network, summed over calls.
        vjps: rows of vector-Jacobian products through the network.
        likelihood_evals: evaluations of the likelihood, one per particle or draw.
        density_evals: evaluations of the joint log density.
        gradient_evals: evaluations of the gradient of the joint log density.
        seconds: wall time.
        peak_memory: bytes; the largest seen. On a CPU this is the high-water mark of the process.

    Example:
        >>> cost = Cost(denoiser_calls=2, denoiser_evals=64, peak_memory=10)
        >>> cost.add(denoiser_calls=1, denoiser_evals=32)
        >>> (cost + Cost(vjps=5, peak_memory=7)).to_dict()["denoiser_evals"]
        96
    """

    denoiser_calls: int = 0
    denoiser_evals: int = 0
    vjps: int = 0
    likelihood_evals: int = 0
    density_evals: int = 0
    gradient_evals: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def add(self, **counts: float) -> None:
        """Add to the named fields in place; peak_memory takes the larger.

        Raises:
            OptionError: if a name is not a field.
        """
        for name, value in counts.items():
            if name not in _FIELDS:
                raise OptionError(f"a cost has the fields {', '.join(_FIELDS)}; got {name!r}")
            before = getattr(self, name)
            setattr(self, name, max(before, value) if name == "peak_memory" else before + value)

    def merge(self, other: Cost) -> Cost:
        """Add another cost to this one in place, and return this one."""
        self.add(**other.to_dict())
        return self

    def copy(self) -> Cost:
        """A copy that further counting does not touch."""
        return Cost(**asdict(self))

    def __add__(self, other: Cost) -> Cost:
        return self.copy().merge(other)

    def to_dict(self) -> dict[str, float]:
        """All fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> Cost:
        """The inverse of `to_dict`; fields that are missing are zero.

        Raises:
            OptionError: if a name is not a field.
        """
        cost = cls()
        cost.add(**values)
        return cost

    def __str__(self) -> str:
        """Only what was spent: "3.1 s, 1,200 denoiser calls"."""
        words = [f"{self.seconds:.3g} s"]
        words += [
            f"{getattr(self, name):,} {name.replace('_', ' ')}"
            for name in _FIELDS
            if name not in ("seconds", "peak_memory") and getattr(self, name)
        ]
        if self.peak_memory:
            words.append(f"{self.peak_memory / 2**20:,.0f} MiB")
        return ", ".join(words)


_FIELDS = tuple(field.name for field in fields(Cost))


class DenoiserCounter:
    """Counts the denoiser calls of a prior straight into a cost, as an entry of the prior's list of `counters`.

    Args:
        cost: of the run.
        recorded: count the rows that are denoised while gradients are recorded as differentiated once, for engines
            that differentiate through the sampler; guided samplers count their own vjps.

    Example:
        >>> cost = Cost()
        >>> counter = DenoiserCounter(cost)
        >>> counter.calls += 1
        >>> cost.denoiser_calls
        1
    """

    def __init__(self, cost: Cost, *, recorded: bool = False) -> None:
        self.cost, self.recorded = cost, recorded

    @property
    def calls(self) -> int:
        """Calls, whatever the batch."""
        return self.cost.denoiser_calls

    @calls.setter
    def calls(self, value: int) -> None:
        self.cost.denoiser_calls = value

    @property
    def evals(self) -> int:
        """Rows denoised."""
        return self.cost.denoiser_evals

    @evals.setter
    def evals(self, value: int) -> None:
        if self.recorded and torch.is_grad_enabled():
            self.cost.vjps += value - self.cost.denoiser_evals
        self.cost.denoiser_evals = value

    @property
    def vjps(self) -> int:
        """Rows differentiated."""
        return self.cost.vjps

    @vjps.setter
    def vjps(self, value: int) -> None:
        self.cost.vjps = value
