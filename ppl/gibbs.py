"""Gibbs sampling by blocks: each kernel moves its sites given all others, in the order they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.conditional import Conditional
from ppl.errors import NotFiniteError, OptionError, ProgramError, ShapeError
from ppl.kernels import Kernel
from ppl.posterior import Posterior
from ppl.trace import Run, seeded

if TYPE_CHECKING:
    from ppl.monitor import Monitor
    from ppl.program import Program

__all__ = ["Gibbs"]

STARTS_AT_MOST = 50
DRAWS_AT_ONCE = 1024


class _OfKernels:
    """Class data that an object reads off its kernels; on the class itself, a value that promises nothing."""

    def __init__(self, name: str, default: Any) -> None:
        self.name, self.default = name, default

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self.default if owner is None else getattr(owner, f"_{self.name}")()


@register
@dataclass(frozen=True)
class Gibbs:
    """Kernels for blocks of sites, in turn; exact in the limit if every kernel leaves its conditional invariant.

    Discrete sites that can be enumerated need no block: when no discrete site has one, they are summed out.

    Args:
        blocks: names of sites -> the kernel that moves them; all latents exactly once.
        warmup: sweeps thrown away, in which kernels may adapt.
        thin: sweeps per draw kept.

    Raises:
        OptionError: a site is in two blocks, a kernel is none, or an option is out of range.

    Source: Geman & Geman (1984) [inferred].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Gibbs, HMCKernel, Program, SliceKernel, infer
        >>> def model(y):
        ...     sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, sigma), obs=y)
        >>> gibbs = Gibbs({("mu",): HMCKernel(), ("sigma",): SliceKernel()}, warmup=20)
        >>> gibbs.exact
        'in_the_limit'
        >>> infer(Program(model, torch.tensor([0.5, 1.5])), gibbs, draws=30)["mu"].shape
        torch.Size([4, 30])
    """

    blocks: Mapping[tuple[str, ...], Kernel]
    warmup: int = 500
    thin: int = 1

    exact: ClassVar[Any] = _OfKernels("exact", "never")
    limit: ClassVar[tuple[str, ...]] = ("draws",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Any] = _OfKernels("needs", frozenset())
    default_chains: ClassVar[int] = 4
    batches_problems: ClassVar[bool] = False
    holds_denoisers: ClassVar[bool] = True  # by the kernels of their blocks

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Mapping) or not self.blocks:
            raise OptionError('Gibbs needs blocks, such as {("x",): HMCKernel(), ("sigma",): SliceKernel()}')
        blocks = {(k,) if isinstance(k, str) else tuple(k): v for k, v in self.blocks.items()}
        for sites, kernel in blocks.items():
            if isinstance(kernel, type) or not isinstance(kernel, Kernel):
                raise OptionError(
                    f"the kernel of block {sites} must have step(program, values, generator) and say whether it is "
                    f"`invariant`, got {kernel!r}"
                )
        double = [n for n, times in Counter(n for sites in blocks for n in sites).items() if times > 1]
        if double:
            raise OptionError(f"sites {double} are in more than one block; put each latent site in exactly one")
        if self.warmup < 0 or self.thin < 1:
            raise OptionError(f"warmup must be zero or more and thin one or more, got {self.warmup} and {self.thin}")
        object.__setattr__(self, "blocks", blocks)

    def _exact(self) -> Exactness:
        return "in_the_limit" if not self.inexact_blocks else "never"

    def _needs(self) -> frozenset[str]:
        return frozenset().union(*(getattr(kernel, "needs", frozenset()) for kernel in self.blocks.values()))

    @property
    def inexact_blocks(self) -> list[tuple[str, ...]]:
        """Blocks whose kernel does not leave the conditional distribution invariant."""
        return [sites for sites, kernel in self.blocks.items() if not kernel.invariant]

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Sweep over the blocks; see `ppl.infer`.

        Raises:
            OptionError: the blocks do not cover the latent sites.
        """
        self._check_cover(program)
        if self.inexact_blocks:
            monitor.note(f"blocks {self.inexact_blocks} have kernels that are not invariant: the draws are biased")
        kernels: dict[tuple[str, ...], Any] = {}
        for sites, kernel in self.blocks.items():
            bind = getattr(kernel, "for_sites", None)
            kernels[sites] = kernel if bind is None else bind(sites, monitor.cost)
        stored = monitor.resume()
        first, kept = 0, {}
        if stored is None:
            values = self._start(program, chains, generator)
        else:
            first = int(stored.pop("step"))
            values = _part(stored, "values.")
            kept = _part(stored, "draws.")
            for i, kernel in enumerate(kernels.values()):
                if hasattr(kernel, "load_state"):
                    kernel.load_state(_part(stored, f"kernel{i}."))
        if not kept:
            kept = {n: v.new_zeros(chains, draws, *v.shape[1:]) for n, v in values.items()}

        def state() -> dict[str, Tensor]:
            out = {f"values.{n}": v for n, v in values.items()} | {f"draws.{n}": v for n, v in kept.items()}
            for i, kernel in enumerate(kernels.values()):
                if hasattr(kernel, "state"):
                    out |= {f"kernel{i}.{n}": v for n, v in kernel.state().items()}
            return out

        total, done, complete = self.warmup + draws * self.thin, first, True
        try:
            for sweep in monitor.steps(total, "sweeps", start=first):
                for sites, kernel in kernels.items():
                    if hasattr(kernel, "adapting"):
                        kernel.adapting = sweep < self.warmup
                    values = _moved(program, values, kernel, sites, generator, monitor, sweep)
                done = sweep + 1
                place, rest = divmod(done - self.warmup, self.thin)
                if done > self.warmup and rest == 0:
                    for name, value in values.items():
                        kept[name][:, place - 1] = value
                monitor.checkpoint(done, state)
        except NotFiniteError as error:
            if done - self.warmup < self.thin:
                raise
            monitor.note(f"stopped: {error}")
            complete = False
        length = max(done - self.warmup, 0) // self.thin
        out = {n: v[:, :length] for n, v in kept.items()}
        return Posterior(
            draws={**out, **_deterministic(program, out)},
            parameters=dict(program.parameters),
            attrs={
                "complete": complete and length == draws,
                "exact_blocks": [list(s) for s in self.blocks if s not in self.inexact_blocks],
                "inexact_blocks": [list(s) for s in self.inexact_blocks],
            },
        )

    def _check_cover(self, program: Program) -> None:
        from ppl.mcmc.target import refuse_subsampling

        refuse_subsampling(program, "Gibbs")
        covered = {n for sites in self.blocks for n in sites}
        unknown = sorted(covered - set(program.latents))
        if unknown:
            raise OptionError(f"blocks name {unknown}, which are no latent sites; those are {list(program.latents)}")
        missing = [n for n in program.latents if n not in covered]
        discrete = covered & set(program.discrete)
        summed = [n for n in missing if "enumerable" in program.sites[n].capabilities and not discrete]
        missing = [n for n in missing if n not in summed]
        if missing:
            raise OptionError(
                f"latent sites {missing} are in no block; add one for each, such as "
                f"{{({missing[0]!r},): ppl.SliceKernel()}}"
            )

    def _start(self, program: Program, chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws from the prior, again where the density of the data is zero there."""
        names = [n for sites in self.blocks for n in sites]
        names = [n for n in program.latents if n in names]
        plain = [n for n in names if not program.sites[n].discrete and "denoiser" not in program.sites[n].capabilities]
        values = _prior(program, names, chains, generator)
        for _ in range(STARTS_AT_MOST if plain else 0):
            block = Conditional(program, plain)
            value, grad = block.log_density_and_grad(block.ravel(values), values)
            bad = ~(torch.isfinite(value) & torch.isfinite(grad).all(1))
            if not bool(bad.any()):
                return values
            again = _prior(program, names, chains, generator)
            values = {n: torch.where(bad.reshape(-1, *[1] * (v.ndim - 1)), again[n], v) for n, v in values.items()}
        if plain:
            raise ProgramError(
                f"no draw of the prior with a finite density was found in {STARTS_AT_MOST} tries; narrow the priors, "
                "or check that the data have positive density under the model"
            )
        return values


def _prior(program: Program, names: list[str], chains: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Prior draws of the latents, (chains, *shape); one call of a denoising network for all chains."""
    with seeded(generator), torch.no_grad():
        joint = {
            n: s.distribution.sample((chains,))
            for n, s in program.latents.items()
            if s.static and "denoiser" in s.capabilities
        }
        rows = []
        for i in range(chains):
            trace, _ = program.trace_one({}, program.shared_inputs(), Run(values={n: v[i] for n, v in joint.items()}))
            rows.append({n: trace.nodes[n]["value"] for n in names})
    return {n: torch.stack([row[n] for row in rows]) for n in names}


def _moved(
    program: Program,
    values: dict[str, Tensor],
    kernel: Kernel,
    sites: tuple[str, ...],
    generator: torch.Generator,
    monitor: Monitor,
    sweep: int,
) -> dict[str, Tensor]:
    """The values after one kernel; only those of its block change."""
    new = kernel.step(program, values, generator)
    out = dict(values)
    for name in sites:
        if name not in new or new[name].shape != values[name].shape:
            got = tuple(new[name].shape) if name in new else "nothing"
            raise ShapeError(
                f"the kernel of block {sites} returned {got} for {name!r}, expected {tuple(values[name].shape)}"
            )
        if new[name].is_floating_point():
            monitor.check_finite(name, new[name], f"sweep {sweep}")
        out[name] = new[name].detach()
    return out


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _deterministic(program: Program, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Deterministic sites of all draws; none where a discrete site was summed out, on which they may depend."""
    if not program.deterministic or any(n not in draws for n in program.latents):
        return {}
    lead = next(iter(draws.values())).shape[:2]
    if 0 in lead:
        return {}
    names = list(program.deterministic)
    extract = program.batched(lambda trace: {n: trace.nodes[n]["value"] for n in names})
    rows = {n: v.reshape(-1, *v.shape[2:]).split(DRAWS_AT_ONCE) for n, v in draws.items()}
    with torch.no_grad():
        parts = [extract(dict(zip(rows, chunk, strict=True))) for chunk in zip(*rows.values(), strict=True)]
    return {n: torch.cat([p[n] for p in parts]).reshape(*lead, *parts[0][n].shape[1:]) for n in names}
