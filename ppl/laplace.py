"""Laplace's approximation: a normal at the highest mode that was found, with the curvature there as its precision.

q(z) = N(z; m, C),   m = argmax log p(z, y),   C^{-1} = -(d^2/dz^2) log p(m, y)
log p(y) ~ log p(m, y) + d/2 log 2 pi + 1/2 log |C|
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributions import transform_to

from ppl.backend import Exactness, register
from ppl.errors import NotFiniteError, OptionError, ProgramError
from ppl.fit_door import FitDoor
from ppl.lbfgs import Climb
from ppl.mcmc.target import fixed_density
from ppl.monitor import Monitor
from ppl.option_checks import check_integers
from ppl.vi.fitted import FittedGuide
from ppl.vi.guides import FullRank

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["Laplace", "hessian"]

MEMORY = 10
LANES = 128  # rows of the Hessian in one call
POLISH = 30  # Newton steps at most
SAME = 1e-3  # nats of log density within which two searches count as one mode


@register
@dataclass(frozen=True)
class Laplace(FitDoor):
    """A normal at the mode, on unconstrained space; `run` is `fit` and draws of the normal.

    The mode is looked for by L-BFGS from several starts in one batch, and found by Newton's method; the Hessian comes
    from differentiating the density's graph twice (from gradients where that cannot be). All chains draw from one
    fit, whose `history` holds the log density that every search reached; ProgramError says that there is no mode.
    `info["laplace_log_evidence"]` is the approximation above, without an error of its own: `log_evidence` is left to
    engines that have one, such as `ppl.Importance(ppl.Laplace())`.

    Args:
        starts: searches from random points.
        steps: steps of a search at most.
        tolerance: a search ends when a step promises to raise the log density by less.
        radius: searches start uniformly in [-radius, radius] (noise sites: from their prior).

    Raises:
        OptionError: an option is out of range.

    Source: Tierney & Kadane (1986) [inferred].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Program
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fitted = Laplace().fit(Program(model, torch.tensor(2.0, dtype=torch.float64)))
        >>> fitted.params["loc"], fitted.params["log_scale"].exp() ** 2
        (tensor([1.], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """

    starts: int = 8
    steps: int = 500
    tolerance: float = 1e-9
    radius: float = 2.0

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ("gaussian_posterior",)
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, starts=1, steps=1)
        if not self.tolerance > 0:
            raise OptionError(f"tolerance must be positive, in nats, got {self.tolerance!r}")
        if not self.radius >= 0:
            raise OptionError(f"radius must be zero or more, got {self.radius!r}")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Find the mode once, and draw; see `ppl.infer`."""
        fitted = self.fit(program, generator=generator, monitor=monitor)
        made = fitted.posterior(draws, chains, generator, cost=monitor.cost)
        if bool(made.info["pareto_k"] > 0.7):
            monitor.note(
                f"k-hat of the importance weights is {float(made.info['pareto_k']):.2f}, above 0.7: the posterior is "
                "not the normal at its mode; try ppl.SVI with a flow, ppl.SMC or ppl.NUTS"
            )
        info = {n: v for n, v in made.info.items() if n != "elbo_history"}
        info["laplace_log_evidence"] = _evidence(fitted)
        info["mode_log_density"] = fitted.history  # of every search
        return replace(made, info=info, attrs={**made.attrs, "backend": "Laplace"})

    def _fitted(self, program: Program, generator: torch.Generator, monitor: Monitor) -> FittedGuide:
        """The normal at the highest mode; raises ProgramError where there is none."""
        flat = fixed_density(program, "Laplace", monitor)

        def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
            monitor.cost.add(gradient_evals=len(z))
            return flat.log_density_and_grad(z)

        saved = monitor.resume()
        first = 0
        if saved is None:
            climb = Climb.start(flat.initial(self.starts, generator, self.radius), evaluate, MEMORY)
        else:
            first = int(saved.pop("step"))
            climb = Climb(**saved)
        for step in monitor.steps(self.steps, "mode", start=first):
            climb.advance(evaluate, max(self.tolerance, 10 * torch.finfo(climb.z.dtype).eps))
            monitor.report(log_density=float(climb.value.max()))
            monitor.checkpoint(step + 1, climb.state)
            if not bool(climb.going.any()):
                break
        modes = _distinct(climb.value)
        if len(modes) > 1:
            monitor.note(
                f"Laplace: {self.starts} searches ended at {len(modes)} different log densities, {modes[0]:.4g} the "
                f"highest and {modes[1]:.4g} the next; the normal is at the highest alone. ppl.SMC weighs modes"
            )
        best = climb.z[climb.value.argmax()]
        if monitor.interrupted:  # what there is: no mode, so curvature in either direction counts as that of one
            monitor.note("Laplace: stopped on the way to the mode; the normal is at the highest point so far")
            values, vectors = torch.linalg.eigh(-hessian(flat, best))
            factor = _factor(values.abs().clamp_min(1e-6 * values.abs().max().clamp_min(1e-6)), vectors)
        else:
            best, factor = _polish(flat, best, monitor)
        return _guide(program, best, factor, climb.value, complete=not monitor.interrupted)


def hessian(flat: FlatDensity, z: Tensor) -> Tensor:
    """Second derivatives of the log density at one point, (dim,) -> (dim, dim).

    By differentiating the gradient of as many copies of the point as there are dimensions; by central differences of
    the gradient where a density cannot be differentiated twice.
    """
    rows = []
    for unit in torch.eye(flat.dim, dtype=z.dtype, device=z.device).split(LANES):
        try:
            with torch.enable_grad():
                point = z.detach().expand(len(unit), -1).clone().requires_grad_()
                lane, log_noise = flat._lane(point)
                value = flat._density(lane)(lane, flat._shared()) + log_noise
                (grad,) = torch.autograd.grad(value.sum(), point, create_graph=True)
                if not grad.requires_grad:  # linear: no curvature
                    rows.append(torch.zeros_like(unit))
                    continue
                (row,) = torch.autograd.grad((grad * unit).sum(), point)
        except RuntimeError:  # an operation without a second derivative
            width = torch.finfo(z.dtype).eps ** (1 / 3) * (1 + z.abs().max())
            ahead, behind = (flat.log_density_and_grad(z + side * width * unit)[1] for side in (1, -1))
            row = (ahead - behind) / (2 * width)
        rows.append(row)
    full = torch.cat(rows)
    return 0.5 * (full + full.mT)


def _polish(flat: FlatDensity, z: Tensor, monitor: Monitor) -> tuple[Tensor, Tensor]:
    """The mode by Newton's method, and the Cholesky factor of its covariance."""
    enough = 1e-14 if z.dtype == torch.float64 else 1e-6
    for _ in range(POLISH):
        monitor.cost.add(gradient_evals=1 + flat.dim)
        value, grad = flat.log_density_and_grad(z[None])
        precision = -hessian(flat, z)
        odd = ~torch.isfinite(precision).all(1)
        if bool(odd.any()):
            raise NotFiniteError(
                f"the Hessian of the log density is not finite at the highest point found, along {_sites(flat, odd)}; "
                "write the model so that its density is smooth there, or use float64"
            )
        values, vectors = torch.linalg.eigh(precision)
        if float(values[0]) <= 1e-10 * float(values[-1].abs()):
            _refuse(flat, values, vectors)
        move = vectors @ ((vectors.mT @ grad[0]) / values)
        decrement = float(move @ grad[0])
        if decrement < enough:
            z = z + move
            break
        for halving in range(30):
            trial = z + 0.5**halving * move
            new = flat.log_density(trial[None])
            monitor.cost.add(density_evals=1)
            if bool(new >= value):
                break
        else:
            break  # rounding: no point nearby is higher
        z = trial
    else:
        monitor.note(
            f"Laplace: Newton's method has not arrived; its next step would raise the log density by {decrement:.2g}"
        )
    return z, _factor(values, vectors)


def _factor(values: Tensor, vectors: Tensor) -> Tensor:
    """Cholesky factor of the covariance whose inverse has these eigenvalues and vectors."""
    root = vectors / values.sqrt()
    # Of R R' without forming it, which would square its condition: the triangle of R' = Q U is U'.
    upper = torch.linalg.qr(root.mT).R
    return upper.mT * upper.diagonal().sign()


def _refuse(flat: FlatDensity, values: Tensor, vectors: Tensor) -> None:
    """Say that a point is no mode, and along which sites."""
    flat_or_up = int((values <= 1e-10 * values[-1].abs()).sum())
    where = _sites(flat, vectors[:, 0].abs() > 0.3 * vectors[:, 0].abs().max())
    raise ProgramError(
        "Laplace needs a maximum, but at the highest point found the Hessian of -log p is not positive definite: "
        f"{flat_or_up} of {flat.dim} eigenvalues are zero or below, the smallest {float(values[0]):.3g}, along "
        f"{where}. The density rises without bound there, is flat, or the search was cut short: give these sites "
        "proper priors or a non-centred form, raise steps, or use ppl.SMC or ppl.NUTS, which need no mode"
    )


def _sites(flat: FlatDensity, chosen: Tensor) -> str:
    """Names of the sites of some coordinates."""
    index = torch.nonzero(chosen)[:, 0].tolist()
    names = [n for n, leaf in flat.layout.leaves.items() if any(leaf.start <= i < leaf.stop for i in index)]
    return ", ".join(map(repr, names))


def _distinct(values: Tensor) -> list[float]:
    """Log densities that differ, highest first."""
    kept: list[float] = []
    for value in sorted(values.tolist(), reverse=True):
        if math.isfinite(value) and (not kept or kept[-1] - value > SAME * (1 + abs(value) * 1e-3)):
            kept.append(value)
    return kept


def _guide(program: Program, mode: Tensor, factor: Tensor, history: Tensor, complete: bool) -> FittedGuide:
    """The normal as a fitted guide, from which SVI can go on."""
    diagonal = factor.diagonal()
    params = {"loc": mode, "log_scale": diagonal.log(), "lower": (factor / diagonal[:, None]).tril(-1)}
    free = [transform_to(program.parameter_constraints[n]).inv(p) for n, p in program.parameters.items()]
    size = sum(v.numel() for v in [*params.values(), *free])
    rest = mode.new_zeros(size)
    optimizer = {"m": rest, "v": rest.clone(), "updates": torch.zeros((), dtype=torch.int64)}
    values = history.double().cpu()
    return FittedGuide(program, FullRank(), params, values, optimizer, lanes=LANES, complete=complete)


def _evidence(fitted: FittedGuide) -> Tensor:
    """log p(m, y) + d/2 log 2 pi + 1/2 log |C|."""
    mode = fitted.params["loc"]
    log_p = fitted.program.flat().log_density(mode[None])[0].double()
    return log_p + 0.5 * len(mode) * math.log(2 * math.pi) + fitted.params["log_scale"].double().sum()
