"""The language of objectives: what a function `objective(ctx, model, guide)` can ask of two programs.

    def iwelbo(ctx, model, guide):                       # E log (1/5) sum_k p(x, z_k) / q(z_k), per datum
        with ctx.particles(5):
            z = ctx.sim(guide)
            weight = ctx.density(model, z) - z.density
        return logmeanexp(weight)

Tensors have the newest particle axis leftmost, then samples (independent copies of the whole objective, over which the
engine averages), then the plates that all sites share: (*particles, samples, *data). An objective reduces the particle
axes and returns (samples, *data), to be maximised.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.objectives.density import Direct, Exact, LogDensity, direct, reciprocal
from ppl.objectives.downstream import Terms, terms_of
from ppl.objectives.draw import Address, Draw, Particles, Stochastic
from ppl.objectives.drawing import draw_site
from ppl.objectives.estimators import Estimator, Reparam
from ppl.objectives.run import Node, Setting, run_lanes

if TYPE_CHECKING:
    from ppl.objectives.engine import Engine
    from ppl.objectives.learned_control import Control

__all__ = ["Context"]


class Context:
    """What an objective sees. The engine makes one for every evaluation.

    Args:
        engine: the compiled objective.
        params: learnable tensors, constrained.
        samples: independent copies of the objective.
        seeds: seed of each site's draw, kept over evaluations that must share their noise.
        indices: indices of subsampled plates.
        forced: values by address, in place of draws.
        states: joint states of the enumerated sites, which are samples of their own.
        shared: repeat the noise of all draws over the states, not only of reparameterised ones.
    """

    def __init__(
        self,
        engine: Engine,
        params: Mapping[str, Tensor],
        samples: int,
        seeds: dict[Any, int],
        indices: dict[str, Tensor],
        forced: Mapping[Address, Tensor],
        states: int = 1,
        *,
        shared: bool = False,
    ) -> None:
        self.engine, self.params, self.samples = engine, params, samples
        self.seeds, self.indices, self.forced = seeds, indices, forced
        self.axes: list[Particles] = []
        self.calls = 0
        self.sites: dict[Address, tuple[Node, tuple[Particles, ...]]] = {}
        self.scored: list[tuple[str, Tensor]] = []
        self.seen: dict[Address, tuple[Any, Mapping[str, Any]]] = {}
        self.frames: list[tuple[Any, ...]] = []
        self.data: dict[str, Tensor] = {}
        self.relaxed: dict[Address, list[Tensor]] = {}
        self.controls: dict[Address, Control] = {}
        self.states, self.shared = states, shared
        self.drawn: dict[Address, tuple[Tensor, int]] = {}  # values, and their axis of samples
        self.ragged = False  # whether a shape depends on a draw
        self.terms: Terms | None = None  # of the objective, where it is a sum of log densities
        self.weight: Tensor | None = None  # probabilities of the enumerated states

    # Axes ------------------------------------------------------------------------------------------------------------

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the lane axes, newest particle axis first, samples last."""
        return (*(axis.size for axis in reversed(self.axes)), self.samples)

    @contextmanager
    def particles(self, size: int) -> Iterator[Particles]:
        """Independent particles: all that is drawn inside gets a new leftmost axis.

        Args:
            size: particles; one or more.

        Raises:
            OptionError: there are no particles.
        """
        if not isinstance(size, int) or size < 1:
            raise OptionError(f"a nested expectation needs samples: particles must be one or more, got {size!r}")
        axis = Particles(size)
        self.axes.append(axis)
        try:
            yield axis
        finally:
            self.axes.pop()

    @contextmanager
    def observing(self, data: Draw | Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, observed sites of all programs, and the arguments that carried their data, have other values."""
        before = self.data
        self.data = {**before, **(data.values if isinstance(data, Draw) else dict(data))}
        try:
            yield
        finally:
            self.data = before

    # Programs --------------------------------------------------------------------------------------------------------

    def sim(
        self,
        program: Any,
        *,
        detach: bool = False,
        observed: bool = False,
        kept: Draw | None = None,
        only: Container[str] | None = None,
    ) -> Draw:
        """Draw a program's latent sites, each by its own estimator.

        Args:
            program: a Pyro program, or `Marginal`, `Normalize`.
            detach: draw without gradients: the distribution of the draws then counts as fixed.
            observed: draw observed sites as well, from the joint distribution.
            kept: sites that are not drawn but set; the density is that of the others.
            only: sites that are wanted, met before all others without a value; the rest is drawn and forgotten.

        Returns:
            Values and their log density.
        """
        if isinstance(program, Stochastic):
            draw = program.sim(self, detach=detach)
            return draw.detached() if detach else draw
        call = self._next()
        given = {} if kept is None else self._padded(kept)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            nodes = self._run(program, call, given, draw=True, detach=detach, simulate=observed, frozen=False)
            wanted = (lambda name: True) if only is None else only.__contains__
            own = {n: node for n, node in nodes.items() if node.latent and n not in given and wanted(n)}
            log = self._total(own)
        for name, node in own.items():
            if node.estimator is not None:
                self.sites[call, name] = (node, tuple(self.axes))
        return Draw(
            values={n: node.value for n, node in own.items()},
            density=Exact(log, self._terms(call, own, own)),
            auxiliary=frozenset(n for n, node in own.items() if node.auxiliary),
            nodes=own,
            lanes=len(self.lead),
            call=call,
        )

    def density(self, program: Any, values: Draw | Mapping[str, Tensor], *, frozen: bool = False) -> Direct:
        """Log density of values, and of the data that a program observes, for each particle and datum.

        Args:
            program: a Pyro program, or `Marginal`, `Normalize`.
            values: a draw, or values by site; all latent sites of the program and no others.
            frozen: take the program's parameters as constants; gradients flow through the values alone.

        Raises:
            ProgramError: a site has no value, or a value no site; supports or shapes do not match.
        """
        draw = values if isinstance(values, Draw) else Draw(dict(values), Exact(torch.zeros(())))
        if isinstance(program, Stochastic):
            return program.density(self, draw, frozen=frozen)
        call = self._next()
        self.engine.programs.match(program, draw)
        given = self._padded(draw)
        nodes = self._run(program, call, given, draw=False, detach=False, simulate=False, frozen=frozen)
        self.scored.extend((n, node.raw) for n, node in nodes.items())
        whole = all(n in draw.nodes and v is draw.nodes[n].value for n, v in draw.values.items())
        return Exact(self._total(nodes), self._terms(draw.call, draw.nodes, nodes) if whole else None)

    def partial(self, program: Any, values: Draw, sites: Container[str], *, frozen: bool = False) -> Tensor:
        """Log density of some sites of a Pyro program, (*particles, samples, *data).

        Args:
            program: a Pyro program.
            values: values of its latent sites; those without, met after the sites that count, are drawn and forgotten.
            sites: names of the sites that count.
            frozen: take the program's parameters as constants.
        """
        given = self._padded(values)
        nodes = self._run(program, self._next(), given, draw=True, detach=False, simulate=False, frozen=frozen)
        counted = {n: node for n, node in nodes.items() if n in sites}
        self.scored.extend((n, node.raw) for n, node in counted.items())
        return self._total(counted)

    def latents(self, program: Any) -> tuple[str, ...]:
        """Names of a program's latent sites."""
        return self.engine.programs.latents(program)

    # Expectations ----------------------------------------------------------------------------------------------------

    def expectation(self, fn: Callable[[], Tensor], samples: int) -> Any:
        """E of a random real, for use under nonlinear functions that keep it unbiased: see `Expectation`.

        Args:
            fn: draws and computes the real, one for each particle; called once.
            samples: independent copies.
        """
        from ppl.objectives.expectation import Expectation

        if not isinstance(samples, int) or samples < 1:
            raise OptionError(f"a nested expectation needs samples: one or more, got {samples!r}")
        with self.particles(samples):
            value = fn()
        return Expectation(self, fn, value)

    def with_gradient(self, value: Tensor, surrogate: Tensor) -> Tensor:
        """A tensor with the value of one and the pathwise gradient of the other."""
        return value.detach() + surrogate - surrogate.detach()

    def fully_reparameterised(self, what: str) -> None:
        """Check that every draw so far is reparameterised.

        Raises:
            OptionError: naming the site that is not.
        """
        for (_, name), (node, _) in self.sites.items():
            if not isinstance(node.estimator, Reparam):
                raise OptionError(
                    f"{what} is unbiased for reparameterised sites only, but site {name!r} takes "
                    f"{type(node.estimator).__name__}; use IWELBO or VIMCO, which hold any estimator"
                )

    def choose(
        self, name: str, log_weight: Tensor, estimator: Any, *, detach: bool = False
    ) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
        """Draw one entry of the leftmost axis with probability proportional to its weight.

        Args:
            name: name of the index in messages.
            log_weight: (entries, *particles, samples, *data).
            estimator: `Enumerate()` or `Reinforce()` for the index, a discrete site like any other.
            detach: take its distribution as fixed.

        Returns:
            The index (*particles, samples, *data), and a function that picks its entry of a tensor
            (entries, *particles, samples, *plates, *event), given the number of event axes.
        """
        address = (self._next(), name)
        probs = torch.softmax(log_weight.detach(), 0)
        shape = self.lead + self.engine.plan.data_shape(log_weight.shape[1 + len(self.lead) :])
        if address in self.forced:
            index = self.engine.plan.collect(self.forced[address], len(self.lead)).expand(shape)
        else:
            self._seed(address)
            index = torch.multinomial(probs.reshape(len(probs), -1).mT, 1)[:, 0].reshape(shape)
        self.drawn[address] = (self.engine.plan.spread(index, len(self.lead)), len(self.axes))
        score = torch.log_softmax(log_weight, 0).gather(0, index[None])[0]
        padded, raw = self.engine.plan.spread(index, len(self.lead)), self.engine.plan.spread(score, len(self.lead))
        states = torch.arange(len(log_weight), device=index.device)
        node = Node(padded, raw, raw, 1.0, (), 0, 0, False, True, False, True, None, True, estimator, states=states)
        if not detach:
            self.sites[address] = (node, tuple(self.axes))

        def pick(values: Tensor, event_dim: int) -> Tensor:
            place = padded.reshape(1, *padded.shape, *(1,) * event_dim).expand(1, *values.shape[1:])
            return values.gather(0, place)[0]

        return index, pick

    # Inside ----------------------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self.calls += 1
        return self.calls

    def _seed(self, address: Any) -> int:
        """Set the (forked) generator to the seed of an address, so that evaluations share their noise."""
        if self.engine.tape is not None:
            self.engine.tape.at(address)
            return 0
        if address not in self.seeds:
            self.seeds[address] = self.engine.fresh_seed()
        torch.random.default_generator.manual_seed(self.seeds[address])
        if self.engine.device.type == "cuda":
            torch.cuda.manual_seed(self.seeds[address])
        return self.seeds[address]

    def _padded(self, draw: Draw) -> dict[str, Tensor]:
        """Values with all lane axes of this place."""
        plates = self.engine.programs.plates
        out = {}
        for name, value in draw.values.items():
            node = draw.nodes.get(name)
            event = self.engine.programs.event_dim(name) if node is None else node.event_dim
            batch = value.ndim - event
            if node is None and 0 <= batch <= plates:  # one value for all lanes
                value = value.reshape((1,) * (plates - batch) + tuple(value.shape))
            width = max(value.ndim - event - plates, 0)
            out[name] = (
                value.expand(*self.lead[: len(self.lead) - width], *value.shape) if width < len(self.lead) else value
            )
        return out

    def _run(
        self,
        program: Any,
        call: int,
        given: dict[str, Tensor],
        *,
        draw: bool,
        detach: bool,
        simulate: bool,
        frozen: bool,
    ) -> dict[str, Node]:
        engine = self.engine
        source = engine.programs.source(program, self.data)
        params = {n: p.detach() for n, p in self.params.items()} if frozen or detach else self.params
        self._seed((call, None))  # for plates, and what programs draw outside of sites

        def one(name: str, msg: Any) -> tuple[Tensor, Estimator | None, Tensor | None]:
            return draw_site(self, (call, name), msg, detach)

        setting = Setting(params, given, self.data, one if draw else None, simulate, self.indices, engine.dtype)
        ranks = engine.programs.ranks(program)
        try:
            nodes = run_lanes(source, setting, self.lead, engine.programs.plates, ranks, loop=engine.programs.loop)
        except (RuntimeError, ValueError, IndexError):
            if engine.plan.complete or engine.programs.loop or not self.data:
                raise
            engine.programs.disagree()
        if self.data and not engine.plan.complete and not engine.programs.loop:
            engine.programs.check_observing(source, setting, self.lead, nodes)
        self.frames.extend(node.frames for node in nodes.values())
        return nodes

    def _terms(self, call: int, drawn: Mapping[str, Node], nodes: Mapping[str, Node]) -> Terms | None:
        """What a density is a sum of; unknown among particles, and where lanes may visit different sites."""
        plan = self.engine.plan
        wanted = plan.complete and plan.scored and torch.is_grad_enabled()
        if not call or self.axes or self.engine.loop or not wanted:
            return None
        return terms_of(plan, call, drawn, nodes)

    def _total(self, nodes: Mapping[str, Node]) -> Tensor:
        """Scaled log densities summed to (*particles, samples, *data)."""
        total: Tensor | float = 0.0
        for node in nodes.values():
            scale = self.engine.plan.inner_scale(node)
            term = node.raw if isinstance(scale, float) and scale == 1.0 else node.raw * scale
            total = total + self.engine.plan.collect(term, len(self.lead))
        if not isinstance(total, Tensor):
            total = torch.zeros(self.lead + self.engine.plan.data_shape(()), dtype=self.engine.dtype)
        return total

    def log_weight(self, numerator: LogDensity, denominator: LogDensity) -> Tensor:
        """log of an unbiased importance weight; the same as `numerator - denominator`."""
        return direct(numerator, "the numerator") - reciprocal(denominator, "the denominator")
