"""SVI against conjugate posteriors, closed-form bounds and itself after interruptions."""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor
from torch.distributions import MultivariateNormal

import ppl
from ppl.errors import CheckpointError, NotFiniteError, OptionError, ShapeError
from ppl.monitor import Monitor
from ppl.vi import SVI, AutoGuide, FittedGuide, Flow, FullRank, Guide, LowRank, MeanField

DIM, ROWS, NOISE = 4, 6, 0.5


def design(rank: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(rank, DIM, dtype=torch.float64, generator=generator),
        torch.randn(rank, dtype=torch.float64, generator=generator),
    )


def linear_model(A: Tensor, y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(A @ x, NOISE).to_event(1), obs=y)


def exact(A: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Posterior mean, covariance, precision and log evidence."""
    precision = torch.eye(DIM, dtype=torch.float64) + A.mT @ A / NOISE**2
    covariance = torch.linalg.inv(precision)
    marginal = A @ A.mT + NOISE**2 * torch.eye(len(y), dtype=torch.float64)
    evidence = MultivariateNormal(torch.zeros(len(y), dtype=torch.float64), marginal).log_prob(y)
    return covariance @ A.mT @ y / NOISE**2, covariance, precision, evidence


@pytest.mark.parametrize("guide", [FullRank(), LowRank(4)], ids=repr)
def test_gaussian_posterior_is_reached_exactly(guide: FullRank | LowRank) -> None:
    """Path gradients vanish draw by draw at the optimum, so the error is that of the optimiser, not of Monte Carlo."""
    A, y = design()
    mean, covariance, _, evidence = exact(A, y)
    fitted = SVI(guide=guide, steps=1500, lr=0.03).fit(ppl.Program(linear_model, A, y), seed=0)
    torch.testing.assert_close(fitted.params["loc"], mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(guide.covariance(fitted.params), covariance, rtol=0, atol=1e-3)
    elbo = fitted.elbo(64, seed=1)
    assert abs(float(elbo.value - evidence)) < 1e-4
    assert float(elbo.stderr) < 1e-3


def test_low_rank_is_exact_when_the_posterior_is() -> None:
    """One observed direction: posterior covariance = I - (rank one), reached with rank DIM - 1, missed with rank 1."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(1, DIM, dtype=torch.float64, generator=generator)
    y = torch.tensor([1.5], dtype=torch.float64)
    program = ppl.Program(linear_model, A, y)
    mean, covariance, _, evidence = exact(A, y)
    good = SVI(guide=LowRank(DIM - 1), steps=2500, lr=0.03).fit(program, seed=0)
    torch.testing.assert_close(LowRank(3).covariance(good.params), covariance, rtol=0, atol=2e-3)
    torch.testing.assert_close(good.params["loc"], mean, rtol=0, atol=2e-3)
    poor = SVI(guide=LowRank(1), steps=1000, lr=0.03).fit(program, seed=0).elbo(2000, seed=0)
    assert float(poor.value) < float(evidence) - 4 * float(poor.stderr)


@pytest.mark.parametrize("path", [True, False])
def test_mean_field_underestimates_as_the_theory_says(path: bool) -> None:
    """Variances 1 / Lambda_ii and the right mean; ELBO = log Z - (sum log Lambda_ii - log det Lambda) / 2.

    Averaged iterates; the bound of 3 % covers the optimiser's jitter, and the marginal variances differ by over 30 %.
    """
    A, y = design()
    mean, covariance, precision, evidence = exact(A, y)
    options = SVI(steps=3000, lr=0.02, particles=64, average=0.3, path_gradient=path)
    fitted = options.fit(ppl.Program(linear_model, A, y), seed=0)
    variance = (2 * fitted.params["log_scale"]).exp()
    torch.testing.assert_close(variance, 1 / precision.diagonal(), rtol=0.03, atol=0)
    torch.testing.assert_close(fitted.params["loc"], mean, rtol=0, atol=0.02)
    assert float((covariance.diagonal() * precision.diagonal()).max()) > 1.3
    gap = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])
    elbo = fitted.elbo(20000, seed=1)
    assert abs(float(elbo.value - (evidence - gap))) < 5 * float(elbo.stderr)  # false alarm about 1e-6


def banana(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b + 1.5 * a**2, 0.3), obs=y)


