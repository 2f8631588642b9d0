"""Least effective draws per second on reference models: ppl.NUTS, ppl.HMC, Pyro's NUTS and NumPyro's NUTS.

    make bench-mcmc                                        all models and engines, with NumPyro in its own environment
    python -m benchmarks.mcmc --models eight kidiq         some of them
    python -m benchmarks.mcmc --chains-cost                one thousand HMC chains against one
    python -m benchmarks.mcmc --steps                      tracing and density of loops of 100 to 800 steps
    python -m benchmarks.mcmc --show                       the table of what was measured

Every engine runs twice on a model, one engine after the other before the next model: the first run counts tracing and
compilation (in an empty cache, libraries imported before), the second, on a compiled density, does not. ppl
compiles in its first run where that pays, and is made to before the second. NumPyro's sampler is one compiled function
of a key: `MCMC.run` by itself would compile anew for each chain and in each call. Pyro compiles nothing and runs once,
as long as PYRO_SECONDS lets it: the time of one gradient says how many warmup draws take half of that, 50 to 200 of
them, and draws then go on for as long as the warmup took. Seconds are those of the processor, compilers included, so
that a shared machine does not blur them. The effective sample size is ArviZ's bulk ESS, the least over all parameters;
a run with fewer than four draws counts as that many.
Rows go to runs/mcmc.jsonl, and a second call goes on where the first stopped. Without the reference data the command
says so and ends well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

import arviz
import numpy as np
import torch

from benchmarks.numpyro_models import numpyro_model
from benchmarks.results import append, read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs" / "mcmc.jsonl"
MODELS = {
    "eight": "eight_schools-eight_schools_noncentered",
    "kidiq": "kidiq-kidscore_momiq",
    "ark": "arK-arK",
    "gp": "gp_pois_regr-gp_regr",
    "mixture": "low_dim_gauss_mix-low_dim_gauss_mix",
    "diamonds": "diamonds-diamonds",
    "logistic": "",  # made here: 1000 cases, 25 slopes
    "garch": "garch-garch11",
    "hmm": "hmm_example-hmm_example",
}
RECURSIONS = ("garch", "hmm")
# Warmup draws, draws, chains.
LENGTH = {
    "ppl.NUTS": (200, 200, 2),
    "NumPyro NUTS": (200, 200, 2),
    "Pyro NUTS": (200, 200, 1),
    "ppl.HMC": (200, 100, 16),
}
PYRO_SECONDS = 8.0
GRADIENTS_PER_DRAW = 15


def folder() -> Path | None:
    """The reference posteriors, inside the repository or beside it."""
    places = [root / "shared" / "data" / "posteriordb" for root in (ROOT, ROOT.parent)]
    return next((p for p in places if p.is_dir()), None)


def read_tests() -> Any:
    """The reference models as programs, from where they are tested."""
    path = ROOT / "tests" / "ppl" / "test_posteriordb.py"
    spec = importlib.util.spec_from_file_location("reference_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def least_ess(draws: dict[str, Any]) -> float:
    """The least bulk ESS over all numbers of all sites, (chain, draw, ...) each."""
    found = []
    for value in draws.values():
        x = np.asarray(value, dtype=float)
        x = x.reshape(*x.shape[:2], -1)
        found += [float(arviz.ess(x[..., i], method="bulk")) for i in range(x.shape[-1]) if x[..., i].std() > 0]
    return min(found)


def ours(engine: str, program: Any, sites: list[str], seed: int) -> Callable[[], dict[str, Any]]:
    import ppl

    warmup, draws, chains = LENGTH[engine]
    backend = ppl.NUTS(warmup=warmup) if engine == "ppl.NUTS" else ppl.HMC(warmup=warmup)

    def run() -> dict[str, Any]:
        posterior = ppl.infer(program, backend, draws=draws, chains=chains, seed=seed)
        return {n: posterior[n] for n in sites}

    return run


def pyros(name: str, data: dict[str, Any], program: Any, sites: list[str], seed: int) -> Callable[[], dict[str, Any]]:
    """Pyro's NUTS with as many draws as the time allows."""
    import pyro
    from pyro.ops.integrator import potential_grad

    from ppl.trace import Run, set_values

    model = pyro_garch(data) if name == "garch" else program.model
    model = set_values(Run(), model)  # Pyro cannot draw from improper priors, with which it would start
    args, kwargs = program.arguments.call({})

    def constrained(kernel: Any, states: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        if not states:
            return {}
        stacked = {n: torch.stack([state[n] for state in states]) for n in states[0]}
        stacked = {n: kernel.transforms[n].inv(v) if n in kernel.transforms else v for n, v in stacked.items()}
        return {n: v[None].detach().numpy() for n, v in stacked.items()}

    def run() -> dict[str, Any]:
        pyro.set_rng_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        most_warmup, most, _ = LENGTH["Pyro NUTS"]
        try:
            pyro.clear_param_store()
            kernel = pyro.infer.NUTS(model)
            kernel.setup(most_warmup, *args, **kwargs)
            z = kernel.initial_params
            start = processor()
            for _ in range(3):
                potential_grad(kernel.potential_fn, z)
            one = (processor() - start) / 3
            warmup = min(max(int(PYRO_SECONDS / 2 / (GRADIENTS_PER_DRAW * one)), 50), most_warmup)
            kernel = pyro.infer.NUTS(model)
            kernel.setup(warmup, *args, **kwargs)
            z, start, states, warmed = kernel.initial_params, processor(), [], math.inf
            for i in range(warmup + most):
                passed = processor() - start
                if passed > min(2 * warmed, 3 * PYRO_SECONDS):
                    break
                z = kernel.sample(z)
                if i >= warmup:
                    states.append(z)
                elif i == warmup - 1:
                    warmed = max(processor() - start, PYRO_SECONDS / 2)
            kernel.cleanup()
        finally:
            torch.set_default_dtype(before)
        return constrained(kernel, states)

    return run


def pyro_garch(data: dict[str, Any]) -> Callable[[torch.Tensor], None]:
    """The same model without a support that depends on another site, which Pyro's NUTS reads once and keeps."""
    import pyro
    import pyro.distributions as dist
    from pyro.distributions import constraints

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
        alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))
        pyro.factor("flat", torch.log(1 - alpha1))
        variance = [torch.full_like(mu, float(data["sigma1"]) ** 2)]
        for value in y[:-1]:
            variance.append(alpha0 + alpha1 * (value - mu) ** 2 + share * (1 - alpha1) * variance[-1])
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(mu, torch.stack(variance).sqrt()), obs=y)

    return model


