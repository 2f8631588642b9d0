"""Every registered backend keeps the contract of `ppl.testing`, and the contract notices the faults it is made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

import inverse
import ppl
from inverse.paths import Uncontrolled
from models.references import gaussian_problem
from ppl.backend import registered
from ppl.errors import OptionError
from ppl.testing import check_backend
from sde import GaussianMixture, MarkovNoise, Path, Process

F64 = torch.float64


def linear() -> ppl.Program:
    """Three dimensions, two observations, a diffusion site."""
    return gaussian_problem(0.3, dim=3, observations=2).program


def unknown_noise() -> ppl.Program:
    """The same with a noise level to be found."""

    def model(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 0.5))
        x = pyro.sample(
            "x", GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), torch.eye(3)[None])
        )
        pyro.sample("y", dist.Normal(x[..., :2], sigma).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


def two_sites() -> ppl.Program:
    """Two diffusion sites in one measurement."""
    priors = [GaussianMixture(torch.ones(2), torch.eye(2, n), torch.ones(2)).to(dtype=F64) for n in (2, 3)]

    def model(y: Tensor) -> None:
        a, b = (pyro.sample(n, p) for n, p in zip("ab", priors, strict=True))
        pyro.sample("y", dist.Normal(a + b[..., :2], 0.3).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


def path() -> ppl.Program:
    """A linear path of a noise that starts from hidden factors, seen at every time."""
    process = Process(lambda x, t: -x, 1.0, MarkovNoise(0.7, 1.0, "I", 2))
    law = Path(process, torch.tensor([0.3, 0.6, 1.0], dtype=F64), torch.zeros(1, dtype=F64))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x[:, 0], 0.5).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0, 0.4], dtype=F64), compile="never")


def path_of_unknown_rate() -> ppl.Program:
    """A path in steps smaller than its times, whose rate is to be found."""
    times = torch.tensor([0.4, 1.0], dtype=F64)

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        x = pyro.sample("x", Path(Process(lambda x, t: -rate * x), times, torch.ones(1, dtype=F64), dt=0.2))
        pyro.sample("y", dist.Normal(x[:, 0], 0.5).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


def plain() -> ppl.Program:
    """Two latents, one of them positive, in a plate."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        with pyro.plate("groups", 2):
            mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


