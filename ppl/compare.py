"""Several backends on one program, side by side: pictures, cost, and how right each of them is."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ppl.backend import Backend, infer
from ppl.errors import OptionError, PilotlightError, ShapeError
from ppl.numbers import as_tensor
from ppl.option_checks import whole_number
from ppl.posterior import Posterior
from ppl.program import Program
from ppl.scores import (
    Reference,
    ReferenceSource,
    cost_scores,
    own_scores,
    reference_scores,
    residual_score,
    truth_scores,
)

if TYPE_CHECKING:
    import pandas

__all__ = ["COLUMNS", "Column", "Comparison", "Row", "compare"]


@dataclass(frozen=True)
class Column:
    """A column of the table: its key, its heading, what it means, and how its numbers print."""

    key: str
    head: str
    meaning: str
    form: str = ".3g"


COLUMNS = (
    Column("exact", "exact", "whether the error of the method vanishes as compute grows", ""),
    Column("seconds", "seconds", "wall time", ".1f"),
    Column("evals_per_draw", "evals / draw", "denoiser evaluations per draw", ".0f"),
    Column("vjps_per_draw", "vjps / draw", "vector-Jacobian products through the denoiser per draw", ".0f"),
    Column("gradients_per_draw", "gradients / draw", "gradients of the log density per draw", ".3g"),
    Column(
        "ess", "ESS", "effective sample size: root ESS of particles, else the smallest bulk ESS; per problem", ".0f"
    ),
    Column("r_hat", "R-hat", "largest over sites; above 1.01 the chains disagree", ".3f"),
    Column(
        "distance", "distance", "sliced Wasserstein distance to exact draws, in units of its floor: 1 is perfect", ".2f"
    ),
    Column("mean_error", "mean error", "|mean - exact mean| in units of the exact spread", ".3f"),
    Column("variance_ratio", "variance", "total variance over the exact one: 1 is right, less is too sure", ".2f"),
    Column(
        "residual", "residual", "root mean square of (data - mean) / sd, of draws: about 1; less fits the noise", ".2f"
    ),
    Column("rmse", "RMSE", "root mean square distance of the posterior mean from the truth", ".3f"),
    Column(
        "spread_error", "spread / error", "posterior spread over the error of the mean: about 1 when calibrated", ".2f"
    ),
    Column("coverage_90", "inside 90 %", "share of the true numbers inside the central 90 % interval", ".0%"),
    Column("log_evidence", "log evidence", "log p(data), summed over problems", ".1f"),
    Column("log_evidence_stderr", "± s.e.", "standard error of the log evidence", ".2g"),
    Column("elbo", "ELBO", "evidence lower bound, summed over problems", ".1f"),
    Column("k_hat", "k-hat", "tail index of the importance weights: above 0.7 the guide misses mass", ".2f"),
    Column("notes", "notes", "", ""),
)
LITTLE = 0.1  # ESS per draw that is worth a note


@dataclass(frozen=True)
class Row:
    """What one backend did.

    Args:
        name: as the caller calls it.
        backend: the options.
        posterior: the result, or None.
        error: why there is none.
        figures: numbers by column key.
        notes: remarks.
    """

    name: str
    backend: Backend | None
    posterior: Posterior | None = None
    error: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> str:
        """The backend's own claim, in words."""
        if self.backend is not None:
            return self.backend.exact.replace("_", " ")
        return "" if self.posterior is None else str(self.posterior.attrs.get("exact", "")).replace("_", " ")

    def cell(self, column: Column) -> str:
        """One entry as text; a dash where there is no number."""
        if column.key == "exact":
            return self.exact or "–"
        if column.key == "notes":
            return "; ".join(([self.error] if self.error else []) + list(self.notes))
        value = self.figures.get(column.key, math.nan)
        if math.isnan(value) or (value == 0 and column.key.endswith("per_draw")):
            return "–"
        return f"{value:{column.form}}"


