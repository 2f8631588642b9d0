r"""Particle Gibbs: the path of a program by conditional sequential Monte Carlo, its parameters by slices, in turn.

    path:        z -> z'  leaving  p(z | theta, y)  as it is                                    (`conditional_sweep`)
    parameters:  theta -> theta'  leaving  p(theta | z, y)  as it is: the path moves with them, X = X(z, theta)

z are the driving numbers and the numbers that start the factors. `PathKernel` of `ppl.Gibbs` takes the other
coordinates: the parameters move given X itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from inverse.paths.conditional import Retained, conditional_sweep
from inverse.paths.controls import Control, Uncontrolled, bind_control, has_exact_control
from inverse.paths.particle_filter import PathKernel
from inverse.paths.path_checks import note_coarse_steps
from inverse.paths.problem import PathProblem, path_site
from ppl.backend import Exactness, register
from ppl.cost import Cost
from ppl.errors import CapabilityError, OptionError
from ppl.kernels import slice_move
from ppl.mcmc.target import fixed_density, posterior_of
from ppl.option_checks import check_integers
from ppl.program import Program
from sde.path import Path

if TYPE_CHECKING:
    from ppl.monitor import Monitor
    from ppl.posterior import Posterior

__all__ = ["ParticleGibbs", "ParticleGibbsKernel"]

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Sweeps:
    """Options of conditional sweeps; see `ParticleGibbs`."""

    particles: int = 32
    threshold: float = 0.5
    ancestors: bool = True
    control: Uncontrolled | None = None

    def __post_init__(self) -> None:
        check_integers(self, particles=2)
        if not 0 < self.threshold <= 1:
            raise OptionError(f"threshold must lie in (0, 1], a share of the particles, got {self.threshold}")
        if not isinstance(self.ancestors, bool):
            raise OptionError(f"ancestors must be true or false, got {self.ancestors!r}")
        if self.control is not None and not isinstance(self.control, Uncontrolled):
            raise OptionError(
                f"control must be None or inverse.paths.Uncontrolled(): a fitted one belongs to one value of the "
                f"parameters, got {self.control!r}"
            )


class _Paths:
    """Moves the paths of all chains of one program: at once where they share its law, or else in turn."""

    def __init__(self, options: _Sweeps, program: Program, site: str, cost: Cost) -> None:
        self.options, self.program, self.site, self.cost = options, program, site, cost
        self.others = [n for n in program.latents if n != site]
        self.shared = program.sites[site].static
        self.first: PathProblem | None = None
        self.control: Control | None = None
        self.exact = self.together = False

    def move(self, given: Values, retained: Retained, generator: torch.Generator) -> tuple[Retained, Tensor]:
        """New paths and their values (chain, n, d), given the other latents by chain."""
        if self.first is None:
            self.first = self._problem(given, 0)
            exact = self.options.control is None and has_exact_control(self.first)
            self.exact, self.together = exact, self.shared and not (exact and self.others)
        if self.together:
            if self.control is None:
                self.control = bind_control(None if self.exact else Uncontrolled(), self.first)
            return self._sweep(self.first, self.control, given, retained, generator)
        parts = []
        for chain in range(len(retained.noise)):
            problem = self._problem(given, chain)
            problem.__dict__["last"] = self.first.last  # which times the data depend on does not change
            control = bind_control(None if self.exact else Uncontrolled(), problem)
            own = {n: v[chain : chain + 1] for n, v in given.items()}
            one = Retained(retained.first[chain : chain + 1], retained.noise[chain : chain + 1])
            parts.append(self._sweep(problem, control, own, one, generator))
        noise = Retained(torch.cat([p[0].first for p in parts]), torch.cat([p[0].noise for p in parts]))
        return noise, torch.cat([p[1] for p in parts])

    def _problem(self, given: Values, chain: int) -> PathProblem:
        return PathProblem.of(self.program, self.site, {n: given[n][chain] for n in self.others})

    def _sweep(
        self, problem: PathProblem, control: Control, given: Values, retained: Retained, generator: torch.Generator
    ) -> tuple[Retained, Tensor]:
        options = self.options
        lanes = {n: given[n].repeat(options.particles, *(1,) * (given[n].ndim - 1)) for n in self.others}
        kernel = PathKernel(problem, control, self.cost, lanes)
        return conditional_sweep(
            kernel, retained, options.particles, generator, threshold=options.threshold, ancestors=options.ancestors
        )


@register
@dataclass(frozen=True)
class ParticleGibbs(_Sweeps):
    """The path of a program and all its other latents, in turn; exact in the limit of draws for any N >= 2.

    The path is moved as a whole, by conditional SMC with ancestor sampling over its driving numbers. Every other
    coordinate is moved by a slice given the driving numbers, so that the path moves with it: sub-steps, hidden factors
    and a Hurst index that has a prior are no obstacle. Chains whose path is the same program-wide move in one batch.

    Args:
        particles: N, the current path included.
        threshold: resample when ESS < threshold * N.
        ancestors: let the current path exchange its past at resamplings; each costs a walk to the end.
        control: None takes the exact control where the path is linear and its data linear and Gaussian, and none
            elsewhere; `inverse.paths.Uncontrolled()` never has one.
        warmup: sweeps thrown away.
        thin: sweeps per draw kept.
        width: first interval of a slice, in unconstrained units.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Path, Process
        >>> times = torch.arange(1, 5, dtype=torch.float64) / 4
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
        ...     x = pyro.sample("x", Path(Process(lambda x, t: -rate * x), times, torch.ones(1, dtype=torch.float64)))
        ...     pyro.sample("y", dist.Normal(x[:, 0], 0.3).to_event(1), obs=y)
        >>> program = ppl.Program(model, torch.tensor([0.8, 0.5, 0.4, 0.2], dtype=torch.float64))
        >>> posterior = ppl.infer(program, ParticleGibbs(particles=8, warmup=5), draws=10, chains=2)
        >>> posterior["x"].shape, posterior["rate"].shape
        (torch.Size([2, 10, 4, 1]), torch.Size([2, 10]))
    """

    warmup: int = 200
    thin: int = 1
    width: float = 1.0

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("draws",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"path"})
    default_chains: ClassVar[int] = 4
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, warmup=0, thin=1)
        if not 0 < self.width < float("inf"):
            raise OptionError(f"width must be positive and finite, got {self.width}")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Sweeps over path and parameters; see `ppl.infer`."""
        site = path_site(program)
        note_coarse_steps(program, site, monitor)
        lifted = program.noise_space(site)
        flat = fixed_density(lifted, "ParticleGibbs", monitor)
        leaf, paths = flat.layout.leaves[site], _Paths(self, program, site, monitor.cost)
        own = [i for i in range(flat.dim) if not leaf.start <= i < leaf.stop]
        stored = monitor.resume()
        first = done = 0
        if stored is None:
            z = flat.initial(chains, generator)
            kept, moved = z.new_zeros(draws, *z.shape), z.new_zeros(chains, *program.sites[site].shape[:1])
        else:
            first = done = int(stored["step"])
            z, kept, moved = stored["z"], stored["draws"], stored["moved"]

        def evaluate(z: Tensor) -> Tensor:
            monitor.cost.add(density_evals=len(z))
            return flat.log_density(z)

        for sweep in monitor.steps(self.warmup + draws * self.thin, "sweeps", start=first):
            with torch.no_grad():
                values = flat.constrain(z)
                given = {n: values[n] for n in paths.others}
                noise, x = paths.move(given, _retained(paths, program, z[:, leaf.start : leaf.stop]), generator)
                z = z.clone()
                z[:, leaf.start : leaf.stop] = torch.cat([noise.noise.flatten(1), noise.first], 1)
                if own:
                    log_p = evaluate(z)
                    for i in own:
                        z, log_p = slice_move(evaluate, z, log_p, i, generator, self.width)
            done = sweep + 1
            place, rest = divmod(done - self.warmup, self.thin)
            if done > self.warmup:
                moved = moved + (x != values[site]).any(-1)
                if rest == 0:
                    kept[place - 1] = z
            monitor.checkpoint(done, {"z": z, "draws": kept, "moved": moved})
        rows = max(done - self.warmup, 0) // self.thin
        info = {"update_rate": moved / max(done - self.warmup, 1)}
        return posterior_of(lifted, flat, kept[:rows], info, monitor, complete=rows == draws)


