"""The neural control of a path: a normalised guide, and a bound that reaches the exact evidence of linear programs."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from inverse.paths import ControlGuide, linear_control_of
from inverse.paths.linear_control import linearised_control
from ppl.errors import CapabilityError, OptionError, ShapeError
from ppl.flat import FlatDensity
from ppl.pareto import smooth_tail
from ppl.vi.fitted import bound_guide
from sde import BrownianNoise, MarkovNoise, Path, Process

DOUBLE = torch.float64


def path_of(noise: object, steps: int = 6) -> Path:
    process = Process(lambda x, t: -x, 1.0, noise)  # type: ignore[arg-type]
    return Path(process, torch.linspace(1 / steps, 1, steps, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))


def program_of(path: Path) -> ppl.Program:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], 0.3), obs=y)

    return ppl.Program(model, torch.tensor(1.2, dtype=DOUBLE))


NOISES = {"brownian": BrownianNoise(), "II": MarkovNoise(0.3, 1.0), "I": MarkovNoise(0.7, 1.0, "I", 3)}


@pytest.mark.parametrize("name", list(NOISES))
def test_guide_is_normalised_and_its_density_is_that_of_its_draws(name: str) -> None:
    """log q against the Jacobian of the map from noise to draws, at three points and random parameters."""
    program = program_of(path_of(NOISES[name], 4)).noise_space()
    flat = program.flat()
    guide = ControlGuide(path_of(NOISES[name], 4), width=8).bind(flat.layout)
    generator = torch.Generator().manual_seed(0)
    params = guide.init(flat.dim, DOUBLE, torch.device("cpu"), generator)
    params = {n: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=DOUBLE) for n, v in params.items()}
    noise = guide.noise(3, flat.dim, DOUBLE, generator)
    z, log_q = guide.rsample_and_log_prob(params, noise)
    torch.testing.assert_close(guide.log_prob(params, z), log_q)

    def draw(e: Tensor) -> Tensor:
        return guide.rsample_and_log_prob(params, e[None])[0][0]

    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(draw, noise[i])
        expected = dist.Normal(0.0, 1.0).log_prob(noise[i]).sum() - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_q[i], expected)


@pytest.mark.parametrize("name", list(NOISES))
def test_bound_reaches_the_evidence(name: str) -> None:
    """ELBO of 2000 draws within 0.02 nat below the exact evidence, and never above it by 4.5 standard errors."""
    path = path_of(NOISES[name])
    program = program_of(path)
    exact = ppl.infer(program, inverse.Exact(), draws=4, progress=False).log_evidence
    assert exact is not None
    engine = ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(path, width=32), steps=400, lr=0.02, particles=64))
    posterior = ppl.infer(program, engine, draws=2000, progress=False)
    value = posterior.info["lp"].double() - posterior.info["log_q"].double()
    stderr = float(value.std()) / 2000**0.5
    gap = float(exact.value) - float(value.mean())
    assert -4.5 * stderr < gap < 0.02 + 4.5 * stderr
    assert float(posterior.info["pareto_k"].max()) < 0.7


def test_without_training_it_is_the_prior() -> None:
    path = path_of(BrownianNoise())
    guide = ControlGuide(path).bind(program_of(path).noise_space().flat().layout)
    params = guide.init(6, DOUBLE, torch.device("cpu"), torch.Generator().manual_seed(0))
    noise = torch.randn(5, 6, dtype=DOUBLE)
    z, log_q = guide.rsample_and_log_prob(params, noise)
    torch.testing.assert_close(z, noise)
    torch.testing.assert_close(log_q, dist.Normal(0.0, 1.0).log_prob(noise).sum(1))


# The two forms of the bound, at the best control.

FIVE = [("II", 0.3, 0.0), ("II", 0.7, 0.0), ("II", 0.7, 1.0), ("I", 0.3, 1.0), ("I", 0.7, 0.0)]


def bridge(kind: str, hurst: float, theta: float) -> ppl.Program:
    """One datum at the end, noise 0.1, a hundred steps."""
    noise = MarkovNoise(hurst, 2.0, kind, factors=5, grid="paper", unit=False, zero=False)  # type: ignore[arg-type]
    process = Process(lambda x, t: -theta * x, 1.0, noise)
    path = Path(process, torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE), dt=0.02)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0], 0.1), obs=y)

    return ppl.Program(model, torch.tensor(1.0, dtype=DOUBLE))


def starting(guide: ControlGuide, program: ppl.Program) -> tuple[ControlGuide, dict[str, Tensor], FlatDensity]:
    """The guide on a program's noise space, with its first parameters."""
    flat = program.noise_space().flat()
    bound = bound_guide(guide, flat)
    assert isinstance(bound, ControlGuide)
    return bound, bound.init(flat.dim, DOUBLE, torch.device("cpu"), torch.Generator().manual_seed(0)), flat


