"""The factors of a path's noise as they move, and the path of a program at values of its other unknowns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl.errors import CapabilityError
from ppl.program import Program
from ppl.sites import Layout, unwrap
from ppl.trace import Run
from sde.incomplete_gamma import constant
from sde.increments import starts_random
from sde.path import Path

__all__ = ["Factors", "ProgramPath", "path_leaf"]


class Factors:
    """The factors of a path's noise as they move.

    Args:
        path: whose grid and noise they are of.
        like: (lanes, ...) tensor that gives lanes, type and device.
        start: (lanes, m K) normal numbers of Y(0) for noise of type I; zero when None.
    """

    def __init__(self, path: Path, like: Tensor, start: Tensor | None = None) -> None:
        noise, grid = path.process.noise, path.increments
        decay, gain = noise.transition(grid.dt)
        self.decay, self.gain = constant(decay, like).to(like), constant(gain, like).to(like)
        self.scale = constant(grid.dt, like).to(like).sqrt()
        before, after = grid.weights(like)
        self.before, self.after = (w.expand(*w.shape[:-2], path.steps, -1).to(like) for w in (before, after))
        shape = (len(like), path.noises, noise.size)
        if start is None or not starts_random(noise):
            self.y = like.new_zeros(shape)
        else:
            root = constant(noise.initial_factor, like).to(like)  # type: ignore[attr-defined]
            self.y = start.reshape(shape) @ root.mT
        rates = np.array(noise.rates) if noise.size else np.zeros(0)  # type: ignore[attr-defined]
        self.unit = constant(np.sqrt(2 * rates + 1 / grid.grid[-1]), like).to(like)

    @property
    def seen(self) -> Tensor:
        """The factors in units of their spread, (lanes, m, K)."""
        return self.y * self.unit

    def move(self, n: int, z: Tensor) -> Tensor:
        """One step by driving numbers (lanes, m); the increments of the noise, (lanes, m)."""
        if not self.y.shape[-1]:
            return self.scale[n] * z
        new = self.decay[n] * self.y + self.gain[n] * self.scale[n] * z[..., None]
        increment = (self.after[..., n, :] * new - self.before[..., n, :] * self.y).sum(-1)
        self.y = new
        return increment


class ProgramPath:
    """The path at a site of a program: one for all, or one for each value of other unknowns and learned parameters.

    Args:
        program: the program.
        layout: places of its latents.
        site: name of the path.
    """

    def __init__(self, program: Program, layout: Layout, site: str) -> None:
        self.program, self.layout, self.site = program, layout, site
        self.first: Path = unwrap(program.sites[site].distribution)
        self.fixed = program.sites[site].static and not program.parameters

    def each(self, z: Tensor, parameters: Mapping[str, Tensor], action: Callable[..., Any], *lanes: Tensor) -> Any:
        """`action(path, *own)` for every lane, inside the model's run, where learned modules hold their values.

        Args:
            z: (lanes, dim) unconstrained vectors; what they hold for the path itself is not used.
            parameters: learned parameters; those of the program where they are left out.
            action: takes the path and one row of each of `lanes`; returns a pytree of tensors.
            lanes: (lanes, ...) what differs between lanes.

        Returns:
            The pytree with a leading lane axis.
        """
        program = self.program
        shared = program.shared_inputs(params={**program.parameters, **parameters})
        value = torch.zeros(program.sites[self.site].shape, dtype=z.dtype, device=z.device)

        def one(row: Tensor, *own: Tensor) -> Any:
            run = Run(values={self.site: value}, z=row, layout=self.layout)
            return self.run({}, shared, run, lambda path: (action(path, *own), value))[1]

        if program.batching != "loop":
            return torch.vmap(one)(z, *lanes)
        rows = [one(*each) for each in zip(z, *lanes, strict=True)]
        return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *rows)

    def run(
        self, lane: Mapping[str, Tensor], shared: Mapping[str, Tensor], run: Run, action: Callable[[Path], Any]
    ) -> tuple[Any, Any]:
        """The program's trace and setter of one run, and what `action(path)` found: it returns that and the value."""
        with _At(self.site, action) as at:
            made = self.program.trace_one(lane, shared, run)
        return made, at.found


class _At(Messenger):
    """Does something with the distribution of a site when the model comes to it, which may give the site a value."""

    def __init__(self, site: str, action: Callable[[Any], tuple[Any, Tensor]]) -> None:
        super().__init__()
        self.site, self.action, self.found = site, action, None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            self.found, msg["value"] = self.action(unwrap(msg["fn"]))


def path_leaf(layout: Layout, size: int | None, site: str | None, program: Program | None, who: str) -> str:
    """Name of the lifted path of a program.

    Args:
        layout: places of the latents.
        size: how many numbers build it; None where the program knows its paths.
        site: its name, where the user gave one.
        program: the program, where it is known.
        who: what asks, for the message.

    Raises:
        CapabilityError: no such path, or several and no name.
    """

    def fits(name: str) -> bool:
        leaf = layout.leaves[name]
        known = program is None or isinstance(unwrap(program.sites[name].distribution), Path)
        return leaf.noise and known and size in (None, leaf.stop - leaf.start) and site in (None, name)

    names = [n for n in layout.leaves if fits(n)]
    if len(names) != 1:
        what = "one path" if size is None else f"one path of {size} driving numbers"
        raise CapabilityError(
            f"{who} steers {what} in noise space, found {names or 'none'} among {list(layout.leaves)}; run it by "
            "ppl.NoiseSpace(ppl.SVI(guide=...)), give it the program's path, and name the site where there are several"
        )
    return names[0]
