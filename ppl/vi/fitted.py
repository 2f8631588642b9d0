"""A fitted guide: draws, density, evidence bound, files.

ELBO = E_q[log p(z, y) - log q(z)] = log p(y) - KL(q || p(z | y))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl.cost import Cost
from ppl.errors import CheckpointError
from ppl.flat import FlatDensity
from ppl.posterior import Posterior
from ppl.program import Program
from ppl.storage import load_tensors
from ppl.vi.fitted_base import Fitted, Weighed, check_size
from ppl.vi.full_data import full_log_density, full_values
from ppl.vi.guides import AutoGuide, Flow, FullRank, Guide, Hierarchical, LowRank, MeanField
from ppl.vi.guides.guide import with_program

__all__ = ["FittedGuide", "bound_guide"]

KINDS: dict[str, Any] = {c.__name__: c for c in (MeanField, FullRank, LowRank, Hierarchical, Flow)}


@dataclass(frozen=True, eq=False)
class FittedGuide(Fitted):
    """An approximation q(z) to the posterior of a program, as `SVI.fit` returns it.

    Args:
        program: the program, with its learned parameters.
        guide: the family of q.
        params: the guide's parameters, unconstrained.
        history: (steps,) ELBO estimates of the fit, float64.
        optimizer: what a continued fit needs.
        lanes: draws that one gradient took.
        complete: whether the fit ran to its end.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import SVI, Program
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fitted = SVI(steps=300, lr=0.05).fit(Program(model, torch.tensor(2.0)), seed=0)
        >>> posterior = fitted.posterior(1000, seed=0)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.2)
        True
    """

    guide: Guide

    KIND: ClassVar[str] = "FittedGuide"

    def log_prob(self, z: Tensor) -> Tensor:
        """Normalised log q(z) of unconstrained vectors, (lanes, dim) -> (lanes,)."""
        with torch.no_grad():
            return self.guide.log_prob(self.guide_params, z)

    def sample(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Unconstrained draws (draws, dim) and their log q (draws,)."""
        dim = self.program.flat().dim
        with torch.no_grad():
            noise = self.guide.noise(draws, dim, self.program.dtype, generator)
            return self.guide.rsample_and_log_prob(self.guide_params, noise)

    def on(self, program: Program) -> FittedGuide:
        """The same fit on a program with the same latents, such as one with other data for a guide that sees data.

        Args:
            program: in noise space where the fit was.

        Raises:
            ShapeError: the program has other latents.
        """
        return self.from_state(*self.state(), program, self.guide)

    @property
    def guide_params(self) -> dict[str, Tensor]:
        """What the guide is evaluated at: its parameters, and those of the program where it reads them."""
        return with_program(self.guide, self.params, self.parameters)

    def corrected(
        self,
        draws: int = 1000,
        chains: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        cost: Cost | None = None,
        smooth: bool = False,
    ) -> Posterior:
        """Draws of the guide weighted by p(z, y) / q(z), with the evidence and k-hat.

        Args:
            draws: draws per chain.
            chains: chains; all are independent draws of one q.
            generator: source of the draws; made from the seed when None.
            seed: see generator.
            cost: what the density evaluations are added to.
            smooth: smooth the largest weights, see `ppl.Importance`.
        """
        from ppl.importance import weighted_posterior
        from ppl.monitor import Monitor
        from ppl.smc.reference import GuideReference

        check_size(draws, chains)
        generator = self._source(generator, seed)
        monitor = Monitor(generator=generator)
        with monitor:
            made = weighted_posterior(GuideReference(self.program, self), draws, chains, generator, monitor, smooth)
        cost = Cost() if cost is None else cost
        cost.merge(monitor.cost)
        attrs = {**made.attrs, "backend": "Importance", "exact": "in_the_limit", "notes": monitor.notes}
        return replace(made, cost=cost, observed=dict(self.program.observed_data()), attrs=attrs)

    def _weigh(self, count: int, generator: torch.Generator) -> Weighed:
        z, log_q = self.sample(count, generator)
        log_p, exact = full_log_density(self.program.flat(), z, self.lanes, generator)
        return Weighed(z, log_p, log_q, exact)

    def _values(self, draws: Tensor) -> dict[str, Tensor]:
        return full_values(self.program.flat(), draws)

    @staticmethod
    def _sites(program: Program) -> dict[str, tuple[int, ...]]:
        return {n: tuple(leaf.shape) for n, leaf in program.flat().layout.leaves.items()}

    # Files -----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors from which `load` builds the same guide again."""
        meta, tensors = super().state()
        return {**meta, "guide": type(self.guide).__name__, "options": _options(self.guide)}, tensors

    @classmethod
    def load(cls, path: str | Path, program: Program, guide: Guide | None = None) -> FittedGuide:
        """Read a file of `save`.

        Args:
            path: the file.
            program: the program it was fitted to, or one with the same latents and other data.
            guide: the family, where the file cannot name it (guides from outside this package).

        Raises:
            CheckpointError: the file is damaged, or not of a guide.
            ShapeError: the program has other latents.
        """
        tensors, meta = load_tensors(path)
        return cls.from_state(meta, tensors, program, guide, str(path))

    @classmethod
    def from_state(
        cls,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        program: Program,
        guide: Guide | None = None,
        where: str = "the state",
    ) -> FittedGuide:
        """The inverse of `state`, for a program with the same latents."""
        fields = cls._read(meta, tensors, program, where)
        own = _guide(meta, where) if guide is None else guide
        return cls(guide=bound_guide(own, program.flat()), **fields)


def bound_guide(guide: Guide, flat: FlatDensity) -> Guide:
    """The guide, told of the places of the sites if it asks for them."""
    bind = getattr(guide, "bind", None)
    if bind is None:
        return guide
    return bind(flat.layout, flat.program) if getattr(guide, "reads_program", False) else bind(flat.layout)


def _options(guide: Guide) -> dict[str, Any]:
    """The options of a guide as plain data."""
    if isinstance(guide, AutoGuide):
        plain = all(isinstance(v, bool | int | float | str) for v in guide.options.values())
        return {"cls": guide.name, "options": dict(guide.options)} if plain else {}
    if type(guide).__name__ not in KINDS or not is_dataclass(guide):
        return {}
    return {f.name: getattr(guide, f.name) for f in fields(guide)}


def _guide(meta: Mapping[str, Any], where: str) -> Guide:
    """The guide that a file names."""
    name, options = meta["guide"], dict(meta["options"])
    if name in KINDS:
        return KINDS[name](**options)
    if name == "AutoGuide" and options:
        from pyro.infer import autoguide

        cls = getattr(autoguide, options["cls"], None)
        if cls is not None:
            return AutoGuide(cls, options["options"])
    raise CheckpointError(f"{where} holds a guide of the kind {name!r} that cannot be rebuilt; pass it as guide=...")
