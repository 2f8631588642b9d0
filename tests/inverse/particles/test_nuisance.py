"""Nuisance parameters beside a diffusion site: particles that carry them, and Gibbs, against quadrature.

p(theta | y) is p(theta) p(y | theta) with the exact evidence of the mixture at every theta of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse.particles.carried
import inverse.particles.lane_twist
import ppl
from inverse import MomentClosure, NoiseAndReturn, NuisanceSMC, PiGDMGuide
from inverse.operators import Dense
from inverse.particles.carried import CarriedGuide, CarriedProblem
from inverse.particles.lane_likelihood import LaneReader, walk, walk_noise
from inverse.particles.lane_twist import FactoredTwist, SpectralTwist
from ppl.cost import Cost
from ppl.diagnostics.ess import ess_of, z_bound
from ppl.errors import CapabilityError, OptionError
from sde import DiffusionPrior, GaussianMixture, JointPrior
from sde.solvers import DPMSolver2MSDE

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


D, M = 4, 3
ROOT = randn(D, D) / D**0.5
GAUSSIAN = GaussianMixture(
    torch.ones(1, dtype=F64), 0.5 * randn(1, D, seed=1), (ROOT @ ROOT.T + 0.1 * torch.eye(D, dtype=F64))[None]
)
MIXTURE = GaussianMixture(
    torch.tensor([0.4, 0.6], dtype=F64),
    torch.tensor([[-1.0, -0.5, -1.0, 0.0], [1.0, 0.5, 0.5, 1.0]], dtype=F64),
    torch.tensor([0.4, 0.6], dtype=F64),
)
A = randn(M, D, seed=2)
Y = torch.tensor([0.7, -1.1, 0.4], dtype=F64)
EYE, SHIFT = torch.eye(D, dtype=F64), torch.roll(torch.eye(D, dtype=F64), 1, 0)


@dataclass(frozen=True)
class Kind:
    """One nuisance parameter: its prior on the coordinate u that is compared, and what it does to y = A x + n."""

    prior: Callable[[], Any]
    coordinate: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    log_prior: Callable[[Tensor], Tensor]
    grid: Tensor
    noise: Callable[[Any], Any] = lambda t: 0.4
    matrix: Callable[[Any], Any] = lambda t: A
    offset: Callable[[Any], Any] = lambda t: 0.0


# fmt: off
def log_normal(m: float, s: float, **effect: Any) -> Kind:
    """In u = log theta."""
    return Kind(
        lambda: dist.LogNormal(number(m), s), torch.log, torch.exp, dist.Normal(m, s).log_prob,
        torch.linspace(m - 6 * s, m + 6 * s, 801, dtype=F64), **effect,
    )


KINDS = {
    "noise": log_normal(-0.7, 0.6, noise=lambda t: t),
    "gain": log_normal(0.0, 0.4, matrix=lambda t: t * A),
    "offset": Kind(
        lambda: dist.Normal(number(0.0), 1.0), lambda t: t, lambda u: u, dist.Normal(0.0, 1.0).log_prob,
        torch.linspace(-6, 6, 801, dtype=F64), offset=lambda t: t,
    ),
    "width": Kind(
        lambda: dist.Uniform(number(0.0), 1.0), lambda t: t, lambda u: u, lambda u: 0 * u,
        (torch.arange(800, dtype=F64) + 0.5) / 800, matrix=lambda t: A @ ((1 - t) * EYE + t * SHIFT),
    ),
}
# fmt: on


# One measurement and one random direction see two of four directions of C: its low-rank form is not all of it.
KINDS_ONE = {
    "noise": replace(KINDS["noise"], matrix=lambda t: A[:1]),
    "gain": replace(KINDS["gain"], matrix=lambda t: t * A[:1]),
    "width": replace(KINDS["width"], matrix=lambda t: A[:1] @ ((1 - t) * EYE + t * SHIFT)),
}


def program_of(kind: Kind, prior: Any, y: Tensor = Y) -> ppl.Program:
    def model(y: Tensor) -> None:
        t = pyro.sample("t", kind.prior())
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ kind.matrix(t).T + kind.offset(t), kind.noise(t)).to_event(1), obs=y)

    return ppl.Program(model, y)


@dataclass(frozen=True)
class Reference:
    """log p(y), mean and variance of u, mean of x, E[u^2 x_0] less its parts' product, by quadrature over u."""

    log_evidence: Tensor
    mean: Tensor
    variance: Tensor
    x: Tensor


