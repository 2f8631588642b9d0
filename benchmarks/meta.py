"""Few-shot learners on the same tasks, with the same network and the same number of training episodes.

    make bench-meta                                     everything
    python -m benchmarks.meta --quick                   a few minutes on one thread
    python -m benchmarks.meta --parts sinusoid --steps 3000 --seeds 0 1 2
    python -m benchmarks.meta --parts sinusoid line-sine --table     mean and spread over seeds of rows in the file

Regression: sinusoids (noise 0.1) and Line-Sine (noise 0.25), a network 1-32-32-1, 256 test tasks of 40 queries, of 5
and of 10 shots. One fit serves both: training batches have 5 or 10 shots, of 20 points in all. Every learner sees the
same batches. Printed: squared error against noisy targets, mean log-likelihood of a query, PIT error (mean distance of
the distribution function at the targets from uniform), with 95 % intervals over the tasks, and seconds per episode of
training and of adaptation with prediction. NIW-Meta and ABML are told the noise; CNP and the ridge head learn theirs;
MAML and Reptile, which have no predictive law, get the constant noise that fits 256 further training episodes best;
"widened" adds such a constant to the laws of ABML, "cooled" chooses the temperature of NIW-Meta, both by the likelihood
of those episodes.

Classes, 5-way, 1 and 5 shots, 600 episodes of 5 queries a class: digits and Fashion-MNIST, trained on classes 0-4 and
tested on held-out images of 5-9, and Omniglot characters, trained on six alphabets and tested on Balinese and Tagalog;
images of the last two are averaged to 14 x 14. Accuracy, expected calibration error and log-likelihood. The
temperature of NIW-Meta is chosen on 64 fresh training episodes. "no training" takes Reptile's steps from the network as
it begins. Rows go to runs/meta.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.results import append
from models.meta import (
    MAML,
    SGLD,
    Categorical,
    ClosedForm,
    Episodes,
    EpisodeSource,
    FewShot,
    Fisher,
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
    cooled,
    few_shot_digits,
    few_shot_fashion,
    few_shot_omniglot,
    mlp,
)
from models.meta.abml import ABML
from models.meta.conditional_neural_process import ConditionalNeuralProcess
from models.meta.predictive import Predictive, expected_calibration_error, pit_error
from models.meta.prototypical import Prototypical
from models.meta.reptile import FittedReptile, Reptile
from models.meta.ridge_head import RidgeHead
from ppl.errors import NotFiniteError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs" / "meta.jsonl"
OMNIGLOT = ROOT.parent / "shared" / "data" / "omniglot" / "omniglot_small1_small2.npz"
ALPHABETS = ("Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean", "Latin", "Sanskrit"), ("Balinese", "Tagalog")
NOISE = {"sinusoid": 0.1, "line-sine": 0.25}
# Of a weight between episodes, for images. The prior holds it: the diagonal alone would let it shrink to nothing.
VARIANCE = 0.5
METRICS = ("squared error", "log-likelihood", "PIT error", "training", "adapting")
CLASS_METRICS = ("accuracy", "ECE", "log-likelihood", "training", "adapting")
PIXELS = {"digits": 64, "fashion": 196, "omniglot": 196}
Predict = Callable[[Episodes], Predictive]


@dataclass(frozen=True)
class Budget:
    """Training of every learner."""

    steps: int
    batch: int
    tests: int
    draws: int
    seed: int = 0

    @property
    def common(self) -> dict[str, Any]:
        """Options that every learner takes."""
        return {"steps": self.steps, "batch": self.batch}

    @property
    def start(self) -> torch.Generator:
        """Of the networks' starts; one for each seed, the same for all learners."""
        return seeded(self.seed)


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

    fresh = source(256, seeded(77))
    sigma = float((fitted.predict(fresh).mean - fresh.query.y).square().mean().sqrt())
    return lambda episodes: Predictive(Gaussian(sigma).law(fitted.predict(episodes).mean[None, ..., None]))


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
    network, sigma = mlp([1, 32, 32, 1], generator=budget.start), NOISE[part]
    relu = mlp([1, 32, 32, 1], nn.ReLU, generator=budget.start)
    common = budget.common
    seed: dict[str, Any] = {"seed": budget.seed}
    unit = Gaussian(1.0)
    # Lines reach 18 where sinusoids reach 5; with 0.02 the inner steps run off.
    inner = 0.02 if part == "sinusoid" else 0.01

    prior = NormalInverseGamma.around(network.start, 1.0, 10.0, 0.05)
    hierarchy = Hierarchy(network, Gaussian(sigma), prior)

    def meta(source: EpisodeSource) -> dict[str, Predict]:
        options = NIWMeta(GaussNewton(1, through=True), expectation="quadratic", lr=5e-3, average=0.1, **common)
        fitted = options.fit(hierarchy, source, **seed)
        cold = cooled(fitted, source(256, seeded(77)), draws=budget.draws, linearised=True)
        print(f"<!-- temperature {cold:g} -->", flush=True)

        def colder(episodes: Episodes) -> Predictive:
            return fitted.predict(episodes, draws=budget.draws, linearised=True, temperature=cold)

        return niw(fitted, budget) | {"NIW-Meta, cooled": colder}

    def detached(source: EpisodeSource) -> dict[str, Predict]:
        options = NIWMeta(GaussNewton(2), expectation="quadratic", lr=5e-3, **common)
        found = niw(options.fit(hierarchy, source, **seed), budget, 5)
        return {f"{name}, fit held fixed": predict for name, predict in found.items()}

    def abml(source: EpisodeSource) -> dict[str, Predict]:
        options = ABML(inner_steps=5, inner_lr=0.02 * sigma**2, lr=5e-3, **common)
        fitted = options.fit(network, Gaussian(sigma), source, **seed)

        def predict(episodes: Episodes) -> Predictive:
            return fitted.predict(episodes, budget.draws)

        return {"ABML": predict, "ABML, widened": widened(predict, source)}

    return {
        "NIW-Meta": meta,
        "NIW-Meta, fit held fixed": detached,
        "MAML": lambda s: {
            "MAML": constant_noise(MAML(inner_steps=5, inner_lr=inner, lr=5e-3, **common).fit(relu, unit, s, **seed), s)
        },
        "Reptile": lambda s: {
            "Reptile": constant_noise(
                Reptile(inner_steps=10, inner_lr=0.02, lr=0.5, **common).fit(relu, unit, s, **seed), s
            )
        },
        "ABML": abml,
        "CNP": lambda s: {"CNP": ConditionalNeuralProcess(width=32, lr=5e-3, **common).fit(s, **seed).predict},
        "ridge head": lambda s: {
            "ridge head": RidgeHead(lr=5e-3, **common).fit(features(budget.start), s, **seed).predict
        },
    }