def gaussian() -> ppl.Program:
    """Two Gaussian latents."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 0.5).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0], dtype=F64), compile="never")


# Name in the registry -> backends with few steps, each with a program that fits it.
CASES: dict[str, list[tuple[Any, Callable[[], ppl.Program]]]] = {
    "AnnealedLangevin": [
        (inverse.AnnealedLangevin(levels=3, steps=2, warmup=20, thin=1), linear),
        (inverse.AnnealedLangevin(levels=3, steps=2, warmup=4, thin=2, nodes=1, chunk=3), linear),
    ],
    "DiffusionPCN": [(inverse.DiffusionPCN(steps=2, warmup=4, thin=2), linear)],
    "ParallelTempering": [
        (inverse.ParallelTempering(levels=3, warmup=40), linear),
        (inverse.ParallelTempering(levels=3, warmup=4, nodes=1, chunk=3), linear),
    ],
    "AmortisedDenoiser": [
        (inverse.AmortisedDenoiser(steps=6, batch=8, width=8, depth=1, levels=4), plain),
        (inverse.AmortisedDenoiser(steps=6, batch=8, width=8, depth=1, levels=4), linear),
        (inverse.AmortisedDenoiser(steps=6, batch=8, width=8, depth=1, levels=4, correct=True), plain),
        (ppl.NoiseSpace(inverse.AmortisedDenoiser(steps=4, batch=8, width=8, levels=3, correct=True)), linear),
    ],
    "DAPS": [(inverse.DAPS(steps=4), linear), (inverse.DAPS(steps=3, inner="hmc", inner_steps=3), linear)],
    "DDNM": [(inverse.DDNM(steps=4), linear), (inverse.DDNM(steps=4, travel_length=2, travel_repeats=2), linear)],
    "DDRM": [(inverse.DDRM(steps=4), linear)],
    "DDSMC": [
        (inverse.DDSMC(steps=4, particles=12, runs=2), linear),
        (inverse.DDSMC(steps=3, particles=12, runs=2, reconstruction="flow", ode_steps=2), linear),
    ],
    "DCPS": [
        (inverse.DCPS(steps=6, blocks=2, langevin_steps=2), linear),
        (inverse.DCPS(steps=4, blocks=1, optimizer="adam"), linear),
    ],
    "DPS": [(inverse.DPS(steps=4), linear)],
    "DiffPIR": [(inverse.DiffPIR(steps=4), linear)],
    "DistributionTransformer": [
        (ppl.DistributionTransformer(2, 8, 2, 1, 8, steps=6, batch=8), plain),
        (ppl.DistributionTransformer(2, 8, 2, 1, 8, steps=6, batch=8, priors=ppl.MixturePriors()), gaussian),
        (ppl.DistributionTransformer(2, 8, 2, 1, 8, steps=6, batch=8, rows=("y",), correct=False), gaussian),
        (ppl.NoiseSpace(ppl.DistributionTransformer(2, 8, 2, 1, 8, steps=4, batch=8)), linear),
    ],
    "EllipticalSlice": [(ppl.EllipticalSlice(warmup=4), gaussian)],
    "Exact": [(inverse.Exact(), linear)],
    "FPSSMC": [(inverse.FPSSMC(steps=4, particles=12, runs=2), linear)],
    "Gibbs": [
        (ppl.Gibbs({("mu",): ppl.HMCKernel(), ("scale",): ppl.SliceKernel()}, warmup=4), plain),
        (ppl.Gibbs({("x",): inverse.ParticleGibbsKernel(particles=3)}, warmup=3), path),
    ],
    "GuidedSampler": [
        (inverse.GuidedSampler(inverse.PiGDMGuide(), inverse.TwistedSMC().solver, steps=4), linear),
    ],
    "GuidedParticleFilter": [
        (inverse.GuidedParticleFilter(runs=2), path),
        (inverse.GuidedParticleFilter(particles=8, threshold=1.0, runs=2, control=Uncontrolled()), path),
    ],
    "FreeDoM": [(inverse.FreeDoM(steps=4, travel_repeats=2), linear), (inverse.FreeDoM(4, "alpha"), linear)],
    "HMC": [
        (ppl.HMC(warmup=20, max_steps=8), plain),
        (ppl.HMC(warmup=20, max_steps=8, init=ppl.Pathfinder(paths=2, steps=8)), plain),
    ],
    "Importance": [
        (ppl.Importance(), plain),
        (ppl.Importance(ppl.SVI(steps=8), smooth=True), gaussian),
        (ppl.Importance(ppl.Pathfinder(steps=4)), plain),
    ],
    "Laplace": [(ppl.Laplace(starts=2), plain)],
    "MCGdiff": [(inverse.MCGdiff(steps=4, particles=12, runs=2), linear)],
    "MGPS": [(inverse.MGPS(steps=4, fit_steps=2), linear), (inverse.MGPS(steps=4, warm_start=False), linear)],
    "MPGD": [(inverse.MPGD(steps=4), linear), (inverse.MPGD(4, "norm", travel_repeats=2), linear)],
    "MomentMatching": [(inverse.MomentMatching(steps=3), linear)],
    "NUTS": [(ppl.NUTS(warmup=10), plain), (ppl.NUTS(warmup=10, init=ppl.Pathfinder(paths=2, steps=40)), plain)],
    "NoiseSpace": [
        (ppl.NoiseSpace(ppl.HMC(warmup=20, max_steps=8)), linear),
        (ppl.NoiseSpace(ppl.EllipticalSlice(warmup=4)), linear),
        (ppl.NoiseSpace(ppl.SMC(particles=20, moves=1)), linear),
        (ppl.NoiseSpace(ppl.Importance()), linear),
        (ppl.NoiseSpace(ppl.Laplace(starts=2)), linear),
        (ppl.NoiseSpace(ppl.Pathfinder(paths=2, steps=6)), linear),
        (ppl.NoiseSpace(ppl.SVI(guide=ppl.LowRank(1), steps=8)), linear),
    ],
    "NuisanceSMC": [(inverse.NuisanceSMC(steps=3, particles=12, runs=2, moves=1), unknown_noise)],
    "ParticleGibbs": [
        (inverse.ParticleGibbs(particles=3, warmup=3), path),
        (inverse.ParticleGibbs(particles=3, warmup=3, thin=2, control=Uncontrolled()), path_of_unknown_rate),
    ],
    "Pathfinder": [(ppl.Pathfinder(paths=3, steps=8), plain)],
    "PiGDM": [(inverse.PiGDM(steps=4), linear)],
    "PnPDM": [
        (inverse.PnPDM(steps=3, warmup=3), linear),
        (inverse.PnPDM(steps=3, warmup=3, inner="mala", inner_steps=2), linear),
    ],
    "Pyro": [(ppl.Pyro(PyroNUTS, warmup=4), plain)],
    "REDDiff": [
        (inverse.REDDiff(steps=6, scale="likelihood"), linear),
        (inverse.REDDiff(steps=6, scale="likelihood", covariance="low_rank", rank=2), linear),
        (inverse.REDDiff(steps=6), linear),
    ],
    "ReSample": [
        (inverse.ReSample(steps=6, every=2), linear),
        (inverse.ReSample(steps=4, inner="adam", inner_steps=3), linear),
    ],
    "SDEMatching": [
        (inverse.SDEMatching(steps=6, particles=4, times=4, knots=2), path_of_unknown_rate),
    ],
    "SMC": [
        (ppl.SMC(particles=20, moves=1), plain),
        (ppl.SMC(particles=20, moves=2, kernel="random_walk", chunk=7, runs=2), gaussian),
        (ppl.SMC(particles=20, moves=1, start=ppl.SVI(steps=4)), plain),
    ],
    "SVI": [(ppl.SVI(guide=ppl.FullRank(), steps=8), plain), (ppl.SVI(guide=ppl.Flow(), steps=6), plain)],
    "ScorePriorVI": [
        (inverse.ScorePriorVI(steps=8, starts=2), linear),
        (inverse.ScorePriorVI(guide=ppl.Flow(transforms=1, hidden=(8,)), bound="immse", levels=2, steps=6), linear),
    ],
    "SplitGibbs": [(inverse.SplitGibbs(steps=3, warmup=3), linear)],
    "Transport": [
        (ppl.Transport(ppl.HMC(warmup=20, max_steps=8), ppl.SVI(guide=ppl.LowRank(1), steps=8)), plain),
        (ppl.Transport(ppl.NUTS(warmup=10, max_depth=3), ppl.SVI(guide=ppl.MeanField(), steps=8)), plain),
        (ppl.NoiseSpace(ppl.Transport(ppl.HMC(warmup=20, max_steps=8), ppl.SVI(steps=8))), linear),
    ],
    "TwistedSMC": [
        (inverse.TwistedSMC(steps=3, particles=12, runs=2), linear),
        (inverse.TwistedSMC(steps=3, particles=12, runs=2), two_sites),
        (inverse.TwistedSMC(steps=5, particles=12, threshold=1.0, moves=1, runs=2), linear),
        (inverse.TwistedSMC(steps=4, particles=12, guide=inverse.PiGDMGuide(), runs=2), linear),
    ],
}


def test_every_backend_has_a_case() -> None:
    ours = {n for n, c in registered().items() if c.__module__.partition(".")[0] in ("ppl", "inverse", "models")}
    assert ours == set(CASES)


@pytest.mark.parametrize(
    ("backend", "program"),
    [pytest.param(b, p, id=f"{name}-{i}") for name, cases in CASES.items() for i, (b, p) in enumerate(cases)],
)
def test_contract(backend: Any, program: Callable[[], ppl.Program]) -> None:
    check_backend(backend, program())


NOT_OF_SITES = ("NuisanceSMC", "GuidedParticleFilter", "ParticleGibbs", "SDEMatching")
ON_SITES = [
    n for n, cases in CASES.items() if type(cases[0][0]).__module__.startswith("inverse") and n not in NOT_OF_SITES
]


@pytest.mark.parametrize("name", ON_SITES)
def test_backends_for_one_diffusion_site_take_two(name: str) -> None:
    posterior = ppl.infer(two_sites(), CASES[name][0][0], draws=4, chains=2)
    assert {n: v.shape for n, v in posterior.draws.items()} == {"a": (2, 4, 2), "b": (2, 4, 3)}
    for values in posterior.draws.values():
        assert bool(values.isfinite().all())
        assert not torch.equal(values[0], values[1])


@dataclass(frozen=True)
class Toy:
    """Exact draws of a conjugate normal, with room for one fault."""

    steps: int = 3

    exact: ClassVar[Any] = "in_the_limit"
    limit: ClassVar[Any] = ("draws",)
    exact_when: ClassVar[Any] = ()
    needs: ClassVar[Any] = frozenset()
    default_chains: ClassVar[Any] = 2
    batches_problems: ClassVar[Any] = False

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    def run(self, program: Any, *, draws: int, chains: int, generator: torch.Generator, monitor: Any) -> ppl.Posterior:
        saved = monitor.resume()
        start = 0 if saved is None else int(saved["step"])
        noise = torch.zeros(chains, draws, 2, dtype=F64) if saved is None else saved["noise"]
        for step in monitor.steps(self.steps, "toy", start=start):
            noise = noise + self.draw((chains, draws, 2), generator)
            monitor.cost.add(density_evals=chains * draws)
            monitor.checkpoint(step + 1, {"noise": noise})
        return self.result(program, noise)

    def result(self, program: Any, noise: Tensor) -> ppl.Posterior:
        return ppl.Posterior({"mu": 0.8 * program.data["y"] + noise * (0.2 / self.steps) ** 0.5})


def test_a_good_backend_passes() -> None:
    check_backend(Toy(), gaussian())


class GlobalNoise(Toy):
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, dtype=F64)


class NoSeed(Toy):
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)


class OneChain(Toy):
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return super().draw(shape[1:], generator).expand(shape)


class Float32(Toy):
    def result(self, program: Any, noise: Tensor) -> ppl.Posterior:
        return ppl.Posterior({"mu": super().result(program, noise)["mu"].float()})


class Shape(Toy):
    def result(self, program: Any, noise: Tensor) -> ppl.Posterior:
        return ppl.Posterior({"mu": super().result(program, noise)["mu"].transpose(0, 1)})


class Missing(Toy):
    def result(self, program: Any, noise: Tensor) -> ppl.Posterior:
        return ppl.Posterior({"nu": noise})


class ChangesData(Toy):
    def result(self, program: Any, noise: Tensor) -> ppl.Posterior:
        made = super().result(program, noise)
        program.data["y"].add_(1.0)
        return made


class LeavesParameter(Toy):
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        pyro.param("left", torch.zeros(1))
        return super().draw(shape, generator)


class Deaf(Toy):
    """Hides that it was stopped."""

    def run(self, program: Any, *, draws: int, chains: int, generator: torch.Generator, monitor: Any) -> ppl.Posterior:
        noise = sum(self.draw((chains, draws, 2), generator) for _ in monitor.steps(self.steps, "a"))
        monitor.interrupted = False
        monitor.cost.add(density_evals=1)
        for _ in monitor.steps(1, "b"):
            pass
        return self.result(program, torch.as_tensor(noise))


class Forgets(Toy):
    """Does not restore what it stored."""

    def run(self, program: Any, *, draws: int, chains: int, generator: torch.Generator, monitor: Any) -> ppl.Posterior:
        saved = monitor.resume()
        noise = torch.zeros(chains, draws, 2, dtype=F64)
        for step in monitor.steps(self.steps, "toy", start=0 if saved is None else int(saved["step"])):
            noise = noise + self.draw((chains, draws, 2), generator)
            monitor.cost.add(density_evals=1)
            monitor.checkpoint(step + 1, {"noise": noise})
        return self.result(program, noise)


class NoLimit(Toy):
    limit: ClassVar[Any] = ()


class Boast(Toy):
    exact: ClassVar[Any] = "mostly"


class ListNeeds(Toy):
    needs: ClassVar[Any] = ["denoiser"]


class Free(Toy):
    """Counts nothing."""

    def run(self, program: Any, *, draws: int, chains: int, generator: torch.Generator, monitor: Any) -> ppl.Posterior:
        for _ in monitor.steps(1, "toy"):
            noise = self.draw((chains, draws, 2), generator)
        return self.result(program, noise)


@dataclass
class Thawed:
    """A dataclass that can be changed."""

    steps: int = 3
    exact: ClassVar[Any] = "always"
    limit: ClassVar[Any] = ()
    exact_when: ClassVar[Any] = ()
    needs: ClassVar[Any] = frozenset()
    default_chains: ClassVar[Any] = 2
    batches_problems: ClassVar[Any] = False
    run = Toy.run


@dataclass(frozen=True)
class Address(Toy):
    what: Any = field(default_factory=lambda: lambda: None)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (GlobalNoise(), "torch's random state"),
        (NoSeed(), "another seed"),
        (OneChain(), "both chains"),
        (Float32(), "float32"),
        (Shape(), "shape"),
        (Missing(), "no draws of the latent site 'mu'"),
        (ChangesData(), "changed the program"),
        (LeavesParameter(), "parameter store"),
        (Deaf(), "true after the run was stopped"),
        (Forgets(), "goes on gives the same draws"),
        (NoLimit(), "what has to grow"),
        (Boast(), "exact"),
        (ListNeeds(), "frozenset"),
        (Free(), "no work"),
        (Thawed(), "frozen dataclass"),
        (Address(), "address"),
        (object(), "lacks class data"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
)
def test_faults_are_noticed(backend: Any, message: str) -> None:
    """Each fault alone, and named for what it is."""
    with pytest.raises(AssertionError, match=message):
        check_backend(backend, gaussian())


def test_bad_arguments() -> None:
    with pytest.raises(OptionError, match="draws"):
        check_backend(Toy(), gaussian(), draws=1)
