"""CPU and CUDA agree in law, for every backend, on a Gaussian problem with a known posterior; skipped without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.operators import Dense
from inverse.paths import Uncontrolled
from inverse.paths.testing import check_path_backend
from ppl.backend import registered
from ppl.diagnostics import ess_of, z_bound
from ppl.errors import DataError
from ppl.testing import check_backend
from sde import BrownianNoise, GaussianMixture, MarkovNoise, Path, Process
from sde.solvers import DPMSolver2MSDE

F64 = torch.float64


def problem(device: str) -> ppl.Program:
    """Four dimensions, two observations, everything on one device."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=F64)
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.ones(1, 4, dtype=F64), (root @ root.T + torch.eye(4))[None])
    matrix = torch.randn(2, 4, generator=generator, dtype=F64)
    y = torch.randn(2, generator=generator, dtype=F64)
    on_device = prior.to(device)
    operator = Dense(matrix.to(device))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", on_device)
        pyro.sample("y", dist.Normal(operator(x), 0.4).to_event(1), obs=y)

    return ppl.Program(model, y.to(device), compile="never")


# Exact and biased backends alike: the law is that of the same backend on the CPU. (backend, draws, chains)
CASES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "AnnealedLangevin": (lambda: inverse.AnnealedLangevin(levels=5, steps=10, warmup=50), 50, 64),
    "DAPS": (lambda: inverse.DAPS(steps=10), 2000, 1),
    "DCPS": (lambda: inverse.DCPS(steps=12), 500, 1),
    "DDNM": (lambda: inverse.DDNM(steps=20), 2000, 1),
    "DDRM": (lambda: inverse.DDRM(steps=20), 2000, 1),
    "DDSMC": (lambda: inverse.DDSMC(steps=20, runs=1), 2000, 1),
    "DPS": (lambda: inverse.DPS(steps=30), 2000, 1),
    "DiffPIR": (lambda: inverse.DiffPIR(steps=20), 2000, 1),
    "DiffusionPCN": (lambda: inverse.DiffusionPCN(steps=4, warmup=50), 50, 64),
    "Exact": (inverse.Exact, 2000, 1),
    "FPSSMC": (lambda: inverse.FPSSMC(steps=20, runs=1), 2000, 1),
    "FreeDoM": (lambda: inverse.FreeDoM(steps=20), 2000, 1),
    "GuidedSampler": (lambda: inverse.GuidedSampler(inverse.TMPDGuide(), DPMSolver2MSDE(), steps=20), 2000, 1),
    "MCGdiff": (lambda: inverse.MCGdiff(steps=20, runs=1), 2000, 1),
    "MGPS": (lambda: inverse.MGPS(steps=12), 500, 1),
    "MPGD": (lambda: inverse.MPGD(steps=20), 2000, 1),
    "MomentMatching": (lambda: inverse.MomentMatching(steps=4), 2000, 1),
    "NoiseSpace(EllipticalSlice)": (lambda: ppl.NoiseSpace(ppl.EllipticalSlice(warmup=200)), 100, 128),
    "NoiseSpace(HMC)": (lambda: ppl.NoiseSpace(ppl.HMC(warmup=100)), 50, 64),
    "NoiseSpace(NUTS)": (lambda: ppl.NoiseSpace(ppl.NUTS(warmup=100)), 200, 2),
    "NoiseSpace(SVI)": (lambda: ppl.NoiseSpace(ppl.SVI(guide=ppl.FullRank(), steps=300)), 2000, 1),
    "NoiseSpace(Transport(HMC))": (
        lambda: ppl.NoiseSpace(ppl.Transport(ppl.HMC(warmup=100), ppl.SVI(guide=ppl.FullRank(), steps=300))),
        50,
        64,
    ),
    "ParallelTempering": (lambda: inverse.ParallelTempering(levels=3, warmup=50), 50, 64),
    "PiGDM": (lambda: inverse.PiGDM(steps=30), 2000, 1),
    # One draw a chain: draws of a biased chain are not independent, and nothing says how many they are worth.
    "PnPDM": (lambda: inverse.PnPDM(steps=5, warmup=20), 1, 500),
    "REDDiff": (lambda: inverse.REDDiff(steps=100, scale="likelihood"), 2000, 1),
    "ReSample": (lambda: inverse.ReSample(steps=20, every=4), 2000, 1),
    "ScorePriorVI": (lambda: inverse.ScorePriorVI(guide=ppl.FullRank(), steps=400), 2000, 1),
    "SplitGibbs": (lambda: inverse.SplitGibbs(steps=5, warmup=100), 50, 64),
    "TwistedSMC": (lambda: inverse.TwistedSMC(steps=8, runs=1), 2000, 1),
    "TwistedSMC(PiGDM)": (lambda: inverse.TwistedSMC(steps=20, guide=inverse.PiGDMGuide(), runs=1), 2000, 1),
}


def summary(posterior: ppl.Posterior) -> tuple[Tensor, Tensor]:
    """Means of x and of its squares, and their standard errors, (8,) each."""
    x = posterior["x"].cpu().double()
    values = torch.cat([x, x.square()], -1)
    total = x.shape[0] * x.shape[1]
    if "root_ess" in posterior.info:
        size = torch.full((8,), 1 / (1 / total + 1 / float(posterior.info["root_ess"].sum())))
    elif posterior.attrs["exact"] == "in_the_limit":
        size = ess_of(values).clamp(max=total)
    else:
        size = torch.full((8,), float(total))
    return values.mean((0, 1)), values.std((0, 1)) / size.sqrt()


