"""Pathfinder: inverse Hessians against dense BFGS, densities against normals, draws against known posteriors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl
from ppl.errors import OptionError
from ppl.lbfgs import Climb
from ppl.pathfinder import PathMixture, inverse_hessians

F64 = torch.float64


def tensor(x):
    return torch.tensor(x, dtype=F64)


SCALES = torch.logspace(-1, 1, 12, dtype=F64)
DATA = SCALES * torch.linspace(-1, 1, 12, dtype=F64)


def stretched(y):
    """Twelve independent coordinates, posterior sds from 0.07 to 7: a condition number of ten thousand."""
    x = pyro.sample("x", dist.Normal(torch.zeros(12, dtype=F64), SCALES).to_event(1))
    pyro.sample("y", dist.Normal(x, SCALES).to_event(1), obs=y)


def two_sides(y):
    x = pyro.sample("x", dist.Normal(tensor(0.0), 3.0))
    parts = dist.Normal(torch.stack([x - 3, x + 3]), 0.2)
    pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(tensor([0.3, 0.7])), parts), obs=y)


# The climb ---------------------------------------------------------------------------------------------------------


def rosenbrock(z):
    """Minus the banana function, and its gradient."""
    a, b = z[:, 0], z[:, 1]
    value = -((1 - a) ** 2 + 100 * (b - a**2) ** 2)
    grad = torch.stack([2 * (1 - a) + 400 * a * (b - a**2), -200 * (b - a**2)], 1)
    return value, grad


def test_lanes_climb_a_curved_ridge():
    """All starts reach the top, each as it would alone: lanes do not speak to each other."""
    starts = tensor([[-1.2, 1.0], [2.0, 2.0], [0.0, -3.0]])
    together = Climb.start(starts, rosenbrock, 6)
    for _ in range(80):
        before = together.value
        together.advance(rosenbrock, 1e-12)
        assert bool((together.value >= before).all())
    torch.testing.assert_close(together.z, torch.ones(3, 2, dtype=F64), rtol=1e-5, atol=1e-5)
    alone = Climb.start(starts[:1], rosenbrock, 6)
    for _ in range(80):
        alone.advance(rosenbrock, 1e-12)
    torch.testing.assert_close(alone.z[0], together.z[0], rtol=1e-6, atol=1e-6)


def test_a_step_out_of_the_support_is_taken_back():
    """log z - z has no value below zero; the top is at one."""

    def evaluate(z):
        return z[:, 0].log() - z[:, 0], 1 / z - 1

    climb = Climb.start(tensor([[20.0], [1e-3]]), evaluate, 4)
    for _ in range(40):
        climb.advance(evaluate, 1e-14)
    torch.testing.assert_close(climb.z, torch.ones(2, 1, dtype=F64), rtol=1e-5, atol=1e-5)


# The normals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 3, 5])
def test_inverse_hessian_is_that_of_bfgs(pairs):
    """The compact form against the recursion H <- (I - r s y') H (I - r y s') + r s s', unused slots included."""
    generator = torch.Generator().manual_seed(pairs)
    root = torch.randn(4, 4, dtype=F64, generator=generator)
    curvature = root @ root.T + torch.eye(4, dtype=F64)
    alpha = torch.rand(4, dtype=F64, generator=generator) + 0.5
    s = torch.zeros(4, 5, dtype=F64)
    s[:, 5 - pairs :] = torch.randn(4, pairs, dtype=F64, generator=generator)
    y = curvature @ s
    expected = alpha.diag()
    for i in range(5 - pairs, 5):
        rate = 1 / (s[:, i] @ y[:, i])
        side = torch.eye(4, dtype=F64) - rate * torch.outer(s[:, i], y[:, i])
        expected = side @ expected @ side.T + rate * torch.outer(s[:, i], s[:, i])
    basis, lower, ok = inverse_hessians(alpha, s, y)
    core = basis @ (lower @ lower.T - torch.eye(lower.shape[0], dtype=F64)) @ basis.T + torch.eye(4, dtype=F64)
    assert bool(ok)
    torch.testing.assert_close(alpha.sqrt()[:, None] * core * alpha.sqrt(), expected, rtol=1e-9, atol=1e-9)


