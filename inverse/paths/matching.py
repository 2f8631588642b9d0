r"""Simulation-free fits of paths: marginals at random times instead of steps from one to the next.

    log p(y) >= E_q[log p(y | X)] - (T / 2) E_t E_q |g^-1 (f_q - f)|^2 - KL(r),    t ~ U(0, T)

f_q is the drift of the SDE that has the marginals q and the diffusion of the path (`inverse.paths.marginals`). A step
of the fit costs as much for a thousand steps of the path as for ten: it asks for drift and diffusion at random times,
in one batch. The marginals say what the data see as long as every datum sees one time. What is fitted is then a control
of the driving noise, u = g^-1 (f_q - f), whose bound holds for the path as it is simulated.

Source: Bartosh, Vetrov & Naesseth (2025), SDE matching [inferred]; other latents, learned parameters [derived].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from inverse.paths.marginals import Marginals, half_divergence
from inverse.paths.matching_terms import MatchingDensity, MatchingDraws, squared_at
from inverse.paths.problem import path_site
from inverse.paths.steered import Laws, Now, Steered
from ppl.backend import Exactness, register
from ppl.errors import CapabilityError, OptionError
from ppl.fit_door import FitDoor
from ppl.monitor import Monitor
from ppl.option_checks import check_integers
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from ppl.sites import Layout, unwrap
from ppl.vi.fitted import FittedGuide
from ppl.vi.fitted_base import mean_of
from ppl.vi.guides.guide import Params
from ppl.vi.svi import SVI, run_fits
from sde.path import Path, _grid

__all__ = ["MatchedGuide", "SDEMatching", "matching_bound"]


@register
@dataclass(frozen=True)
class SDEMatching(FitDoor):
    """Fits Gaussian marginals to a path, and everything learned in the program, without simulating the path.

    For one path with Brownian noise whose diffusion is invertible, and data that each see one time of it. Fractional
    noise is refused: its factors share the state's Brownian motion, so that the diffusion of state and factors has rank
    one, and marginals of the state alone do not determine a control; `ControlGuide` takes it. Posterior draws follow
    the fitted control through the path's own steps, with their bound and k-hat.

    Args:
        steps: gradient steps.
        particles: draws per step.
        times: random times in a draw.
        lr: learning rate of Adam at the start; it falls along a cosine.
        knots: pieces of the curves over the horizon, at least one between two times of the path.
        covariance: "full", or "diagonal" for many coordinates.
        site: the path; None where there is one.

    Raises:
        OptionError: an option is out of range.

    Source: Bartosh, Vetrov & Naesseth (2025) [inferred].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> from sde import Process
        >>> def model(y):
        ...     times = torch.linspace(0.1, 1, 10)
        ...     x = pyro.sample("x", Path(Process(lambda x, t: -x), times))
        ...     pyro.sample("y", dist.Normal(x[-1, 0], 0.5), obs=y)
        >>> engine = SDEMatching(steps=50, knots=4)
        >>> posterior = ppl.infer(ppl.Program(model, torch.tensor(1.0)), engine, draws=10, progress=False)
        >>> posterior.draws["x"].shape
        torch.Size([1, 10, 10, 1])
    """

    steps: int = 2000
    particles: int = 16
    times: int = 16
    lr: float = 0.02
    knots: int = 16
    covariance: Literal["full", "diagonal"] = "full"
    site: str | None = None

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ("steps",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"path"})
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, steps=1, particles=1, times=1, knots=1)
        if self.covariance not in ("full", "diagonal"):
            raise OptionError(f'covariance must be "full" or "diagonal", got {self.covariance!r}')
        self._ascent()  # checks the rest

    def _ascent(self) -> SVI:
        """What climbs the bound."""
        return SVI(steps=self.steps, particles=self.particles, lr=self.lr, natural=False)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Fit once per chain and draw from each fit; see `ppl.infer`."""
        return run_fits(self, program, draws=draws, chains=chains, generator=generator, monitor=monitor)

    def _fitted(self, program: Program, generator: torch.Generator, monitor: Monitor) -> FittedGuide:
        """Climb the bound; the result is a control on the program's noise space."""
        site = path_site(program, self.site)
        lifted = program.noise_space(site)
        path = unwrap(lifted.sites[site].distribution)
        _check_path(path, lifted, site)
        layout = lifted.flat().layout
        others = layout.dim - path.noise_shape.numel()
        known = path.times.detach().cpu().double().numpy()
        knots = _grid(path.start, known, (known[-1] - path.start) / self.knots)[0]
        start = path.initial.new_tensor(path.start)
        sd = squared_at(path, path.initial[None], start[None])[0].detach()
        sd = sd.diagonal() if path.process.general else sd
        scale = ((known[-1] - path.start) * sd.double().clamp_min(1e-12)).sqrt().cpu().numpy()
        family = Marginals(knots, path.event_shape[1], others, scale, self.covariance == "diagonal")
        terms = MatchingDraws(family, path, others, self.times)
        density = MatchingDensity(lifted, site, terms)
        probe = terms.noise(2, density.dim, program.dtype, generator)
        params = terms.init(density.dim, program.dtype, program.device, generator)
        density.refuse_vanishing(terms.rsample_and_log_prob(params, probe)[0], {})
        density.refuse_coupled(generator)
        fitted = self._ascent().climb(lifted, cast(Any, density), cast(Any, terms), generator, monitor)
        guide = MatchedGuide(None, site, family=family, count=self.times).bind(layout, lifted)
        return replace(fitted, guide=guide)


