"""Pathfinder: normals read off the way uphill, the best of each path, and importance resampling over all paths.

    Sigma_l = diag(alpha_l) + B_l G_l B_l',   mu_l = z_l + Sigma_l grad log p(z_l)    at every point of an L-BFGS path
    q = 1/I sum_i N(mu_i, Sigma_i),   the (mu, Sigma) of path i being those with the largest ELBO

Sigma_l is the inverse Hessian that L-BFGS holds at the point, so a fit takes as many gradients as the way has steps,
and some densities. Far from the mode the normals are still wide: the best is one that fits the body of the posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import NotFiniteError, OptionError
from ppl.fit_door import FitDoor
from ppl.importance import weighted_posterior
from ppl.lbfgs import Climb
from ppl.mcmc.target import fixed_density
from ppl.monitor import Monitor
from ppl.option_checks import check_integers
from ppl.smc.reference import GuideReference, in_chunks
from ppl.vi.fitted import KINDS, FittedGuide
from ppl.vi.guides.guide import LOG_2PI, Params, standard_normal
from ppl.weighted import kish_ess, normalise, systematic

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["PathMixture", "Pathfinder", "inverse_hessians"]

LANES = 512


@dataclass(frozen=True)
class PathMixture:
    """Equal parts of normals with covariance S (I + Q (L L' - I) Q') S; `Pathfinder` makes its parameters.

    Parameters: loc (part, dim), log_scale (part, dim) of the diagonal S, basis Q (part, dim, rank) with orthonormal
    columns, root L (part, rank, rank), lower triangular.

    Example:
        >>> q, generator = PathMixture(), torch.Generator().manual_seed(0)
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> params = {"loc": 3 * eye, "log_scale": 0 * eye, "basis": eye.expand(2, 2, 2), "root": eye.expand(2, 2, 2)}
        >>> z, log_q = q.rsample_and_log_prob(params, q.noise(5, 2, torch.float64, generator))
        >>> z.shape, torch.allclose(log_q, q.log_prob(params, z))
        (torch.Size([5, 2]), True)
    """

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Not for gradient steps: which part a draw comes from has no gradient."""
        raise OptionError("PathMixture is made by ppl.Pathfinder; fit a ppl.FullRank() or ppl.Flow() with ppl.SVI")

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, 1 + dim) standard normal; the first column chooses the part."""
        return standard_normal(lanes, 1 + dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        parts = len(params["loc"])
        which = (torch.special.ndtr(noise[:, 0].double()) * parts).long().clamp(0, parts - 1)
        z = noise.new_zeros(len(noise), noise.shape[1] - 1)
        for part in range(parts):
            mine = which == part
            z[mine] = _spread(noise[mine, 1:], {n: v[part] for n, v in params.items()})
        return z, self.log_prob(params, z)

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        each = [_log_normal(z, {n: v[part] for n, v in params.items()}) for part in range(len(params["loc"]))]
        return torch.logsumexp(torch.stack(each), 0) - math.log(len(each))


KINDS["PathMixture"] = PathMixture


@register
@dataclass(frozen=True)
class Pathfinder(FitDoor):
    """Fast approximate draws: several paths uphill, a normal from each, importance resampling over their mixture.

    Weights are relative to the mixture of all paths, so that a path that ended in a minor mode takes little. `fit`
    gives the mixture as a fitted guide, with ELBOs of the paths as its `history`: a proposal for `ppl.Importance`, a
    start for `ppl.SMC` and for chains (`ppl.NUTS(init=ppl.Pathfinder())`). Draws are resampled; `info["root_ess"]` is
    what their weights were worth, and k-hat above 0.7 says that they are not the posterior's.

    Args:
        paths: ways uphill, from random points, in one batch.
        steps: steps of a path at most.
        memory: pairs that L-BFGS keeps; the rank of a covariance beside its diagonal is twice that.
        elbo_draws: draws from which the ELBO of every normal is estimated.
        oversample: weighted draws for each draw that is kept.
        tolerance: a path ends when a step promises to raise the log density by less.
        radius: paths start uniformly in [-radius, radius] (noise sites: from their prior).

    Raises:
        OptionError: an option is out of range.

    Source: Zhang, Carpenter, Gelman & Vehtari (2022), algorithms 1 to 4 [inferred]; weights relative to the mixture of
    all paths in place of each path's own normal are ours.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), Pathfinder(), draws=1000)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.1), bool(posterior.info["pareto_k"] < 0.7)
        (True, True)
    """

    paths: int = 8
    steps: int = 200
    memory: int = 10
    elbo_draws: int = 10
    oversample: int = 4
    tolerance: float = 1e-6
    radius: float = 2.0

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, paths=1, steps=1, memory=1, elbo_draws=2, oversample=1)
        if not self.tolerance > 0:
            raise OptionError(f"tolerance must be positive, in nats, got {self.tolerance!r}")
        if not self.radius >= 0:
            raise OptionError(f"radius must be zero or more, got {self.radius!r}")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Fit once, weigh and resample for every chain; see `ppl.infer`."""
        with monitor.section("paths"):
            fitted = self.fit(program, generator=generator, monitor=monitor)
        if monitor.interrupted:
            monitor.note("Pathfinder: stopped on the way uphill; the draws are those of the normals so far, unweighted")
            made = fitted.posterior(draws, chains, generator, cost=monitor.cost)
            return replace(made, attrs={**made.attrs, "backend": "Pathfinder"})
        reference = GuideReference(program, fitted)
        made = weighted_posterior(reference, self.oversample * draws, chains, generator, monitor, smooth=True)
        assert made.log_weight is not None
        kept = draws if made.shape[1] else 0
        index = systematic(normalise(made.log_weight), made.shape[1], kept, chains, generator)

        def pick(value: Tensor) -> Tensor:
            return torch.stack([row[i.to(row.device)] for row, i in zip(value, index, strict=True)])

        info = {n: pick(v) if n in ("lp", "log_q") else v for n, v in made.info.items()}
        info["root_ess"] = kish_ess(normalise(made.log_weight))
        info["elbo_paths"] = fitted.history
        return replace(made, draws={n: pick(v) for n, v in made.draws.items()}, log_weight=None, info=info)

    def _fitted(self, program: Program, generator: torch.Generator, monitor: Monitor) -> FittedGuide:
        """The mixture of the best normals of all paths; `history` holds their ELBOs."""
        flat = fixed_density(program, "Pathfinder", monitor)

        def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
            monitor.cost.add(gradient_evals=len(z))
            return flat.log_density_and_grad(z)

        finished = monitor.finished("fit")
        if finished is None:
            way = self._climb(flat, evaluate, generator, monitor)
            finished = self._choose(flat, way, generator, monitor)
            monitor.finish("fit", finished)
        params = {n: v for n, v in finished.items() if n != "elbo"}
        none = torch.zeros(0, dtype=program.dtype)
        return FittedGuide(
            program,
            PathMixture(),
            params,
            finished["elbo"].cpu(),
            {"m": none, "v": none, "updates": torch.zeros((), dtype=torch.int64)},
            LANES,
            not monitor.interrupted,
        )

    def _climb(
        self, flat: FlatDensity, evaluate: object, generator: torch.Generator, monitor: Monitor
    ) -> dict[str, Tensor]:
        """Points, gradients, memories and diagonals along the way, each with a leading axis of steps."""
        assert callable(evaluate)
        names = ("z", "grad", "steps", "falls", "alpha", "going")
        saved = monitor.resume()
        if saved is None:
            climb = Climb.start(flat.initial(self.paths, generator, self.radius), evaluate, self.memory)
            alpha, first = torch.ones_like(climb.z), 0
            way: dict[str, list[Tensor]] = {n: [] for n in names}
            _note(way, climb, alpha)
        else:
            first = int(saved["step"])
            climb = Climb(**{n: saved[n] for n in ("z", "value", "grad", "steps", "falls", "going")})
            alpha, way = saved["alpha"], {n: list(saved[f"way.{n}"]) for n in names}
        for step in monitor.steps(self.steps, "uphill", start=first):
            climb.advance(evaluate, max(self.tolerance, 10 * torch.finfo(climb.z.dtype).eps))
            alpha = _diagonal(alpha, climb.steps[-1], climb.falls[-1], climb.going)
            _note(way, climb, alpha)
            monitor.report(log_density=float(climb.value.max()))
            if monitor.due:
                stacked = {f"way.{n}": torch.stack(v) for n, v in way.items()}
                monitor.checkpoint(step + 1, {**climb.state(), "alpha": alpha, **stacked})
            if not bool(climb.going.any()):
                break
        return {n: torch.stack(v) for n, v in way.items()}

    def _choose(
        self, flat: FlatDensity, way: dict[str, Tensor], generator: torch.Generator, monitor: Monitor
    ) -> dict[str, Tensor]:
        """Parameters of the best normal of every path that has one, and their ELBOs."""
        points, paths, dim = way["z"].shape
        # (step, memory, path, dim) -> (step, path, dim, memory)
        s, y = (way[n].permute(0, 2, 3, 1) for n in ("steps", "falls"))
        basis, root, ok = inverse_hessians(way["alpha"], s, y)
        scale = way["alpha"].sqrt()
        pull = scale * way["grad"]
        inside = root @ (root.mT @ (basis.mT @ pull[..., None]))
        move = pull + (basis @ (inside - basis.mT @ pull[..., None]))[..., 0]
        params = {"loc": way["z"] + scale * move, "log_scale": scale.log(), "basis": basis, "root": root}
        shape = (points, paths, self.elbo_draws, dim)
        noise = torch.randn(shape, dtype=scale.dtype, device=scale.device, generator=generator)
        elbo = torch.full((points, paths), -math.inf, dtype=torch.float64, device=scale.device)
        # A path that has ended repeats its last point; draws there would be spent for nothing.
        wanted = [(i, p) for i in range(points) for p in range(paths) if ok[i, p] and (i == 0 or way["going"][i, p])]
        for block in range(0, len(wanted), LANES // self.elbo_draws or 1):
            pairs = wanted[block : block + (LANES // self.elbo_draws or 1)]
            own = [{n: v[i, p] for n, v in params.items()} for i, p in pairs]
            z = [_spread(noise[i, p], part) for (i, p), part in zip(pairs, own, strict=True)]
            log_q = torch.cat([_log_normal(x, part) for x, part in zip(z, own, strict=True)])
            rows = torch.cat(z)
            missing = (LANES // self.elbo_draws or 1) * self.elbo_draws - len(rows)
            padded = torch.cat([rows, rows[-1:].expand(missing, -1)]) if block else rows
            log_p = in_chunks(lambda part: (flat.log_density(part),), padded, None)[0][: len(rows)]
            monitor.cost.add(density_evals=len(rows))
            means = (log_p - log_q).double().reshape(len(pairs), -1).mean(1)
            for (i, p), mean in zip(pairs, means, strict=True):
                elbo[i, p] = mean if bool(torch.isfinite(mean)) else -math.inf
        best, at = elbo.max(0)
        good = torch.nonzero(best > -math.inf)[:, 0]
        if not len(good):
            raise NotFiniteError(
                f"none of the {paths} paths met a point at which a normal has a finite ELBO; check the model's "
                "density, use float64, more elbo_draws or a smaller radius"
            )
        if len(good) < paths:
            monitor.note(f"Pathfinder: {paths - len(good)} of {paths} paths found no normal and are left out")
        return {**{n: v[at[good], good].clone() for n, v in params.items()}, "elbo": best[good]}


def _note(way: dict[str, list[Tensor]], climb: Climb, alpha: Tensor) -> None:
    """Add where a search is to its way; its memories are written in place."""
    for name, value in {**climb.state(), "alpha": alpha}.items():
        if name in way:
            way[name].append(value.clone())


def inverse_hessians(alpha: Tensor, steps: Tensor, falls: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse Hessians of L-BFGS, diag(sqrt(alpha)) (I + Q (L L' - I) Q') diag(sqrt(alpha)).

    Args:
        alpha: (*batch, dim) the diagonal that the pairs correct.
        steps: (*batch, dim, memory) moves, oldest first; zero where there was none.
        falls: (*batch, dim, memory) by how much the gradient fell along them.

    Returns:
        Q (*batch, dim, rank) with orthonormal columns, L (*batch, rank, rank) lower triangular, and (*batch,) whether
        the matrix is positive definite.

    Source: Byrd, Nocedal & Schnabel (1994), theorem 2.3 [inferred].

    Example:
        >>> curvature = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
        >>> s = torch.tensor([[1.0, 0.3], [0.2, -1.0]], dtype=torch.float64)
        >>> q, root, ok = inverse_hessians(torch.ones(2, dtype=torch.float64), s, curvature @ s)
        >>> h = torch.eye(2) + q @ (root @ root.T - torch.eye(2)) @ q.T
        >>> torch.allclose(h @ (curvature @ s)[:, -1], s[:, -1])          # the last pair, exactly
        True
    """
    memory = steps.shape[-1]
    scale = alpha.sqrt()[..., None]
    inner = steps.mT @ falls
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    unused = torch.diag_embed((diagonal <= 0).to(steps.dtype))
    upper = inner.triu() + unused
    eye = torch.eye(memory, dtype=steps.dtype, device=steps.device).expand_as(upper)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    scaled = scale * falls
    middle = torch.diag_embed(diagonal) + scaled.mT @ scaled
    zero = torch.zeros_like(upper)
    corner = inverse.mT @ middle @ inverse
    small = torch.cat([torch.cat([zero, -inverse], -1), torch.cat([-inverse.mT, corner], -1)], -2)
    basis, right = torch.linalg.qr(torch.cat([scaled, steps / scale], -1))
    core = right @ small @ right.mT
    core = 0.5 * (core + core.mT) + torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    finite = torch.isfinite(core).all(-1).all(-1)
    core = torch.where(finite[..., None, None], core, torch.eye(core.shape[-1], dtype=core.dtype, device=core.device))
    root, failed = torch.linalg.cholesky_ex(core)
    return basis, root.tril(), (failed == 0) & finite


def _diagonal(alpha: Tensor, step: Tensor, fall: Tensor, going: Tensor) -> Tensor:
    """The diagonal after one more pair, (lanes, dim); lanes without a new pair keep theirs.

    Source: Gilbert & Lemarechal (1989), as in Zhang et al. (2022), algorithm 3 [inferred].
    """
    a = (fall.square() * alpha).sum(1, keepdim=True)
    b = (fall * step).sum(1, keepdim=True)
    c = (step.square() / alpha).sum(1, keepdim=True)
    new = 1 / (a / (b * alpha) + fall.square() / b - a * step.square() / (b * c * alpha.square()))
    good = going & (b[:, 0] > 0) & (torch.isfinite(new) & (new > 0)).all(1)
    return torch.where(good[:, None], new, alpha)


def _spread(noise: Tensor, part: Params) -> Tensor:
    """Standard normal noise (lanes, dim) -> draws of one normal."""
    inner = noise @ part["basis"]
    return part["loc"] + part["log_scale"].exp() * (noise + (inner @ part["root"].mT - inner) @ part["basis"].mT)


def _log_normal(z: Tensor, part: Params) -> Tensor:
    """Log density (lanes,) of one normal."""
    w = (z - part["loc"]) * (-part["log_scale"]).exp()
    inner = w @ part["basis"]
    white = torch.linalg.solve_triangular(part["root"], inner.mT, upper=False)
    square = (w.square().sum(1) - inner.square().sum(1)).clamp_min(0.0) + white.square().sum(0)
    log_det = part["log_scale"].sum() + part["root"].diagonal().log().sum()
    return -0.5 * square - log_det - 0.5 * z.shape[1] * LOG_2PI
