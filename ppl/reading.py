"""How a model is read: run once, eagerly and validated, and once more at other latents, to tell what is fixed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppl.arguments import Arguments
from ppl.errors import DataError, PilotlightError, ProgramError
from ppl.sites import Site, read_sites, same_distribution, same_support
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
            except PilotlightError as error:
                error.args = (_told(error),)
                raise
            except (ValueError, torch.linalg.LinAlgError) as error:
                failure = error
            except RuntimeError as error:
                self._explain(error)
                raise
            except ZeroDivisionError as error:
                if "size cannot be zero" not in str(error):  # Pyro's words for a plate
                    raise
                empty = [
                    f"{n.removeprefix('arg.')!r} has shape {tuple(v.shape)}"
                    for n, v in self.arguments.tensors().items()
                    if not v.numel()
                ]
                raise ProgramError(
                    f"a plate of the model is empty{': ' if empty else ''}{', '.join(empty)}; give at least one datum, "
                    "or leave the plate out where there is none"
                ) from error
        raise ProgramError(f"the model failed when it was run once: {_told(failure)}{self._wild()}") from failure

    def _explain(self, error: RuntimeError) -> None:
        """Raise what can be said better than by Pyro or torch; other errors of a model are its author's own."""
        text = _told(error)
        twice = re.search(r"Multiple \w+ sites named '(.*)'", text)
        if twice:
            raise ProgramError(
                f"two sites of the model are called {twice[1]!r}; every pyro.sample, in a loop too, needs a name of "
                'its own, such as pyro.sample(f"x_{i}", ...)'
            ) from error
        floating = {
            n.removeprefix("arg."): v.dtype for n, v in self.arguments.tensors().items() if v.is_floating_point()
        }
        if "dtype" in text and len(set(floating.values())) > 1:
            raise DataError(
                f"the model's arguments have floating types that do not go together, {floating}: {text}. Give all of "
                f"them one, such as with .to({self.dtype}); the program computes in {self.dtype}"
            ) from error

    def _wild(self) -> str:
        """Which arguments are not finite, as that is often why a model fails."""
        bad = [
            n.removeprefix("arg.")
            for n, v in self.arguments.tensors().items()
            if (v.is_floating_point() or v.is_complex()) and not bool(torch.isfinite(v).all())
        ]
        return f". Of its arguments {', '.join(map(repr, bad))} has NaN or infinite values: remove them" if bad else ""

    def support_moves(self, trace: Any, name: str) -> bool:
        """Whether the support of an observed site is another one at other prior draws."""
        try:
            other = self.run({}, FIRST_TRIES, validate=False)
        except (ValueError, RuntimeError, IndexError):
            return False
        return name in other.nodes and not same_support(
            trace.nodes[name]["fn"].support, other.nodes[name]["fn"].support
        )

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


def _told(error: Exception) -> str:
    """The message of an error, without the table of shapes that Pyro adds."""
    return re.split(r"\s+Trace Shapes:", str(error))[0]


def _next_value(fn: Any, value: Tensor) -> Tensor:
    """The value behind this one in the support of a discrete distribution, entry by entry."""
    support = fn.enumerate_support(expand=True).to(value.device)
    place = (support == value).to(torch.int8).argmax(0, keepdim=True)
    return support.gather(0, (place + 1) % len(support))[0]
