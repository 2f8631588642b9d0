"""Sequential Monte Carlo inside a program: a target is met stage by stage, with resampling in between.

    w_t = gamma_t(u_1..t) / (gamma_{t-1}(u_1..t-1) r_t(u_t | u_1..t-1)),   Zhat = prod_t 1/N sum_i w_t^i

gamma_t is the density of all sites that the target runs through before stage t + 1 begins. A run that retains u* holds
its lineage in one slot: it is never resampled away, and the others may descend from it (conditional SMC).
Source: Andrieu, Doucet & Holenstein (2010), sections 2.2 and 4.3 [inferred]; the contracts are tested by enumeration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.objectives.algorithm import Population, Target, check_algorithm, proposal_of, together
from ppl.objectives.density import Exact
from ppl.objectives.draw import Draw, Stochastic, logmeanexp
from ppl.objectives.estimators import Reinforce
from ppl.objectives.run import Node

if TYPE_CHECKING:
    from ppl.objectives.context import Context

__all__ = ["SMC"]


@dataclass(frozen=True)
class SMC:
    """Particles that are resampled (multinomially) after every stage but the last.

    Each stage runs the target from its beginning: T stages cost T runs of it, and of the proposal.

    Args:
        particles: N, of every stage.
        stages: names of the sites of each stage, in the order in which the target meets them; each latent site that is
            not given is a stage of its own when `None`.
        proposal: a Pyro program with these sites in the same order; in a `Marginal` it takes the kept values, a dict,
            before the model's arguments. `None` proposes from the target itself.
        index: estimator of ancestors and of the chosen index, `Reinforce()` or `Enumerate()`. Without it their gradient
            would be missing, the usual bias of filtering objectives.

    Raises:
        OptionError: there are no particles, an index has another estimator, or stages are not those of the target.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl.objectives import Engine, Marginal
        >>> def chain():
        ...     u = pyro.sample("u", dist.Normal(0.0, 1.0))
        ...     x = pyro.sample("x", dist.Normal(u, 1.0))
        ...     v = pyro.sample("v", dist.Normal(u, 1.0))
        ...     pyro.sample("y", dist.Normal(v, 1.0))
        >>> q = Marginal(chain, keep=("x", "y"), algorithm=SMC(200))        # u, then v given u and x
        >>> at = {"x": torch.tensor(0.5), "y": torch.tensor(-0.3)}
        >>> found = Engine(lambda ctx, model, guide: ctx.density(guide, at).log, None, q).values(samples=50)
        >>> exact = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> bool((found.exp().mean() / exact.log_prob(torch.tensor([0.5, -0.3])).exp() - 1).abs() < 0.1)
        True
    """

    particles: int = 10
    stages: Sequence[Sequence[str]] | None = None
    proposal: Any = None
    index: Any = field(default_factory=Reinforce)

    def __post_init__(self) -> None:
        check_algorithm(self.particles, self.index)

    def free(self, ctx: Context, target: Target) -> Population:
        """All particles start anew."""
        return self._sweep(ctx, target, None)

    def retaining(self, ctx: Context, target: Target, star: Draw, joint: Draw | None = None) -> Tensor:
        """log Zhat of a run in which one slot holds a given lineage."""
        return self._sweep(ctx, target, star).log_normaliser

    def _sweep(self, ctx: Context, target: Target, star: Draw | None) -> Population:
        source, kept, detach, frozen = proposal_of(self.proposal, target), target.kept, target.detach, target.frozen
        star = None if star is None else replace(star, values=ctx._padded(star))
        size = self.particles - (star is not None)
        values: dict[str, Tensor] = {}
        nodes: dict[str, Node] = {}
        weight: Tensor | None = None
        log_target: Tensor | None = None
        log_z: Tensor | float = 0.0
        for names, block in self._layout(ctx, target):
            parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
            if star is not None:
                reached = {n: star.values[n] for n in (*values, *names)}
                nodes |= {n: star.nodes[n] for n in reached if n in star.nodes}
                own = ctx.partial(source, self._given(ctx, kept, star, reached), set(names), frozen=frozen)
                step = ctx.partial(
                    target.program, together(ctx, kept, replace(star, values=reached)), block, frozen=frozen
                )
                base = 0.0 if log_target is None else log_target[0]
                parts.append(((step - own)[None], (base + step)[None], {n: v[None] for n, v in reached.items()}))
            if size:
                with ctx.particles(size):
                    past, before = self._resample(ctx, values, nodes, weight, log_target, size, detach)
                    old = _draw(past, nodes, len(ctx.lead))
                    given = together(ctx, kept, old) if self.proposal is None else old
                    new = ctx.sim(source, kept=given, only=frozenset(names), detach=detach)
                    nodes |= new.nodes
                    both = replace(new, values={**past, **new.values}, nodes={**old.nodes, **new.nodes})
                    step = ctx.partial(target.program, together(ctx, kept, both), block, frozen=frozen)
                    parts.append((Exact(step) - new.density, before + step, both.values))
            weight, log_target = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
            values = {n: _join([p[2][n] for p in parts]) for n in parts[0][2]}
            log_z = log_z + logmeanexp(weight)
        assert weight is not None
        assert log_target is not None
        assert isinstance(log_z, Tensor)
        return Population(_draw(values, nodes, len(ctx.lead) + 1), weight, log_target, log_z)

    def _resample(
        self,
        ctx: Context,
        values: dict[str, Tensor],
        nodes: dict[str, Node],
        weight: Tensor | None,
        log_target: Tensor | None,
        size: int,
        detach: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Ancestors of new particles, with the target they have reached."""
        if weight is None or log_target is None:
            return {}, torch.zeros((), dtype=ctx.engine.dtype, device=ctx.engine.device)

        def spread(x: Tensor) -> Tensor:
            return x[:, None].expand(len(x), size, *x.shape[1:])

        index, pick = ctx.choose("ancestors", spread(weight), self.index, detach=detach)
        past = {n: pick(spread(v), nodes[n].event_dim) for n, v in values.items()}
        return past, spread(log_target).gather(0, index[None])[0]

    def _given(self, ctx: Context, kept: Draw | None, star: Draw, reached: dict[str, Tensor]) -> Draw:
        """What the proposal runs at, for the retained lineage."""
        own = replace(star, values=reached)
        return together(ctx, kept, own) if self.proposal is None else own

    def _layout(self, ctx: Context, target: Target) -> list[tuple[tuple[str, ...], frozenset[str]]]:
        """Sites of each stage, and all sites of the target that belong to it."""
        if isinstance(target.program, Stochastic) or isinstance(self.proposal, Stochastic):
            raise OptionError("SMC meets a Pyro program stage by stage, not one whose density is estimated; use SIR")
        nodes = ctx.engine.programs.nodes(target.program)
        given = frozenset() if target.kept is None else frozenset(target.kept.values)
        free = [n for n, node in nodes.items() if node.latent and n not in given]
        stages = [tuple(s) for s in self.stages] if self.stages is not None else [(n,) for n in free]
        order = list(nodes)
        if sorted(n for s in stages for n in s) != sorted(free) or not all(stages):
            raise OptionError(f"stages must name each latent site once that is not given, {free}, got {stages}")
        starts = [min(order.index(n) for n in s) for s in stages]
        ends = [max(order.index(n) for n in s) for s in stages]
        if any(end >= start for end, start in zip(ends, starts[1:], strict=False)):
            raise OptionError(f"stages must follow each other as the target meets its sites, {free}, got {stages}")
        cuts = [0, *starts[1:], len(order)]
        return [(s, frozenset(order[a:b])) for s, a, b in zip(stages, cuts[:-1], cuts[1:], strict=True)]


def _join(parts: list[Tensor]) -> Tensor:
    """Along the axis of particles; the last part has all plates."""
    return torch.cat([p.expand(len(p), *parts[-1].shape[1:]) for p in parts])


def _draw(values: dict[str, Tensor], nodes: dict[str, Node], lanes: int) -> Draw:
    known = {n: replace(nodes[n], value=v, estimator=None, arms=()) for n, v in values.items()}
    return Draw(dict(values), Exact(torch.zeros(())), _auxiliary(known.values(), values), known, lanes)


def _auxiliary(nodes: Iterable[Node], names: Iterable[str]) -> frozenset[str]:
    return frozenset(n for n, node in zip(names, nodes, strict=True) if node.auxiliary)
