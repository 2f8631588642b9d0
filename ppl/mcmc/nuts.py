"""The No-U-Turn sampler: nutpie's implementation on the traced density of a program.

    H(z, p) = -log pi(z) + p' M^{-1} p / 2,   trajectories doubled until they turn back

One draw at a time with gradients of one lane. Where the calls to come repay it the density becomes a C function, which
nutpie calls without Python in between; otherwise, and where that fails, it is the graph. Chains run one after the
other, or `cores` at a time, each with its own seed: a killed run keeps its finished chains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ppl.backend import Exactness, register
from ppl.errors import OptionError, ProgramError
from ppl.mcmc.starts import StartingPoints, check_init
from ppl.mcmc.target import fixed_density, posterior_of
from ppl.option_checks import check_integers

if TYPE_CHECKING:
    import numpy as np

    from ppl.flat import FlatDensity
    from ppl.monitor import Monitor
    from ppl.native import NativeDensity, NativeState
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["NUTS"]

POLL = 0.01  # seconds between looks at the running chains, once they have been running for a while
FIRST_POLL = 2e-4
GRADIENTS_PER_DRAW = 16  # typical; decides whether compiling pays

# nutpie's statistics under ArviZ's names.
STATISTICS = {
    "diverging": "diverging",
    "logp": "lp",
    "energy": "energy",
    "mean_tree_accept": "acceptance_rate",
    "depth": "tree_depth",
    "n_steps": "n_steps",
    "step_size": "step_size",
}


class _BadPoint(ArithmeticError):
    """The density has no value here; nutpie counts a divergence."""

    is_recoverable = True


@dataclass
class _Counts:
    """What a chain has done so far."""

    gradients: int = 0
    stored: int = 0


@register
@dataclass(frozen=True)
class NUTS:
    """The No-U-Turn sampler with adapted step size and mass matrix, on unconstrained space; discrete sites summed out.

    The density runs as a C function where the run is long enough to repay the compiler and `Program(compile=...)` is
    `"auto"`; `posterior.attrs["density"]` says what ran, a note why it was not C.

    Args:
        warmup: adaptation draws per chain, thrown away.
        target_accept: acceptance the step size is adapted to; nearer one for fewer divergences.
        max_depth: doublings of a trajectory at most.
        low_rank: learn a low-rank correction to the diagonal mass matrix, for strong correlations.
        cores: chains that run at the same time, in threads; results do not depend on it.
        radius: chains start uniformly in [-radius, radius] on unconstrained space (noise sites: from their prior).
        init: where chains start instead: a fitted guide, or a backend that fits one, such as `ppl.Pathfinder()`. Chains
            that start close together see less of what they disagree about.

    Raises:
        OptionError: an option is out of range.

    Source: Hoffman & Gelman (2014) [inferred]; nutpie 0.16 [read].

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppl import Program, infer
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = infer(Program(model, torch.tensor(2.0)), NUTS(warmup=200), draws=500, chains=2)
        >>> bool((posterior.mean("mu") - 1.0).abs() < 0.2)
        True
    """

    warmup: int = 1000
    target_accept: float = 0.8
    max_depth: int = 10
    low_rank: bool = False
    cores: int = 1
    radius: float = 2.0
    init: Any = None

    exact: ClassVar[Exactness] = "in_the_limit"
    limit: ClassVar[tuple[str, ...]] = ("draws",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 4
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, warmup=10, max_depth=1, cores=1)
        if not 0 < self.target_accept < 1:
            raise OptionError(f"target_accept must lie between 0 and 1, got {self.target_accept!r}")
        if not self.radius >= 0:
            raise OptionError(f"radius must be zero or more, got {self.radius!r}")
        check_init(self.init)

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Run the chains; see `ppl.infer`."""
        from ppl.native import nutpie_takes

        flat = fixed_density(program, "NUTS", monitor)
        begin = StartingPoints(flat, self.init, self.radius, monitor, generator)
        seeds = torch.randint(2**31 - 1, (chains,), generator=generator, device=generator.device).tolist()
        done: dict[int, dict[str, Tensor]] = {}
        for i in range(chains):
            stored = monitor.finished(f"chain {i}")
            if stored is not None:
                done[i] = stored
        waiting = [i for i in range(chains) if i not in done]
        cores = self.cores
        partial: list[dict[str, Tensor]] = []
        facts = {}
        if waiting:
            starts = {i: begin(1, _generator(program, seeds[i])) for i in waiting}
            each = GRADIENTS_PER_DRAW * (self.warmup + draws)
            native = flat.native(starts[waiting[0]], each * chains)  # a resumed run must take the path of the first
            if native is not None and not nutpie_takes(native):
                monitor.note("the density is not run in C: the nutpie installed here takes C functions in another form")
                native = None
            kind = "native" if native is not None else flat.prepare(starts[waiting[0]], each * len(waiting))
            facts["density"] = kind
            if cores > 1 and kind not in ("native", "graph", "inductor"):
                monitor.note(f"cores={cores} ignored: the model runs as Python code ({kind}), one chain at a time")
                cores = 1
            for first in range(0, len(waiting), cores):
                group = waiting[first : first + cores]
                results = self._group(flat, native, group, seeds, starts, draws, monitor)
                for i, result in zip(group, results, strict=True):
                    if len(result["z"]) == draws:
                        done[i] = result
                        monitor.finish(f"chain {i}", result)
                    else:
                        partial.append(result)
                if monitor.interrupted:
                    break
        kept = _keep(done, partial)
        length = min(len(c["z"]) for c in kept)
        columns = {n: torch.stack([c[n][:length] for c in kept], dim=1) for n in kept[0]}
        z = columns.pop("z").to(device=program.device, dtype=program.dtype)
        complete = len(kept) == chains and length == draws
        info = {n: v.to(program.device) for n, v in columns.items()}
        return posterior_of(program, flat, z, info, monitor, complete=complete, **facts)

    def _group(
        self,
        flat: FlatDensity,
        native: NativeDensity | None,
        group: list[int],
        seeds: list[int],
        starts: dict[int, Tensor],
        draws: int,
        monitor: Monitor,
    ) -> list[dict[str, Tensor]]:
        """Run some chains at the same time, each in a sampler of its own."""
        running = [_Chain(self, flat, native, seeds[i], starts[i], draws) for i in group]
        label = f"chain {group[0]}" if len(group) == 1 else f"chains {group[0]}-{group[-1]}"
        counted = 0
        seen = 0
        pause = FIRST_POLL
        try:
            for step in monitor.steps(self.warmup + draws, label):
                while min(c.stored for c in running) <= step and not monitor.interrupted:
                    time.sleep(pause)
                    pause = min(1.5 * pause, POLL)
                    for chain in running:
                        chain.check()
                    if all(c.finished for c in running):
                        break
                seen = step + 1
                total = sum(c.gradients for c in running)
                monitor.cost.add(gradient_evals=total - counted)
                counted = total
            while not monitor.interrupted and not all(c.finished for c in running):
                for chain in running:
                    chain.check()
            return [c.result(max(seen - self.warmup, 0) if monitor.interrupted else draws) for c in running]
        finally:
            for chain in running:
                chain.abort()
            monitor.cost.add(gradient_evals=sum(c.gradients for c in running) - counted)


