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

from ppl.errors import OptionError, ProgramError
from ppl.objectives.algorithm import Algorithm, Target
from ppl.objectives.context import Context
from ppl.objectives.density import Direct, Reciprocal, direct
from ppl.objectives.draw import Draw, Stochastic
from ppl.objectives.sir import SIR

__all__ = ["Marginal", "Normalize"]


@dataclass(frozen=True, eq=False)
class Marginal(Stochastic):
    """The distribution of some sites of a program, the others integrated out by importance sampling or SMC.

    Args:
        program: a Pyro program with auxiliary sites.
        keep: sites that stay.
        algorithm: how the others are integrated out, `SIR` or `SMC`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, ppl
        >>> def guide():
        ...     u = pyro.sample("u", dist.Normal(0.0, 1.0))
        ...     pyro.sample("z", dist.Normal(u, 0.5))
        >>> def reverse(kept):                                  # exact here, so that one particle has no error
        ...     pyro.sample("u", dist.Normal(kept["z"] / 1.25, (0.25 / 1.25) ** 0.5))
        >>> q = Marginal(guide, keep=("z",), algorithm=ppl.objectives.SIR(1, reverse))
        >>> objective = lambda ctx, model, guide: ctx.density(guide, {"z": torch.tensor(0.7)}).log
        >>> engine = ppl.objectives.Engine(objective, None, q)
        >>> engine.values(samples=3) - dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(0.7)) < 1e-5
        tensor([True, True, True])
    """

    program: Any
    keep: Sequence[str]
    algorithm: Algorithm = field(default_factory=SIR)

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
        if not rest.values:
            return replace(kept, density=joint.density)
        log = self.algorithm.retaining(ctx, Target(self.program, kept, detach), rest, joint)
        return replace(kept, density=Reciprocal(log), call=0)

    def density(self, ctx: Context, values: Draw, *, frozen: bool = False) -> Direct:
        """An unbiased estimate of the marginal density."""
        made = self.algorithm.free(ctx, Target(self.program, values, frozen, frozen))
        return Direct(made.log_normaliser)


@dataclass(frozen=True, eq=False)
class Normalize(Stochastic):
    """A target known up to its normaliser, made a distribution by importance resampling or SMC.

    Args:
        target: a Pyro program; its joint density with what it observes is the unnormalised target.
        algorithm: `SIR` or `SMC`; the proposal takes the model's arguments.
    """

    target: Any
    algorithm: Algorithm = field(default_factory=lambda: SIR(2))

    def programs(self) -> list[Any]:
        """The Pyro programs inside that take the model's arguments."""
        inner = [self.target, *([] if self.algorithm.proposal is None else [self.algorithm.proposal])]
        return [q for p in inner for q in (p.programs() if isinstance(p, Stochastic) else [p])]  # type: ignore[attr-defined]

    def sim(self, ctx: Context, *, detach: bool = False) -> Draw:
        """A resampled draw, and an estimate of its density whose reciprocal is unbiased."""
        made = self.algorithm.free(ctx, Target(self.target, None, detach))
        draw = made.draw
        index, pick = ctx.choose("index", made.log_weight, self.algorithm.index, detach=detach)
        values = {n: pick(v, draw.nodes[n].event_dim) for n, v in draw.values.items()}
        chosen = made.log_target.gather(0, index[None])[0]
        nodes = {n: replace(node, value=values[n], estimator=None, arms=()) for n, node in draw.nodes.items()}
        return Draw(values, Reciprocal(chosen - made.log_normaliser), draw.auxiliary, nodes, draw.lanes - 1)

    def density(self, ctx: Context, values: Draw, *, frozen: bool = False) -> Direct:
        """An unbiased estimate of the density of the resampled draw."""
        gamma = ctx.density(self.target, values, frozen=frozen)
        log_z = self.algorithm.retaining(ctx, Target(self.target, None, frozen, frozen), values)
        return Direct(direct(gamma, "the target") - log_z)