@pytest.mark.parametrize(("kind", "hurst", "theta"), FIVE)
@pytest.mark.parametrize("around", ["given", "linear"])
def test_around_the_exact_control_every_path_has_the_evidence(
    kind: str, hurst: float, theta: float, around: str
) -> None:
    """log p - log q is log p(y) to rounding; the energy form has the same mean and the noise of int u dW."""
    program = bridge(kind, hurst, theta)
    exact = linear_control_of(program)
    guide, params, flat = starting(ControlGuide(around=exact if around == "given" else "linear", width=4), program)
    noise = guide.noise(400, flat.dim, DOUBLE, torch.Generator().manual_seed(1))
    with torch.no_grad():
        z, log_q = guide.rsample_and_log_prob(params, noise)
        _, cost = ControlGuide.rsample_and_cost(replace(guide, elbo="energy"), params, noise)
        log_p = flat.log_density(z)
        again = guide.log_prob(params, z)
    torch.testing.assert_close(log_p - log_q, exact.log_evidence.expand(400), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(again, log_q, rtol=1e-9, atol=1e-8)
    energy = log_p - cost
    assert float(energy.std()) > 0.5
    assert abs(float(energy.mean() - exact.log_evidence)) < 4.5 * float(energy.std()) / 20  # false alarm 7e-6


@pytest.mark.parametrize(("kind", "hurst", "theta"), FIVE)
def test_svi_with_the_exact_control_keeps_the_evidence(kind: str, hurst: float, theta: float) -> None:
    """The gap stays below 0.01 nat, and the spread over paths below 0.3.

    Path gradients are zero there, draw by draw; what is left is rounding, which Adam makes steps of its rate.
    """
    program = bridge(kind, hurst, theta)
    exact = linear_control_of(program)
    engine = ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(around=exact, width=4), steps=3, lr=1e-3, particles=8))
    posterior = ppl.infer(program, engine, draws=400, progress=False)
    value = posterior.info["lp"] - posterior.info["log_q"]
    assert abs(float(exact.log_evidence - value.mean())) < 0.01
    assert float(value.std()) < 0.3


@pytest.mark.parametrize("name", list(NOISES))
def test_both_forms_of_the_bound_have_one_mean(name: str) -> None:
    """At a control that is far from the best, with scales that are not one: the difference has mean zero.

    False alarm 7e-6. Without the term of the scales the mean would be off by 0.5 (s^2 - 1) for every step.
    """
    program = program_of(path_of(NOISES[name], 4))
    guide, params, flat = starting(ControlGuide(width=8, elbo="energy"), program)
    generator = torch.Generator().manual_seed(2)
    params = {n: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=DOUBLE) for n, v in params.items()}
    with torch.no_grad():
        excess = guide.drawn(params, guide.noise(20_000, flat.dim, DOUBLE, generator), False)[2]
    assert float(excess.std()) > 0.3
    assert abs(float(excess.mean())) < 4.5 * float(excess.std()) / 20_000**0.5


