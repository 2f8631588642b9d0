"""Elliptical slice sampling: latents that are Gaussian a priori, any likelihood, no gradients and no step size.

    z' = m + (z - m) cos(theta) + (nu - m) sin(theta),   nu ~ N(m, C),   log L(z') > log L(z) + log u

The angle's bracket shrinks towards zero until the point is accepted; all chains shrink in one batch, and those still
waiting are packed together. With many chains, N(m, C) is learned in warmup: L is then the posterior over N(m, C), which
leaves the posterior invariant whatever m and C are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import CapabilityError, ProgramError
from ppl.mcmc.adaptation import windows
from ppl.mcmc.target import fixed_density, posterior_of
from ppl.option_checks import check_integers
from ppl.sites import unwrap

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.monitor import Monitor
    from ppl.posterior import Posterior
    from ppl.program import Program
    from ppl.sites import Leaf

__all__ = ["EllipticalSlice"]

INITIAL_TRIES = 100
WIDER = 1.5  # variance of a learned ellipse over that of the chains
SHRINKS = 200  # the bracket is far below rounding by then; the chain stays where it is


@register
@dataclass(frozen=True)
class EllipticalSlice:
    """Elliptical slice sampling for programs whose latents are independent Gaussians a priori, or lifted to noise.

    Latents may be Normal or MultivariateNormal sites whose parameters depend on no other latent, and sites in their
    noise space (`ppl.NoiseSpace(EllipticalSlice())`).

    Args:
        warmup: transitions per chain, thrown away.
        thin: transitions between two draws that are kept.
        adapt: learn the ellipse from the chains during warmup, and not take that of the prior, on which precise data
            leave steps as small as noise over signal. None does with more than four chains for each dimension: fewer
            cannot show in which directions the posterior is wide.

    Raises:
        OptionError: an option is out of range.

    Source: Murray, Adams & MacKay (2010), figure 2 [inferred]; a learned ellipse: Nishihara, Murray & Adams (2014)
    [inferred], with a normal in place of their t distribution.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), EllipticalSlice(warmup=50), draws=200)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.2)
        True
    """

    warmup: int = 500
    thin: int = 1
    adapt: bool | None = None

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("draws",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 16
    batches_problems: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integers(self, warmup=0, thin=1)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the chains; see `ppl.infer`."""
        flat = fixed_density(program, "EllipticalSlice", monitor)
        walk = _Slices(flat, GaussianPrior(program, flat), chains, generator, monitor)
        total = self.warmup + draws * self.thin
        # The chain may have stopped anywhere: states are kept for every transition that is a draw.
        kept = walk.z.new_zeros((draws, *walk.z.shape))
        lp, evals = walk.z.new_zeros((draws, len(walk.z))), walk.z.new_zeros((draws, len(walk.z)), dtype=torch.int64)
        stored = monitor.resume()
        start = done = 0
        if stored is None:
            walk.begin()
        else:
            start = done = int(stored["step"])
            walk.z, walk.log_likelihood = stored["z"], stored["log_likelihood"]
            for target, name in ((kept, "draws"), (lp, "lp"), (evals, "evals")):
                target[: len(stored[name])] = stored[name]
        if stored is not None and "tril" in stored:
            walk.take(Reference(stored["mean"], stored["tril"]))
        rows = self._rows(done)
        window = self._windows(chains, flat.dim)
        for step in monitor.steps(total, "elliptical slice", start=start):
            count = walk.advance()
            done = step + 1
            if done in window:
                walk.learn(program.problems or 1)
            before, rows = rows, self._rows(done)
            if rows > before:
                kept[before], evals[before] = walk.z, count
                lp[before] = walk.log_likelihood + walk.prior.log_prob(walk.z)
            monitor.report(evaluations=float(count.double().mean()))
            state = {"z": walk.z, "log_likelihood": walk.log_likelihood, **walk.reference()}
            monitor.checkpoint(done, {**state, "draws": kept[:rows], "lp": lp[:rows], "evals": evals[:rows]})
        if walk.stuck:
            monitor.note(f"{walk.stuck} transitions stayed in place after {SHRINKS} shrinks of the bracket")
        info = {"lp": lp[:rows], "n_steps": evals[:rows]}
        return posterior_of(program, flat, kept[:rows], info, monitor, complete=rows == draws)

    def _windows(self, chains: int, dim: int) -> set[int]:
        """Transitions after which the ellipse is learned; none in the last part of warmup, which forgets it."""
        adapt = chains > 4 * dim if self.adapt is None else self.adapt
        return {stop for _, stop in windows(self.warmup)} if adapt else set()

    def _rows(self, done: int) -> int:
        """Draws among the first `done` transitions."""
        return max(done - self.warmup, 0) // self.thin


