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
    Zero,
    beside,
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
    """Density of the data as a function of one site, or of several joined into one vector, all others being given.

    Args:
        program: the program it was read from.
        sites: the latent sites it is a function of, in program order.
        given: values of all other latents, one draw each, without a leading axis.
    """

    program: Program
    sites: tuple[str, ...]
    given: Mapping[str, Tensor]

    @property
    def site(self) -> str:
        """Name of the site, or all names, for messages."""
        return " + ".join(self.sites)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shape of one value of every site, plates first."""
        return [self.program.sites[n].shape for n in self.sites]

    @property
    def shape(self) -> torch.Size:
        """Shape of one value of the site; several are flattened and joined."""
        return self.shapes[0] if len(self.sites) == 1 else torch.Size([sum(s.numel() for s in self.shapes)])

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Values by site: (*batch, *shape) -> (*batch, *shape of the site)."""
        if len(self.sites) == 1:
            return {self.sites[0]: x}
        pieces = x.split([s.numel() for s in self.shapes], -1)
        return {
            n: piece.reshape(*x.shape[:-1], *shape)
            for n, piece, shape in zip(self.sites, pieces, self.shapes, strict=True)
        }

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Values of all latents for a batch of x (lanes, *shape)."""
        return {**self.split(x), **{n: v.expand(len(x), *v.shape) for n, v in self.given.items()}}

    def distributions(self) -> list[Any]:
        """The prior of every site, given the values of the others."""
        fixed = all(self.program.sites[n].static for n in self.sites) or not self.given
        if fixed:
            return [unwrap(self.program.sites[n].distribution) for n in self.sites]
        zero = torch.zeros(self.shape, dtype=self.program.dtype, device=self.program.device)
        with torch.no_grad():
            nodes = observe(self, zero, scored=True).nodes
        return [unwrap(nodes[n]["fn"]) for n in self.sites]

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
    """The likelihood of the diffusion site of a program, or of all of them together.

    Args:
        program: a program with a latent site that can be denoised.
        site: its name; None takes all diffusion sites that have no value in `given`.
        given: values of the other latents, for programs that have any.

    Raises:
        CapabilityError: no site can be denoised, other latents have no value, or the priors of the sites depend on
            each other.
        ProgramError: a plate is subsampled.

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
    from ppl.mcmc.target import refuse_subsampling

    refuse_subsampling(program, "a guided backend")
    given = dict(given or {})
    found = diffusion_sites(program)
    sites = tuple(n for n in found if n not in given) if site is None else (site,)
    if not sites:
        raise CapabilityError(
            f"expected a latent site with a diffusion prior, found {found or 'none'} among {list(program.latents)}; "
            "generic engines such as ppl.NUTS need none"
        )
    others = [n for n in program.latents if n not in sites]
    missing = [n for n in others if n not in given]
    if missing:
        raise CapabilityError(
            f"a guided backend draws {list(sites)} alone, but the program has other latents {missing}; carry them on "
            f"particles, inverse.NuisanceSMC(), give each a block, ppl.Gibbs({{({sites[0]!r},): ..., "
            f"({missing[0]!r},): ...}}), run ppl.NoiseSpace(engine) on all of them, or fix them with pyro.condition"
        )
    likelihood = Likelihood(program, sites, {n: given[n] for n in others})
    _check_independent(likelihood)
    return likelihood


def _check_independent(likelihood: Likelihood) -> None:
    """Raise CapabilityError where the prior of a site or of a given latent moves with the diffusion sites."""
    program = likelihood.program
    several = likelihood.sites if len(likelihood.sites) > 1 else ()
    moving = [n for n in (*several, *likelihood.given) if not program.sites[n].static]
    if not moving:
        return
    first, _, second = _probes(likelihood)
    with torch.no_grad():
        runs = [observe(likelihood, x, scored=True).nodes for x in (first, second)]
        for name in moving:
            if name in likelihood.given:
                one, other = (nodes[name]["fn"].log_prob(likelihood.given[name]) for nodes in runs)
            else:
                value = likelihood.split(first)[name]
                one, other = (unwrap(n[name]["fn"]).denoise(value, unwrap(n[name]["fn"]).data_std) for n in runs)
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-6):
                raise CapabilityError(
                    f"the prior of {name!r} depends on {likelihood.site}, so that the likelihood alone does not say "
                    "what a draw is worth; run ppl.NoiseSpace(engine) on all sites"
                )