def test_fit_by_the_energy_reaches_the_evidence_too() -> None:
    """Its fit is noisier: 0.05 nat, where the pathwise fit of the same length is within 0.02."""
    path = path_of(BrownianNoise())
    program = program_of(path)
    exact = float(linear_control_of(program).log_evidence)
    engine = ppl.SVI(guide=ControlGuide(path, width=16, elbo="energy"), steps=300, lr=0.02, particles=32)
    elbo = engine.fit(program.noise_space(), seed=0).elbo(4000)
    assert exact - 0.05 - 4.5 * float(elbo.stderr) < float(elbo.value) < exact + 4.5 * float(elbo.stderr)


# Learned drift, diffusion and Hurst index.

TIMES = torch.linspace(0.25, 2, 8, dtype=DOUBLE)
RECORD = torch.tensor([0.9, 0.5, 0.7, 0.1, -0.3, 0.0, 0.4, 0.6], dtype=DOUBLE)


def ou(theta: Tensor, hurst: Tensor | float, scale: Tensor | float) -> Path:
    noise = MarkovNoise(hurst, 2.0, factors=4, grid=(0.1, 1e3))
    return Path(Process(lambda x, t: -theta * x, scale, noise), TIMES, torch.ones(1, dtype=DOUBLE))


def unknown_ou(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 0.5))
    hurst = pyro.sample("hurst", dist.Uniform(torch.tensor(0.05, dtype=DOUBLE), 0.95))
    scale = pyro.param("scale", torch.tensor(1.0, dtype=DOUBLE), constraint=dist.constraints.positive)
    x = pyro.sample("x", ou(theta, hurst, scale))
    pyro.sample("y", dist.Normal(x[:, 0], 0.2).to_event(1), obs=y)


def exact_unknowns(scale: Tensor, size: int = 24) -> tuple[float, Tensor, Tensor]:
    """Log evidence, and mean and sd of (log theta, H), from a grid of exact evidences."""
    u, h = torch.linspace(-2, 2, size, dtype=DOUBLE), 0.05 + 0.9 * (torch.arange(size, dtype=DOUBLE) + 0.5) / size

    rows, noise = torch.eye(8, dtype=DOUBLE)[..., None], torch.full((8,), 0.04, dtype=DOUBLE)

    def cell(u: Tensor, h: Tensor) -> Tensor:
        return linearised_control(ou(u.exp(), h, scale), rows, RECORD, noise).log_evidence

    points = torch.stack(torch.meshgrid(u, h, indexing="ij"))
    with torch.no_grad():
        found = torch.vmap(cell)(points[0].flatten(), points[1].flatten()).reshape(size, size)
    log = found + dist.Normal(0.0, 0.5).log_prob(u)[:, None]
    weight = log.flatten().softmax(0).reshape(size, size)
    mean = (weight * points).sum((1, 2))
    variance = (weight * (points - mean[:, None, None]).square()).sum((1, 2))
    step = (u[1] - u[0]) * (1 / size)
    return float(log.logsumexp((0, 1)) + step.log()), mean, variance.sqrt()


def test_guide_follows_the_program_of_every_draw() -> None:
    """log q of draws is their density, by the Jacobian of the map from noise, where the path moves with unknowns."""
    program = ppl.Program(unknown_ou, RECORD)
    guide, params, flat = starting(ControlGuide(width=4, around="linear"), program)
    assert guide.own is not None
    generator = torch.Generator().manual_seed(3)
    params = {n: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=DOUBLE) for n, v in params.items()}
    noise = guide.noise(2, flat.dim, DOUBLE, generator)
    z, log_q = guide.rsample_and_log_prob(params, noise)
    torch.testing.assert_close(guide.log_prob(params, z), log_q)

    def draw(e: Tensor) -> Tensor:
        return guide.rsample_and_log_prob(params, e[None])[0][0]

    jacobian = torch.autograd.functional.jacobian(draw, noise[0])
    expected = dist.Normal(0.0, 1.0).log_prob(noise[0]).sum() - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_q[0], expected)
    moved = guide.log_prob({**params, "program.scale": torch.tensor(2.0, dtype=DOUBLE)}, z)
    assert float((moved - log_q).abs().min()) > 0.1  # the learned diffusion is seen


