"""Any engine on the standard normal noise that a site is built from.

    x = from_noise(z),  z ~ N(0, I):   p(z | y) is proportional to p(y | from_noise(z)) N(z; 0, I)

A distribution with `noise_shape` and `from_noise(z)` can be lifted: a diffusion prior by its deterministic sampler, the
path of an SDE by its driving increments. `NoiseSpace` lifts a program for our engines, `NoiseReparam` a Pyro model for
Pyro's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam.reparam import Reparam

from ppl.backend import Backend, register
from ppl.cost import DenoiserCounter
from ppl.errors import CapabilityError, OptionError, ProgramError
from ppl.sites import unwrap

if TYPE_CHECKING:
    from ppl.cost import Cost
    from ppl.monitor import Monitor
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["NoiseReparam", "NoiseSpace", "lift_noise"]

CAPABILITY = "noise_space"
# What a lifted site offers in place of its own distribution's capabilities.
NORMAL = frozenset({"gaussian", "gaussian_latents"})


class OfEngine:
    """Class data that an object takes from its engine; on the class itself, a value that promises nothing."""

    def __init__(self, name: str, default: Any) -> None:
        self.name, self.default = name, default

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self.default if owner is None else getattr(owner.engine, self.name)


@register
@dataclass(frozen=True)
class NoiseSpace:
    """Runs another backend on the noise of the sites that can be built from it.

    Draws hold x under its name and its noise as `x_noise`. Exact when the engine is, relative to the prior that
    `from_noise` stands for: for a diffusion prior, its deterministic sampler with the steps it takes.

    Args:
        engine: a backend such as `ppl.HMC()`, `ppl.NUTS()` or `ppl.SVI(guide=ppl.LowRank(8))`.
        sites: the sites to lift; all that can be when empty.

    Raises:
        OptionError: `engine` is no backend, or itself a NoiseSpace.

    Example:
        >>> from ppl import HMC, NoiseSpace
        >>> NoiseSpace(HMC()).exact, NoiseSpace(HMC()).default_chains == HMC().default_chains
        ('in_the_limit', True)
    """

    engine: Backend
    sites: tuple[str, ...] = ()

    exact: ClassVar[Any] = OfEngine("exact", "never")
    limit: ClassVar[Any] = OfEngine("limit", ())
    exact_when: ClassVar[Any] = OfEngine("exact_when", ())
    needs: ClassVar[frozenset[str]] = frozenset({CAPABILITY})
    default_chains: ClassVar[Any] = OfEngine("default_chains", 1)
    batches_problems: ClassVar[Any] = OfEngine("batches_problems", False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", (self.sites,) if isinstance(self.sites, str) else tuple(self.sites))
        if isinstance(self.engine, type) or not isinstance(self.engine, Backend) or isinstance(self.engine, NoiseSpace):
            raise OptionError(f"NoiseSpace wraps a backend such as ppl.HMC() or ppl.NUTS(), got {self.engine!r}")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Lift the program and run the engine on it; see `ppl.infer`.

        Raises:
            CapabilityError: the engine needs what the lifted program does not offer.
        """
        lifted = program.noise_space(*self.sites)
        left = {n: c for n, c in program.capabilities.items() if n not in lifted.lifted}
        lacking = self.engine.needs - NORMAL.union(*left.values())
        if lacking:
            raise CapabilityError(
                f"{type(self.engine).__name__} needs {sorted(lacking)}, which a program in its noise space does not "
                f"offer: {sorted(lifted.lifted)} are standard normal noise there; run it without NoiseSpace"
            )
        hidden = [
            n for n in sorted(lifted.lifted) if not program.sites[n].static and "denoiser" in program.capabilities[n]
        ]
        if hidden:
            monitor.note(f"network calls of {hidden} happen inside the traced density and are not in the cost")
        with _counted(lifted, monitor.cost):
            posterior = self.engine.run(lifted, draws=draws, chains=chains, generator=generator, monitor=monitor)
        name = f"NoiseSpace({type(self.engine).__name__})"
        return replace(posterior, attrs={**posterior.attrs, "backend": name, "noise_space": sorted(lifted.lifted)})


@contextmanager
def _counted(program: Program, cost: Cost) -> Iterator[None]:
    """Count the denoiser calls of lifted sites, where their distributions keep a list of `counters`."""
    bases = {id(b): b for n in program.lifted if hasattr(b := unwrap(program.sites[n].distribution), "counters")}
    count = DenoiserCounter(cost, recorded=True)
    lists = {id(b.counters): b.counters for b in bases.values()}
    for counters in lists.values():
        counters.append(count)
    try:
        yield
    finally:
        for counters in lists.values():
            counters[:] = [c for c in counters if c is not count]


class NoiseReparam(Reparam):
    """Pyro reparametrisation of a site by its standard normal noise, for Pyro's own kernels and guides.

    The site `x` becomes a deterministic value of the new latent `x_noise`. Sites that cannot be lifted are left as they
    are by `pyro.poutine.reparam(model, config=lift_noise)`; a dict of sites names them one by one.

    Raises:
        ProgramError: the site is observed, masked, or its distribution has no `noise_shape` and `from_noise`.

    Example:
        >>> class Scaled(dist.Normal):
        ...     noise_shape = torch.Size()
        ...     def from_noise(self, z):
        ...         return self.loc + self.scale * z
        >>> model = pyro.poutine.reparam(lambda: pyro.sample("x", Scaled(1.0, 2.0)), config={"x": NoiseReparam()})
        >>> list(pyro.poutine.trace(model).get_trace().stochastic_nodes)
        ['x_noise']
    """

    def apply(self, msg: Any) -> Any:
        """Pyro's verb: the new distribution and value of a site."""
        name, fn = msg["name"], msg["fn"]
        base = unwrap(fn)
        if msg["is_observed"]:
            raise ProgramError(f"site {name!r} is observed: its noise is not free. Lift latent sites only")
        if not _liftable(base):
            raise ProgramError(
                f"site {name!r} has a {type(base).__name__}, which cannot be built from noise (no noise_shape and "
                "from_noise); leave it out of the config, or use config=lift_noise"
            )
        if _masked(fn):
            raise ProgramError(f"site {name!r} is masked by .mask(...); use pyro.poutine.mask around it instead")
        shape = fn.shape()
        batch = shape[: len(shape) - len(base.event_shape)]
        like = torch.zeros((), dtype=getattr(base, "dtype", None), device=getattr(base, "device", None))
        noise = dist.Normal(like, 1.0).expand(batch + base.noise_shape)
        event_dim = len(base.noise_shape) + fn.event_dim - len(base.event_shape)
        value = base.from_noise(pyro.sample(f"{name}_noise", noise.to_event(event_dim)))
        return {"fn": dist.Delta(value, event_dim=fn.event_dim).mask(False), "value": value, "is_observed": True}


def lift_noise(msg: Mapping[str, Any]) -> NoiseReparam | None:
    """A config for `pyro.poutine.reparam` that lifts every latent site that can be, and leaves the others alone."""
    lift = not msg["is_observed"] and _liftable(unwrap(msg["fn"])) and not _masked(msg["fn"])
    return NoiseReparam() if lift else None


def _liftable(base: Any) -> bool:
    return hasattr(base, "noise_shape") and hasattr(base, "from_noise")


def _masked(fn: Any) -> bool:
    while fn is not unwrap(fn):
        if isinstance(fn, dist.MaskedDistribution):
            return True
        fn = fn.base_dist
    return False