@dataclass(frozen=True)
class Comparison:
    """Backends side by side on one program.

    Args:
        program: the program they ran on.
        rows: one per backend, in the order asked for.
        truth: true values by site, where known.
        draws: asked for per chain, by name.
        seed: of every backend.
        complete: False after Ctrl-C.
    """

    program: Program
    rows: tuple[Row, ...]
    truth: Mapping[str, Tensor]
    draws: Mapping[str, int]
    seed: int
    complete: bool = True

    @property
    def posteriors(self) -> dict[str, Posterior]:
        """Results by name, of the backends that have one."""
        return {r.name: r.posterior for r in self.rows if r.posterior is not None}

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns in which at least one row has something to say."""
        return tuple(c for c in COLUMNS if any(r.cell(c) not in ("–", "") for r in self.rows))

    @property
    def table(self) -> pandas.DataFrame:
        """All figures as numbers, NaN where there is none; the index holds the names."""
        import pandas

        numbers = [c.key for c in COLUMNS if c.form]
        records = [
            {"exact": r.exact, **{k: r.figures.get(k, math.nan) for k in numbers}, "notes": r.cell(COLUMNS[-1])}
            for r in self.rows
        ]
        return pandas.DataFrame(records, index=pandas.Index([r.name for r in self.rows], name="backend"))

    def show(self, console: Any = None) -> None:
        """Print the table, and the notes below it.

        Args:
            console: a `rich.console.Console`; standard output when None.
        """
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()
        columns = [c for c in self.columns if c.key != "notes"]
        lines = [["backend", *(c.head for c in columns)]]
        lines += [[row.name, *(row.cell(c) for c in columns)] for row in self.rows]
        widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
        if sum(widths) > console.width:  # a narrow terminal: backends side by side
            lines = [list(column) for column in zip(*lines, strict=True)]
        table = Table(box=None, pad_edge=False)
        for i, head in enumerate(lines[0]):
            table.add_column(Text(head), justify="left" if i == 0 else "right")
        for line in lines[1:]:
            table.add_row(*(Text(cell) for cell in line))
        console.print(Text(repr(self.program)), style="bold")
        console.print(table)
        for row in self.rows:
            if row.error or row.notes:
                console.print(Text(f"{row.name}: {row.cell(COLUMNS[-1])}"), style="dim")

    def to_html(self, path: str | Path, title: str = "Posteriors side by side") -> Path:
        """Write one self-contained page: the program, pictures of each posterior, the table."""
        from ppl.report import Section, write_page

        return write_page(path, title, [Section(getattr(self.program.model, "__name__", "program"), self)])

    def save(self, folder: str | Path) -> Path:
        """Write every posterior as `NAME.nc` and the table as `table.csv` into a folder, which is made if need be."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name, posterior in self.posteriors.items():
            posterior.save(place / f"{file_name(name)}.nc")
        self.table.to_csv(place / "table.csv")
        return place

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise OptionError(f"there is no backend called {name!r} here; there are {[r.name for r in self.rows]}")

    def __repr__(self) -> str:
        return f"Comparison({', '.join(r.name for r in self.rows)})"

    def _repr_html_(self) -> str:
        from ppl.report import table_html

        return table_html(self)


def file_name(name: str) -> str:
    """A name as part of a path: lower case, words joined by underscores."""
    plain = name.replace("Π", "Pi")
    return "_".join("".join(c if c.isascii() and c.isalnum() else " " for c in plain).lower().split()) or "backend"


def compare(
    program: Program,
    backends: Mapping[str, Backend | Posterior],
    draws: int | Mapping[str, int] = 1000,
    *,
    chains: int | None = None,
    seed: int = 0,
    truth: Mapping[str, Tensor] | None = None,
    reference: ReferenceSource | None = None,
    progress: bool | Literal["force"] = False,
) -> Comparison:
    """Run several backends on one program and judge their posteriors.

    Args:
        program: the model and its data; `program.over(...)` for many problems.
        backends: by name; a posterior that is already there takes part without a run.
        draws: per chain; by name where backends differ.
        chains: independent runs; each backend's own default when `None`.
        seed: of every backend.
        truth: true values by latent site, (*shape) or (problem, *shape).
        reference: exact draws: a function (draws, generator) -> site -> (draws, *shape), a posterior, or draws by site.
        progress: show bars with the cost, and a heading for each backend.

    Returns:
        A row for each backend; one that failed says why, and Ctrl-C keeps the rows that are finished.

    Raises:
        OptionError: nothing to compare, or truth or reference do not fit the program.

    Example:
        >>> import ppl, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> program = ppl.Program(model, torch.tensor(2.0))
        >>> exact = lambda n, generator: {"mu": 1 + 0.5**0.5 * torch.randn(n, generator=generator)}
        >>> backends = {"SVI": ppl.SVI(steps=300, lr=0.05), "DPS": "no backend"}
        >>> comparison = compare(program, backends, draws=500, reference=exact)
        >>> bool(abs(comparison.table.loc["SVI", "variance_ratio"] - 1) < 0.3), comparison["DPS"].error[:11]
        (True, 'OptionError')
    """
    if not isinstance(program, Program):
        raise OptionError(
            f"expected a ppl.Program, got {type(program).__name__}; wrap the model: ppl.Program(model, data)"
        )
    if not isinstance(backends, Mapping) or not backends:
        raise OptionError(f'compare needs backends by name, such as {{"NUTS": ppl.NUTS()}}, got {backends!r}')
    truth = {n: as_tensor(v, program.dtype) for n, v in dict(truth or {}).items()}
    unknown = set(truth) - set(program.sites) - set(program.deterministic)
    if unknown:
        raise OptionError(f"truth has the sites {sorted(unknown)}, which the program does not have: {program}")
    for name, true in truth.items():
        shape = program.sites[name].shape if name in program.sites else program.deterministic[name]
        if true.shape not in (shape, (program.problems, *shape)):
            raise ShapeError(f"truth of {name!r} has shape {tuple(true.shape)}, the site has {tuple(shape)}")
    asked = dict(draws) if isinstance(draws, Mapping) else dict.fromkeys(backends, whole_number("draws", draws, 1))
    if set(asked) != set(backends):
        raise OptionError(f"draws are given for {sorted(asked)}, the backends are {sorted(backends)}")
    generator = torch.Generator().manual_seed(seed)
    judges = None if reference is None else Reference.of(reference, program, max(asked.values()), generator)
    rows: list[Row] = []
    interrupted = False
    for name, backend in backends.items():
        if interrupted:
            rows.append(Row(name, None if isinstance(backend, Posterior) else backend, error="not run: interrupted"))
            continue
        if progress:
            _heading(name)
        row, interrupted = _row(name, backend, program, asked[name], chains, seed, progress)
        if row.posterior is not None:
            judge = torch.Generator().manual_seed(seed)
            row = _judged(row, row.posterior, program, truth, judges, judge)
        rows.append(row)
    return Comparison(program, tuple(rows), truth, asked, seed, complete=not interrupted)


