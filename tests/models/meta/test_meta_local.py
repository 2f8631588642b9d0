"""Local posteriors in closed form, adaptation to new episodes and predictions, against exact answers."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from gaussian_reference import F, episodes, hierarchy

from models.meta import (
    SGLD,
    Bernoulli,
    Categorical,
    ClosedForm,
    CoordinateAscent,
    Episodes,
    Fisher,
    FittedMeta,
    Gaussian,
    GaussNewton,
    Hierarchy,
    Likelihood,
    LinearRegressions,
    LocalNormal,
    NormalInverseGamma,
    NormalInverseWishart,
    Points,
    Variational,
    adapt,
    cooled,
    mlp,
)
from models.meta.local import LocalFit, Quadratic, close
from ppl.errors import DataError, OptionError, ShapeError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def fitted(likelihood: Likelihood, sizes: list[int], full: bool = False, df: float = 12.0) -> FittedMeta:
    """A hierarchy whose law is its prior: what is tested here needs no training."""
    network = mlp(sizes)
    network.module.double()
    kind = NormalInverseWishart if full else NormalInverseGamma
    prior = kind.around(network.start, 20.0, df, 0.5)
    model = Hierarchy(network, likelihood, prior)
    return FittedMeta(model, prior, None, GaussNewton(steps=8), "draw", 20.0, torch.zeros(0))


def points(inputs: int = 1, outputs: int | None = None) -> Points:
    x = torch.randn(3, 6, inputs, generator=seeded(), **F)
    y = x[..., 0] + 0.3 if outputs is None else torch.randint(outputs, (3, 6), generator=seeded())
    return Points(x, y.double() if outputs == 1 else y, torch.ones(3, 6, dtype=torch.bool))


# Closed form ----------------------------------------------------------------------------------------------------------


def test_few_rows_are_the_dense_posterior() -> None:
    """Woodbury's identity: mean, variance, determinant, trace and covariance of draws, with d = 5 and q = 3."""
    root, natural = torch.randn(2, 3, 5, generator=seeded(), **F), torch.randn(2, 5, generator=seeded(), **F)
    mean, precision = torch.randn(5, generator=seeded(), **F), torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1], **F)
    form = Quadratic(natural, None, root, torch.zeros(2, **F))
    thin, dense = close(form, mean, precision), close(form, mean, torch.diag(precision))
    covariance = torch.linalg.inv(root.mT @ root + torch.diag(precision))
    exact = torch.einsum("bij,bj->bi", covariance, natural + precision * mean)
    for local in (thin, dense):
        assert torch.allclose(local.mean, exact)
        assert torch.allclose(local.variance, covariance.diagonal(dim1=-2, dim2=-1))
        assert torch.allclose(local.log_det, torch.logdet(covariance))
        for rows in (root, root.clone()):
            assert torch.allclose(local.trace(rows), ((root.mT @ root) * covariance).sum((-2, -1)))
        draws = local.draw(40_000, seeded()) - local.mean
        found = torch.einsum("sbi,sbj->bij", draws, draws) / len(draws)
        scale = local.variance.sqrt()
        error = (found - covariance) / (scale[:, :, None] * scale[:, None]) * math.sqrt(len(draws) / 2)
        assert float(error.abs().max()) < 5


@pytest.mark.parametrize(
    ("likelihood", "sizes", "outputs"),
    [(Bernoulli(), [2, 1], 1), (Categorical(), [2, 4, 3], 3)],
    ids=["logistic", "net"],
)
def test_gauss_newton_ends_at_the_mode(likelihood: Likelihood, sizes: list[int], outputs: int) -> None:
    """The slope of l_i + (theta - m_0)' P (theta - m_0) / 2 vanishes at m_i, for labels too; convergence is linear."""
    fit, data = fitted(likelihood, sizes), points(2, outputs)
    law = fit.law
    local = close(GaussNewton(steps=60)(fit.hierarchy, law, data, None, seeded()), law.mean, law.precision())

    def slope(theta: torch.Tensor) -> float:
        at = theta.clone().requires_grad_()
        total = fit.hierarchy.losses(at, data) + 0.5 * (law.precision() * (at - law.mean).square()).sum(-1)
        (found,) = torch.autograd.grad(total.sum(), at)
        return float(found.abs().max())

    assert slope(local.mean) < 1e-4 * slope(law.mean.expand(3, -1))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Categorical()], ids=repr)