def test_flow_beats_the_gaussian_on_a_banana() -> None:
    """By more than 5 joint standard errors, and stays below the evidence (by quadrature over a)."""
    program = ppl.Program(banana, torch.tensor(1.0, dtype=torch.float64))
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    # b integrates out: y | a ~ N(1.5 a^2, 4 + 0.09).
    log_f = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(1.5 * grid**2, 4.09**0.5).log_prob(torch.tensor(1.0))
    evidence = float(torch.logsumexp(log_f, 0) + (grid[1] - grid[0]).log())
    flow = SVI(guide=Flow(transforms=2, hidden=(16,)), steps=500, lr=0.02).fit(program, seed=0).elbo(4000, seed=1)
    gauss = SVI(guide=FullRank(), steps=500, lr=0.02).fit(program, seed=0).elbo(4000, seed=1)
    assert float(flow.value - gauss.value) > 5 * float(torch.hypot(flow.stderr, gauss.stderr))
    assert float(flow.value) < evidence + 4 * float(flow.stderr)


@pytest.mark.parametrize("guide", [AutoGuide(autoguide.AutoMultivariateNormal), AutoGuide(autoguide.AutoNormal)])
def test_pyro_autoguides_run_on_the_program(guide: AutoGuide) -> None:
    A, y = design()
    mean, covariance, precision, _ = exact(A, y)
    fitted = SVI(guide=guide, steps=800, lr=0.03, particles=32).fit(ppl.Program(linear_model, A, y), seed=0)
    x = fitted.posterior(20000, seed=0).flatten("x")
    full = guide.name == "AutoMultivariateNormal"
    expected = covariance.diagonal() if full else 1 / precision.diagonal()
    torch.testing.assert_close(x.var(0), expected, rtol=0.12, atol=0)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.05)


def test_constrained_sites_and_deterministic_values() -> None:
    """Draws lie in their supports; a log-normal posterior is a normal one in z: exact for FullRank."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        log_scale = pyro.deterministic("log_scale", scale.log())
        pyro.sample("y", dist.Normal(log_scale, 0.5), obs=y)

    y = torch.tensor(1.0, dtype=torch.float64)
    posterior = ppl.infer(ppl.Program(model, y), SVI(guide=FullRank(), steps=800, lr=0.03), draws=200, seed=0)
    assert bool((posterior["scale"] > 0).all())
    torch.testing.assert_close(posterior["scale"].log(), posterior["log_scale"])
    assert isinstance(posterior.guide, FittedGuide)
    assert abs(float(posterior.guide.params["loc"]) - 0.8) < 1e-3  # 1 / (1 + 0.25)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(y)
    assert abs(float(posterior.info["elbo"] - evidence)) < 1e-4
    assert posterior.attrs["exact"] == "never"
    assert posterior.log_evidence is None


def test_learned_parameters_reach_the_maximum_of_the_marginal_likelihood() -> None:
    """y_i ~ N(0, 1 + s^2): with an exact guide the bound is the likelihood, s^2 = mean(y^2) - 1."""

    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5, dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = 2.5 * torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    program = ppl.Program(model, y)
    posterior = ppl.infer(program, SVI(steps=1500, lr=0.03, average=0.3), draws=100, seed=0)
    expected = (y.square().mean() - 1).sqrt()
    torch.testing.assert_close(posterior.parameters["scale"], expected, rtol=3e-3, atol=0)
    assert float(program.parameters["scale"]) == 0.5  # the program given is not touched
    shrink = expected**2 / (1 + expected**2)
    torch.testing.assert_close(posterior.guide.params["loc"], shrink * y, rtol=0, atol=5e-3)


def test_subsampled_fit_reaches_the_optimum_of_the_full_one() -> None:
    """y_i ~ N(mu, 1), 60 of them, 20 at a time: posterior of mu is N(60 ybar / 61, 1 / 61); ELBO on all data."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=20) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    y = 1 + torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fitted = SVI(steps=3000, lr=0.02, average=0.3).fit(ppl.Program(model, y), seed=0)
    sd = 61**-0.5
    assert abs(float(fitted.params["loc"] - y.sum() / 61)) < 0.15 * sd
    assert abs(float(fitted.params["log_scale"].exp()) / sd - 1) < 0.05
    marginal = MultivariateNormal(torch.zeros(60, dtype=torch.float64), torch.eye(60, dtype=torch.float64) + 1.0)
    assert abs(float(fitted.elbo(2000, seed=0).value - marginal.log_prob(y))) < 0.05