class GaussianPrior:
    """The Gaussian prior of the flat vector, read from the sites; parameters may differ between problems.

    Args:
        program: the program.
        flat: its density.

    Raises:
        CapabilityError: a latent is no Gaussian of its own.
    """

    def __init__(self, program: Program, flat: FlatDensity) -> None:
        for name, leaf in flat.layout.leaves.items():
            self._check(program, name, leaf)
        if program.discrete:
            raise CapabilityError(
                f"EllipticalSlice needs Gaussian latents, but the sites {list(program.discrete)} are discrete"
            )
        own = {n: leaf for n, leaf in flat.layout.leaves.items() if not leaf.noise}
        self.leaves = flat.layout.leaves
        parameters: dict[str, dict[str, Tensor]] = {}
        if own:

            def extract(trace: Any) -> dict[str, dict[str, Tensor]]:
                return {n: _parameters(trace.nodes[n]["fn"], leaf) for n, leaf in own.items()}

            parameters = _read(program, flat, extract)
        self.parameters = parameters

    @staticmethod
    def _check(program: Program, name: str, leaf: Leaf) -> None:
        site = program.sites[name]
        if leaf.noise:
            return
        base = unwrap(site.distribution)
        why = ""
        if not isinstance(base, torch.distributions.Normal | torch.distributions.MultivariateNormal):
            why = f"is a {type(base).__name__}"
            if "noise_space" in site.capabilities:
                why += "; lift it with ppl.NoiseSpace(EllipticalSlice())"
        elif not site.static:
            why = (
                "has parameters that depend on another latent; write it as a shift and scale of a standard normal site"
            )
        if why:
            raise CapabilityError(
                f"EllipticalSlice needs latents that are Gaussian a priori and independent of each other, but site "
                f"{name!r} {why}. NUTS and HMC take any continuous latent"
            )

    def move(self, noise: Tensor) -> Tensor:
        """Standard normal noise (lanes, dim) -> deviations from the mean (lanes, dim) with the prior's covariance."""
        out = noise.clone()
        for name, part in self.parameters.items():
            leaf = self.leaves[name]
            block = noise[:, leaf.start : leaf.stop]
            if "scale_tril" in part:
                tril = self._lanes(part["scale_tril"], len(noise))
                shaped = block.reshape(len(noise), *tril.shape[1:-1])
                out[:, leaf.start : leaf.stop] = (tril @ shaped[..., None])[..., 0].reshape(len(noise), -1)
            else:
                scale = self._lanes(part["scale"], len(noise))
                out[:, leaf.start : leaf.stop] = scale.reshape(len(scale), -1) * block
        return out

    def mean(self, lanes: int, like: Tensor) -> Tensor:
        """Mean of the flat vector (lanes, dim)."""
        mean = like.new_zeros(lanes, max((leaf.stop for leaf in self.leaves.values()), default=0))
        for name, part in self.parameters.items():
            leaf = self.leaves[name]
            loc = self._lanes(part["loc"], lanes)
            mean[:, leaf.start : leaf.stop] = loc.reshape(len(loc), -1)
        return mean

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density (lanes,) of the prior at z (lanes, dim)."""
        centred = z - self.mean(len(z), z)
        total = -0.5 * math.log(2 * math.pi) * z.shape[1] * torch.ones_like(z[:, 0])
        for name, leaf in self.leaves.items():
            x = centred[:, leaf.start : leaf.stop]
            part = self.parameters.get(name, {})
            if "scale_tril" in part:
                tril = self._lanes(part["scale_tril"], len(z))
                shaped = x.reshape(len(z), *tril.shape[1:-1])
                white = torch.linalg.solve_triangular(tril, shaped[..., None], upper=False)[..., 0]
                total = total - tril.diagonal(dim1=-2, dim2=-1).log().flatten(1).sum(1)
                x = white.reshape(len(z), -1)
            elif part:
                scale = self._lanes(part["scale"], len(z)).reshape(-1, x.shape[1])
                total = total - scale.log().sum(1)
                x = x / scale
            total = total - 0.5 * x.square().sum(1)
        return total

    @staticmethod
    def _lanes(part: Tensor, lanes: int) -> Tensor:
        """Parameters by problem -> by lane; one that all lanes share stays one."""
        return part if len(part) == 1 else part.repeat_interleave(lanes // len(part), 0)


@dataclass(frozen=True)
class Reference:
    """A normal in place of the prior, for each problem: mean (problem, dim) and Cholesky factor (problem, dim, dim)."""

    loc: Tensor
    tril: Tensor

    @classmethod
    def of(cls, z: Tensor, problems: int) -> Reference:
        """The moments of the chains (problem-major) of each problem, a little wider than they are."""
        x = z.reshape(problems, -1, z.shape[1])
        loc = x.mean(1)
        centred = x - loc[:, None]
        covariance = centred.mT @ centred / max(x.shape[1] - 1, 1)
        scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(z.dtype).tiny)
        # Too narrow an ellipse holds chains in the tails, too wide a one costs a few shrinks.
        covariance = WIDER * covariance + 1e-6 * torch.diag_embed(scale)
        return cls(loc, torch.linalg.cholesky(covariance))

    def move(self, noise: Tensor) -> Tensor:
        """Standard normal noise (lanes, dim) -> deviations from the mean."""
        x = noise.reshape(len(self.loc), -1, noise.shape[1])
        return (x @ self.tril.mT).reshape(noise.shape)

    def mean(self, lanes: int, like: Tensor) -> Tensor:
        """Mean (lanes, dim)."""
        return self.loc.repeat_interleave(lanes // len(self.loc), 0)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density (lanes,) at z (lanes, dim)."""
        x = z.reshape(len(self.loc), -1, z.shape[1]) - self.loc[:, None]
        white = torch.linalg.solve_triangular(self.tril, x.mT, upper=False)
        log_det = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        total = -0.5 * white.square().sum(1) - log_det[:, None] - 0.5 * math.log(2 * math.pi) * z.shape[1]
        return total.reshape(-1)


