"""SMC inside marginals and normalised targets: both contracts and the gradient, by running through all joint states."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import agrees, measure, real
from torch import Tensor

import ppl
from ppl.errors import OptionError
from ppl.objectives import ELBO, SIR, SMC, Engine, Enumerate, Marginal, Normalize, Reinforce, smc

D = torch.float64
POINTS = [(a, b) for a in (0.0, 1.0) for b in (0.0, 1.0)]


def chain() -> None:
    """u1 -> z1, u1 -> u2 -> z2, all coins."""
    u1 = pyro.sample("u1", dist.Bernoulli(torch.sigmoid(pyro.param("a", real(0.3)))))
    pyro.sample("z1", dist.Bernoulli(0.2 + 0.5 * u1))
    u2 = pyro.sample("u2", dist.Bernoulli(0.7 - 0.4 * u1))
    pyro.sample("z2", dist.Bernoulli(0.1 + 0.6 * u2))


def reverse(kept: dict[str, Tensor]) -> None:
    u1 = pyro.sample("u1", dist.Bernoulli(0.3 + 0.3 * kept["z1"]))
    pyro.sample("u2", dist.Bernoulli(0.6 - 0.2 * u1 + 0.1 * kept["z2"]))


def law(a: float = 0.3) -> dict[tuple[float, float], float]:
    """P(z1, z2)."""
    p = float(torch.sigmoid(real(a)))
    out = dict.fromkeys(POINTS, 0.0)
    for u1 in (0, 1):
        for u2 in (0, 1):
            weight = (p if u1 else 1 - p) * ((0.7 - 0.4 * u1) if u2 else 1 - (0.7 - 0.4 * u1))
            for z1, z2 in POINTS:
                q1, q2 = 0.2 + 0.5 * u1, 0.1 + 0.6 * u2
                out[z1, z2] += weight * (q1 if z1 else 1 - q1) * (q2 if z2 else 1 - q2)
    return out


def expected(objective: Any, q: Any) -> float:
    """The exact expectation: every draw and every index is enumerated."""
    engine = Engine(objective, None, q, policy=lambda name, fn: Enumerate(100000), dtype=D)
    return float(engine.values()[0])


def marginal(particles: int, proposal: Any = None, **options: Any) -> Marginal:
    return Marginal(chain, ("z1", "z2"), SMC(particles, proposal=proposal, index=Enumerate(100000), **options))


@pytest.mark.parametrize("proposal", [None, reverse], ids=["prior", "reverse"])
def test_density_of_a_marginal_is_unbiased(proposal: Any) -> None:
    for z1, z2 in POINTS[1:3]:
        at = {"z1": real(z1), "z2": real(z2)}
        found = expected(lambda ctx, model, q, at=at: ctx.density(q, at).log.exp(), marginal(2, proposal))
        assert found == pytest.approx(law()[z1, z2], abs=1e-12)


def at_point(z: Any, z1: float, z2: float, value: Tensor) -> Tensor:
    return torch.where((z["z1"] == z1) & (z["z2"] == z2), value, 0.0)


def reciprocal(point: tuple[float, float]) -> Any:
    """1{z = point} exp(-xi), whose mean is P(point) / P(point) = 1."""

    def objective(ctx: Any, model: Any, q: Any) -> Tensor:
        z = ctx.sim(q)
        return at_point(z, *point, (-z.density.log).exp())

    return objective


@pytest.mark.parametrize("proposal", [None, reverse], ids=["prior", "reverse"])
@pytest.mark.parametrize("particles", [1, 2])
def test_density_of_a_draw_is_an_unbiased_reciprocal(particles: int, proposal: Any) -> None:
    for point in POINTS[1:3]:
        assert expected(reciprocal(point), marginal(particles, proposal)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("proposal", [None, reverse], ids=["prior", "reverse"])
def test_importance_sampling_of_two_sites_keeps_the_contract_too(proposal: Any) -> None:
    q = Marginal(chain, ("z1", "z2"), SIR(2, proposal))
    for point in POINTS[1:3]:
        assert expected(reciprocal(point), q) == pytest.approx(1.0, abs=1e-12)


def test_swapped_contracts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A free run in place of one that retains the draw, and the other way round."""
    point = POINTS[1]

    def swapped(ctx: Any, model: Any, q: Any) -> Tensor:
        z = ctx.sim(q)
        return at_point(z, *point, (-ctx.density(q, z).log).exp())

    assert abs(expected(swapped, marginal(2)) - 1) > 0.05

    def direct(ctx: Any, model: Any, q: Any) -> Tensor:
        z = ctx.sim(q)
        return at_point(z, *point, z.density.log.exp())

    probability = law()[point]
    assert abs(expected(direct, marginal(2)) / probability - probability) > 0.01
    # A retained lineage that may be resampled away: its weight is left out of the choice of ancestors.
    original = smc.SMC._resample

    def forgetful(
        self: Any, ctx: Any, values: Any, nodes: Any, weight: Any, target: Any, size: int, detach: bool
    ) -> Any:
        if weight is not None and size < len(weight):
            values, weight, target = {n: v[1:] for n, v in values.items()}, weight[1:], target[1:]
        return original(self, ctx, values, nodes, weight, target, size, detach)

    monkeypatch.setattr(smc.SMC, "_resample", forgetful)
    assert abs(expected(reciprocal(point), marginal(2)) - 1) > 0.01