def quadrature(kind: Kind, prior: GaussianMixture, y: Tensor = Y) -> Reference:
    u = kind.grid
    terms, means = [], []
    for t in kind.value(u):
        data = (kind.matrix(t), y - kind.offset(t), float(kind.noise(t)) ** 2)
        terms.append(prior.log_evidence(*data))
        means.append(prior.condition_linear(*data).mean)
    log_joint = kind.log_prior(u) + torch.stack(terms) + (u[1] - u[0]).log()
    weight = torch.softmax(log_joint, 0)
    mean = weight @ u
    return Reference(log_joint.logsumexp(0), mean, weight @ (u - mean).square(), weight @ torch.stack(means))


def deviations(kind: Kind, posterior: ppl.Posterior, reference: Reference) -> Tensor:
    """(chain, draw, 2 + D): u and its square, and x, less their expectations."""
    u = kind.coordinate(posterior["t"]) - reference.mean
    return torch.cat([torch.stack([u, u.square() - reference.variance], -1), posterior["x"] - reference.x], -1)


CASES = [
    # Mixtures take forty levels instead of eight, and two of them are left for the slow tests.
    pytest.param(n, p, id=f"{n}-{k}", marks=pytest.mark.slow if k == "mixture" and n in ("noise", "width") else ())
    for n in KINDS
    for k, p in (("gaussian", GAUSSIAN), ("mixture", MIXTURE))
]


@pytest.mark.parametrize(("name", "prior"), CASES)
def test_particles_that_carry_a_parameter(name: str, prior: GaussianMixture) -> None:
    """Mean and variance of the parameter, means of x, evidence: 7 statistics, false alarm 1e-4 for each of eight cases.

    Errors from the root ESS, honest within 1.3. Power: with 1,000 roots, parameters left where the prior drew them
    (no moves) lose all but a few roots; a weight taken after the moves shifts the evidence by more than its error.
    """
    kind = KINDS[name]
    reference = quadrature(kind, prior)
    steps = 8 if prior is GAUSSIAN else 40
    backend = NuisanceSMC(steps=steps, particles=1500, runs=3)
    posterior = ppl.infer(program_of(kind, prior), backend, draws=1500, seed=0)
    found = deviations(kind, posterior, reference)[0]
    size = 1 / (1 / len(found) + 1 / float(posterior.info["root_ess"].sum()))
    assert size > 150
    z = found.mean(0) / found.std(0) * math.sqrt(size)
    assert posterior.log_evidence is not None
    z_evidence = (posterior.log_evidence.value - reference.log_evidence) / posterior.log_evidence.stderr
    assert float(torch.cat([z, z_evidence[None]]).abs().max()) < 1.3 * z_bound(1e-4, 7)
    assert len(posterior["t"].unique()) == 1500  # draws of one ancestor part in the end
    assert posterior.cost.denoiser_calls == steps * int(posterior.info["runs"])


def network() -> DiffusionPrior:
    """The Gaussian prior, of which the denoiser alone is known."""
    high = 5 * GAUSSIAN.data_std
    return DiffusionPrior(GAUSSIAN.denoise, (D,), sigma_min=0.02, sigma_max=high, data_std=GAUSSIAN.data_std, dtype=F64)


