"""What a guide needs to know of the data, read off the program.

A Gaussian likelihood y ~ N(A x + b, R) is whitened once: with L L^T = R,  B = L^{-1} A  and  d = L^{-1} (y - b),

    log p(y | x) = -|d - B x|^2 / 2 - log|2 pi R| / 2,

so that every guide and every particle engine works with unit noise. A is the operator that the model calls when there
is one (found by watching the model run, and checked at probes), or else a matrix or a function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from inverse.operators import (
    Compose,
    Dense,
    Diagonal,
    FunctionOperator,
    Identity,
    LinearOperator,
    Mask,
    record_calls,
    stack,
)
from inverse.operators.algebra import Scaled
from inverse.operators.base import DENSE_LIMIT, CallRecord
from ppl.errors import CapabilityError, DataError, ProgramError
from ppl.program import Program
from ppl.sites import unwrap

__all__ = ["GaussianLikelihood", "Likelihood", "diffusion_sites", "read_likelihood"]

PROBE_RTOL = {torch.float64: 1e-7, torch.float32: 2e-3}


@dataclass(frozen=True)
class GaussianLikelihood:
    """A whitened linear Gaussian likelihood, d ~ N(B x, I).

    Args:
        operator: B, from the shape of the site to the shape of d.
        data: d, (*out_shape).
        log_normaliser: -log|2 pi R| / 2 (times the factor of a `poutine.scale`), 0-d.
        measured: A before whitening, for pictures and pseudo-inverses.
        stddev: standard deviation of the noise, (*out_shape), or None when the noise is correlated.
    """

    operator: LinearOperator
    data: Tensor
    log_normaliser: Tensor
    measured: LinearOperator
    stddev: Tensor | None

    @property
    def size(self) -> int:
        """Number of measurements."""
        return self.data.numel()

    def residual(self, x: Tensor) -> Tensor:
        """d - B x: (*batch, *site) -> (*batch, *out_shape)."""
        return self.data - self.operator(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x): (*batch, *site) -> (*batch)."""
        r = self.residual(x)
        return self.log_normaliser - 0.5 * r.square().reshape(*r.shape[: r.ndim - self.data.ndim], self.size).sum(-1)


@dataclass(frozen=True)
class Likelihood:
    """Density of the data as a function of one site, all other latents being given.

    Args:
        program: the program it was read from.
        site: the latent site it is a function of.
        given: values of all other latents, one draw each, without a leading axis.
    """

    program: Program
    site: str
    given: Mapping[str, Tensor]

    @property
    def shape(self) -> torch.Size:
        """Shape of one value of the site."""
        return self.program.sites[self.site].shape

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Values of all latents for a batch of x (lanes, *shape)."""
        return {self.site: x, **{n: v.expand(len(x), *v.shape) for n, v in self.given.items()}}

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x), (lanes, *shape) -> (lanes,); differentiable where gradients are recorded."""
        if self._gaussian is not None:
            return self._gaussian.log_prob(x)
        if len(x) == 0:  # a graph is made for a positive number of lanes
            return x.new_zeros(0)
        return self.program.log_likelihood(self.values(x))

    @property
    def gaussian(self) -> GaussianLikelihood:
        """The linear Gaussian form.

        Raises:
            CapabilityError: the likelihood is not Gaussian, or its mean is not linear in the site.
        """
        if self._gaussian is None:
            raise CapabilityError(
                f"this backend needs data that are linear in {self.site!r} with Gaussian noise, but {self._why_not}; "
                "use one that takes any differentiable likelihood, such as inverse.DPS or ppl.NoiseSpace(ppl.HMC())"
            )
        return self._gaussian

    @property
    def is_gaussian(self) -> bool:
        """Whether `gaussian` exists."""
        return self._gaussian is not None

    @cached_property
    def _reading(self) -> tuple[GaussianLikelihood | None, str]:
        try:
            return _read_gaussian(self), ""
        except _NotGaussian as reason:
            return None, str(reason)

    @property
    def _gaussian(self) -> GaussianLikelihood | None:
        return self._reading[0]

    @property
    def _why_not(self) -> str:
        return self._reading[1]


class _NotGaussian(Exception):
    """Says why a likelihood has no linear Gaussian form."""


def diffusion_sites(program: Program) -> list[str]:
    """Names of the latent sites that can be denoised."""
    return [n for n, c in program.capabilities.items() if "denoiser" in c]


