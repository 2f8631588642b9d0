"""Kernels for the blocks of `Gibbs`: slices, Hamiltonian steps, draws written by hand; each for all chains at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ppl.conditional import Conditional
from ppl.cost import Cost
from ppl.errors import NotFiniteError, OptionError
from ppl.program import Program

__all__ = ["ConditionalDraw", "HMCKernel", "Kernel", "SliceKernel", "slice_move"]

Values = Mapping[str, Tensor]
SHRINKS_AT_MOST = 500


@runtime_checkable
class Kernel(Protocol):
    """Moves the sites of one block, given all others.

    Class data:
        invariant: whether a step leaves the conditional distribution of the block invariant.

    Optional:
        for_sites(sites, cost): the kernel that `Gibbs` steps for this block. It may keep state: `adapting`, set to
            False after warmup, and `state() -> tensors`, `load_state(tensors)` for checkpoints. It adds to `cost`.
        needs: capabilities asked of the program's latent sites, such as {"denoiser"}.
    """

    invariant: ClassVar[bool]

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        """New values of (at least) the block's sites.

        Args:
            program: the program.
            values: site -> (chains, *shape), all latents.
            generator: source of randomness.
        """
        ...


@dataclass(frozen=True)
class SliceKernel:
    """Univariate slice sampling of each coordinate in turn, on unconstrained space; no tuning, no gradient.

    Args:
        width: first interval, in unconstrained units (log units for a positive site).
        limit: widths that the interval grows to at most.
        sites: the block, when used outside `Gibbs`.

    Raises:
        OptionError: an option is out of range.

    Source: Neal (2003), figures 3 and 5 [inferred].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     sigma = pyro.sample("sigma", dist.Exponential(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, sigma), obs=y)
        >>> kernel, values = SliceKernel(sites=("sigma",)), {"sigma": torch.ones(3)}
        >>> kernel.step(Program(model, torch.tensor(2.0)), values, torch.Generator().manual_seed(0))["sigma"].shape
        torch.Size([3])
    """

    width: float = 1.0
    limit: int = 16
    sites: tuple[str, ...] = ()

    invariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.width) and self.width > 0):
            raise OptionError(f"width must be positive and finite, got {self.width}")
        if self.limit < 1:
            raise OptionError(f"limit must be one or more widths, got {self.limit}")

    def for_sites(self, sites: tuple[str, ...], cost: Cost) -> _Slices:
        """The kernel of a block."""
        return _Slices(self, sites, cost)

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        """One sweep over the coordinates of `sites`."""
        return self.for_sites(_named(self.sites, "SliceKernel"), Cost()).step(program, values, generator)


class _Slices:
    """Slice sampling of one block."""

    def __init__(self, options: SliceKernel, sites: tuple[str, ...], cost: Cost) -> None:
        self.options, self.sites, self.cost = options, sites, cost
        self.invariant = options.invariant

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        block = Conditional(program, self.sites)
        z = block.ravel(values)
        log_p = self._log_p(block, z, values)
        _check_start(log_p, self.sites)
        for i in range(block.dim):
            z, log_p = slice_move(
                lambda moved: self._log_p(block, moved, values),
                z,
                log_p,
                i,
                generator,
                self.options.width,
                self.options.limit,
            )
        return block.constrain(z, values)

    def _log_p(self, block: Conditional, z: Tensor, values: Values) -> Tensor:
        self.cost.add(density_evals=len(z))
        return block.log_density(z, values)


def slice_move(
    evaluate: Callable[[Tensor], Tensor],
    z: Tensor,
    log_p: Tensor,
    i: int,
    generator: torch.Generator,
    width: float = 1.0,
    limit: int = 16,
) -> tuple[Tensor, Tensor]:
    """One slice move of coordinate i in all chains; those that are done wait for the last.

    Args:
        evaluate: log density, (chains, dim) -> (chains,).
        z: (chains, dim).
        log_p: (chains,) its log density.
        i: the coordinate.
        generator: source of randomness.
        width: first interval.
        limit: widths that the interval grows to at most.

    Returns:
        The moved z and its log density.
    """

    def uniform() -> Tensor:
        return torch.rand(len(z), dtype=z.dtype, device=z.device, generator=generator)

    def at(place: Tensor) -> Tensor:
        moved = z.clone()
        moved[:, i] = place
        return evaluate(moved)

    old = z[:, i].clone()
    level = log_p + uniform().log()
    left = old - width * uniform()
    right = left + width
    # The budget of growth is split at random between the ends, or the move would not be reversible.
    to_left = (limit * uniform()).floor()
    to_right = limit - 1 - to_left
    left = _grow(at, left, -width, to_left, level)
    right = _grow(at, right, width, to_right, level)
    new, new_log_p = old.clone(), log_p.clone()
    active = torch.ones(len(z), dtype=torch.bool, device=z.device)
    for _ in range(SHRINKS_AT_MOST):
        place = left + (right - left) * uniform()
        found = at(place)
        accept = active & (found >= level)
        new, new_log_p = torch.where(accept, place, new), torch.where(accept, found, new_log_p)
        active = active & ~accept
        if not bool(active.any()):
            break
        left = torch.where(active & (place < old), place, left)
        right = torch.where(active & (place >= old), place, right)
    z = z.clone()
    z[:, i] = new
    return z, new_log_p


def _grow(at: Callable[[Tensor], Tensor], end: Tensor, width: float, budget: Tensor, level: Tensor) -> Tensor:
    """Move one end outwards while it is inside the slice and the budget lasts."""
    while True:
        grow = budget > 0
        if not bool(grow.any()):
            return end
        grow = grow & (at(end) >= level)
        if not bool(grow.any()):
            return end
        end = torch.where(grow, end + width, end)
        budget = torch.where(grow, budget - 1, torch.zeros_like(budget))


@dataclass(frozen=True)
class HMCKernel:
    """One Hamiltonian trajectory of a block, its step size learned during the warmup of `Gibbs`.

    Args:
        steps: leapfrog steps of a trajectory.
        step_size: in unconstrained units; the start of the adaptation, or the one used outside `Gibbs`.
        target_accept: acceptance the step size is adapted to.
        sites: the block, when used outside `Gibbs`.

    Raises:
        OptionError: an option is out of range.

    Source: Neal (2011), section 3 [inferred].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)
        >>> kernel, values = HMCKernel(sites=("x",)), {"x": torch.zeros(3, 2)}
        >>> kernel.step(Program(model, torch.tensor(2.0)), values, torch.Generator().manual_seed(0))["x"].shape
        torch.Size([3, 2])
    """

    steps: int = 10
    step_size: float = 0.1
    target_accept: float = 0.8
    sites: tuple[str, ...] = ()

    invariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"steps must be one or more, got {self.steps}")
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise OptionError(f"step_size must be positive and finite, got {self.step_size}")
        if not 0 < self.target_accept < 1:
            raise OptionError(f"target_accept must lie between 0 and 1, got {self.target_accept}")

    def for_sites(self, sites: tuple[str, ...], cost: Cost) -> _Trajectories:
        """The kernel of a block."""
        return _Trajectories(self, sites, cost)

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        """One trajectory of `sites` with the step size given."""
        return self.for_sites(_named(self.sites, "HMCKernel"), Cost()).step(program, values, generator)


class _Trajectories:
    """Hamiltonian steps of one block; one step size for all chains."""

    def __init__(self, options: HMCKernel, sites: tuple[str, ...], cost: Cost) -> None:
        self.options, self.sites, self.cost = options, sites, cost
        self.invariant = options.invariant
        self.adapting = True
        self.log_step = torch.tensor(math.log(options.step_size), dtype=torch.float64)
        self.mean_log_step = self.log_step.clone()
        self.count = torch.zeros((), dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """What the adaptation has learned."""
        return {"log_step": self.log_step, "mean_log_step": self.mean_log_step, "count": self.count}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.log_step, self.mean_log_step, self.count = state["log_step"], state["mean_log_step"], state["count"]

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        block = Conditional(program, self.sites)
        z = block.ravel(values)
        momentum = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        # A trajectory of fixed length would be trapped in the period of a Gaussian direction.
        jitter = 0.6 + 0.8 * float(torch.rand((), generator=generator, device=generator.device))
        learned = self.log_step if self.adapting or not float(self.count) else self.mean_log_step
        step_size = math.exp(float(learned)) * jitter
        log_p, grad = self._log_p(block, z, values)
        _check_start(log_p, self.sites)
        energy = log_p - 0.5 * momentum.square().sum(1)
        new, new_log_p = z, log_p
        for _ in range(self.options.steps):
            momentum = momentum + 0.5 * step_size * grad
            new = new + step_size * momentum
            new_log_p, grad = self._log_p(block, new, values)
            momentum = momentum + 0.5 * step_size * grad
        change = new_log_p - 0.5 * momentum.square().sum(1) - energy
        accept_prob = torch.where(torch.isfinite(change), change.clamp(max=0.0).exp(), 0.0)
        uniform = torch.rand(len(z), dtype=z.dtype, device=z.device, generator=generator)
        accept = uniform < accept_prob
        if self.adapting:
            self._adapt(float(accept_prob.mean()))
        return block.constrain(torch.where(accept[:, None], new, z), values)

    def _adapt(self, acceptance: float) -> None:
        """Stochastic approximation: the step size at which acceptance is the target, and its running mean."""
        self.count = self.count + 1
        gain = 2.0 / (10 + float(self.count)) ** 0.6
        self.log_step = self.log_step + gain * (acceptance - self.options.target_accept)
        weight = min(1.0, 10 / float(self.count))
        self.mean_log_step = self.mean_log_step + weight * (self.log_step - self.mean_log_step)

    def _log_p(self, block: Conditional, z: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        self.cost.add(gradient_evals=len(z))
        return block.log_density_and_grad(z, values)


@dataclass(frozen=True)
class ConditionalDraw:
    """A draw from the conditional that the user wrote, such as a conjugate update; invariant by the user's word.

    Args:
        draw: `draw(values, generator) -> {site: (chains, *shape)}` for the sites of the block.

    Example:
        >>> kernel = ConditionalDraw(lambda values, generator: {"x": values["m"] + torch.randn(2, generator=generator)})
        >>> kernel.invariant
        True
    """

    draw: Callable[[Values, torch.Generator], Values]

    invariant: ClassVar[bool] = True

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        """Call the function."""
        return self.draw(values, generator)


def _named(sites: Any, kernel: str) -> tuple[str, ...]:
    if not sites:
        raise OptionError(f"{kernel} does not know its block outside Gibbs; give sites=(...)")
    return tuple(sites)


def _check_start(log_p: Tensor, sites: tuple[str, ...]) -> None:
    bad = ~torch.isfinite(log_p)
    if bool(bad.any()):
        raise NotFiniteError(
            f"the conditional density of {sites} is not finite in {int(bad.sum())} of {len(log_p)} chains at the "
            "values they stand at; another block's kernel left the support, or the start has density zero"
        )