def test_local_latents_of_a_subsampled_plate() -> None:
    """mu ~ N(0,1), x_i ~ N(mu, 1), y_i ~ N(x_i, 1): mean-field optimum in closed form from the full precision."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=5) as index:
            x = pyro.sample("x", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    n = 10
    y = 1 + torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    program = ppl.Program(model, y)
    fitted = SVI(steps=2500, lr=0.02, average=0.3).fit(program, seed=0)
    precision = 2 * torch.eye(n + 1, dtype=torch.float64)
    precision[0, 0] = 1 + n
    precision[0, 1:] = precision[1:, 0] = -1
    mean = torch.linalg.solve(precision, torch.cat([torch.zeros(1, dtype=torch.float64), y]))
    sd = precision.diagonal().rsqrt()
    torch.testing.assert_close(fitted.params["log_scale"].exp(), sd, rtol=0.05, atol=0)
    assert float(((fitted.params["loc"] - mean) / sd).abs().max()) < 0.15
    posterior = fitted.posterior(50, seed=0)
    assert posterior["x"].shape == (1, 50, n)
    assert float(((posterior.mean("x") - mean[1:]) / sd[1:]).abs().max()) < 0.15 + 5 / 50**0.5


def small(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.fixture
def program() -> ppl.Program:
    return ppl.Program(small, torch.tensor([0.3, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("guide", [MeanField(), AutoGuide(autoguide.AutoNormal)])
def test_a_killed_fit_goes_on_to_the_same_result(program: ppl.Program, tmp_path: Path, guide: Guide) -> None:
    backend = SVI(guide=guide, steps=60, average=0.5)
    whole = ppl.infer(program, backend, draws=20, chains=2, seed=3)

    class Killed(RuntimeError):
        pass

    for stop in (25, 100):  # inside the first fit, inside the second
        seen = 0

        def kill(event: ppl.Event, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise Killed

        folder = tmp_path / str(stop)
        with pytest.raises(Killed):
            ppl.infer(
                program, backend, draws=20, chains=2, seed=3, callback=kill, checkpoint=folder, checkpoint_every=0
            )
        again = ppl.infer(program, backend, draws=20, chains=2, seed=3, checkpoint=folder, checkpoint_every=0)
        assert torch.equal(again["x"], whole["x"])
        assert torch.equal(again.info["elbo_history"], whole.info["elbo_history"])


def test_same_seed_same_draws(program: ppl.Program) -> None:
    backend = SVI(steps=30)
    first, second, other = (ppl.infer(program, backend, draws=10, chains=2, seed=s)["x"] for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (2, 10, 2)
    assert not torch.equal(first[0], first[1])


def test_files_and_continuing(program: ppl.Program, tmp_path: Path) -> None:
    backend = SVI(guide=FullRank(), steps=400, lr=0.03)
    fitted = backend.fit(program, seed=0)
    fitted.save(tmp_path / "guide.safetensors")
    loaded = FittedGuide.load(tmp_path / "guide.safetensors", program)
    assert torch.equal(loaded.posterior(10, seed=1)["x"], fitted.posterior(10, seed=1)["x"])
    assert torch.equal(loaded.log_prob(torch.zeros(1, 2)), fitted.log_prob(torch.zeros(1, 2)))
    more = backend.fit(program, seed=1, start=loaded)
    assert float(more.history[0]) > float(fitted.history[0])
    torch.testing.assert_close(more.params["loc"], torch.tensor([0.24, -0.8], dtype=torch.float64), atol=1e-3, rtol=0)
    warm = SVI(guide=FullRank(), steps=300).fit(program.with_data(y=torch.ones(2).double()), seed=0, start=fitted)
    torch.testing.assert_close(warm.params["loc"], torch.full((2,), 0.8).double(), atol=5e-3, rtol=0)
    with pytest.raises(OptionError, match="go on"):
        SVI(guide=MeanField()).fit(program, start=fitted)
    A, y = design()
    with pytest.raises(ShapeError, match="sites"):
        FittedGuide.load(tmp_path / "guide.safetensors", ppl.Program(linear_model, A, y))
    auto = SVI(guide=AutoGuide(autoguide.AutoNormal), steps=3).fit(program)
    auto.save(tmp_path / "auto.safetensors")
    again = FittedGuide.load(tmp_path / "auto.safetensors", program)
    assert torch.equal(again.posterior(5, seed=1)["x"], auto.posterior(5, seed=1)["x"])
    fitted.posterior(10).save(tmp_path / "posterior.nc")
    meta, tensors = ppl.Posterior.load(tmp_path / "posterior.nc").guide.state()
    rebuilt = FittedGuide.from_state(meta, tensors, program)
    assert torch.equal(rebuilt.posterior(10, seed=1)["x"], fitted.posterior(10, seed=1)["x"])
    with pytest.raises(CheckpointError, match="fitted guide"):
        FittedGuide.from_state({"kind": "other"}, {}, program)


def test_interruption_and_early_stop(program: ppl.Program) -> None:
    posterior = ppl.infer(program, SVI(steps=100), draws=5, callback=lambda event: event.step == 9)
    assert not posterior.complete
    assert len(posterior.info["elbo_history"]) == 10
    early = ppl.infer(program, SVI(guide=FullRank(), steps=4000, lr=0.05, patience=100), draws=5)
    assert early.complete
    assert len(early.info["elbo_history"]) < 2000
    assert "settled" in early.attrs["notes"][0]


def test_k_hat_tells_a_poor_guide_from_a_good_one() -> None:
    """A student posterior with a normal guide has heavy weights; an exact guide has none."""

    def heavy(y: Tensor) -> None:
        with pyro.plate("plate", 4):
            x = pyro.sample("x", dist.Cauchy(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.sum(), 100.0), obs=y)

    poor = ppl.infer(ppl.Program(heavy, torch.tensor(0.0).double()), SVI(steps=300, lr=0.05), draws=2000)
    assert float(poor.info["pareto_k"]) > 0.7
    assert any("k-hat" in note for note in poor.attrs["notes"])
    A, y = design()
    good = ppl.infer(ppl.Program(linear_model, A, y), SVI(guide=FullRank(), steps=600, lr=0.05), draws=500)
    assert float(good.info["pareto_k"]) < 0.5


def test_bad_densities_and_options() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((x - 0.2).sqrt(), 1.0), obs=y)

    program = ppl.Program(model, torch.tensor(1.0).double())
    with pytest.raises(NotFiniteError, match="step"):
        SVI(guide=MeanField(init_scale=2.0), steps=50).fit(program)
    assert torch.isnan(SVI(steps=2).fit(program).posterior(1).info["elbo_stderr"])
    for options in ({"steps": 0}, {"lr": -1.0}, {"decay": "linear"}, {"average": 1.0}, {"patience": 1}):
        with pytest.raises(OptionError, match=next(iter(options))):
            SVI(**options)
    with pytest.raises(OptionError, match="guide"):
        SVI(guide=MeanField)  # type: ignore[arg-type]
    monitor = Monitor()
    A, y = design()
    SVI(steps=5, particles=3).fit(ppl.Program(linear_model, A, y), monitor=monitor)
    assert monitor.cost.gradient_evals == 15


def test_a_narrow_start_finds_a_wide_posterior() -> None:
    """The first steps keep the score term: path gradients of a flow that starts at a 50th of the scale wander."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(5), 5.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 50.0).to_event(1), obs=y)

    y = torch.full((5,), 30.0, dtype=torch.float64)
    evidence = dist.Normal(0.0, 2525**0.5).log_prob(y).sum()
    fitted = SVI(guide=Flow(transforms=1, hidden=(8,)), steps=400, lr=0.05).fit(ppl.Program(model, y), seed=0)
    assert float(evidence - fitted.elbo(500, seed=0).value) < 0.1


