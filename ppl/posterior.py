"""One result for all engines: draws (chain, draw, *plates, *event), weights, evidence, diagnostics, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ppl import weighted
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.posterior_check import axis_labels, check_shapes

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
        put("coords", {str(dim): axis_labels(labels) for dim, labels in self.coords.items()})
        if self.log_evidence is not None:
            value, stderr = (torch.as_tensor(part, dtype=torch.float64).detach().cpu() for part in self.log_evidence)
            put("log_evidence", Estimate(value, stderr))
        check_shapes(self)

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
        from ppl.effective_size import effective_size

        return effective_size(self, site)

    def sample(self, site: str, n: int, generator: torch.Generator) -> Tensor:
        """Equally weighted draws of one site in random order: (n, *event), or (problem, n, *event).

        Systematic resampling, so with equal weights and n below the number of draws none comes twice. Two sites drawn
        with generators in equal states keep their joint law.

        Args:
            site: a site.
            n: number of draws.
            generator: source of the randomness.
        """
        from ppl.resampled import sample

        return sample(self, site, n, generator)

    def resampled(self, generator: torch.Generator, draws: int | None = None) -> Posterior:
        """The same posterior with equal weights: one chain of systematically resampled draws, marked in attrs.

        Entries of info with a leading (chain, draw) go along with their draws. The order of the draws is kept, so that
        an autocorrelation over the copies of one draw shows up in a later ESS instead of hiding.

        Args:
            generator: source of the randomness.
            draws: number of draws; as many as there are when None.
        """
        from ppl.resampled import resampled

        return resampled(self, generator, len(self) if draws is None else draws)

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