def test_fisher_steps_end_at_the_mode(likelihood: Likelihood, full: bool) -> None:
    """A linear network, whose mode many Gauss-Newton steps find exactly, and a prior of unequal widths."""
    classes = isinstance(likelihood, Categorical)
    base, data = fitted(likelihood, [2, 3] if classes else [2, 1], full), points(2, 3 if classes else None)
    d = base.law.dim
    widths = torch.logspace(-2, 1, d, **F)
    law = base.law.replaced(base.law.mean, base.law.count, base.law.df, 12 * (widths.diag() if full else widths))
    exact = close(GaussNewton(steps=30)(base.hierarchy, law, data, None, seeded()), law.mean, law.precision())
    for steps, tolerance in ((0, None), (100, 1e-4)):
        form = Fisher(steps=steps, probes=1)(base.hierarchy, law, data, None, seeded())
        off = float((close(form, law.mean, law.precision()).mean - exact.mean).abs().max())
        assert off > 0.1 if tolerance is None else off < tolerance


def test_fisher_steps_never_end_above_the_start() -> None:
    """A network that is far from its data, and steps that overshoot on the way."""
    base, data = fitted(Gaussian(0.01), [1, 8, 1]), points()
    law = base.law

    def height(theta: torch.Tensor) -> torch.Tensor:
        return base.hierarchy.losses(theta, data) + 0.5 * (law.precision() * (theta - law.mean).square()).sum(-1)

    heights = [height(law.mean.expand(3, -1))]
    for steps in (1, 2, 4, 8, 16):
        form = Fisher(steps, probes=1)(base.hierarchy, law, data, None, seeded())
        heights.append(height(close(form, law.mean, law.precision()).mean))
    for later, before in zip(heights[1:], heights, strict=False):
        assert bool((later <= before + 1e-6 * before.abs()).all())
    assert bool((heights[-1] < 0.5 * heights[0]).all())


def test_probes_estimate_the_diagonal() -> None:
    """Hutchinson's estimate of the Fisher diagonal approaches that of the Gauss-Newton root."""
    fit, data = fitted(Categorical(), [2, 3]), points(2, 3)
    form = Fisher(steps=0, probes=4000)(fit.hierarchy, fit.law, data, None, seeded())
    root = GaussNewton(steps=1)(fit.hierarchy, fit.law, data, None, seeded()).root
    assert form.diagonal is not None
    assert root is not None
    exact = root.square().sum(-2)
    assert torch.allclose(form.diagonal, exact, rtol=5 * math.sqrt(2 / 4000), atol=1e-6)


def test_langevin_moments_are_those_of_the_likelihood() -> None:
    """For y ~ N(theta, 1/4): the iterates' mean is y and 1 / A their variance, 1/4 / (1 - step A / 8)."""
    model, data = hierarchy(), episodes().points
    step, steps = 0.1, 2000
    form = SGLD(steps=steps, burnin=100, step=step)(model, model.prior, data, None, seeded())
    assert form.diagonal is not None
    worth = steps * (step * 4 / 2) / 2
    variance = 0.25 / (1 - step * 4 / 4)
    centre = (form.natural / form.diagonal)[:, 0]
    assert float((centre - data.y[:, 0]).abs().max()) < 5 * math.sqrt(variance / worth)
    assert float((1 / form.diagonal / variance - 1).abs().max()) < 5 * math.sqrt(2 / worth)


def test_langevin_precision_is_bounded() -> None:
    model = hierarchy()
    form = SGLD(steps=3, step=1e-9, precision_max=7.0)(model, model.prior, episodes().points, None, seeded())
    assert form.diagonal is not None
    assert float(form.diagonal.max()) == 7.0


# Adaptation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_published_steps_approach_their_optimum(full: bool) -> None:
    """E_v l + KL(v || N(m_0, Sigma*)) for a line: N(V (B'y/s^2 + P m_0), V), its diagonal where v is diagonal."""
    fit = fitted(Gaussian(0.5), [1, 1], full)
    data = points()
    found = adapt(fit, data, Variational(steps=800, lr=0.02, draws=8), seeded()).local
    mode, covariance = fit.law.mode()
    precision = torch.linalg.inv(covariance) if full else torch.diag(1 / covariance)
    form = GaussNewton(steps=1)(fit.hierarchy, fit.law, data, None, seeded())
    exact = close(form, mode, precision)
    assert torch.allclose(found.mean, exact.mean, atol=0.05)
    if full:
        assert torch.allclose(found.covariance, exact.covariance, atol=0.01)
    else:
        inverse = torch.linalg.inv(exact.covariance).diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(found.variance * inverse, torch.ones(3, 2, **F), atol=0.15)


def test_no_steps_keep_the_mode() -> None:
    fit = fitted(Gaussian(0.5), [1, 1])
    local = adapt(fit, points(), Variational(steps=0)).local
    mode, covariance = fit.law.mode()
    assert torch.allclose(local.mean, mode.expand(3, 2))
    assert torch.allclose(local.variance, covariance.expand(3, 2))


