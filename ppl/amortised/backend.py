"""What backends that are trained on simulations share: train or load, then draw; a chain is a training of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from ppl.amortised.family import IfCorrected
from ppl.amortised.fitted import Fitted, run_chains
from ppl.amortised.pairs import Pairs, givens
from ppl.amortised.training import Training
from ppl.cost import Cost
from ppl.errors import OptionError
from ppl.fit_door import ContinuedFitDoor
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program

__all__ = ["AmortisedBackend"]

F = TypeVar("F", bound=Fitted)


class AmortisedBackend(ContinuedFitDoor, Generic[F]):
    """Base of frozen dataclasses with the options `file`, `steps`, `batch`, `lr`, `ema` and `correct`."""

    exact: ClassVar[Any] = IfCorrected("in_the_limit", "never")
    limit: ClassVar[Any] = IfCorrected(("draws",), ("steps",))
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = True

    @property
    @abstractmethod
    def fitted_class(self) -> type[F]:
        """What `fit` returns."""

    @abstractmethod
    def pairs(self, program: Program, cost: Cost | None = None) -> Pairs:
        """What simulates the program."""

    @abstractmethod
    def training(self, pairs: Any, generator: torch.Generator, begun: Any) -> Training:
        """The training, from a network and scales to go on from, or from nothing."""

    @abstractmethod
    def judged(self, training: Training) -> tuple[float, float]:
        """Loss on fresh simulations, and its standard error."""

    @abstractmethod
    def loaded(self, program: Program) -> F:
        """The network of `file`, with these options of drawing."""

    @abstractmethod
    def check_start(self, start: F) -> None:
        """Raise OptionError where this training cannot go on from that network."""

    @property
    @abstractmethod
    def step_cost(self) -> Mapping[str, int]:
        """What a step of the training adds to the cost."""

    def extras(self, training: Training, monitor: Monitor) -> Mapping[str, Any]:
        """Further fields of what `fit` returns; also the place for remarks."""
        return {}

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Train (or load) and draw; see `ppl.infer`."""
        options: Any = self
        if options.file is not None:
            if not Path(options.file).is_file():
                raise OptionError(
                    f"there is no file {options.file}; train it: pilotlight train --program, or fit(...).save"
                )
            return self.loaded(program).posterior(draws, chains, generator, program=program, monitor=monitor)

        def fit() -> F:
            return self.fit(program, generator=generator, monitor=monitor)

        return run_chains(fit, program, draws, chains, generator, monitor)

    def _one_problem(self, program: Program) -> Program:
        return program if program.problems is None else program.problem(0)

    def _fitted(self, program: Program, generator: torch.Generator, monitor: Monitor, start: F | None) -> F:
        """Train the network; the data of the program are not looked at."""
        options: Any = self
        pairs = self.pairs(program, monitor.cost)
        begun = None
        if start is not None:
            self.check_start(start)
            start.check([program])
            begun = (start.network, start.scales)
        training = self.training(pairs, generator, begun)
        training.run(monitor, **self.step_cost)
        for note in pairs.notes:
            monitor.note(note)
        history = training.history[: training.step]
        return self.fitted_class(
            program=program,
            network=training.averaged,
            scales=training.scales,
            options=self,
            history=history if start is None else torch.cat([start.history, history]),
            loss=self.judged(training),
            complete=training.step == options.steps,
            mask=pairs.mask,
            given=givens(program),
            **self.extras(training, monitor),
        )

    def drawing_from(self, loaded: F, names: tuple[str, ...]) -> F:
        """A loaded network with these options, but for those of its training."""
        as_trained = {n: getattr(loaded.options, n) for n in names}
        options: Any = self
        return replace(loaded, options=replace(options, **as_trained))
