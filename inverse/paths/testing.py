r"""Whether a backend is right on a path: its draws and its evidence against the exact posterior of a linear program.

u = L^-1 (X - mean),  L L' = covariance of X given y:      E u_i = 0,   E u_i u_j = [i = j]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.exact import Exact
from inverse.paths.problem import path_site
from ppl.backend import Backend, infer
from ppl.diagnostics.ess import ess_of, kish_ess, z_bound
from ppl.posterior import Posterior
from ppl.program import Program

__all__ = ["check_path_backend"]


def check_path_backend(
    backend: Backend,
    program: Program,
    *,
    draws: int,
    chains: int,
    seed: int = 0,
    alpha: float = 1e-4,
    bias: float = 0.0,
) -> Posterior:
    """Check all means, variances and covariances of the path, and the evidence, against the exact ones.

    Every statistic is judged by its own effective size: that of the roots for particles, of the weights for weighted
    draws, of autocorrelation for chains. A right backend fails with probability `alpha` at most, as far as the
    effective sizes of chains, which are estimates, are right.

    Args:
        backend: an instance of your class.
        program: one linear `sde.Path`, its only latent, with linear data and Gaussian noise.
        draws: per chain.
        chains: independent runs.
        seed: of the run.
        alpha: family-wise false-alarm rate.
        bias: what is allowed beyond Monte-Carlo error, for fits: in standard deviations of the posterior for means, and
            as a part of one for covariances.

    Returns:
        The backend's posterior.

    Raises:
        AssertionError: that names the statistic.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Path, Process
        >>> path = Path(Process(lambda x, t: -x), torch.tensor([0.5, 1.0]).double(), torch.zeros(1).double())
        >>> def model(y):
        ...     x = pyro.sample("x", path)
        ...     pyro.sample("y", dist.Normal(x[:, 0], 0.5).to_event(1), obs=y)
        >>> program = ppl.Program(model, torch.tensor([1.0, 0.2], dtype=torch.float64))
        >>> check_path_backend(Exact(), program, draws=500, chains=2).shape
        (2, 500)
    """
    site = path_site(program)
    exact = infer(program, Exact(), 1, 1, seed)
    law, evidence = exact.guide, exact.log_evidence
    assert law is not None
    assert evidence is not None
    posterior = infer(program, backend, draws, chains, seed)
    gap = posterior.draws[site].double().flatten(2) - law.mean.double().flatten()
    root = torch.linalg.cholesky(law.covariances[0].double())
    u = torch.linalg.solve_triangular(root, gap[..., None], upper=False)[..., 0]
    i, j = torch.triu_indices(u.shape[-1], u.shape[-1]).unbind()
    values = torch.cat([u, u[..., i] * u[..., j]], -1)
    expected = torch.cat([u.new_zeros(u.shape[-1]), (i == j).to(u)])
    spread = torch.cat([u.new_ones(u.shape[-1]), torch.where(i == j, math.sqrt(2.0), 1.0).to(u)])
    mean, sizes = _mean(posterior, values), _sizes(posterior, values)
    z = ((mean - expected).abs() - bias).clamp_min(0) / spread * sizes.sqrt()
    bound = z_bound(alpha, len(z) + 1)
    worst = int(z.argmax())
    if not float(z[worst]) < bound:
        n = u.shape[-1]
        what = f"mean {worst}" if worst < n else f"covariance {int(i[worst - n])}, {int(j[worst - n])}"
        raise AssertionError(
            f"{backend!r}: whitened {what} is {float(mean[worst]):.3f}, expected {float(expected[worst]):.0f}; that is "
            f"{float(z[worst]):.1f} standard errors of {float(sizes[worst]):.0f} draws, {bound:.1f} are allowed"
        )
    found = posterior.log_evidence
    if found is not None and not abs(float(found.value - evidence.value)) < bound * float(found.stderr) + bias + 1e-6:
        raise AssertionError(
            f"{backend!r}: log evidence {float(found.value):.4f} +- {float(found.stderr):.4f}, expected "
            f"{float(evidence.value):.4f}"
        )
    return posterior


def _mean(posterior: Posterior, values: Tensor) -> Tensor:
    """Means of statistics (chain, draw, statistic)."""
    if posterior.log_weight is None:
        return values.mean((0, 1))
    weights = torch.softmax(posterior.log_weight.double().flatten(), 0)
    return weights @ values.flatten(0, 1)


def _sizes(posterior: Posterior, values: Tensor) -> Tensor:
    """Effective number of draws of each statistic."""
    total = values.shape[0] * values.shape[1]
    if posterior.log_weight is not None:
        return torch.full_like(values[0, 0], float(kish_ess(posterior.log_weight.double().flatten())))
    if "root_ess" in posterior.info:  # draws resampled from particles: their own number and the roots both limit them
        return torch.full_like(values[0, 0], 1 / (1 / total + 1 / float(posterior.info["root_ess"].sum())))
    if posterior.attrs["exact"] == "in_the_limit":
        return ess_of(values).clamp(max=total)
    return torch.full_like(values[0, 0], float(total))
