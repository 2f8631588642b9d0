"""Gibbs against quadrature and conjugate posteriors, its bookkeeping, and the conditional densities it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from ppl.conditional import Conditional
from ppl.errors import CapabilityError, NotFiniteError, OptionError, ProgramError, ShapeError
from ppl.gibbs import Gibbs
from ppl.kernels import ConditionalDraw, HMCKernel, SliceKernel

Y = torch.tensor([0.3, 1.9, 1.1, 2.4, 0.2], dtype=torch.float64)


def normal(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.7))
    pyro.deterministic("ratio", mu / sigma)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def normal_moments() -> tuple[Tensor, Tensor]:
    """Posterior means and sds of (mu, log sigma) by quadrature."""
    mu = torch.linspace(-6, 8, 701, dtype=torch.float64)[:, None]
    log_sigma = torch.linspace(-3, 3, 601, dtype=torch.float64)[None]
    log_f = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(0.0, 0.7).log_prob(log_sigma)
    log_f = log_f + dist.Normal(mu[..., None], log_sigma.exp()[..., None]).log_prob(Y).sum(-1)
    weight = (log_f - torch.logsumexp(log_f.flatten(), 0)).exp()
    grids = [mu.expand_as(weight), log_sigma.expand_as(weight)]
    means = torch.stack([(weight * g).sum() for g in grids])
    sds = torch.stack([(weight * (g - m) ** 2).sum().sqrt() for g, m in zip(grids, means, strict=True)])
    return means, sds


def check(draws: Tensor, mean: Tensor | float, sd: Tensor | float) -> None:
    """draws (chain, draw) of one number: mean and variance within 5 standard errors, each with its own ESS.

    False alarm about 1e-6 per call; with an ESS of 1000 a variance that is wrong by 25 % is seen.
    """

    def ess(values: Tensor) -> float:
        return float(ppl.Posterior({"v": values}).ess("v"))

    squares = (draws - mean).square()
    assert abs(float((draws.mean() - mean) / sd)) * ess(draws) ** 0.5 < 5
    spread = float((draws - mean).pow(4).mean() / sd**4 - 1) ** 0.5
    assert abs(float(squares.mean() / sd**2 - 1)) / spread * ess(squares) ** 0.5 < 5


@pytest.mark.parametrize(
    "gibbs",
    [
        Gibbs({("mu",): SliceKernel(), ("sigma",): SliceKernel(width=0.3, limit=3)}, warmup=30),
        Gibbs({("sigma", "mu"): HMCKernel()}, warmup=150),
        Gibbs({("mu",): HMCKernel(steps=5), ("sigma",): SliceKernel()}, warmup=100, thin=2),
    ],
    ids=["slice", "hmc", "both"],
)
def test_moments_of_a_normal_sample(gibbs: Gibbs) -> None:
    posterior = ppl.infer(ppl.Program(normal, Y), gibbs, draws=250, chains=16, seed=0)
    means, sds = normal_moments()
    check(posterior["mu"], means[0], sds[0])
    check(posterior["sigma"].log(), means[1], sds[1])
    torch.testing.assert_close(posterior["ratio"], posterior["mu"] / posterior["sigma"])
    assert posterior.attrs["exact"] == "in_the_limit"
    assert posterior.cost.density_evals + posterior.cost.gradient_evals > 16 * 250


def test_support_that_depends_on_the_other_block() -> None:
    """a ~ Gamma, x ~ U(-a, a), y ~ N(x, 1): moving a holds x, and never lets x leave (-a, a)."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Gamma(3.0, 1.0))
        x = pyro.sample("x", dist.Uniform(-a, a))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = torch.tensor(2.0, dtype=torch.float64)
    a = torch.linspace(1e-3, 25, 1500, dtype=torch.float64)[:, None]
    u = (torch.linspace(-1, 1, 2001, dtype=torch.float64))[None]
    log_f = dist.Gamma(3.0, 1.0).log_prob(a) + dist.Normal(a * u, 1.0).log_prob(y)
    weight = (log_f - torch.logsumexp(log_f.flatten(), 0)).exp()
    x_mean, a_mean = (weight * a * u).sum(), (weight * a).sum()
    x_sd, a_sd = (weight * (a * u - x_mean) ** 2).sum().sqrt(), (weight * (a - a_mean) ** 2).sum().sqrt()
    gibbs = Gibbs({("a",): SliceKernel(), ("x",): SliceKernel(width=2.0)}, warmup=50)
    posterior = ppl.infer(ppl.Program(model, y), gibbs, draws=600, chains=16, seed=0)
    assert bool((posterior["x"].abs() <= posterior["a"]).all())
    check(posterior["x"], x_mean, x_sd)
    check(posterior["a"], a_mean, a_sd)