@pytest.mark.slow
def test_drift_diffusion_and_hurst_are_learned_together() -> None:
    """Around the linearised path only the Gaussian of (log theta, H) is not exact: a bound within 0.1 nat.

    A grid of exact evidences at the learned diffusion is the truth. Means within 0.25 posterior sd and standard
    deviations within a quarter: what a Gaussian in logits leaves open, over the Monte-Carlo error of 4000 draws.
    """
    program = ppl.Program(unknown_ou, RECORD)
    guide = ControlGuide(width=4, around="linear")
    posterior = ppl.infer(
        program, ppl.NoiseSpace(ppl.SVI(guide=guide, steps=150, lr=0.05, particles=8)), draws=4000, progress=False
    )
    scale = posterior.parameters["scale"]
    evidence, mean, sd = exact_unknowns(scale)
    elbo, stderr = float(posterior.info["elbo"]), float(posterior.info["elbo_stderr"])
    assert evidence - 0.1 - 4.5 * stderr < elbo < evidence + 4.5 * stderr
    found = torch.stack([posterior.draws["theta"][0].log(), posterior.draws["hurst"][0]])
    assert float(((found.mean(1) - mean) / sd).abs().max()) < 0.25
    assert float((found.std(1) / sd - 1).abs().max()) < 0.25
    for factor in (0.7, 1.4):  # the learned diffusion is the best one
        assert exact_unknowns(scale * factor, 12)[0] < exact_unknowns(scale, 12)[0] + 0.02


@pytest.mark.slow
def test_control_without_a_start_learns_the_same() -> None:
    """Gains and network alone, 3000 steps: a bound within half a nat of the evidence, and never above."""
    program = ppl.Program(unknown_ou, RECORD)
    engine = ppl.SVI(guide=ControlGuide(width=32), steps=3000, lr=0.02, particles=32)
    fitted = engine.fit(program.noise_space(), seed=0)
    elbo, evidence = fitted.elbo(4000), exact_unknowns(fitted.parameters["scale"])[0]
    assert evidence - 0.5 < float(elbo.value) < evidence + 4.5 * float(elbo.stderr)


def test_a_curved_path_is_linearised_for_every_draw() -> None:
    """A double well: around the linearised path the bound is above that of the prior, and below the evidence by SMC."""
    process = Process(lambda x, t: 2.0 * (x - x**3), 0.7)
    path = Path(process, torch.linspace(0.25, 1, 4, dtype=DOUBLE), -torch.ones(1, dtype=DOUBLE), dt=0.05)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], 0.2).to_event(1), obs=y)

    program = ppl.Program(model, torch.tensor([-0.8, -0.4, 0.2, 0.6], dtype=DOUBLE))
    bounds = {}
    for around in ("linear", None):
        guide, params, flat = starting(ControlGuide(width=4, around=around), program)
        with torch.no_grad():
            z, log_q = guide.rsample_and_log_prob(params, guide.noise(20_000, flat.dim, DOUBLE, torch.Generator()))
            bounds[around] = flat.log_density(z) - log_q
    evidence = bounds["linear"].logsumexp(0) - math.log(20_000)
    assert float(bounds["linear"].mean()) > float(bounds[None].mean()) + 5.0
    assert 0.0 < float(evidence - bounds["linear"].mean()) < 0.3
    assert float(smooth_tail(bounds["linear"])[1]) < 0.7  # so that the evidence is known


# A context.


