"""The contract of a backend as one check, for the backends here and for your own.

Class data, shapes, types, seeds, global state, cost, interruption, resumption, files. What it does not check is whether
the draws are right: for that, compare with a posterior that is known (`models.references`, `ppl.diagnostics.sbc`).
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl.backend import Backend, infer
from ppl.errors import OptionError
from ppl.monitor import Event
from ppl.posterior import Posterior
from ppl.program import Program
from ppl.sites import unwrap

__all__ = ["check_backend"]

COUNTS = ("denoiser_calls", "denoiser_evals", "vjps", "likelihood_evals", "density_evals", "gradient_evals")


def check_backend(
    backend: Backend,
    program: Program,
    *,
    draws: int = 6,
    seed: int = 0,
    rtol: float = 1e-9,
    problems: bool = True,
    files: bool = True,
) -> None:
    """Check everything that a backend promises beside the quality of its draws.

    The backend runs about nine times: give it few steps, and keep the program small.

    Args:
        backend: an instance of your class.
        program: one that it can run on.
        draws: of the runs; at least 2.
        seed: of the runs.
        rtol: largest relative difference between draws that should be the same; 1e-4 is usual in float32.
        problems: also run on `program.over(...)` of two copies of the data, and one of them alone.
        files: also interrupt, resume, save and load, in a temporary folder.

    Raises:
        AssertionError: that names the broken promise.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import EllipticalSlice
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> check_backend(EllipticalSlice(warmup=5), Program(model, torch.tensor(2.0)), rtol=1e-4)
    """
    if draws < 2:
        raise OptionError(f"draws must be 2 or more, got {draws}")
    _check_class(backend)
    before, globals_ = _fingerprint(program), _globals()
    whole = infer(program, backend, draws, 2, seed)
    _check_globals(globals_)
    _promise(_fingerprint(program) == before, "run changed the program, its data or its parameters")
    _promise(not _counters(program), "run left a counter of denoiser calls on a prior")
    _check_posterior(whole, program, draws, 2)
    _check_cost(whole, backend)
    _promise(whole.attrs["backend"] != "", 'attrs["backend"] is empty')
    for site, values in whole.draws.items():
        if values.is_floating_point():
            _promise(not torch.equal(values[0], values[1]), f"both chains hold the same draws of {site!r}")
            break
    again = infer(program, backend, draws, 2, seed)
    _same(again, whole, "the same seed gives the same draws", rtol)
    other = infer(program, backend, draws, 2, seed + 1)
    _promise(
        any(not torch.equal(other.draws[n], v) for n, v in whole.draws.items()), "another seed gives the same draws"
    )
    _check_posterior(infer(program, backend, 1, 1, seed), program, 1, 1)
    if files:
        with tempfile.TemporaryDirectory() as folder:
            _check_interruption(backend, program, draws, seed, Path(folder) / "checkpoint", whole, rtol)
            _check_file(whole, Path(folder) / "posterior")
    if problems:
        twice = {n: torch.stack([v, v]) for n, v in program.data.items()}
        both = infer(program.over(**twice), backend, draws, 1, seed)
        _promise(both.problems == 2, f'two problems were given, attrs["problems"] is {both.problems}')
        _check_posterior(both, program, draws, 1, problems=2)
        seeds = both.attrs.get("problem_seeds")  # engines that hold one random stream for all problems name none
        if seeds is not None:
            alone = infer(program.over(**twice).problem(1), backend, draws, 1, seeds[1])
            second = dataclasses.replace(alone, draws={n: v[1] for n, v in both.draws.items()})
            _same(second, alone, "a problem among others has the draws that it has alone", rtol)
    _check_globals(globals_)


def _promise(kept: bool, broken: str) -> None:
    if not kept:
        raise AssertionError(broken)


def _check_class(backend: Backend) -> None:
    """Class data, a frozen dataclass, and a repr that depends on the options alone."""
    _promise(isinstance(backend, Backend), f"{backend!r} lacks class data or run: see ppl.Backend")
    name = type(backend).__name__
    frozen = dataclasses.is_dataclass(backend) and type(backend).__dataclass_params__.frozen
    _promise(frozen, f"{name} must be a frozen dataclass, whose fields are its options")
    _promise(
        backend.exact in ("never", "in_the_limit", "always"),
        f'{name}.exact is {backend.exact!r}, expected "never", "in_the_limit" or "always"',
    )
    for field in ("limit", "exact_when"):
        value = getattr(backend, field)
        words = isinstance(value, tuple) and all(isinstance(word, str) for word in value)
        _promise(words, f"{name}.{field} must be a tuple of words, got {value!r}")
    _promise(
        backend.exact != "in_the_limit" or bool(backend.limit),
        f"{name}.limit does not say what has to grow to be exact",
    )
    needs = backend.needs
    _promise(
        isinstance(needs, frozenset) and all(isinstance(word, str) for word in needs),
        f"{name}.needs must be a frozenset of capability names, got {needs!r}",
    )
    chains = backend.default_chains
    _promise(
        isinstance(chains, int) and chains >= 1, f"{name}.default_chains must be a positive integer, got {chains!r}"
    )
    batches = backend.batches_problems
    _promise(isinstance(batches, bool), f"{name}.batches_problems must be true or false, got {batches!r}")
    text = repr(backend)
    _promise(name in text, f"repr does not name the class: {text}")
    # A checkpoint belongs to a run by the repr of its backend, in another process too.
    _promise(
        re.search(r"\bat 0x[0-9a-f]+", text) is None, f"repr holds an address, which the next process has not: {text}"
    )


def _check_posterior(
    posterior: Posterior, program: Program, draws: int, chains: int, problems: int | None = None
) -> None:
    """Sites, shapes, types, devices, finite values, weights, evidence."""
    _promise(isinstance(posterior, Posterior), f"run returned {type(posterior).__name__}, expected a ppl.Posterior")
    _promise(posterior.complete, 'attrs["complete"] is false after a run that nothing stopped')
    lead = ((problems,) if problems is not None else ()) + (chains, draws)
    example = program.simulate(torch.Generator(program.device).manual_seed(0))
    for name, site in program.latents.items():
        if site.discrete and name not in posterior.draws:
            continue  # summed out
        _promise(name in posterior.draws, f"there are no draws of the latent site {name!r}")
        values = posterior.draws[name]
        shape = (*lead, *site.shape)
        _promise(tuple(values.shape) == shape, f"draws of {name!r} have shape {tuple(values.shape)}, expected {shape}")
        if not site.discrete:
            first = example[name]
            _promise(
                values.dtype == first.dtype and values.device == first.device,
                f"draws of {name!r} are {values.dtype} on {values.device}, expected {first.dtype} on {first.device}",
            )
        _promise(bool(values.isfinite().all()), f"draws of {name!r} are not all finite")
        _promise(not values.requires_grad, f"draws of {name!r} drag a graph of gradients along")
    if posterior.log_weight is not None:
        weights = posterior.weights
        _promise(weights is not None and bool(weights.isfinite().all()), "log_weight does not give finite weights")
    if posterior.log_evidence is not None:
        value, stderr = posterior.log_evidence
        _promise(bool(value.isfinite().all()), f"log_evidence is {value}")
        _promise(bool((stderr >= 0).all()), f"the standard error of log_evidence is {stderr}")


def _check_cost(posterior: Posterior, backend: Backend) -> None:
    """Time and some work, counted in whole numbers."""
    cost = posterior.cost
    _promise(math.isfinite(cost.seconds) and cost.seconds > 0, f"cost.seconds is {cost.seconds}")
    counts = {name: getattr(cost, name) for name in COUNTS}
    for name, count in counts.items():
        _promise(count >= 0 and count == int(count), f"cost.{name} is {count}")
    _promise(
        cost.denoiser_evals >= cost.denoiser_calls,
        f"cost counts {cost.denoiser_calls} denoiser calls of {cost.denoiser_evals} rows in all",
    )
    if "denoiser" in backend.needs:
        _promise(cost.denoiser_calls > 0, "the backend needs a denoiser and counted no call of one")
    elif backend.exact != "always":
        _promise(any(counts.values()), f"cost counts no work at all: {counts}")


def _check_interruption(
    backend: Backend, program: Program, draws: int, seed: int, folder: Path, whole: Posterior, rtol: float
) -> None:
    """Stopped half-way it returns what there is; called again it goes on to the same draws."""
    seen: list[Event] = []

    def watch(event: Event) -> None:
        seen.append(event)

    watched = infer(program, backend, draws, 2, seed, callback=watch, checkpoint=folder, checkpoint_every=0)
    _same(watched, whole, "a callback and checkpoints do not change the draws", rtol)
    _promise(not _files(folder), "the checkpoint of a finished run was left behind")
    half = len(seen) // 2
    if half == 0:
        return  # too quick to be stopped
    seen.clear()

    def stop(event: Event) -> bool:
        seen.append(event)
        return len(seen) == half

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = infer(program, backend, draws, 2, seed, callback=stop, checkpoint=folder, checkpoint_every=0)
    _promise(not part.complete, 'attrs["complete"] is true after the run was stopped')
    _promise(len(seen) == half, f"the run went on for {len(seen) - half} steps after it was stopped")
    resumed = infer(program, backend, draws, 2, seed, checkpoint=folder, checkpoint_every=0)
    _promise(resumed.complete, 'attrs["complete"] is false after a stopped run went on to its end')
    _same(resumed, whole, "a run that was stopped and goes on gives the same draws", rtol)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def _check_file(posterior: Posterior, path: Path) -> None:
    """Saved and loaded: the same draws, weights, evidence and facts."""
    posterior.save(path)
    loaded = Posterior.load(path)
    for kind in ("draws", "info", "parameters", "observed"):
        ours, theirs = getattr(posterior, kind), getattr(loaded, kind)
        _promise(ours.keys() == theirs.keys(), f"saved and loaded, {kind} holds {sorted(theirs)}, not {sorted(ours)}")
        for name, value in ours.items():
            same = torch.equal(value.detach().cpu().nan_to_num(), theirs[name].detach().cpu().nan_to_num())
            _promise(same and value.dtype == theirs[name].dtype, f"{kind}[{name!r}] does not survive a file")
    _promise((posterior.log_weight is None) == (loaded.log_weight is None), "log_weight does not survive a file")
    _promise(loaded.log_evidence == posterior.log_evidence, "log_evidence does not survive a file")
    _promise(loaded.complete and loaded.attrs["backend"] == posterior.attrs["backend"], "attrs do not survive a file")


def _same(found: Posterior, expected: Posterior, what: str, rtol: float) -> None:
    _promise(
        found.draws.keys() == expected.draws.keys(), f"{what}: sites {sorted(found.draws)}, {sorted(expected.draws)}"
    )
    for name, value in expected.draws.items():
        error = (found.draws[name].double() - value.double()).abs().max()
        scale = value.double().abs().max()
        _promise(
            bool(error <= rtol * scale), f"{what}: {name!r} differs by {float(error):.2e} at scale {float(scale):.2e}"
        )


def _fingerprint(program: Program) -> tuple[Any, ...]:
    """Sites, data, parameters and arguments."""
    parameters = tuple((n, v.detach().clone().double().sum().item()) for n, v in program.parameters.items())
    return program.fingerprint(), tuple(program.sites), parameters, program.problems, program.dtype, program.device


def _counters(program: Program) -> list[Any]:
    """Counters of denoiser calls on the priors of a program."""
    bases = [unwrap(site.distribution) for site in program.latents.values()]
    return [counter for base in bases for counter in getattr(base, "counters", [])]


def _globals() -> dict[str, Any]:
    """Global state that a run has to leave alone."""
    import numpy as np
    import pyro

    state = np.random.get_state()  # noqa: NPY002
    assert isinstance(state, tuple)
    return {
        "torch's random state": torch.get_rng_state(),
        "numpy's random state": torch.from_numpy(np.concatenate([state[1], [state[2]]]).astype(np.int64)),
        "python's random state": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the gradient mode": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
        "Pyro's parameter store": sorted(pyro.get_param_store().keys()),
        "the validation of distributions": torch.distributions.Distribution._validate_args,
        "TF32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
    }


def _check_globals(before: dict[str, Any]) -> None:
    for name, value in _globals().items():
        same = torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
        _promise(same, f"a run changed {name}")
