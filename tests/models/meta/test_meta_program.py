"""The hierarchy as a program: exact posterior, subsampled plates, and every backend side by side."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian_reference import F, Y, episodes, exact, hierarchy
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import ppl
from models.meta import (
    CoordinateAscent,
    Episodes,
    Gaussian,
    Hierarchy,
    NIWMeta,
    NormalInverseWishart,
    amortised_guide,
    empirical_bayes_guide,
    mlp,
)
from models.meta.network import Network
from ppl.diagnostics.ess import ess_of, z_bound
from ppl.vi.full_data import partition


def check_moments(posterior: ppl.Posterior) -> None:
    """All six moments of the reference example, each with its own ESS; false alarm 1e-5."""
    moments = exact().moments
    mu, precision, theta = (posterior.draws[n].reshape(*posterior.shape[:2], -1) for n in ("mu", "precision", "theta"))
    values = {
        "mu": mu[..., 0],
        "variance": 1 / precision[..., 0],
        "precision": precision[..., 0],
        "theta_1": theta[..., 0],
        "theta_5": theta[..., 4],
        "mu_sd": (mu[..., 0] - moments["mu"]).square(),
    }
    for name, value in values.items():
        goal = moments[name] ** 2 if name == "mu_sd" else moments[name]
        z = (value.mean() - goal) / value.std() * ess_of(value).sqrt()
        assert abs(float(z)) < z_bound(1e-5, tests=6), (name, float(value.mean()), goal)


def test_quadrature_gives_the_listed_values() -> None:
    """The numbers of the method's reference example, whose data are rounded to four digits: 3e-4 of the evidence."""
    known = {
        "mu": 1.1419,
        "mu_sd": 0.1978,
        "variance": 0.2276,
        "precision": 5.587,
        "theta_1": 1.0222,
        "theta_5": 1.3733,
    }
    assert abs(exact().log_evidence - (-12.4451)) < 5e-4
    for name, value in exact().moments.items():
        assert abs(value - known[name]) < 6e-4, name


@pytest.mark.parametrize(
    ("full", "centred"), [(False, True), pytest.param(True, False, marks=pytest.mark.slow)], ids=["relaxed", "full"]
)
def test_nuts_matches_the_exact_posterior(full: bool, centred: bool) -> None:
    """Relaxation and full law are one for d = 1, centred or not."""
    program = hierarchy(full, centred=centred).program(episodes(), compile="never")
    check_moments(ppl.infer(program, ppl.NUTS(warmup=300), draws=400, chains=2, seed=0))


def test_full_law_has_the_wishart_density() -> None:
    """Bartlett's sites with their Jacobian are the Wishart law of the precision, and mu and theta are normal."""
    network = Network(torch.nn.Linear(2, 1, bias=False).double())
    scale = torch.tensor([[2.0, 0.6], [0.6, 3.0]], **F)
    prior = NormalInverseWishart(torch.ones(2, **F), torch.tensor(0.5, **F), torch.tensor(4.0, **F), scale)
    generator = torch.Generator().manual_seed(0)
    data = Episodes(torch.randn(3, 4, 2, generator=generator, **F), torch.randn(3, 4, generator=generator, **F))
    program = Hierarchy(network, Gaussian(0.5), prior).program(data)
    drawn = program.simulate(generator, 400)
    precision = drawn["precision"]
    error = (precision.mean(0) - prior.precision()) / (precision.std(0) / 400**0.5)
    assert float(error.abs().max()) < 5
    one = {n: drawn[n][:1] for n in program.latents}
    mu, theta, root = one["mu"][0], one["theta"][0], torch.linalg.cholesky(precision[0])
    normal = dist.MultivariateNormal(prior.mean, precision_matrix=0.5 * precision[0]).log_prob(mu)
    normal = normal + dist.MultivariateNormal(mu, precision_matrix=precision[0]).log_prob(theta).sum()
    data_term = dist.Normal((data.x_support @ theta[..., None])[..., 0], 0.5).log_prob(data.y_support).sum()
    wishart = torch.distributions.Wishart(prior.df, precision_matrix=scale).log_prob(precision[0])
    # d precision / d sites: of P = C A A' C' in the entries of A A', then of A A' in a_jj^2 and a_jk.
    c = torch.linalg.cholesky(torch.linalg.inv(scale)).diagonal()
    a = root.diagonal() / c
    jacobian = 3 * c.log().sum() + a[0].log() * 2 - a[0].log() + a[1].log() - a[1].log()
    total = float(program.log_joint(one)[0])
    assert total == pytest.approx(float(wishart + jacobian + normal + data_term), abs=1e-8)


# Subsampled plates ----------------------------------------------------------------------------------------------------


def test_subsampled_density_averages_to_the_full_one() -> None:
    """The mean over a partition is the density of all episodes: the plate is scaled by N / B."""
    full, part = hierarchy().program(episodes()), hierarchy().program(episodes(), batch=4)
    values = {n: full.first_values[n][None] for n in full.latents}
    shown = [part.log_joint(values, batch) for batch in partition(part)]
    assert len(shown) == 3
    assert torch.allclose(torch.stack(shown).mean(0), full.log_joint(values))


