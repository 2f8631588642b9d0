"""What one dry run of an objective finds: the plates that all sites share, and how each site is treated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import CapabilityError, OptionError, ProgramError, ShapeError
from ppl.objectives.choice import chosen, defaults, support_of
from ppl.objectives.context import Context
from ppl.objectives.draw import Address
from ppl.objectives.estimators import Enumerate, Estimator, Policy, Rebar, Reinforce, Relax, Reparam
from ppl.objectives.programs import Disagreement, Programs
from ppl.objectives.run import Node
from ppl.trace import seeded, settings

if TYPE_CHECKING:
    from ppl.objectives.engine import Engine

__all__ = ["Plan", "make_plan"]

IMPOSSIBLE = 1e-6  # probabilities are clamped at the rounding of their type, 1e-7 in single precision


@dataclass
class Plan:
    """What one dry run found: the plates all sites share, and how each site is treated.

    Args:
        programs: what the plan is for.
        dims: axes (negative) of the shared plates, outermost first.
        sizes: their sizes.
        scale: full over shown data.
        names: their names.
        estimators: by address.
        states: finite supports of the enumerated sites.
        shapes: shapes of their values at one sample, without the axes of one coordinate.
        lanes: lane axes of every site.
        kept: which joint states of the enumerated sites are possible, as places in the list of all; None for all.
        complete: whether the dry run is over.
    """

    programs: Programs
    dims: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    scale: float = 1.0
    names: frozenset[str] = frozenset()
    estimators: dict[Address, Estimator] = field(default_factory=dict)
    states: dict[Address, Tensor] = field(default_factory=dict)
    shapes: dict[Address, tuple[int, ...]] = field(default_factory=dict)
    lanes: dict[Address, int] = field(default_factory=dict)
    kept: Tensor | None = None
    complete: bool = False

    @property
    def plates(self) -> int:
        """Axes that are kept for plates."""
        return self.programs.plates

    @property
    def scored(self) -> bool:
        """Whether a site takes the score."""
        return any(isinstance(e, Reinforce | Relax) for e in self.estimators.values())

    @property
    def joint(self) -> int:
        """Joint states of all enumerated sites of a datum that are possible."""
        if self.kept is not None:
            return len(self.kept)
        return math.prod(len(self.states[a]) ** math.prod(self.shapes[a]) for a in self.states)

    def possible(self, waits: Mapping[Address, Address]) -> Tensor:
        """(joint states,) whether every site that waits for another does so."""
        table = self.table(None)
        keep = torch.ones(len(next(iter(table.values()))), dtype=torch.bool, device=self.programs.device)
        for address, other in waits.items():
            keep &= ((table[address] == 0) | (table[other] > 0)).all(1)
        return keep

    def table(self, rows: Tensor | None) -> dict[Address, Tensor]:
        """(rows, coordinates) which state each enumerated site is in, in some joint states or in all."""
        counts = {a: math.prod(self.shapes[a]) for a in self.states}
        if rows is None:
            total = math.prod(len(self.states[a]) ** counts[a] for a in self.states)
            rows = torch.arange(total, device=self.programs.device)
        table = {}
        for address, count in counts.items():
            size = len(self.states[address])
            places = size ** torch.arange(count, device=self.programs.device)
            table[address] = rows[:, None] // places % size
            rows = rows // size**count
        return table

    def collect(self, x: Tensor, lanes: int) -> Tensor:
        """Sum (*lanes, *plates) over all plates but the shared ones: (*lanes, *data)."""
        dims = self.dims
        drop = [lanes + i for i in range(self.plates) if i - self.plates not in dims]
        return x.sum(drop) if drop else x

    def spread(self, x: Tensor, lanes: int) -> Tensor:
        """The inverse of `collect` in shape: (*lanes, *data) to (*lanes, *plates), with ones."""
        sizes = iter(x.shape[lanes:])
        return x.reshape(*x.shape[:lanes], *(next(sizes) if i in self.dims else 1 for i in range(-self.plates, 0)))

    def data_shape(self, like: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the shared plates."""
        return self.sizes

    def inner_scale(self, node: Node) -> Any:
        """What a site's density counts for inside one datum."""
        return node.scale if self.scale == 1.0 else node.scale / self.scale

    def estimator(self, address: Address, fn: Any, infer: Mapping[str, Any], policy: Policy | None) -> Estimator:
        """The estimator of a site; any that it has while the dry run is under way."""
        if not self.complete:
            return chosen(address[1], fn, infer, policy) or (Reparam() if fn.has_rsample else Reinforce())
        if address not in self.estimators:
            self.estimators[address] = chosen(address[1], fn, infer, policy) or defaults(fn, 1, 0, 1)
        found = self.estimators[address]
        if isinstance(found, Reinforce) and not isinstance(found.baseline, str):
            return chosen(address[1], fn, infer, policy) or found  # its tensors are those of this run
        return found

    def free_axes(self, ndim: int, lanes: int, event: int) -> list[int]:
        """Axes of a value other than samples and shared plates."""
        fixed = {lanes - 1} | {ndim - event + d for d in self.dims}
        return [i for i in range(ndim) if i not in fixed]

    def assignments(self, samples: int, rows: Tensor | None = None) -> dict[Address, Tensor]:
        """Values of all enumerated sites: every possible joint state, or those of some rows, for every sample."""
        if not self.states:
            return {}
        forced = {}
        for address, index in self.table(self.kept if rows is None else rows).items():
            # (joint states, *coordinates), the axis of samples among them of size one.
            lanes, shape = self.lanes[address], self.shapes[address]
            index = index.reshape(len(index), *shape).movedim(0, lanes - 1)
            index = index.expand(*index.shape[:lanes], samples, *index.shape[lanes + 1 :])
            index = index.flatten(lanes - 1, lanes)
            forced[address] = self.states[address][index]
        return forced


