"""Pairs whose prior changes from row to row: (phi, z, y) ~ p(phi) p(z | phi) p(y | z).

phi is a mixture on the unconstrained scale that replaces the program's prior, or lies in observed sites of the program.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.amortised.mixture import Mixture
from ppl.amortised.pairs import Pairs
from ppl.amortised.priors import MixtureLaw
from ppl.amortised.training import Scales
from ppl.batched_draws import drawn_in_lanes
from ppl.cost import Cost
from ppl.errors import OptionError, ProgramError, ShapeError
from ppl.program import Program
from ppl.trace import Run, seeded

__all__ = ["Columns", "MixturePairs", "columns_of"]

MEASURED = 1024  # draws of the program's own prior that tell its place
DECILES = 2.563  # between the first and the last decile of a standard normal


@dataclass(frozen=True)
class Columns:
    """What the columns of a data vector are.

    Args:
        packed: how many at the front hold a packed mixture.
        prior: places of the prior's parameters behind them.
        tokens: for each group of data the places of its tokens, (tokens, numbers of a token).
        logs: places of positive parameters of the prior, which are shown by their logarithms.
    """

    packed: int
    prior: list[int]
    tokens: list[list[list[int]]]
    logs: list[int]


def columns_of(program: Program, packed: int, prior_sites: Sequence[str], rows: Sequence[str]) -> Columns:
    """Group the data of a program into tokens: one per row of a plate or of a site in `rows`, else one per site.

    Raises:
        OptionError: a name is not that of an observed site with data, or a site in `rows` has no axis.
    """
    for name in (*prior_sites, *rows):
        if name not in program.observed:
            raise OptionError(f"{name!r} is not an observed site; these are {list(program.observed)}")
    places: dict[str, list[int]] = {}
    start = packed
    for name, site in program.observed.items():
        size = math.prod(site.shape)
        places[name] = list(range(start, start + size))
        start += size
    groups: dict[tuple[str, int], list[list[int]]] = {}
    for name, site in program.observed.items():
        if name in prior_sites:
            continue
        if name in rows and not site.shape:
            raise OptionError(f"site {name!r} is one number and has no rows")
        many = name in rows or bool(site.plates)
        count = site.shape[0] if many else 1
        each = len(places[name]) // max(count, 1)
        key = ("rows", count) if name in rows else (site.plates[0], count) if many else (f"site {name}", 1)
        mine = [places[name][i * each : (i + 1) * each] for i in range(count)]
        before = groups.get(key)
        groups[key] = mine if before is None else [a + b for a, b in zip(before, mine, strict=True)]
    prior = [i for name in prior_sites for i in places[name]]
    positive = [n for n in prior_sites if _positive(program, n)]
    return Columns(packed, prior, list(groups.values()), [i for n in positive for i in places[n]])


def _positive(program: Program, name: str) -> bool:
    """Whether the unconstrained form of a site is its logarithm."""
    support = program.sites[name].support
    support = getattr(support, "base_constraint", support)
    return (
        not program.sites[name].discrete
        and type(support) in (type(constraints.positive), type(constraints.nonnegative))
        and float(support.lower_bound) == 0
    )


class MixturePairs(Pairs):
    """Simulates a program under many priors; y is (packed mixture, data).

    Args:
        program: one problem; its latents continuous, its priors proper.
        components: of each mixture.
        law: of mixtures that replace the program's prior; None keeps the prior.
        prior_sites: observed sites that hold parameters of the prior.
        rows: observed sites whose first axis is one token per row.
        cost: what the denoiser calls of diffusion priors are added to.

    Raises:
        ProgramError: see `Pairs`; or the place of a latent's support depends on other latents.
    """

    def __init__(
        self,
        program: Program,
        components: int,
        law: MixtureLaw | None,
        prior_sites: Sequence[str],
        rows: Sequence[str],
        cost: Cost | None = None,
    ) -> None:
        self.law, self.components = None, components
        self.columns = Columns(0, [], [], [])
        super().__init__(program, cost)
        if not program.observed:
            raise ProgramError("there is no observed site to learn from")
        packed = 0 if law is None else Mixture.packed_size(components, self.dim)
        self.columns = columns_of(program, packed, prior_sites, rows)
        self.center, self.scale = self._place()
        self.law = law
        if law is not None:
            self._check_law(law)
        self.data_dim += packed

    def _place(self) -> tuple[Tensor, Tensor]:
        """Median and spread of the program's own prior on the unconstrained scale."""
        z, _ = self._rows(MEASURED, torch.Generator(self.program.device).manual_seed(0))
        low, middle, high = torch.nanquantile(z.double(), z.new_tensor([0.1, 0.5, 0.9], dtype=torch.float64), 0).to(z)
        spread = (high - low) / DECILES
        return middle + 0.0, torch.where(spread > 0, spread, torch.ones_like(spread))

    def _check_law(self, law: MixtureLaw) -> None:
        """The law gives mixtures of the right form."""
        generator = torch.Generator(self.program.device).manual_seed(0)
        made = law.sample(3, self.components, self.center, self.scale, generator)
        expected = (3, self.components, self.dim)
        if not isinstance(made, Mixture) or made.means.shape != expected:
            found = tuple(made.means.shape) if isinstance(made, Mixture) else type(made).__name__
            raise ShapeError(
                f"the law of priors must return a ppl.Mixture with means {expected} (rows, components, dim), got "
                f"{found}"
            )

    def _rows(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.law is None:
            z, y = super()._rows(rows, generator)
            return z, self._shown(y)
        prior = self.law.sample(rows, self.components, self.center, self.scale, generator)
        z = prior.draw((), generator)
        with seeded(generator), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            y = self._many(self._data, rows, {"z": z})
        y = torch.cat([prior.packed(), torch.where(self.mask, y, torch.zeros_like(y))], 1)
        return z, self._shown(y)

    def _data(self, lane: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """Data of one run of the model at given latents."""
        run = Run(predict=True, layout=self.layout, z=latents["z"])
        with drawn_in_lanes(lane):
            nodes = self.program.trace_one({}, self.program.shared_inputs(), run)[0].nodes
        return self._flat([nodes[n]["value"] for n in self.data_shapes])

    def _shown(self, y: Tensor) -> Tensor:
        """Positive parameters of the prior by their logarithms."""
        if not self.columns.logs:
            return y
        y = y.clone()
        y[:, self.columns.logs] = y[:, self.columns.logs].log()
        return y

    def vectors(self, program: Program, prior: Mixture | None) -> Tensor:
        """Prior and data of every problem as the network sees them, (problems, data_dim)."""
        many = program.problems or 1
        parts = []
        for name, value in program.observed_data().items():
            alone = value.ndim == len(program.sites[name].shape)
            parts.append(value.to(program.dtype).expand(many, *value.shape) if alone else value.to(program.dtype))
        y = torch.cat([v.reshape(many, -1) for v in parts], 1)
        return self.shown(torch.where(self.mask, y, torch.zeros_like(y)), prior)

    def shown(self, y: Tensor, prior: Mixture | None) -> Tensor:
        """Data (rows, n) and their priors as the network sees them."""
        return self._shown(y if prior is None else torch.cat([prior.packed().to(y), y], 1))

    def measure(self, z: Tensor, y: Tensor) -> Scales:
        """Scales by deciles, since both may have heavy tails; a packed mixture is left as it is."""
        raw = Scales.of(z, y, self, entrywise=True)
        low, high, middle = raw.marks[0], raw.marks[-1], raw.marks[len(raw.marks) // 2]
        spread = (high - low) / DECILES
        mean, sd = torch.cat([raw.z_mean, raw.y_mean]), torch.cat([raw.z_sd, raw.y_sd])
        wide = spread > 0
        mean, sd = torch.where(wide, middle, mean), torch.where(wide, spread, sd)
        at = z.shape[1]
        mean[at : at + self.columns.packed], sd[at : at + self.columns.packed] = 0.0, 1.0
        return replace(raw, z_mean=mean[:at], z_sd=sd[:at], y_mean=mean[at:], y_sd=sd[at:])