def features(generator: torch.Generator) -> Network:
    """The network without its last layer."""
    hidden = mlp([1, 32, 32], generator=generator).module
    return Network(nn.Sequential(hidden, nn.Tanh()))


def pooled(tasks: FewShot) -> FewShot:
    """The same images, averaged to 14 x 14."""
    return replace(tasks, images=nn.functional.adaptive_avg_pool2d(tasks.images, 14))


def classes(part: str, shots: int, test: bool) -> FewShot:
    """A source of 5-way episodes; of classes or alphabets that training does not see, where it is a test."""
    own = range(5, 10) if test else range(5)
    if part == "digits":
        return few_shot_digits(5, shots, 5, own, held_out=test)
    if part == "fashion":
        return pooled(few_shot_fashion(5, shots, 5, own, held_out=test))
    return few_shot_omniglot(OMNIGLOT, 5, shots, 5, ALPHABETS[test], size=14)


def flat(sizes: Sequence[int], generator: torch.Generator) -> Network:
    """A network of images as vectors."""
    return Network(nn.Sequential(nn.Flatten(), mlp(sizes, generator=generator).module))


def class_learners(part: str, budget: Budget) -> dict[str, Callable[[EpisodeSource], dict[str, Predict]]]:
    """By name: fit on a source of images."""
    network = flat([PIXELS[part], 32, 32, 5], budget.start)
    embedding = flat([PIXELS[part], 32, 32], budget.start)
    common, law = budget.common, Categorical()
    seed: dict[str, Any] = {"seed": budget.seed}

    def meta(source: EpisodeSource) -> dict[str, Predict]:
        prior = NormalInverseGamma.around(network.start, 1.0, 1e6, VARIANCE)
        options = NIWMeta(Fisher(5, 1), update="natural", expectation="quadratic", delay=100.0, **common)
        fitted = options.fit(Hierarchy(network, law, prior), source, **seed)
        how = ClosedForm(Fisher(30))
        cold = cooled(fitted, source(64, seeded(77)), how, draws=20)
        print(f"<!-- temperature {cold:g} -->", flush=True)

        def predict(temperature: float) -> Predict:
            return lambda e: fitted.predict(e, how, budget.draws, temperature=temperature)

        return {"NIW-Meta": predict(cold), "NIW-Meta, temperature 1": predict(1.0)}

    def published(source: EpisodeSource) -> dict[str, Predict]:
        prior = NormalInverseGamma.around(network.start, 1.0, 10.0, 1e-3)
        options = NIWMeta(SGLD(3, step=1e-4), lr=5e-3, **common)
        fitted = options.fit(Hierarchy(network, law, prior), source, **seed)
        return {"NIW-Meta as published": lambda e: fitted.predict(e, Variational(steps=30), budget.draws)}

    def abml(source: EpisodeSource) -> dict[str, Predict]:
        fitted = ABML(inner_steps=5, inner_lr=0.05, spread=0.1, lr=5e-3, **common).fit(network, law, source, **seed)
        return {"ABML": lambda e: fitted.predict(e, budget.draws)}

    reptile = Reptile(inner_steps=10, inner_lr=0.1, lr=0.5, **common)
    start = FittedReptile(reptile, network, law, network.start, network.start[:0])
    maml = MAML(inner_steps=5, inner_lr=0.1, lr=5e-3, **common)
    return {
        "no training": lambda s: {"no training": start.predict},
        "NIW-Meta": meta,
        "NIW-Meta as published": published,
        "MAML": lambda s: {"MAML": maml.fit(network, law, s, **seed).predict},
        "Reptile": lambda s: {"Reptile": reptile.fit(network, law, s, **seed).predict},
        "ABML": abml,
        "prototypes": lambda s: {"prototypes": Prototypical(lr=5e-3, **common).fit(embedding, s, **seed).predict},
        "ridge head": lambda s: {"ridge head": RidgeHead(lr=5e-3, **common).fit(embedding, s, **seed).predict},
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


def scores(found: Predictive | Sequence[Predictive], episodes: Episodes) -> dict[str, tuple[float, float]]:
    """What is printed, each with half its interval; of one prediction, or of several for some episodes each."""
    parts = [found] if isinstance(found, Predictive) else found
    y, tests = episodes.query.y, len(episodes)
    targets = y.split([part.law.batch_shape[1] for part in parts])

    def joined(value: Callable[[Predictive, Tensor], Tensor]) -> Tensor:
        return torch.cat([value(part, target) for part, target in zip(parts, targets, strict=True)])

    mean = joined(lambda part, _: part.mean)
    out = {"log-likelihood": interval(joined(Predictive.log_prob).mean(1))}
    if episodes.way is None:
        cdf = joined(Predictive.cdf)
        out["squared error"] = interval((mean - y).square().mean(1))
        out["PIT error"] = bootstrap(lambda i: pit_error(cdf[i].flatten()), tests)
        return out
    out["accuracy"] = interval((mean.argmax(-1) == y).double().mean(1))
    out["ECE"] = bootstrap(lambda i: expected_calibration_error(mean[i].flatten(0, 1), y[i].flatten()), tests)
    return out


def run(part: str, budget: Budget, only: Sequence[str] | None) -> None:
    """Fit, test and print all learners of one part."""
    tests: dict[int, Episodes]
    if part in PIXELS:
        learners = class_learners(part, budget)
        shots = (1, 5)
        train: list[EpisodeSource] = [classes(part, k, test=False) for k in shots]
        tests = {k: classes(part, k, test=True)(budget.tests, seeded(2026)) for k in shots}
    else:
        learners = regression_learners(part, budget)
        shots = (5, 10)
        train = [tasks(part, k, 20 - k) for k in shots]
        tests = {k: tasks(part, k, 40)(budget.tests, seeded(2026)) for k in shots}
    episodes = budget.steps * budget.batch
    heading = f"{part}: {budget.steps} steps of {budget.batch} episodes, seed {budget.seed}, {budget.tests} test tasks"
    print(f"\n{heading}", flush=True)
    for name, fit in learners.items():
        if only and name not in only:
            continue
        row: dict[str, Any] = {"part": part, "steps": budget.steps, "batch": budget.batch, "tests": budget.tests}
        row |= {"draws": budget.draws, "seed": budget.seed}
        begin = time.process_time()
        try:
            predictors = fit(either(train))
        except NotFiniteError as error:
            append(RESULTS, row | {"learner": name, "diverged": str(error)})
            print(f"| {name} | diverged: {error} |", flush=True)
            continue
        training = (time.process_time() - begin) / episodes
        for label, predict in predictors.items():
            for k, new in tests.items():
                begin = time.process_time()
                # Some at a time: draws of all networks for all tasks at once take gigabytes.
                parts = [predict(new[i : i + 100]) for i in range(0, len(new), 100)]
                adapting = (time.process_time() - begin) / len(new)
                found = row | {"learner": label, "shots": k, "training": training, "adapting": adapting}
                found |= scores(parts, new)
                append(RESULTS, found)
                show(found)


def show(row: dict[str, Any]) -> None:
    """One row of the table."""
    values = " | ".join(f"{n} {v[0]:.3f} ± {v[1]:.3f}" for n, v in row.items() if isinstance(v, tuple))
    times = f"{1e3 * row['training']:.2f} / {1e3 * row['adapting']:.2f} ms"
    print(f"| {row['learner']} | {row['shots']} | {values} | {times} |", flush=True)


def table(part: str, steps: int) -> None:
    """Means over the seeds of stored rows, with half the 95 % interval over tasks and the spread over seeds."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows = [row for row in rows if row["part"] == part and row["steps"] == steps and "shots" in row]
    latest = {(row["learner"], row["shots"], row.get("seed", 0)): row for row in rows}
    metrics = CLASS_METRICS if part in PIXELS else METRICS
    titles = [f"ms {name}" if name in METRICS[-2:] else name for name in metrics]
    print(f"\n{part}, {steps} steps: mean (half the 95 % interval over tasks; sd over seeds)\n")
    print(f"| | seeds | {' | '.join(titles)} |\n|{'---|' * (2 + len(metrics))}")
    for learner in dict.fromkeys(row["learner"] for row in latest.values()):
        cells = []
        for metric in metrics:
            each = []
            for k in sorted({row["shots"] for row in latest.values()}):
                own = [row[metric] for row in latest.values() if row["learner"] == learner and row["shots"] == k]
                if own:
                    values = torch.tensor(own, dtype=torch.float64)
                    if values.ndim == 1:  # seconds
                        each.append(f"{1e3 * float(values.mean()):.2f}")
                        continue
                    spread = f"; {float(values[:, 0].std()):.3f}" if len(own) > 1 else ""
                    each.append(f"{float(values[:, 0].mean()):.3f} ({float(values[:, 1].mean()):.3f}{spread})")
            cells.append(", ".join(each))
        print(f"| {learner} | {len({k[2] for k in latest if k[0] == learner})} | {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*NOISE, *PIXELS], default=[*NOISE, *PIXELS], metavar="PART")
    parser.add_argument("--learners", nargs="+", help="some of them, by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training: starts and episodes")
    parser.add_argument("--steps", type=int, help="of every learner; 8000 for regression, 1000 for classes")
    parser.add_argument("--quick", action="store_true", help="400 and 100 steps")
    parser.add_argument("--table", action="store_true", help="no runs: a table of those in the file, over all seeds")
    options = parser.parse_args(arguments)
    for part in options.parts:
        images = part in PIXELS
        steps = options.steps or ((100 if images else 400) if options.quick else (1000 if images else 8000))
        if options.table:
            table(part, steps)
            continue
        for seed in options.seeds:
            run(part, Budget(steps, 8, 600 if images else 256, 20 if images else 50, seed), options.learners)


if __name__ == "__main__":
    main()
