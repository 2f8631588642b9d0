"""Programs whose density is estimated: a marginal, and a target normalised by importance resampling.

    Marginal:   sim   (z, u) ~ P, xi = log Zhat of a run of the algorithm on P(z, .) that retains u
                dens  xi = log Zhat of a free run
    Normalize:  sim   (u, Zhat) of a free run,          xi = log gamma(u) - log Zhat
                dens  Zhat of a run that retains u,     xi = log gamma(u) - log Zhat

`sim` gives E[exp(-xi) | z] = 1 / Q(z), `dens` E[exp(xi)] = Q(z). The two have different types.
Source: Becker et al. (2024) [read in its code]; the contracts are derived and tested against closed forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ppl.errors import OptionError, ProgramError
from ppl.objectives.context import Context
from ppl.objectives.density import Direct, Exact, Reciprocal, direct
from ppl.objectives.draw import Draw, Given, Stochastic, logmeanexp
from ppl.objectives.estimators import Enumerate, Reinforce

__all__ = ["SIR", "Marginal", "Normalize"]


@dataclass(frozen=True)
class SIR:
    """Sampling importance resampling: weights gamma(u_i) / r(u_i) of `particles` draws of a proposal.

    Args:
        particles: draws; their mean weight estimates the normaliser.
        proposal: a Pyro program, `Marginal` or `Normalize` for the sites that are summed out; in a `Marginal` it takes
            the kept values, a dict, before the model's arguments. `None` proposes from the target program itself, its
            given sites set.
        index: estimator of the chosen index, `Enumerate()` or `Reinforce()`; only `Normalize` chooses one.

    Raises:
        OptionError: there are no particles, or the index has another estimator.
    """

    particles: int = 1
    proposal: Any = None
    index: Any = field(default_factory=Enumerate)

    def __post_init__(self) -> None:
        if not isinstance(self.particles, int) or self.particles < 1:
            raise OptionError(
                f"a nested expectation needs samples: particles must be one or more, got {self.particles!r}"
            )
        if not isinstance(self.index, Enumerate | Reinforce):
            raise OptionError(f"the index takes Enumerate() or Reinforce(), got {self.index!r}")


@dataclass(frozen=True, eq=False)
class Marginal(Stochastic):
    """The distribution of some sites of a program, the others integrated out by importance sampling.

    Args:
        program: a Pyro program with auxiliary sites.
        keep: sites that stay.
        algorithm: how the others are integrated out.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl
        >>> def guide():
        ...     u = pyro.sample("u", dist.Normal(0.0, 1.0))
        ...     pyro.sample("z", dist.Normal(u, 0.5))
        >>> def reverse(kept):                                  # exact here, so that one particle has no error
        ...     pyro.sample("u", dist.Normal(kept["z"] / 1.25, (0.25 / 1.25) ** 0.5))
        >>> q = Marginal(guide, keep=("z",), algorithm=SIR(1, reverse))
        >>> objective = lambda ctx, model, guide: ctx.density(guide, {"z": torch.tensor(0.7)}).log
        >>> engine = ppl.objectives.Engine(objective, None, q)
        >>> engine.values(samples=3) - dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(0.7)) < 1e-5
        tensor([True, True, True])
    """

    program: Any
    keep: Sequence[str]
    algorithm: SIR = SIR()

    def __post_init__(self) -> None:
        if isinstance(self.keep, str) or not list(self.keep):
            raise OptionError(f'keep names the sites that stay, such as keep=("z",), got {self.keep!r}')

    def programs(self) -> list[Any]:
        """The Pyro programs inside that take the model's arguments."""
        return self.program.programs() if isinstance(self.program, Stochastic) else [self.program]  # type: ignore[attr-defined]

    def sim(self, ctx: Context, *, detach: bool = False) -> Draw:
        """Values of the kept sites, and an estimate whose reciprocal is unbiased."""
        joint = ctx.sim(self.program, detach=detach)
        missing = [n for n in self.keep if n not in joint.values]
        if missing:
            raise ProgramError(f"Marginal keeps {missing[0]!r}, but the program has the sites {sorted(joint.values)}")
        kept = joint.only(self.keep)
        rest = joint.only(n for n in joint.values if n not in self.keep)
        target = joint.density if isinstance(joint.density, Exact) else ctx.density(self.program, joint)
        if not rest.values:
            return replace(kept, density=joint.density)
        own = self._proposal_density(ctx, kept, rest, joint)
        weight = (direct(target, "the target of a marginal") - own)[None]
        if self.algorithm.particles > 1:
            weight = torch.cat([weight, self._fresh(ctx, kept, self.algorithm.particles - 1, detach, False)])
        return replace(kept, density=Reciprocal(logmeanexp(weight)))

    def density(self, ctx: Context, values: Draw, *, frozen: bool = False) -> Direct:
        """An unbiased estimate of the marginal density."""
        return Direct(logmeanexp(self._fresh(ctx, values, self.algorithm.particles, frozen, frozen)))

    def _fresh(self, ctx: Context, kept: Draw, size: int, detach: bool, frozen: bool) -> Tensor:
        """(size, ...) log weights of new proposals for the sites that are summed out."""
        proposal = self.algorithm.proposal
        with ctx.particles(size):
            if proposal is None:
                draw = ctx.sim(self.program, kept=kept, detach=detach)
            else:
                draw = ctx.sim(_given(proposal, kept), detach=detach)
            both = replace(
                draw,
                values={**ctx._padded(kept), **draw.values},
                nodes={**kept.nodes, **draw.nodes},
                auxiliary=frozenset(),
            )
            return ctx.density(self.program, both, frozen=frozen) - draw.density

    def _proposal_density(self, ctx: Context, kept: Draw, rest: Draw, joint: Draw) -> Tensor:
        """log r(u* | z) of the draw that is retained."""
        if self.algorithm.proposal is None:
            return ctx._total({n: joint.nodes[n] for n in rest.values})
        return direct(ctx.density(_given(self.algorithm.proposal, kept), rest), "the proposal")


