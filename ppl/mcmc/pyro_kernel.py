"""Pyro's own kernels and guides, run on the same program: to compare with, and for what only they have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.optim.optim import PyroOptim
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import OptionError
from ppl.lint_guide import own_copy
from ppl.mcmc.convergence import note_disagreement
from ppl.mcmc.target import refuse_subsampling
from ppl.option_checks import check_integers
from ppl.posterior import Posterior
from ppl.trace import Run, seeded, set_values, settings

if TYPE_CHECKING:
    from ppl.monitor import Monitor
    from ppl.program import Program

__all__ = ["Pyro"]


@register
@dataclass(frozen=True)
class Pyro:
    """An engine of Pyro: an MCMC kernel, or a guide fitted by stochastic variational inference.

    The model runs through Pyro's handlers, one chain after the other, each with its own seed.

    Args:
        kernel_or_guide: a kernel or autoguide class (`pyro.infer.NUTS`, `AutoNormal`), a function of the model that
            returns either (`lambda model: pyro.infer.NUTS(model, max_tree_depth=6)`; its one parameter is called
            `model`), or a guide with the arguments of the model.
        warmup: warmup steps of a kernel, for each chain.
        steps: optimisation steps of a guide, for each chain.
        learning_rate: of Adam, for a guide.
        particles: draws per gradient estimate, for a guide.

    Raises:
        OptionError: an option is out of range, or a kernel that is bound to a model was given.

    Example:
        >>> import pyro.distributions as dist
        >>> from ppl import Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> program = Program(model, torch.tensor(2.0))
        >>> infer(program, Pyro(pyro.infer.NUTS, warmup=20), draws=20, chains=1)["mu"].shape
        torch.Size([1, 20])
    """

    kernel_or_guide: Any
    warmup: int = 500
    steps: int = 2000
    learning_rate: float = 0.01
    particles: int = 1

    # A guide is never exact; a kernel is in the limit, and an instance that holds one says so.
    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 4
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = self.kernel_or_guide
        if isinstance(given, MCMCKernel):
            name = type(given).__name__
            raise OptionError(
                f"the kernel {name} is bound to a model; give a function of it: Pyro(lambda model: {name}(model))"
            )
        if not callable(given):
            raise OptionError(f"expected a Pyro kernel, a guide or a function of the model, got {given!r}")
        check_integers(self, warmup=0, steps=1, particles=1)
        if not self.learning_rate > 0:
            raise OptionError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if isinstance(given, type) and issubclass(given, MCMCKernel):
            object.__setattr__(self, "exact", "in_the_limit")
            object.__setattr__(self, "limit", ("draws",))

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the kernel, or fit the guide, once for each chain; see `ppl.infer`."""
        refuse_subsampling(program, "Pyro")
        seeds = torch.randint(2**31 - 1, (chains,), generator=generator, device=generator.device).tolist()
        parts: list[dict[str, Tensor]] = []
        for i in range(chains):
            part = monitor.finished(f"chain {i}")
            if part is None:
                part = self._chain(program, draws, seeds[i], f"chain {i}", monitor)
                if int(part["length"]) == draws:
                    monitor.finish(f"chain {i}", part)
            parts.append(part)
            if monitor.interrupted:
                break
        parts = [p for p in parts if int(p["length"]) == draws] or parts
        length = min(int(p["length"]) for p in parts)

        def gather(prefix: str) -> dict[str, Tensor]:
            return {
                n.removeprefix(prefix): torch.stack([p[n] for p in parts]) for n in parts[0] if n.startswith(prefix)
            }

        values = {n: v[:, :length] for n, v in gather("draws.").items()}
        values = _with_deterministic(program, values)
        info = gather("info.")
        r_hat = note_disagreement(values, monitor)
        if r_hat is not None:
            info["r_hat"] = r_hat
        parameters = dict(program.parameters)
        learned = gather("parameter.")
        if learned:  # those of the best fit, and all of them in info
            best = int(info["elbo"].argmax())
            parameters |= {n: v[best] for n, v in learned.items()}
            info |= {f"parameter.{n}": v for n, v in learned.items()}
        attrs = {"complete": len(parts) == chains and length == draws}
        return Posterior(draws=values, info=info, parameters=parameters, attrs=attrs)

    def _chain(self, program: Program, draws: int, seed: int, label: str, monitor: Monitor) -> dict[str, Tensor]:
        generator = torch.Generator(program.device).manual_seed(seed)
        # Own parameters and own random numbers; both are as they were afterwards.
        with settings(program.dtype, validate=False), seeded(generator):
            engine = self._engine(_bound(program, monitor, learn=False))
            if isinstance(engine, MCMCKernel):
                if program.parameters:
                    monitor.note(f"learnable parameters {sorted(program.parameters)} were held at their values")
                return self._sample(engine, draws, label, monitor)
            model = _bound(program, monitor, learn=True)
            return self._fit(self._engine(model), model, program, draws, label, monitor)

    def _engine(self, model: Callable[..., Any]) -> Any:
        """A kernel or a guide for this model."""
        given = self.kernel_or_guide
        if isinstance(given, type) and issubclass(given, MCMCKernel | AutoGuide):
            return given(model)  # type: ignore[call-arg]
        if isinstance(given, torch.nn.Module):
            return own_copy(given)  # each chain fits its own
        if list(inspect.signature(given).parameters) != ["model"]:
            return given
        made = given(model)
        if not isinstance(made, MCMCKernel) and not callable(made):
            raise OptionError(f"the function of the model returned {made!r}, expected a Pyro kernel or guide")
        return made

    def _sample(self, kernel: Any, draws: int, label: str, monitor: Monitor) -> dict[str, Tensor]:
        """Steps of a kernel; unconstrained states are mapped back by the kernel's own transforms."""
        kernel.setup(self.warmup)
        params = kernel.initial_params
        kept: list[dict[str, Tensor]] = []
        for step in monitor.steps(self.warmup + draws, label):
            params = kernel.sample(params)
            if step >= self.warmup:
                kept.append({n: v.detach().clone() for n, v in params.items()})
        transforms = getattr(kernel, "transforms", None) or {}
        names = list(params)
        out = {
            n: torch.stack([k[n] for k in kept]) if kept else params[n].new_empty((0, *params[n].shape)) for n in names
        }
        out = {n: transforms[n].inv(v) if n in transforms else v for n, v in out.items()}
        part = {f"draws.{n}": v.detach() for n, v in out.items()}
        part["length"] = torch.tensor(len(kept))
        diagnostics = kernel.diagnostics()
        if "divergences" in diagnostics:
            diverging = torch.zeros(draws, dtype=torch.bool)
            diverging[[i for i in diagnostics["divergences"] if i < draws]] = True
            part["info.diverging"] = diverging[: len(kept)]
        kernel.cleanup()
        return part

    def _fit(
        self, guide: Any, model: Any, program: Program, draws: int, label: str, monitor: Monitor
    ) -> dict[str, Tensor]:
        """Fit a guide, then draw from it."""
        elbo = pyro.infer.Trace_ELBO(num_particles=self.particles)
        svi = pyro.infer.SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": self.learning_rate}), elbo)
        args, kwargs = program.arguments.call({})
        losses = []
        for _ in monitor.steps(self.steps, label):
            losses.append(float(svi.step(*args, **kwargs)))
            monitor.report(elbo=-losses[-1])
        monitor.check_finite("elbo", torch.tensor(losses), f"{label} of Pyro's SVI")
        with torch.no_grad():
            drawn = [self._draw(guide, args, kwargs, program) for _ in range(draws)]
        part = {f"draws.{n}": torch.stack([d[n] for d in drawn]) for n in drawn[0]}
        last = torch.tensor(losses[-max(len(losses) // 10, 1) :], dtype=torch.float64)
        part |= {f"parameter.{n}": pyro.param(n).detach().clone() for n in program.parameters}
        return {**part, "length": torch.tensor(draws), "info.elbo": -last.mean()}

    @staticmethod
    def _draw(guide: Any, args: Any, kwargs: Any, program: Program) -> dict[str, Tensor]:
        trace = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        missing = [n for n, s in program.latents.items() if n not in trace.nodes and not s.discrete]
        if missing:
            raise OptionError(f"the guide has no sites {missing}; every latent of the model needs one of the same name")
        return {n: trace.nodes[n]["value"].detach() for n in program.latents if n in trace.nodes}


def _bound(program: Program, monitor: Monitor, learn: bool) -> Callable[..., Any]:
    """The model with its arguments, data and parameters, which are fixed or where learning starts; counts its runs."""

    def model(*_: Any, **__: Any) -> Any:
        monitor.cost.add(density_evals=1)
        args, kwargs = program.arguments.call({})
        params = {} if learn else program.parameters
        run = Run(data=program.data, params=params, functions=program._replaced)
        return set_values(run, program.model)(*args, **kwargs)

    if learn:
        for name, value in program.parameters.items():
            pyro.param(name, value.detach().clone(), constraint=program.parameter_constraints[name])
    return model


def _with_deterministic(program: Program, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latents in program order with deterministic sites behind them."""
    draws = {n: values[n] for n in program.latents if n in values}
    lead = next(iter(draws.values())).shape[:2]
    wanted = [n for n in program.deterministic if n not in draws]
    if not wanted or program.discrete or not lead.numel():
        return draws

    def extract(trace: Any) -> dict[str, Tensor]:
        return {n: trace.nodes[n]["value"] for n in wanted}

    with torch.no_grad():
        return {**draws, **program.batched(extract)(draws)}
