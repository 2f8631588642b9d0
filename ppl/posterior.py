"""One result for all engines: draws (chain, draw, *plates, *event), weights, evidence, diagnostics, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ppl import weighted
from ppl.cost import Cost
from ppl.errors import OptionError, ShapeError

if TYPE_CHECKING:
    import pandas

    from ppl.program import Program

__all__ = ["Estimate", "Posterior", "SavedGuide"]


class Estimate(NamedTuple):
    """A number with its standard error, as float64 tensors of shape () or (problem,)."""

    value: Tensor
    stderr: Tensor


@dataclass(frozen=True, eq=False)
class SavedGuide:
    """What a file keeps of a fitted guide: its `state()`, from which the guide's own class can be built again.

    Args:
        meta: plain data.
        tensors: named tensors.
    """

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The same two things again, so that a loaded posterior can be saved."""
        return self.meta, self.tensors


@dataclass(frozen=True, eq=False)
class Posterior:
    """What an engine found out about the latents of a program.

    Args:
        draws: site -> (chain, draw, *plates, *event); (problem, chain, draw, ...) when attrs["problems"] is set.
        log_weight: (chain, draw) log weights up to a constant, joint over chains; None when draws are equally weighted.
            (problem, chain, draw) with problems, each problem normalised by itself.
        log_evidence: log p(data) with its standard error, where the engine estimates it.
        parameters: learnable tensors by name.
        guide: the fitted approximation, where there is one; a `SavedGuide` after `load`.
        cost: what the run paid.
        info: diagnostics of any shape, with ArviZ's names where they exist; "root_ess" is used as the effective sample
            size, and "log_likelihood.<site>" of shape (chain, draw, ...) reaches ArviZ's log_likelihood group.
        dims: site -> names of the axes behind (chain, draw).
        coords: name of an axis -> its labels.
        observed: the data by site.
        attrs: plain facts: "backend", "complete" (false after an interruption), "notes", "problems", ...

    Raises:
        ShapeError: if a site lacks the leading axes, or weights, dims or coords do not fit.

    Example:
        >>> posterior = Posterior({"x": torch.arange(8.0).reshape(2, 4)}, attrs={"backend": "NUTS"})
        >>> posterior.mean("x").item(), len(posterior)
        (3.5, 8)
    """

    draws: dict[str, Tensor]
    log_weight: Tensor | None = None
    log_evidence: Estimate | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)
    guide: Any = None
    cost: Cost = field(default_factory=Cost)
    info: dict[str, Tensor] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("draws", "parameters", "info", "observed", "attrs"):
            put(name, dict(getattr(self, name)))
        put("info", {name: torch.as_tensor(value) for name, value in self.info.items()})
        put("dims", {site: tuple(str(dim) for dim in dims) for site, dims in self.dims.items()})
        put("coords", {str(dim): _labels(labels) for dim, labels in self.coords.items()})
        if self.log_evidence is not None:
            value, stderr = (torch.as_tensor(part, dtype=torch.float64).detach().cpu() for part in self.log_evidence)
            put("log_evidence", Estimate(value, stderr))
        self._check()

    def _check(self) -> None:
        problems = self.problems
        if problems is not None and (not isinstance(problems, int) or isinstance(problems, bool) or problems < 1):
            raise ShapeError(f'attrs["problems"] must be a positive integer or absent, got {problems!r}')
        lead = self._lead
        axes = "(problem, chain, draw)" if problems is not None else "(chain, draw)"
        for site, values in self.draws.items():
            if not isinstance(values, Tensor):
                raise ShapeError(f"draws of {site!r} must be a tensor, got {type(values).__name__}")
            if values.ndim < lead or values.shape[:lead] != self.shape:
                raise ShapeError(
                    f"draws of {site!r} have shape {tuple(values.shape)}, expected {axes} = {self.shape} in front; "
                    "one chain is values[None]"
                )
            names = self.dims.get(site)
            if names is not None and len(names) != values.ndim - lead:
                raise ShapeError(
                    f"{site!r} has {values.ndim - lead} axes behind {axes} but {len(names)} dims {tuple(names)}; "
                    "name every plate and event axis"
                )
        if problems is not None and self.shape[0] != problems:
            raise ShapeError(f'attrs["problems"] is {problems} but the leading axis of the draws is {self.shape[0]}')
        if self.log_weight is not None and self.log_weight.shape != self.shape:
            raise ShapeError(
                f"log_weight has shape {tuple(self.log_weight.shape)}, expected {axes} = {self.shape}: one per draw"
            )
        if self.log_evidence is not None:
            expected = () if problems is None else (problems,)
            for name, part in zip(("value", "stderr"), self.log_evidence, strict=True):
                if part.shape not in (expected, ()):
                    raise ShapeError(f"log_evidence {name} has shape {tuple(part.shape)}, expected {expected}")
        for site, sizes in [*((s, v.shape[lead:]) for s, v in self.draws.items()), *self._observed_sizes()]:
            for dim, size in zip(self.dims.get(site, ()), sizes, strict=False):
                if dim in self.coords and len(self.coords[dim]) != size:
                    raise ShapeError(
                        f"axis {dim!r} of {site!r} has {size} entries but {len(self.coords[dim])} labels in coords"
                    )

    def _observed_sizes(self) -> list[tuple[str, torch.Size]]:
        """Observed sites whose dims can be matched with their axes."""
        return [(s, v.shape) for s, v in self.observed.items() if len(self.dims.get(s, ())) == v.ndim]

    # -- shape

    @property
    def problems(self) -> int | None:
        """Number of independent problems solved at once; None for the usual single one."""
        return self.attrs.get("problems")

    @property
    def _lead(self) -> int:
        return 2 if self.problems is None else 3

    @property
    def shape(self) -> tuple[int, ...]:
        """(chain, draw), or (problem, chain, draw)."""
        for values in self.draws.values():
            return tuple(values.shape[: self._lead])
        if self.log_weight is not None:
            return tuple(self.log_weight.shape)
        return (0, 0) if self.problems is None else (self.problems, 0, 0)

    @property
    def chains(self) -> int:
        """Number of chains."""
        return self.shape[-2]

    @property
    def complete(self) -> bool:
        """False if the run was interrupted."""
        return bool(self.attrs.get("complete", True))

    def __len__(self) -> int:
        """Number of draws in all chains."""
        return self.shape[-2] * self.shape[-1]

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, site: str) -> Tensor:
        return self._site(site)

    def __contains__(self, site: object) -> bool:
        return site in self.draws

    def _site(self, site: str) -> Tensor:
        if site not in self.draws:
            raise OptionError(
                f"there are no draws of {site!r}; the sites are {', '.join(map(repr, self.draws)) or 'none'}"
            )
        return self.draws[site]

    # -- statistics

    @property
    def weights(self) -> Tensor | None:
        """Normalised weights in float64, shaped like log_weight; None when draws are equally weighted."""
        flat = self._flat_weights()
        return None if flat is None else flat.reshape(self.shape)

    def _flat_weights(self) -> Tensor | None:
        """(problem or 1, chain * draw)."""
        if self.log_weight is None:
            return None
        return weighted.normalise(self.log_weight.detach().reshape(self.problems or 1, len(self)))

    def _lanes(self, site: str) -> Tensor:
        """(problem or 1, chain * draw, *event)."""
        values = self._site(site).detach()
        return values.reshape(self.problems or 1, len(self), *values.shape[self._lead :])

    def flatten(self, site: str) -> Tensor:
        """Draws of all chains on one axis: (chain * draw, *event), or (problem, chain * draw, *event).

        Raises:
            OptionError: if there is no such site.
        """
        values = self._site(site)
        return values.reshape(*self.shape[:-2], len(self), *values.shape[self._lead :])

    def mean(self, site: str) -> Tensor:
        """Weighted mean, (*event) or (problem, *event), in the dtype of the draws (integers, booleans: float64)."""
        return self._tidy(weighted.mean(self._lanes(site), self._flat_weights()), site)

    def sd(self, site: str) -> Tensor:
        """Weighted standard deviation, unbiased for its square where weights are equal; shaped like the mean."""
        return self._tidy(weighted.sd(self._lanes(site), self._flat_weights()), site)

    def quantile(self, site: str, q: float | Sequence[float] | Tensor) -> Tensor:
        """Weighted quantiles, (*q, *event) or (*q, problem, *event).

        Args:
            site: a real site.
            q: one level in [0, 1], or a sequence of them.

        Raises:
            OptionError: for a complex site, or a level outside [0, 1].

        Example:
            >>> x, log_weight = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 3.0]]])
            >>> posterior = Posterior({"x": x}, log_weight=log_weight)
            >>> posterior.quantile("x", [0.05, 0.5]).tolist()
            [2.0, 3.0]
        """
        levels = torch.as_tensor(q, dtype=torch.float64)
        result = weighted.quantile(self._lanes(site), self._flat_weights(), levels.reshape(-1))
        result = result.reshape(*levels.shape, *result.shape[1:])
        if self.problems is None:
            result = result.squeeze(levels.ndim)
        return self._as_dtype(result, site)

    def ess(self, site: str) -> Tensor:
        """Effective sample size of the mean, (*event) or (problem, *event), float64.

        Root ESS where the engine gave it (info["root_ess"], one number or one per chain), else the Kish ESS of the
        weights, else ArviZ's bulk ESS; of a complex site the smaller of its two parts.
        """
        from ppl.summary import arviz_statistic

        event = self._site(site).shape[self._lead :]
        shared = self._shared_ess()
        if shared is not None:
            result = shared.reshape(-1, *(1,) * len(event)).expand(self.problems or 1, *event).clone()
        else:
            values = self._site(site).detach().reshape(-1, *self.shape[-2:], *event)
            parts = [values.real, values.imag] if values.is_complex() else [values]
            sizes = [torch.stack([arviz_statistic("ess_bulk", one) for one in part]) for part in parts]
            result = torch.stack(sizes).amin(0)
        return result if self.problems is not None else result[0]

    def _shared_ess(self) -> Tensor | None:
        """(problem or 1,) effective sample size that holds for all sites; None for equally weighted chains."""
        problems = self.problems or 1
        weights = self._flat_weights()
        root = self.info.get("root_ess")
        if root is None or root.numel() == 0:
            return None if weights is None else weighted.kish_ess(weights).cpu()
        root = root.detach().cpu().double()
        if root.numel() == problems * self.chains and root.ndim == len(self.shape) - 1:
            if weights is None:
                share = torch.full((problems, self.chains), 1 / self.chains, dtype=torch.float64)
            else:
                share = weights.reshape(problems, self.chains, -1).sum(-1).cpu()
            return weighted.merged_root_ess(root.reshape(problems, self.chains), share)
        if root.numel() in (1, problems):
            return root.reshape(-1).expand(problems)
        raise ShapeError(
            f'info["root_ess"] has shape {tuple(root.shape)}; expected one number, or one per chain ({self.chains}), '
            "for each problem"
        )

    def sample(self, site: str, n: int, generator: torch.Generator) -> Tensor:
        """Equally weighted draws of one site in random order: (n, *event), or (problem, n, *event).

        Systematic resampling, so with equal weights and n below the number of draws none comes twice. Two sites drawn
        with generators in equal states keep their joint law.

        Args:
            site: a site.
            n: number of draws.
            generator: source of the randomness.
        """
        if n < 0:
            raise OptionError(f"the number of draws must be zero or more, got {n}")
        problems = self.problems or 1
        index = weighted.systematic(self._flat_weights(), len(self), n, problems, generator)
        order = [torch.randperm(n, generator=generator, device=generator.device).cpu() for _ in range(problems)]
        index = torch.stack([row[turn] for row, turn in zip(index, order, strict=True)])
        result = _take(self._lanes(site), index)
        return result if self.problems is not None else result[0]

    def resampled(self, generator: torch.Generator, draws: int | None = None) -> Posterior:
        """The same posterior with equal weights: one chain of systematically resampled draws, marked in attrs.

        Entries of info with a leading (chain, draw) go along with their draws. The order of the draws is kept, so that
        an autocorrelation over the copies of one draw shows up in a later ESS instead of hiding.

        Args:
            generator: source of the randomness.
            draws: number of draws; as many as there are when None.
        """
        problems = self.problems or 1
        count = len(self) if draws is None else draws
        index = weighted.systematic(self._flat_weights(), len(self), count, problems, generator)

        def pick(values: Tensor) -> Tensor:
            lanes = values.detach().reshape(problems, len(self), *values.shape[self._lead :])
            chosen = _take(lanes, index).unsqueeze(1)
            return chosen if self.problems is not None else chosen[0]

        info = {name: pick(v) if v.shape[: self._lead] == self.shape else v for name, v in self.info.items()}
        shared = self._shared_ess()
        if shared is not None:
            info["root_ess"] = shared if self.problems is not None else shared[0]
        return replace(
            self,
            draws={site: pick(values) for site, values in self.draws.items()},
            log_weight=None,
            info=info,
            attrs={**self.attrs, "resampled": True},
        )

    def discrete(self, program: Program, generator: torch.Generator | None = None, seed: int = 0) -> Posterior:
        """The same draws with those of the discrete sites that the density of `program` sums out beside them.

        Each is an exact draw given the other latents of its row: sums forwards, draws backwards. Deterministic sites
        that depend on them are added too.

        Args:
            program: the program that was inferred.
            generator: source of the randomness; made from the seed when None.
            seed: see generator.

        Raises:
            ProgramError: a discrete site has no finite support, or a plate is subsampled.
            OptionError: a latent of the program has no draws here.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from ppl import Program
            >>> def model(y):
            ...     shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            ...     k = pyro.sample("k", dist.Bernoulli(0.5))
            ...     pyro.sample("y", dist.Normal(shift + 10.0 * k, 1.0), obs=y)
            >>> posterior = Posterior({"shift": torch.zeros(1, 3)})
            >>> posterior.discrete(Program(model, torch.tensor(10.0)))["k"]
            tensor([[1., 1., 1.]])
        """
        from ppl.discrete import with_discrete

        return with_discrete(self, program, generator or torch.Generator(program.device).manual_seed(seed))

    def _as_dtype(self, result: Tensor, site: str) -> Tensor:
        dtype = self.draws[site].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            return result
        return result.to(dtype if result.is_complex() or not dtype.is_complex else dtype.to_real())

    def _tidy(self, result: Tensor, site: str) -> Tensor:
        return self._as_dtype(result if self.problems is not None else result[0], site)

    # -- tables and files

    def summary(self, sites: Sequence[str] | None = None, limit: int | None = 1000) -> pandas.DataFrame:
        """A table: one row per number; mean, sd, 5 %, 50 %, 95 %, mcse, ess_bulk, ess_tail, r_hat.

        Weighted draws are used as weighted: their ess_bulk is the root or Kish ESS, mcse is sd / sqrt(ess), and
        ess_tail and r_hat, which have no meaning there, are NaN. Complex sites have rows for both parts. With problems,
        the index has a level "problem".

        Args:
            sites: those to show; all when None.
            limit: of a site with more numbers than this, so many evenly spaced ones are shown (`.attrs["left_out"]` of
                the table says so); None shows all.
        """
        from ppl.summary import summary

        return summary(self, sites, limit)

    def to_arviz(
        self,
        format: Literal["inferencedata", "datatree"] = "inferencedata",
        resample: bool = True,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> Any:
        """The posterior for ArviZ: InferenceData of ArviZ 0.23, or the DataTree of the later ones.

        Args:
            format: which of the two.
            resample: weighted draws become one chain of equally weighted ones, marked "resampled" in the attributes;
                False keeps the draws as they are, with log_weight in sample_stats, which ArviZ does not read.
            generator: for the resampling; made from the seed when None.
            seed: see generator.
        """
        from ppl.arviz_export import to_arviz

        return to_arviz(self, format, resample, generator, seed)

    def save(self, path: str | Path) -> None:
        """Write everything to one netCDF file, atomically; `arviz.from_netcdf` can read it too.

        Weighted draws are in a group "weighted_posterior", so that nobody takes them for equally weighted. A guide is
        kept if it has `state() -> (plain data, tensors)`; otherwise a note says that it was not.

        Raises:
            OptionError: if attrs hold something with no safe form in a file.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Posterior({"x": torch.ones(1, 5, dtype=torch.bfloat16)}).save(f"{folder}/posterior.nc")
            ...     Posterior.load(f"{folder}/posterior.nc").draws["x"].dtype
            torch.bfloat16
        """
        from ppl.posterior_file import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Posterior:
        """Read a file of `save`: the same tensors bit by bit, on the CPU; the guide as a `SavedGuide`.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if the file is damaged or was not written by `save`.
        """
        from ppl.posterior_file import load

        return load(Path(path))

    @staticmethod
    def concat(posteriors: Sequence[Posterior]) -> Posterior:
        """Runs of one program side by side along the chain axis; weighted runs are merged by their evidence."""
        from ppl.concat import concat

        return concat(posteriors)

    # -- how it prints

    def _facts(self) -> list[str]:
        """The headline, then what was paid and found."""
        *lead, chains, draws = self.shape
        counted = "".join(f"{n} problems x " for n in lead) + f"{chains} chain{'s'[: chains != 1]} x {draws} draws"
        facts = [
            f"{self.attrs.get('backend', 'posterior')}: {counted}" + (", weighted" * (self.log_weight is not None))
        ]
        if not self.complete:
            facts.append("INCOMPLETE (interrupted)")
        facts.append(
            ", ".join(f"{site} {tuple(v.shape[self._lead :])}" for site, v in self.draws.items()) or "no sites"
        )
        if self.log_evidence is not None and self.log_evidence.value.ndim == 0:
            value, stderr = (float(part) for part in self.log_evidence)
            facts.append(f"log evidence {value:.4g} +- {stderr:.2g}")
        elif self.log_evidence is not None:
            facts.append(f"log evidence of {self.problems} problems")
        facts.append(str(self.cost))
        return facts

    def __repr__(self) -> str:
        return f"Posterior({'; '.join(self._facts())})"

    def _repr_html_(self) -> str:
        head, *rest = self._facts()
        items = "".join(f"<li>{escape(fact)}</li>" for fact in rest)
        return f"<div><b>Posterior</b> {escape(head)}<ul>{items}</ul></div>"


def _take(lanes: Tensor, index: Tensor) -> Tensor:
    """lanes (problem, draw, *event) at index (problem, n) -> (problem, n, *event)."""
    return torch.stack([lane[row.to(lane.device)] for lane, row in zip(lanes, index, strict=True)])


def _labels(labels: Sequence[Any]) -> tuple[Any, ...]:
    """Labels of an axis as plain numbers and texts."""
    plain = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    plain = [item.item() if hasattr(item, "item") else item for item in plain]
    return tuple(item if isinstance(item, bool | int | float | str) else str(item) for item in plain)