def test_mixture_has_the_density_of_its_draws():
    """log q against dense normals; moments of its draws within 4.5 errors, false alarm 1e-4."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 5, 3, dtype=F64, generator=generator)).Q
    root = torch.randn(2, 3, 3, dtype=F64, generator=generator).tril()
    root.diagonal(dim1=-2, dim2=-1).copy_(torch.rand(2, 3, dtype=F64, generator=generator) + 0.5)
    loc = tensor([[0.0] * 5, [4.0] * 5])
    scale = torch.rand(2, 5, dtype=F64, generator=generator) + 0.5
    params = {"loc": loc, "log_scale": scale.log(), "basis": basis, "root": root}
    inner = torch.eye(5, dtype=F64) + basis @ (root @ root.mT - torch.eye(3, dtype=F64)) @ basis.mT
    covariance = scale[:, :, None] * inner * scale[:, None, :]
    q = PathMixture()
    z, log_q = q.rsample_and_log_prob(params, q.noise(40000, 5, F64, generator))
    parts = dist.MultivariateNormal(loc, covariance)
    torch.testing.assert_close(log_q, parts.log_prob(z[:, None]).logsumexp(1) - math.log(2))
    mean, spread = loc.mean(0), covariance.mean(0) + 4 * torch.ones(5, 5, dtype=F64)
    assert float(((z.mean(0) - mean) / (spread.diagonal() / 40000).sqrt()).abs().max()) < 4.5
    gap = (z - mean).T @ (z - mean) / 40000 - spread
    size = ((z - mean)[:, :, None] * (z - mean)[:, None, :]).std(0) / 200
    assert float((gap / size).abs().max()) < 5


# The engine --------------------------------------------------------------------------------------------------------


def test_stretched_gaussian():
    """Means and variances of twelve coordinates within 4.5 errors of the draws' worth; evidence exact. Alarm 1e-4."""
    posterior = ppl.infer(ppl.Program(stretched, DATA), ppl.Pathfinder(), draws=2000, seed=0)
    assert posterior.log_weight is None
    assert float(posterior.info["pareto_k"]) < 0.7
    # Resampled: the draws' own number and that of the weights both limit them.
    worth = 1 / (1 / 2000 + 1 / float(posterior.info["root_ess"]))
    assert worth > 500
    variance = SCALES.square() / 2
    z = (posterior.mean("x") - DATA / 2) * (worth / variance).sqrt()
    ratio = (posterior["x"][0] - DATA / 2).square().mean(0) / variance
    assert float(z.abs().max()) < 4.5
    assert float((ratio - 1).abs().max()) < 4.5 * math.sqrt(2 / worth)
    exact = float(dist.Normal(torch.zeros(12, dtype=F64), SCALES * math.sqrt(2)).log_prob(DATA).sum())
    value, stderr = posterior.log_evidence
    assert abs(float(value) - exact) < 4.5 * float(stderr)


def test_minor_modes_take_their_share():
    """Paths end on both sides; weights relative to the mixture give 0.7 and 0.3: 4.5 errors."""
    posterior = ppl.infer(ppl.Program(two_sides, tensor(0.0)), ppl.Pathfinder(paths=12), draws=2000, seed=1)
    fitted = posterior.guide.params["loc"][:, 0]
    assert float(fitted.min()) < -2 < 2 < float(fitted.max())
    worth = 1 / (1 / 2000 + 1 / float(posterior.info["root_ess"]))
    assert abs(float((posterior["x"] < 0).double().mean()) - 0.7) < 4.5 * math.sqrt(0.21 / worth)


def test_heavy_tails_are_told():
    """A funnel that no normal covers: k-hat above 0.7, and a note."""

    def funnel(y):
        v = pyro.sample("v", dist.Normal(tensor(0.0), 3.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(9, dtype=F64), (v / 2).exp()).to_event(1))
        pyro.sample("y", dist.Normal(x[0], 10.0), obs=y)

    posterior = ppl.infer(ppl.Program(funnel, tensor(0.0)), ppl.Pathfinder(), draws=500, seed=0)
    assert float(posterior.info["pareto_k"]) > 0.7
    assert any("k-hat" in note for note in posterior.attrs["notes"])


def test_save_and_load(tmp_path):
    program = ppl.Program(stretched, DATA)
    fitted = ppl.Pathfinder(paths=3).fit(program)
    fitted.save(tmp_path / "paths.safetensors")
    loaded = ppl.FittedGuide.load(tmp_path / "paths.safetensors", program)
    z = torch.randn(5, 12, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.log_prob(z), fitted.log_prob(z))
    assert fitted.history.shape == (3,)
    with pytest.raises(OptionError, match="cannot go on from a fit"):
        ppl.SVI(guide=ppl.FullRank(), steps=1).fit(program, start=fitted)
    with pytest.raises(OptionError, match=r"made by ppl\.Pathfinder"):
        ppl.SVI(guide=PathMixture(), steps=1).fit(program)


def test_interrupted_paths_have_draws():
    posterior = ppl.infer(ppl.Program(stretched, DATA), ppl.Pathfinder(), draws=20, callback=lambda e: e.step == 3)
    assert not posterior.complete
    assert posterior["x"].shape == (1, 20, 12)
    assert posterior.attrs["backend"] == "Pathfinder"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 0}, "paths"),
        ({"elbo_draws": 1}, "elbo_draws"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"radius": -1.0}, "r"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        ppl.Pathfinder(**options)