class _Chain:
    """One chain in nutpie's background thread, watched from here."""

    def __init__(
        self, options: NUTS, flat: FlatDensity, native: NativeDensity | None, seed: int, start: Tensor, draws: int
    ) -> None:
        import nutpie

        from ppl.native import nutpie_model

        self.dim = flat.dim
        self.failure: BaseException | None = None
        self.finished = False
        self._results: Any = None
        begin = start[0].detach().double().cpu().numpy()
        if native is None:
            self._counts: _Counts | NativeState = _Counts()
            model = self._python_model(flat, begin, self._counts)
        else:
            self._counts = native.state()
            model = nutpie_model(self._counts, begin)
        self._background = nutpie.sample(  # aborts when it is garbage collected, so it is kept
            model,
            draws=draws,
            tune=options.warmup,
            chains=1,
            cores=1,
            seed=seed,
            progress_bar=False,
            blocking=False,
            return_raw_trace=True,
            low_rank_modified_mass_matrix=options.low_rank,
            target_accept=options.target_accept,
            maxdepth=options.max_depth,
        )
        self._sampler = self._background._sampler

    @property
    def gradients(self) -> int:
        """Gradients so far."""
        return self._counts.gradients

    @property
    def stored(self) -> int:
        """Draws so far, those of the warmup included."""
        return self._counts.stored

    def _python_model(self, flat: FlatDensity, begin: np.ndarray, counts: _Counts) -> Any:
        """The density as a Python function, for nutpie."""
        import numpy as np
        from nutpie.compiled_pyfunc import from_pyfunc

        evaluate = flat.one_lane()

        def log_density(x: np.ndarray) -> tuple[float, np.ndarray]:
            if self.failure is not None:
                raise _BadPoint  # a plain exception here would be a panic of the sampler
            counts.gradients += 1
            try:
                value, gradient = evaluate(x)
            except torch.linalg.LinAlgError:
                raise _BadPoint from None
            except BaseException as error:
                self.failure = error
                raise _BadPoint from None
            if not np.isfinite(value) or not np.isfinite(gradient).all():
                raise _BadPoint
            return value, gradient

        def expand(x: np.ndarray) -> dict[str, np.ndarray]:
            counts.stored += 1
            return {"z": np.array(x, dtype=np.float64)}

        def make_log_density() -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
            return log_density

        def make_expand(seed1: int, seed2: int, chain: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
            return expand

        def initial(seed: int) -> np.ndarray:
            return begin.copy()

        return from_pyfunc(
            flat.dim,
            make_log_density,
            make_expand,
            [np.dtype("float64")],
            [(flat.dim,)],
            ["z"],
            make_initial_point_fn=initial,
        )

    def check(self) -> None:
        """Raise what went wrong in the chain; see whether it is finished."""
        if self.failure is not None:
            failure = self.failure
            self.abort()
            raise failure
        if self.finished:
            return
        try:
            self._sampler.wait(1e-3)
        except TimeoutError:
            return
        except BaseException as error:  # the sampler's own panic is no Exception
            self.abort()
            if self.failure is not None:
                raise self.failure from None
            if isinstance(error, KeyboardInterrupt):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ProgramError(
                f"NUTS could not start or go on: {reason}; the density or its gradient is not finite around the "
                "starting point; check the priors and the data, or start nearer to zero with a smaller radius"
            ) from None
        self.finished = True

    def abort(self) -> None:
        """Stop the background thread; harmless when it has ended."""
        if self._results is None:
            with suppress(Exception):
                if not self.finished:
                    self._sampler.abort()
                self._results = self._sampler.take_results()

    def result(self, draws: int) -> dict[str, Tensor]:
        """Unconstrained draws (draw, dim) and statistics (draw,) after warmup, at most `draws` of them."""
        import numpy as np
        import pyarrow

        self.abort()
        if self.failure is not None:
            raise self.failure
        batches, statistics = self._results.get_arrow_trace()
        tuning = pyarrow.array(statistics[0].column("tuning")).to_numpy(zero_copy_only=False)
        after = np.flatnonzero(~tuning)[:draws]
        flat = pyarrow.array(batches[0].column("z")).flatten().to_numpy(zero_copy_only=False)
        out = {"z": torch.from_numpy(flat.reshape(len(tuning), self.dim)[after].copy())}
        for theirs, ours in STATISTICS.items():
            column = pyarrow.array(statistics[0].column(theirs)).to_numpy(zero_copy_only=False)[after]
            column = column.astype(
                bool if theirs == "diverging" else np.int64 if "depth n_steps".count(theirs) else float
            )
            out[ours] = torch.from_numpy(column)
        return out


def _generator(program: Program, seed: int) -> torch.Generator:
    return torch.Generator(program.device).manual_seed(seed)


def _keep(done: dict[int, dict[str, Tensor]], partial: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """After an interruption: the finished chains, or all chains cut to the shortest, whichever holds more draws."""
    finished = [done[i] for i in sorted(done)]
    everything = finished + partial
    if finished and len(everything) * min(len(c["z"]) for c in everything) <= sum(len(c["z"]) for c in finished):
        return finished
    return everything
