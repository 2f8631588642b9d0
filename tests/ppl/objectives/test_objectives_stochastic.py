"""Marginal and normalised programs: both contracts in closed form, kept apart by type; mutants that swap them."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_cases import normal_guide, normal_program, real
from torch import Tensor

import ppl
from ppl.errors import ContractError, OptionError, ProgramError
from ppl.objectives import (
    IWELBO,
    SIR,
    Direct,
    DReG,
    Engine,
    Enumerate,
    Exact,
    Marginal,
    MeasureValued,
    Normalize,
    Reciprocal,
    Reinforce,
    StickingTheLanding,
)

D = torch.float64
S2, S = 0.25, 1.25


# T5: u ~ N(0, 1), z | u ~ N(u, 1/4)


def chain() -> None:
    u = pyro.sample("u", dist.Normal(real(0.0), real(1.0)))
    pyro.sample("z", dist.Normal(u, real(0.5)))


def posterior(kept: dict[str, Tensor]) -> None:
    pyro.sample("u", dist.Normal(kept["z"] / S, real(S2 / S).sqrt()))


def log_q(z: Tensor) -> Tensor:
    return dist.Normal(real(0.0), real(S).sqrt()).log_prob(z)


def near(values: Tensor, truth: float, power: float) -> None:
    """Within four standard errors, at stated power."""
    stderr = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - truth) < 4 * stderr, (float(values.mean()), truth, stderr)
    assert 4 * stderr < power * abs(truth)


def at_point(ctx: Any, model: Any, guide: Any) -> Tensor:
    density = ctx.density(guide, {"z": real(0.7)})
    assert isinstance(density, Direct)
    assert not isinstance(density, Reciprocal)
    return density.log


def drawn(ctx: Any, model: Any, guide: Any) -> Tensor:
    z = ctx.sim(guide)
    assert isinstance(z.density, Reciprocal)
    assert not isinstance(z.density, Direct)
    return z.density.log


@pytest.mark.parametrize(("particles", "mean"), [(1, -3.20579135), (5, -1.3634)])
def test_density_of_a_marginal_is_unbiased(particles: int, mean: float) -> None:
    """E exp(xi) = q(0.7) = 0.293314; E xi below log q = -1.22651."""
    engine = Engine(at_point, None, Marginal(chain, ("z",), SIR(particles)), dtype=D)
    xi = engine.values(samples=100000)
    near(xi.exp(), 0.293314, 0.02)
    near(xi, mean, 0.02)


def test_density_of_a_draw_is_an_unbiased_reciprocal() -> None:
    """E[exp(-xi) 1{|z - 0.7| < 0.3}] = 0.6 for five particles, and E xi above E log q, for one in closed form."""

    def inside(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return torch.where((z["z"] - 0.7).abs() < 0.3, (-z.density.log).exp(), 0.0)

    near(Engine(inside, None, Marginal(chain, ("z",), SIR(5)), dtype=D).values(samples=100000), 0.6, 0.05)
    xi = Engine(drawn, None, Marginal(chain, ("z",), SIR(1)), dtype=D).values(samples=100000)
    near(xi, -0.5 * math.log(2 * math.pi * S2) - 0.5 * S2 * (1 + 1 / S2) / S - 0.0, 0.02)
    truth = -0.5 * math.log(2 * math.pi * S) - 0.5
    assert float(xi.mean()) > truth + 0.1


def test_swapped_contracts_are_seen() -> None:
    """The mutants: a draw's density taken as unbiased itself, a density's as an unbiased reciprocal."""

    def swapped_sim(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        inside = (z["z"] - 0.7).abs() < 0.3
        fresh = ctx.density(guide, z)  # where the draw's own is needed
        return torch.where(inside, (-fresh.log).exp(), 0.0)

    values = Engine(swapped_sim, None, Marginal(chain, ("z",), SIR(5)), dtype=D).values(samples=100000)
    assert abs(float(values.mean()) - 0.6) > 8 * float(values.std()) / math.sqrt(len(values))

    def swapped_density(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return z.density.log - log_q(z["z"])

    values = Engine(swapped_density, None, Marginal(chain, ("z",), SIR(5)), dtype=D).values(samples=50000).exp()
    assert abs(float(values.mean()) - 1) > 8 * float(values.std()) / math.sqrt(len(values))


def test_exact_proposal_has_no_error() -> None:
    q = Marginal(chain, ("z",), SIR(3, posterior))
    truth = float(log_q(real(0.7)))
    assert float((Engine(at_point, None, q, dtype=D).values(samples=20) - truth).abs().max()) < 1e-12

    def error(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return z.density.log - log_q(z["z"])

    assert float(Engine(error, None, q, dtype=D).values(samples=20).abs().max()) < 1e-12


def test_marginals_nest() -> None:
    """A marginal whose proposal is a marginal itself keeps the density unbiased."""

    def wide() -> None:
        v = pyro.sample("v", dist.Normal(real(0.5), real(0.6)))
        pyro.sample("u", dist.Normal(v, real(0.8)))

    q = Marginal(chain, ("z",), SIR(3, Marginal(wide, ("u",), SIR(4))))
    near(Engine(at_point, None, q, dtype=D).values(samples=50000).exp(), 0.293314, 0.03)


# T8: gamma = (0.14, 0.27), uniform proposal, two particles

GAMMA = torch.tensor([0.14, 0.27], dtype=D)
Q1 = 0.57926829


def coin() -> None:
    pyro.sample("u", dist.Categorical(torch.ones(2, dtype=D)))


def target() -> None:
    u = pyro.sample("u", dist.Categorical(torch.ones(2, dtype=D)))
    pyro.factor("weight", (2 * GAMMA[u.long()]).log())


@pytest.mark.parametrize("index", [Enumerate(), Reinforce()], ids=["enum", "reinforce"])
def test_normalised_target(index: Any) -> None:
    """Q(1) = 0.25 + 0.5 * 0.27 / 0.41; all states summed where the index is, within errors where it is drawn."""
    assert abs(0.25 + 0.5 * 0.27 / 0.41 - Q1) < 1e-8
    q = Normalize(target, SIR(2, coin, index))

    def reciprocal(ctx: Any, model: Any, guide: Any) -> Tensor:
        draw = ctx.sim(guide)
        return torch.where(draw["u"] == 1, (-draw.density.log).exp(), 0.0)

    def frequency(ctx: Any, model: Any, guide: Any) -> Tensor:
        return (ctx.sim(guide)["u"] == 1).double()

    def density(ctx: Any, model: Any, guide: Any) -> Tensor:
        return ctx.density(guide, {"u": torch.tensor(1)}).log.exp()

    for objective, truth in [(reciprocal, 1.0), (frequency, Q1), (density, Q1)]:
        if isinstance(index, Enumerate):
            value = Engine(objective, None, q, dtype=D).values(samples=1)
            assert abs(float(value) - truth) < 1e-7
        else:
            near(Engine(objective, None, q, policy={"u": "reinforce"}, dtype=D).values(samples=50000), truth, 0.05)


def test_guide_that_resamples_climbs_to_the_evidence() -> None:
    """p(z) N(x; z, 1) by resampling from the prior: a bound that rises with particles, by any index strategy."""
    program = normal_program()
    truth = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.7)))

    def bound(n: int, index: Any) -> Engine:
        return Engine(IWELBO(1), program, Normalize(program, SIR(n, normal_guide, index)))

    values = [float(bound(n, Reinforce()).values(samples=20000).mean()) for n in (1, 3, 10)]
    assert values == sorted(values)
    assert values[-1] < truth
    # E log Zhat: the same bound as IWELBO(2), with the same gradient, whatever the index does.
    for index in (Enumerate(), Reinforce()):
        engine = bound(2, index)
        rows = torch.stack([engine.gradient(samples=2000, seed=i).gradient["m"] for i in range(40)])
        stderr = float(rows.std()) / math.sqrt(40)
        assert abs(float(rows.mean()) - 0.56963250) < 4 * stderr
        assert stderr < 0.02


# Types


def test_types_keep_the_contracts_apart() -> None:
    a, b, e = Direct(real(1.0)), Reciprocal(real(2.0)), Exact(real(3.0))
    assert float(a - b) == -1.0
    assert float(a - e) == -2.0
    assert float(e - b) == 1.0
    for wrong in (lambda: a - a, lambda: b - a, lambda: b - b, lambda: e - a, lambda: b - e):
        with pytest.raises(ContractError):
            wrong()
    assert issubclass(ContractError, ValueError)


def test_objectives_with_the_wrong_density_are_refused() -> None:
    guide = Marginal(chain, ("z",), SIR(2))

    def model() -> None:
        pyro.sample("z", dist.Normal(real(0.0), 1.0))
        pyro.factor("f", real(0.0))

    def swapped(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return ctx.density(model, z) - ctx.density(guide, z)

    def upside_down(ctx: Any, model: Any, guide: Any) -> Tensor:
        z = ctx.sim(guide)
        return z.density - ctx.density(model, z)

    program = ppl.Program(model)
    for objective in (swapped, upside_down, StickingTheLanding(), DReG(2)):
        with pytest.raises(ContractError, match="reciprocal"):
            Engine(objective, program, guide)


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="needs samples"):
        SIR(0)
    with pytest.raises(OptionError, match="index"):
        SIR(2, index=MeasureValued())
    with pytest.raises(OptionError, match="keep"):
        Marginal(chain, "z")
    with pytest.raises(ProgramError, match="keeps 'w'"):
        Engine(drawn, None, Marginal(chain, ("w",)), dtype=D)
