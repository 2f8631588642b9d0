"""How a model is read: run once, eagerly and validated, and once more at other latents, to tell what is fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppl.arguments import Arguments
from ppl.errors import PilotlightError, ProgramError
from ppl.sites import Site, read_sites, same_distribution
from ppl.trace import Run, run_model, seeded, settings

__all__ = ["ModelCall"]

FIRST_TRIES = 5  # prior draws with which the model may fail before it is refused


@dataclass(frozen=True)
class ModelCall:
    """A model and all that it is called with.

    Args:
        model: a Pyro model.
        arguments: its arguments.
        overridden: data by observed site that stand for those of the model.
        replaced: distributions by site that stand for those of the model.
        device: of the draws.
        dtype: floating type of the run.
    """

    model: Callable[..., Any]
    arguments: Arguments
    overridden: Mapping[str, Tensor]
    replaced: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    def run(self, values: Mapping[str, Tensor], seed: int, validate: bool) -> Any:
        """Pyro's trace with some sites at given values."""
        args, kwargs = self.arguments.call({})
        run = Run(values=values, data=self.overridden, functions=self.replaced)
        generator = torch.Generator(self.device).manual_seed(seed)
        with seeded(generator), torch.no_grad(), settings(self.dtype, validate=validate):
            return run_model(self.model, args, kwargs, run)[0]

    def first_trace(self, given: Mapping[str, Tensor]) -> Any:
        """Run the model validated; another prior draw is tried where one fails, as those of heavy tails can."""
        for seed in range(FIRST_TRIES):
            try:
                return self.run(given, seed, validate=True)
            except PilotlightError:
                raise
            except (ValueError, torch.linalg.LinAlgError) as error:
                failure = error
        raise ProgramError(f"the model failed when it was run once: {failure}") from failure

    def second_sites(self, trace: Any, sites: Mapping[str, Site]) -> dict[str, Site]:
        """Sites of a run with other latents, to tell which distributions are fixed.

        Costly sites are not drawn again but moved; discrete ones, which could be drawn equal, take their next value.
        """
        values = {}
        for name, site in sites.items():
            value = trace.nodes[name]["value"]
            if site.observed:
                continue
            if "enumerable" in site.capabilities and site.event_dim == 0:
                values[name] = _next_value(site.distribution, value)
            elif site.capabilities - {"enumerable"}:
                values[name] = 0.7 - 1.3 * value if value.is_floating_point() else value
        try:
            other = self.run(values, FIRST_TRIES, validate=False)
        except (ValueError, RuntimeError, IndexError):
            return {}
        return read_sites(other)

    def mark_static(self, trace: Any, sites: Mapping[str, Site]) -> dict[str, Site]:
        """The sites of the first trace, each with whether its distribution is the same whatever the other latents."""
        again = self.second_sites(trace, sites)
        return {
            n: replace(s, static=n in again and same_distribution(s.distribution, again[n].distribution))
            for n, s in sites.items()
        }


def _next_value(fn: Any, value: Tensor) -> Tensor:
    """The value behind this one in the support of a discrete distribution, entry by entry."""
    support = fn.enumerate_support(expand=True).to(value.device)
    place = (support == value).to(torch.int8).argmax(0, keepdim=True)
    return support.gather(0, (place + 1) % len(support))[0]