def read_likelihood(program: Program, site: str | None = None, given: Mapping[str, Tensor] | None = None) -> Likelihood:
    """The likelihood of the diffusion site of a program.

    Args:
        program: a program with a latent site that can be denoised.
        site: its name; may be left out when there is only one.
        given: values of the other latents, for programs that have any.

    Raises:
        CapabilityError: no site can be denoised, several can and none was named, or other latents have no value.

    Example:
        >>> import pyro
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., :1], 0.5).to_event(1), obs=y)
        >>> read_likelihood(Program(model, torch.tensor([1.0]))).gaussian.operator.dense()
        tensor([[2., 0.]], dtype=torch.float64)
    """
    sites = diffusion_sites(program)
    if site is None:
        if len(sites) != 1:
            raise CapabilityError(
                f"expected one latent site with a diffusion prior, found {sites or 'none'} among "
                f"{list(program.latents)}; " + ("name one" if sites else "generic engines such as ppl.NUTS need none")
            )
        site = sites[0]
    others = {n for n in program.latents if n != site}
    given = dict(given or {})
    missing = sorted(others - set(given))
    if missing:
        raise CapabilityError(
            f"a guided backend draws {site!r} alone, but the program has other latents {missing}; give each a block, "
            f"ppl.Gibbs({{({site!r},): ..., {tuple(missing)!r}: ...}}), run ppl.NoiseSpace(engine) on all of them, or "
            "fix them with pyro.condition"
        )
    return Likelihood(program, site, {n: given[n] for n in others})


def _read_gaussian(likelihood: Likelihood) -> GaussianLikelihood:
    """Find A, b and R of every observed site, check them at probes, whiten and stack."""
    program, site = likelihood.program, likelihood.site
    dtype = getattr(unwrap(program.sites[site].distribution), "dtype", program.dtype)
    generator = torch.Generator(program.device).manual_seed(0)
    scale = float(getattr(unwrap(program.sites[site].distribution), "data_std", 1.0))
    shape = tuple(likelihood.shape)

    def draw() -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=dtype, device=program.device)

    first, second, zero = draw(), draw(), torch.zeros(shape, dtype=dtype, device=program.device)
    with torch.no_grad(), record_calls() as calls:
        trace = _observe(likelihood, first)
    if any(n["type"] == "sample" and isinstance(unwrap(n["fn"]), dist.Unit) for n in trace.nodes.values()):
        raise _NotGaussian("the program has a pyro.factor, whose form is not known")
    with torch.no_grad():
        again, origin = _observe(likelihood, second), _observe(likelihood, zero)
    parts = [
        _read_site(name, likelihood, (first, trace), (second, again), origin.nodes[name], calls)
        for name in program.observed
    ]
    return parts[0] if len(parts) == 1 else _stack(parts)


def _observe(likelihood: Likelihood, x: Tensor) -> Any:
    """Pyro's trace of one run with the site set to x."""
    from ppl.trace import Run

    values = {likelihood.site: x, **likelihood.given}
    run = Run(values=values, unscored=frozenset(values))
    return likelihood.program.trace_one({}, likelihood.program.shared_inputs(), run)[0]


def _mean_and_noise(name: str, node: Any) -> tuple[Tensor, Tensor, bool]:
    """Mean (*shape), and standard deviations (*shape) or a Cholesky factor, of one observed site."""
    fn = unwrap(node["fn"])
    shape = node["value"].shape
    if isinstance(fn, dist.Normal):
        return fn.loc.expand(shape), fn.scale.expand(shape), True
    if isinstance(fn, dist.MultivariateNormal) and not fn.batch_shape:
        return fn.loc.expand(shape), fn.scale_tril, False
    raise _NotGaussian(f"observed site {name!r} is {type(fn).__name__}")


def _read_site(
    name: str,
    likelihood: Likelihood,
    first: tuple[Tensor, Any],
    second: tuple[Tensor, Any],
    origin: Any,
    calls: list[CallRecord],
) -> GaussianLikelihood:
    """One observed site in linear Gaussian form."""
    node = first[1].nodes[name]
    mean, noise, diagonal = _mean_and_noise(name, node)
    mean_2, noise_2, _ = _mean_and_noise(name, second[1].nodes[name])
    offset, _, _ = _mean_and_noise(name, origin)
    if not torch.allclose(noise, noise_2):
        raise _NotGaussian(f"the noise of {name!r} depends on {likelihood.site!r}")
    if bool((noise <= 0).any()) if diagonal else bool((noise.diagonal(dim1=-2, dim2=-1) <= 0).any()):
        raise DataError(f"the noise level of {name!r} must be positive, got {float(noise.min()):.4g}")
    operator = _operator(name, likelihood, first, second, (mean, mean_2, offset), calls)
    if operator.out_shape != tuple(mean.shape):
        raise ProgramError(f"operator of {name!r} returns {operator.out_shape}, its site has {tuple(mean.shape)}")
    data = node["value"] - offset
    if not diagonal:
        weights, keep = _scaled_and_masked(torch.ones_like(mean), node)
        if keep is not None or bool((weights != 1).any()):
            raise _NotGaussian(f"{name!r} has correlated noise under a mask or a scale, which have no common form")
        white = Dense(torch.linalg.inv(noise))
        log_normaliser = -noise.diagonal().log().sum() - 0.5 * data.numel() * math.log(2 * math.pi)
        return GaussianLikelihood(Compose(white, operator), white(data), log_normaliser, operator, None)
    # poutine.scale multiplies the whole log density, the normaliser of the noise as it was before included.
    constant = -noise.log() - 0.5 * math.log(2 * math.pi)
    scaled, keep = _scaled_and_masked(noise, node)
    constant, noise = constant * (noise / scaled).square(), scaled
    if keep is not None:
        pick = Mask(keep, tuple(mean.shape))
        operator, data, noise, constant = Compose(pick, operator), pick(data), pick(noise), pick(constant)
    log_normaliser = constant.sum()
    equal = bool((noise == noise.flatten()[0]).all())
    white_operator = Scaled(operator, 1 / noise.flatten()[0]) if equal else Compose(Diagonal(1 / noise), operator)
    return GaussianLikelihood(white_operator, data / noise, log_normaliser, operator, noise)