def numpyros(name: str, data: dict[str, Any], seed: int) -> Callable[[], dict[str, Any]]:
    import jax
    from numpyro.infer import MCMC, NUTS

    jax.config.update("jax_enable_x64", True)
    warmup, draws, chains = LENGTH["NumPyro NUTS"]
    kernel = NUTS(numpyro_model(name, data))
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=1, progress_bar=False)

    @jax.jit
    def chain(key: Any) -> dict[str, Any]:
        mcmc.run(key)
        return mcmc.get_samples()

    def run() -> dict[str, Any]:
        each = [chain(key) for key in jax.random.split(jax.random.PRNGKey(seed), chains)]
        return {n: np.stack([np.asarray(one[n]) for one in each]) for n in each[0]}

    return run


def logistic_data() -> dict[str, Any]:
    """1000 cases with 25 standard normal covariates and slopes of N(0, 1/4)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 25, generator=generator, dtype=torch.float64)
    slopes = 0.5 * torch.randn(25, generator=generator, dtype=torch.float64)
    u = torch.rand(1000, generator=generator, dtype=torch.float64)
    return {"x": x.tolist(), "y": (u < torch.sigmoid(x @ slopes)).double().tolist()}


def logistic_program(data: dict[str, Any], **options: Any) -> tuple[Any, list[str]]:
    import pyro
    import pyro.distributions as dist

    from ppl.program import Program

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        with pyro.plate("case", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=intercept + x @ b), obs=y)

    x, y = (torch.tensor(data[k], dtype=torch.float64) for k in ("x", "y"))
    return Program(model, x, y, **options), ["intercept", "b"]


def processor() -> float:
    """Seconds of processor time so far, with those of compilers that have ended."""
    return sum(u.ru_utime + u.ru_stime for u in (getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)))


def measure(name: str, engine: str, where: Path, seed: int) -> dict[str, Any]:
    """One row: processor seconds of both runs, the least ESS and its rates."""
    data = logistic_data() if name == "logistic" else json.loads((where / f"{MODELS[name]}.data.json").read_text())
    tests = read_tests()
    seconds, clock, sizes, kinds, count = [], [], [], [], 0
    start, began = processor(), time.perf_counter()
    program, sites = logistic_program(data) if name == "logistic" else tests.MODELS[MODELS[name]](data)
    if engine == "NumPyro NUTS":
        run = numpyros(name, data, seed)
    elif engine == "Pyro NUTS":
        run = pyros(name, data, program, sites, seed)
    else:
        run = ours(engine, program, sites, seed)
    for again in (False,) if engine == "Pyro NUTS" else (False, True):
        if again and engine in ("ppl.NUTS", "ppl.HMC"):
            compile_density(program, seed, 1 if engine == "ppl.NUTS" else LENGTH[engine][2])
            start, began = processor(), time.perf_counter()
        draws = run()
        seconds.append(processor() - start)
        clock.append(time.perf_counter() - began)
        count = len(next(iter(draws.values()))[0]) if draws else 0
        runners = [r for f in program._functions.values() for r in f._runners.values()]
        native = any(r.graph is not None and r.graph.meta.get("native", (None,))[0] is not None for r in runners)
        kinds.append(sorted({r.kind for r in runners} | ({"native"} if native else set())))
        sizes.append(least_ess(draws) if count >= 4 else float(count))
        start, began = processor(), time.perf_counter()
    return {
        "model": name,
        "engine": engine,
        "draws": count,
        "seconds": seconds,
        "clock": clock,
        "kinds": kinds,
        "least_ess": sizes,
        "ess_per_s_cold": sizes[0] / seconds[0],
        "ess_per_s_warm": sizes[-1] / seconds[-1],
        "notes": program.notes,
    }


def compile_density(program: Any, seed: int, lanes: int) -> None:
    """Compile the gradient of so many draws at once, where the calls of a first run did not repay that."""
    flat = program.flat()
    start = flat.initial(lanes, torch.Generator().manual_seed(seed))
    if lanes == 1 and flat.native(start, 10**9) is not None:
        return
    for function in program._functions.values():
        function.compile = "inductor"
    flat.prepare(start, 1)


def chains_cost(name: str, rounds: int = 40, many: int = 1000, leapfrogs: int = 20) -> dict[str, Any]:
    """Processor milliseconds of one HMC transition of fixed length, for one chain and for many."""
    from benchmarks.density import EFFECT, SIGMA, eight_schools
    from ppl.mcmc.hmc import HMC, _Walk
    from ppl.monitor import Monitor
    from ppl.program import Program

    program = Program(eight_schools, EFFECT, SIGMA, compile="inductor")
    if name == "logistic":
        program, _ = logistic_program(logistic_data(), compile="inductor")
    walks, kinds = {}, {}
    times: dict[int, list[float]] = {1: [], many: []}
    for lanes in (1, many):
        generator = torch.Generator().manual_seed(0)
        walk = _Walk(HMC(warmup=20, length=1.0), program.flat(), 1, lanes, 1, generator, Monitor(generator=generator))
        walk.z = walk.flat.initial(lanes, generator)
        kinds[lanes] = walk.flat.prepare(walk.z, 10**6)
        walk.lp, walk.grad = walk.flat.log_density_and_grad(walk.z)
        walks[lanes] = walk
    size, steps = torch.full((1,), 0.05, dtype=torch.float64), torch.tensor([leapfrogs])
    for walk in walks.values():
        walk._trajectory(walk._momentum(), size, steps)  # warm
    for _ in range(rounds):
        for lanes, walk in walks.items():
            start = time.process_time()  # one thread; on a shared machine the clock would count the others
            walk._trajectory(walk._momentum(), size, steps)
            times[lanes].append(1e3 * (time.process_time() - start))
    ratio = statistics.median(b / a for a, b in zip(times[1], times[many], strict=True))
    one, all_ = (statistics.median(times[n]) for n in (1, many))
    return {
        "model": name,
        "kind": kinds[many],
        "ms_one": one,
        "ms_many": all_,
        "chains": many,
        "ratio": ratio,
        "rounds": rounds,
    }


def volatility(y: torch.Tensor) -> None:
    """Stochastic volatility with two sites for each step."""
    import pyro
    import pyro.distributions as dist

    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    h = mu
    for t, value in enumerate(y):
        h = pyro.sample(f"h_{t}", dist.Normal(mu + phi * (h - mu), scale))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=value)


def recursion(y: torch.Tensor) -> None:
    """A GARCH recursion inside one density."""
    import pyro
    import pyro.distributions as dist

    base = pyro.sample("base", dist.LogNormal(0.0, 1.0))
    shock = pyro.sample("shock", dist.Beta(2.0, 5.0))
    keep = pyro.sample("keep", dist.Beta(5.0, 2.0))
    variance = [torch.ones_like(base)]
    for value in y[:-1]:
        variance.append(base + shock * value**2 + keep * variance[-1])
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(0.0, torch.stack(variance).sqrt()), obs=y)


def steps_cost(sizes: tuple[int, ...] = (100, 200, 400, 800)) -> list[dict[str, Any]]:
    """Processor seconds of construction and tracing, and milliseconds of density and gradient, by number of steps."""
    from ppl.program import Program

    rows = []
    for model in (volatility, recursion):
        for steps in (20, *sizes):  # the first warms up
            y = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            start = time.process_time()
            program = Program(model, y, compile="never")
            flat = program.flat()
            z = torch.zeros(1, flat.dim, dtype=torch.float64)
            flat.log_density_and_grad(z)
            traced = time.process_time()
            flat.prepare(z, 10**6)
            captured = time.process_time()
            times = []
            for _ in range(30):
                begin = time.process_time()
                flat.log_density_and_grad(z)
                times.append(1e3 * (time.process_time() - begin))
            (function,) = program._functions.values()
            rows.append(
                {
                    "model": model.__name__,
                    "steps": steps,
                    "trace_s": traced - start,
                    "capture_s": captured - traced,
                    "gradient_ms": statistics.median(times),
                    "nodes": function.nodes,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return [row for row in rows if row["steps"] in sizes]


def show(rows: list[dict[str, Any]]) -> None:
    """A table with one line per model and engine."""
    heads = ("least ESS", "cold s", "warm s", "ESS/s cold", "ESS/s warm")
    print(f"{'model':9s}{'engine':14s}" + "".join(f"{h:>{w}s}" for h, w in zip(heads, (10, 9, 9, 12, 12), strict=True)))
    for row in rows:
        cold, warm = row["seconds"][0], row["seconds"][-1]
        print(
            f"{row['model']:9s}{row['engine']:14s}{row['least_ess'][-1]:10.0f}{cold:9.1f}{warm:9.1f}"
            f"{row['ess_per_s_cold']:12.1f}{row['ess_per_s_warm']:12.1f}"
        )


def ratios(rows: list[dict[str, Any]]) -> None:
    """Our better engine, and ppl.NUTS alone, over the others on the same model."""
    print(f"{'model':9s}{'to':8s}{'NUTS cold':>10s}{'NUTS warm':>10s}{'best cold':>10s}{'best warm':>10s}")
    found: dict[str, list[list[float]]] = {"Pyro": [], "NumPyro": []}
    for name in MODELS:
        by = {r["engine"]: r for r in rows if r["model"] == name}
        for other, all_ in found.items():
            theirs = by.get(f"{other} NUTS")
            if theirs is None or "ppl.NUTS" not in by:
                continue
            line = [
                max(by[e][key] for e in engines if e in by) / theirs[key] if theirs[key] else math.inf
                for engines in (("ppl.NUTS",), ("ppl.NUTS", "ppl.HMC"))
                for key in ("ess_per_s_cold", "ess_per_s_warm")
            ]
            all_.append(line)
            print(f"{name:9s}{other:8s}" + "".join(f"{x:10.2f}" for x in line))
    for other, all_ in found.items():
        if all_:
            print(
                f"{'median':9s}{other:8s}" + "".join(f"{statistics.median(c):10.2f}" for c in zip(*all_, strict=True))
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--engines", nargs="+", default=list(LENGTH), choices=list(LENGTH))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains-cost", action="store_true")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    warnings.simplefilter("ignore")
    if options.chains_cost:
        for name in ("eight", "logistic"):
            row = chains_cost(name)
            append(RESULTS, {"settings": "chains-cost", **row})
            print(json.dumps(row))
        return
    if options.steps:
        for row in steps_cost():
            append(RESULTS, {"settings": "steps", **row})
        return
    where = folder()
    if where is None:
        print("the reference posteriors (shared/data/posteriordb) are not on this machine: nothing to run")
        return
    facts = {"seed": options.seed, "length": LENGTH, "pyro": PYRO_SECONDS, "time": "processor", "nuts": "C"}
    settings = json.dumps(facts)
    rows = read(RESULTS, settings)
    if not options.show:
        engines = list(options.engines)
        if "NumPyro NUTS" in engines and importlib.util.find_spec("numpyro") is None:
            print("NumPyro is not installed here and is left out; `make bench-mcmc` has an environment with it")
            engines.remove("NumPyro NUTS")
        for library in ("nutpie", "pyarrow", "torch._inductor.compile_fx", "jax", "numpyro.infer"):
            if importlib.util.find_spec(library.split(".")[0]) is not None:
                importlib.import_module(library)
        for name in options.models:
            for engine in engines:
                if any(r["model"] == name and r["engine"] == engine for r in rows):
                    continue
                with tempfile.TemporaryDirectory() as cache:  # each engine's own, or the second would find the first's
                    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                    row = {"settings": settings, **measure(name, engine, where, options.seed)}
                append(RESULTS, row)
                rows.append(row)
                show([row])
        print()
    rows = [r for r in rows if r["model"] in options.models and r["engine"] in options.engines]
    show(rows)
    ratios(rows)


if __name__ == "__main__":
    main()
