"""What fitted guides of all kinds share: evidence bound, draws as a posterior, files.

    ELBO = E_q[log p(z, y) - log q(z)] = log p(y) - KL(q || p(z | y))

A kind says how its draws are weighed and how their values are read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ppl.cost import Cost
from ppl.errors import CheckpointError, OptionError, ShapeError
from ppl.pareto import smooth_tail
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from ppl.storage import save_tensors

__all__ = ["Fitted", "Weighed", "mean_of", "with_parameters"]


class Weighed(NamedTuple):
    """Draws of a guide with both densities.

    Args:
        draws: the draws, in the form that the guide keeps them.
        log_p: (draws,) log density of the program.
        log_q: (draws,) log density of the guide.
        exact: whether `log_p` is that of all data, without noise.
    """

    draws: Any
    log_p: Tensor
    log_q: Tensor
    exact: bool


@dataclass(frozen=True, eq=False)
class Fitted:
    """An approximation q(z) to the posterior of a program.

    Args:
        program: the program, with its learned parameters.
        guide: what is fitted.
        params: the guide's parameters.
        history: (steps,) estimates of the objective during the fit, float64.
        optimizer: what a continued fit needs.
        lanes: draws, or copies of the objective, that one gradient took.
        complete: whether the fit ran to its end.
    """

    program: Program
    guide: Any
    params: dict[str, Tensor]
    history: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict, repr=False)
    lanes: int = 16
    complete: bool = True

    KIND: ClassVar[str]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Learnable parameters of the program at their fitted values, constrained."""
        return dict(self.program.parameters)

    def elbo(self, particles: int = 1024, generator: torch.Generator | None = None, seed: int = 0) -> Estimate:
        """The evidence lower bound and its Monte-Carlo standard error, both float64.

        Args:
            particles: draws it is estimated from.
            generator: source of the draws; made from the seed when None.
            seed: see generator.

        Raises:
            OptionError: there are fewer than two particles.
        """
        if particles < 2:
            raise OptionError(f"an ELBO with a standard error needs two particles or more, got {particles}")
        made = self._weigh(particles, self._source(generator, seed))
        return mean_of(made.log_p - made.log_q)

    def posterior(
        self,
        draws: int = 1000,
        chains: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        cost: Cost | None = None,
    ) -> Posterior:
        """Independent draws of the guide as a posterior, with the ELBO and k-hat that come with them.

        k-hat, the tail index of the weights p/q, tells how far to trust the guide: below 0.5 good, above 0.7 not.
        It is NaN where the density is only known up to the noise of a subsample, or with fewer than 25 draws.

        Args:
            draws: draws per chain.
            chains: chains; all are independent draws of one q.
            generator: source of the draws; made from the seed when None.
            seed: see generator.
            cost: what the density evaluations are added to.

        Raises:
            OptionError: there are no draws or no chains.
        """
        check_size(draws, chains)
        cost = Cost() if cost is None else cost
        made = self._weigh(draws * chains, self._source(generator, seed))
        cost.add(density_evals=draws * chains)
        log_weight = (made.log_p - made.log_q).double()
        elbo = mean_of(log_weight)
        known = made.exact and bool(torch.isfinite(log_weight).all())
        info = {
            "elbo": elbo.value,
            "elbo_stderr": elbo.stderr,
            "elbo_history": self.history,
            "pareto_k": smooth_tail(log_weight)[1].cpu() if known else torch.tensor(math.nan, dtype=torch.float64),
            "lp": made.log_p.reshape(chains, draws),
            "log_q": made.log_q.reshape(chains, draws),
        }
        return Posterior(
            draws={n: v.reshape(chains, draws, *v.shape[1:]) for n, v in self._values(made.draws).items()},
            parameters=self.parameters,
            guide=self,
            cost=cost,
            info=info,
            observed=dict(self.program.observed_data()),
            attrs={"backend": "SVI", "complete": self.complete},
        )

    # What a kind says ------------------------------------------------------------------------------------------------

    def _weigh(self, count: int, generator: torch.Generator) -> Weighed:
        """Draws and their densities."""
        raise TypeError(f"{type(self).__name__} does not weigh draws")

    def _values(self, draws: Any) -> dict[str, Tensor]:
        """Values (draws, *site) of the sites."""
        raise TypeError(f"{type(self).__name__} does not read draws")

    @staticmethod
    def _sites(program: Program) -> dict[str, tuple[int, ...]]:
        """Shapes of the latents by which a file knows its program again."""
        return {n: tuple(s.shape) for n, s in program.latents.items()}

    # Files -----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors from which `load` builds the same guide again."""
        meta = {
            "kind": self.KIND,
            "lanes": self.lanes,
            "complete": self.complete,
            "sites": self._sites(self.program),
        }
        tensors = {f"params.{n}": v for n, v in self.params.items()}
        tensors |= {f"parameters.{n}": v for n, v in self.parameters.items()}
        tensors |= {f"optimizer.{n}": v for n, v in self.optimizer.items()}
        return meta, {**tensors, "history": self.history}

    def save(self, path: str | Path) -> None:
        """Write the guide to one safetensors file, with a checksum and without the program."""
        meta, tensors = self.state()
        save_tensors(path, tensors, meta)

    @classmethod
    def _read(
        cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], program: Program, where: str
    ) -> dict[str, Any]:
        """The fields of a guide but for the guide itself, from what `state` gave."""
        if not isinstance(meta, Mapping) or meta.get("kind") != cls.KIND:
            raise CheckpointError(
                f"{where} does not hold a fitted guide ({cls.KIND}); give the path that its save wrote"
            )
        sites = cls._sites(program)
        if list(meta["sites"].items()) != list(sites.items()):
            raise ShapeError(f"{where} was fitted to the sites {meta['sites']}, but the program has {sites}")

        def part(prefix: str) -> dict[str, Tensor]:
            named = {n: v for n, v in tensors.items() if n.startswith(prefix)}
            return {n.removeprefix(prefix): v.to(program.device) for n, v in named.items()}

        return {
            "program": with_parameters(program, part("parameters.")),
            "params": part("params."),
            "history": tensors["history"],
            "optimizer": part("optimizer."),
            "lanes": meta["lanes"],
            "complete": meta["complete"],
        }

    def _source(self, generator: torch.Generator | None, seed: int) -> torch.Generator:
        return generator or torch.Generator(self.program.device).manual_seed(seed)


def with_parameters(program: Program, parameters: Mapping[str, Tensor]) -> Program:
    """The same program, its graphs included, with learnable parameters at other values."""
    new = copy.copy(program)
    new.parameters = {**program.parameters, **parameters}
    return new


def check_size(draws: int, chains: int) -> None:
    """Raise where there is nothing to draw."""
    if draws < 1 or chains < 1:
        raise OptionError(f"draws and chains must be one or more, got draws={draws}, chains={chains}")


def mean_of(values: Tensor) -> Estimate:
    """The mean of draws and its standard error, in float64."""
    values = values.double()
    spread = values.std() if len(values) > 1 else values.new_tensor(math.nan)
    return Estimate(values.mean(), spread / math.sqrt(len(values)))
