"""What every trained posterior has: a program it belongs to, draws for any data, a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ppl.amortised.family import check_same, described_sites, singles_of
from ppl.amortised.result import posterior_of
from ppl.amortised.training import Scales
from ppl.errors import CheckpointError, OptionError, ShapeError
from ppl.flat import FlatDensity
from ppl.monitor import Monitor
from ppl.posterior import Posterior
from ppl.program import Program
from ppl.storage import load_tensors, save_tensors

__all__ = ["Fitted", "part_of", "run_chains"]

F = TypeVar("F", bound="Fitted")


@dataclass(frozen=True, eq=False)
class Fitted:
    """A network trained on simulations of a program; one training serves all data.

    Args:
        program: what was simulated (one problem).
        network: averaged weights, in evaluation mode, on vectors.
        scales: of simulated latents and data.
        options: the backend, with its options of training and drawing.
        history: (steps,) training losses, float64.
        loss: loss on fresh simulations with its standard error.
        complete: whether the training ran to its end.
        mask: (data_dim,) which data are seen.
        given: names of the model's other inputs, and a hash of their values.
    """

    FORM: ClassVar[tuple[str, ...]] = ()  # options on which the form of the network depends
    noun: ClassVar[str] = "network"  # what messages call it
    OWN: ClassVar[tuple[str, str]]  # said of a file where `own` is missing, and where it is given in vain

    program: Program
    network: nn.Module
    scales: Scales
    options: Any
    history: Tensor
    loss: tuple[float, float]
    complete: bool
    mask: Tensor = field(repr=False)
    given: tuple[list[str], str] = field(repr=False)

    @abstractmethod
    def sample(
        self, program: Program, draws: int, generator: torch.Generator, monitor: Monitor
    ) -> tuple[Tensor, Tensor | None]:
        """Unconstrained draws (problems, draws, dim), and their log density where the options ask for a correction."""

    def densities(self, program: Program) -> Sequence[Callable[[FlatDensity, Tensor], Tensor]] | None:
        """For each problem the log density that weights lead to; None where it is the program's own."""
        return None

    def posterior(
        self,
        draws: int = 1000,
        chains: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        program: Program | None = None,
        correct: bool | None = None,
        monitor: Monitor | None = None,
        **data: Tensor,
    ) -> Posterior:
        """Independent draws of the posterior.

        Args:
            draws: draws per chain.
            chains: chains; all are independent draws from one network.
            generator: source of all randomness; made from the seed when None.
            seed: see generator.
            program: the same program with other data, also `program.over(...)`; that of the training when None.
            correct: weight the draws by p / q; as in the options when None.
            monitor: progress, Ctrl-C, cost; a quiet one when None.
            **data: data by argument or observed site, instead of a program.

        Raises:
            ProgramError: the program is not the one that was simulated.
        """
        if draws < 1 or chains < 1:
            raise OptionError(f"draws and chains must be one or more, got draws={draws}, chains={chains}")
        program = (self.program if program is None else program).with_data(**data) if data else program or self.program
        generator = generator or torch.Generator(program.device).manual_seed(seed)
        fitted = self if correct is None else replace(self, options=replace(self.options, correct=correct))
        monitor = monitor or Monitor(generator=generator)
        z, log_q = fitted.sample(program, draws * chains, generator, monitor)
        kept = z.shape[1] // chains
        shape = (len(z), chains, kept)
        z = z[:, : chains * kept].reshape(*shape, -1)
        if log_q is not None:
            log_q = log_q[:, : chains * kept].reshape(shape)
        made = posterior_of(fitted, program, z, log_q, monitor, fitted.densities(program))
        return replace(made, cost=monitor.cost.copy(), attrs={**made.attrs, "notes": list(monitor.notes)})

    def check(self, singles: Sequence[Program]) -> None:
        """Raise unless all problems have the sites, covariates and parameters that were simulated."""
        check_same(self.program, self.given, singles, self.noun)

    # Files -----------------------------------------------------------------------------------------------------------

    def own_meta(self) -> dict[str, Any]:
        """Plain data that this kind of network needs beside what all have."""
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors from which `load` builds the same network again."""
        meta = {
            "kind": type(self).__name__,
            "format": 1,
            **self.own_meta(),
            "sites": described_sites(self.program),
            "given": tuple(self.given),
            "loss": self.loss,
            "complete": self.complete,
        }
        tensors = {f"network.{n}": v for n, v in self.network.state_dict().items()}
        tensors |= {f"scales.{n}": v for n, v in vars(self.scales).items()}
        return meta, {**tensors, "history": self.history}

    def save(self, path: str | Path) -> None:
        """Write the network to one safetensors file, with a checksum and without the program."""
        meta, tensors = self.state()
        save_tensors(path, tensors, meta)

    @classmethod
    def load(cls: type[F], path: str | Path, program: Program, own: Any = None) -> F:
        """Read a file of `save`.

        Args:
            path: the file.
            program: the program it was trained on, with any data.
            own: what a file cannot hold: your own network (its weights come from the file), or your own law of priors.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, or of another kind.
            ShapeError: the program has other sites.
            ProgramError: the program is another one.
        """
        tensors, meta = load_tensors(path)
        return cls.from_state(meta, tensors, program, own, str(path))

    @classmethod
    def from_state(
        cls: type[F],
        meta: Any,
        tensors: dict[str, Tensor],
        program: Program,
        own: Any = None,
        where: str = "the state",
    ) -> F:
        """The inverse of `state`, for the same program with any data."""
        program = singles_of(program)[0]
        cls.check_meta(meta, program, where)
        if (own is not None) != cls.asks_own(meta):
            raise OptionError(f"{where} {cls.OWN[own is not None]}")
        return cls.reread(meta, tensors, program, own, where)

    @classmethod
    @abstractmethod
    def asks_own(cls, meta: dict[str, Any]) -> bool:
        """Whether a part of what was saved is not in the file, and has to be given."""

    @classmethod
    @abstractmethod
    def reread(
        cls: type[F], meta: dict[str, Any], tensors: dict[str, Tensor], program: Program, own: Any, where: str
    ) -> F:
        """`from_state`, of plain data that were checked."""

    @classmethod
    def check_meta(cls, meta: Any, program: Program, where: str) -> None:
        """Raise unless plain data of `state` are of this kind, and of a program with these sites."""
        if not isinstance(meta, dict) or meta.get("kind") != cls.__name__ or meta.get("format") != 1:
            raise CheckpointError(
                f"{where} does not hold a trained {cls.noun}; give the path that {cls.__name__}.save wrote"
            )
        if meta["sites"] != described_sites(program):
            raise ShapeError(
                f"{where} was trained on the sites {meta['sites']}, but the program has {described_sites(program)}"
            )

    @classmethod
    def rebuilt(
        cls: type[F],
        meta: dict[str, Any],
        tensors: dict[str, Tensor],
        program: Program,
        network: nn.Module,
        options: Any,
        mask: Tensor,
        where: str,
    ) -> F:
        """The trained network of a file, from a fresh one of the same form."""
        try:
            network.load_state_dict(part_of(tensors, "network.", program.device))
        except RuntimeError as error:
            raise OptionError(f"the weights in {where} do not fit the network: {error}") from error
        names, hashed = meta["given"]
        loaded = cls(
            program=program,
            network=network.eval().requires_grad_(False),
            scales=Scales(**{n: v.to(program.dtype) for n, v in part_of(tensors, "scales.", program.device).items()}),
            options=options,
            history=tensors["history"],
            loss=tuple(meta["loss"]),
            complete=meta["complete"],
            mask=mask,
            given=(names, hashed),
        )
        loaded.check([program])
        return loaded


def part_of(tensors: dict[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it, on a device."""
    return {n.removeprefix(prefix): v.to(device) for n, v in tensors.items() if n.startswith(prefix)}


def run_chains(
    fit: Callable[[], F], program: Program, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
) -> Posterior:
    """The posterior whose chains are trainings of their own, so that their disagreement shows what training left open.

    Args:
        fit: trains, under this generator and monitor.
        program: one problem or many.
        draws: of each chain.
        chains: how many.
        generator: source of the draws.
        monitor: progress, cost, Ctrl-C.
    """
    parts: list[tuple[Tensor, Tensor | None]] = []
    for i in range(chains):
        with monitor.section(f"chain {i}"):
            fitted = fit()
            parts.append(fitted.sample(program, draws, generator, monitor))
        if monitor.interrupted:
            break
    if len(parts) > 1 and parts[-1][0].shape[1] < draws:
        del parts[-1]  # cut short: it would cost the finished chains their draws
    z = torch.stack([p[0] for p in parts], 1)
    log_q = None if parts[0][1] is None else torch.stack([p[1] for p in parts if p[1] is not None], 1)
    made = posterior_of(fitted, program, z, log_q, monitor, fitted.densities(program))
    return replace(made, attrs={**made.attrs, "complete": made.complete and len(parts) == chains})
