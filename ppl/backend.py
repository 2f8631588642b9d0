"""What an inference backend is, and `infer`, the one door to all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ppl.cost import Cost
from ppl.errors import CapabilityError, NotFiniteError, OptionError, ProgramError
from ppl.monitor import Event, Monitor
from ppl.option_checks import whole_number
from ppl.posterior import Estimate, Posterior
from ppl.program import Program

__all__ = [
    "Backend",
    "Exactness",
    "fitting",
    "in_turn",
    "infer",
    "problem_seeds",
    "register",
    "registered",
    "stack_problems",
]

SEEDS = (-(2**63), 2**64 - 1)  # what a torch generator takes
Exactness = Literal["never", "in_the_limit", "always"]


@runtime_checkable
class Backend(Protocol):
    """Turns a program into a posterior. Backends are frozen dataclasses whose fields are their options.

    Class data:
        exact: whether the error vanishes as compute grows, relative to the discretised prior.
        limit: what has to grow ("draws", "particles", "steps"), for `exact="in_the_limit"`.
        exact_when: conditions on the program ("gaussian_prior", "linear_operator"), all of which must hold.
        needs: capabilities asked of the program's latent sites; each must be offered by at least one.
        default_chains: chains when the caller names none.
        batches_problems: whether `run` takes `program.over(...)` as it is; otherwise problems run in turn, problem i as
            by `infer(program.problem(i), ..., seed=seeds[i])` with `seeds` the posterior's attrs["problem_seeds"].
    """

    exact: ClassVar[Exactness]
    limit: ClassVar[tuple[str, ...]]
    exact_when: ClassVar[tuple[str, ...]]
    needs: ClassVar[frozenset[str]]
    default_chains: ClassVar[int]
    batches_problems: ClassVar[bool]

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Draw `draws` per chain from the posterior of `program`."""
        ...


B = TypeVar("B", bound=type)
_REGISTRY: dict[str, type] = {}


def register(backend: B) -> B:
    """Make a backend class known, so that errors can name it as one that would fit; a class decorator."""
    missing = [n for n in Backend.__annotations__ if not hasattr(backend, n)]
    if missing or not callable(getattr(backend, "run", None)):
        raise TypeError(f"{backend.__name__} is no backend: it lacks {', '.join(missing) or 'run'}")
    _REGISTRY[backend.__name__] = backend
    return backend


def registered() -> dict[str, type]:
    """All backends whose packages are imported, by name."""
    return dict(_REGISTRY)


def fitting(program: Program) -> list[str]:
    """Names of the registered backends whose needs the program meets."""
    return [name for name, backend in sorted(_REGISTRY.items()) if not _lacking(backend, program)]


def _lacking(backend: Any, program: Program) -> set[str]:
    offered = frozenset().union(*program.capabilities.values())
    lacking = set(backend.needs - offered)
    # A generic engine cannot hold a diffusion site, unless it leaves that to the kernels it was given.
    if "denoiser" in offered and not backend.needs and not getattr(backend, "holds_denoisers", False):
        lacking.add("noise space: ppl.NoiseSpace(engine)")
    return lacking


def check_capabilities(backend: Any, program: Program) -> None:
    """Raise CapabilityError when the program's sites do not offer what a backend needs.

    Raises:
        CapabilityError: naming what is missing, what the sites offer and the backends that would fit.
    """
    lacking = _lacking(backend, program)
    if lacking:
        offers = {n: sorted(c) for n, c in program.capabilities.items()}
        raise CapabilityError(
            f"{type(backend).__name__} needs {sorted(lacking)}, but the latent sites offer {offers}; backends that fit "
            f"this program: {', '.join(fitting(program)) or 'none'}"
        )


