"""A linear Gaussian form read off a program: y ~ N(A x + b, R) for every observed site.

A is the operator that the model calls when there is one, found by watching the model run and checked at probes, or else
the identity, a matrix or a function; b is the mean at zero, and R must be the same at all probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from inverse import operators
from inverse.gaussian_likelihood import GaussianLikelihood, stacked
from inverse.operators import (
    Compose,
    Dense,
    Diagonal,
    FunctionOperator,
    Identity,
    LinearOperator,
    Mask,
    Zero,
    adjoint_error,
    beside,
    record_calls,
)
from inverse.operators.algebra import Scaled
from inverse.operators.base import DENSE_LIMIT
from inverse.operators.calls import CallRecord
from ppl.errors import CapabilityError, DataError, ProgramError
from ppl.sites import unwrap

if TYPE_CHECKING:
    from inverse.likelihood import Likelihood

__all__ = ["NotGaussian", "mean_and_noise", "read_gaussian"]

PROBE_RTOL = {torch.float64: 1e-7, torch.float32: 2e-3}
ADJOINT_RTOL = 1e-3  # rounding of single precision leaves 1e-6, a wrong adjoint about 1 / sqrt(size) or more


class NotGaussian(Exception):
    """Says why a likelihood has no linear Gaussian form."""


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
            first = likelihood.observe(x)
        with torch.no_grad():
            second, origin = likelihood.observe(x_2), likelihood.observe(torch.zeros_like(x))
        return cls(likelihood, x, x_2, (first, second, origin), calls)

    def means(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Means of an observed site at the three points."""
        first, second, origin = (mean_and_noise(name, run.nodes[name])[0] for run in self.runs)
        return first, second, origin


def read_gaussian(likelihood: Likelihood) -> GaussianLikelihood:
    """Find A, b and R of every observed site, check them at probes, whiten and stack."""
    x, zero, x_2 = likelihood.probes()
    whole = _Reading.of(likelihood, x, x_2)
    if any(n["type"] == "sample" and isinstance(unwrap(n["fn"]), dist.Unit) for n in whole.runs[0].nodes.values()):
        raise NotGaussian("the program has a pyro.factor, whose form is not known")
    alone: list[_Reading] = []
    if len(likelihood.sites) > 1:  # each site on its own, the others at zero
        points, points_2, at_zero = likelihood.split(x), likelihood.split(x_2), likelihood.split(zero)
        for name in likelihood.sites:
            others = {n: v for n, v in at_zero.items() if n != name}
            single = replace(likelihood, sites=(name,), given={**likelihood.given, **others})
            alone.append(_Reading.of(single, points[name], points_2[name]))
    parts = [_read_site(name, whole, alone) for name in likelihood.program.observed]
    return parts[0] if len(parts) == 1 else stacked(parts)


def mean_and_noise(name: str, node: Any) -> tuple[Tensor, Tensor, bool]:
    """Mean (*shape), and standard deviations (*shape) or a Cholesky factor, of one observed site."""
    fn = unwrap(node["fn"])
    shape = node["value"].shape
    if isinstance(fn, dist.Normal):
        return fn.loc.expand(shape), fn.scale.expand(shape), True
    if isinstance(fn, dist.MultivariateNormal) and not fn.batch_shape:
        return fn.loc.expand(shape), fn.scale_tril, False
    raise NotGaussian(f"observed site {name!r} is {type(fn).__name__}")


def _read_site(name: str, whole: _Reading, alone: list[_Reading]) -> GaussianLikelihood:
    """One observed site in linear Gaussian form."""
    likelihood, node = whole.likelihood, whole.runs[0].nodes[name]
    mean, noise, diagonal = mean_and_noise(name, node)
    noise_2 = mean_and_noise(name, whole.runs[1].nodes[name])[1]
    offset = whole.means(name)[2]
    if not torch.allclose(noise, noise_2):
        raise NotGaussian(f"the noise of {name!r} depends on {likelihood.site!r}")
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
            raise NotGaussian(f"{name!r} has correlated noise under a mask or a scale, which have no common form")
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
        raise NotGaussian(f"the mean of {name!r} is linear in each of {whole.likelihood.site}, but not in all at once")
    return row


def _operator(name: str, reading: _Reading) -> LinearOperator:
    """The linear part of the mean: the operator that was called, the identity, a matrix, or a function."""
    likelihood, calls = reading.likelihood, reading.calls
    x, x_2 = reading.x, reading.x_2
    mean, mean_2, offset = reading.means(name)
    rtol = PROBE_RTOL.get(mean.dtype, 1e-3)

    def mean_fn(value: Tensor) -> Tensor:
        return mean_and_noise(name, likelihood.observe(value).nodes[name])[0] - offset

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
            _check_adjoint(candidate, x, calls, name)
            return candidate
    for simple in (Identity(tuple(x.shape)), Zero(tuple(x.shape), tuple(mean.shape))):
        if agrees(simple):
            return simple

    mixed = 0.7 * x - 1.9 * x_2
    with torch.no_grad():
        linear = _close(mean_fn(mixed), 0.7 * (mean - offset) - 1.9 * (mean_2 - offset), 10 * rtol)
        linear = linear and _close(far, 100 * (mean - offset), 10 * rtol)
    if not linear:
        raise NotGaussian(f"the mean of {name!r} is not linear in {likelihood.site!r}")
    if x.numel() * mean.numel() <= DENSE_LIMIT:
        try:
            matrix = torch.func.jacrev(mean_fn)(torch.zeros_like(x)).reshape(mean.numel(), x.numel())
        except RuntimeError as error:
            raise CapabilityError(
                f"the mean of observed site {name!r} cannot be differentiated by torch "
                f"({str(error).splitlines()[0]}); write it with torch operations, without numpy"
            ) from error
        return Dense(matrix.detach(), in_shape=tuple(x.shape), out_shape=tuple(mean.shape))
    return FunctionOperator(mean_fn, tuple(x.shape), linear=True, dtype=x.dtype)


def _check_adjoint(candidate: LinearOperator, x: Tensor, calls: list[CallRecord], name: str) -> None:
    """Refuse a wrong adjoint in an operator of the user's own, which every guide would quietly follow."""
    kinds = [type(part) for r in calls for part in r.operator.modules() if isinstance(part, LinearOperator)]
    own = {kind.__name__ for kind in kinds if getattr(operators, kind.__name__, None) is not kind}
    if not own:
        return
    error = adjoint_error(candidate, torch.Generator(x.device).manual_seed(0), dtype=x.dtype)
    if error > ADJOINT_RTOL:
        raise DataError(
            f"the adjoint of the operator behind {name!r} is not its transpose: <A x, y> and <x, A^T y> differ by "
            f"{error:.1e} of their size; correct the adjoint of {' or '.join(sorted(own))} "
            "(inverse.operators.adjoint_error measures it)"
        )


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