@dataclass(frozen=True)
class MatchedGuide(Steered):
    """The control that gives a path the marginals of a fit.

    Args:
        family: curves of the marginals.
        count: random times in one estimate of the fit's own bound.
    """

    family: Marginals | None = field(default=None, repr=False, kw_only=True)
    count: int = field(default=16, repr=False, kw_only=True)

    def bind(self, layout: Layout, program: Program | None = None) -> MatchedGuide:
        """The guide, told where the path's driving numbers are."""
        _, path, own, places = self.found(layout, program)
        read = self.read or self.path is None
        return replace(self, path=path, read=read, places=places, own=own, program=program)

    @property
    def curves(self) -> Marginals:
        """The family of the marginals."""
        if self.family is None:
            raise OptionError("a MatchedGuide is made by SDEMatching().fit(program)")
        return self.family

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters to start from: marginals about the path without noise."""
        terms = MatchingDraws(self.curves, self._path, self.curves.others, self.count)
        return terms.init(terms.dim, dtype, device, generator)

    def laws(self, params: Params, path: Path, like: Tensor) -> Laws:
        """Driving numbers keep their unit variance."""
        return Laws(torch.eye(path.noises, dtype=like.dtype, device=like.device).expand(path.steps, -1, -1))

    def mean(self, params: Params, laws: Laws, path: Path, now: Now) -> Tensor:
        """g^-1 (f_q - f) sqrt(dt), (lanes, m)."""
        process, x, family = path.process, now.x, self.curves
        t = now.time.expand(len(x))
        curves = family.at(params, t, now.others if family.others else None)
        more = curves.offset_rate - process.f(x, now.time)
        if now.n:  # at the start all paths are at one state
            more = more + self._about(path, curves, x, t)
        dt = float(path.increments.dt[now.n])
        g = process.g(x, now.time)
        if not process.general:
            return dt**0.5 * more / g
        g = g.expand(len(x), *g.shape[-2:])
        control: Tensor = (g.mT @ torch.linalg.solve(g @ g.mT, more[..., None]))[..., 0]
        return dt**0.5 * control

    def _about(self, path: Path, curves: Any, x: Tensor, t: Tensor) -> Tensor:
        """What the drift of the marginals adds away from their means: velocity, score and divergence."""
        process, family = path.process, self.curves
        start = path.initial.new_tensor(float(family.knots[0]))
        first = squared_at(path, path.initial[None], start[None])[0]
        root = torch.linalg.cholesky_ex(first)[0] if process.general else torch.diag_embed(first.sqrt())
        off = x - path.initial - curves.offset
        eps = family.inverse(curves, torch.linalg.solve_triangular(root, off.mT, upper=False).mT)
        _, rate, white = family.times(curves, eps)
        score = -torch.linalg.solve_triangular(root.mT, white.mT, upper=True).mT
        square = squared_at(path, x, t)
        turned = (square @ score[..., None])[..., 0] if process.general else square * score
        return rate @ root.mT + 0.5 * turned + torch.vmap(lambda x, t: half_divergence(process, x, t))(x, t)


def matching_bound(fitted: FittedGuide, draws: int = 1024, seed: int = 0) -> Estimate:
    """The bound that SDE matching climbed, of the path in continuous time, with its standard error.

    `fitted.elbo()` is that of the path as it is simulated.

    Args:
        fitted: of `SDEMatching().fit(program)`.
        draws: draws of the marginals, each with random times of its own.
        seed: of the draws.

    Raises:
        OptionError: another kind of fit.
    """
    guide, program = fitted.guide, fitted.program
    if not isinstance(guide, MatchedGuide) or guide.site is None or guide.path is None:
        raise OptionError(f"the bound of a matching is that of a fit by SDEMatching, got {guide!r}")
    terms = MatchingDraws(guide.curves, guide.path, guide.curves.others, guide.count)
    density = MatchingDensity(program, guide.site, terms)
    generator = torch.Generator(program.device).manual_seed(seed)
    with torch.no_grad():
        z, log_q = terms.rsample_and_log_prob(fitted.params, terms.noise(draws, terms.dim, program.dtype, generator))
    return mean_of(density.log_density(z) - log_q)


def _check_path(path: Path, program: Program, site: str) -> None:
    """Refuse what the marginals cannot carry.

    Raises:
        CapabilityError: with what to use.
    """
    why = ""
    if path.process.noise.size:
        why = (
            "fractional noise: its factors share one Brownian motion with the state, so that the diffusion of both has "
            "rank one and no inverse"
        )
    elif path.process.sense != "ito" and callable(path.process.diffusion):
        why = "a diffusion of the state in the sense of Stratonovich; add its drift, g g' / 2, and say sense='ito'"
    elif path.batch_shape or len(program.sites[site].shape) > 2:
        why = "a batch of paths; make them coordinates of one"
    elif path.process.general and path.noises < path.event_shape[1]:
        why = f"{path.noises} noises for {path.event_shape[1]} coordinates: its diffusion has no inverse"
    elif program.discrete:
        why = f"discrete latents {list(program.discrete)} beside it"
    if why:
        raise CapabilityError(
            f"SDEMatching cannot fit the path {site!r} with {why}; use "
            "ppl.NoiseSpace(ppl.SVI(guide=inverse.paths.ControlGuide()))"
        )
