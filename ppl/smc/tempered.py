"""A program's density with its likelihood raised to a power, and draws from its prior on R^n.

    log pi_beta(z) = log p(x(z)) + log |det dx/dz| + beta log p(y | x(z)),   0 <= beta <= 1

Discrete sites are summed out of the prior and out of the joint density; the likelihood is what is between the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.batched_draws import drawn_in_lanes
from ppl.errors import ProgramError
from ppl.flat import FlatDensity
from ppl.sites import Layout, Leaf, unwrap
from ppl.trace import Run, log_prob_of, seeded

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["PriorDraws", "TemperedDensity"]

REDRAWS = 50  # of draws that fall on the border of a support, where z is infinite


class TemperedDensity(FlatDensity):
    """Log prior plus beta times log likelihood on unconstrained vectors, with its gradient.

    Args:
        program: the program.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl.program import Program
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> density = TemperedDensity(Program(model, torch.tensor(2.0)))
        >>> prior, likelihood = density.split(torch.ones(1, 1))
        >>> value, gradient = density.tempered(torch.ones(1, 1), 0.5)
        >>> torch.allclose(value, prior + 0.5 * likelihood), gradient               # -z + (y - z) / 2
        (True, tensor([[-0.5000]]))
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._beta = 1.0

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior with Jacobian, and log likelihood: (lanes, dim) -> (lanes,), (lanes,)."""
        self._check(z)
        with torch.no_grad():
            lane, log_noise = super()._lane(z)
            function = self.program.lane_function(("split", self.program.lifted), self._both, lane)
            prior, likelihood = function(lane, self._shared())
            return prior + log_noise, likelihood

    def tempered(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """The log density at a power beta above zero, (lanes,), and its gradient (lanes, dim)."""
        self._beta = beta
        return self.log_density_and_grad(z)

    def _lane(self, z: Tensor, scored: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        lane, log_noise = super()._lane(z, scored)
        return {**lane, "temper": z.new_full((len(z),), self._beta)}, log_noise

    def _density(self, lane: Mapping[str, Tensor]) -> Any:
        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
            prior, likelihood = self._both(lane, shared)
            return prior + lane["temper"] * likelihood

        return self.program.lane_function(("tempered", self.program.lifted), one, lane)

    def _both(self, lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log prior and log likelihood of one draw."""
        program, enumerated = self.program, bool(self.program.discrete)
        trace, setter = program.trace_one(lane, shared, self._run(lane))
        if not enumerated:
            prior = log_prob_of(trace, lambda node: not node["is_observed"], enumerated=False, nesting=program.nesting)
            seen = log_prob_of(trace, lambda node: node["is_observed"], enumerated=False, nesting=program.nesting)
            return prior + setter.log_jacobian, seen
        blind = trace.copy()
        for name, node in trace.nodes.items():
            blind.nodes[name] = {**node, "mask": False} if _observed(node) else dict(node)
        scored = [log_prob_of(t, lambda node: True, enumerated=True, nesting=program.nesting) for t in (blind, trace)]
        return scored[0] + setter.log_jacobian, scored[1] - scored[0]


def _observed(node: Any) -> bool:
    return bool(node["type"] == "sample" and node["is_observed"])


class PriorDraws:
    """Draws of a program's prior as unconstrained vectors; lifted sites are given by their noise.

    Args:
        flat: the density whose coordinates are wanted.

    Raises:
        ProgramError: a prior is improper, masked or scaled, so that the model's own draws are not draws of its density.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl.program import Program
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(1.0, 2.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> prior = PriorDraws(Program(model, torch.tensor(2.0)).flat())
        >>> z = prior.draw(4000, torch.Generator().manual_seed(0))
        >>> bool((z.mean() - 1).abs() < 0.2), bool((z.std() - 2).abs() < 0.2)
        (True, True)
    """

    def __init__(self, flat: FlatDensity) -> None:
        self.flat, self.program = flat, flat.program
        self._check()
        # Lifted sites that depend on others are built from their noise inside the model.
        start, leaves = 0, {}
        for name, leaf in flat.layout.leaves.items():
            if leaf.noise and leaf not in flat._outside:
                size = leaf.stop - leaf.start
                leaves[name] = Leaf(name, start, start + size, leaf.shape, noise=True)
                start += size
        self._inner = Layout(leaves, start)
        self._batched = True

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws (count, dim)."""
        z = self._draw(count, generator)
        for _ in range(REDRAWS):
            bad = ~torch.isfinite(z).all(1)
            if not bool(bad.any()):
                return z
            z = torch.where(bad[:, None], self._draw(count, generator), z)
        raise ProgramError(
            f"{int(bad.sum())} of {count} prior draws are infinite on unconstrained space after {REDRAWS} tries: the "
            "prior lies on the border of its support; compute in float64, or start from a fit: start=ppl.Laplace()"
        )

    def _check(self) -> None:
        run = Run(values=self.program.first_values)
        nodes = self.program.trace_one({}, self.program.shared_inputs(), run)[0].nodes
        for name in self.program.latents:
            node = nodes[name]
            fn, base = node["fn"], unwrap(node["fn"])
            why = ""
            if isinstance(base, dist.ImproperUniform):
                why = "is improper"
            elif node["mask"] is not None or isinstance(fn, dist.MaskedDistribution):
                why = "is masked"
            elif not (isinstance(node["scale"], int | float) and node["scale"] == 1):
                why = "is scaled by pyro.poutine.scale"
            if why:
                raise ProgramError(
                    f"the prior of site {name!r} {why}, so the model cannot draw from it; begin at a fit instead, such "
                    "as ppl.Laplace(), ppl.Pathfinder() or ppl.SVI()"
                )

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        program, layout = self.program, self.flat.layout
        own: dict[str, Any] = {"dtype": program.dtype, "device": program.device, "generator": generator}
        noise = {n: torch.randn(count, *leaf.shape, **own) for n, leaf in layout.leaves.items() if leaf.noise}
        given = {leaf.site: self.flat._build(leaf, noise[leaf.site]) for leaf in self.flat._outside}
        lane = torch.zeros(count, dtype=program.dtype, device=program.device)
        with seeded(generator), torch.no_grad(), warnings.catch_warnings():
            # Where vmap has no rule of its own it loops over the lanes, which is still faster than Pyro does.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            if self._batched:
                state = torch.random.get_rng_state()
                try:
                    return torch.vmap(self._one, randomness="different")(lane, given, noise)
                except Exception:  # whatever a prior does that vmap cannot; row by row it is the same law
                    torch.random.set_rng_state(state)
                    self._batched = False
            rows = [
                self._one(lane[i], *({n: v[i] for n, v in part.items()} for part in (given, noise)))
                for i in range(count)
            ]
        return torch.stack(rows)

    def _one(self, lane: Tensor, given: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> Tensor:
        """One run of the model: its latents, unconstrained."""
        inner = [noise[n].reshape(-1) for n in self._inner.leaves]
        run = Run(values=given, layout=self._inner, z=torch.cat(inner) if inner else lane.new_zeros(0))
        with drawn_in_lanes(lane):
            nodes = self.program.trace_one({}, self.program.shared_inputs(), run)[0].nodes
        parts = [
            noise[n] if leaf.noise else biject_to(nodes[n]["fn"].support).inv(nodes[n]["value"])
            for n, leaf in self.flat.layout.leaves.items()
        ]
        return torch.cat([part.to(lane.dtype).reshape(-1) for part in parts])