def _parameters(fn: Any, leaf: Leaf) -> dict[str, Tensor]:
    """Location and scale of one site, at the full shape of the site."""
    base = unwrap(fn)
    if isinstance(base, torch.distributions.MultivariateNormal):
        tril = base.scale_tril
        shape = leaf.shape
        return {"loc": base.loc.expand(shape), "scale_tril": tril.expand(*shape[:-1], *tril.shape[-2:])}
    return {"loc": base.loc.expand(leaf.shape), "scale": base.scale.expand(leaf.shape)}


def _read(program: Program, flat: FlatDensity, extract: Any) -> dict[str, dict[str, Tensor]]:
    """Parameters of the Gaussian sites, one row per problem; they depend on no latent, so any value will do."""
    rows = program.problems or 1
    z = torch.zeros(rows, flat.dim, dtype=program.dtype, device=program.device)

    def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Any:
        return extract(program.trace_one(lane, shared, flat._run(lane))[0])

    with torch.no_grad():
        lane, _ = flat._lane(z)
        function = program.lane_function(("gaussian prior", program.lifted), one, lane)
        return function(lane, program.shared_inputs())


class _Slices:
    """All lanes (problem-major) with their log likelihoods."""

    def __init__(
        self, flat: FlatDensity, prior: GaussianPrior, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> None:
        self.flat, self.generator, self.monitor = flat, generator, monitor
        self.prior: GaussianPrior | Reference = prior
        program = flat.program
        self.lanes = chains * (program.problems or 1)
        self.z = torch.zeros(self.lanes, flat.dim, dtype=program.dtype, device=program.device)
        self.log_likelihood = self.z[:, 0]
        self.mean = prior.mean(self.lanes, self.z)
        self.stuck = 0
        # Fixed lane counts, a quarter each, so that few graphs serve all brackets; problems cannot be split.
        self.sizes = [self.lanes]
        while program.problems is None and self.sizes[-1] > 1:
            self.sizes.append(math.ceil(self.sizes[-1] / 4))

    def begin(self) -> None:
        """Start from the prior, where the likelihood is finite."""
        self.z = self.mean + self._noise()
        self.log_likelihood = self._evaluate(self.z)
        for _ in range(INITIAL_TRIES):
            bad = ~torch.isfinite(self.log_likelihood)
            if not bool(bad.any()):
                return
            self.z = torch.where(bad[:, None], self.mean + self._noise(), self.z)
            self.log_likelihood = self._evaluate(self.z)
        raise ProgramError(
            f"no starting point with a finite likelihood was found in {INITIAL_TRIES} draws from the prior for "
            f"{int(bad.sum())} of {self.lanes} chains; check the data and the priors"
        )

    def learn(self, problems: int) -> None:
        """Take the ellipse of where the chains are now; what was the likelihood becomes the posterior over it."""
        if self.lanes // problems < 3:
            return
        total = self.log_likelihood + self.prior.log_prob(self.z)
        self.take(Reference.of(self.z, problems))
        self.log_likelihood = total - self.prior.log_prob(self.z)

    def take(self, reference: Reference) -> None:
        """Walk on the ellipses of a reference."""
        self.prior, self.mean = reference, reference.mean(self.lanes, self.z)

    def reference(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep of a learned ellipse."""
        return {"mean": self.prior.loc, "tril": self.prior.tril} if isinstance(self.prior, Reference) else {}

    def advance(self) -> Tensor:
        """One transition of every lane; returns the likelihood evaluations of each (lane,)."""
        nu = self._noise()
        threshold = self.log_likelihood + self._uniform().log()
        angle = 2 * math.pi * self._uniform()
        low, high = angle - 2 * math.pi, angle.clone()
        start = self.z - self.mean
        active = torch.arange(self.lanes, device=self.z.device)
        count = torch.zeros(self.lanes, dtype=torch.int64, device=self.z.device)
        for _ in range(SHRINKS):
            a = angle[active, None]
            proposal = self.mean[active] + start[active] * torch.cos(a) + nu[active] * torch.sin(a)
            value = self._evaluate_some(active, proposal)
            count[active] += 1
            accepted = value > threshold[active]  # NaN is refused
            chosen = active[accepted]
            self.z[chosen], self.log_likelihood[chosen] = proposal[accepted], value[accepted]
            active = active[~accepted]
            fraction = self._uniform()  # for all lanes: the draws of one do not depend on how the others fare
            if not len(active):
                break
            below = angle[active] < 0
            low[active] = torch.where(below, angle[active], low[active])
            high[active] = torch.where(below, high[active], angle[active])
            angle[active] = low[active] + fraction[active] * (high[active] - low[active])
        self.stuck += len(active)
        return count

    def _evaluate_some(self, active: Tensor, z: Tensor) -> Tensor:
        """Log likelihood of the active lanes at z, at the smallest fixed lane count that holds them."""
        if self.flat.program.problems is not None:  # every lane has its place, that of its problem
            return self._evaluate(self.z.index_copy(0, active, z))[active]
        rows = len(z)
        size = min(s for s in self.sizes if s >= rows)
        return self._evaluate(torch.cat([z, z[-1:].expand(size - rows, -1)]))[:rows]

    def _evaluate(self, z: Tensor) -> Tensor:
        self.monitor.cost.add(likelihood_evals=len(z))
        return self.flat.log_density(z) - self.prior.log_prob(z)

    def _noise(self) -> Tensor:
        z = self.z
        noise = torch.randn(z.shape, generator=self.generator, dtype=z.dtype, device=z.device)
        return self.prior.move(noise)

    def _uniform(self) -> Tensor:
        return torch.rand(self.lanes, generator=self.generator, dtype=self.z.dtype, device=self.z.device)