# gamma(u1, u2) = P(u1) P(x1 | u1) P(u2 | u1) P(x2 | u2)


def target() -> None:
    u1 = pyro.sample("u1", dist.Bernoulli(real(0.4)))
    pyro.sample("x1", dist.Bernoulli(0.2 + 0.6 * u1), obs=real(1.0))
    u2 = pyro.sample("u2", dist.Bernoulli(0.3 + 0.5 * u1))
    pyro.sample("x2", dist.Bernoulli(0.9 - 0.6 * u2), obs=real(1.0))


@pytest.mark.parametrize("algorithm", [SMC(2, index=Enumerate()), SIR(2)], ids=["smc", "sir"])
def test_normalised_target_keeps_both_contracts(algorithm: Any) -> None:
    """Q(u) by its draws; E exp(xi) of `density` is Q(u), E[exp(-xi) 1{u}] of `sim` is 1."""
    q = Normalize(target, algorithm)
    total = 0.0
    for u1, u2 in POINTS:

        def chance(ctx: Any, model: Any, q: Any, u: Any = (u1, u2)) -> Tensor:
            z = ctx.sim(q)
            return ((z["u1"] == u[0]) & (z["u2"] == u[1])).to(D)

        def inverse(ctx: Any, model: Any, q: Any, u: Any = (u1, u2)) -> Tensor:
            z = ctx.sim(q)
            return torch.where((z["u1"] == u[0]) & (z["u2"] == u[1]), (-z.density.log).exp(), 0.0)

        probability = expected(chance, q)
        total += probability
        at = {"u1": real(u1), "u2": real(u2)}
        found = expected(lambda ctx, model, q, at=at: ctx.density(q, at).log.exp(), q)
        assert found == pytest.approx(probability, abs=1e-12)
        assert expected(inverse, q) == pytest.approx(1.0, abs=1e-12)
    assert total == pytest.approx(1.0, abs=1e-12)


# Gradients


def model() -> None:
    z1 = pyro.sample("z1", dist.Bernoulli(real(0.5)))
    pyro.sample("z2", dist.Bernoulli(0.3 + 0.5 * z1))


def test_gradient_of_a_guide_that_contains_smc() -> None:
    """Scores of all draws and ancestors against full enumeration."""
    bound = Engine(ELBO(), ppl.Program(model), marginal(2), policy=lambda name, fn: Enumerate(100000))
    exact = float(bound.gradient().gradient["a"])
    q = Marginal(chain, ("z1", "z2"), SMC(2, index=Reinforce()))
    engine = Engine(ELBO(), ppl.Program(model), q, policy=lambda name, fn: "reinforce")
    agrees(measure(engine, "a", 4000, 20), exact, 0.5)


def test_bad_options() -> None:
    for make in (lambda: SMC(0), lambda: SMC(2, index="enum"), lambda: SMC(2, index=3)):
        with pytest.raises(OptionError):
            make()
    for stages in ((("u2",), ("u1",)), (("u1",),), (("u1", "u2"), ())):
        with pytest.raises(OptionError, match="stages must"):
            Engine(reciprocal(POINTS[0]), None, marginal(2, stages=stages), dtype=D)
    with pytest.raises(OptionError, match="stage by stage"):
        Engine(reciprocal(POINTS[0]), None, Marginal(marginal(2), ("z1",), SMC(2, proposal=reverse)), dtype=D)