def test_closed_form_is_the_posterior_of_training() -> None:
    """Adapting to a training episode gives the q_i of coordinate ascent."""
    fit = CoordinateAscent().fit(hierarchy().program(episodes()))
    local = adapt(fit, episodes(), ClosedForm()).local
    precision = float(fit.law.precision())
    exact = (4 * episodes().y_support[:, 0] + precision * fit.law.mean) / (4 + precision)
    assert torch.allclose(local.mean[:, 0], exact)
    assert torch.allclose(local.variance, torch.full((12, 1), 1 / (4 + precision), **F))


# Prediction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("linearised", "draws"), [(False, 20_000), (True, 20_000), (True, None)])
def test_predictions_of_a_line_are_normal(linearised: bool, draws: int | None) -> None:
    """Log density, cumulative probability and mean against the exact normal: to rounding, or 2 % with 20000 draws."""
    fit, data = fitted(Gaussian(0.5), [1, 1]), points()
    adapted = adapt(fit, data)
    x, y = torch.tensor([[[0.5], [-2.0]]] * 3, **F), torch.tensor([[0.4, -1.5]] * 3, **F)
    found = adapted.predict(x, draws, seeded(), linearised=linearised)
    row = torch.cat([x, torch.ones_like(x)], -1)
    spread = torch.einsum("bpi,bij,bpj->bp", row, adapted.local.covariance, row)
    exact = dist.Normal((row @ adapted.local.mean[..., None])[..., 0], (spread + 0.25).sqrt())
    error = 0.02 if draws else 1e-10
    assert torch.allclose(found.mean, exact.mean, atol=error)
    assert torch.allclose(found.log_prob(y), exact.log_prob(y), atol=1.5 * error)
    assert torch.allclose(found.cdf(y), exact.cdf(y), atol=error)


def test_linearised_predictions_are_of_the_model_that_was_fitted() -> None:
    """After one step the network is linear about m_0, not about m_i: f(m_0) + J(m_0) (m_i - m_0) on average."""
    fit, data = fitted(Gaussian(0.2), [1, 6, 1], df=3.0), points()
    network, start = fit.hierarchy.network, fit.law.mean
    adapted = adapt(fit, data, ClosedForm(GaussNewton(steps=1)))
    found = adapted.predict(data.x, 20_000, seeded(), linearised=True)
    jacobian = torch.func.vmap(torch.func.jacrev(network.one), (None, 0))(start, data.x)[:, :, 0]
    exact = network(start.expand(3, -1), data.x)[..., 0]
    exact = exact + torch.einsum("bpd,bd->bp", jacobian, adapted.local.mean - start)
    spread = torch.einsum("bpd,bde,bpe->bp", jacobian, covariance_of(adapted.local), jacobian)
    assert float(((found.mean - exact) / (spread / 20_000).sqrt()).abs().max()) < 5
    known = adapted.predict(data.x, linearised=True, temperature=0.3)
    assert known.law.batch_shape[0] == 1
    assert torch.allclose(known.mean, exact)
    assert torch.allclose(known.variance, 0.3 * spread + 0.04)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("local", [GaussNewton(2), Fisher(3), SGLD(5, step=1e-3)], ids=repr)
def test_linearised_predictions_without_draws_have_the_moments_of_those_with_them(local: LocalFit, full: bool) -> None:
    """For every form of V_i, and for queries taken a few at a time; 20000 draws, 72 z scores, false alarm 1e-5."""
    fit, data = fitted(Gaussian(0.2), [1, 2, 1], full), points()
    adapted = adapt(fit, data, ClosedForm(local))
    known, drawn = (adapted.predict(data.x, draws, seeded(), linearised=True) for draws in (None, 20_000))
    between = known.variance - 0.04
    assert float(((known.mean - drawn.mean) / (between / 20_000).sqrt()).abs().max()) < 5.5
    assert float(((drawn.variance - 0.04) / between - 1).abs().max()) < 5.5 * math.sqrt(2 / 20_000)


def test_queries_a_few_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, data = fitted(Gaussian(0.2), [1, 6, 1]), points()
    adapted = adapt(fit, data)
    whole = adapted.predict(data.x, linearised=True)
    monkeypatch.setattr("models.meta.adaptation.DERIVATIVES_AT_ONCE", 4 * 3 * fit.law.dim)
    parts = adapted.predict(data.x, linearised=True)
    assert torch.allclose(whole.mean, parts.mean)
    assert torch.allclose(whole.variance, parts.variance)


def covariance_of(local: LocalNormal) -> torch.Tensor:
    """(b, d, d), also where it is never formed."""
    if local.root is None or local.precision is None:
        return local.covariance
    return torch.linalg.inv(local.root.mT @ local.root + torch.diag(local.precision))