def check_network(kind: Kind, backend: NuisanceSMC, y: Tensor) -> ppl.Posterior:
    """Seven statistics against quadrature, with 0.05 sd of slack for the discretisation of the prior."""
    reference = quadrature(kind, GAUSSIAN, y)
    posterior = ppl.infer(program_of(kind, network(), y), backend, draws=1000, seed=0)
    found = deviations(kind, posterior, reference)[0]
    size = 1 / (1 / len(found) + 1 / float(posterior.info["root_ess"].sum()))
    assert size > 100
    z = (found.mean(0) / found.std(0)).abs()
    assert float(z.max()) < 1.3 * z_bound(1e-4, 7) / math.sqrt(size) + 0.05
    assert posterior.log_evidence is not None
    gap = abs(float(posterior.log_evidence.value - reference.log_evidence))
    assert gap < 1.3 * z_bound(1e-4, 7) * float(posterior.log_evidence.stderr) + 0.05
    return posterior


@pytest.mark.parametrize("name", ["noise", "gain", pytest.param("offset", marks=pytest.mark.slow)])
def test_led_particles_for_networks(name: str) -> None:
    """A prior that is only a denoiser, PiGDM in the second-order solver."""
    check_network(KINDS[name], NuisanceSMC(steps=50, particles=1000, runs=2), Y)


@pytest.mark.parametrize("name", ["noise", pytest.param("gain", marks=pytest.mark.slow), "width"])
def test_closure_of_networks(name: str) -> None:
    """Particles moved with the low-rank covariance of a network, two of four directions of it; no denoiser for moves.

    Power: a covariance that is not the same in the draw and in the weight shifts the evidence; so does one that moves
    with the parameters.
    """
    steps, guide = 40, MomentClosure(random=1)
    posterior = check_network(KINDS_ONE[name], NuisanceSMC(steps=steps, particles=1000, runs=2, guide=guide), Y[:1])
    runs = int(posterior.info["runs"])
    assert posterior.cost.denoiser_calls == steps * runs
    assert posterior.cost.vjps == 2 * 1000 * steps * runs


def test_closure_of_networks_goes_in_chunks() -> None:
    program = program_of(KINDS["noise"], network())
    whole, parts = (
        ppl.infer(program, NuisanceSMC(steps=4, particles=10, runs=1, guide=MomentClosure(), chunk=c), draws=10)
        for c in (None, 3)
    )
    torch.testing.assert_close(parts["x"], whole["x"])
    torch.testing.assert_close(parts["t"], whole["t"])


def test_many_measurements_have_the_same_twist_as_few() -> None:
    """log psi, its gradient and the led estimate agree between the factored and the spectral form."""
    for name in ("noise", "gain", "offset"):
        program = program_of(KINDS[name], GAUSSIAN)
        reader = LaneReader(program)
        lane = reader(reader.sample_prior(6, torch.Generator().manual_seed(0)))
        factored, spectral = FactoredTwist(reader), SpectralTwist(reader)
        mean = randn(6, D, seed=3)
        seen, gram = factored.seen(lane, mean), factored.gram(lane, 0.3)
        torch.testing.assert_close(spectral.value(lane, spectral.seen(mean), 0.3), factored.value(lane, seen, gram))
        torch.testing.assert_close(
            spectral.gradient(lane, spectral.seen(mean), 0.3), factored.gradient(lane, seen, gram)
        )
        slope = torch.func.grad(lambda m: factored.value(lane, factored.seen(lane, m), gram).sum())(mean)  # noqa: B023
        torch.testing.assert_close(factored.gradient(lane, seen, gram), slope)