def _scaled_and_masked(noise: Tensor, node: Any) -> tuple[Tensor, Tensor | None]:
    """Standard deviations after poutine.scale, and which entries count after masks."""
    scale = torch.as_tensor(node["scale"], dtype=noise.dtype, device=noise.device)
    event = [1] * (noise.ndim - len(node["fn"].batch_shape))
    noise = noise / scale.reshape([*scale.shape, *(event if scale.ndim else [])]).sqrt()
    keep: Tensor | None = None
    fn = node["fn"]
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    masks = [node["mask"], getattr(fn, "_mask", None) if isinstance(fn, dist.MaskedDistribution) else None]
    for mask in masks:
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask, device=noise.device)
        mask = mask.reshape(*mask.shape, *event) if mask.ndim == len(node["fn"].batch_shape) else mask
        keep = mask.expand(noise.shape) if keep is None else keep & mask.expand(noise.shape)
    return noise, keep


def _operator(
    name: str,
    likelihood: Likelihood,
    first: tuple[Tensor, Any],
    second: tuple[Tensor, Any],
    means: tuple[Tensor, Tensor, Tensor],
    calls: list[CallRecord],
) -> LinearOperator:
    """The linear part of the mean: the operator that was called, the identity, a matrix, or a function."""
    mean, mean_2, offset = means
    x, x_2 = first[0], second[0]
    rtol = PROBE_RTOL.get(mean.dtype, 1e-3)

    def mean_fn(value: Tensor) -> Tensor:
        return _mean_and_noise(name, _observe(likelihood, value).nodes[name])[0] - offset

    # A large point as well: what saturates looks linear near zero.
    with torch.no_grad():
        far = mean_fn(100 * x)

    def agrees(candidate: LinearOperator) -> bool:
        if candidate.out_shape != tuple(mean.shape):
            return False
        pairs = ((candidate(x), mean - offset), (candidate(x_2), mean_2 - offset), (candidate(100 * x), far))
        return all(_close(a, b, rtol) for a, b in pairs)

    for record in reversed(calls):  # its output may be the mean, or the mean less a constant
        candidate = _called(x, record.output, calls) if record.output.shape == mean.shape else None
        if candidate is not None and agrees(candidate):
            return candidate
    identity = Identity(tuple(x.shape))
    if agrees(identity):
        return identity

    mixed = 0.7 * x - 1.9 * x_2
    with torch.no_grad():
        linear = _close(mean_fn(mixed), 0.7 * (mean - offset) - 1.9 * (mean_2 - offset), 10 * rtol)
        linear = linear and _close(far, 100 * (mean - offset), 10 * rtol)
    if not linear:
        raise _NotGaussian(f"the mean of {name!r} is not linear in {likelihood.site!r}")
    if x.numel() * mean.numel() <= DENSE_LIMIT:
        matrix = torch.func.jacrev(mean_fn)(torch.zeros_like(x)).reshape(mean.numel(), x.numel())
        return Dense(matrix.detach(), in_shape=tuple(x.shape), out_shape=tuple(mean.shape))
    return FunctionOperator(mean_fn, tuple(x.shape), linear=True, dtype=x.dtype)


def _called(x: Tensor, mean: Tensor, calls: list[CallRecord]) -> LinearOperator | None:
    """The chain of linear operator calls that leads from x to the mean, composed; None where there is none."""

    linear = [record for record in calls if record.operator.linear]

    def from_input(target: Tensor, depth: int) -> LinearOperator | None:
        for record in reversed(linear):
            if depth <= len(calls) and record.output.shape == target.shape and torch.equal(record.output, target):
                if record.input.shape == x.shape and torch.equal(record.input, x):
                    return record.operator
                inner = from_input(record.input, depth + 1)
                if inner is not None:
                    return Compose(record.operator, inner)
        return None

    return from_input(mean, 0)


def _close(a: Tensor, b: Tensor, rtol: float) -> bool:
    return bool((a - b).norm() <= rtol * (a.norm() + b.norm() + torch.finfo(a.dtype).tiny))


def _stack(parts: list[GaussianLikelihood]) -> GaussianLikelihood:
    """Several observed sites as one measurement."""
    data = torch.cat([p.data.flatten() for p in parts])
    stddev = None
    if all(p.stddev is not None for p in parts):
        stddev = torch.cat([p.stddev.flatten() for p in parts if p.stddev is not None])
    total = torch.stack([p.log_normaliser for p in parts]).sum()
    white, plain = stack(*(p.operator for p in parts)), stack(*(p.measured for p in parts))
    return GaussianLikelihood(white, data.reshape(white.out_shape), total, plain, stddev)
