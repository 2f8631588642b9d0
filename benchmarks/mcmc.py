"""Least effective draws per second on reference models: ppl.NUTS, ppl.HMC, Pyro's NUTS and NumPyro's NUTS.

    make bench-mcmc                                        all models and engines, with NumPyro in its own environment
    python -m benchmarks.mcmc --models eight kidiq         some of them
    python -m benchmarks.mcmc --chains-cost                one thousand HMC chains against one

Every engine runs twice on a model: the first run counts tracing and compilation, the second, on what is compiled by
then, does not (NumPyro: the same sampler again; Pyro compiles nothing). Seconds are those of the processor, compilers
included, so that a shared machine does not blur them. The effective sample size is ArviZ's bulk ESS, the least over all
parameters. Rows go to runs/mcmc.jsonl, and a second call goes on where the first stopped. Without the reference data
the command says so and ends well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

import arviz
import numpy as np
import torch

from benchmarks.results import append, read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs" / "mcmc.jsonl"
MODELS = {
    "eight": "eight_schools-eight_schools_noncentered",
    "kidiq": "kidiq-kidscore_momiq",
    "ark": "arK-arK",
    "gp": "gp_pois_regr-gp_regr",
    "mixture": "low_dim_gauss_mix-low_dim_gauss_mix",
    "garch": "garch-garch11",
}
# Pyro's chains are short: it needs minutes for what the others do in seconds.
LENGTH = {
    "ppl.NUTS": (500, 500, 4),
    "ppl.HMC": (500, 250, 16),
    "Pyro NUTS": (150, 150, 1),
    "NumPyro NUTS": (500, 500, 4),
}


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


def pyros(program: Any, sites: list[str], seed: int) -> Callable[[], dict[str, Any]]:
    import pyro

    from ppl.trace import Run, set_values

    warmup, draws, chains = LENGTH["Pyro NUTS"]
    model = set_values(Run(), program.model)  # Pyro cannot draw from improper priors, with which it would start
    args, kwargs = program.arguments.call({})

    def run() -> dict[str, Any]:
        pyro.set_rng_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            kernel = pyro.infer.NUTS(model)
            mcmc = pyro.infer.MCMC(
                kernel, num_samples=draws, warmup_steps=warmup, num_chains=chains, disable_progbar=True
            )
            mcmc.run(*args, **kwargs)
            out = mcmc.get_samples(group_by_chain=True)
        finally:
            torch.set_default_dtype(before)
        return dict(out)

    return run


def numpyros(name: str, data: dict[str, Any], seed: int) -> Callable[[], dict[str, Any]]:
    import jax
    from numpyro.infer import MCMC, NUTS

    jax.config.update("jax_enable_x64", True)
    warmup, draws, chains = LENGTH["NumPyro NUTS"]
    kernel = NUTS(numpyro_model(name, data))
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="sequential",
        progress_bar=False,
    )

    def run() -> dict[str, Any]:
        mcmc.run(jax.random.PRNGKey(seed))
        return {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}

    return run


def numpyro_model(name: str, data: dict[str, Any]) -> Callable[[], None]:
    """The same models in NumPyro, written as its users would: a scan for the recursion."""
    import jax
    import jax.numpy as jnp
    import numpyro as n
    import numpyro.distributions as d

    def array(key: str) -> Any:
        return jnp.asarray(data[key], dtype=float)

    def eight() -> None:
        mu, tau = n.sample("mu", d.Normal(0, 5)), n.sample("tau", d.HalfCauchy(5))
        with n.plate("school", 8):
            shift = n.sample("shift", d.Normal(0, 1))
            n.sample("y", d.Normal(mu + tau * shift, array("sigma")), obs=array("y"))

    def kidiq() -> None:
        beta = n.sample("beta", d.ImproperUniform(d.constraints.real, (), (2,)))
        sigma = n.sample("sigma", d.HalfCauchy(2.5))
        mean = beta[0] + beta[1] * array("mom_iq")
        n.sample("score", d.Normal(mean, sigma), obs=array("kid_score"))

    def ark() -> None:
        order, y = data["K"], array("y")
        lags = jnp.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], axis=1)
        alpha = n.sample("alpha", d.Normal(0, 10))
        beta = n.sample("beta", d.Normal(0, 10).expand([order]).to_event(1))
        sigma = n.sample("sigma", d.HalfCauchy(2.5))
        n.sample("y", d.Normal(alpha + lags @ beta, sigma), obs=y[order:])

    def gp() -> None:
        x = array("x")
        rho, alpha = n.sample("rho", d.Gamma(25, 4)), n.sample("alpha", d.HalfNormal(2))
        sigma = n.sample("sigma", d.HalfNormal(1))
        kernel = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * jnp.eye(len(x))
        n.sample("y", d.MultivariateNormal(jnp.zeros(len(x)), kernel), obs=array("y"))

    def mixture() -> None:
        mu = n.sample("mu", d.ImproperUniform(d.constraints.ordered_vector, (), (2,)))
        n.factor("mu_prior", d.Normal(0, 2).log_prob(mu).sum())
        sigma = n.sample("sigma", d.HalfNormal(2).expand([2]).to_event(1))
        theta = n.sample("theta", d.Beta(5, 5))
        weights = d.Categorical(jnp.stack([theta, 1 - theta]))
        n.sample("y", d.MixtureSameFamily(weights, d.Normal(mu, sigma)), obs=array("y"))

    def garch() -> None:
        y, first = array("y"), float(data["sigma1"])
        mu = n.sample("mu", d.ImproperUniform(d.constraints.real, (), ()))
        alpha0 = n.sample("alpha0", d.ImproperUniform(d.constraints.positive, (), ()))
        alpha1 = n.sample("alpha1", d.Uniform(0, 1))
        beta1 = n.sample("beta1", d.Uniform(0, 1 - alpha1))
        n.factor("flat", jnp.log(1 - alpha1))  # both are flat in Stan's model

        def step(variance: Any, value: Any) -> Any:
            new = alpha0 + alpha1 * (value - mu) ** 2 + beta1 * variance
            return new, new

        _, rest = jax.lax.scan(step, jnp.asarray(first**2) + 0 * mu, y[:-1])
        variance = jnp.concatenate([jnp.asarray([first**2]), rest])
        n.sample("y", d.Normal(mu, jnp.sqrt(variance)), obs=y)

    return {"eight": eight, "kidiq": kidiq, "ark": ark, "gp": gp, "mixture": mixture, "garch": garch}[name]


def processor() -> float:
    """Seconds of processor time so far, with those of compilers that have ended."""
    return sum(u.ru_utime + u.ru_stime for u in (getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)))


def measure(name: str, engine: str, where: Path, seed: int) -> dict[str, Any]:
    """One row: processor seconds of both runs, the least ESS and its rates."""
    data = json.loads((where / f"{MODELS[name]}.data.json").read_text())
    tests = read_tests()
    seconds, clock, sizes = [], [], []
    start, began = processor(), time.perf_counter()
    program, sites = tests.build(where, MODELS[name])
    if engine == "NumPyro NUTS":
        run = numpyros(name, data, seed)
    elif engine == "Pyro NUTS":
        run = pyros(program, sites, seed)
    else:
        run = ours(engine, program, sites, seed)
    for _ in range(1 if engine == "Pyro NUTS" else 2):
        draws = run()
        seconds.append(processor() - start)
        clock.append(time.perf_counter() - began)
        sizes.append(least_ess(draws))
        start, began = processor(), time.perf_counter()
    return {
        "model": name,
        "engine": engine,
        "seconds": seconds,
        "clock": clock,
        "least_ess": sizes,
        "ess_per_s_cold": sizes[0] / seconds[0],
        "ess_per_s_warm": sizes[-1] / seconds[-1],
    }


def chains_cost(rounds: int = 40, many: int = 1000, leapfrogs: int = 20) -> dict[str, Any]:
    """Processor milliseconds of one HMC transition of fixed length on eight schools, for one chain and for many."""
    from benchmarks.density import EFFECT, SIGMA, eight_schools
    from ppl.mcmc.hmc import HMC, _Walk
    from ppl.monitor import Monitor
    from ppl.program import Program

    program = Program(eight_schools, EFFECT, SIGMA, compile="inductor")
    walks, times, kinds = {}, {1: [], many: []}, {}
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
    return {"kind": kinds[many], "ms_one": one, "ms_many": all_, "chains": many, "ratio": ratio, "rounds": rounds}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--engines", nargs="+", default=list(LENGTH), choices=list(LENGTH))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains-cost", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.chains_cost:
        row = chains_cost()
        append(RESULTS, {"settings": "chains-cost", **row})
        print(json.dumps(row))
        return
    where = folder()
    if where is None:
        print("the reference posteriors (shared/data/posteriordb) are not on this machine: nothing to run")
        return
    engines = list(options.engines)
    if "NumPyro NUTS" in engines and importlib.util.find_spec("numpyro") is None:
        print("NumPyro is not installed here and is left out; `make bench-mcmc` has an environment with it")
        engines.remove("NumPyro NUTS")
    settings = json.dumps({"seed": options.seed, "length": LENGTH, "time": "processor"})
    rows = read(RESULTS, settings)
    for name in options.models:
        for engine in engines:
            if any(r["model"] == name and r["engine"] == engine for r in rows):
                continue
            row = {"settings": settings, **measure(name, engine, where, options.seed)}
            append(RESULTS, row)
            rows.append(row)
            show([row])
    print()
    show([r for r in rows if r["model"] in options.models and r["engine"] in options.engines])


if __name__ == "__main__":
    main()