def test_the_twist_is_the_evidence_for_a_gaussian_prior() -> None:
    """psi(x; theta) = p(y | x_sigma, theta) exactly, for every kind of parameter and every particle's own."""
    for kind in KINDS.values():
        reader = LaneReader(program_of(kind, GAUSSIAN))
        z = reader.sample_prior(5, torch.Generator().manual_seed(1))
        lane, twist = reader(z), FactoredTwist(reader)
        x = 2 * randn(5, D, seed=4)
        covariance = GAUSSIAN.covariance(x, 0.8)
        found = twist.value(lane, twist.seen(lane, covariance.mean), twist.gram(lane, twist.towards(lane, covariance)))
        values = reader.values(x, z)["t"]
        for i, t in enumerate(values):
            matrix = kind.matrix(t)
            spread = matrix @ covariance.dense()[i] @ matrix.T + float(kind.noise(t)) ** 2 * torch.eye(M, dtype=F64)
            expected = dist.MultivariateNormal(matrix @ covariance.mean[i] + kind.offset(t), spread).log_prob(Y)
            torch.testing.assert_close(found[i], expected)
        prior = kind.log_prior(kind.coordinate(values))
        if kind is not KINDS["width"]:  # a uniform has a Jacobian
            torch.testing.assert_close(lane["log_prior"], prior)


def test_metropolis_steps_leave_their_target_invariant() -> None:
    """20,000 exact draws of a skewed pair stay what they are: 4 statistics at 5 standard errors, 2e-6."""
    generator = torch.Generator().manual_seed(0)

    def at(z: Tensor) -> dict[str, Tensor]:
        return {"z": z, "log_target": z[:, 0] - z[:, 0].exp() - 0.5 * (z[:, 1] - z[:, 0]).square()}

    first = torch.log(-torch.log(torch.rand(20_000, generator=generator, dtype=F64)))  # exp is exponential
    start = torch.stack([first, first + torch.randn(20_000, generator=generator, dtype=F64)], 1)
    moved = walk(at(start), at, torch.ones(2, dtype=F64), walk_noise(20_000, 8, generator, start))["z"]
    assert float((moved != start).double().mean()) > 0.5
    difference = moved[:, 1] - moved[:, 0]
    checks = [
        (moved[:, 0].exp(), 1.0),
        (moved[:, 0].exp().square(), 2.0),
        (difference, 0.0),
        (difference.square(), 1.0),
    ]
    for values, expected in checks:
        assert abs(float(values.mean()) - expected) < 5 * float(values.std()) / math.sqrt(20_000)


def test_two_sources_and_two_parameters() -> None:
    """y = x_1 + g x_2 + s n with g and s unknown: the evidence by quadrature over both; false alarm 1e-4."""
    one, two = GAUSSIAN, MIXTURE

    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(number(-0.7), 0.4))
        a, b = pyro.sample("a", one), pyro.sample("b", two)
        g = pyro.sample("g", dist.Normal(number(1.0), 0.3))
        pyro.sample("y", dist.Normal((a + g * b) @ A.T, s).to_event(1), obs=y)

    posterior = ppl.infer(ppl.Program(model, Y), NuisanceSMC(steps=40, particles=1500, runs=2), draws=500, seed=0)
    joint = JointPrior([one, two])
    s, g = torch.linspace(-2.7, 1.3, 41, dtype=F64), torch.linspace(-0.5, 2.5, 41, dtype=F64)
    log_joint = torch.stack(
        [
            torch.stack([joint.log_evidence(torch.cat([A, v * A], 1), Y, float(u.exp()) ** 2) for v in g])
            + dist.Normal(-0.7, 0.4).log_prob(u)
            for u in s
        ]
    ) + dist.Normal(1.0, 0.3).log_prob(g)
    expected = log_joint.flatten().logsumexp(0) + ((s[1] - s[0]) * (g[1] - g[0])).log()
    assert posterior.log_evidence is not None
    z = (posterior.log_evidence.value - expected) / posterior.log_evidence.stderr
    assert abs(float(z)) < 1.3 * z_bound(1e-4)
    weight = torch.softmax(log_joint.flatten(), 0).reshape(log_joint.shape)
    mean = (weight.sum(0) * g).sum()
    size = 1 / (1 / 500 + 1 / float(posterior.info["root_ess"].sum()))
    found = posterior.flatten("g")
    assert abs(float(found.mean() - mean)) < 1.3 * z_bound(1e-4) * float(found.std()) / math.sqrt(size)
    assert {n: v.shape for n, v in posterior.draws.items()} == {
        "s": (1, 500), "a": (1, 500, D), "b": (1, 500, D), "g": (1, 500)
    }  # fmt: skip