def _retained(paths: _Paths, program: Program, z: Tensor) -> Retained:
    """Driving numbers and start from the numbers (chain, noise) of a lifted path."""
    driving, start = program.sites[paths.site].distribution.split_noise(z)
    return Retained(z.new_zeros(len(z), 0) if start is None else start.flatten(1), driving)


@dataclass(frozen=True)
class ParticleGibbsKernel(_Sweeps):
    """A kernel of `ppl.Gibbs` for one path whose states are all in the program, given all other sites.

    The driving numbers are found from the path, those that start the factors of type I drawn given it; the sweep leaves
    their law given the data as it is. For paths with a density: `dt=None` and a noise of its own for every coordinate.

    Args:
        particles, threshold, ancestors, control: as for `ParticleGibbs`.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Path, Process
        >>> times = torch.arange(1, 5, dtype=torch.float64) / 4
        >>> path = Path(Process(lambda x, t: -x), times, torch.ones(1, dtype=torch.float64))
        >>> def model(y):
        ...     sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
        ...     x = pyro.sample("x", path)
        ...     pyro.sample("y", dist.Normal(x[:, 0], sigma).to_event(1), obs=y)
        >>> program = ppl.Program(model, torch.tensor([0.8, 0.5, 0.4, 0.2], dtype=torch.float64))
        >>> kernels = {("x",): ParticleGibbsKernel(particles=8), ("sigma",): ppl.SliceKernel()}
        >>> ppl.infer(program, ppl.Gibbs(kernels, warmup=5), draws=10, chains=2)["x"].shape
        torch.Size([2, 10, 4, 1])
    """

    invariant: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"path"})

    def for_sites(self, sites: tuple[str, ...], cost: Cost) -> _PathBlock:
        """The kernel of a block."""
        if len(sites) != 1:
            raise OptionError(f"ParticleGibbsKernel moves one path, got the block {sites}; give each its own")
        return _PathBlock(self, sites[0], cost)

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        """One move of the program's only path."""
        return self.for_sites((path_site(program),), Cost()).step(program, values, generator)