def infer(
    program: Program,
    backend: Backend,
    draws: int = 1000,
    chains: int | None = None,
    seed: int = 0,
    *,
    callback: Callable[[Event], bool | None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    progress: bool | Literal["force"] = False,
) -> Posterior:
    """Run a backend on a program.

    Args:
        program: the model and its data; `program.over(...)` solves many problems.
        backend: how to infer, such as `ppl.NUTS()` or `inverse.TwistedSMC()`.
        draws: draws per chain.
        chains: independent runs; the backend's own default when `None`.
        seed: same seed, same draws.
        callback: called with an `Event` after each step; returning True stops the run.
        checkpoint: folder for checkpoints; a run that was killed goes on from there when called again.
        checkpoint_every: seconds between checkpoints; 0 writes at every chance.
        progress: show a progress bar with the cost so far.

    Returns:
        The posterior; `complete` is False after Ctrl-C or a callback stopped the run.

    Raises:
        CapabilityError: the backend needs what the program's sites do not offer.
        ProgramError: the program has nothing observed, or a site that the backend cannot hold.
        OptionError: an option has a value it cannot have.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import NUTS, Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), NUTS(warmup=200), draws=200, chains=2)
        >>> posterior["mu"].shape
        torch.Size([2, 200])
    """
    if not isinstance(program, Program):
        raise OptionError(
            f"expected a ppl.Program, got {type(program).__name__}; wrap the model: ppl.Program(model, data)"
        )
    if isinstance(backend, type) or not isinstance(backend, Backend):
        what = (
            f"the class {backend.__name__}; call it: {backend.__name__}()"
            if isinstance(backend, type)
            else repr(backend)
        )
        raise OptionError(f"expected a backend such as ppl.NUTS(), got {what}")
    chains = whole_number("chains", backend.default_chains if chains is None else chains, 1)
    draws, seed = whole_number("draws", draws, 1), whole_number("seed", seed, *SEEDS)
    if not program.has_data:
        raise ProgramError(
            "the program has no observed site: there is nothing to condition on. Give at least one pyro.sample data "
            "with obs=, or a pyro.factor; to draw from the prior use program.simulate(generator)"
        )
    check_capabilities(backend, program)
    generator = torch.Generator(program.device).manual_seed(seed)
    fingerprint = {
        "program": program.fingerprint(),
        "backend": hashlib.sha256(repr(backend).encode()).hexdigest(),
        "run": f"draws={draws} chains={chains} seed={seed}",
    }
    monitor = Monitor(
        progress=progress,
        callback=callback,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        generator=generator,
        fingerprint=fingerprint,
    )
    with monitor:
        if program.problems is None or backend.batches_problems:
            posterior = backend.run(program, draws=draws, chains=chains, generator=generator, monitor=monitor)
        else:
            seeds = problem_seeds(program, generator)
            posterior = in_turn(program, backend, draws=draws, chains=chains, seeds=seeds, monitor=monitor)
    attrs: dict[str, Any] = {
        "backend": type(backend).__name__,
        "options": repr(backend),
        "exact": backend.exact,
        "seed": seed,
        **posterior.attrs,
        "complete": posterior.attrs.get("complete", True) and not monitor.interrupted,
        "notes": [*monitor.notes, *(n for n in program.notes if n not in monitor.notes)],
    }
    if monitor.stop_reason:
        attrs["stopped"] = monitor.stop_reason
    if program.problems is not None:
        attrs["problems"] = posterior.attrs.get("problems", program.problems)  # fewer after an interruption
    monitor.done()
    return replace(
        posterior,
        cost=monitor.cost.copy(),
        dims=_dims(program, posterior) | dict(posterior.dims),
        observed=dict(program.observed_data()),
        attrs=attrs,
    )


def problem_seeds(program: Program, generator: torch.Generator) -> list[int]:
    """One seed for every problem of `program.over(...)`, whether they run in turn or in one batch."""
    assert program.problems is not None
    return torch.randint(2**31 - 1, (program.problems,), generator=generator, device=generator.device).tolist()


def in_turn(
    program: Program,
    backend: Backend,
    *,
    draws: int,
    chains: int,
    seeds: Sequence[int],
    monitor: Monitor,
    why: Exception | None = None,
) -> Posterior:
    """Problems one after the other, each with its own seed; stacked along a leading problem axis.

    `why` says what kept a backend that batches problems from it, for a note.
    """
    assert program.problems is not None
    if why is not None:
        monitor.note(f"problems run in turn and not in one batch: {why}")
    parts: list[Posterior | NotFiniteError] = []
    for i in monitor.steps(program.problems, "problems"):
        own = torch.Generator(program.device).manual_seed(seeds[i])
        try:
            with monitor.section(f"problem {i}"), monitor.drawing_from(own):
                parts.append(
                    backend.run(program.problem(i), draws=draws, chains=chains, generator=own, monitor=monitor)
                )
        except NotFiniteError as error:
            parts.append(error)
    last = parts[-1] if parts else None
    found = [part for part in parts if isinstance(part, Posterior)]
    if monitor.interrupted and len(found) > 1 and last is found[-1] and last.shape[-1] < found[0].shape[-1]:
        del parts[-1]  # cut short: it would cost the finished ones their draws
    return stack_problems(parts, program.problems, seeds, monitor)


def stack_problems(
    parts: Sequence[Posterior | NotFiniteError],
    problems: int,
    seeds: Sequence[int] = (),
    monitor: Monitor | None = None,
) -> Posterior:
    """One posterior with a leading problem axis; after an interruption only the problems that were finished.

    A problem that failed leaves the others as they are: its draws, weights and evidence are not numbers,
    attrs["failed_problems"] lists it, and a note says why.

    Args:
        parts: what was found for each problem.
        problems: how many there are.
        seeds: of the problems, for attrs["problem_seeds"].
        monitor: takes the notes.

    Raises:
        NotFiniteError: all problems failed.
    """
    found = [part for part in parts if isinstance(part, Posterior)]
    failed = {i: part for i, part in enumerate(parts) if not isinstance(part, Posterior)}
    if failed and not found:
        raise next(iter(failed.values()))
    for i, error in failed.items():
        if monitor is not None:
            monitor.note(f"problem {i} failed, and its draws are not numbers: {error}")
    complete = len(parts) == problems and all(p.complete for p in found) and not failed
    length, chains = min(p.shape[-1] for p in found), min(p.shape[-2] for p in found)
    if monitor is not None and not monitor.interrupted and any(p.shape[-1] > length for p in found):
        least = next(i for i, p in enumerate(parts) if isinstance(p, Posterior) and p.shape[-1] == length)
        monitor.note(f"problem {least} has {length} draws per chain left, and all problems are cut to as many")
    if monitor is not None and not monitor.interrupted and any(p.shape[-2] > chains for p in found):
        monitor.note(f"a problem has {chains} chains left, and all are cut to as many")
    blank = _not_numbers(found[0]) if failed else found[0]
    filled = [part if isinstance(part, Posterior) else blank for part in parts]

    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack(values)

    cut = [{n: v[:chains, :length] for n, v in p.draws.items()} for p in filled]
    weights = [p.log_weight[:chains, :length] for p in filled if p.log_weight is not None]
    evidence = [p.log_evidence for p in filled if p.log_evidence is not None]
    common = set.intersection(*(set(p.info) for p in filled))
    info = {n: stack([p.info[n] for p in filled]) for n in common if len({p.info[n].shape for p in filled}) == 1}
    attrs: dict[str, Any] = {"problems": len(parts), "complete": complete}
    if seeds:
        attrs["problem_seeds"] = list(seeds)
    if failed:
        attrs["failed_problems"] = list(failed)
    return Posterior(
        draws={n: stack([c[n] for c in cut]) for n in cut[0]},
        log_weight=stack(weights) if len(weights) == len(parts) else None,
        log_evidence=Estimate(stack([e.value for e in evidence]), stack([e.stderr for e in evidence]))
        if len(evidence) == len(parts)
        else None,
        info=info,
        cost=Cost(),
        attrs=attrs,
    )


def _not_numbers(like: Posterior) -> Posterior:
    """In the place of a problem that failed: NaN, and zero where there is none."""

    def nan(t: Tensor) -> Tensor:
        return torch.full_like(t, torch.nan) if t.is_floating_point() else torch.zeros_like(t)

    evidence = None if like.log_evidence is None else Estimate(nan(like.log_evidence.value), nan(like.log_evidence[1]))
    return Posterior(
        draws={n: nan(v) for n, v in like.draws.items()},
        log_weight=None if like.log_weight is None else nan(like.log_weight),
        log_evidence=evidence,
        info={n: nan(v) for n, v in like.info.items()},
    )


def _dims(program: Program, posterior: Posterior) -> dict[str, Sequence[str]]:
    """Names of the axes behind (chain, draw): plates by their names, event axes by the site's."""
    dims: dict[str, Sequence[str]] = {}
    lead = 3 if program.problems is not None else 2
    for name, site in program.sites.items():
        size = len(site.shape)
        batch = size - site.event_dim
        by_axis = {f.dim: f.name for f in site.frames}
        names = tuple(
            by_axis.get(axis - batch, f"{name}_dim_{axis}") if axis < batch else f"{name}_dim_{axis}"
            for axis in range(size)
        )
        if site.observed or (name in posterior.draws and posterior.draws[name].ndim == lead + size):
            dims[name] = names
    return dims