def test_predicted_classes_are_probabilities() -> None:
    fit, data = fitted(Categorical(), [2, 5, 3]), points(2, 3)
    found = adapt(fit, data).predict(data.x, 50, linearised=True)
    assert torch.allclose(found.mean.sum(-1), torch.ones(3, 6, **F))
    assert torch.allclose(found.log_prob(data.y), found.mean.gather(-1, data.y[..., None])[..., 0].log())
    with pytest.raises(OptionError, match="classes"):
        found.cdf(data.y)


@pytest.mark.parametrize("full", [False, True])
def test_prior_predictive_is_students_t(full: bool) -> None:
    """Draws of mu, Sigma, theta have the closed-form law: Mahalanobis distances have their cumulative probability.

    For two coordinates P(r^2 < c) = 1 - (1 + c / f)^(-f / 2), f degrees of freedom; false alarm 1e-6.
    """
    fit = fitted(Gaussian(1.0), [1, 1], full)
    draws = fit.prior_draws(20_000, seeded())
    law = fit.prior_predictive()
    if full:
        freedom = float(fit.law.df) - 1
        white = torch.linalg.solve_triangular(law.scale_tril, (draws - law.loc).mT, upper=False)
        for level in (0.3, 1.5, 4.0):
            exact = 1 - (1 + level / freedom) ** (-freedom / 2)
            share = float((white.square().sum(0) < level).double().mean())
            assert abs(share - exact) < 5 * math.sqrt(exact * (1 - exact) / len(draws))
    else:
        normal = law.base_dist
        freedom = float(fit.law.df)
        white = (draws - normal.loc) / normal.scale
        exact = freedom / (freedom - 2)
        error = (white.square().mean(0) - exact) / (white.square().std(0) / math.sqrt(len(draws)))
        assert float(error.abs().max()) < 5


def test_bad_options_of_adaptation() -> None:
    with pytest.raises(OptionError, match="steps"):
        Variational(steps=-1)
    with pytest.raises(OptionError, match="draws"):
        adapt(fitted(Gaussian(0.5), [1, 1]), points()).predict(points().x, 0, linearised=True)
    with pytest.raises(OptionError, match="draws"):
        adapt(fitted(Gaussian(0.5), [1, 1]), points()).predict(points().x, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="2 episodes, and 3"):
        adapt(fitted(Gaussian(0.5), [1, 1]), points()).predict(points().x[:2], linearised=True)
    with pytest.raises(DataError, match="have none"):
        cooled(fitted(Gaussian(0.5), [1, 1]), Episodes(points().x, points().y))
    with pytest.raises(DataError, match="empty support"):
        Episodes(torch.ones(1, 0, 1), torch.ones(1, 0))


# Temperature ----------------------------------------------------------------------------------------------------------


def test_temperature_scales_the_spread_of_draws() -> None:
    """A linear network with Gaussian noise: variance sigma^2 + T x' V x, and the one network at m_i for T = 0."""
    base, data = fitted(Gaussian(0.3), [1, 1]), points()
    adapted, x = adapt(base, data), data.x[:, :2]
    row, all_rows = (torch.cat([v, torch.ones_like(v)], -1) for v in (x, data.x))
    covariance = torch.linalg.inv(torch.diag(base.law.precision()) + all_rows.mT @ all_rows / 0.09)
    spread = torch.einsum("bpi,bij,bpj->bp", row, covariance, row)
    for temperature in (0.25, 1.0, 4.0):
        found = adapted.predict(x, 20_000, temperature=temperature)
        between = found.variance - 0.09
        assert torch.allclose(between, temperature * spread, rtol=6 * math.sqrt(2 / 20_000))
    cold = adapted.predict(x, temperature=0.0)
    assert cold.law.batch_shape[0] == 1
    assert torch.allclose(cold.mean, base.hierarchy.network(adapted.local.mean, x)[..., 0])
    with pytest.raises(OptionError, match="temperature"):
        adapted.predict(x, temperature=-1.0)


def test_cooling_finds_the_temperature_of_the_data() -> None:
    """Lines drawn from the prior itself ask for T = 1; with a prior 100 times too wide, less."""
    lines = LinearRegressions(torch.zeros(2, **F), torch.full((2,), 0.5, **F), 0.3, 1, 20)(400, seeded())
    network = mlp([1, 1])
    network.module.double()

    def best(variance: float) -> float:
        law = NormalInverseGamma.around(torch.zeros(2, **F), 1e9, 1e9, variance)
        fit = FittedMeta(Hierarchy(network, Gaussian(0.3), law), law, None, GaussNewton(1), "draw", 1e9, torch.zeros(0))
        return cooled(fit, lines, temperatures=(0.0, 0.03, 1.0, 30.0), draws=200)

    assert best(0.25) == 1.0
    assert best(25.0) < 1.0
