"""The NIW guide against coordinate ascent, the sheet's numbers, and what it promises about counts and episodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from gaussian_reference import F, Y, episodes, exact, hierarchy
from torch import Tensor

import ppl
from models.meta import (
    SGLD,
    CoordinateAscent,
    Episodes,
    Fisher,
    FittedMeta,
    Gaussian,
    GaussNewton,
    Hierarchy,
    NIWMeta,
    NormalInverseGamma,
    NormalInverseWishart,
    mlp,
)
from models.meta.local import close
from ppl.errors import CapabilityError, CheckpointError, NotFiniteError, OptionError, ProgramError, ShapeError
from ppl.monitor import Monitor
from ppl.testing import check_backend

QUADRATIC = {"expectation": "quadratic", "local": GaussNewton(steps=1)}


def lines(number: int, generator: torch.Generator) -> Episodes:
    """Regressions whose slopes are N(2, 0.3^2) and whose intercepts are N(-1, 0.1^2), five noisy points each."""
    x = torch.randn(number, 5, 1, generator=generator, **F)
    weights = torch.tensor([2.0, -1.0], **F) + torch.tensor([0.3, 0.1], **F) * torch.randn(
        number, 2, generator=generator, **F
    )
    y = weights[:, :1] * x[..., 0] + weights[:, 1:] + 0.1 * torch.randn(number, 5, generator=generator, **F)
    return Episodes(x, y)


def line_model(full: bool = False, sigma: Gaussian | None = None, hidden: bool = False) -> Hierarchy:
    network = mlp([1, 8, 1] if hidden else [1, 1])
    network.module.double()
    kind = NormalInverseWishart if full else NormalInverseGamma
    return Hierarchy(network, sigma or Gaussian(0.1), kind.around(network.start, 0.1, 4.0, 0.5))


# The reference example ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_coordinate_ascent_reaches_the_listed_optimum(full: bool) -> None:
    """n_0 = 15, l_0 = 12.1, m_0 = 1.14336, V_0 = 3.02407 and ELBO -13.1322, for data rounded to four digits."""
    fitted = CoordinateAscent(tolerance=0.0).fit(hierarchy(full).program(episodes()))
    law = fitted.law
    assert (float(law.df), float(law.count)) == (15.0, pytest.approx(12.1))
    assert abs(float(law.mean) - 1.14336) < 2e-5
    assert abs(float(law.scale) - 3.02407) < 2e-4
    assert abs(float(fitted.elbo(episodes()).value) - (-13.1322)) < 5e-4
    assert abs(float(law.precision()) - 4.960) < 5e-4
    assert abs(float(law.scale / 13) - 0.2326) < 5e-5
    _, local = fitted.local_posteriors(episodes().points, torch.Generator())
    # Half a unit of the last digit, of the datum and of the value.
    assert abs(float(local.mean[0]) - 1.0241) < 1e-4
    assert abs(float(local.mean[4]) - 1.3740) < 1e-4
    gap = exact().log_evidence - float(fitted.elbo(episodes()).value)
    assert abs(gap - 0.687) < 5e-4
    assert bool((fitted.history.diff() > -1e-10).all())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("update", ["gradient", "natural"])
def test_niw_guide_reaches_coordinate_ascent(full: bool, update: str) -> None:
    """All four numbers, from the prior, by Adam and by natural steps."""
    program = hierarchy(full).program(episodes())
    law = CoordinateAscent(tolerance=0.0).fit(program).law
    steps = 400 if update == "gradient" else 40
    fitted = NIWMeta(steps=steps, lr=0.05, update=update, **QUADRATIC).fit(program)
    for name in ("mean", "scale", "count", "df"):
        assert torch.allclose(getattr(fitted.law, name), getattr(law, name), rtol=1e-6), name


@pytest.mark.parametrize("full", [False, True])
def test_the_scale_has_a_rate_of_its_own(full: bool) -> None:
    """From a start 18 times too narrow log V_0 has 2.9 to go; 200 falling steps of 0.01 go 1.0 at most, or 2.0 by the
    logarithm of the root, which the full law has.
    """
    program = hierarchy(full).program(episodes())
    best = CoordinateAscent(tolerance=0.0).fit(program).law.scale.log()
    far = CoordinateAscent(tolerance=0.0).fit(program)
    far = dataclasses.replace(far, law=dataclasses.replace(far.law, scale=0.055 * far.law.scale))

    def miss(scale_lr: float | None) -> float:
        options = NIWMeta(steps=200, lr=0.01, scale_lr=scale_lr, average=0.0, **QUADRATIC)
        return float((options.fit(program, start=far).law.scale.log() - best).abs().max())

    assert miss(None) == miss(0.01) > 0.85
    assert miss(0.2) < 0.01


def test_draws_of_the_local_posterior_have_the_same_optimum() -> None:
    """One draw of q_i for each episode and step, as published: m_0 within a tenth of its posterior spread."""
    fitted = NIWMeta(steps=300, lr=0.05, average=0.5, local=GaussNewton(1)).fit(hierarchy().program(episodes()))
    assert abs(float(fitted.law.mean) - 1.14336) < 0.03
    assert abs(float(fitted.law.scale) - 3.024) < 0.2


@pytest.mark.parametrize("update", ["gradient", "natural"])
def test_subsampled_plates_reach_the_optimum_of_full_ones(update: str) -> None:
    """With batches of 4 of 12: n_0 = nu_0 + 12, not + 4; m_0 and V_0 within the noise of the batches.

    A batch mean of m_i has a spread of 0.18 and N times a batch's scatter one of 1.1; 100 batches are averaged, and the
    bounds are five such errors. With nu_0 + 4 counts the optimum of V_0 is 1.3.
    """
    program = hierarchy().program(episodes(), batch=4)
    options = NIWMeta(steps=250, lr=0.05, update=update, average=0.4, **QUADRATIC)
    law = options.fit(program).law
    assert float(law.df) == 15.0
    assert float(law.count) == pytest.approx(12.1)
    assert abs(float(law.mean) - 1.14336) < 0.09
    assert abs(float(law.scale) - 3.024) < 0.55


def objective(numbers: Tensor, kept: bool = True) -> Tensor:
    """J of (m_0, V_0, l_0, n_0) with local posteriors profiled out."""
    model, points = hierarchy(), episodes().points
    mean, scale, count, df = numbers
    law = model.prior.replaced(mean.reshape(1), count, df, scale.reshape(1))
    form = GaussNewton(steps=1)(model, law, points, None, torch.Generator())
    local = close(form, law.mean, law.precision())
    each = form.expected(local) + law.expected_kl(local.mean, local.covariance, local.log_det)
    return each.mean() + (law.kl(model.prior) / 12 if kept else 0.0)


def test_counts_are_stationary_at_their_analytic_optimum() -> None:
    """The slope of J vanishes at n_0 = 15 and l_0 = 12.1; without the KL of phi it is negative in both, everywhere."""
    law = CoordinateAscent(tolerance=0.0).fit(hierarchy().program(episodes())).law
    numbers = torch.stack([law.mean[0], law.scale[0], law.count, law.df]).requires_grad_()
    (slope,) = torch.autograd.grad(objective(numbers), numbers)
    assert float(slope.abs().max()) < 1e-6
    for count in (1.0, 12.1, 1e4):
        at = torch.tensor([float(law.mean), float(law.scale), count, count], **F).requires_grad_()
        (slope,) = torch.autograd.grad(objective(at, kept=False), at)
        assert float(slope[2]) < 0
        # Along V_0 / n_0 held: n_0 and V_0 grow together.
        assert float(slope[3] + slope[1] * law.scale[0] / count) < float(slope[3]) or float(slope[3]) < 0


def test_learned_counts_warn_and_are_late() -> None:
    """The option exists and says that it is worse: after 300 steps l_0 is still on its way from 0.1 to 12.1."""
    options = NIWMeta(steps=300, lr=0.05, counts="learned", **QUADRATIC)
    with pytest.warns(UserWarning, match="nu_0 \\+ N"):
        fitted = options.fit(hierarchy().program(episodes()))
    assert 3.0 < float(fitted.law.df) < 15.5
    assert 0.2 < float(fitted.law.count) < 12.1
    analytic = CoordinateAscent().fit(hierarchy().program(episodes()))
    assert float(fitted.history[-1]) < float(analytic.history[-1]) - 0.1


def test_gradient_is_the_reptile_direction() -> None:
    """With the fits held, dJ/dm_0 of the quadratic objective is n_0 V_0^-1 (m_0 - mean of m_i)."""
    model, points = line_model(hidden=True), lines(6, torch.Generator().manual_seed(1)).points
    prior = model.prior
    mean = prior.mean.clone().requires_grad_()
    law = prior.replaced(mean, prior.count, prior.df, prior.scale)
    form = GaussNewton()(model, law, points, None, torch.Generator())
    local = close(form, law.mean, law.precision())
    total = form.expected(local) + law.expected_kl(local.mean, local.covariance, local.log_det)
    (slope,) = torch.autograd.grad(total.mean(), mean)
    mean, middle = mean.detach(), local.mean.detach().mean(0)
    assert torch.allclose(slope, law.precision() * (mean - middle), atol=1e-9)
    # That is also the direction of Reptile: towards the average of adapted parameters.
    assert float(slope @ (mean - middle)) > 0


def test_a_linearisation_that_is_differentiated() -> None:
    """`through=True`: the slope of J in m_0 is that of central differences, derivatives of the network included."""
    model, points = line_model(hidden=True), lines(4, torch.Generator().manual_seed(1)).points
    prior, options = model.prior, GaussNewton(steps=1, through=True)

    def total(mean: Tensor) -> Tensor:
        law = prior.replaced(mean, prior.count, prior.df, prior.scale)
        form = options(model, law, points, None, torch.Generator())
        local = close(form, law.mean, law.precision())
        return (form.expected(local) + law.expected_kl(local.mean, local.covariance, local.log_det)).mean()

    mean = prior.mean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(mean), mean)
    for i in (0, 9, 20):
        step = 1e-5 * torch.eye(len(mean), **F)[i]
        difference = float(total(prior.mean + step) - total(prior.mean - step)) / 2e-5
        assert float(slope[i]) == pytest.approx(difference, rel=1e-5, abs=1e-6)
    fitted = NIWMeta(steps=20, batch=8, lr=0.02, local=options, expectation="quadratic").fit(model, lines)
    assert float(fitted.history[-5:].mean()) > float(fitted.history[:5].mean())
    with pytest.raises(OptionError, match="steps=1"):
        GaussNewton(steps=2, through=True)


# Regressions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_two_coordinates_reach_coordinate_ascent(full: bool) -> None:
    """Correlated local posteriors; the same optimum by both, and near the truth."""
    program = line_model(full).program(lines(64, torch.Generator().manual_seed(0)))
    law = CoordinateAscent().fit(program).law
    fitted = NIWMeta(steps=60, batch=64, update="natural", **QUADRATIC).fit(program)
    assert torch.allclose(fitted.law.mean, law.mean, atol=1e-6)
    assert torch.allclose(fitted.law.scale, law.scale, rtol=1e-4)
    assert float((law.mean - torch.tensor([2.0, -1.0], **F)).abs().max()) < 5 * 0.3 / 8


def test_endless_episodes_from_a_source() -> None:
    """A function of (how many, generator) is enough; N is what was drawn."""
    fitted = NIWMeta(steps=60, batch=16, update="natural").fit(line_model(), lines)
    assert float(fitted.law.df) == 4.0 + 60 * 16
    assert float((fitted.law.mean - torch.tensor([2.0, -1.0], **F)).abs().max()) < 0.05
    spread = (fitted.law.scale / fitted.law.df).sqrt()
    assert torch.allclose(spread, torch.tensor([0.3, 0.1], **F), rtol=0.2)


def test_noise_is_learned_with_the_law() -> None:
    """sigma starts five times too large and ends at 0.1."""
    options = NIWMeta(steps=200, batch=16, lr=0.05, draws=4, local=GaussNewton(1))
    fitted = options.fit(line_model(sigma=Gaussian(0.5, learned=True)), lines(128, torch.Generator().manual_seed(0)))
    assert fitted.sigma is not None
    assert abs(float(fitted.sigma) - 0.1) < 0.02


@pytest.mark.parametrize("local", [GaussNewton(), Fisher(steps=10), SGLD(steps=10, burnin=2, step=1e-3)], ids=repr)
def test_every_local_fit_trains_a_network(local: object) -> None:
    """The evidence bound rises on nonlinear networks, with no state of any episode."""
    options = NIWMeta(steps=40, batch=8, lr=0.03, local=local, draws=2)  # type: ignore[arg-type]
    fitted = options.fit(line_model(hidden=True, sigma=Gaussian(0.3)), lines)
    assert float(fitted.history[-10:].mean()) > float(fitted.history[:10].mean())
    names = {f.name for f in dataclasses.fields(fitted)}
    assert not any("theta" in n or "episode" in n for n in names)


# Resuming, files, contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["gradient", "natural"])
def test_a_killed_fit_goes_on_where_it_was(tmp_path: Path, update: str) -> None:
    """Stopped after 7 of 20 steps and resumed: the same law to the last digit, from an endless source too."""
    options, model = NIWMeta(steps=20, batch=4, update=update), line_model()
    whole = options.fit(model, lines, seed=3)
    for stop in (True, False):
        generator = torch.Generator().manual_seed(3)
        monitor = Monitor(
            callback=(lambda event: event.step == 6) if stop else None,
            checkpoint=tmp_path / "run",
            checkpoint_every=0,
            generator=generator,
        )
        with monitor:
            fitted = options.fit(model, lines, generator=generator, monitor=monitor)
        assert fitted.complete is not stop
    assert torch.equal(fitted.law.mean, whole.law.mean)
    assert torch.equal(fitted.law.scale, whole.law.scale)
    assert torch.equal(fitted.history, whole.history)


def test_save_load_and_go_on(tmp_path: Path) -> None:
    """The law survives a file; a fit can start from it; damaged or other files are refused."""
    model = line_model()
    fitted = NIWMeta(steps=10, batch=8, update="natural").fit(model, lines)
    fitted.save(tmp_path / "law.safetensors")
    loaded = FittedMeta.load(tmp_path / "law.safetensors", model, GaussNewton())
    for name in ("mean", "scale", "count", "df"):
        assert torch.equal(getattr(loaded.law, name), getattr(fitted.law, name))
    further = NIWMeta(steps=1, batch=8, lr=1e-9).fit(model, lines, start=loaded)
    assert torch.allclose(further.law.mean, fitted.law.mean, atol=1e-6)
    with pytest.raises(ShapeError, match="coordinates"):
        FittedMeta.load(tmp_path / "law.safetensors", line_model(hidden=True), GaussNewton())
    with pytest.raises(OptionError, match="NormalInverseWishart"):
        FittedMeta.load(tmp_path / "law.safetensors", line_model(full=True), GaussNewton())
    with (tmp_path / "law.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"xxx")
    with pytest.raises(CheckpointError):
        FittedMeta.load(tmp_path / "law.safetensors", model, GaussNewton())


@pytest.mark.parametrize("full", [False, True])
def test_contract_of_a_backend(full: bool) -> None:
    """Shapes, seeds, global state, interruption, resumption, files, many problems."""
    check_backend(NIWMeta(steps=6, **QUADRATIC), line_model(full).program(lines(4, torch.Generator().manual_seed(0))))
    check_backend(CoordinateAscent(rounds=6), hierarchy(full, centred=False).program(episodes()))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("steps", {"steps": 0}),
        ("lr", {"lr": -1.0}),
        ("scale_lr", {"scale_lr": 0.0}),
        ("update", {"update": "newton"}),
        ("counts", {"counts": "none"}),
        ("expectation", {"expectation": "exact"}),
        ("forgetting", {"forgetting": 0.4}),
        ("local", {"local": GaussNewton}),
        ("average", {"average": 1.0}),
        ("analytic", {"counts": "learned", "update": "natural"}),
    ],
)
def test_bad_options(words: str, options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=words):
        NIWMeta(**options)  # type: ignore[arg-type]


def test_programs_and_sources_that_do_not_fit() -> None:
    """Each has one clear error."""

    def other(y: Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        mu = pyro.sample("mu", dist.Normal(torch.zeros((), **F), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ProgramError, match="Hierarchy"):
        NIWMeta().fit(ppl.Program(other, Y[0]))
    with pytest.raises(OptionError, match="give episodes"):
        NIWMeta().fit(line_model())
    with pytest.raises(OptionError, match="source returned"):
        NIWMeta().fit(line_model(), lambda number, generator: torch.zeros(1))  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match="learned sigma"):
        NIWMeta(update="natural").fit(line_model(sigma=Gaussian(0.1, learned=True)), lines)
    with pytest.raises(CapabilityError, match="linear"):
        CoordinateAscent().fit(line_model(hidden=True).program(lines(3, torch.Generator())))
    with pytest.raises(OptionError, match="burn-in"):
        SGLD(steps=5, burnin=4)
    with pytest.raises(NotFiniteError, match="step 0"):
        NIWMeta(steps=3, local=SGLD(steps=400, step=1e6)).fit(line_model(hidden=True), lines)
