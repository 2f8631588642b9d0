r"""A Gaussian likelihood for every particle, whose nuisance parameters it carries.

    y ~ N(diag(g) A x + b, diag(r)^2),     g, b, r : (particle, m) functions of theta;  A shared, or one for each

Closed with x_0 ~ N(D, C):   psi(theta) = N(y; diag(g) A D + b, diag(r)^2 + diag(g) A C A^T diag(g)). With D, C and A D
kept, psi at another theta costs no denoiser call, so that theta can be moved by Metropolis steps at any noise level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from inverse.likelihood import diffusion_sites
from inverse.linear_form import mean_and_noise
from inverse.problem import DiffusionProblem
from ppl.conditional import Conditional
from ppl.errors import CapabilityError
from ppl.program import Program
from ppl.sites import Layout
from ppl.trace import Run, log_prob_of, seeded

__all__ = ["LaneReader", "Lanes", "walk", "walk_noise"]

Lanes = dict[str, Tensor]
"""Tensors of all particles: z, log_prior, offset, gain, stddev, and matrix where each has its own."""

DENSE_LIMIT = 2**16
"""Most entries of A for which every particle may have its own."""

PROBES = 64


class LaneReader:
    """Reads off a program what the likelihood is for given nuisance parameters, for many particles at once.

    Args:
        program: latents are diffusion sites and continuous nuisance parameters.

    Raises:
        CapabilityError: there is no nuisance parameter, one is discrete, the data are not linear in x with independent
            Gaussian noise at every value of them, or a prior depends on the other sites.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.names = program, _nuisance(program)
        given = {n: program.first_values[n] for n in self.names}
        self.problem = DiffusionProblem.of(program, None, given)
        self.block = Conditional(program, self.names)
        self.layout: Layout = self.block.layout
        self.gaussian = self.problem.likelihood.gaussian
        self.data = torch.cat([program.data[n].reshape(-1) for n in program.observed])
        self.sites = self.problem.sites
        self._zero = torch.zeros(1, *self.problem.shape, dtype=self.problem.dtype, device=self.problem.device)
        generator = torch.Generator(program.device).manual_seed(0)
        probes = self.sample_prior(PROBES, generator)
        low, high = probes.quantile(0.16, 0), probes.quantile(0.84, 0)
        self.scale = ((high - low) / 2).clamp(min=1e-3)
        self.x = torch.randn(2, *self.problem.shape, generator=generator, dtype=self._zero.dtype, device=program.device)
        self.x = self.x * self.problem.prior.data_std
        self._check(given)
        self._check_prior({n: v[0] for n, v in self.values(self._zero, probes[:1]).items() if n in self.names})
        self.form, self.uniform = self._form(probes[:4])
        if self.form == "own" and self.problem.shape.numel() * self.data.numel() > DENSE_LIMIT:
            raise CapabilityError(
                f"the operator itself depends on {list(self.names)}, and is too large "
                f"({self.data.numel()} x {self.problem.shape.numel()}) for every particle to have its own; use "
                "ppl.Gibbs with inverse.NoiseAndReturn() and ppl.SliceKernel()"
            )

    @property
    def dim(self) -> int:
        """Number of nuisance coordinates."""
        return self.layout.dim

    def measured(self, x: Tensor) -> Tensor:
        """A x at the reference, data axes flattened: (*batch, *shape) -> (*batch, m)."""
        return self.gaussian.measured(x).reshape(*x.shape[: x.ndim - len(self.problem.shape)], -1)

    def sample_prior(self, particles: int, generator: torch.Generator) -> Tensor:
        """(particles, dim) coordinates of nuisance parameters from their prior."""
        program, static = self.program, all(self.program.sites[n].static for n in self.names)
        x = self._zero.expand(particles, *self.problem.shape)
        with seeded(generator), torch.no_grad():
            if static:
                values = {n: program.sites[n].distribution.sample((particles,)) for n in self.names}
            else:
                rows = []
                fixed = self.problem.likelihood.split(self._zero[0])
                for _ in range(particles):
                    trace, _ = program.trace_one({}, program.shared_inputs(), Run(values=fixed))
                    rows.append({n: trace.nodes[n]["value"] for n in self.names})
                values = {n: torch.stack([row[n] for row in rows]) for n in self.names}
            return self.block.ravel({**self.problem.likelihood.split(x), **values})

    def __call__(self, z: Tensor) -> Lanes:
        """The likelihood of every particle: z (particle, dim)."""
        lanes = len(z)
        log_prior, offset, stddev = self._evaluate(z, self._zero.expand(lanes, *self._zero.shape[1:]))
        read = {"z": z, "log_prior": log_prior, "offset": offset, "stddev": stddev, "gain": torch.ones_like(offset)}
        if self.form == "gain":
            mean = self._evaluate(z, self.x[:1].expand(lanes, *self.x.shape[1:]))[1]
            read["gain"] = _ratio(mean - offset, self.measured(self.x[0]))
        elif self.form == "own":
            d = self.problem.shape.numel()
            eye = torch.eye(d, dtype=self._zero.dtype, device=z.device).reshape(1, d, *self.problem.shape)
            points = eye.expand(lanes, *eye.shape[1:]).reshape(lanes * d, *self.problem.shape)
            means = self._evaluate(z.repeat_interleave(d, 0), points)[1]
            read["matrix"] = (means.reshape(lanes, d, -1) - offset[:, None]).mT
        return read

    def values(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Values of all latents, for x (lanes, *shape) and z (lanes, dim)."""
        sites = self.problem.likelihood.split(x)
        return {**sites, **self.block.constrain(z, sites)}

    def log_density(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(y, theta | x) with Jacobian, (lanes,), up to a constant."""
        return self.block.log_density(z, self.problem.likelihood.split(x))

    def _evaluate(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(theta) with Jacobian (lanes,), mean and sd of the data (lanes, m), by one run of the graph."""
        program, sites = self.program, frozenset(self.sites)

        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            values = {n: lane[f"given.{n}"] for n in self.sites}
            run = Run(values=values, z=lane["z"], layout=self.layout, unscored=sites)
            trace, setter = program.trace_one(lane, shared, run)
            prior = log_prob_of(trace, lambda node: not node["is_observed"], enumerated=False, nesting=program.nesting)
            read = [mean_and_noise(n, trace.nodes[n])[:2] for n in program.observed]
            mean, noise = (torch.cat([part.reshape(-1) for part in column]) for column in zip(*read, strict=True))
            return prior + setter.log_jacobian, mean, noise

        lane = {"z": z, **{f"given.{n}": v for n, v in self.problem.likelihood.split(x).items()}}
        function = program.lane_function(("nuisance", self.names), one, lane)
        with torch.no_grad():
            found = function(lane, program.shared_inputs())
        return found[0], found[1], found[2]

    def _check(self, given: Mapping[str, Tensor]) -> None:
        """What is read here is what was read off the program at the reference."""
        plain = self.gaussian.stddev is not None and self.gaussian.size == self.data.numel()
        if plain:
            z = self.block.ravel(
                {**self.problem.likelihood.split(self._zero), **{n: v[None] for n, v in given.items()}}
            )
            found = self._evaluate(z, self._zero)[2][0]
            assert self.gaussian.stddev is not None
            plain = bool(torch.allclose(found, self.gaussian.stddev.reshape(-1).to(found), rtol=1e-5))
        if not plain:
            raise CapabilityError(
                "carrying nuisance parameters needs independent noise without masks or scales on the data; write a "
                "mask as an operator, inverse.operators.Mask, or use ppl.Gibbs"
            )

    def _check_prior(self, other: Mapping[str, Tensor]) -> None:
        """The prior of x is the same at other nuisance parameters."""
        if all(self.program.sites[n].static for n in self.sites):
            return
        again = DiffusionProblem.of(self.program, None, other).prior
        level = self.problem.prior.data_std
        if not _close(again.denoise(self.x, level), self.problem.prior.denoise(self.x, level), 1e-4):
            raise CapabilityError(
                f"the prior of {self.problem.site} depends on {list(self.names)}, which particles cannot carry; use "
                "ppl.Gibbs with a kernel for each, or ppl.NoiseSpace(engine) on all sites"
            )

    def _form(self, z: Tensor) -> tuple[str, bool]:
        """How A depends on theta, "fixed", "gain" or "own"; and whether gain and noise change in proportion."""
        lanes, seen = len(z), [self.measured(x) for x in self.x]
        offset = self._evaluate(z, self._zero.expand(lanes, *self._zero.shape[1:]))[1]
        first, second = (self._evaluate(z, x.expand(lanes, *x.shape)) for x in self.x)
        far = self._evaluate(z, 100 * self.x[:1].expand(lanes, *self.x.shape[1:]))[1] - offset
        rtol = 1e-6 if z.dtype == torch.float64 else 2e-3
        if not _close(far, 100 * (first[1] - offset), rtol):
            raise CapabilityError(
                f"the mean of the data is not linear in {self.problem.site} for all {list(self.names)}"
            )
        if not torch.allclose(first[2], second[2]):
            raise CapabilityError(f"the noise of the data depends on {self.problem.site}")
        assert self.gaussian.stddev is not None
        gain = _ratio(first[1] - offset, seen[0])
        noise = first[2] / self.gaussian.stddev.reshape(-1).to(first[2])
        uniform = all(bool(torch.allclose(t, t[:, :1].expand_as(t), rtol=1e-4)) for t in (gain, noise))
        if not _close(second[1] - offset, gain * seen[1], rtol):
            return "own", False
        return ("fixed" if bool(torch.allclose(gain, torch.ones_like(gain), rtol=1e-6)) else "gain"), uniform


def walk_noise(lanes: int, steps: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """(lanes, steps, 3) random numbers of `walk`: a normal, and two uniforms."""
    normal = torch.randn(lanes, steps, 1, generator=generator, dtype=like.dtype, device=like.device)
    uniform = torch.rand(lanes, steps, 2, generator=generator, dtype=like.dtype, device=like.device)
    return torch.cat([normal, uniform], -1)


def walk(state: Lanes, evaluate: Callable[[Tensor], Lanes], scale: Tensor, noise: Tensor) -> Lanes:
    """Metropolis steps of z, one coordinate after the other, in steps from 2.4 prior sds down to a 300th of that.

    The size of a step is drawn anew and does not depend on z, so that proposals are symmetric.

    Args:
        state: with "z" and "log_target", all tensors with the particles in front.
        evaluate: z -> the same tensors there.
        scale: (dim,) size of the coordinates.
        noise: (particle, steps, 3) from `walk_noise`.
    """
    for i in range(noise.shape[1]):
        normal, size, accept = noise[:, i].unbind(-1)
        step = torch.zeros_like(state["z"])
        step[:, i % len(scale)] = 2.4 * scale[i % len(scale)] * torch.exp(-math.log(300.0) * size) * normal
        new = evaluate(state["z"] + step)
        taken = accept.log() < new["log_target"] - state["log_target"]  # not a number is not taken
        state = {n: torch.where(taken.reshape(-1, *[1] * (v.ndim - 1)), new[n], v) for n, v in state.items()}
    return state


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b by entry, one where b is zero."""
    small = b.abs() <= 1e-12 * b.abs().max()
    return torch.where(small, torch.ones_like(a), a / torch.where(small, torch.ones_like(b), b))


def _close(a: Tensor, b: Tensor, rtol: float) -> bool:
    return bool((a - b).norm() <= rtol * (a.norm() + b.norm() + torch.finfo(a.dtype).tiny))


def _nuisance(program: Program) -> tuple[str, ...]:
    """Names of the latents to carry."""
    sites: list[str] = diffusion_sites(program)
    names = tuple(n for n in program.latents if n not in sites)
    discrete = [n for n in names if program.sites[n].discrete]
    if discrete:
        raise CapabilityError(
            f"sites {discrete} are discrete, and only continuous parameters are carried; use ppl.Gibbs"
        )
    if not names:
        raise CapabilityError("the program has no latent beside its diffusion sites; use inverse.TwistedSMC")
    return names