def test_mean_field_meets_its_own_rows() -> None:
    """pyro#3468: with subsampled plates every theta_i is fitted to its own y_i, not to another episode's.

    With rows mixed up all theta would lie near mu: 0.6 away for the episode at 0.2294.
    """
    program = hierarchy().program(episodes(), batch=4)
    posterior = ppl.infer(program, ppl.SVI(steps=800, particles=8), draws=500, seed=0)
    law = exact()
    total = 4 + law.precision[:, None]
    goal = torch.tensor([law.mean((4 * y + law.mu * law.precision[:, None]) / total) for y in Y], **F)
    assert float((posterior.mean("theta")[:, 0] - goal).abs().max()) < 0.15


def test_an_autoguide_of_an_explicit_minibatch_is_named() -> None:
    """The regression that pyro#3468 reports is found in a hierarchy, with its cure; our guides pass."""
    model = hierarchy()

    def explicit(x: Tensor, y: Tensor, index: Tensor) -> None:
        law, _, _ = model._global()
        with pyro.plate("episodes", len(x), subsample=index):
            theta = pyro.sample("theta", law)
            pyro.sample("y", dist.Normal(theta * x[index][:, 0], 0.5).to_event(1), obs=y[index])

    data = episodes()
    program = ppl.Program(explicit, data.x_support, data.y_support, torch.tensor([0, 3, 7, 11]))
    (found,) = [f for f in program.check(guide=AutoNormal(explicit)) if "3468" in f]
    assert "create_plates" in found
    small = hierarchy(batch=4)
    for guide in (empirical_bayes_guide(small), amortised_guide(small, data.points)):
        assert small.program(data).check(guide=guide) == []


def test_ragged_and_stacked_episodes_have_one_density() -> None:
    """Padding is no data."""
    network = mlp([1, 1])
    prior = NormalInverseWishart.around(network.start, 0.1, 4.0, 1.0)
    x, y = torch.randn(2, 3, 1), torch.randn(2, 3)
    plain = Hierarchy(network, Gaussian(0.5), prior).program(Episodes(x, y))
    mask = torch.tensor([[True, True, True, False]] * 2)
    padded = Episodes(
        torch.cat([x, 9 * torch.ones(2, 1, 1)], 1), torch.cat([y, torch.ones(2, 1)], 1), support_mask=mask
    )
    other = Hierarchy(network, Gaussian(0.5), prior).program(padded)
    values = {n: plain.first_values[n][None] for n in plain.latents}
    assert torch.allclose(plain.log_joint(values), other.log_joint(values))


# One program, every backend -------------------------------------------------------------------------------------------


def test_guides_come_near_the_exact_posterior() -> None:
    """Empirical Bayes puts mu at its mean; the amortised posterior of theta is that of each episode."""
    model, data = hierarchy(), episodes()
    program, moments = model.program(data), exact().moments
    amortised = ppl.infer(program, ppl.SVI(guide=amortised_guide(model, data.points), steps=400), draws=400, seed=0)
    assert abs(float(amortised.mean("theta")[0, 0]) - moments["theta_1"]) < 0.12
    assert abs(float(amortised.mean("mu")[0]) - moments["mu"]) < 0.1
    point = ppl.infer(program, ppl.SVI(guide=empirical_bayes_guide(model), steps=400), draws=20, seed=0)
    assert float(point.sd("mu")[0]) < 1e-6
    assert abs(float(point.mean("mu")[0]) - moments["mu"]) < 0.1


@pytest.mark.slow
def test_all_backends_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """`compare` on one hierarchy: exact backends sit on the floor, and the others are biased as they say."""
    model, data = hierarchy(), episodes()
    program = model.program(data)
    found = ppl.compare(
        program,
        {
            "NUTS": ppl.NUTS(),
            "HMC": ppl.HMC(),
            "NIW": NIWMeta(steps=400, lr=0.05, expectation="quadratic"),
            "coordinate ascent": CoordinateAscent(),
            "mean-field": ppl.SVI(steps=1500),
            "amortised": ppl.SVI(guide=amortised_guide(model, data.points), steps=1000),
            "Laplace": ppl.Laplace(),
            "empirical Bayes": ppl.SVI(guide=empirical_bayes_guide(model), steps=1000),
        },
        draws=1000,
        chains=2,
        seed=0,
        reference=exact().draws,
    )
    with capsys.disabled():
        print()
        print(found.table[["seconds", "distance", "mean_error", "variance_ratio", "elbo"]].round(3).to_string())
    table = found.table
    for name in ("NUTS", "HMC"):
        assert table.loc[name, "distance"] < 2, name
        assert 0.9 < table.loc[name, "variance_ratio"] < 1.1, name
    assert abs(table.loc["NIW", "elbo"] - table.loc["coordinate ascent", "elbo"]) < 1e-3
    for name in ("NIW", "coordinate ascent", "mean-field", "amortised"):
        assert table.loc[name, "variance_ratio"] < 0.8, name
