"""The contract of a guide as one check, for the guides here and for your own.

Shapes, batches, one denoiser call, inputs left alone, the same values whatever the batch, the gradient of the twist,
and the exact posterior mean and evidence where the guide claims them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inverse.guides.base import BoundGuide, Guide, Guided
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from sde import count_calls

__all__ = ["check_guide", "exact_guidance", "holds"]


def _isotropic(problem: DiffusionProblem) -> bool:
    """One component with covariance data_std^2 I."""
    prior = problem.prior
    if "gaussian" not in prior.capabilities:
        return False
    matrix = prior.covariance_matrix
    return torch.allclose(matrix, prior.data_std**2 * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


CONDITIONS: dict[str, Callable[[DiffusionProblem], bool]] = {
    "gaussian_prior": lambda problem: "gaussian" in problem.prior.capabilities,
    "isotropic_prior": _isotropic,
    "linear_gaussian_likelihood": lambda problem: problem.likelihood.is_gaussian,
}


def holds(conditions: tuple[str, ...], problem: DiffusionProblem) -> bool:
    """Whether all of these conditions hold for a problem; false for no conditions, which claim nothing.

    Example:
        >>> holds((), None)
        False
    """
    return bool(conditions) and all(CONDITIONS[name](problem) for name in conditions)


def exact_guidance(problem: DiffusionProblem, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """E[x_0 | x, y] (lanes, *event) and log p(y | x) (lanes,), for a prior that conditions on linear data; no plates.

    x is one more measurement of x_0, with noise sigma: p(y | x) = p(y, x) / p(x).
    """
    gaussian, prior = problem.likelihood.gaussian, problem.prior
    d, m = prior.event_shape.numel(), gaussian.size
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    both = torch.cat([gaussian.operator.dense(dtype=x.dtype), eye])
    noise = torch.cat([x.new_ones(m), x.new_full((d,), sigma**2)])
    means, evidence = [], []
    for row in x.reshape(len(x), d):
        data = torch.cat([gaussian.data.reshape(-1).to(x), row])
        means.append(prior.condition_linear(both, data, noise).mean)
        evidence.append(prior.log_evidence(both, data, noise) - prior.log_evidence(eye, row, sigma**2))
    # The whitened evidence has unit noise; the normaliser of the likelihood brings back the units of the data.
    unit = gaussian.log_normaliser + 0.5 * m * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    return torch.stack(means), torch.stack(evidence) + unit.to(x)


def check_guide(
    guide: Guide,
    problem: DiffusionProblem,
    generator: torch.Generator,
    *,
    sigma: float | None = None,
    rtol: float = 1e-8,
) -> None:
    """Check everything that a guide promises, at one noise level of a problem with a float64 prior.

    Args:
        guide: options; it is bound here.
        problem: without plates, if the guide claims to be exact for it.
        generator: draws the points.
        sigma: noise level; the prior's `data_std` when None.
        rtol: largest error relative to the largest entry.

    Raises:
        AssertionError: that names the broken promise.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl
        >>> from inverse.guides import MomentMatchingGuide
        >>> from sde import GaussianMixture
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> prior = GaussianMixture(one, torch.zeros(1, 2, dtype=torch.float64), one)
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)
        >>> problem = DiffusionProblem.of(ppl.Program(model, torch.tensor(1.0, dtype=torch.float64)))
        >>> check_guide(MomentMatchingGuide(), problem, torch.Generator().manual_seed(0))
    """
    sigma = problem.prior.data_std if sigma is None else sigma
    cost = Cost()
    bound = guide.bind(problem, cost)
    if guide.acts_in not in ("denoiser", "step"):
        raise AssertionError(f'acts_in is {guide.acts_in!r}, expected "denoiser" or "step"')
    x = problem.prior.start(problem.noise(5, generator), sigma)
    level = torch.tensor(sigma, dtype=torch.float64)
    before, global_state = x.clone(), torch.get_rng_state()
    with count_calls(problem.prior) as count:
        guided = bound(x, level, level / 2)
    if (count.calls, count.evals) != (1, 5 * x[0].numel() // problem.prior.event_shape.numel()):
        raise AssertionError(f"one denoiser call for all lanes was promised, got {count.calls} of {count.evals} rows")
    if not torch.equal(x, before):
        raise AssertionError("the guide changed x in place")
    if not torch.equal(torch.get_rng_state(), global_state):
        raise AssertionError("the guide drew from the global random state")
    _check_shapes(guided, x)
    _close(guided.prior, problem.prior.denoise(x, level), "prior = D(x, sigma)", rtol)
    again = bound(x, level, level / 2)
    for lanes in (slice(0, 0), slice(0, 1), slice(1, 4)):
        part = bound(x[lanes], level, level / 2)
        _check_shapes(part, x[lanes])
        for name in ("prior", "posterior", "log_twist"):
            _close(getattr(part, name), getattr(again, name)[lanes], f"{name} is the same whatever the batch", rtol)
    if getattr(bound, "gradient", guide.gradient) and _gradient_is_due(guide, problem):
        _check_gradient(bound, x, level, generator)
    if holds(guide.exact_when, problem):
        mean, log_twist = exact_guidance(problem, x, sigma)
        _close(guided.posterior, mean, "posterior = E[x_0 | x, y]", rtol)
        _close(guided.log_twist, log_twist, "log_twist = log p(y | x)", rtol)


def _gradient_is_due(guide: Guide, problem: DiffusionProblem) -> bool:
    """Moments that depend on x add terms to the gradient; a Gaussian prior has none."""
    return CONDITIONS["gaussian_prior"](problem) or (
        guide.acts_in == "denoiser" and "gaussian_prior" not in (guide.exact_when)
    )


def _check_shapes(guided: Guided, x: Tensor) -> None:
    for name, value, shape in (
        ("prior", guided.prior, x.shape),
        ("posterior", guided.posterior, x.shape),
        ("log_twist", guided.log_twist, x.shape[:1]),
    ):
        if value.shape != shape or value.dtype != x.dtype or value.device != x.device:
            raise AssertionError(
                f"{name} is {tuple(value.shape)} {value.dtype} on {value.device}, expected {tuple(shape)} {x.dtype} "
                f"on {x.device}"
            )
        if value.requires_grad:
            raise AssertionError(f"{name} drags a gradient along; evaluate under torch.no_grad()")
    for name, value in (guided.state or {}).items():
        if value.shape[:1] != x.shape[:1]:
            raise AssertionError(f"state {name!r} lacks the leading lane axis: {tuple(value.shape)}")


def _check_gradient(bound: BoundGuide, x: Tensor, sigma: Tensor, generator: torch.Generator) -> None:
    """(posterior - prior) . v = sigma^2 d/dh log_twist(x + h v), by central differences."""
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    h = 1e-4 * float(sigma)
    guided = bound(x, sigma, sigma / 2)
    slope = (bound(x + h * v, sigma, sigma / 2).log_twist - bound(x - h * v, sigma, sigma / 2).log_twist) / (2 * h)
    moved = ((guided.posterior - guided.prior) * v).flatten(1).sum(1)
    _close(moved, float(sigma) ** 2 * slope, "posterior - prior = sigma^2 grad log_twist", 1e-5)


def _close(found: Tensor, expected: Tensor, what: str, rtol: float) -> None:
    if found.numel() == 0:
        return
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= rtol * max(scale, 1e-6):
        raise AssertionError(
            f"{what}: largest difference {error:.2e} at scale {scale:.2e}, allowed {rtol:.0e} relative"
        )