def test_parameters_of_parameters_and_deterministic_sites() -> None:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(number(0.0), 0.5))
        s = pyro.sample("s", dist.LogNormal(m, 0.3))
        x = pyro.sample("x", GAUSSIAN)
        pyro.deterministic("clean", s * (x @ A.T))
        with pyro.plate("rows", M):
            pyro.sample("y", dist.Normal(x @ A.T, s), obs=y)

    posterior = ppl.infer(ppl.Program(model, Y), NuisanceSMC(steps=4, runs=1), draws=30, chains=2)
    clean = posterior["s"][..., None] * (posterior["x"] @ A.T)
    torch.testing.assert_close(posterior["clean"], clean)


def exact_draw(kind: Kind, prior: GaussianMixture) -> ppl.ConditionalDraw:
    """x given theta and y for a Gaussian prior, in closed form and for all chains at once."""

    def draw(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        t = values["t"]
        matrix = torch.stack([kind.matrix(v) for v in t])
        noise = torch.as_tensor(kind.noise(t), dtype=F64).expand(len(t)).reshape(-1, 1, 1)
        data = Y - torch.as_tensor(kind.offset(t), dtype=F64).expand(len(t))[:, None]
        inverse = torch.linalg.inv(prior.covariances[0])
        precision = inverse + matrix.mT @ matrix / noise.square()
        pull = inverse @ prior.means[0] + (matrix.mT @ data[..., None] / noise.square())[..., 0]
        root = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve(pull[..., None], root)[..., 0]
        z = torch.randn(len(t), D, 1, generator=generator, dtype=F64)
        return {"x": mean + torch.linalg.solve_triangular(root.mT, z, upper=True)[..., 0]}

    return ppl.ConditionalDraw(draw)


def check_chains(kind: Kind, posterior: ppl.Posterior, reference: Reference) -> None:
    """Six statistics, each with its own ESS; false alarm 1e-4."""
    found = deviations(kind, posterior, reference)
    z = found.mean((0, 1)) / found.std((0, 1)) * ess_of(found).sqrt()
    assert float(z.abs().max()) < z_bound(1e-4, 2 + D)


@pytest.mark.parametrize("name", KINDS)
def test_gibbs_has_the_same_posterior(name: str) -> None:
    """Blocks for all kinds of parameter, blur width included: slices for theta beside exact draws of x."""
    kind = KINDS[name]
    gibbs = ppl.Gibbs({"x": exact_draw(kind, GAUSSIAN), "t": ppl.SliceKernel()}, warmup=40)
    posterior = ppl.infer(program_of(kind, GAUSSIAN), gibbs, draws=150, chains=48, seed=0)
    check_chains(kind, posterior, quadrature(kind, GAUSSIAN))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gain", "offset", "width"])
def test_gibbs_with_a_particle_kernel_has_the_same_posterior(name: str) -> None:
    """The noise level is in test_noise_and_return.py."""
    kind = KINDS[name]
    kernels = {("x",): NoiseAndReturn(level=2.0, steps=6, particles=8), ("t",): ppl.SliceKernel()}
    posterior = ppl.infer(program_of(kind, GAUSSIAN), ppl.Gibbs(kernels, warmup=20), draws=150, chains=6, seed=0)
    check_chains(kind, posterior, quadrature(kind, GAUSSIAN))


def of(observe: Callable[[Tensor, Tensor], Any], data: Tensor = Y, theta: Any = None) -> ppl.Program:
    def model(y: Tensor) -> None:
        t = pyro.sample("t", dist.LogNormal(number(0.0), 0.5) if theta is None else theta)
        x = pyro.sample("x", GAUSSIAN)
        pyro.sample("y", observe(x, t), obs=y)

    return ppl.Program(model, data)


UNFIT: dict[str, tuple[Callable[[], ppl.Program], str]] = {
    "family": (lambda: of(lambda x, t: dist.Poisson((t * x[..., :3]).exp()).to_event(1), Y.abs().round()), "Poisson"),
    "square": (lambda: of(lambda x, t: dist.Normal(x[..., :3] ** 2, t).to_event(1)), "not linear"),
    "square elsewhere": (
        lambda: of(lambda x, t: dist.Normal(x[..., :3] + (t - 1).clamp(min=0) * x[..., :3] ** 3, 1.0).to_event(1)),
        "not linear",
    ),
    "mask": (lambda: of(lambda x, t: dist.Normal(x[..., :3], 1.0).mask(Y > 0).to_event(1)), "masks"),
    "discrete": (
        lambda: of(lambda x, t: dist.Normal(t * x[..., :3], 1.0).to_event(1), Y, dist.Bernoulli(number(0.5))),
        "discrete",
    ),
    "correlated": (
        lambda: of(lambda x, t: dist.MultivariateNormal(x[..., :3], t * torch.eye(3, dtype=F64))),
        "independent noise",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_carried_says_so(name: str) -> None:
    program, message = UNFIT[name]
    with pytest.raises(CapabilityError, match=message):
        ppl.infer(program(), NuisanceSMC(steps=3), draws=5)


def test_large_problems_and_programs_without_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapabilityError, match="TwistedSMC"):
        LaneReader(
            ppl.Program(
                lambda y: pyro.sample("y", dist.Normal(pyro.sample("x", GAUSSIAN), 1.0).to_event(1), obs=y), randn(D)
            )
        )
    monkeypatch.setattr(inverse.particles.lane_likelihood, "DENSE_LIMIT", 4)
    with pytest.raises(CapabilityError, match="too large"):
        LaneReader(program_of(KINDS["width"], GAUSSIAN))
    two = of(lambda x, t: dist.Normal(x[..., :3], torch.stack([t, t.new_tensor(1.0), t])).to_event(1))
    with pytest.raises(CapabilityError, match="one factor"):
        SpectralTwist(LaneReader(two))
    with pytest.raises(OptionError, match="moves"):
        NuisanceSMC(moves=0)
    with pytest.raises(OptionError, match="MomentClosure"):
        NuisanceSMC(guide=PiGDMGuide())  # type: ignore[arg-type]
    monkeypatch.setattr(inverse.particles.carried, "SMALL", 2)
    with pytest.raises(OptionError, match="up to 64 measurements"):
        ppl.infer(program_of(KINDS["noise"], network()), NuisanceSMC(steps=3, guide=MomentClosure()), draws=5)
    prior = DiffusionPrior(lambda x, sigma, label: x / 2 + label[:, None], (D,), dtype=F64)

    def labelled(y: Tensor) -> None:
        t = pyro.sample("t", dist.Normal(number(0.0), 1.0))
        x = pyro.sample("x", prior(label=t))
        pyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="prior of x depends"):
        LaneReader(ppl.Program(labelled, randn(D)))


def test_chunks_change_nothing() -> None:
    program = of(lambda x, t: dist.Normal(Dense(A)(x), t).to_event(1))
    problem = CarriedProblem.read(program)
    rows = torch.cat([randn(7, D), randn(7, 1, seed=5)], 1)
    levels = GAUSSIAN.sigmas(4)
    states = []
    for chunk in (None, 3):
        kernel = CarriedGuide(problem, levels, 2, DPMSolver2MSDE(), chunk, Cost())
        population, increment = kernel.move(kernel.at(rows, 0), 0, torch.Generator().manual_seed(0))
        states.append(torch.cat([population.x.flatten(), population.guide_state["z"].flatten(), increment]))
    torch.testing.assert_close(states[0], states[1], rtol=1e-10, atol=1e-10)
