"""Distribution Transformers against conjugate posteriors, with priors given at run time.

x ~ any mixture of Gaussians, y ~ N(x, 1): the posterior is the mixture of `Mixture.conditioned`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse import FittedDenoiser
from models.conjugate import inverse_gamma_family, log_variance_posterior, normal_family, normal_posterior
from models.fusion import Motion, kalman_update, recursion
from ppl import DistributionTransformer, FittedTransformer, Mixture, MixturePriors
from ppl.amortised.transformer_training import build_transformer, predict
from ppl.errors import CheckpointError, OptionError, ProgramError, ShapeError

F64 = torch.float64
LAW = MixturePriors()
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "depth": 2, "feedforward": 32, "batch": 128}
BACKEND = DistributionTransformer(components=2, steps=300, priors=LAW, **SMALL)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def fitted() -> FittedTransformer:
    """One training for all tests: some three seconds."""
    return BACKEND.fit(normal_family(), seed=0)


def problems(fitted: FittedTransformer, rows: int, seed: int = 1) -> tuple[Mixture, Tensor]:
    """Priors of the law, and data from them."""
    assert fitted.pairs is not None
    generator = seeded(seed)
    prior = LAW.sample(rows, 2, fitted.pairs.center, fitted.pairs.scale, generator)
    return prior, prior.draw((), generator) + torch.randn(rows, 1, generator=generator, dtype=F64)


# -- the network


def test_without_training_the_posterior_is_the_prior() -> None:
    """Whatever the data: in the frame of the prior's components nothing changes at the start."""
    pairs = BACKEND.pairs(normal_family())
    network = build_transformer(BACKEND, pairs, seeded()).double()
    z, y = pairs.draw(50, seeded(1))
    scales = pairs.measure(z, y)
    with torch.no_grad():
        prior, posterior = predict(network, scales, y)
    torch.testing.assert_close(posterior.log_prob(z), prior.log_prob(z))
    given = Mixture(*Mixture.unpacked(y[:, : pairs.columns.packed], 2, 1)).affine(
        1 / scales.z_sd, -scales.z_mean / scales.z_sd
    )
    torch.testing.assert_close(prior.log_prob(z), given.log_prob(z))


def test_components_are_equivariant(fitted: FittedTransformer) -> None:
    prior, y = problems(fitted, 20)
    turned = Mixture(prior.weights.flip(1), prior.means.flip(1), prior.scale_tril.flip(1))
    one, other = fitted.mixtures(prior, y=y), fitted.mixtures(turned, y=y)
    torch.testing.assert_close(one.means, other.means.flip(1))
    torch.testing.assert_close(one.weights, other.weights.flip(1))


def test_posteriors_of_a_batch_are_near_the_exact_ones(fitted: FittedTransformer) -> None:
    """Mean KL below 0.05 and a tenth of the prior's; a refit to 1000 weighted draws takes it below a third of that.

    Monte-Carlo error of the mean over 300 problems is about 0.005.
    """
    prior, y = problems(fitted, 300)
    exact, _ = normal_posterior(prior, y)
    z = exact.draw((500,), seeded(2))
    q = fitted.mixtures(prior, y=y)
    truth = exact.log_prob(z)
    before, blind = ((truth - law.log_prob(z)).mean() for law in (q, prior))
    assert float(before) < 0.05
    assert float(before) < 0.1 * float(blind)
    own = q.defended(prior)
    draws = own.draw((1000,), seeded(3))
    log_weight = exact.log_prob(draws) - own.log_prob(draws)
    after = (truth - q.refined(draws, log_weight.softmax(0)).log_prob(z)).mean()
    assert float(after) < float(before) / 3 + 0.002


