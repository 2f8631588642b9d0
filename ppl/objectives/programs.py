"""What is known of the Pyro programs of an objective: sites, plates, parameters, and whether they run in one batch.

Each is run once by itself, and once with lanes, where it must agree with itself lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.errors import PilotlightError, ProgramError
from ppl.objectives.choice import chosen
from ppl.objectives.draw import Draw, Given, Stochastic
from ppl.objectives.drawing import register
from ppl.objectives.estimators import Policy
from ppl.objectives.matching import match
from ppl.objectives.run import Node, Setting, Source, run_lanes, run_plain
from ppl.program import Program
from ppl.trace import seeded, settings

__all__ = ["Disagreement", "Programs"]


class Programs:
    """The model, the guide and all programs inside them; `plates` are the axes kept for plates.

    Args:
        model: a `ppl.Program`; or a Pyro program, or `None`.
        guide: a Pyro program, `Marginal` or `Normalize`.
        args: arguments, where the model is no `ppl.Program`.
        policy: estimators by site.
        dtype: floating type.
        device: device.
        loop: run particle by particle.
        parameters: learnable tensors of programs that are no Pyro programs; those found are added.
        constraints: constraints on them; real where none is named.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        *,
        args: Sequence[Any],
        policy: Policy | None,
        dtype: torch.dtype,
        device: torch.device,
        loop: bool,
        parameters: Mapping[str, Tensor],
        constraints: Mapping[str, Any],
    ) -> None:
        self.model, self.args, self.policy, self.loop = model, tuple(args), policy, loop
        self.program = model if isinstance(model, Program) else None
        self.dtype, self.device = dtype, device
        self.parts = _parts(model, guide)
        self.plates = 0
        self.notes: list[str] = []
        self.parameters: dict[str, Tensor] = dict(parameters)
        self.constraints: dict[str, Any] = dict.fromkeys(self.parameters, dist.constraints.real) | dict(constraints)
        self._plain: dict[int, tuple[Any, dict[str, Node]]] = {}
        self._generator = torch.Generator(device).manual_seed(0)
        with seeded(self._generator), settings(dtype, validate=True):
            for part in self.parts:
                self._discover(part)

    def source(self, program: Any, data: Mapping[str, Tensor]) -> Source:
        """A Pyro program with its arguments; arguments that carried data are replaced along with them."""
        if isinstance(program, Given):
            inner, kept = self.source(program.program, data), program.values

            def arguments(each: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
                args, kwargs = inner.arguments(each)
                return ({n: each(v) for n, v in kept.items()}, *args), kwargs

            return Source(inner.fn, arguments)
        owner = program if isinstance(program, Program) else self.program
        if not isinstance(program, Program) and not callable(program):
            raise ProgramError(
                f"expected a Pyro program, ppl.objectives.Marginal or Normalize, got {type(program).__name__}"
            )

        def own(each: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
            if owner is None:
                return self.args, {}
            return _arguments(owner, {n: each(v) for n, v in data.items()})

        if isinstance(program, Program):
            return Source(program.model, own, program._overridden, program._replaced)
        return Source(program, own)

    def carries(self, name: str) -> bool:
        """Whether an argument of the programs holds the data of an observed site."""
        return self.program is not None and bool(_places(self.program, name))

    def latents(self, program: Any) -> tuple[str, ...]:
        """Names of a program's latent sites."""
        return tuple(n for n, node in self.nodes(program).items() if node.latent and not node.auxiliary)

    def ranks(self, program: Any) -> dict[str, int]:
        """Plate axes of each site of a program."""
        found = self._plain.get(id(program))
        return {} if found is None else {n: node.rank for n, node in found[1].items()}

    def event_dim(self, name: str) -> int:
        """Event axes of a site of any program."""
        for _, nodes in self._plain.values():
            if name in nodes:
                return nodes[name].event_dim
        return 0

    def match(self, program: Any, draw: Draw) -> None:
        """Check that values fit the sites of a program."""
        if not isinstance(program, Given):
            match("model" if program is self.model else "program", self.nodes(program), draw)

    def nodes(self, program: Any) -> dict[str, Node]:
        """The sites of a program, from a run by itself."""
        if isinstance(program, Stochastic):
            raise ProgramError(f"the latent sites of a {type(program).__name__} are known after it was drawn only")
        if id(program) not in self._plain:
            with seeded(self._generator), settings(self.dtype, validate=True):
                self._discover(program)
        return self._plain[id(program)][1]

    def _discover(self, program: Any) -> None:
        """Run a program once by itself: plates, ranks, parameters."""
        source = self.source(program, {})
        known = dict(program.parameters) if isinstance(program, Program) else {}

        def draw(name: str, msg: Any) -> tuple[Tensor, None, Tensor | None]:
            estimator = None if program is self.model else chosen(name, msg["fn"], msg["infer"], self.policy)
            baseline = register(name, estimator)
            return msg["fn"].sample(), None, baseline

        setting = Setting({**self.parameters, **known}, {}, {}, draw, False, {}, self.dtype)
        with torch.no_grad():
            try:
                nodes, params = run_plain(source, setting)
            except PilotlightError:
                raise
            except Exception as error:
                what = "model" if program is self.model else getattr(program, "__name__", type(program).__name__)
                raise ProgramError(f"the program {what!r} failed when it was run once: {error}") from error
        self._plain[id(program)] = (program, nodes)
        for name, msg in params.items():
            self.constraints.setdefault(name, msg["kwargs"].get("constraint", dist.constraints.real))
            self.parameters.setdefault(name, msg["value"].detach().clone())
        self.plates = max([self.plates, *(node.raw.ndim for node in nodes.values())])

    # Batching --------------------------------------------------------------------------------------------------------

    def choose_batching(self) -> None:
        """Batched, where every program agrees with itself lane by lane."""
        for program in self.parts:
            try:
                agree = self._agrees(program)
            except PilotlightError:
                raise
            except Exception as error:
                agree, self.notes = False, [*self.notes, f"{type(error).__name__}: {str(error)[:200]}"]
            if not agree:
                self.run_singly()
                return

    def run_singly(self) -> None:
        """From here on, all programs run particle by particle."""
        self.loop = True
        self.notes.append(
            "a program does not broadcast over particles (extra axes to the left of its plates), and runs particle by "
            "particle"
        )

    def disagree(self) -> NoReturn:
        """End the dry run: what follows runs particle by particle."""
        raise Disagreement

    def check_observing(
        self, source: Source, setting: Setting, lead: tuple[int, ...], nodes: Mapping[str, Node]
    ) -> None:
        """In the dry run, whether a program broadcasts over data that differ between lanes."""
        values = {n: node.value for n, node in nodes.items() if node.latent}
        single = run_lanes(source, replace(setting, values=values, draw=None), lead, self.plates, {}, loop=True)
        if not _equal(nodes, single):
            raise Disagreement

    def _agrees(self, program: Any) -> bool:
        lead = (2, 2)
        source = self.source(program, {})
        ranks = self.ranks(program)
        with seeded(self._generator), settings(self.dtype, validate=False), torch.no_grad():
            indices: dict[str, Tensor] = {}

            def draw(name: str, msg: Any) -> tuple[Tensor, None, None]:
                return msg["fn"].sample(), None, None

            setting = Setting(self.parameters, {}, {}, draw, False, indices, self.dtype)
            batch = run_lanes(source, setting, lead, self.plates, ranks, loop=False)
            values = {n: node.value for n, node in batch.items() if node.latent}
            setting = Setting(self.parameters, values, {}, None, False, indices, self.dtype)
            single = run_lanes(source, setting, lead, self.plates, ranks, loop=True)
        return _equal(batch, single)


def _parts(model: Any, guide: Any) -> list[Any]:
    """The Pyro programs among model and guide, and inside those that are not."""
    out: list[Any] = []
    for part in (model, guide):
        inner = part.programs() if isinstance(part, Stochastic) else [part]  # type: ignore[attr-defined]
        out.extend(p for p in inner if p is not None)
    return out


def _places(program: Program, name: str) -> list[str]:
    """The arguments that hold the data of an observed site."""
    own = program.data.get(name)
    leaves = program.arguments.tensors()
    return [p for p, x in leaves.items() if own is not None and own.shape == x.shape and torch.equal(own, x.to(own))]


def _arguments(program: Program, data: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a program, with other data in their places."""
    return program.arguments.call({place: value for n, value in data.items() for place in _places(program, n)})


def _equal(batch: Mapping[str, Node], single: Mapping[str, Node]) -> bool:
    """Whether two runs of the same values have the same densities."""
    if set(single) != set(batch):
        return False
    pairs = [(batch[n].raw, single[n].raw) for n in batch]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs)


class Disagreement(Exception):
    """A program does not broadcast over its data."""
