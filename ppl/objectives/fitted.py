"""A fitted guide that is a Pyro program: its draws run the program, on a part of the data at a time where it must."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.objectives.context import Context
from ppl.objectives.density import direct, reciprocal
from ppl.objectives.engine import Engine
from ppl.program import Program
from ppl.storage import load_tensors
from ppl.trace import seeded, settings
from ppl.vi.fitted_base import Fitted, Weighed
from ppl.vi.full_data import covers, partition, shown_rows

__all__ = ["FittedProgram"]

LANES_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class FittedProgram(Fitted):
    """A guide that is a Pyro program, at the parameters that `SVI.fit` found.

    Args:
        program: the program, with its learned parameters.
        guide: the Pyro program that approximates its posterior.
        params: parameters of the guide, constrained.
        history: (steps,) estimates of the objective during the fit, float64.
        optimizer: what a continued fit needs.
        lanes: copies of the objective that one gradient took.
        complete: whether the fit ran to its end.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("y", dist.Normal(z, 0.5), obs=y)
        >>> def guide(y):
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> fitted = ppl.SVI(guide=guide, steps=200, lr=0.1).fit(ppl.Program(model, torch.tensor(1.0)))
        >>> truth = torch.tensor(0.3 / 0.7).log() + 2.0          # log odds of the exact posterior
        >>> bool((fitted.params["logit"] - truth).abs() < 1e-2)
        True
    """

    KIND: ClassVar[str] = "FittedProgram"

    def module(self, name: str, network: torch.nn.Module) -> torch.nn.Module:
        """A copy of a network that model or guide registered by `pyro.module(name, network)`, as it was learned.

        Args:
            name: its name there.
            network: the network, which keeps its own weights.

        Raises:
            OptionError: no network of that name, or with other weights, was fitted.

        Example:
            >>> import pyro, pyro.distributions as dist, ppl
            >>> net = torch.nn.Linear(1, 1)
            >>> def model(y):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            >>> def guide(y):
            ...     pyro.module("net", net)
            ...     pyro.sample("z", dist.Normal(net(y.reshape(1))[..., 0], 0.7))
            >>> fitted = ppl.SVI(guide=guide, steps=3).fit(ppl.Program(model, torch.tensor(1.0)))
            >>> learned = fitted.module("net", net)
            >>> bool((learned.bias != net.bias).all()), bool((learned.bias == fitted.params["net$$$bias"]).all())
            (True, True)
        """
        named = {**self.params, **self.parameters}
        own = {k: named[f"{name}$$${k}"] for k, _ in network.named_parameters() if f"{name}$$${k}" in named}
        if not own or {k: v.shape for k, v in own.items()} != {k: p.shape for k, p in network.named_parameters()}:
            known = sorted({n.split("$$$")[0] for n in named if "$$$" in n})
            raise OptionError(f"no network {name!r} with these weights was fitted; those that were are {known}")
        learned = copy.deepcopy(network)
        learned.load_state_dict({**learned.state_dict(), **own})
        return learned

    @classmethod
    def load(cls, path: str | Path, program: Program, guide: Any) -> FittedProgram:
        """Read a file of `save`.

        Args:
            path: the file.
            program: the program it was fitted to, or one with the same latents and other data.
            guide: the Pyro program that was fitted.

        Raises:
            CheckpointError: the file is damaged, or not of such a guide.
            ShapeError: the program has other latents.
        """
        tensors, meta = load_tensors(path)
        return cls(guide=guide, **cls._read(meta, tensors, program, str(path)))

    def _weigh(self, count: int, generator: torch.Generator) -> Weighed:
        program = self.program
        found: dict[str, Any] = {}

        def look(ctx: Context, model: Any, guide: Any) -> Tensor:
            draw = ctx.sim(guide)
            scale = ctx.engine.plan.scale
            found["p"] = direct(ctx.density(model, draw), "the model's density") * scale
            found["q"] = reciprocal(draw.density, "the guide's density") * scale
            found["values"] = {n: draw[n] for n in program.latents}
            return found["p"] - found["q"]

        engine = Engine(look, program, self.guide, policy=lambda name, fn: _plainest(fn))
        params = {**engine.parameters, **self.params, **program.parameters}
        batches = list(partition(program)) if program.subsampled else [{}]
        exact = bool(batches)
        seeds_from = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        parts = []
        for start in range(0, count, LANES_AT_ONCE):
            size = min(LANES_AT_ONCE, count - start)
            seeds: dict[Any, int] = {}
            engine._generator = torch.Generator(program.device).manual_seed((seeds_from + start) % 2**31)
            runs = []
            for indices in batches or covers(program):
                with torch.no_grad(), seeded(engine._generator), settings(program.dtype, validate=False):
                    engine._value(Context(engine, params, size, seeds, dict(indices), {}))
                rows = [found[n].reshape(size, -1).sum(1) for n in ("p", "q")]
                runs.append((indices, dict(found["values"]), *rows))
            values = _assembled(program, runs, size)
            parts.append((values, torch.stack([r[2] for r in runs]).mean(0), torch.stack([r[3] for r in runs]).mean(0)))
        values = {n: torch.cat([p[0][n] for p in parts]) for n in parts[0][0]}
        return Weighed(values, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), exact)

    def _values(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        return draws


def _plainest(fn: Any) -> str:
    """An estimator that any site has, for draws without gradients."""
    return "reparam" if fn.has_rsample else "reinforce"


def _assembled(program: Program, runs: list[Any], size: int) -> dict[str, Tensor]:
    """Site values with all rows of their subsampled plates."""
    out: dict[str, Tensor] = {}
    for name, site in program.latents.items():
        if not site.subsampled:
            out[name] = runs[0][1][name].expand(size, *site.shape)
            continue
        whole = out[name] = runs[0][1][name].new_zeros(size, *site.shape)
        for indices, values, *_ in runs:
            whole[shown_rows(site, indices, size)] = values[name]
    return out
