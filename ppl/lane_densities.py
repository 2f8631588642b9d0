"""Densities of a model for many draws at once: traced for one draw, run for lanes of them.

Values, data, parameters and subsample indices are inputs of what is traced, in two groups: those of a lane, which
differ between draws or problems, and those that all lanes share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppl.arguments import Arguments
from ppl.errors import ProgramError, ShapeError
from ppl.graph import Batching, Compile, LaneFunction
from ppl.numbers import as_tensor
from ppl.probes import shaken
from ppl.sites import Site
from ppl.trace import Run, log_prob_of, run_model, settings

__all__ = ["LaneDensities", "Values"]

Values = Mapping[str, Tensor]


class LaneDensities:
    """What a `Program` computes; the program itself says what it is computed of."""

    model: Callable[..., Any]
    arguments: Arguments
    sites: dict[str, Site]
    data: dict[str, Tensor]
    parameters: dict[str, Tensor]
    deterministic: dict[str, torch.Size]
    device: torch.device
    dtype: torch.dtype
    compile: Compile
    lifted: frozenset[str]
    nesting: int
    problems: int | None
    _batching: Batching
    _functions: dict[Any, LaneFunction]
    _visited: list[str]
    _replaced: dict[str, Any]
    _lane_args: frozenset[str]
    _stacked: dict[str, Tensor]
    _default_indices: dict[str, Tensor]
    _sequential: dict[str, list[int]]

    @property
    def latents(self) -> dict[str, Site]:
        """Latent sites by name, in program order."""
        return {n: s for n, s in self.sites.items() if not s.observed}

    @property
    def observed(self) -> dict[str, Site]:
        """Observed sites by name, in program order."""
        return {n: s for n, s in self.sites.items() if s.observed}

    @property
    def discrete(self) -> tuple[str, ...]:
        """Names of discrete latent sites."""
        return tuple(n for n, s in self.latents.items() if s.discrete)

    @property
    def subsampled(self) -> dict[str, tuple[int, int]]:
        """Plates that show part of their data at a time: name -> (shown, full size)."""
        return {f.name: (f.size, f.full_size) for s in self.sites.values() for f in s.frames if f.name in s.subsampled}

    def log_joint(self, values: Values, subsample: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log density of latents and data.

        Args:
            values: latent values, each (*lanes, *shape of the site); discrete sites that are left out are summed over.
            subsample: indices by subsampled plate; the density is scaled up to the full plates.

        Returns:
            (*lanes,) normalised log density (up to `pyro.factor` terms and improper priors).
        """
        return self._density("joint", values, subsample)

    def log_likelihood(self, values: Values, subsample: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log density of the data given latents, summed over observed sites and factors: (*lanes,)."""
        return self._density("likelihood", values, subsample)

    def pointwise_log_likelihood(self, values: Values) -> dict[str, Tensor]:
        """Log density of each datum given latents: observed site -> (*lanes, *batch shape of the site)."""

        def extract(trace: Any) -> dict[str, Tensor]:
            nodes = trace.nodes
            return {n: nodes[n]["fn"].log_prob(nodes[n]["value"]) for n in self.observed}

        return self.batched(extract)(values)

    def batched(self, extract: Callable[[Any], Any]) -> Callable[[Values], Any]:
        """A function of the model's trace, for many draws at once; differentiable where gradients are recorded.

        Args:
            extract: takes Pyro's trace of one draw, returns a pytree of tensors, such as the mean of an observed site.

        Returns:
            A function of latent values (*lanes, *shape) that returns the pytree with leading lane axes.
        """
        key = ("batched", id(extract))

        def one(lane: Values, shared: Values) -> Any:
            return extract(self.trace_one(lane, shared, Run(values=lane, unscored=frozenset(lane)))[0])

        def run(values: Values) -> Any:
            lanes, lane = self._lanes(values)
            function = self.lane_function(key, one, lane, keep=extract)
            out = function(self.lane_inputs(lane), self.shared_inputs())
            return pytree.tree_map(lambda t: t.reshape(*lanes, *t.shape[1:]), out)

        return run

    def shared_inputs(
        self, subsample: Mapping[str, Tensor] | None = None, params: Values | None = None
    ) -> dict[str, Tensor]:
        """Graph inputs that all draws share, without those that differ between problems."""
        shared = self.arguments.tensors()
        shared |= {f"data.{n}": v for n, v in self.data.items() if not self.sites[n].subsampled}
        shared |= {f"param.{n}": v for n, v in (params if params is not None else self.parameters).items()}
        indices = dict(self._default_indices) | dict(subsample or {})
        shared |= {f"index.{n}": v for n, v in indices.items()}
        return {n: v for n, v in shared.items() if n not in self._lane_args}

    def lane_inputs(self, lane: Values) -> dict[str, Tensor]:
        """Add the data of each problem to the inputs of its draws."""
        lane = dict(lane)
        if self.problems is not None:
            rows = next(iter(lane.values())).shape[0]
            if rows % self.problems:
                raise ShapeError(f"{rows} draws cannot be split over {self.problems} problems")
            each = rows // self.problems
            lane |= {n: v.repeat_interleave(each, 0) if each != 1 else v for n, v in self._stacked.items()}
        return lane

    def trace_one(self, lane: Values, shared: Values, run: Run) -> Any:
        """Run the model for one draw, with graph inputs put where they belong."""
        inputs = {**shared, **lane}
        run.data = {n.removeprefix("data."): v for n, v in inputs.items() if n.startswith("data.")}
        run.params = {n.removeprefix("param."): v for n, v in inputs.items() if n.startswith("param.")}
        run.indices = {n.removeprefix("index."): v for n, v in inputs.items() if n.startswith("index.")}
        run.functions, run.plates = self._replaced, self._sequential
        args, kwargs = self.arguments.call(inputs)

        def visit(name: str) -> None:
            self._visited[0] = name

        with settings(self.dtype, validate=False):
            return run_model(self.model, args, kwargs, run, nesting=self.nesting, visit=visit)

    def _density(self, kind: str, values: Values, subsample: Mapping[str, Tensor] | None) -> Tensor:
        missing = [n for n, s in self.latents.items() if n not in values and not s.discrete]
        if missing:
            raise ProgramError(f"values for the latent sites {missing} are missing; got {list(values)}")
        noise = {f"{n}_noise" for n in self.lifted}
        unknown = [n for n in values if n not in self.sites and n not in self.deterministic and n not in noise]
        if unknown:
            raise ProgramError(f"the program has no site {unknown[0]!r}; its sites are {list(self.sites)}")
        enumerated = tuple(n for n in self.discrete if n not in values)

        def one(lane: Values, shared: Values) -> Tensor:
            given = {n: lane[n] for n in lane if n in self.sites}
            unscored = frozenset(given) if kind == "likelihood" else frozenset()
            run = Run(values=given, unscored=unscored, enumerate_=bool(enumerated))
            trace, _ = self.trace_one(lane, shared, run)
            wanted = (lambda node: node["is_observed"]) if kind == "likelihood" else (lambda node: True)
            return log_prob_of(trace, wanted, enumerated=bool(enumerated), nesting=self.nesting)

        lanes, lane = self._lanes({n: v for n, v in values.items() if n in self.latents})
        function = self.lane_function((kind, tuple(lane), enumerated), one, lane)
        return function(self.lane_inputs(lane), self.shared_inputs(subsample)).reshape(lanes)

    def _lanes(self, values: Values) -> tuple[torch.Size, dict[str, Tensor]]:
        """Split leading axes from site values and flatten them into one lane axis."""
        lanes: torch.Size | None = None
        out = {}
        for name, value in values.items():
            site = self.sites.get(name)
            if site is None:
                raise ProgramError(f"the program has no site {name!r}; its sites are {list(self.sites)}")
            value = as_tensor(value, self.dtype)
            lead = value.shape[: value.ndim - len(site.shape)]
            if value.shape[len(lead) :] != site.shape or (lanes is not None and lead != lanes):
                raise ShapeError(
                    f"site {name!r} has shape {tuple(site.shape)} after the leading axes {tuple(lanes or lead)}, "
                    f"got {tuple(value.shape)}"
                )
            lanes = lead
            out[name] = value.reshape(-1, *site.shape)
        return lanes if lanes is not None else torch.Size(), out

    def lane_function(
        self, key: Any, one: Callable[[Values, Values], Any], lane: Values, keep: Any = None
    ) -> LaneFunction:
        """The batched form of a function of one draw, built on first use and shared by programs with like data."""
        if key not in self._functions:
            full = self.lane_inputs(lane)
            example = {n: v[0] for n, v in full.items()}
            shared = self.shared_inputs()
            self._visited[0] = ""

            def quiet(lane_: Values, shared_: Values) -> Any:
                with settings(self.dtype, validate=False):
                    return one(lane_, shared_)

            function = LaneFunction(
                quiet,
                example,
                shared,
                probes=[shaken(self, example, shared, seed) for seed in (0, 1)],
                batching=self._batching,
                compile=self.compile,
                where=lambda: f" (after site {self._visited[0]!r})" if self._visited[0] else "",
            )
            function.keep = keep  # an `extract` that lives as long as its id is a key
            self._functions[key] = function
        return self._functions[key]
