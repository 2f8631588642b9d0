"""The loop over noise levels, written once for all solvers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sde.covariance import TweedieCovariance
from sde.solvers.transition import Solver, State

__all__ = ["sample"]


def sample(
    solver: Solver,
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    generator: torch.Generator | None = None,
    *,
    covariance: Callable[[Tensor, Tensor], TweedieCovariance] | None = None,
) -> Tensor:
    """Carry x from sigmas[0] to sigmas[-1] with one solver step per interval.

    Args:
        solver: the step.
        denoiser: (x, sigma) -> E[x_0 | x]; a guided one samples the posterior.
        x: (*batch, *event) at noise level sigmas[0], with at least one batch axis.
        sigmas: (steps + 1,) descending noise levels.
        generator: source of the noise; None takes torch's global one. Unused by deterministic solvers.
        covariance: (x, sigma) -> Cov[x_0 | x], for solvers that need it; its `mean` replaces the call of the denoiser.

    Returns:
        (*batch, *event) at noise level sigmas[-1].

    Raises:
        ValueError: if the grid does not descend, or a covariance is needed and missing.

    Example:
        >>> from sde.schedule import log_grid
        >>> from sde.solvers import DDIM
        >>> normal = lambda x, sigma: x / (1 + sigma**2)
        >>> x = sample(DDIM(), normal, 100 * torch.ones(1, 2, dtype=torch.float64), log_grid(100.0, 0.01, 400))
        >>> bool((x - 1).abs().max() < 0.02)
        True
    """
    sigmas = torch.as_tensor(sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2 or bool((sigmas.diff() >= 0).any()) or bool(sigmas[-1] < 0):
        raise ValueError(f"expected a descending 1-d grid of noise levels, zero or more, got {sigmas}")
    sigmas = sigmas.to("cpu", torch.float64)
    needs_covariance = getattr(solver, "needs_covariance", False)
    if needs_covariance and covariance is None:
        raise ValueError(f"{solver} needs covariance=prior.covariance; without one use DPMSolver2MSDE")
    state: State = None
    for a, b in pairwise(sigmas):
        if needs_covariance and covariance is not None:
            operator = covariance(x, a)
            move = solver.step(x, a, b, operator.mean, state, covariance=operator)
        else:
            move = solver.step(x, a, b, denoiser(x, a), state, denoiser=denoiser)
        quiet = isinstance(move.covariance, Tensor) and float(move.covariance) == 0
        if solver.stochastic and not quiet:
            device = x.device if generator is None else generator.device
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
            x = move.sample(noise)
        else:
            x = move.mean
        state = move.state
    return x
