"""A program as engines that walk along a path see it: the path, and what the data say of it up to each of its times.

The log density of the data is cut into terms, one for every datum of every observed site. A term belongs to the last
time that it depends on, found by changing the path from one probe to another, time by time:

    log p(y | X) = sum_i g_i(X_1 .. X_i)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from inverse.likelihood import Likelihood
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import CapabilityError
from ppl.monitor import Monitor
from ppl.program import Program
from ppl.sites import is_deterministic, unwrap
from ppl.trace import Run
from sde.path import Path

__all__ = ["PathProblem", "path_site"]

PROBES = 3
ROWS = 512  # probe paths in one call


@dataclass(frozen=True)
class PathProblem(DiffusionProblem):
    """A program's path, given the values of all other latents, and the terms of its likelihood.

    `prior` is the `sde.Path` itself.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from sde import Process
        >>> path = Path(Process(lambda x, t: -x), torch.tensor([0.5, 1.0, 1.5]))
        >>> def model(y):
        ...     x = pyro.sample("x", path)
        ...     pyro.sample("y", dist.Normal(x[1:, 0], 0.5).to_event(1), obs=y)
        >>> PathProblem.of(Program(model, torch.zeros(2))).last.tolist()
        [1, 2]
    """

    @classmethod
    def of(cls, program: Program, site: str | None = None, given: Mapping[str, Tensor] | None = None) -> PathProblem:
        """Read the problem off a program.

        Args:
            program: with one path.
            site: its name; None where there is one.
            given: values of all other latents, where there are any.

        Raises:
            CapabilityError: no path, several and no name, a plate of paths, or other latents without a value.
            ProgramError: a plate is subsampled.
        """
        from ppl.mcmc.target import refuse_subsampling

        refuse_subsampling(program, "an engine that walks along a path")
        site = path_site(program, site)
        given = dict(given or {})
        missing = [n for n in program.latents if n != site and n not in given]
        if missing:
            raise CapabilityError(
                f"this engine walks along the path {site!r} alone, but the program has other latents {missing}; use "
                f"inverse.ParticleGibbs(), which moves them in turn, or ppl.NoiseSpace(engine), or fix them with "
                "pyro.condition"
            )
        likelihood = Likelihood(program, (site,), {n: v for n, v in given.items() if n != site})
        law = program.sites[site].distribution
        if not program.sites[site].static and likelihood.given:
            blank = torch.zeros(program.sites[site].shape, dtype=program.dtype, device=program.device)
            with torch.no_grad():
                law = likelihood.observe(blank, scored=True).nodes[site]["fn"]
        return cls(program, (site,), unwrap(law), likelihood)

    @property
    def path(self) -> Path:
        """The path's law."""
        return self.prior

    def terms(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log densities of all data, one by one: paths (lanes, n, d) -> (lanes, term).

        Latents whose prior depends on another site count as data here: the path may be what they depend on.

        Args:
            x: paths.
            given: values of the other latents by lane, (lanes, *shape); None takes those of the problem.
        """
        (site,) = self.sites
        program, values = self.program, self.values(x, given)
        scored = {n for n in values if n != site and not program.sites[n].static}

        def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
            trace, _ = program.trace_one(lane, shared, Run(values=lane, unscored=frozenset(lane) - scored))
            parts = [_parts(node) for name, node in trace.nodes.items() if _counts(node) or name in scored]
            return torch.cat(parts) if parts else torch.zeros(0)

        function = program.lane_function(("path terms", site, tuple(values)), one, values)
        out: Tensor = function(program.lane_inputs(values), program.shared_inputs())
        return out

    def values(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Values of all latents, the path first."""
        return self.likelihood.values(x) if given is None else {self.sites[0]: x, **given}

    @cached_property
    def last(self) -> Tensor:
        """(term,) index of the last time of the path that each term depends on; 0 for those that depend on none."""
        path, n = self.path, len(self.path.times)
        generator = torch.Generator(self.device).manual_seed(0)
        found: Tensor | None = None
        with torch.no_grad():
            for _ in range(PROBES):
                one, other = path.draw((2,), generator)
                place = torch.arange(n, device=self.device)
                parts = []
                for first in range(0, n + 1, ROWS):
                    cut = torch.arange(first, min(first + ROWS, n + 1), device=self.device)
                    parts.append(self.terms(torch.where((place < cut[:, None])[..., None], other, one)))
                terms = torch.cat(parts)
                close = torch.isclose(terms[1:], terms[:-1], rtol=1e-9 if self.dtype == torch.float64 else 1e-4)
                latest = (place[:, None] * ~close).amax(0)
                found = latest if found is None else torch.maximum(found, latest)
        assert found is not None
        return found

    @contextmanager
    def counting(self, cost: Cost) -> Iterator[None]:
        """A path calls no denoiser."""
        yield

    @contextmanager
    def running(self, monitor: Monitor) -> Iterator[None]:
        """Nothing to note."""
        yield


def path_site(program: Program, site: str | None = None) -> str:
    """Name of the program's path.

    Raises:
        CapabilityError: there is none, there are several and no name is given, or it stands in a plate.
    """
    found = [n for n, s in program.latents.items() if isinstance(unwrap(s.distribution), Path)]
    names = [n for n in found if site in (None, n)]
    if len(names) != 1:
        raise CapabilityError(
            f"expected one latent sde.Path{'' if site is None else f' called {site!r}'}, found {names or found} among "
            f"{list(program.latents)}; name it where there are several, or run ppl.NoiseSpace(engine)"
        )
    shape = tuple(program.sites[names[0]].shape)
    if len(shape) > 2:
        raise CapabilityError(
            f"the path {names[0]!r} has a batch shape or stands in a plate, shape {shape}, and this engine walks "
            "along one path; make its copies coordinates of one path, or run ppl.NoiseSpace(engine)"
        )
    return names[0]


def _counts(node: Any) -> bool:
    """Whether a node of a trace carries data, or is a factor."""
    from pyro.poutine.util import site_is_subsample

    return bool(
        node["type"] == "sample" and node["is_observed"] and not site_is_subsample(node) and not is_deterministic(node)
    )


def _parts(node: Any) -> Tensor:
    """Log densities of a node, event axes that only join independent data taken apart: (term,)."""
    fn, mask, joined = node["fn"], node["mask"], 0
    while isinstance(fn, torch.distributions.Independent):
        joined, fn = joined + fn.reinterpreted_batch_ndims, fn.base_dist
    log_prob = fn.log_prob(node["value"], *node["args"], **node["kwargs"])
    if isinstance(mask, Tensor):
        mask = mask.reshape(*mask.shape, *(1,) * joined)
    return scale_and_mask(log_prob, node["scale"], mask).reshape(-1)
