r"""Manifold preserving guidance: the denoised point itself is moved, and no gradient passes through the network.

posterior = D + shift,   g = grad_{x_0} log p(y | P(x_0)) at x_0 = D,   v = s^2 sd^2 / (s^2 + sd^2)

    "damped":      shift = scale t v g, t from the curvature of the loss (inverse/guides/damping.py)
    "likelihood":  shift = scale v g
    "relative":    shift = scale sqrt(1 + s^2) g / rms(g)
    "norm":        shift = -scale sqrt(1 + s^2) grad_{x_0} ||y - A P(x_0)||

P is the identity, or an autoencoder x -> decode(encode(x)), whose Jacobian keeps the move in the tangent of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level, likelihood_gradient
from inverse.guides.damping import damping, per_lane, rms
from inverse.guides.pigdm import PiGDMGuide
from inverse.guides.residual import misfit, residual_fn
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError, ShapeError

__all__ = ["MPGDGuide", "MPGDWeight"]

MPGDWeight = Literal["damped", "likelihood", "relative", "norm"]


@dataclass(frozen=True)
class MPGDGuide:
    r"""MPGD for the program's log likelihood, its `pyro.factor` sites included: one denoiser call, no vjp through it.

    Biased for every weight. "damped" is `PiGDMGuide(jacobian=False)` where all measured directions are seen equally
    well; "likelihood" diverges where the data are sharp; the published weights know no noise level.

    Args:
        weight: "damped", stable for any data; "likelihood"; "relative", published for arbitrary losses, the same size
            whatever the loss; or "norm", published for linear data.
        scale: of the shift; None is 1, and for the published weights 0.02 [inferred]: they were tuned by the task.
        data_std: sd of the data, for v; None takes `prior.data_std`.
        project: P, a differentiable function (rows, *event) -> (rows, *event), such as an autoencoder; None is none.
        project_between: noise levels between which P is used; the published range is the middle of the levels.

    Source: He et al. (2024) in the form of KellyYutongHe/mpgd_pytorch [read], whose norms over the batch are
    taken per draw here; the steps in coordinates of the noise level, and "damped" [derived].

    Example:
        >>> import ppl, pyro
        >>> from inverse import MPGD
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model():
        ...     x = pyro.sample("x", prior)
        ...     pyro.factor("to the right", 3 * x[..., 0])
        >>> posterior = ppl.infer(ppl.Program(model), MPGD(steps=50), draws=100)
        >>> bool(posterior.mean("x")[0] > 2)                                            # exactly 3
        True
    """

    weight: MPGDWeight = "damped"
    scale: float | None = None
    data_std: float | None = None
    # Left out of the repr, which is compared when a run is resumed: a function prints its address.
    project: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    project_between: tuple[float, float] = (0.0, math.inf)

    exact_when: ClassVar[tuple[str, ...]] = ()
    per_lane: ClassVar[bool] = True
    acts_in: ClassVar[str] = "denoiser"
    gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weight not in get_args(MPGDWeight):
            raise OptionError(f"weight must be one of {get_args(MPGDWeight)}, got {self.weight!r}")
        for name in ("scale", "data_std"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise OptionError(f"{name} must be positive, or None for the default, got {value}")
        if self.project is not None and not callable(self.project):
            raise OptionError(f"project must be a function (rows, *event) -> (rows, *event), got {self.project!r}")
        low, high = self.project_between
        if not 0 <= low < high:
            raise OptionError(f"project_between must be (low, high) noise levels, low < high, got {(low, high)}")

    @property
    def size(self) -> float:
        """The scale with its default."""
        return self.scale if self.scale is not None else (1.0 if self.weight in ("damped", "likelihood") else 0.02)

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> _BoundMPGD:
        """The guide as a function for one problem."""
        return _BoundMPGD(self, problem, Cost() if cost is None else cost)


class _BoundMPGD:
    """MPGD for one problem."""

    acts_in = "denoiser"
    gradient = False

    def __init__(self, options: MPGDGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        self._residual = residual_fn(problem) if options.weight == "norm" else None

    def __repr__(self) -> str:
        return repr(self.options)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """One denoiser call."""
        s, weight = float(sigma), self.options.weight
        prior = self.problem.prior.denoise(x, sigma)
        point, pull = self._projected(prior, s)
        if self._residual is not None:
            half, rise = misfit(self._residual, point)
            self.cost.likelihood_evals += len(x)
            norm = per_lane((2 * half).sqrt(), x)
            g = -pull(torch.where(norm > 0, rise / norm, torch.zeros_like(rise)))
        else:
            g = pull(likelihood_gradient(self.problem, point, self.cost)[1])
        if weight in ("damped", "likelihood"):
            v = PiGDMGuide(self.options.data_std).variance(s, self.problem.prior.data_std)
            u = v * g
            if weight == "damped":
                u = per_lane(damping(self.problem, point, g, u, math.sqrt(v), self.cost), x) * u
        else:
            unit = g if weight == "norm" else g / per_lane(rms(g).clamp(min=torch.finfo(x.dtype).tiny), x)
            u = math.sqrt(1 + s**2) * unit
        log_twist = self.problem.likelihood.log_prob(prior).to(x.dtype)
        return Guided(prior, prior + self.options.size * u, log_twist)

    def _projected(self, clean: Tensor, s: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """P(x_0) and v -> (dP/dx_0)^T v."""
        project, (low, high) = self.options.project, self.options.project_between
        if project is None or not low <= s <= high or len(clean) == 0:
            return clean, lambda v: v
        event = self.problem.prior.event_shape

        def whole(x: Tensor) -> Tensor:
            rows = x.reshape(-1, *event)
            out: Any = project(rows)
            if out.shape != rows.shape:
                raise ShapeError(f"project returned {tuple(out.shape)} for {tuple(rows.shape)}; give decode(encode(x))")
            return out.reshape(x.shape)

        with torch.enable_grad():
            leaf = clean.detach().requires_grad_()
            point = whole(leaf)
        return point.detach(), lambda v: torch.autograd.grad(point, leaf, v, retain_graph=True)[0]