@dataclass(frozen=True, eq=False)
class Normalize(Stochastic):
    """A target known up to its normaliser, made a distribution by importance resampling.

    Args:
        target: a Pyro program; its joint density with what it observes is the unnormalised target.
        algorithm: proposal and particles; the proposal takes the model's arguments.
    """

    target: Any
    algorithm: SIR = SIR(2)

    def programs(self) -> list[Any]:
        """The Pyro programs inside that take the model's arguments."""
        inner = [self.target, *([] if self.algorithm.proposal is None else [self.algorithm.proposal])]
        return [q for p in inner for q in (p.programs() if isinstance(p, Stochastic) else [p])]  # type: ignore[attr-defined]

    def sim(self, ctx: Context, *, detach: bool = False) -> Draw:
        """A resampled draw, and an estimate of its density whose reciprocal is unbiased."""
        with ctx.particles(self.algorithm.particles):
            draw = ctx.sim(self._proposal, detach=detach)
            gamma = ctx.density(self.target, draw)
            weight = gamma - draw.density
        total = logmeanexp(weight)
        index, pick = ctx.choose("index", weight, self.algorithm.index, detach=detach)
        values = {n: pick(v, draw.nodes[n].event_dim) for n, v in draw.values.items()}
        chosen = gamma.log.gather(0, index[None])[0]
        nodes = {n: replace(node, value=values[n], estimator=None, arms=()) for n, node in draw.nodes.items()}
        return Draw(values, Reciprocal(chosen - total), draw.auxiliary, nodes, draw.lanes - 1)

    def density(self, ctx: Context, values: Draw, *, frozen: bool = False) -> Direct:
        """An unbiased estimate of the density of the resampled draw."""
        gamma = ctx.density(self.target, values, frozen=frozen)
        own = direct(ctx.density(self._proposal, values, frozen=frozen), "the proposal")
        weight = (gamma.log - own)[None]
        if self.algorithm.particles > 1:
            with ctx.particles(self.algorithm.particles - 1):
                draw = ctx.sim(self._proposal, detach=frozen)
                fresh = ctx.density(self.target, draw, frozen=frozen) - draw.density
            weight = torch.cat([weight, fresh])
        return Direct(gamma.log - logmeanexp(weight))

    @property
    def _proposal(self) -> Any:
        return self.target if self.algorithm.proposal is None else self.algorithm.proposal


def _given(proposal: Any, kept: Draw) -> Any:
    """A proposal that takes the kept values first; one that is itself estimated takes none."""
    return proposal if isinstance(proposal, Stochastic) else Given(proposal, kept.values)
