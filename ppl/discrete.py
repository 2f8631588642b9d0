"""Draws of the discrete sites that a density sums out, given the continuous draws: exact, by the same contraction.

    p(k | x, y) = p(k, x, y) / sum_k p(k, x, y):  sum forwards, draw backwards

Pyro's forward filter and backward sampler runs on one draw with its noise as an input (the Gumbel trick makes each
categorical draw a deterministic function of it), so that it is traced once and runs for all draws as one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pyro
import torch
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.ops import packed
from pyro.ops.einsum import torch_sample
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ppl.errors import OptionError, ProgramError
from ppl.trace import Run

if TYPE_CHECKING:
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["with_discrete"]

LANES_AT_ONCE = 256


def with_discrete(posterior: Posterior, program: Program, generator: torch.Generator) -> Posterior:
    """`Posterior.discrete`: the same draws with those of the enumerated sites beside them."""
    wanted = [n for n in program.discrete if n not in posterior.draws]
    if not wanted:
        return posterior
    _check(posterior, program, wanted)
    lead = posterior.shape
    values = {
        n: v.detach().to(program.device).reshape(-1, *program.sites[n].shape)
        for n, v in posterior.draws.items()
        if n in program.latents
    }
    fitted = {n: posterior.parameters.get(n, p) for n, p in program.parameters.items()}
    shared = program.shared_inputs(params=fitted)
    shapes = _noise_shapes(program, {n: v[0] for n, v in program.lane_inputs(values).items()}, shared, wanted)
    rows = len(next(iter(values.values())))
    # All noise first: how draws are split up changes nothing.
    noise = {
        f"gumbel.{i}": -torch.empty((rows, *shape), dtype=program.dtype, device=program.device)
        .exponential_(generator=generator)
        .log_()
        for i, shape in enumerate(shapes)
    }

    names = tuple(noise)  # the function is kept by the program, and must not keep the noise

    def one(lane: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _draw(program, lane, shared, wanted, [lane[n] for n in names])

    everything = program.lane_inputs({**values, **noise})
    function = program.lane_function(("discrete", tuple(wanted), tuple(values)), one, {**values, **noise})
    # Lanes of many problems are problem-major, but each carries its own data here: any cut will do.
    cuts = [slice(i, i + LANES_AT_ONCE) for i in range(0, rows, LANES_AT_ONCE)]
    with torch.no_grad():
        parts = [function({n: v[cut] for n, v in everything.items()}, shared) for cut in cuts]
        drawn = {n: torch.cat([p[n] for p in parts]) for n in wanted}
        drawn |= _deterministic(program, {**values, **drawn}, posterior)
    draws = {**posterior.draws, **{n: v.reshape(*lead, *v.shape[1:]) for n, v in drawn.items()}}
    from ppl.backend import _dims

    named = replace(posterior, draws=draws)
    dims = {n: d for n, d in _dims(program, named).items() if n in drawn}
    return replace(named, dims={**dims, **posterior.dims})


def _check(posterior: Posterior, program: Program, wanted: list[str]) -> None:
    """Everything that the conditional distribution needs is there."""
    hard = [n for n in wanted if "enumerable" not in program.sites[n].capabilities]
    if hard:
        raise ProgramError(
            f"discrete sites {hard} have no finite support that could be summed over; give them one (Categorical, "
            "Bernoulli, a truncated count)"
        )
    missing = [n for n in program.latents if n not in posterior.draws and n not in wanted]
    if missing:
        raise OptionError(
            f"the posterior has no draws of {missing}, on which the discrete sites {wanted} depend; use the program "
            "that the posterior was inferred from"
        )
    if program.subsampled:
        raise ProgramError(
            f"plates {list(program.subsampled)} are subsampled, so that sites in them are seen in part; build the "
            "program without subsample_size"
        )
    if program.problems != posterior.problems:
        raise OptionError(f"the posterior holds {posterior.problems} problems, the program {program.problems}")
    if not len(posterior):
        raise OptionError("the posterior has no draws")


class _Given:
    """In place of Pyro's distributions inside its sampler: categorical draws from noise that was given."""

    def __init__(self, noise: list[Tensor] | None) -> None:
        self.noise, self.shapes = noise, list[torch.Size]()

    def Categorical(self, logits: Tensor) -> Any:
        given = self

        class Draw:
            def sample(self) -> Tensor:
                place = len(given.shapes)
                given.shapes.append(logits.shape)
                return (logits if given.noise is None else logits + given.noise[place]).argmax(-1)

        return Draw()


@contextmanager
def _given(noise: list[Tensor] | None) -> Iterator[_Given]:
    """While a conditional draw is made, its randomness comes from outside."""
    given = _Given(noise)
    with patch.object(torch_sample, "dist", given):
        yield given


def _draw(
    program: Program,
    lane: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    wanted: list[str],
    noise: list[Tensor] | None,
    shapes: list[torch.Size] | None = None,
) -> dict[str, Tensor]:
    """Discrete sites of one draw, given its other latents; `shapes` receives those of the noise that is used."""
    values = {n: lane[n] for n in lane if n in program.sites}
    trace: Any = prune_subsample_sites(program.trace_one(lane, shared, Run(values=values, enumerate_=True))[0])
    trace.compute_log_prob()
    trace.pack_tensors()
    for node in trace.nodes.values():
        if node["type"] == "sample":  # Pyro leaves scales out here; the density that was sampled has them
            whole = packed.scale_and_mask(node["packed"]["unscaled_log_prob"], node["scale"], node["packed"]["mask"])
            node["packed"]["masked_log_prob"] = whole

    def read() -> dict[str, Tensor]:
        return {n: pyro.sample(n, trace.nodes[n]["fn"], infer={"enumerate": "parallel"}) for n in wanted}

    back: Any = _sample_posterior_from_trace
    with _given(noise) as given:
        out = back(read, trace, 1, False)
    if shapes is not None:
        shapes.extend(given.shapes)
    return {n: _fit(v, program.sites[n].shape) for n, v in out.items()}


def _fit(value: Tensor, shape: torch.Size) -> Tensor:
    """Without the axes of length one that enumeration leaves on the left."""
    while value.ndim > len(shape) and value.shape[0] == 1:
        value = value[0]
    return value.expand(shape).clone()


def _noise_shapes(
    program: Program, lane: Mapping[str, Tensor], shared: Mapping[str, Tensor], wanted: list[str]
) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    with torch.no_grad():
        _draw(program, lane, shared, wanted, None, shapes)
    return shapes


def _deterministic(program: Program, values: dict[str, Tensor], posterior: Posterior) -> dict[str, Tensor]:
    """Deterministic sites that had no single value while the discrete ones were summed out."""
    names = [n for n in program.deterministic if n not in posterior.draws]
    if not names:
        return {}

    def extract(trace: Any) -> dict[str, Tensor]:
        return {n: trace.nodes[n]["value"] for n in names}

    return program.batched(extract)({n: v for n, v in values.items() if n in program.latents})
