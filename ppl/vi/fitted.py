"""A fitted guide: draws, density, evidence bound, files.

ELBO = E_q[log p(z, y) - log q(z)] = log p(y) - KL(q || p(z | y))
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl.cost import Cost
from ppl.errors import CheckpointError, OptionError, ShapeError
from ppl.flat import FlatDensity
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from ppl.storage import load_tensors, save_tensors
from ppl.vi.guides import AutoGuide, Flow, FullRank, Guide, LowRank, MeanField

__all__ = ["FittedGuide", "bound_guide", "full_log_density", "with_parameters"]

LANES_AT_ONCE = 512
BATCHES_AT_MOST = 256  # subsample batches that are worth running for one exact density
KINDS: dict[str, Any] = {c.__name__: c for c in (MeanField, FullRank, LowRank, Flow)}


@dataclass(frozen=True, eq=False)
class FittedGuide:
    """An approximation q(z) to the posterior of a program, as `SVI.fit` returns it.

    Args:
        program: the program, with its learned parameters.
        guide: the family of q.
        params: the guide's parameters, unconstrained.
        history: (steps,) ELBO estimates of the fit, float64.
        optimizer: what a continued fit needs.
        lanes: draws that one gradient took.
        complete: whether the fit ran to its end.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import SVI, Program
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fitted = SVI(steps=300, lr=0.05).fit(Program(model, torch.tensor(2.0)), seed=0)
        >>> posterior = fitted.posterior(1000, seed=0)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.2)
        True
    """

    program: Program
    guide: Guide
    params: dict[str, Tensor]
    history: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict, repr=False)
    lanes: int = 16
    complete: bool = True

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Learnable parameters of the program at their fitted values, constrained."""
        return dict(self.program.parameters)

    def log_prob(self, z: Tensor) -> Tensor:
        """Normalised log q(z) of unconstrained vectors, (lanes, dim) -> (lanes,)."""
        with torch.no_grad():
            return self.guide.log_prob(self.params, z)

    def sample(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Unconstrained draws (draws, dim) and their log q (draws,)."""
        dim = self.program.flat().dim
        with torch.no_grad():
            noise = self.guide.noise(draws, dim, self.program.dtype, generator)
            return self.guide.rsample_and_log_prob(self.params, noise)

    def elbo(self, particles: int = 1024, generator: torch.Generator | None = None, seed: int = 0) -> Estimate:
        """The evidence lower bound and its Monte-Carlo standard error, both float64.

        Args:
            particles: draws it is estimated from.
            generator: source of the draws; made from the seed when None.
            seed: see generator.
        """
        if particles < 2:
            raise OptionError(f"an ELBO with a standard error needs two particles or more, got {particles}")
        generator = generator or torch.Generator(self.program.device).manual_seed(seed)
        z, log_q = self.sample(particles, generator)
        log_p, _ = full_log_density(self.program.flat(), z, self.lanes, generator)
        return _mean(log_p - log_q)

    def posterior(
        self,
        draws: int = 1000,
        chains: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        cost: Cost | None = None,
    ) -> Posterior:
        """Independent draws of the guide as a posterior, with the ELBO and k-hat that come with them.

        k-hat, the tail index of the weights p/q, tells how far to trust the guide: below 0.5 good, above 0.7 not.
        It is NaN where the density is only known up to the noise of a subsample, or with fewer than 25 draws.

        Args:
            draws: draws per chain.
            chains: chains; all are independent draws of one q.
            generator: source of the draws; made from the seed when None.
            seed: see generator.
            cost: what the density evaluations are added to.
        """
        if draws < 1 or chains < 1:
            raise OptionError(f"draws and chains must be one or more, got draws={draws}, chains={chains}")
        generator = generator or torch.Generator(self.program.device).manual_seed(seed)
        cost = Cost() if cost is None else cost
        flat = self.program.flat()
        z, log_q = self.sample(draws * chains, generator)
        log_p, exact = full_log_density(flat, z, self.lanes, generator)
        cost.add(density_evals=len(z))
        log_weight = (log_p - log_q).double()
        elbo = _mean(log_weight)
        info = {
            "elbo": elbo.value,
            "elbo_stderr": elbo.stderr,
            "elbo_history": self.history,
            "pareto_k": _pareto_k(log_weight) if exact else torch.tensor(math.nan, dtype=torch.float64),
            "lp": log_p.reshape(chains, draws),
            "log_q": log_q.reshape(chains, draws),
        }
        return Posterior(
            draws={n: v.reshape(chains, draws, *v.shape[1:]) for n, v in full_values(flat, z).items()},
            parameters=self.parameters,
            guide=self,
            cost=cost,
            info=info,
            observed=dict(self.program.observed_data()),
            attrs={"backend": "SVI", "complete": self.complete},
        )

    def corrected(
        self,
        draws: int = 1000,
        chains: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        cost: Cost | None = None,
        smooth: bool = False,
    ) -> Posterior:
        """Draws of the guide weighted by p(z, y) / q(z), with the evidence and k-hat.

        Args:
            draws: draws per chain.
            chains: chains; all are independent draws of one q.
            generator: source of the draws; made from the seed when None.
            seed: see generator.
            cost: what the density evaluations are added to.
            smooth: smooth the largest weights, see `ppl.Importance`.
        """
        from ppl.importance import weighted_posterior
        from ppl.monitor import Monitor
        from ppl.smc.reference import GuideReference

        if draws < 1 or chains < 1:
            raise OptionError(f"draws and chains must be one or more, got draws={draws}, chains={chains}")
        generator = generator or torch.Generator(self.program.device).manual_seed(seed)
        monitor = Monitor(generator=generator)
        with monitor:
            made = weighted_posterior(GuideReference(self.program, self), draws, chains, generator, monitor, smooth)
        cost = Cost() if cost is None else cost
        cost.merge(monitor.cost)
        attrs = {**made.attrs, "backend": "Importance", "exact": "in_the_limit", "notes": monitor.notes}
        return replace(made, cost=cost, observed=dict(self.program.observed_data()), attrs=attrs)

    # Files -----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors from which `load` builds the same guide again."""
        meta = {
            "kind": "FittedGuide",
            "guide": type(self.guide).__name__,
            "options": _options(self.guide),
            "lanes": self.lanes,
            "complete": self.complete,
            "sites": {n: tuple(leaf.shape) for n, leaf in self.program.flat().layout.leaves.items()},
        }
        tensors = {f"params.{n}": v for n, v in self.params.items()}
        tensors |= {f"parameters.{n}": v for n, v in self.parameters.items()}
        tensors |= {f"optimizer.{n}": v for n, v in self.optimizer.items()}
        return meta, {**tensors, "history": self.history}

    def save(self, path: str | Path) -> None:
        """Write the guide to one safetensors file, with a checksum and without the program."""
        meta, tensors = self.state()
        save_tensors(path, tensors, meta)

    @classmethod
    def load(cls, path: str | Path, program: Program, guide: Guide | None = None) -> FittedGuide:
        """Read a file of `save`.

        Args:
            path: the file.
            program: the program it was fitted to, or one with the same latents and other data.
            guide: the family, where the file cannot name it (guides from outside this package).

        Raises:
            CheckpointError: the file is damaged, or not of a guide.
            ShapeError: the program has other latents.
        """
        tensors, meta = load_tensors(path)
        return cls.from_state(meta, tensors, program, guide, str(path))

    @classmethod
    def from_state(
        cls,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        program: Program,
        guide: Guide | None = None,
        where: str = "the state",
    ) -> FittedGuide:
        """The inverse of `state`, for a program with the same latents."""
        if not isinstance(meta, Mapping) or meta.get("kind") != "FittedGuide":
            raise CheckpointError(f"{where} does not hold a fitted guide; give the path that FittedGuide.save wrote")
        layout = program.flat().layout
        sites = {n: tuple(leaf.shape) for n, leaf in layout.leaves.items()}
        if list(meta["sites"].items()) != list(sites.items()):
            raise ShapeError(f"{where} was fitted to the sites {meta['sites']}, but the program has {sites}")

        def part(prefix: str) -> dict[str, Tensor]:
            named = {n: v for n, v in tensors.items() if n.startswith(prefix)}
            return {n.removeprefix(prefix): v.to(program.device) for n, v in named.items()}

        if guide is None:
            guide = _guide(meta, where)
        return cls(
            program=with_parameters(program, part("parameters.")),
            guide=bound_guide(guide, program.flat()),
            params=part("params."),
            history=tensors["history"],
            optimizer=part("optimizer."),
            lanes=meta["lanes"],
            complete=meta["complete"],
        )


def bound_guide(guide: Guide, flat: FlatDensity) -> Guide:
    """The guide, told of the places of the sites if it asks for them."""
    bind = getattr(guide, "bind", None)
    return guide if bind is None else bind(flat.layout)


def with_parameters(program: Program, parameters: Mapping[str, Tensor]) -> Program:
    """The same program, its graphs included, with learnable parameters at other values."""
    new = copy.copy(program)
    new.parameters = {**program.parameters, **parameters}
    return new


def full_log_density(
    flat: FlatDensity, z: Tensor, lanes: int, generator: torch.Generator | None = None
) -> tuple[Tensor, bool]:
    """Log density (draws,) on all data, and whether it is exact.

    With subsampled plates the mean over the batches of a partition is the full density, where the batches divide the
    plates; otherwise it is the mean over random batches, one for each chunk, and unbiased.
    """
    # Values of lifted sites are built for the whole batch at once; what fits into memory then is what the fit used.
    size = lanes if flat._outside else LANES_AT_ONCE
    batches = list(_partition(flat.program))
    if batches:
        total = torch.stack([_chunked(flat, z, size, subsample) for subsample in batches])
        return total.mean(0), True
    generator = generator or torch.Generator(z.device).manual_seed(0)
    rounds = [draw_subsample(flat.program, generator) for _ in range(16)]
    return torch.stack([_chunked(flat, z, size, subsample) for subsample in rounds]).mean(0), False


def full_values(flat: FlatDensity, z: Tensor) -> dict[str, Tensor]:
    """Site values with all rows of all plates; deterministic sites that differ between subsamples are left out."""
    program = flat.program
    if not program.subsampled:
        return flat.constrain(z)
    covers = []
    for shown, full in program.subsampled.values():
        starts = [*range(0, full - shown, shown), full - shown]
        covers.append([torch.arange(start, start + shown, device=program.device) for start in starts])
    out: dict[str, Tensor] = {}
    moving: set[str] = set()
    for parts in itertools.product(*covers):
        subsample = dict(zip(program.subsampled, parts, strict=True))
        for name, value in flat.constrain(z, subsample).items():
            site = program.sites.get(name)
            if site is not None and value.shape[1:] != site.shape:
                place = [torch.arange(size, device=z.device) for size in (len(z), *site.shape)]
                for frame in site.frames:
                    if frame.name in subsample:
                        place[1 + len(site.shape) - site.event_dim + frame.dim] = subsample[frame.name]
                out.setdefault(name, value.new_empty(len(z), *site.shape))
                out[name][torch.meshgrid(*place, indexing="ij")] = value
            elif name not in out:
                out[name] = value
            elif not torch.equal(out[name], value):
                moving.add(name)
    return {n: v for n, v in out.items() if n not in moving}


def draw_subsample(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh indices, without replacement, for each subsampled plate."""
    return {
        plate: torch.randperm(full, generator=generator, device=generator.device)[:shown]
        for plate, (shown, full) in program.subsampled.items()
    }


def _partition(program: Program) -> Iterator[dict[str, Tensor]]:
    """Subsample indices that show every combination of data once; nothing where that is impossible or too much."""
    plates = program.subsampled
    counts = [full // shown for shown, full in plates.values()]
    if any(full % shown for shown, full in plates.values()) or math.prod(counts) > BATCHES_AT_MOST:
        return
    split = [torch.arange(full, device=program.device).split(shown) for shown, full in plates.values()]
    for parts in itertools.product(*split):
        yield dict(zip(plates, parts, strict=True))


def _chunked(flat: FlatDensity, z: Tensor, size: int, subsample: Mapping[str, Tensor]) -> Tensor:
    """The density in chunks of one size, the last one padded: the size is part of a graph."""
    rows = min(size, len(z))
    missing = -len(z) % rows
    padded = torch.cat([z, z[:missing]]) if missing else z
    return torch.cat([flat.log_density(part, subsample) for part in padded.split(rows)])[: len(z)]


def _mean(values: Tensor) -> Estimate:
    values = values.double()
    spread = values.std() if len(values) > 1 else values.new_tensor(math.nan)
    return Estimate(values.mean(), spread / math.sqrt(len(values)))


def _pareto_k(log_weight: Tensor) -> Tensor:
    """Tail index of the weights by ArviZ; NaN where there are too few or not all are finite."""
    finite = bool(torch.isfinite(log_weight).all())
    if len(log_weight) < 25 or not finite:
        return torch.tensor(math.nan, dtype=torch.float64)
    if float(log_weight.max() - log_weight.min()) < 1e-6:  # q is p up to rounding: there is no tail to fit
        return torch.tensor(-math.inf, dtype=torch.float64)
    import arviz

    _, k_hat = arviz.psislw(log_weight.detach().cpu().numpy().copy())
    return torch.as_tensor(float(k_hat), dtype=torch.float64)


def _options(guide: Guide) -> dict[str, Any]:
    """The options of a guide as plain data."""
    if isinstance(guide, AutoGuide):
        plain = all(isinstance(v, bool | int | float | str) for v in guide.options.values())
        return {"cls": guide.name, "options": dict(guide.options)} if plain else {}
    if type(guide).__name__ not in KINDS or not is_dataclass(guide):
        return {}
    return {f.name: getattr(guide, f.name) for f in fields(guide)}


def _guide(meta: Mapping[str, Any], where: str) -> Guide:
    """The guide that a file names."""
    name, options = meta["guide"], dict(meta["options"])
    if name in KINDS:
        return KINDS[name](**options)
    if name == "AutoGuide" and options:
        from pyro.infer import autoguide

        cls = getattr(autoguide, options["cls"], None)
        if cls is not None:
            return AutoGuide(cls, options["options"])
    raise CheckpointError(f"{where} holds a guide of the kind {name!r} that cannot be rebuilt; pass it as guide=...")
