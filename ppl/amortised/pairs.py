"""Latents and data simulated from a program, as the vectors that a network is trained on: (z, y) ~ p(z, y).

z holds the latents on R^n, as `program.flat()` lays them out; y holds the observed sites, one after the other.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.utils import _pytree as pytree

from ppl.batched_draws import drawn_in_lanes
from ppl.cost import Cost, DenoiserCounter
from ppl.errors import NotFiniteError, ProgramError
from ppl.flat import FlatDensity
from ppl.program import Program
from ppl.sites import Layout, Leaf, unwrap
from ppl.storage import digest
from ppl.trace import Run, seeded

__all__ = ["Pairs", "data_of", "givens"]

LOST_AT_MOST = 0.01  # share of simulated rows that may fall on the border of a support


class Pairs:
    """Simulates a program many times at once.

    The model runs once under vmap, with other random numbers in every lane; one that cannot (data-dependent loops, LKJ
    and von Mises draws) runs row by row, which is slow.

    Args:
        program: one problem; its latents continuous, its priors proper.
        cost: what the denoiser calls of diffusion priors are added to.

    Raises:
        ProgramError: a latent is discrete, a prior improper, a plate subsampled, or the model scaled or given a factor:
            then its simulations are not draws from its density.

    Example:
        >>> import pyro
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.Exponential(1.0))
        ...     pyro.sample("y", dist.Normal(torch.zeros(2), scale).to_event(1), obs=y)
        >>> z, y = Pairs(Program(model, torch.zeros(2))).draw(100, torch.Generator().manual_seed(0))
        >>> z.shape, y.shape
        (torch.Size([100, 1]), torch.Size([100, 2]))
    """

    def __init__(self, program: Program, cost: Cost | None = None) -> None:
        self.mask = _check(program)  # (data_dim,) which data are seen
        self.program, self.cost = program, Cost() if cost is None else cost
        self.layout = FlatDensity(program, coordinates=True).layout
        self.latent_shapes = {n: tuple(leaf.shape) for n, leaf in self.layout.leaves.items()}
        self.data_shapes = {n: tuple(s.shape) for n, s in program.observed.items()}
        self.dim = self.layout.dim
        self.data_dim = sum(math.prod(shape) for shape in self.data_shapes.values())
        self.notes: list[str] = []
        # Lifted sites that depend on others are built from their noise inside the model.
        start, leaves = 0, {}
        for name, leaf in self.layout.leaves.items():
            if leaf.noise and not program.sites[name].static:
                size = leaf.stop - leaf.start
                leaves[name] = Leaf(name, start, start + size, leaf.shape, noise=True)
                start += size
        self._inner = Layout(leaves, start)
        self.batched = True
        try:
            self._rows(4, torch.Generator(program.device).manual_seed(0))
        except Exception as error:  # whatever a model does that vmap cannot
            self.batched = False
            reason = str(error).strip().partition("\n")[0][:120]
            self.notes.append(f"the model is simulated row by row, not in batches: {reason}")

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh pairs z: (rows, dim) and y: (rows, data_dim); masked data are zero.

        Raises:
            NotFiniteError: more than one row in a hundred has an infinite coordinate.
        """
        z, y = self._rows(rows, generator)
        good = torch.isfinite(z).all(1) & torch.isfinite(y).all(1)
        if bool(good.all()):
            return z, y
        lost = rows - int(good.sum())
        if lost > LOST_AT_MOST * rows:
            raise NotFiniteError(
                f"{lost} of {rows} simulations are not finite on the unconstrained scale; check the priors' tails and "
                "borders, or compute in float64"
            )
        self.notes[:] = [n for n in self.notes if "left out" not in n]
        self.notes.append("simulations that fell on the border of a support were left out (below 1 in 100)")
        kept = torch.nonzero(good)[:, 0]
        index = torch.cat([kept, kept[:lost]])
        return z[index], y[index]

    def _rows(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        program = self.program
        own: dict[str, Any] = {"dtype": program.dtype, "device": program.device}
        with seeded(generator), torch.no_grad(), warnings.catch_warnings():
            # Where vmap has no rule of its own it loops over the lanes, which is still faster than Pyro does.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            given: dict[str, Tensor] = {}
            noise: dict[str, Tensor] = {}
            for name, site in program.latents.items():
                leaf = self.layout.leaves[name]
                if leaf.noise:
                    noise[name] = torch.randn(rows, *leaf.shape, **own)
                    if site.static:
                        given[name] = unwrap(site.distribution).from_noise(noise[name])
                elif site.static and "denoiser" in site.capabilities:  # one run of the sampler for all rows
                    with _counted(unwrap(site.distribution), self.cost):
                        given[name] = site.distribution.sample((rows,))
            z, y = self._many(self._one, rows, given, noise)
        return z, torch.where(self.mask, y, torch.zeros_like(y))

    def _many(self, one: Callable[..., Any], rows: int, *parts: Any) -> Any:
        """A function of one lane and its parts of dicts or tensors, for all rows: in one batch, or row by row."""
        lane = torch.zeros(rows, dtype=self.program.dtype, device=self.program.device)
        if self.batched:
            return torch.func.vmap(one, randomness="different")(lane, *parts)
        several = [one(lane[i], *pytree.tree_map(lambda v, i=i: v[i], parts)) for i in range(rows)]
        return pytree.tree_map(lambda *v: torch.stack(v), *several)

    def _one(self, lane: Tensor, given: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents and data of one run of the model."""
        inner = [noise[n].reshape(-1) for n in self._inner.leaves]
        run = Run(values=given, predict=True, layout=self._inner, z=torch.cat(inner) if inner else lane.new_zeros(0))
        with drawn_in_lanes(lane):
            nodes = self.program.trace_one({}, self.program.shared_inputs(), run)[0].nodes
        latents = [
            noise[n] if leaf.noise else biject_to(nodes[n]["fn"].support).inv(nodes[n]["value"])
            for n, leaf in self.layout.leaves.items()
        ]
        return self._flat(latents), self._flat([nodes[n]["value"] for n in self.data_shapes])

    def _flat(self, values: list[Tensor]) -> Tensor:
        return torch.cat([v.to(self.program.dtype).reshape(-1) for v in values])


@contextmanager
def _counted(prior: Any, cost: Cost) -> Iterator[None]:
    """Count denoiser calls of a prior that keeps a list of `counters`."""
    counters, count = getattr(prior, "counters", []), DenoiserCounter(cost)
    counters.append(count)
    try:
        yield
    finally:
        counters[:] = [c for c in counters if c is not count]


def data_of(program: Program, mask: Tensor) -> Tensor:
    """The data of one problem as a vector (data_dim,), zero where they are masked."""
    flat = torch.cat([v.to(program.dtype).reshape(-1) for v in program.data.values()])
    return torch.where(mask, flat, torch.zeros_like(flat))


def givens(program: Program, names: list[str] | None = None) -> tuple[list[str], str]:
    """Inputs of the model other than its data (covariates, parameters): their names, and a hash of their values.

    Args:
        program: one problem.
        names: those to hash; by default all that do not hold the data of an observed site.
    """
    inputs = program.shared_inputs()
    if names is None:
        data = list(program.data.values())
        names = [
            n
            for n, v in inputs.items()
            if not n.startswith("data.")
            and not any(v.shape == d.shape and v.dtype == d.dtype and torch.equal(v, d) for d in data)
        ]
    there = {n: inputs[n] for n in names if n in inputs}
    return names, hashlib.sha256(digest(there).encode()).hexdigest()


def _check(program: Program) -> Tensor:
    """Refuse programs whose simulations are not draws from their density; returns which data are not masked."""
    if program.problems is not None:
        raise ProgramError("simulation takes one problem: program.problem(0)")
    if program.discrete:
        raise ProgramError(
            f"latent sites {list(program.discrete)} are discrete, and a denoiser needs continuous ones; sum them out "
            "by hand, or use an engine that does, such as ppl.NUTS()"
        )
    if program.subsampled:
        raise ProgramError(
            f"plates {list(program.subsampled)} show part of their data at a time; an amortised posterior sees all of "
            "them: remove subsample_size, or use ppl.SVI()"
        )
    with seeded(torch.Generator(program.device).manual_seed(0)), torch.no_grad():
        trace = program.trace_one({}, program.shared_inputs(), Run(values=program.first_values))[0]
    masks = {n: torch.ones(s.shape, dtype=torch.bool, device=program.device) for n, s in program.observed.items()}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        fn = unwrap(node["fn"])
        what = None
        if isinstance(fn, dist.ImproperUniform):
            what = "has an improper prior, from which nothing can be drawn"
        elif isinstance(fn, dist.Unit):
            what = "is a factor, which changes the density but not what is simulated"
        elif isinstance(node["scale"], Tensor) or node["scale"] != 1:
            what = "is scaled, which changes the density but not what is simulated"
        if what is not None:
            raise ProgramError(f"site {name!r} {what}; use an engine that works with the density, such as ppl.NUTS()")
        if name in masks:
            for mask in (node["mask"], getattr(node["fn"], "_mask", None)):
                if mask is False:
                    masks[name][...] = False
                elif isinstance(mask, Tensor):
                    extra = program.sites[name].event_dim
                    masks[name] &= mask.reshape(*mask.shape, *[1] * extra)
    return torch.cat([m.reshape(-1) for m in masks.values()])