def _row(
    name: str,
    backend: Any,
    program: Program,
    draws: int,
    chains: int | None,
    seed: int,
    progress: bool | Literal["force"],
) -> tuple[Row, bool]:
    """Run one backend; the second value is whether the user asked to stop."""
    if isinstance(backend, Posterior):
        return Row(name, None, backend, notes=_remarks(backend)), False
    try:
        posterior = infer(program, backend, draws, chains, seed, progress=progress)
    except KeyboardInterrupt:
        return Row(name, backend, error="interrupted before it had draws"), True
    except PilotlightError as error:
        stopped = "interrupted" in str(error)
        return Row(name, _if_backend(backend), error=f"{type(error).__name__}: {error}"), stopped
    except Exception as error:  # one broken backend must not cost the others' results
        first = str(error).strip().split("\n")[0]
        return Row(name, _if_backend(backend), error=f"failed with {type(error).__name__}: {first}"), False
    stopped = "Ctrl-C" in str(posterior.attrs.get("stopped", ""))
    return Row(name, backend, posterior, notes=_remarks(posterior)), stopped


def _remarks(posterior: Posterior) -> tuple[str, ...]:
    """What the run noted, and that it did not come to its end."""
    cut = () if posterior.complete else (f"incomplete: {posterior.attrs.get('stopped', 'stopped early')}",)
    return (*cut, *(str(note) for note in posterior.attrs.get("notes", ())))


def _if_backend(backend: Any) -> Backend | None:
    return backend if isinstance(backend, Backend) and not isinstance(backend, type) else None


def _judged(
    row: Row,
    posterior: Posterior,
    program: Program,
    truth: Mapping[str, Tensor],
    reference: Reference | None,
    generator: torch.Generator,
) -> Row:
    """The row with its figures."""
    exact = row.backend.exact if row.backend is not None else str(posterior.attrs.get("exact", "in_the_limit"))
    figures, notes = cost_scores(posterior), list(row.notes)
    if posterior.problems is not None and program.problems is not None and posterior.problems < program.problems:
        notes.append(f"{posterior.problems} of {program.problems} problems were finished; the figures are theirs")
        truth = {n: t if t.ndim == len(program.sites[n].shape) else t[: posterior.problems] for n, t in truth.items()}
        reference = None if reference is None else reference.first(posterior.problems)
    if len(posterior):
        figures |= own_scores(posterior, exact, [n for n in program.latents if n in posterior])
        figures |= residual_score(posterior, program, generator)
        if truth:
            figures |= truth_scores(posterior, truth, generator)
        if reference is not None:
            figures |= reference_scores(posterior, reference, generator)
    if figures.get("r_hat", 0.0) > 1.01 and not any("R-hat" in note for note in notes):
        notes.append(f"R-hat is {figures['r_hat']:.2f}: the chains disagree, so the draws do not show the posterior")
    if figures.get("ess", math.inf) < LITTLE * len(posterior):
        notes.append(f"{len(posterior)} draws are worth about {figures['ess']:.0f} independent ones")
    return Row(row.name, row.backend, posterior, row.error, figures, tuple(notes))


def _heading(name: str) -> None:
    """The backend whose bar comes next."""
    from rich.console import Console
    from rich.text import Text

    if sys.stderr is not None:
        Console(stderr=True).print(Text(name, style="bold"))