class Features(torch.nn.Module):
    """Two numbers for every step, of the data."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.linear = steps, torch.nn.Linear(1, 2, dtype=DOUBLE)

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        return self.linear(data["y"].reshape(1)).expand(self.steps, 2)


def test_context_is_learned_and_sees_other_data() -> None:
    torch.manual_seed(0)
    program = program_of(path_of(BrownianNoise()))
    module = Features(6)
    before = {n: v.detach().clone() for n, v in module.named_parameters()}
    engine = ppl.SVI(guide=ControlGuide(width=8, context=module), steps=20, lr=0.02, particles=8)
    fitted = engine.fit(program.noise_space(), seed=0)
    assert all(torch.equal(v, before[n]) for n, v in module.named_parameters())  # the user's module is left alone
    learned = fitted.params["context.linear.weight"]
    assert float((learned - before["linear.weight"]).abs().max()) > 1e-3
    moved = fitted.on(program.with_data(y=torch.tensor(-3.0, dtype=DOUBLE)).noise_space())
    noise = torch.zeros(1, 6, dtype=DOUBLE)
    here, there = (f.guide.rsample_and_log_prob(f.params, noise)[0] for f in (fitted, moved))
    assert float((here - there).abs().max()) > 1e-3
    torch.testing.assert_close(fitted.on(fitted.program).guide.rsample_and_log_prob(fitted.params, noise)[0], here)


def test_context_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"a context gives \(size,\) or \(6, size\), got \(5, 2\)"):
        starting(ControlGuide(context=Features(5)), program_of(path_of(BrownianNoise())))


def test_bad_input() -> None:
    path = path_of(BrownianNoise())
    with pytest.raises(OptionError, match="path must be a"):
        ControlGuide(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="width and bound must be positive"):
        ControlGuide(path, width=0)
    with pytest.raises(CapabilityError, match=r"steers one path of 20 driving numbers.*found none"):
        ppl.infer(
            program_of(path), ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(path_of(BrownianNoise(), 20)), steps=2)),
            draws=2, progress=False,
        )  # fmt: skip
    with pytest.raises(OptionError, match="needs the program it is for"):
        ControlGuide().bind(program_of(path).noise_space().flat().layout)
    with pytest.raises(OptionError, match='elbo must be "pathwise" or "energy"'):
        ControlGuide(elbo="both")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="`around` controls"):
        starting(ControlGuide(around=linear_control_of(program_of(path))), program_of(path_of(BrownianNoise(), 5)))
    with pytest.raises(OptionError, match=r'around must be "linear"'):
        ControlGuide(around="exact")  # type: ignore[arg-type]


def test_data_of_several_times_have_no_linear_control() -> None:
    path = path_of(BrownianNoise())

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[-1, 0] - x[0, 0], 0.3), obs=y)

    program = ppl.Program(model, torch.tensor(1.2, dtype=DOUBLE))
    with pytest.raises(CapabilityError, match="each see one time of the path"):
        starting(ControlGuide(around="linear"), program)
    starting(ControlGuide(), program)


def test_coarse_steps_are_noted_with_their_bias() -> None:
    """Theta dt = 0.8: the log evidence is off by more than the 0.05 nat that is worth a remark."""
    path = Path(
        Process(lambda x, t: -4.0 * x, 1.0), torch.linspace(0.2, 1, 5, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    )

    def model(y: Tensor) -> None:
        x = pyro.sample("x", path)
        pyro.sample("y", dist.Normal(x[:, 0], 0.05).to_event(1), obs=y)

    program = ppl.Program(model, torch.tensor([0.5, 0.4, -0.2, 0.3, 0.1], dtype=DOUBLE))
    engine = ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(width=4), steps=2))
    notes = ppl.infer(program, engine, draws=30, progress=False).attrs["notes"]
    assert any("sharper than steps of 0.2 allow" in n and "nat" in n for n in notes)
    for walker in (inverse.GuidedParticleFilter(particles=8, runs=1), inverse.ParticleGibbs(warmup=1, particles=2)):
        notes = ppl.infer(program, walker, draws=2, chains=1, progress=False).attrs["notes"]
        assert any("sharper than steps of 0.2 allow" in n for n in notes), walker
    fine = ppl.infer(bridge("II", 0.7, 0.0), ppl.NoiseSpace(ppl.SVI(guide=ControlGuide(width=4), steps=2)), draws=30)
    assert not any("sharper" in n for n in fine.attrs["notes"])
