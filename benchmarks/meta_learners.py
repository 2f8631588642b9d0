"""The learners of `benchmarks.meta`, their tasks, and the options they have.

Each is fitted on a source of episodes, and comes back as one or more ways to predict. Learning rates of regression are
one, two or four times the first (`PACES`), by the mean log-likelihood of 256 development tasks of 5 and of 10 shots,
which are neither trained on nor scored, with training seed 0. Reptile and the form of NIW-Meta whose fit is held fixed
have theirs by hand.

    python -m benchmarks.meta --parts sinusoid line-sine --steps 2000 --paces 1 2 4 --learners MAML CNP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

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
from models.meta.predictive import Predictive
from models.meta.prototypical import Prototypical
from models.meta.reptile import FittedReptile, Reptile
from models.meta.ridge_head import RidgeHead

ROOT = Path(__file__).parents[1]
OMNIGLOT = ROOT.parent / "shared" / "data" / "omniglot" / "omniglot_small1_small2.npz"
ALPHABETS = ("Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean", "Latin", "Sanskrit"), ("Balinese", "Tagalog")
NOISE = {"sinusoid": 0.1, "line-sine": 0.25}
PACES = {
    "sinusoid": {"NIW-Meta": 2.0, "MAML": 2.0, "ridge head": 4.0, "Reptile": 2.0},
    "line-sine": {"MAML": 4.0, "ridge head": 4.0, "Reptile": 2.0},
}
# Of a weight between episodes, for images. The prior holds it: the diagonal alone would let it shrink to nothing.
VARIANCE = 0.5
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
    pace: float | None = None  # times the first learning rates, in place of those that were chosen

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

    def predict(how: Any, draws: int | None) -> Predict:
        def run(episodes: Episodes) -> Predictive:
            return adapt(fitted, episodes, how).predict(episodes.query.x, draws, linearised=draws is None)

        return run

    closed = ClosedForm(GaussNewton(steps))
    return {
        "NIW-Meta": predict(closed, None),
        "NIW-Meta, network at draws": predict(closed, budget.draws),
        "NIW-Meta, published adaptation": predict(Variational(steps=30), budget.draws),
    }


def regression_learners(part: str, budget: Budget) -> dict[str, Callable[[EpisodeSource], dict[str, Predict]]]:
    """By name: fit on a source."""
    network, sigma = mlp([1, 32, 32, 1], generator=budget.start), NOISE[part]
    relu = mlp([1, 32, 32, 1], nn.ReLU, generator=budget.start)
    seed: dict[str, Any] = {"seed": budget.seed}
    unit = Gaussian(1.0)
    # Lines reach 18 where sinusoids reach 5; with 0.02 the inner steps run off.
    inner = 0.02 if part == "sinusoid" else 0.01
    prior = NormalInverseGamma.around(network.start, 1.0, 10.0, 0.05)
    hierarchy = Hierarchy(network, Gaussian(sigma), prior)

    def common(name: str, lr: float = 5e-3) -> dict[str, Any]:
        pace = PACES[part].get(name, 1.0) if budget.pace is None else budget.pace
        return budget.common | {"lr": pace * lr}

    def meta(source: EpisodeSource) -> dict[str, Predict]:
        local, rates = GaussNewton(1, through=True), common("NIW-Meta")
        options = NIWMeta(local, expectation="quadratic", scale_lr=0.2, average=0.1, **rates)
        fitted = options.fit(hierarchy, source, **seed)
        cold = cooled(fitted, source(256, seeded(77)), linearised=True)
        print(f"<!-- temperature {cold:g} -->", flush=True)

        def colder(episodes: Episodes) -> Predictive:
            return fitted.predict(episodes, linearised=True, temperature=cold)

        return niw(fitted, budget) | {"NIW-Meta, cooled": colder}

    def detached(source: EpisodeSource) -> dict[str, Predict]:
        rates = common("NIW-Meta, fit held fixed")
        options = NIWMeta(GaussNewton(2), expectation="quadratic", **rates)
        found = niw(options.fit(hierarchy, source, **seed), budget, 5)
        return {f"{name}, fit held fixed": predict for name, predict in found.items()}

    def maml(source: EpisodeSource) -> dict[str, Predict]:
        options = MAML(inner_steps=5, inner_lr=inner, **common("MAML"))
        return {"MAML": constant_noise(options.fit(relu, unit, source, **seed), source)}

    def reptile(source: EpisodeSource) -> dict[str, Predict]:
        options = Reptile(inner_steps=10, inner_lr=0.02, **common("Reptile", 0.25))
        return {"Reptile": constant_noise(options.fit(relu, unit, source, **seed), source)}

    def abml(source: EpisodeSource) -> dict[str, Predict]:
        options = ABML(inner_steps=5, inner_lr=0.02 * sigma**2, **common("ABML"))
        fitted = options.fit(network, Gaussian(sigma), source, **seed)

        def predict(episodes: Episodes) -> Predictive:
            return fitted.predict(episodes, budget.draws)

        return {"ABML": predict, "ABML, widened": widened(predict, source)}

    def process(source: EpisodeSource) -> dict[str, Predict]:
        return {"CNP": ConditionalNeuralProcess(width=32, **common("CNP")).fit(source, **seed).predict}

    def ridge(source: EpisodeSource) -> dict[str, Predict]:
        return {"ridge head": RidgeHead(**common("ridge head")).fit(features(budget.start), source, **seed).predict}

    return {
        "NIW-Meta": meta,
        "NIW-Meta, fit held fixed": detached,
        "MAML": maml,
        "Reptile": reptile,
        "ABML": abml,
        "CNP": process,
        "ridge head": ridge,
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
