"""From an objective, a model and a guide to an unbiased gradient.

    S = sum_a F_a + sum_score sg(F_a - b) log q(v) + sum_mvd sg(c (F_a(v+) - F_a(v-))) eta,   F_a = q(a) L(a)

a runs over the joint states of the enumerated sites of a datum (they are extra samples of one batch), L is the
objective's value, and every other draw of the datum is upstream of it. Differentiating S once gives the gradient.
Source: surrogates of Foerster et al. (2018) and Lew et al. (2023) [inferred].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.errors import CapabilityError, NotFiniteError, OptionError, PilotlightError, ProgramError, ShapeError
from ppl.objectives.context import Address, Context, Draw, Given, Particles, Stochastic, learned
from ppl.objectives.estimators import (
    Enumerate,
    Estimator,
    MeasureValued,
    Policy,
    Rebar,
    Reinforce,
    Reparam,
    chosen,
    defaults,
    support_of,
)
from ppl.objectives.matching import match
from ppl.objectives.run import Node, Setting, Source, run_lanes, run_plain
from ppl.program import Program
from ppl.trace import seeded, settings

__all__ = ["Engine", "Gradient", "gradient"]

Objective = Callable[[Context, Any, Any], Tensor]


class Gradient(NamedTuple):
    """The value of an objective and its gradient, both unbiased estimates.

    Args:
        value: 0-d, summed over data.
        gradient: by parameter, in the constrained coordinates of `pyro.param`.
    """

    value: Tensor
    gradient: dict[str, Tensor]


@dataclass
class _Plan:
    """What one dry run found: the plates all sites share, and how each site is treated.

    Args:
        dims: axes (negative) of the shared plates, outermost first.
        sizes: their sizes.
        scale: full over shown data.
        names: their names.
        estimators: by address.
        states: finite supports of the enumerated sites.
        shapes: shapes of their values at one sample, without the axes of one coordinate.
    """

    dims: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    scale: float = 1.0
    names: frozenset[str] = frozenset()
    estimators: dict[Address, Estimator] = field(default_factory=dict)
    states: dict[Address, Tensor] = field(default_factory=dict)
    shapes: dict[Address, tuple[int, ...]] = field(default_factory=dict)


class Engine:
    """An objective over a model and a guide, ready to be differentiated.

    Args:
        objective: a function of a `Context`, the model and the guide, such as `ppl.objectives.ELBO()`.
        model: a `ppl.Program`; or a Pyro program, or `None` where the objective needs no model.
        guide: a Pyro program called with the model's arguments, `Marginal` or `Normalize`.
        args: arguments, where the model is no `ppl.Program`.
        policy: estimators by site, or a function of a site's name and distribution.
        batching: `"auto"` runs all lanes in one batch where that agrees with running them one by one, `"batch"`
            always, `"loop"` never.
        dtype: floating type, where the model is no `ppl.Program`.
        device: device, likewise.
        parameters: learnable tensors of programs that are no Pyro programs.
        constraints: constraints on them; real where none is named.

    Raises:
        CapabilityError: a site cannot take the estimator that was asked for.
        ProgramError: guide and model do not fit.

    Example:
        >>> import pyro, ppl
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Bernoulli(0.2 + 0.7 * z), obs=x)
        >>> def guide(x):
        ...     logit = pyro.param("logit", torch.tensor(0.4, dtype=torch.float64))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit), infer={"estimator": "enum"})
        >>> program = ppl.Program(model, torch.tensor(1.0, dtype=torch.float64))
        >>> engine = Engine(ppl.objectives.IWELBO(2), program, guide)
        >>> round(float(engine.gradient().gradient["logit"]), 6)   # exact: all four states are summed
        0.030236
    """

    def __init__(
        self,
        objective: Objective,
        model: Any,
        guide: Any,
        *,
        args: Sequence[Any] = (),
        policy: Policy | None = None,
        batching: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        constraints: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(objective) or isinstance(objective, type):
            raise OptionError(
                f"an objective is a function of (ctx, model, guide), such as ppl.objectives.ELBO(), got {objective!r}"
            )
        if batching not in ("auto", "batch", "loop"):
            raise OptionError(f'batching must be "auto", "batch" or "loop", got {batching!r}')
        self.objective, self.model, self.guide, self.policy = objective, model, guide, policy
        self.program = model if isinstance(model, Program) else None
        self.args = tuple(args)
        self.dtype = dtype or (self.program.dtype if self.program is not None else torch.get_default_dtype())
        self.device = self.program.device if self.program is not None else (device or torch.device("cpu"))
        self.loop = batching == "loop"
        self.plates = 0
        self.planned = False
        self.plan = _Plan()
        self.averages: dict[Any, Tensor] = {}
        self.notes: list[str] = []
        self._plain: dict[int, tuple[Any, dict[str, Node]]] = {}
        self._generator = torch.Generator(self.device).manual_seed(0)
        self.parameters: dict[str, Tensor] = dict(parameters or {})
        self.constraints: dict[str, Any] = dict.fromkeys(self.parameters, dist.constraints.real) | dict(
            constraints or {}
        )
        with seeded(self._generator), settings(self.dtype, validate=True):
            for part in _parts(model, guide):
                self._discover(part)
        if batching == "auto":
            self._choose_batching()
        self._make_plan()

    # Gradients -------------------------------------------------------------------------------------------------------

    def gradient(
        self,
        params: Mapping[str, Tensor] | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        subsample: Mapping[str, Tensor] | None = None,
    ) -> Gradient:
        """An unbiased estimate of the objective and of its gradient, to be maximised.

        Args:
            params: values of the parameters, constrained; the current ones when `None`.
            samples: independent copies of the objective that are averaged.
            generator: source of all randomness; made from the seed when `None`.
            seed: see generator.
            subsample: indices by subsampled plate; drawn where they are not given.
        """
        generator = generator or torch.Generator(self.device).manual_seed(seed)
        leaves = {n: p.detach().clone().requires_grad_() for n, p in (params or self.parameters).items()}
        with torch.enable_grad():
            value, total = self.surrogate(leaves, samples, generator, subsample)
            grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if total.requires_grad else ()
        found = dict(zip(leaves, grads, strict=True)) if grads else {}
        return Gradient(value, {n: _or_zero(found.get(n), p) for n, p in leaves.items()})

    def surrogate(
        self,
        params: Mapping[str, Tensor],
        samples: int,
        generator: torch.Generator,
        subsample: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The objective's value, and a scalar whose gradient in `params` is an unbiased estimate of its gradient.

        Raises:
            NotFiniteError: the objective is not finite; the message names the site whose density is not.
        """
        if samples < 1:
            raise OptionError(f"samples must be one or more, got {samples}")
        self._generator = generator
        plan = self.plan
        with seeded(generator), settings(self.dtype, validate=False):
            arms = math.prod(len(plan.states[a]) ** math.prod(plan.shapes[a]) for a in plan.states)
            forced = self._assignments(samples)
            seeds: dict[Any, int] = {}
            indices = dict(subsample or {})

            def cost(extra: Mapping[Address, Tensor]) -> tuple[Tensor, Context]:
                ctx = Context(self, params, samples * arms, seeds, indices, {**forced, **extra}, arms)
                value = self._value(ctx)
                weight = self._weight(ctx)
                return (value if weight is None else weight * value), ctx

            whole, ctx = cost({})
            self._check_finite(whole, ctx)
            total = whole
            for address, (node, axes) in ctx.sites.items():
                if isinstance(node.estimator, Reinforce):
                    total = total + self._score(address, node, axes, whole, samples, arms)
                elif isinstance(node.estimator, Rebar):
                    soft, given = (node.estimator.scale * cost({address: x})[0] for x in ctx.relaxed[address])
                    total = total + self._score(address, node, axes, whole - given, samples, arms) + soft - given
                    total = total - (soft - given).detach()
                elif isinstance(node.estimator, MeasureValued) and node.arms:
                    total = total + self._measure(address, node, whole, lambda extra: cost(extra)[0])
            outer = plan.scale / samples
            return (whole.detach().sum() * outer), total.sum() * outer

    def values(
        self,
        params: Mapping[str, Tensor] | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Independent estimates of the objective, (samples,), summed over data; enumerated sites are summed out."""
        self._generator = generator or torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad(), seeded(self._generator), settings(self.dtype, validate=False):
            arms = math.prod(len(self.plan.states[a]) ** math.prod(self.plan.shapes[a]) for a in self.plan.states)
            ctx = Context(
                self, dict(params or self.parameters), samples * arms, {}, {}, self._assignments(samples), arms
            )
            ctx_value = self._value(ctx)
            weight = self._weight(ctx)
            whole = ctx_value if weight is None else ctx_value * weight
        return whole.reshape(arms, samples, -1).sum((0, 2)) * self.plan.scale

    # Parts of the surrogate ------------------------------------------------------------------------------------------

    def _value(self, ctx: Context) -> Tensor:
        value = self.objective(ctx, self.model, self.guide)
        shape = (ctx.samples, *self.plan.sizes)
        if not isinstance(value, Tensor):
            raise ShapeError(f"an objective returns a tensor (samples, *data), got {type(value).__name__}")
        if value.ndim > len(shape) or any(
            a not in (1, b) for a, b in zip(value.shape[::-1], shape[::-1], strict=False)
        ):
            raise ShapeError(
                f"the objective returned the shape {tuple(value.shape)}, expected {shape} (samples, *data): reduce the "
                "particle axes, as by logmeanexp(weight) or weight.mean(0)"
            )
        if value.ndim < len(shape) and value.ndim > 0:
            raise ShapeError(
                f"the objective returned the shape {tuple(value.shape)}, expected {shape} (samples, *data); the axis "
                "of samples comes after the particles and must be kept, and so must the plates that all sites share: "
                f"{sorted(self.plan.names)}"
            )
        return value.expand(shape)

    def _weight(self, ctx: Context) -> Tensor | None:
        """(samples, *data) probability of the joint state of each sample's enumerated sites; `None` without any."""
        if not self.plan.states:
            return None
        log: Tensor | float = 0.0
        for address in self.plan.states:
            if address not in ctx.sites:
                raise ProgramError(f"the enumerated site {address[1]!r} was not visited: its program changes its sites")
            node, axes = ctx.sites[address]
            full = self.collect(node.full, len(axes) + 1)
            log = log + full.reshape(-1, *full.shape[len(axes) :]).sum(0)
        assert isinstance(log, Tensor)
        return log.exp()

    def _score(
        self, address: Address, node: Node, axes: tuple[Particles, ...], whole: Tensor, samples: int, arms: int
    ) -> Tensor:
        """sg(F - b) log q, with value zero; plus the regression of a learned baseline."""
        estimator = node.estimator if isinstance(node.estimator, Reinforce) else Reinforce("none")
        fixed = whole.detach()
        lanes = len(axes) + 1
        place = self.spread(fixed.reshape(*(1,) * len(axes), *fixed.shape), lanes)
        control: Tensor | None = next((axis.control for axis in reversed(axes) if axis.control is not None), None)
        fit: Tensor | float = 0.0
        if control is not None:
            missing = len(axes) + fixed.ndim - control.ndim
            base = self.spread(control.reshape(*(1,) * missing, *control.shape), lanes) / arms
        elif node.baseline is not None:
            learned = node.baseline / arms
            base = learned.detach()
            # With value zero: only its gradient, that of the squared error, is wanted.
            error = -(place - learned).square().expand_as(node.raw)
            error = self.collect(error, lanes)
            fit = (error - error.detach()).reshape(-1, *fixed.shape).sum(0) * (0.5 / (node.raw.numel() / fixed.numel()))
        elif estimator.baseline == "none":
            base = torch.zeros(())
        elif estimator.baseline == "leave_one_out" and samples > 1:
            rows = fixed.reshape(arms, samples, *fixed.shape[1:])
            others = ((rows.sum(1, keepdim=True) - rows) / (samples - 1)).reshape(fixed.shape)
            base = self.spread(others.reshape(*(1,) * len(axes), *others.shape), lanes)
        else:
            now = fixed.mean()
            past = self.averages.get(address)
            base = torch.zeros(()) if past is None else past
            self.averages[address] = now if past is None else estimator.decay * past + (1 - estimator.decay) * now
        score = (place - base) * (node.raw - node.raw.detach())
        score = self.collect(score, lanes)
        return score.reshape(-1, *fixed.shape).sum(0) + fit

    def _measure(
        self, address: Address, node: Node, whole: Tensor, cost: Callable[[Mapping[Address, Tensor]], Tensor]
    ) -> Tensor:
        """sum over coordinates of sg(c (F(v+) - F(v-))) eta, with value zero."""
        fixed = whole.detach()
        value = node.value
        where = self._coordinates(node, whole)
        total: Tensor | float = 0.0
        with torch.no_grad():
            parts = []
            for lane in where:
                for arm in node.arms:
                    ends = []
                    for side in (arm.plus, arm.minus):
                        if side is None:
                            ends.append(fixed)
                        else:
                            moved = torch.where(lane, side.to(value.dtype), value)
                            ends.append(cost({address: moved}))
                    parts.append((lane, arm, ends[0] - ends[1]))
        lanes = value.ndim - node.event_dim - self.plates
        for lane, arm, difference in parts:
            place = self.spread(difference.reshape(*(1,) * (lanes - 1), *difference.shape), lanes)
            place = place.reshape(*place.shape, *(1,) * node.event_dim)
            eta = arm.parameter.expand_as(value) if arm.parameter.shape != value.shape else arm.parameter
            term = torch.where(lane, place * arm.constant * (eta - eta.detach()), 0.0)
            if node.event_dim:
                term = term.flatten(-node.event_dim).sum(-1)
            term = self.collect(term, lanes)
            total = total + term.reshape(-1, *fixed.shape).sum(0)
        return total  # type: ignore[return-value]

    def _coordinates(self, node: Node, whole: Tensor) -> list[Tensor]:
        """One mask for each coordinate of a datum: particles, inner plates and event axes in turn."""
        shape = list(node.value.shape)
        lanes = len(shape) - node.event_dim - self.plates
        free = self._free_axes(len(shape), lanes, node.event_dim)
        sizes = [shape[i] for i in free]
        count = math.prod(sizes)
        limit = node.estimator.limit if isinstance(node.estimator, MeasureValued) else count
        if count > limit:
            raise CapabilityError(
                f"a measure-valued derivative needs two evaluations for each of {count} coordinates, more than its "
                f'limit of {limit}; use "reinforce", or MeasureValued(limit={count})'
            )
        numbers = torch.arange(count, device=node.value.device).reshape(sizes)
        full = numbers.reshape([shape[i] if i in free else 1 for i in range(len(shape))])
        return [full == j for j in range(count)]

    def _free_axes(self, ndim: int, lanes: int, event: int) -> list[int]:
        """Axes of a value other than samples and shared plates."""
        fixed = {lanes - 1} | {ndim - event + d for d in self.plan.dims}
        return [i for i in range(ndim) if i not in fixed]

    def _assignments(self, samples: int) -> dict[Address, Tensor]:
        """Values of all enumerated sites: every joint state, for every sample."""
        plan = self.plan
        digits = [(a, len(plan.states[a])) for a in plan.states for _ in range(math.prod(plan.shapes[a]))]
        total = math.prod(size for _, size in digits)
        rest = torch.arange(total, device=self.device)
        columns: dict[Address, list[Tensor]] = {a: [] for a in plan.states}
        for address, size in digits:
            columns[address].append(rest % size)
            rest = rest // size
        forced = {}
        for address, parts in columns.items():
            # (joint states, *coordinates), the axis of samples among them of size one.
            lanes, shape = self._lanes_of[address], plan.shapes[address]
            index = torch.stack(parts, 1).reshape(total, *shape).movedim(0, lanes - 1)
            index = index.expand(*index.shape[:lanes], samples, *index.shape[lanes + 1 :])
            index = index.flatten(lanes - 1, lanes)
            index = index.expand([*index.shape])
            forced[address] = plan.states[address][index]
        return forced

    def _check_finite(self, whole: Tensor, ctx: Context) -> None:
        if bool(torch.isfinite(whole).all()):
            return
        bad = [(n, raw) for n, raw in ctx.scored if not bool(torch.isfinite(raw).all())]
        drawn = [(a[1], node.raw) for a, (node, _) in ctx.sites.items() if not bool(torch.isfinite(node.raw).all())]
        culprits = list(dict.fromkeys(n for n, _ in [*bad, *drawn]))
        where = f"the log density of site {culprits[0]!r} is" if culprits else "the objective itself is"
        raise NotFiniteError(
            f"the objective is infinite or not a number: {where} not finite at a draw of the guide. The guide reaches "
            "where the model has no density, or its parameters left their range; check their supports"
        )

    # Layout ----------------------------------------------------------------------------------------------------------

    def collect(self, x: Tensor, lanes: int) -> Tensor:
        """Sum (*lanes, *plates) over all plates but the shared ones: (*lanes, *data)."""
        dims = self.plan.dims
        drop = [lanes + i for i in range(self.plates) if i - self.plates not in dims]
        return x.sum(drop) if drop else x

    def spread(self, x: Tensor, lanes: int) -> Tensor:
        """The inverse of `collect` in shape: (*lanes, *data) to (*lanes, *plates), with ones."""
        sizes = iter(x.shape[lanes:])
        return x.reshape(*x.shape[:lanes], *(next(sizes) if i in self.plan.dims else 1 for i in range(-self.plates, 0)))

    def data_shape(self, like: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the shared plates."""
        return self.plan.sizes

    def inner_scale(self, node: Node) -> Any:
        """What a site's density counts for inside one datum."""
        return node.scale if self.plan.scale == 1.0 else node.scale / self.plan.scale

    def fresh_seed(self) -> int:
        """A seed from the generator of this evaluation."""
        return int(torch.randint(2**31 - 1, (), generator=self._generator, device=self._generator.device))

    # Programs --------------------------------------------------------------------------------------------------------

    def source(self, program: Any, data: Mapping[str, Tensor]) -> Source:
        """A Pyro program with its arguments; arguments that carried data are replaced along with them."""
        if isinstance(program, Given):
            inner, kept = self.source(program.program, data), program.values

            def arguments(each: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
                args, kwargs = inner.arguments(each)
                return ({n: each(v) for n, v in kept.items()}, *args), kwargs

            return Source(inner.fn, arguments)
        owner = program if isinstance(program, Program) else self.program
        if not isinstance(program, Program) and not callable(program):
            raise ProgramError(
                f"expected a Pyro program, ppl.objectives.Marginal or Normalize, got {type(program).__name__}"
            )

        def own(each: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
            if owner is None:
                return self.args, {}
            return _arguments(owner, {n: each(v) for n, v in data.items()})

        if isinstance(program, Program):
            return Source(program.model, own, program._overridden, program._replaced)
        return Source(program, own)

    def carries(self, name: str) -> bool:
        """Whether an argument of the programs holds the data of an observed site."""
        return self.program is not None and bool(_places(self.program, name))

    def latents(self, program: Any) -> tuple[str, ...]:
        """Names of a program's latent sites."""
        return tuple(n for n, node in self.nodes(program).items() if node.latent and not node.auxiliary)

    def ranks(self, program: Any) -> dict[str, int]:
        """Plate axes of each site of a program."""
        found = self._plain.get(id(program))
        return {} if found is None else {n: node.rank for n, node in found[1].items()}

    def event_dim(self, name: str) -> int:
        """Event axes of a site of any program."""
        for _, nodes in self._plain.values():
            if name in nodes:
                return nodes[name].event_dim
        return 0

    def match(self, program: Any, draw: Draw) -> None:
        """Check that values fit the sites of a program; once, in the dry run."""
        if not self.planned and not isinstance(program, Given):
            match("model" if program is self.model else "program", self.nodes(program), draw)

    def estimator(self, address: Address, fn: Any, infer: Mapping[str, Any]) -> Estimator | None:
        """The estimator of a site."""
        if not self.planned:
            return chosen(address[1], fn, infer, self.policy) or (Reparam() if fn.has_rsample else Reinforce())
        if address not in self.plan.estimators:
            self.plan.estimators[address] = chosen(address[1], fn, infer, self.policy) or defaults(fn, 1, 0, 1)
        return self.plan.estimators[address]

    def nodes(self, program: Any) -> dict[str, Node]:
        """The sites of a program, from a run by itself."""
        if isinstance(program, Stochastic):
            raise ProgramError(f"the latent sites of a {type(program).__name__} are known after it was drawn only")
        if id(program) not in self._plain:
            with seeded(self._generator), settings(self.dtype, validate=True):
                self._discover(program)
        return self._plain[id(program)][1]

    def _discover(self, program: Any) -> None:
        """Run a program once by itself: plates, ranks, parameters."""
        source = self.source(program, {})
        known = dict(program.parameters) if isinstance(program, Program) else {}

        def draw(name: str, msg: Any) -> tuple[Tensor, None, Tensor | None]:
            estimator = None if program is self.model else chosen(name, msg["fn"], msg["infer"], self.policy)
            baseline = learned(name, estimator) if isinstance(estimator, Reinforce) else None
            return msg["fn"].sample(), None, baseline

        setting = Setting({**self.parameters, **known}, {}, {}, draw, False, {}, self.dtype)
        with torch.no_grad():
            try:
                nodes, params = run_plain(source, setting)
            except PilotlightError:
                raise
            except Exception as error:
                what = "model" if program is self.model else getattr(program, "__name__", type(program).__name__)
                raise ProgramError(f"the program {what!r} failed when it was run once: {error}") from error
        self._plain[id(program)] = (program, nodes)
        for name, msg in params.items():
            self.constraints.setdefault(name, msg["kwargs"].get("constraint", dist.constraints.real))
            self.parameters.setdefault(name, msg["value"].detach().clone())
        self.plates = max([self.plates, *(node.raw.ndim for node in nodes.values())])

    # Plan ------------------------------------------------------------------------------------------------------------

    def _choose_batching(self) -> None:
        """Batched, where every program agrees with itself lane by lane."""
        for program in _parts(self.model, self.guide):
            try:
                agree = self._agrees(program)
            except PilotlightError:
                raise
            except Exception as error:
                agree, self.notes = False, [*self.notes, f"{type(error).__name__}: {str(error)[:200]}"]
            if not agree:
                self._looping()
                return

    def _looping(self) -> None:
        self.loop = True
        self.notes.append(
            "a program does not broadcast over particles (extra axes to the left of its plates), and runs particle by "
            "particle"
        )

    def disagree(self) -> NoReturn:
        """End the dry run: what follows runs particle by particle."""
        raise _Disagreement

    def check_observing(
        self, source: Source, setting: Setting, lead: tuple[int, ...], nodes: Mapping[str, Node]
    ) -> None:
        """In the dry run, whether a program broadcasts over data that differ between lanes."""
        values = {n: node.value for n, node in nodes.items() if node.latent}
        single = run_lanes(source, replace(setting, values=values, draw=None), lead, self.plates, {}, loop=True)
        if not _equal(nodes, single):
            raise _Disagreement

    def _agrees(self, program: Any) -> bool:
        lead = (2, 2)
        source = self.source(program, {})
        ranks = self.ranks(program)
        with seeded(self._generator), settings(self.dtype, validate=False), torch.no_grad():
            indices: dict[str, Tensor] = {}

            def draw(name: str, msg: Any) -> tuple[Tensor, None, None]:
                return msg["fn"].sample(), None, None

            setting = Setting(self.parameters, {}, {}, draw, False, indices, self.dtype)
            batch = run_lanes(source, setting, lead, self.plates, ranks, loop=False)
            values = {n: node.value for n, node in batch.items() if node.latent}
            setting = Setting(self.parameters, values, {}, None, False, indices, self.dtype)
            single = run_lanes(source, setting, lead, self.plates, ranks, loop=True)
        return _equal(batch, single)

    def _make_plan(self) -> None:
        """One dry run: plates that all sites share, estimators, joint states."""
        self._lanes_of: dict[Address, int] = {}
        # With gradients, so that estimators can see which parameters have one.
        params = {n: p.clone().requires_grad_() for n, p in self.parameters.items()}
        with torch.enable_grad(), seeded(self._generator), settings(self.dtype, validate=False):
            ctx = Context(self, params, 2, {}, {}, {})
            try:
                value = self.objective(ctx, self.model, self.guide)
            except _Disagreement:
                self._looping()
                ctx = Context(self, params, 2, {}, {}, {})
                value = self.objective(ctx, self.model, self.guide)
            if isinstance(value, Tensor) and value.ndim > 1:
                raise ShapeError(
                    f"the objective returned the shape {tuple(value.shape)} for one sample; reduce the particle axes, "
                    "as by logmeanexp(weight) or weight.mean(0)"
                )
        self._shared(ctx.frames)
        joint = 1
        for address, (node, axes) in ctx.sites.items():
            lanes = len(axes) + 1
            self._lanes_of[address] = lanes
            shape = node.value.shape[: node.value.ndim - node.atom]
            event = node.event_dim - node.atom
            free = self._free_axes(len(shape), lanes, event)
            coordinates = math.prod(shape[i] for i in free)
            estimator = node.estimator
            states = node.states
            if address in ctx.seen:
                fn, infer = ctx.seen[address]
                states = support_of(fn)
                count = 0 if states is None else len(states) ** min(coordinates, 64)
                estimator = chosen(address[1], fn, infer, self.policy) or defaults(fn, coordinates, count, joint)
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
                self.plan.states[address] = states
                self.plan.shapes[address] = tuple(shape[i] if i in free else 1 for i in range(len(shape)))
            self.plan.estimators[address] = estimator
        self.planned = True
        kinds = {name: type(self.plan.estimators[c, name]) for c, name in self.plan.estimators}
        others = [n for n, kind in kinds.items() if kind not in (Rebar, Reparam)]
        if Rebar in kinds.values() and (others or list(kinds.values()).count(Rebar) > 1):
            raise CapabilityError(
                f"Rebar is unbiased for one site beside reparameterised ones, but these are {sorted(kinds)}; use "
                '"reinforce", "mvd" or "enum" for all but the reparameterised'
            )

    def _shared(self, frames: Sequence[tuple[Any, ...]]) -> None:
        """The vectorised plates around every site."""
        sets = [{(f.name, f.dim, f.size, f.full_size) for f in stack if f.dim is not None} for stack in frames]
        common = set.intersection(*sets) if sets else set()
        ordered = sorted(common, key=lambda f: f[1])
        self.plan.dims = tuple(f[1] for f in ordered)
        self.plan.sizes = tuple(int(f[2]) for f in ordered)
        self.plan.names = frozenset(f[0] for f in ordered)
        self.plan.scale = float(math.prod(f[3] / f[2] for f in ordered))


def gradient(
    objective: Objective,
    model: Any,
    guide: Any,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    seed: int = 0,
    **options: Any,
) -> Gradient:
    """The value of an objective and an unbiased estimate of its gradient; see `Engine`.

    Args:
        objective: a function of a `Context`, the model and the guide.
        model: a `ppl.Program`.
        guide: a Pyro program with the model's arguments.
        samples: independent copies that are averaged.
        generator: source of all randomness; made from the seed when `None`.
        seed: see generator.
        **options: options of `Engine`.
    """
    return Engine(objective, model, guide, **options).gradient(None, samples, generator, seed)


def _parts(model: Any, guide: Any) -> list[Any]:
    """The Pyro programs among model and guide, and inside those that are not."""
    out: list[Any] = []
    for part in (model, guide):
        inner = part.programs() if isinstance(part, Stochastic) else [part]  # type: ignore[attr-defined]
        out.extend(p for p in inner if p is not None)
    return out


def _places(program: Program, name: str) -> list[str]:
    """The arguments that hold the data of an observed site."""
    own = program.data.get(name)
    leaves = program.arguments.tensors()
    return [p for p, x in leaves.items() if own is not None and own.shape == x.shape and torch.equal(own, x.to(own))]


def _arguments(program: Program, data: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a program, with other data in their places."""
    return program.arguments.call({place: value for n, value in data.items() for place in _places(program, n)})


def _equal(batch: Mapping[str, Node], single: Mapping[str, Node]) -> bool:
    """Whether two runs of the same values have the same densities."""
    if set(single) != set(batch):
        return False
    pairs = [(batch[n].raw, single[n].raw) for n in batch]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs)


class _Disagreement(Exception):
    """A program does not broadcast over its data."""


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