def test_natural_gradients_do_not_see_scales_and_correlations() -> None:
    """Variances 1 and 1e-6 along turned axes: the fitted covariance is right to 1e-3 in coordinates where it is one."""
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    matrix = turn * torch.tensor([0.0, 10.0, 100.0, 1000.0], dtype=torch.float64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ matrix, 1.0).to_event(1), obs=y)

    program = ppl.Program(model, torch.ones(4, dtype=torch.float64), compile="never")
    precision = torch.eye(4, dtype=torch.float64) + matrix @ matrix.mT
    factor = torch.linalg.cholesky(precision)

    def error(natural: bool) -> float:
        fitted = SVI(guide=FullRank(), steps=400, natural=natural).fit(program, seed=0)
        covariance = FullRank().covariance(fitted.params)
        return float((factor.mT @ covariance @ factor - torch.eye(4)).abs().max())

    assert error(True) < 1e-3
    assert error(False) > 0.1  # what the rule is for


def test_natural_gradients_of_few_draws_in_many_dimensions_stay_bounded() -> None:
    """Eight draws see 65 dimensions mostly as noise: unbounded, both rates here double variances until log p is -inf.

    A fit with a rate of .005 is slow enough to average the noise away, and is what the others have to reach.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(40, 64, generator=generator) / 4
    data = torch.sin(weights @ torch.randn(64, generator=generator)) + 0.4 * torch.randn(40, generator=generator)

    def model(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(math.log(0.3), 0.7))
        x = pyro.sample("x", dist.Normal(torch.zeros(64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(torch.sin(weights @ x), sigma).to_event(1), obs=y)

    def bound(lr: float) -> tuple[float, float]:
        last = SVI(guide=FullRank(), steps=600, particles=8, lr=lr).fit(ppl.Program(model, data), seed=0).history[-100:]
        return float(last.mean()), float(last.std() / 10)

    careful, error = bound(0.005)
    for lr in (0.1, 0.02):
        found, own = bound(lr)
        assert found > careful - 4 * math.hypot(error, own)
