r"""What a guide is: one denoiser evaluation in, the unguided and the guided estimate of x_0 out.

    posterior ~ E[x_0 | x, y] = D(x, sigma) + sigma^2 grad_x log p(y | x),        log_twist ~ log p(y | x)

Guides are frozen dataclasses of options; `bind(problem)` gives the function that samplers and particles call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from inverse.guides.residual import gradient_of
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import CapabilityError
from sde import TweedieCovariance
from sde.jacobian import vector_jacobian

__all__ = ["BoundGuide", "Guide", "Guided", "as_denoiser", "denoise_with_vjp", "likelihood_gradient"]

Level = Tensor | float


@dataclass(frozen=True)
class Guided:
    """What one evaluation of a guide gives, for every lane.

    Args:
        prior: (lanes, *shape) D(x, sigma) = E[x_0 | x].
        posterior: (lanes, *shape) estimate of E[x_0 | x, y].
        log_twist: (lanes,) estimate of log p(y | x), with the normaliser of the likelihood.
        state: what the next evaluation needs: None, or a dict of tensors with a leading lane axis.
        covariance: estimate of Cov[x_0 | x, y], from guides that have one.
    """

    prior: Tensor
    posterior: Tensor
    log_twist: Tensor
    state: dict[str, Tensor] | None = None
    covariance: TweedieCovariance | None = None


@runtime_checkable
class BoundGuide(Protocol):
    """A guide for one problem."""

    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """Evaluate at x (lanes, *shape), noise level sigma (0-d); sigma_next is the level that the step goes to."""
        ...


@runtime_checkable
class Guide(Protocol):
    """Options of a guide.

    Facts, class data or properties:
        exact_when: conditions, all of them, under which `posterior` and `log_twist` are exact: "gaussian_prior",
            "isotropic_prior" (one component, covariance data_std^2 I), "linear_gaussian_likelihood".
        acts_in: "denoiser" when `posterior` can stand for D in any solver; "step" when it is made for the ancestral
            step from sigma to sigma_next.
        gradient: whether posterior = prior + sigma^2 grad log_twist by construction.
        per_lane: whether the bound guide can take lanes with data of their own, as a batch of many problems has; it
            then asks the likelihood about one x of every lane at a time. Optional, false where it is missing.
    """

    @property
    def exact_when(self) -> tuple[str, ...]:
        """Conditions under which the guide is exact; empty for never."""
        ...

    @property
    def acts_in(self) -> str:
        """Where the correction is added: "denoiser" or "step"."""
        ...

    @property
    def gradient(self) -> bool:
        """Whether the correction is the gradient of `log_twist` for a Gaussian prior."""
        ...

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> BoundGuide:
        """The guide as a function for one problem; vjps are counted into `cost`."""
        ...


def as_denoiser(guide: BoundGuide) -> Callable[[Tensor, Level], Tensor]:
    """A guide as a denoiser of the posterior: (x, sigma) -> E[x_0 | x, y], for any solver.

    Raises:
        CapabilityError: when called, if the guide acts in a step or carries state.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl
        >>> from inverse.guides import PiGDMGuide
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        >>> problem = DiffusionProblem.of(ppl.Program(model, torch.ones(2)))
        >>> as_denoiser(PiGDMGuide().bind(problem))(torch.zeros(1, 2), 1.0)          # precisions 1 + 1 + 1
        tensor([[0.3333, 0.3333]])
    """

    def denoise(x: Tensor, sigma: Level) -> Tensor:
        if getattr(guide, "acts_in", "denoiser") != "denoiser":
            raise CapabilityError(
                f"{guide!r} changes the step, not the denoiser, so it fits no solver but Ancestral; "
                'use weight="likelihood"'
            )
        guided = guide(x, sigma)
        if guided.state is not None:
            raise CapabilityError(f"{guide!r} carries state from step to step and cannot be used as a denoiser")
        return guided.posterior

    return denoise


def denoise_with_vjp(
    problem: DiffusionProblem, x: Tensor, sigma: Level, cost: Cost
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """D(x, sigma) by one call, and v -> J^T v for as many v as wanted, each counted as one vjp per row."""
    rows = x.shape[: x.ndim - len(problem.prior.event_shape)].numel()
    mean, pull = vector_jacobian(lambda x: problem.prior.denoise(x, sigma), x)

    def vjp(v: Tensor) -> Tensor:
        cost.vjps += rows
        return pull(v)

    return mean, vjp


def likelihood_gradient(problem: DiffusionProblem, x: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """log p(y | x) (lanes,) and its gradient (lanes, *shape), for any differentiable likelihood."""
    cost.likelihood_evals += len(x)
    if problem.likelihood.is_gaussian:
        gaussian = problem.likelihood.gaussian
        return gaussian.log_prob(x).to(x.dtype), gaussian.operator.adjoint(gaussian.residual(x)).to(x.dtype)
    if len(x) == 0:
        return x.new_zeros(0), x
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = problem.likelihood.log_prob(leaf)
        gradient = gradient_of(value, leaf)
    return value.detach().to(x.dtype), gradient
