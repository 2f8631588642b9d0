"""A Pyro model with its data: the only description of an inference problem.

A `Program` runs the model once, eagerly and validated, reads its sites, and traces the density of one draw into a graph
that engines run for many draws at once. Values, data, parameters and subsample indices are inputs of that graph, so
new data of equal shape never trace again.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl.arguments import PLAIN, Arguments
from ppl.check import findings
from ppl.errors import DataError, OptionError, ProgramError, ShapeError
from ppl.graph import Batching, Compile, LaneFunction
from ppl.lane_densities import LaneDensities, Values
from ppl.numbers import as_tensor
from ppl.option_checks import check_place
from ppl.reading import ModelCall
from ppl.simulate import predict, simulate
from ppl.sites import (
    Site,
    check_latents,
    check_observations,
    is_deterministic,
    is_factor,
    observed_tensor,
    read_sites,
    unwrap,
)

if TYPE_CHECKING:
    from ppl.flat import FlatDensity
    from ppl.posterior import Posterior

__all__ = ["Program"]


class Program(LaneDensities):
    """A Pyro model and the arguments it is called with.

    Args:
        model: a Pyro model, written for one draw.
        *args: its arguments; tensors among them are data and can be changed by `with_data`.
        batching: `"auto"` (trace one draw, run the graph for many), or `"loop"` (draw by draw, for models that branch
            on values).
        compile: `"auto"` compiles a density that will be called often enough to repay it, `"never"`, `"inductor"`.
        **kwargs: keyword arguments of the model.

    Raises:
        ProgramError: the model has no latent site.
        DataError: data are not finite, outside a support, or of another type or device than a prior.
        ShapeError: data do not have the shape of their distribution.

    Example:
        >>> import pyro
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 2.0), obs=y)
        >>> program = Program(model, torch.tensor([1.0, 3.0]))
        >>> list(program.latents), list(program.observed), program.flat().dim
        (['mu'], ['y'], 1)
        >>> program.log_joint({"mu": torch.tensor([0.0, 1.0])})
        tensor([-5.3931, -5.1431])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        batching: Batching = "auto",
        compile: Compile = "auto",
        **kwargs: Any,
    ) -> None:
        if not callable(model):
            raise ProgramError(f"expected a Pyro model (a callable), got {type(model).__name__}")
        if batching not in ("auto", "graph", "vmap", "loop"):
            raise OptionError(f'batching must be "auto", "graph", "vmap" or "loop", got {batching!r}')
        if compile not in ("auto", "never", "inductor"):
            raise OptionError(f'compile must be "auto", "never" or "inductor", got {compile!r}')
        self.model = model
        self.compile: Compile = compile
        self._batching: Batching = batching
        self.lifted: frozenset[str] = frozenset()
        self.problems: int | None = None
        self._functions: dict[Any, LaneFunction] = {}
        self._visited = [""]  # the site that tracing reached last
        self._replaced: dict[str, Any] = {}
        self._overridden: dict[str, Tensor] = {}
        self._lane_args: frozenset[str] = frozenset()
        self._single_functions: dict[Any, LaneFunction] = {}
        self.sites: dict[str, Site] = {}
        self.arguments = Arguments.of(model, args, kwargs)
        self._read()

    # Facts -----------------------------------------------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Whether there is something to condition on: an observed site or a `pyro.factor`."""
        return bool(self.observed or self.factors)

    @property
    def capabilities(self) -> dict[str, frozenset[str]]:
        """What the distribution of each latent site can do."""
        return {n: s.capabilities for n, s in self.latents.items()}

    @property
    def batching(self) -> str:
        """How draws are batched: the way chosen for the functions built so far, or the one asked for."""
        chosen = {f.batching for f in self._functions.values()}
        return "/".join(sorted(chosen)) if chosen else self._batching

    @property
    def notes(self) -> list[str]:
        """What the graph engine decided and why."""
        return [note for f in self._functions.values() for note in f.notes]

    def observed_data(self) -> dict[str, Tensor]:
        """The data by observed site; with a leading problem axis where problems differ."""
        return {n: self._stacked.get(f"data.{n}", v) for n, v in self.data.items()}

    def fingerprint(self) -> str:
        """A hash of the sites and the data; equal for the same problem, in every process."""
        digest = hashlib.sha256()
        for name, value in self.arguments.constants().items():
            plain = repr(value) if isinstance(value, PLAIN) else type(value).__qualname__
            digest.update(f"{name}={plain};".encode())
        for name, site in self.sites.items():
            digest.update(f"{name}{tuple(site.shape)}{site.observed}{site.plates}".encode())
        for name, value in {**self.shared_inputs(), **self._stacked}.items():
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        many = f", problems={self.problems}" if self.problems is not None else ""
        return f"Program({name}, latents={list(self.latents)}, observed={list(self.observed)}{many})"

    # Views -----------------------------------------------------------------------------------------------------------

    def flat(self) -> FlatDensity:
        """The view on R^n: log density and gradient with Jacobians, ravel, unravel, constrain.

        Raises:
            ProgramError: a latent site is discrete and cannot be summed out.
        """
        from ppl.flat import FlatDensity

        return FlatDensity(self)

    # Simulation ------------------------------------------------------------------------------------------------------

    def simulate(self, generator: torch.Generator, size: int | None = None) -> dict[str, Tensor]:
        """Draw latents and data from the joint distribution.

        Args:
            generator: the source of randomness.
            size: number of draws; `None` gives one draw without a leading axis.

        Returns:
            Site -> (size, *shape), latent, observed and deterministic sites.
        """
        return simulate(self, generator, size)

    def predict(self, posterior: Posterior, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw data, and deterministic values, given the latents of every posterior draw.

        Returns:
            Site -> (chain, draw, *shape) for observed and deterministic sites.
        """
        return predict(self, posterior, generator)

    # Other programs --------------------------------------------------------------------------------------------------

    def with_data(self, **data: Any) -> Program:
        """The same program with other data, by argument name or by the name of an observed site.

        Data of equal shape and type reuse everything that was traced; another constant (a size, a plain number, a
        switch) is traced anew.
        """
        new = copy.copy(self)
        new._set_data(data)
        same = [(v.shape, v.dtype, v.device) for v in new.shared_inputs().values()] == [
            (v.shape, v.dtype, v.device) for v in self.shared_inputs().values()
        ]
        same = same and self.arguments.same_constants(new.arguments)
        new._read()
        if not same or [s.shape for s in new.sites.values()] != [s.shape for s in self.sites.values()]:
            new._functions = {}
        return new

    def over(self, **data: Any) -> Program:
        """N independent problems at once: the same program for each row of the data given.

        Args:
            **data: (N, *shape) by argument name or observed site; all with the same N. Tensors, arrays or lists.

        Returns:
            A program whose densities take lanes in problem-major order (a multiple of N) and whose posteriors have a
            leading `problem` axis.
        """
        if self.problems is not None:
            raise ProgramError("this program is already over many problems; call over(...) on the single one")
        if not data:
            raise OptionError("over needs data, such as program.over(y=ys)")
        data = {n: self._many_rows(n, v) for n, v in data.items()}
        sizes = {n: len(v) for n, v in data.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ShapeError(f"over needs data with one common, non-zero number of rows, got {sizes}")
        first = self.with_data(**{n: v[0] for n, v in data.items()})
        new = copy.copy(first)
        new._functions = {}
        new.problems = next(iter(sizes.values()))
        given = {n: first.first_values[n] for n in first.latents}
        rows = []
        for i in range(new.problems):
            row = copy.copy(first)
            row._set_data({n: v[i] for n, v in data.items()})
            row._read(given)
            rows.append(row.shared_inputs())
        names = [n for n in rows[0] if not all(rows[0][n] is r[n] or torch.equal(rows[0][n], r[n]) for r in rows)]
        changed = {n.removeprefix("data.") for n in names}
        names += [f"data.{n}" for n in data if f"data.{n}" in rows[0] and n not in changed]
        new._lane_args = frozenset(names)
        new._stacked = {n: torch.stack([r[n] for r in rows]) for n in names}
        new._rows = tuple((dict(zip(data, values, strict=True))) for values in zip(*data.values(), strict=True))
        return new

    def _many_rows(self, name: str, value: Any) -> Tensor:
        """Data of many problems as one tensor (N, *shape)."""
        try:
            rows = as_tensor(value, self.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"over takes tensors (N, *shape), one row for each problem; {name!r}: {error}") from None
        if rows.ndim == 0:
            raise ShapeError(f"over takes tensors (N, *shape), one row for each problem; {name!r} is one number")
        return rows

    def problem(self, i: int) -> Program:
        """Problem `i` of a program that is `over` many."""
        if self.problems is None:
            raise ProgramError("this program holds one problem; `problem(i)` belongs to program.over(...)")
        single = copy.copy(self)
        single.problems, single._lane_args, single._stacked = None, frozenset(), {}
        single._functions = self._single_functions
        # Values of the latents as `over` had them: the prior is not drawn from once more for every problem.
        single._set_data(self._rows[i])
        single._read({n: self.first_values[n] for n in self.latents})
        return single

    def spread(self, which: Tensor) -> Program:
        """Of a program `over` many problems, the one whose lane k is a draw of problem which[k], (lanes,) integers."""
        if self.problems is None:
            raise ProgramError("this program holds one problem; `spread` belongs to program.over(...)")
        new = copy.copy(self)
        new.problems = len(which)
        new._stacked = {n: v[which.to(v.device)] for n, v in self._stacked.items()}
        new._rows = tuple(self._rows[i] for i in which.tolist())
        return new

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Program:
        """The same program on another device or in another floating type; priors that can move are moved."""
        if self.problems is not None:
            raise ProgramError("move the program first, then call over(...)")
        check_place(device, dtype)

        def move(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(device=device, dtype=dtype if x.is_floating_point() else None)
            return x.to(device=device, dtype=dtype) if isinstance(x, torch.nn.Module) else x

        new = copy.copy(self)
        new._functions = {}
        new.arguments = self.arguments.map(move)
        new._overridden = {n: move(v) for n, v in self._overridden.items()}
        new.parameters = {n: move(v) for n, v in self.parameters.items()}
        new._replaced = dict(self._replaced)
        for site in self.latents.values():
            if site.static and hasattr(site.distribution, "to"):
                new._replaced[site.name] = site.distribution.to(device=device, dtype=dtype)
        if dtype is not None:
            new.dtype = dtype
        new._read(keep_dtype=dtype is not None)
        return new

    def noise_space(self, *names: str) -> Program:
        """The program in which sites built from standard normal noise are replaced by that noise.

        Args:
            *names: sites to lift; all that can be lifted when none is given.

        Raises:
            ProgramError: a named site is observed or cannot be built from noise, or nothing can be lifted.
        """
        able = [n for n, s in self.latents.items() if "noise_space" in s.capabilities]
        chosen = list(names) or able
        if not chosen:
            raise ProgramError(
                "no latent site can be built from noise; sites and capabilities: "
                f"{ {n: sorted(c) for n, c in self.capabilities.items()} }"
            )
        for name in chosen:
            if name not in able:
                what = "is observed" if name in self.observed else "cannot be built from noise"
                raise ProgramError(f"site {name!r} {what}; sites with a noise space: {able}")
        new = copy.copy(self)
        new.lifted = frozenset(chosen)
        new._functions = {}
        return new

    def check(
        self,
        generator: torch.Generator | None = None,
        draws: int = 64,
        guide: Callable[..., Any] | None = None,
    ) -> list[str]:
        """What looks wrong, in words, each with its site and a cure.

        Data far outside the prior predictive; parameters that leave their range at prior draws; sites that the data do
        not depend on; branches on draws with path gradients; baselines that change with their own draw; and, where a
        guide is given, sites, supports and minibatches that do not fit. Of many problems the first is looked at.

        Args:
            generator: source of randomness for the draws.
            draws: number of prior predictive draws.
            guide: a Pyro guide of this model; it is called with the model's arguments.

        Returns:
            One sentence for each finding; an empty list when nothing was found.
        """
        return findings(self, generator or torch.Generator(self.device).manual_seed(0), draws, guide)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _set_data(self, data: Mapping[str, Any]) -> None:
        """Replace arguments, or the data of observed sites, in place (on a copy)."""
        arguments = {n: v for n, v in data.items() if n in self.arguments.names}
        overridden = {n: v for n, v in data.items() if n not in arguments}
        for name in overridden:
            if name not in self.observed:
                raise DataError(
                    f"the program has no data named {name!r}; arguments: {self.arguments.names}, observed sites: "
                    f"{list(self.observed)}"
                )
        self.arguments = self.arguments.replace(arguments)
        tensors = {n: observed_tensor(n, v, self.dtype) for n, v in overridden.items()}
        self._overridden = {**self._overridden, **tensors}

    def _read(self, given: Values | None = None, keep_dtype: bool = False) -> None:
        """Run the model once, validated, and read its sites; a second run tells which distributions are fixed."""
        given_tensors = [*self.arguments.tensors().values(), *self._overridden.values()]
        tensors = [t for t in given_tensors if isinstance(t, Tensor)]
        floating = [t.dtype for t in tensors if t.is_floating_point()]
        if not keep_dtype:
            dtype = floating[0] if floating else torch.get_default_dtype()
            for other in floating[1:]:
                dtype = torch.promote_types(dtype, other)
            self.dtype = dtype
        self.device = tensors[0].device if tensors else torch.device("cpu")
        call = ModelCall(self.model, self.arguments, self._overridden, self._replaced, self.device, self.dtype)
        trace = call.first_trace(dict(given or {}))
        check_observations(trace, lambda name: call.support_moves(trace, name))
        sites = read_sites(trace)
        if given is not None:
            sites = {n: replace(s, static=self.sites[n].static) for n, s in sites.items()}
        else:
            sites = call.mark_static(trace, sites)
        self.sites = sites
        self.first_values = {n: trace.nodes[n]["value"].detach() for n, s in sites.items() if not s.observed}
        if not tensors:  # without data a program lives where its priors do
            self._follow_priors(sites, keep_dtype)
        check_latents(sites, floating[0] if floating else None, self.device)
        self.data = {n: trace.nodes[n]["value"].detach() for n, s in sites.items() if s.observed}
        self.nesting = max((-f.dim for s in sites.values() for f in s.frames), default=0)
        self.deterministic: dict[str, torch.Size] = {
            n: node["value"].shape for n, node in trace.nodes.items() if is_deterministic(node)
        }
        self.factors: tuple[str, ...] = tuple(n for n, node in trace.nodes.items() if is_factor(node))
        params = {n: node["value"] for n, node in trace.nodes.items() if node["type"] == "param"}
        self.parameter_constraints = {
            n: trace.nodes[n]["kwargs"].get("constraint", dist.constraints.real) for n in params
        }
        if not hasattr(self, "parameters"):
            self.parameters = {n: cast(Tensor, p).detach().clone() for n, p in params.items()}
        plates = {n: node["value"] for n, node in trace.nodes.items() if site_is_subsample(node)}
        self._default_indices = {n: v for n, v in plates.items() if n in self.subsampled}
        frames = [f for node in trace.nodes.values() if node["type"] == "sample" for f in node["cond_indep_stack"]]
        self._sequential = {f.name: list(range(f.size)) for f in frames if not f.vectorized and f.name in plates}
        self._stacked: dict[str, Tensor] = {}
        self._rows: tuple[dict[str, Any], ...] = ()
        self._single_functions = {}

    def _follow_priors(self, sites: Mapping[str, Site], keep_dtype: bool) -> None:
        """Device and floating type of the first prior that has them."""
        for site in sites.values():
            base = unwrap(site.distribution)
            if "denoiser" in site.capabilities and not site.observed:
                self.device = torch.device(base.device)
                self.dtype = self.dtype if keep_dtype else base.dtype
                return
