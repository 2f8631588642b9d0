r"""A normal for a few unknowns, and for all others normals whose means and scales follow the few.

a ~ N(loc, L L'),   e = L^-1 (a - loc),   b | a ~ N(mean + e slope, diag(exp(log_sd + e tilt))^2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.option_checks import check_integers
from ppl.sites import Layout
from ppl.vi.guides.full_rank import FullRank
from ppl.vi.guides.guide import LOG_2PI, Params, check_init_scale, detached, standard_normal

__all__ = ["Hierarchical"]

UPPER = "upper."
REACH = 6.0  # in sd of a: how far lines are followed where chains go beyond what the fit has seen


@dataclass(frozen=True)
class Hierarchical:
    r"""q(a) q(b | a): a full-rank normal for a, and b independent given a, its means and log sds linear in a.

    For few parameters a of many numbers b, such as the parameters of a process and its driving noise; parameters grow
    with the product of both. On `ppl.Transport` it bends further: there b has its mean at its conditional mode given a,
    reached from the line by `ascent` steps of conjugate gradients up log p(a, b, y), with the variances as metric; the
    line ends six standard deviations out.

    Args:
        upper: names of the sites in a; all but the largest site when empty.
        ascent: steps to the conditional mode, on `ppl.Transport` alone, for as many gradients and one. Where b is
            nearly independent given a, each leaves a small part of what the line misses, whatever the scale of b.
        init_scale: standard deviation at the start.

    Raises:
        OptionError: an option is out of range.

    Source: Tan, Bhaskaran & Nott (2020), conditionally structured Gaussians [inferred]; the ascent [derived].

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> def funnel(y):
        ...     width = pyro.sample("width", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Normal(torch.zeros(9), width.exp()).to_event(1))
        ...     pyro.sample("y", dist.Normal(b, 1.0).to_event(1), obs=y)
        >>> fit = ppl.SVI(guide=Hierarchical(), steps=50).fit(ppl.Program(funnel, torch.ones(9)))
        >>> fit.params["slope"].shape
        torch.Size([1, 9])
    """

    upper: tuple[str, ...] | str = ()
    ascent: int = 2
    init_scale: float = 0.1
    places: tuple[int, ...] = field(default=(), repr=False, kw_only=True)  # of b in a vector

    def __post_init__(self) -> None:
        check_init_scale(self.init_scale)
        check_integers(self, ascent=0)
        object.__setattr__(self, "upper", (self.upper,) if isinstance(self.upper, str) else tuple(self.upper))
        object.__setattr__(self, "places", tuple(self.places))

    def bind(self, layout: Layout) -> Hierarchical:
        """The guide, told where the sites are.

        Raises:
            OptionError: a name is no site, or nothing is left for either part.
        """
        leaves = layout.leaves
        upper = set(self.upper or leaves)
        if not self.upper:
            upper.remove(max(leaves, key=lambda n: leaves[n].stop - leaves[n].start))
        lower = [leaf for name, leaf in leaves.items() if name not in upper]
        if not upper <= set(leaves) or not upper or not lower:
            raise OptionError(
                f"upper must name some of the sites {list(leaves)}, and not all of them, got {list(self.upper)}"
            )
        return replace(self, places=tuple(i for leaf in lower for i in range(leaf.start, leaf.stop)))

    def init(self, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        """Centre zero, all scales equal, nothing follows anything."""
        few, many = dim - len(self.places), len(self.places)
        params = {UPPER + n: v for n, v in FullRank(self.init_scale).init(few, dtype, device, generator).items()}
        zeros = torch.zeros(few + 1, many, dtype=dtype, device=device)
        log_sd = torch.full_like(zeros[0], self.init_scale).log()
        return {**params, "mean": zeros[0], "slope": zeros[1:], "log_sd": log_sd, "tilt": zeros[1:].clone()}

    def noise(self, lanes: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(lanes, dim) standard normal."""
        return standard_normal(lanes, dim, dtype, generator)

    def rsample_and_log_prob(self, params: Params, noise: Tensor, *, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws (lanes, dim) and their log density (lanes,)."""
        z, log_q = self._draw(params, noise, None)
        return z, self.log_prob(detached(params), z) if path else log_q

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Normalised log density, (lanes, dim) -> (lanes,)."""
        a, b = self._split(z)
        own = _upper(params)
        e = (a - own["loc"]) * (-own["log_scale"]).exp()
        e = torch.linalg.solve_triangular(own["lower"].mT, e, upper=True, left=False, unitriangular=True)
        mean, log_sd = self._law(params, e)
        white = torch.cat([e, (b - mean) * (-log_sd).exp()], -1)
        return _log_normal(white) - own["log_scale"].sum() - log_sd.sum(-1)

    def draw_near(
        self, params: Params, noise: Tensor, log_density: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One draw (dim,) with b around its conditional mode, and its log density (0-d); for maps over draws.

        Args:
            params: of the guide.
            noise: (dim,) standard normal.
            log_density: of the program, (dim,) -> 0-d.
        """
        return self._draw(params, noise, log_density)

    def _draw(
        self, params: Params, noise: Tensor, log_density: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        own = _upper(params)
        e, u = self._split(noise)
        a = own["loc"] + own["log_scale"].exp() * (e + e @ own["lower"].tril(-1).mT)
        if log_density is None:
            b, log_sd = self._law(params, e)
        else:  # on Transport the lines bend to their ends: far out, the mode no longer follows them
            b, log_sd = self._law(params, e * (1 + (e / REACH) ** 4) ** -0.25)
            slope = torch.func.grad(lambda b: log_density(self._join(a, b)))
            b = _climb(slope, b, (2 * log_sd).exp(), self.ascent)
        log_q = _log_normal(noise) - own["log_scale"].sum() - log_sd.sum(-1)
        return self._join(a, b + log_sd.exp() * u), log_q

    def _law(self, params: Params, e: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log sds of b."""
        return params["mean"] + e @ params["slope"], params["log_sd"] + e @ params["tilt"]

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(..., few) and (..., many)."""
        places = set(self.places)
        first = [i for i in range(z.shape[-1]) if i not in places]
        return z[..., first], z[..., list(self.places)]

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        """The inverse of `_split`."""
        places = set(self.places)
        size = a.shape[-1] + b.shape[-1]
        order = [i for i in range(size) if i not in places] + list(self.places)
        inverse = sorted(range(size), key=order.__getitem__)
        return torch.cat([a, b], -1)[..., inverse]


def _climb(slope: Callable[[Tensor], Tensor], start: Tensor, variance: Tensor, steps: int) -> Tensor:
    """Conjugate gradients up a nearly quadratic log density, with curvatures from differences of its gradient."""
    tiny = torch.finfo(start.dtype).tiny
    first = rest = slope(start) if steps else start
    way = variance * rest
    size, b = (rest * way).sum(), start
    for i in range(steps):
        bent = first - slope(start + way)
        length = size / (way * bent).sum().clamp_min(tiny)
        b = b + length * way
        if i + 1 < steps:
            rest = rest - length * bent
            before, size = size, (rest * variance * rest).sum()
            way = variance * rest + size / before.clamp_min(tiny) * way
    return b


def _upper(params: Params) -> dict[str, Tensor]:
    """Parameters of the normal of a."""
    return {n.removeprefix(UPPER): v for n, v in params.items() if n.startswith(UPPER)}


def _log_normal(white: Tensor) -> Tensor:
    """Standard normal log density over the last axis."""
    return -0.5 * (white.square().sum(-1) + white.shape[-1] * LOG_2PI)