class _PathBlock:
    """Moves the path of one block."""

    invariant: ClassVar[bool] = True

    def __init__(self, options: ParticleGibbsKernel, site: str, cost: Cost) -> None:
        self.options, self.site, self.cost = options, site, cost
        self.paths: _Paths | None = None

    def step(self, program: Program, values: Values, generator: torch.Generator) -> Values:
        with torch.no_grad():
            if self.paths is None:
                path_site(program, self.site)
                self.paths = _Paths(self.options, program, self.site, self.cost)
            given = {n: values[n] for n in self.paths.others}
            x = values[self.site]
            laws = [self.paths._problem(given, i).path for i in range(len(x))] if not self.paths.shared else []
            if self.paths.shared:
                laws = [self.paths._problem(given, 0).path] * len(x)
            if "log_prob" not in laws[0].capabilities:
                raise CapabilityError(
                    f"the path {self.site!r} does not tell the numbers that drive it: it has steps between its times, "
                    "shared noises, or Heun's rule; use inverse.ParticleGibbs(), which keeps them, or dt=None"
                )
            found = [_numbers(path, one, generator) for path, one in zip(laws, x, strict=True)]
            retained = Retained(torch.stack([f.first for f in found]), torch.stack([f.noise for f in found]))
            return {self.site: self.paths.move(given, retained, generator)[1]}


def _numbers(path: Path, x: Tensor, generator: torch.Generator) -> Retained:
    """Numbers that build a path (n, d), drawn from their law given it where it does not tell them."""
    b = path.noise_increments(x.double())[0]  # (m, steps)
    from_noise, from_start = path.increments.matrices()
    if not from_start.shape[-1]:
        white = torch.linalg.solve_triangular(from_noise.to(b), b[..., None], upper=False)[..., 0]
        return Retained(x.new_zeros(0), white.to(x))
    # A draw of the joint law, moved to where it gives this path.
    size = (path.noises, path.steps, path.process.noise.size)
    noise = torch.randn(*size[:2], generator=generator, dtype=b.dtype, device=b.device)
    start = torch.randn(size[0], size[2], generator=generator, dtype=b.dtype, device=b.device)
    miss = b - (from_noise @ noise[..., None] + from_start @ start[..., None])[..., 0]
    weight = torch.cholesky_solve(miss[..., None], path.increments.factor().to(b))
    noise, start = noise + (from_noise.mT @ weight)[..., 0], start + (from_start.mT @ weight)[..., 0]
    return Retained(start.flatten().to(x), noise.to(x))