def make_plan(engine: Engine) -> Plan:
    """One dry run: plates that all sites share, estimators, joint states.

    Raises:
        CapabilityError: there are too many joint states, or estimators that cannot stand beside each other.
        ShapeError: the objective keeps a particle axis.
    """
    plan, programs = engine.plan, engine.programs
    # With gradients, so that estimators can see which parameters have one.
    params = {n: p.clone().requires_grad_() for n, p in programs.parameters.items()}
    with torch.enable_grad(), seeded(engine._generator), settings(programs.dtype, validate=False):
        ctx = Context(engine, params, 2, {}, {}, {})
        try:
            value = engine.objective(ctx, engine.model, engine.guide)
        except Disagreement:
            programs.run_singly()
            ctx = Context(engine, params, 2, {}, {}, {})
            value = engine.objective(ctx, engine.model, engine.guide)
        if isinstance(value, Tensor) and value.ndim > 1:
            raise ShapeError(
                f"the objective returned the shape {tuple(value.shape)} for one sample; reduce the particle axes, "
                "as by logmeanexp(weight) or weight.mean(0)"
            )
    _shared(plan, ctx.frames)
    joint = 1
    for address, (node, axes) in ctx.sites.items():
        lanes = plan.lanes[address] = len(axes) + 1
        shape = node.value.shape[: node.value.ndim - node.atom]
        free = plan.free_axes(len(shape), lanes, node.event_dim - node.atom)
        coordinates = math.prod(shape[i] for i in free)
        estimator, states = node.estimator, node.states
        if address in ctx.seen:
            fn, infer = ctx.seen[address]
            states = support_of(fn)
            count = 0 if states is None else len(states) ** min(coordinates, 64)
            estimator = chosen(address[1], fn, infer, engine.policy) or defaults(fn, coordinates, count, joint)
        assert estimator is not None
        if isinstance(estimator, Enumerate):
            assert states is not None
            joint *= len(states) ** coordinates
            if joint > estimator.limit:
                raise CapabilityError(
                    f"site {address[1]!r}: enumeration without bound: {len(states)} states of {coordinates} "
                    f"coordinates of one datum, with all particles, make {joint:.3g} joint states, more than "
                    f'{estimator.limit}; put independent data into plates that all sites share, or use "mvd", '
                    '"reinforce" or fewer particles'
                )
            plan.states[address] = states
            plan.shapes[address] = tuple(shape[i] if i in free else 1 for i in range(len(shape)))
        plan.estimators[address] = estimator
    plan.complete = True
    _check_together(plan)
    _leave_out(engine, plan, params)
    return plan