def path_problem(device: str, fractional: bool = True) -> ppl.Program:
    """A linear path of three times on one device, its noise Brownian or started from hidden factors."""
    process = Process(lambda x, t: -x, 1.0, MarkovNoise(0.7, 1.0, "I", 2) if fractional else BrownianNoise())
    times = torch.tensor([0.3, 0.6, 1.0], dtype=F64, device=device)
    path = Path(process, times, torch.zeros(1, dtype=F64, device=device), dt=None if fractional else 0.01)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], 0.5).to_event(1), obs=y)

    return ppl.Program(model, torch.tensor([0.3, -1.0, 0.4], dtype=F64, device=device), compile="never")


PATH_CASES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "GuidedParticleFilter": (inverse.GuidedParticleFilter, 2000, 1),
    "GuidedParticleFilter(Uncontrolled)": (
        lambda: inverse.GuidedParticleFilter(control=Uncontrolled()),
        2000,
        1,
    ),
    "ParticleGibbs": (lambda: inverse.ParticleGibbs(8, control=Uncontrolled(), warmup=10), 20, 64),
}


def test_every_backend_of_diffusion_priors_has_a_case() -> None:
    """Two are left out: one draws other sites as well, and a network trained twice is not one law."""
    ours = {n for n, c in registered().items() if c.__module__.partition(".")[0] == "inverse"}
    assert ours - {n.partition("(")[0] for n in (*CASES, *PATH_CASES, "SDEMatching")} == {
        "AmortisedDenoiser",
        "NuisanceSMC",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", PATH_CASES)
def test_engines_of_paths_agree_with_the_exact_posterior_on_cuda(name: str) -> None:
    """False alarm 1e-4 for each."""
    make, draws, chains = PATH_CASES[name]
    posterior = check_path_backend(make(), path_problem("cuda"), draws=draws, chains=chains)
    assert posterior["x"].device.type == "cuda"


@pytest.mark.gpu
def test_sde_matching_agrees_with_the_exact_posterior_on_cuda() -> None:
    """Allowed a bias of 0.1: a fit whose draws take steps of 0.01."""
    engine = inverse.SDEMatching(steps=600, particles=32, lr=0.05, knots=3)
    posterior = check_path_backend(engine, path_problem("cuda", False), draws=2000, chains=1, bias=0.1)
    assert posterior["x"].device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cpu_and_cuda_agree_in_law(name: str) -> None:
    """First and second moments within Monte-Carlo error of both; false alarm 1e-4 for each backend."""
    make, draws, chains = CASES[name]
    found = {}
    for device in ("cpu", "cuda"):
        posterior = ppl.infer(problem(device), make(), draws=draws, chains=chains, seed=1)
        assert posterior["x"].device.type == device
        found[device] = summary(posterior)
    (a, sa), (b, sb) = found["cpu"], found["cuda"]
    assert float(((a - b) / (sa.square() + sb.square()).sqrt()).abs().max()) < z_bound(1e-4, 8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend",
    [
        inverse.TwistedSMC(steps=3, particles=12, runs=2),
        inverse.DPS(steps=4),
        inverse.AmortisedDenoiser(steps=6, batch=8, width=8, depth=1, levels=4, correct=True),
        inverse.ParallelTempering(levels=3, warmup=20),
        ppl.NoiseSpace(ppl.DistributionTransformer(2, 8, 2, 1, 8, steps=6, batch=8)),
        ppl.NoiseSpace(ppl.HMC(warmup=20, max_steps=8)),
        ppl.NoiseSpace(ppl.SVI(guide=ppl.FullRank(), steps=8)),
        ppl.NoiseSpace(ppl.EllipticalSlice(warmup=4)),
    ],
    ids=[
        "TwistedSMC",
        "DPS",
        "AmortisedDenoiser",
        "ParallelTempering",
        "DistributionTransformer",
        "HMC",
        "SVI",
        "EllipticalSlice",
    ],
)
def test_contract_on_cuda(backend: Any) -> None:
    """Seeds, shapes, devices, interruption and files, as on the CPU; sums on a GPU may differ in their last digits."""
    check_backend(backend, problem("cuda"), rtol=1e-6)


@pytest.mark.gpu
def test_data_on_another_device_than_the_prior() -> None:
    program = problem("cuda")
    with pytest.raises(DataError, match=r"cuda.*cpu.*\.to\("):
        ppl.Program(program.model, program.data["y"].cpu())


def test_the_problem_runs_on_the_cpu() -> None:
    """The test itself, where no GPU is: the summary of exact draws is that of the exact posterior."""
    program = problem("cpu")
    mean, stderr = summary(ppl.infer(program, inverse.Exact(), draws=2000, seed=0))
    other, _ = summary(ppl.infer(program, inverse.TwistedSMC(steps=8, runs=1), draws=2000, seed=1))
    assert float(((mean - other) / stderr / 2**0.5).abs().max()) < z_bound(1e-4, 8)


@pytest.mark.parametrize("name", [n for n in CASES if "NoiseSpace" not in n])
def test_every_case_runs(name: str) -> None:
    make, _, _ = CASES[name]
    assert ppl.infer(problem("cpu"), make(), draws=4, chains=1)["x"].shape == (1, 4, 4)