def _probes(likelihood: Likelihood) -> tuple[Tensor, Tensor, Tensor]:
    """A point of the size of the prior, zero, and another point, each (*shape)."""
    program = likelihood.program
    generator = torch.Generator(program.device).manual_seed(0)
    priors = [unwrap(program.sites[n].distribution) for n in likelihood.sites]
    dtype = getattr(priors[0], "dtype", program.dtype)

    def draw() -> Tensor:
        parts = [
            float(getattr(prior, "data_std", 1.0))
            * torch.randn(tuple(shape), generator=generator, dtype=dtype, device=program.device)
            for prior, shape in zip(priors, likelihood.shapes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat([p.flatten() for p in parts])

    first, second = draw(), draw()
    return first, torch.zeros_like(first), second


@dataclass(frozen=True)
class _Reading:
    """Runs of the program at two points and at zero, from which linear forms are read.

    Args:
        likelihood: of the sites that were varied.
        x: the first point; `x_2` the second.
        runs: Pyro's traces at the first point, at the second and at zero.
        calls: operator calls of the first run.
    """

    likelihood: Likelihood
    x: Tensor
    x_2: Tensor
    runs: tuple[Any, Any, Any]
    calls: list[CallRecord]

    @classmethod
    def of(cls, likelihood: Likelihood, x: Tensor, x_2: Tensor) -> _Reading:
        with torch.no_grad(), record_calls() as calls:
            first = observe(likelihood, x)
        with torch.no_grad():
            second, origin = observe(likelihood, x_2), observe(likelihood, torch.zeros_like(x))
        return cls(likelihood, x, x_2, (first, second, origin), calls)

    def means(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Means of an observed site at the three points."""
        first, second, origin = (mean_and_noise(name, run.nodes[name])[0] for run in self.runs)
        return first, second, origin


def _read_gaussian(likelihood: Likelihood) -> GaussianLikelihood:
    """Find A, b and R of every observed site, check them at probes, whiten and stack."""
    x, zero, x_2 = _probes(likelihood)
    whole = _Reading.of(likelihood, x, x_2)
    if any(n["type"] == "sample" and isinstance(unwrap(n["fn"]), dist.Unit) for n in whole.runs[0].nodes.values()):
        raise _NotGaussian("the program has a pyro.factor, whose form is not known")
    alone: list[_Reading] = []
    if len(likelihood.sites) > 1:  # each site on its own, the others at zero
        points, points_2, at_zero = likelihood.split(x), likelihood.split(x_2), likelihood.split(zero)
        for name in likelihood.sites:
            others = {n: v for n, v in at_zero.items() if n != name}
            single = Likelihood(likelihood.program, (name,), {**likelihood.given, **others})
            alone.append(_Reading.of(single, points[name], points_2[name]))
    parts = [_read_site(name, whole, alone) for name in likelihood.program.observed]
    return parts[0] if len(parts) == 1 else _stack(parts)


def observe(likelihood: Likelihood, x: Tensor, scored: bool = False) -> Any:
    """Pyro's trace of one run with the sites set to x; their distributions are in it only when scored."""
    from ppl.trace import Run

    values = {**likelihood.split(x), **likelihood.given}
    run = Run(values=values, unscored=frozenset() if scored else frozenset(values))
    return likelihood.program.trace_one({}, likelihood.program.shared_inputs(), run)[0]


def mean_and_noise(name: str, node: Any) -> tuple[Tensor, Tensor, bool]:
    """Mean (*shape), and standard deviations (*shape) or a Cholesky factor, of one observed site."""
    fn = unwrap(node["fn"])
    shape = node["value"].shape
    if isinstance(fn, dist.Normal):
        return fn.loc.expand(shape), fn.scale.expand(shape), True
    if isinstance(fn, dist.MultivariateNormal) and not fn.batch_shape:
        return fn.loc.expand(shape), fn.scale_tril, False
    raise _NotGaussian(f"observed site {name!r} is {type(fn).__name__}")


def _read_site(name: str, whole: _Reading, alone: list[_Reading]) -> GaussianLikelihood:
    """One observed site in linear Gaussian form."""
    likelihood, node = whole.likelihood, whole.runs[0].nodes[name]
    mean, noise, diagonal = mean_and_noise(name, node)
    noise_2 = mean_and_noise(name, whole.runs[1].nodes[name])[1]
    offset = whole.means(name)[2]
    if not torch.allclose(noise, noise_2):
        raise _NotGaussian(f"the noise of {name!r} depends on {likelihood.site!r}")
    if bool((noise <= 0).any()) if diagonal else bool((noise.diagonal(dim1=-2, dim2=-1) <= 0).any()):
        raise DataError(f"the noise level of {name!r} must be positive, got {float(noise.min()):.4g}")
    operator = _row(name, whole, alone) if alone else _operator(name, whole)
    if operator.out_shape != tuple(mean.shape):
        raise ProgramError(f"operator of {name!r} returns {operator.out_shape}, its site has {tuple(mean.shape)}")
    data = node["value"] - offset
    if not diagonal:
        _check_scaled(name, noise)
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


def _check_scaled(name: str, factor: Tensor) -> None:
    """Raise DataError where the noise covariance L L^T is singular to rounding."""
    values = torch.linalg.svdvals(factor.double())
    least = torch.finfo(factor.dtype).eps * len(values)
    if not float(values[-1]) ** 2 > least * float(values[0]) ** 2:
        raise DataError(
            f"the noise covariance of {name!r} is rank-deficient or badly scaled: its standard deviations run from "
            f"{float(values[-1]):.3g} to {float(values[0]):.3g}, too far apart for {factor.dtype}; drop data that are "
            "combinations of others, add a little independent noise, bring the data to one scale, or use float64"
        )


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


def _row(name: str, whole: _Reading, alone: list[_Reading]) -> LinearOperator:
    """The linear part of the mean in several sites at once: [A_1 A_2 ...], each found with the others at zero."""
    row = beside(*(_operator(name, reading) for reading in alone))
    mean, mean_2, offset = whole.means(name)
    rtol = 10 * PROBE_RTOL.get(mean.dtype, 1e-3)
    if not (_close(row(whole.x), mean - offset, rtol) and _close(row(whole.x_2), mean_2 - offset, rtol)):
        raise _NotGaussian(f"the mean of {name!r} is linear in each of {whole.likelihood.site}, but not in all at once")
    return row


def _operator(name: str, reading: _Reading) -> LinearOperator:
    """The linear part of the mean: the operator that was called, the identity, a matrix, or a function."""
    likelihood, calls = reading.likelihood, reading.calls
    x, x_2 = reading.x, reading.x_2
    mean, mean_2, offset = reading.means(name)
    rtol = PROBE_RTOL.get(mean.dtype, 1e-3)

    def mean_fn(value: Tensor) -> Tensor:
        return mean_and_noise(name, observe(likelihood, value).nodes[name])[0] - offset

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
    for simple in (Identity(tuple(x.shape)), Zero(tuple(x.shape), tuple(mean.shape))):
        if agrees(simple):
            return simple

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