def test_data_that_tell_nothing_leave_the_prior() -> None:
    """y does not depend on x: after training KL to the prior is below 1e-3, and a note says what was learned."""

    def model(y: Tensor) -> None:
        pyro.sample("x", dist.Normal(y.new_zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(y.new_zeros(1), 1.0).to_event(1), obs=y)

    monitor = ppl.Monitor()
    program = ppl.Program(model, torch.zeros(1, dtype=F64), compile="never")
    blind = replace(BACKEND, steps=150).fit(program, monitor=monitor)
    prior, y = problems(blind, 100)
    z = prior.draw((500,), seeded(2))
    assert float((prior.log_prob(z) - blind.mixtures(prior, y=y).log_prob(z)).mean()) < 1e-3
    assert any("no more than the prior" in note for note in monitor.notes)


# -- draws


def test_weighted_draws_are_exact(fitted: FittedTransformer) -> None:
    """Mean and evidence within 4.5 standard errors, for four priors at once; false alarm 1e-4 in all."""
    prior, y = problems(fitted, 4, seed=5)
    exact, evidence = normal_posterior(prior, y)
    posterior = fitted.posterior(4000, program=fitted.program.over(y=y), prior=prior, seed=1)
    assert posterior.weights is not None
    assert posterior.log_evidence is not None
    assert bool((posterior.info["pareto_k"] < 0.7).all())
    weights, x = posterior.weights.squeeze(1), posterior["x"].squeeze(1)[..., 0]
    mean = (weights * x).sum(1)
    stderr = (weights.square() * (x - mean[:, None]).square()).sum(1).sqrt()
    assert float(((mean - exact.mean[:, 0]) / stderr).abs().max()) < 4.5
    value, error = posterior.log_evidence
    assert float(((value - evidence) / error).abs().max()) < 4.5


def test_without_correction_draws_are_those_of_the_mixture(fitted: FittedTransformer) -> None:
    prior, y = problems(fitted, 1, seed=6)
    posterior = fitted.posterior(8000, prior=prior, y=y[0], correct=False)
    assert posterior.log_weight is None
    assert posterior.attrs["exact"] == "never"
    q = fitted.mixture(prior=prior, y=y[0])
    gap = float(posterior.mean("x") - q.mean) / float(q.covariance) ** 0.5
    assert abs(gap) < 4.5 / 8000**0.5


def test_the_prior_is_read_off_the_program(fitted: FittedTransformer, tmp_path: Path) -> None:
    """A file serves a program with another prior: that of the program, in one pass and in the weights."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(y.new_full((1,), 0.7), 0.5).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    program = ppl.Program(model, torch.full((1,), -1.0, dtype=F64), compile="never")
    fitted.save(tmp_path / "a.safetensors")
    posterior = ppl.infer(program, DistributionTransformer(file=tmp_path / "a.safetensors"), draws=4000)
    prior = Mixture.of(dist.Normal(torch.full((1,), 0.7, dtype=F64), 0.5).to_event(1))
    exact, evidence = normal_posterior(prior, program.data["y"])
    assert float((posterior.mean("x") - exact.mean).abs()) < 0.05  # 6 standard errors at half of the draws
    assert posterior.log_evidence is not None
    assert float((posterior.log_evidence.value - evidence).abs()) < 0.05
    assert posterior.attrs["exact"] == "in_the_limit"


def test_many_problems_are_the_single_ones(fitted: FittedTransformer) -> None:
    prior, y = problems(fitted, 3)
    rows, many = fitted.mixtures(prior, y=y), fitted.mixture(program=fitted.program.over(y=y), prior=prior)
    for i in range(3):
        alone = fitted.mixture(prior=prior[i], y=y[i])
        for found in (rows[i], many[i]):
            torch.testing.assert_close(found.means, alone.means)
            torch.testing.assert_close(found.weights, alone.weights)


def test_parameters_of_the_prior_as_data() -> None:
    """The wide inverse-gamma family: KL a third of the prior's after four hundred small steps."""
    backend = DistributionTransformer(components=3, steps=400, prior_sites=("a", "b"), **SMALL)
    trained = backend.fit(inverse_gamma_family())
    assert trained.pairs is not None
    _, shown = trained.pairs.draw(200, seeded(1))
    a, b, y = shown[:, 0].exp(), shown[:, 1].exp(), shown[:, 2]
    gamma = torch._standard_gamma((a + 0.5).expand(400, -1).contiguous(), generator=seeded(2))
    z = ((b + 0.5 * y.square()).log() - gamma.log())[..., None]
    network = copy.deepcopy(trained.network).double()
    prior, q = (
        law.affine(trained.scales.z_sd, trained.scales.z_mean) for law in predict(network, trained.scales, shown)
    )
    truth = log_variance_posterior(a, b, y).log_prob(z[..., 0])
    assert float((truth - q.log_prob(z)).mean()) < float((truth - prior.log_prob(z)).mean()) / 3
    with pytest.raises(OptionError, match="takes no other"):
        trained.mixture(prior=prior[0])


@pytest.mark.slow
def test_ranks_are_uniform(fitted: FittedTransformer, tmp_path: Path) -> None:
    """SBC of weighted draws under the program's own prior; false alarm 1e-3."""
    fitted.save(tmp_path / "a.safetensors")
    backend = DistributionTransformer(file=tmp_path / "a.safetensors")
    found = ppl.diagnostics.sbc(fitted.program, backend, simulations=200, draws=400)
    assert found.passes(1e-3), str(found)


# -- recursion


def test_a_posterior_can_be_the_next_prior(fitted: FittedTransformer) -> None:
    """Ten steps of tracking: mean -log density of the truth within 0.05 nats of the Kalman filter's, per step.

    Both filters see the same 200 sequences, so that their difference has a standard error of some 0.005. A filter that
    kept its prior would lose 0.15 nats.
    """
    one = torch.ones(1, 1, dtype=F64)
    motion = Motion(0.9 * one, 0.4 * one, Mixture(torch.ones(1, dtype=F64), 0 * one, one[None]))
    x = motion.simulate(10, 200, seeded(1))
    y = x + torch.randn(x.shape, generator=seeded(2), dtype=F64)
    filters = (lambda prior, now: fitted.mixtures(prior, y=now), kalman_update(one, one), lambda prior, now: prior)
    ours, exact, blind = (
        -float(torch.stack([q.log_prob(now) for q, now in zip(recursion(f, motion, y), x, strict=True)]).mean())
        for f in filters
    )
    assert ours - exact < 0.05
    assert blind - exact > 0.15


# -- files


def test_a_file_gives_the_same_mixtures_and_knows_its_program(fitted: FittedTransformer, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fitted.save(path)
    loaded = FittedTransformer.load(path, normal_family())
    prior, y = problems(fitted, 3)
    torch.testing.assert_close(loaded.mixtures(prior, y=y).means, fitted.mixtures(prior, y=y).means)
    assert loaded.options.priors == LAW
    with pytest.raises(ProgramError, match="another program"):
        FittedTransformer.load(path, normal_family(noise=3.0))
    with pytest.raises(ShapeError, match="trained on the sites"):
        FittedTransformer.load(path, normal_family(2))
    with pytest.raises(OptionError, match="has its own law"):
        FittedTransformer.load(path, normal_family(), LAW)
    with pytest.raises(OptionError, match="there is no file"):
        ppl.infer(normal_family(), DistributionTransformer(file=tmp_path / "b.safetensors"))
    with pytest.raises(CheckpointError, match="does not hold a trained denoiser"):
        FittedDenoiser.load(path, normal_family())


def test_training_goes_on(fitted: FittedTransformer) -> None:
    more = replace(BACKEND, steps=20, lr=1e-4).fit(normal_family(), start=fitted)
    assert len(more.history) == 320
    assert more.loss[0] < fitted.loss[0] + 0.02
    with pytest.raises(OptionError, match="cannot go on"):
        replace(BACKEND, width=32).fit(normal_family(), start=fitted)


# -- bad input


def test_bad_priors(fitted: FittedTransformer) -> None:
    y = torch.zeros(1, dtype=F64)
    two = Mixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    with pytest.raises(ShapeError, match=r"length 2.*1 unconstrained"):
        fitted.mixture(prior=two, y=y)
    with pytest.raises(OptionError, match="has 5 components"):
        fitted.mixture(prior=Mixture(torch.full((5,), 0.2), torch.zeros(5, 1), torch.ones(5, 1, 1)), y=y)
    with pytest.raises(OptionError, match="sum to one"):
        fitted.mixture(prior=Mixture(torch.ones(2), torch.zeros(2, 1), torch.ones(2, 1, 1)), y=y)
    with pytest.raises(ShapeError, match=r"\(3,\) priors"):
        fitted.mixture(prior=problems(fitted, 3)[0], y=y)
    with pytest.raises(ShapeError, match="expected data"):
        fitted.mixtures(x=y[None])


def test_data_outside_the_training_get_a_remark(fitted: FittedTransformer) -> None:
    posterior = fitted.posterior(100, y=torch.full((1,), 1e4, dtype=F64))
    assert any("data lie outside" in note for note in posterior.attrs["notes"])
    far = Mixture(torch.ones(1), torch.full((1, 1), 500.0), torch.ones(1, 1, 1))
    posterior = fitted.posterior(100, prior=far, y=torch.full((1,), 1.0, dtype=F64))
    assert any("numbers of the prior" in note for note in posterior.attrs["notes"])


def test_programs_that_do_not_fit() -> None:
    def discrete(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(y.new_tensor(0.5)))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def improper(y: Tensor) -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    one = torch.ones((), dtype=F64)
    for model, message in ((discrete, "discrete"), (improper, "improper")):
        with pytest.raises(ProgramError, match=message):
            BACKEND.fit(ppl.Program(model, one))

    def gamma(y: Tensor) -> None:
        s = pyro.sample("s", dist.Gamma(y.new_tensor(2.0), 2.0))
        pyro.sample("y", dist.Normal(y.new_zeros(()), s), obs=y)

    with pytest.raises(ProgramError, match="not a mixture"):
        ppl.infer(ppl.Program(gamma, one, compile="never"), replace(BACKEND, steps=2), draws=5)


class OneRow:
    """A law that returns the wrong number of mixtures."""

    def sample(self, rows: int, components: int, center: Tensor, scale: Tensor, generator: torch.Generator) -> Mixture:
        return LAW.sample(1, components, center, scale, generator)


def test_bad_options() -> None:
    for bad, message in (
        ({"components": 0}, "components"),
        ({"width": 10, "heads": 4}, "heads must divide"),
        ({"lr": 0.0}, "lr must"),
        ({"priors": MixturePriors}, "law of mixtures"),
        ({"prior_sites": "a"}, "tuple of site names"),
    ):
        with pytest.raises(OptionError, match=message):
            DistributionTransformer(**bad)  # type: ignore[arg-type]
    program = normal_family()
    with pytest.raises(OptionError, match="not an observed site"):
        DistributionTransformer(prior_sites=("a",)).fit(program)
    with pytest.raises(OptionError, match="has no rows"):
        DistributionTransformer(rows=("y",)).fit(inverse_gamma_family())
    with pytest.raises(ShapeError, match="law of priors must return"):
        DistributionTransformer(priors=OneRow()).fit(program)
