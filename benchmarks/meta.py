"""Few-shot learners on the same tasks, with the same network and the same number of training episodes.

    make bench-meta                                     everything
    python -m benchmarks.meta --quick                   a few minutes on one thread
    python -m benchmarks.meta --parts sinusoid --steps 3000

Regression: sinusoids (noise 0.1) and Line-Sine (noise 0.25), a network 1-32-32-1, 256 test tasks of 40 queries, of 5
and of 10 shots. One fit serves both: training batches have 5 or 10 shots, of 20 points in all. Every learner sees the
same batches. Printed: squared error against noisy targets, mean log-likelihood of a query, PIT error (mean distance of
the distribution function at the targets from uniform), with 95 % intervals over the tasks, and seconds per episode of
training and of adaptation with prediction. NIW-Meta and ABML are told the noise; CNP and the ridge head learn theirs;
MAML and Reptile, which have no predictive law, get the constant noise that fits 256 further training episodes best;
"widened" adds such a constant to the laws of NIW-Meta and ABML.

Classes: 5-way digits, trained on 0-4 and tested on 5-9 of the held-out images, 1 and 5 shots, 600 episodes of 5 queries
a class; accuracy, expected calibration error and log-likelihood. Rows go to runs/meta.jsonl.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.results import append
from models.meta import (
    MAML,
    Categorical,
    ClosedForm,
    Episodes,
    EpisodeSource,
    FewShot,
    FittedMAML,
    FittedMeta,
    Gaussian,
    GaussNewton,
    Hierarchy,
    LineSine,
    Network,
    NIWMeta,
    NormalInverseGamma,
    Sinusoids,
    Variational,
    adapt,
    few_shot_digits,
    mlp,
)
from models.meta.abml import ABML
from models.meta.conditional_neural_process import ConditionalNeuralProcess
from models.meta.predictive import Predictive, expected_calibration_error, pit_error
from models.meta.prototypical import Prototypical
from models.meta.reptile import FittedReptile, Reptile
from models.meta.ridge_head import RidgeHead
from ppl.errors import NotFiniteError

RESULTS = Path(__file__).parents[1] / "runs" / "meta.jsonl"
NOISE = {"sinusoid": 0.1, "line-sine": 0.25}
Predict = Callable[[Episodes], Predictive]


@dataclass(frozen=True)
class Budget:
    """Training of every learner."""

    steps: int
    batch: int
    tests: int
    draws: int


def tasks(part: str, shots: int, queries: int) -> EpisodeSource:
    """A source of regression episodes."""
    return (Sinusoids if part == "sinusoid" else LineSine)(shots, queries, NOISE[part])


def either(sources: Sequence[EpisodeSource]) -> EpisodeSource:
    """Each batch from one of the sources at random."""

    def source(episodes: int, generator: torch.Generator) -> Episodes:
        return sources[int(torch.randint(len(sources), (), generator=generator))](episodes, generator)

    return source


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


# Learners: each is fitted, and comes back as one or more ways to predict.


def constant_noise(fitted: FittedMAML | FittedReptile, source: EpisodeSource) -> Predict:
    """Predictions with the noise that fits fresh training episodes best."""

    def mean(episodes: Episodes) -> Tensor:
        found = fitted.predict(episodes)
        return found[..., 0] if isinstance(found, Tensor) else found.mean

    fresh = source(256, seeded(77))
    sigma = float((mean(fresh) - fresh.query.y).square().mean().sqrt())
    return lambda episodes: Predictive(Gaussian(sigma).law(mean(episodes)[None, ..., None]))


def widened(predict: Predict, source: EpisodeSource) -> Predict:
    """Normal laws with the constant variance added that fits fresh training episodes best."""
    fresh = source(256, seeded(77))

    def wider(found: Predictive, extra: float) -> Predictive:
        return Predictive(dist.Normal(found.law.mean, (found.law.variance + extra**2).sqrt()))

    found = predict(fresh)
    grid = torch.logspace(-2, 1, 31).tolist()
    extra = max(grid, key=lambda e: float(wider(found, e).log_prob(fresh.query.y).mean()))
    return lambda episodes: wider(predict(episodes), extra)


def niw(fitted: FittedMeta, budget: Budget, steps: int = 1) -> dict[str, Predict]:
    """The closed form with a linearised network and with the network itself, and the published gradient steps."""

    def predict(how: Any, linearised: bool) -> Predict:
        def run(episodes: Episodes) -> Predictive:
            return adapt(fitted, episodes, how).predict(episodes.query.x, budget.draws, linearised=linearised)

        return run

    closed = ClosedForm(GaussNewton(steps))
    return {
        "NIW-Meta": predict(closed, True),
        "NIW-Meta, network at draws": predict(closed, False),
        "NIW-Meta, published adaptation": predict(Variational(steps=30), False),
    }


def regression_learners(part: str, budget: Budget) -> dict[str, Callable[[EpisodeSource], dict[str, Predict]]]:
    """By name: fit on a source."""
    network, sigma = mlp([1, 32, 32, 1]), NOISE[part]
    relu = mlp([1, 32, 32, 1], nn.ReLU)
    common: dict[str, Any] = {"steps": budget.steps, "batch": budget.batch}
    unit = Gaussian(1.0)
    # Lines reach 18 where sinusoids reach 5; with 0.02 the inner steps run off.
    inner = 0.02 if part == "sinusoid" else 0.01

    prior = NormalInverseGamma.around(network.start, 1.0, 10.0, 0.05)
    hierarchy = Hierarchy(network, Gaussian(sigma), prior)

    def meta(source: EpisodeSource) -> dict[str, Predict]:
        options = NIWMeta(GaussNewton(1, through=True), expectation="quadratic", lr=5e-3, average=0.1, **common)
        found = niw(options.fit(hierarchy, source), budget)
        return found | {"NIW-Meta, widened": widened(found["NIW-Meta"], source)}

    def detached(source: EpisodeSource) -> dict[str, Predict]:
        options = NIWMeta(GaussNewton(2), expectation="quadratic", lr=5e-3, **common)
        found = niw(options.fit(hierarchy, source), budget, 5 if budget.tests == 256 else 2)
        return {f"{name}, fit held fixed": predict for name, predict in found.items()}

    def abml(source: EpisodeSource) -> dict[str, Predict]:
        options = ABML(inner_steps=5, inner_lr=0.02 * sigma**2, lr=5e-3, **common)
        fitted = options.fit(network, Gaussian(sigma), source)

        def predict(episodes: Episodes) -> Predictive:
            return fitted.predict(episodes, budget.draws)

        return {"ABML": predict, "ABML, widened": widened(predict, source)}

    return {
        "NIW-Meta": meta,
        "NIW-Meta, fit held fixed": detached,
        "MAML": lambda s: {
            "MAML": constant_noise(MAML(inner_steps=5, inner_lr=inner, lr=5e-3, **common).fit(relu, unit, s), s)
        },
        "Reptile": lambda s: {
            "Reptile": constant_noise(Reptile(inner_steps=10, inner_lr=0.02, lr=0.5, **common).fit(relu, unit, s), s)
        },
        "ABML": abml,
        "CNP": lambda s: {"CNP": ConditionalNeuralProcess(width=32, lr=5e-3, **common).fit(s).predict},
        "ridge head": lambda s: {"ridge head": RidgeHead(lr=5e-3, **common).fit(features(), s).predict},
    }


def features() -> Network:
    """The network without its last layer."""
    generator = seeded(0)
    hidden = mlp([1, 32, 32], generator=generator).module
    return Network(nn.Sequential(hidden, nn.Tanh()))


def class_learners(budget: Budget) -> dict[str, Callable[[EpisodeSource], dict[str, Predict]]]:
    """By name: fit on a source of digits."""
    network = mlp([64, 32, 32, 5])
    embedding = mlp([64, 32, 32])
    common: dict[str, Any] = {"steps": budget.steps, "batch": budget.batch}
    law = Categorical()

    def meta(source: EpisodeSource) -> dict[str, Predict]:
        prior = NormalInverseGamma.around(network.start, 1.0, 10.0, 0.01)
        options = NIWMeta(local=GaussNewton(2), expectation="quadratic", lr=5e-3, **common)
        return niw(options.fit(Hierarchy(network, law, prior), source), budget, 5 if budget.tests == 256 else 2)

    def maml(source: EpisodeSource) -> dict[str, Predict]:
        fitted = MAML(inner_steps=5, inner_lr=0.1, lr=5e-3, **common).fit(network, law, source)
        return {"MAML": lambda episodes: Predictive(law.law(fitted.predict(episodes)[None]))}

    return {
        "NIW-Meta": meta,
        "MAML": maml,
        "Reptile": lambda s: {
            "Reptile": Reptile(inner_steps=10, inner_lr=0.1, lr=0.5, **common).fit(network, law, s).predict
        },
        "prototypes": lambda s: {"prototypes": Prototypical(lr=5e-3, **common).fit(embedding, s).predict},
        "ridge head": lambda s: {"ridge head": RidgeHead(lr=5e-3, **common).fit(embedding, s).predict},
    }


# Scores


def interval(each: Tensor) -> tuple[float, float]:
    """Mean over tasks and half its 95 % interval."""
    each = each.double()
    return float(each.mean()), 1.96 * float(each.std()) / math.sqrt(len(each))


def bootstrap(score: Callable[[Tensor], Tensor], tests: int, rounds: int = 200) -> tuple[float, float]:
    """A score of pooled queries and half its 95 % interval, by resampling the tasks."""
    generator = seeded(5)
    index = torch.randint(tests, (rounds, tests), generator=generator)
    spread = torch.stack([score(row) for row in index]).std()
    return float(score(torch.arange(tests))), 1.96 * float(spread)


def scores(found: Predictive, episodes: Episodes) -> dict[str, tuple[float, float]]:
    """What is printed, each with half its interval."""
    y, tests = episodes.query.y, len(episodes)
    out = {"log-likelihood": interval(found.log_prob(y).mean(1))}
    if episodes.way is None:
        cdf = found.cdf(y)
        out["squared error"] = interval((found.mean - y).square().mean(1))
        out["PIT error"] = bootstrap(lambda i: pit_error(cdf[i].flatten()), tests)
        return out
    p = found.mean
    out["accuracy"] = interval((p.argmax(-1) == y).double().mean(1))
    out["ECE"] = bootstrap(lambda i: expected_calibration_error(p[i].flatten(0, 1), y[i].flatten()), tests)
    return out


def run(part: str, budget: Budget, only: Sequence[str] | None) -> None:
    """Fit, test and print all learners of one part."""
    if part == "digits":
        learners = class_learners(budget)
        shots = (1, 5)
        train: list[EpisodeSource] = [few_shot_digits(5, k, 5, range(5)) for k in shots]
        held_out: list[FewShot] = [few_shot_digits(5, k, 5, range(5, 10), held_out=True) for k in shots]
        tests: dict[int, Episodes] = {
            k: source(budget.tests, seeded(2026)) for k, source in zip(shots, held_out, strict=True)
        }
    else:
        learners = regression_learners(part, budget)
        shots = (5, 10)
        train = [tasks(part, k, 20 - k) for k in shots]
        tests = {k: tasks(part, k, 40)(budget.tests, seeded(2026)) for k in shots}
    episodes = budget.steps * budget.batch
    print(f"\n{part}: {budget.steps} steps of {budget.batch} episodes, {budget.tests} test tasks", flush=True)
    for name, fit in learners.items():
        if only and name not in only:
            continue
        begin = time.process_time()
        try:
            predictors = fit(either(train))
        except NotFiniteError as error:
            print(f"| {name} | diverged: {error} |", flush=True)
            continue
        training = (time.process_time() - begin) / episodes
        for label, predict in predictors.items():
            for k, new in tests.items():
                begin = time.process_time()
                found = predict(new)
                adapting = (time.process_time() - begin) / len(new)
                row: dict[str, Any] = {"part": part, "learner": label, "shots": k, "steps": budget.steps}
                row |= {"batch": budget.batch, "tests": budget.tests, "draws": budget.draws}
                row |= {"training": training, "adapting": adapting} | scores(found, new)
                append(RESULTS, row)
                show(row)


def show(row: dict[str, Any]) -> None:
    """One row of the table."""
    values = " | ".join(f"{n} {v[0]:.3f} ± {v[1]:.3f}" for n, v in row.items() if isinstance(v, tuple))
    times = f"{1e3 * row['training']:.2f} / {1e3 * row['adapting']:.2f} ms"
    print(f"| {row['learner']} | {row['shots']} | {values} | {times} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["sinusoid", "line-sine", "digits"])
    parser.add_argument("--learners", nargs="+", help="some of them, by name")
    parser.add_argument("--steps", type=int, help="of every learner; 8000 for regression, 2000 for digits")
    parser.add_argument("--quick", action="store_true", help="400 and 100 steps")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in (*NOISE, "digits"):
            parser.error(f"--parts are {', '.join(NOISE)} and digits, got {part!r}")
    for part in options.parts:
        digits = part == "digits"
        steps = options.steps or ((100 if digits else 400) if options.quick else (2000 if digits else 8000))
        run(part, Budget(steps, 8, 600 if digits else 256, 20 if digits else 50), options.learners)


if __name__ == "__main__":
    main()
