"""From an objective, a model and a guide to an unbiased gradient.

    S = sum_a F_a + sum_score sg(F_a - b) log q(v) + sum_mvd sg(c (F_a(v+) - F_a(v-))) eta,   F_a = q(a) L(a)

a runs over the joint states of the enumerated sites of a datum (they are extra samples of one batch), L is the
objective's value, and every other draw of the datum is upstream of it. Differentiating S once gives the gradient.
Source: surrogates of Foerster et al. (2018) and Lew et al. (2023) [inferred].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.errors import NotFiniteError, OptionError, ProgramError, ShapeError
from ppl.objectives.context import Context
from ppl.objectives.downstream import downstream
from ppl.objectives.draw import Address
from ppl.objectives.estimators import Estimator, MeasureValued, Policy, Rebar, Reinforce, Relax
from ppl.objectives.learned_control import control_term
from ppl.objectives.measured_term import measured_term
from ppl.objectives.plan import Plan, make_plan
from ppl.objectives.programs import Programs
from ppl.objectives.score_term import score_term
from ppl.objectives.stacked import can_stack, stacked
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
        >>> import pyro, pyro.distributions as dist, ppl
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
        program = model if isinstance(model, Program) else None
        self.dtype = dtype or (program.dtype if program is not None else torch.get_default_dtype())
        self.device = program.device if program is not None else (device or torch.device("cpu"))
        self.averages: dict[Any, Tensor] = {}
        self.tape: Any = None
        self._generator = torch.Generator(self.device).manual_seed(0)
        self.programs = Programs(
            model,
            guide,
            args=args,
            policy=policy,
            dtype=self.dtype,
            device=self.device,
            loop=batching == "loop",
            parameters=parameters or {},
            constraints=constraints or {},
        )
        if batching == "auto":
            self.programs.choose_batching()
        self.plan = Plan(self.programs)
        make_plan(self)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Learnable tensors by name, constrained."""
        return self.programs.parameters

    @property
    def constraints(self) -> dict[str, Any]:
        """Constraints on the parameters."""
        return self.programs.constraints

    @property
    def loop(self) -> bool:
        """Whether the programs run particle by particle."""
        return self.programs.loop

    @property
    def notes(self) -> list[str]:
        """What was found out about the programs, for people."""
        return self.programs.notes

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
        with seeded(generator), settings(self.dtype, validate=False):
            whole, total, ctx = self.terms(params, samples, subsample or {})
            self.check_finite(whole, ctx)
            outer = self.plan.scale / samples
            return whole.detach().sum() * outer, total.sum() * outer

    def terms(
        self, params: Mapping[str, Tensor], samples: int, subsample: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Context]:
        """(samples, *data) the objective F and the surrogate S of each sample and datum; see the module."""
        plan, arms = self.plan, self.plan.joint
        forced = plan.assignments(samples)
        seeds: dict[Any, int] = {}
        indices = dict(subsample)

        def cost(extra: Mapping[Address, Tensor]) -> tuple[Tensor, Context]:
            ctx = Context(self, params, samples * arms, seeds, indices, {**forced, **extra}, arms)
            return self.cost(ctx), ctx

        whole, ctx = cost({})
        total = whole
        for address, (node, axes) in ctx.sites.items():
            if isinstance(node.estimator, Reinforce):
                part = self._downstream(ctx, address, whole)
                total = total + score_term(plan, self.averages, address, node, axes, part, samples)
            elif isinstance(node.estimator, Rebar):
                soft, given = (node.estimator.scale * cost({address: x})[0] for x in ctx.relaxed[address])
                score = score_term(plan, self.averages, address, node, axes, plan.spread(whole - given, 1), samples)
                total = total + score + soft - given - (soft - given).detach()
            elif isinstance(node.estimator, Relax):
                part = self._downstream(ctx, address, whole)
                total = total + control_term(plan, ctx.controls[address], node, len(axes) + 1, part, samples)
            elif isinstance(node.estimator, MeasureValued) and node.arms:

                def each(rows: Sequence[Tensor], address: Address = address) -> Sequence[Tensor] | Tensor:
                    if can_stack(ctx, address):
                        return stacked(ctx, address, rows)
                    return [whole.detach(), *(cost({address: row})[0] for row in rows[1:])]

                total = total + measured_term(plan, address, node, whole, each)
        return whole, total, ctx

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
            arms = self.plan.joint
            ctx = Context(
                self, dict(params or self.parameters), samples * arms, {}, {}, self.plan.assignments(samples), arms
            )
            whole = self.cost(ctx)
        return whole.reshape(arms, samples, -1).sum((0, 2)) * self.plan.scale

    def cost(self, ctx: Context) -> Tensor:
        """(samples, *data) the objective, times the probability of the enumerated states."""
        value = self._value(ctx)
        weight = ctx.weight = self.state_weight(ctx)
        return value if weight is None else weight * value

    # Parts of the surrogate ------------------------------------------------------------------------------------------

    def _value(self, ctx: Context) -> Tensor:
        value = self.objective(ctx, self.model, self.guide)
        ctx.terms = getattr(value, "terms", None)
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

    def _downstream(self, ctx: Context, address: Address, whole: Tensor) -> Tensor:
        """(samples, *plates) the part of the cost that a draw can change; all of it where the objective is no sum."""
        part = None if ctx.terms is None else downstream(self.plan, ctx.terms, address)
        if part is None:
            return self.plan.spread(whole, 1)
        part = part.expand(whole.shape[:1] + part.shape[1:])
        return part if ctx.weight is None else self.plan.spread(ctx.weight, 1) * part

    def state_weight(self, ctx: Context) -> Tensor | None:
        """(samples, *data) probability of the joint state of each sample's enumerated sites; `None` without any."""
        if not self.plan.states:
            return None
        log: Tensor | float = 0.0
        for address in self.plan.states:
            if address not in ctx.sites:
                raise ProgramError(f"the enumerated site {address[1]!r} was not visited: its program changes its sites")
            node, axes = ctx.sites[address]
            full = self.plan.collect(node.full, len(axes) + 1)
            log = log + full.reshape(-1, *full.shape[len(axes) :]).sum(0)
        assert isinstance(log, Tensor)
        return log.exp()

    def check_finite(self, whole: Tensor, ctx: Context) -> None:
        """Raise where the objective is not finite, naming the site whose density is not."""
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

    @contextmanager
    def taped(self, tape: Any) -> Iterator[None]:
        """Inside, noise is read from a tape (`ppl.objectives.tape.Tape`), which is told the address of every draw."""
        self.tape = tape
        try:
            with tape:
                yield
        finally:
            self.tape = None

    def fresh_seed(self) -> int:
        """A seed from the generator of this evaluation."""
        return int(torch.randint(2**31 - 1, (), generator=self._generator, device=self._generator.device))

    def estimator(self, address: Address, fn: Any, infer: Mapping[str, Any]) -> Estimator:
        """The estimator of a site."""
        return self.plan.estimator(address, fn, infer, self.policy)


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


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