def test_density_outside_a_moved_support_is_zero() -> None:
    """Pareto's unvalidated density is finite below its scale; the conditional of the scale is not."""

    def model(y: Tensor) -> None:
        low = pyro.sample("low", dist.Exponential(1.0))
        x = pyro.sample("x", dist.Pareto(low, 2.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    block = Conditional(ppl.Program(model, torch.tensor(2.0, dtype=torch.float64)), ["low"])
    values = {"x": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    z = torch.tensor([[0.5], [2.0]], dtype=torch.float64).log()
    log_p = block.log_density(z, values)
    assert torch.isfinite(log_p[0])
    assert log_p[1] == -torch.inf


def test_conditional_density_is_the_joint_up_to_a_constant() -> None:
    """Differences and gradients equal those of the full flat density; coordinates go there and back."""
    program = ppl.Program(normal, Y)
    flat, block = program.flat(), Conditional(program, ["sigma"])
    z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, 0] = 0.7
    values = flat.constrain(z)
    torch.testing.assert_close(block.ravel(values), z[:, 1:])
    torch.testing.assert_close(block.constrain(z[:, 1:], values)["sigma"], values["sigma"])
    joint, grad = flat.log_density_and_grad(z)
    conditional, own = block.log_density_and_grad(z[:, 1:], values)
    torch.testing.assert_close(conditional - conditional[0], joint - joint[0])
    torch.testing.assert_close(own, grad[:, 1:])


def test_hand_written_conditionals_and_discrete_blocks() -> None:
    """Two components, known in form: labels and means drawn by hand; P(label) against enumeration."""

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            pyro.sample("y", dist.Normal(k * m, 1.0), obs=y)

    y = torch.tensor([2.5, 0.1, 3.0], dtype=torch.float64)
    program = ppl.Program(model, y)

    def draw_labels(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        m = values["m"][:, None]
        odds = dist.Normal(m, 1.0).log_prob(y) - dist.Normal(0.0, 1.0).log_prob(y)
        p = torch.sigmoid(odds + torch.tensor(0.3 / 0.7).log())
        return {"k": (torch.rand(p.shape, generator=generator, dtype=p.dtype) < p).double()}

    def draw_mean(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        precision = 1 / 9 + values["k"].sum(1)
        noise = torch.randn(precision.shape, generator=generator, dtype=precision.dtype)
        return {"m": (values["k"] * y).sum(1) / precision + noise / precision.sqrt()}

    by_hand = Gibbs({"k": ConditionalDraw(draw_labels), "m": ConditionalDraw(draw_mean)}, warmup=50)
    summed = Gibbs({"m": SliceKernel(width=3.0)}, warmup=50)
    grid = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    pair = 0.3 * dist.Normal(grid[:, None], 1.0).log_prob(y).exp() + 0.7 * dist.Normal(0.0, 1.0).log_prob(y).exp()
    weight = dist.Normal(0.0, 3.0).log_prob(grid).exp() * pair.prod(1)
    weight = weight / weight.sum()
    mean = (weight * grid).sum()
    sd = (weight * (grid - mean) ** 2).sum().sqrt()
    for gibbs, draws in ((by_hand, 1000), (summed, 500)):
        posterior = ppl.infer(program, gibbs, draws=draws, chains=16, seed=0)
        check(posterior["m"], mean, sd)
        assert ("k" in posterior) == (gibbs is by_hand)


class Denoised(dist.Normal):
    capabilities = frozenset({"denoiser"})


def test_a_diffusion_site_needs_a_kernel_of_its_own() -> None:
    """Hand-written draws of x given scale, slices for the scale: exact; a generic kernel for x is refused."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        x = pyro.sample("x", Denoised(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    y = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)

    def draw(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        precision = 1 + values["scale"][:, None] ** -2
        noise = torch.randn(len(precision), 3, generator=generator, dtype=torch.float64)
        return {"x": y * values["scale"][:, None] ** -2 / precision + noise / precision.sqrt()}

    program = ppl.Program(model, y)
    gibbs = Gibbs({"x": ConditionalDraw(draw), "scale": SliceKernel()}, warmup=50)
    posterior = ppl.infer(program, gibbs, draws=400, chains=16, seed=0)
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    log_f = dist.Normal(0.0, 0.5).log_prob(grid)
    log_f = log_f + dist.Normal(0.0, (1 + (2 * grid).exp()).sqrt()[:, None]).log_prob(y).sum(1)
    weight = (log_f - torch.logsumexp(log_f, 0)).exp()
    mean = (weight * grid).sum()
    check(posterior["scale"].log(), mean, (weight * (grid - mean) ** 2).sum().sqrt())
    with pytest.raises(OptionError, match="diffusion priors"):
        ppl.infer(program, Gibbs({("x", "scale"): SliceKernel()}))


class Biased:
    invariant: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})

    def step(self, program: ppl.Program, values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return {"sigma": values["sigma"]}


def test_exact_only_if_every_block_is() -> None:
    good = Gibbs({("mu",): SliceKernel(), ("sigma",): SliceKernel()})
    bad = Gibbs({("mu",): SliceKernel(), ("sigma",): Biased()}, warmup=0)
    assert (Gibbs.exact, good.exact, bad.exact) == ("never", "in_the_limit", "never")
    assert isinstance(bad, ppl.Backend)
    assert bad.needs == {"denoiser"}
    with pytest.raises(CapabilityError, match="denoiser"):
        ppl.infer(ppl.Program(normal, Y), bad)
    monitor = ppl.Monitor()
    generator = torch.Generator().manual_seed(0)
    posterior = bad.run(ppl.Program(normal, Y), draws=3, chains=2, generator=generator, monitor=monitor)
    assert posterior.attrs["inexact_blocks"] == [["sigma"]]
    assert posterior.attrs["exact_blocks"] == [["mu"]]
    assert "biased" in monitor.notes[0]


def test_blocks_cover_the_latents_once() -> None:
    program = ppl.Program(normal, Y)
    with pytest.raises(OptionError, match=r"'mu'.*more than one"):
        Gibbs({("mu",): SliceKernel(), ("mu", "sigma"): SliceKernel()})
    with pytest.raises(OptionError, match=r"\['sigma'\] are in no block"):
        ppl.infer(program, Gibbs({("mu",): SliceKernel()}))
    with pytest.raises(OptionError, match=r"\['tau'\]"):
        ppl.infer(program, Gibbs({("mu", "sigma"): SliceKernel(), ("tau",): SliceKernel()}))
    for blocks in ({}, {("mu",): SliceKernel}, {("mu",): object()}):
        with pytest.raises(OptionError):
            Gibbs(blocks)  # type: ignore[arg-type]
    for kernel, options in ((SliceKernel, {"width": 0.0}), (SliceKernel, {"limit": 0}), (HMCKernel, {"steps": 0})):
        with pytest.raises(OptionError, match=next(iter(options))):
            kernel(**options)
    with pytest.raises(OptionError, match="sites"):
        SliceKernel().step(program, {}, torch.Generator())


@pytest.mark.parametrize("stop", [7, 18])
def test_a_killed_run_goes_on_to_the_same_draws(tmp_path: Path, stop: int) -> None:
    """In warmup, with its adaptation, and after it."""
    program = ppl.Program(normal, Y)
    gibbs = Gibbs({("mu",): HMCKernel(steps=3), ("sigma",): SliceKernel()}, warmup=10, thin=2)
    whole = ppl.infer(program, gibbs, draws=8, seed=1)

    class Killed(RuntimeError):
        pass

    def kill(event: ppl.Event) -> None:
        if event.step == stop:
            raise Killed

    with pytest.raises(Killed):
        ppl.infer(program, gibbs, draws=8, seed=1, callback=kill, checkpoint=tmp_path, checkpoint_every=0)
    again = ppl.infer(program, gibbs, draws=8, seed=1, checkpoint=tmp_path, checkpoint_every=0)
    for site in ("mu", "sigma", "ratio"):
        assert torch.equal(again[site], whole[site])
    assert not torch.equal(ppl.infer(program, gibbs, draws=8, seed=2)["mu"], whole["mu"])


def test_interruptions_and_bad_kernels() -> None:
    program = ppl.Program(normal, Y)
    gibbs = Gibbs({("mu", "sigma"): SliceKernel()}, warmup=5)
    posterior = ppl.infer(program, gibbs, draws=50, callback=lambda event: event.step == 14)
    assert posterior.shape == (4, 10)
    assert not posterior.complete
    calls = 0

    def breaks(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {"mu": values["mu"] if calls < 5 else values["mu"] * torch.nan}

    blocks = {("mu",): ConditionalDraw(breaks), ("sigma",): SliceKernel()}
    posterior = ppl.infer(program, Gibbs(blocks, warmup=0), draws=50)
    assert posterior.shape == (4, 4)
    assert not posterior.complete
    assert "sweep 4" in posterior.attrs["notes"][0]
    with pytest.raises(NotFiniteError, match="'mu'"):
        ppl.infer(program, Gibbs(blocks, warmup=0), draws=50)
    wrong = ConditionalDraw(lambda values, generator: {"mu": values["mu"][:1]})
    with pytest.raises(ShapeError, match="'mu'"):
        ppl.infer(program, Gibbs({("mu",): wrong, ("sigma",): SliceKernel()}))


def test_programs_that_do_not_fit() -> None:
    def part(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ProgramError, match="subsampled"):
        ppl.infer(ppl.Program(part, Y), Gibbs({("mu",): SliceKernel()}))

    def count(y: Tensor) -> None:
        n = pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(n, 1.0), obs=y)

    with pytest.raises(OptionError, match="continuous"):
        ppl.infer(ppl.Program(count, Y[0]), Gibbs({("n",): SliceKernel()}))