def _leave_out(engine: Engine, plan: Plan, params: dict[str, Tensor]) -> None:
    """Note which enumerated sites wait for another, and that the guide agrees.

    Raises:
        OptionError: a site waits for one that is not enumerated before it, or has other coordinates.
        ProgramError: the guide gives probability to states that should be impossible.
    """
    waits: dict[Address, Address] = {}
    for address, estimator in plan.estimators.items():
        if not isinstance(estimator, Enumerate) or estimator.after is None:
            continue
        other = (address[0], estimator.after)
        order = list(plan.states)
        if other not in order or order.index(other) >= order.index(address):
            before = [n for c, n in order[: order.index(address)] if c == address[0]]
            raise OptionError(
                f"site {address[1]!r} is enumerated after {estimator.after!r}, which is no enumerated site before it; "
                f"those are {before}"
            )
        if math.prod(plan.shapes[other]) != math.prod(plan.shapes[address]):
            raise OptionError(
                f"site {address[1]!r} is enumerated after {estimator.after!r}, which has other coordinates: "
                f"{plan.shapes[address]} and {plan.shapes[other]} of one datum"
            )
        waits[address] = other
    if not waits:
        return
    possible = plan.possible(waits)
    plan.kept, rows = possible.nonzero()[:, 0], (~possible).nonzero()[:, 0]
    with torch.no_grad(), seeded(engine._generator), settings(plan.programs.dtype, validate=False):
        ctx = Context(engine, params, len(rows), {}, {}, plan.assignments(1, rows), len(rows))
        engine.objective(ctx, engine.model, engine.guide)
        weight = engine.state_weight(ctx)
    assert weight is not None
    if not float(weight.max()) <= IMPOSSIBLE:
        raise ProgramError(
            f"the guide gives a state that should be impossible the probability {float(weight.max()):.2g}: sites "
            f"{sorted(n for _, n in waits)} wait for others, Enumerate(after=...), and must then stay in their "
            "first state; multiply their probability by the other's value, or leave out `after`"
        )


def _check_together(plan: Plan) -> None:
    """Raise for estimators that cannot stand beside each other."""
    kinds = {name: type(plan.estimators[c, name]) for c, name in plan.estimators}
    others = [n for n, kind in kinds.items() if kind not in (Rebar, Reparam)]
    if Rebar in kinds.values() and (others or list(kinds.values()).count(Rebar) > 1):
        raise CapabilityError(
            f"Rebar is unbiased for one site beside reparameterised ones, but these are {sorted(kinds)}; use "
            '"reinforce", "mvd" or "enum" for all but the reparameterised'
        )


def _shared(plan: Plan, frames: Sequence[tuple[Any, ...]]) -> None:
    """The vectorised plates around every site."""
    sets = [{(f.name, f.dim, f.size, f.full_size) for f in stack if f.dim is not None} for stack in frames]
    common = set.intersection(*sets) if sets else set()
    ordered = sorted(common, key=lambda f: f[1])
    plan.dims = tuple(f[1] for f in ordered)
    plan.sizes = tuple(int(f[2]) for f in ordered)
    plan.names = frozenset(f[0] for f in ordered)
    plan.scale = float(math.prod(f[3] / f[2] for f in ordered))
