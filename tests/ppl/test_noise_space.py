"""Noise space against exact posteriors: a Gaussian path with fixed and latent scale, plates, shapes, Pyro's kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Size, Tensor
from torch.distributions import MultivariateNormal

import ppl
from ppl.backend import registered
from ppl.errors import CapabilityError, OptionError, ProgramError
from ppl.noise_space import NoiseReparam, NoiseSpace, lift_noise

T = 5


class Walk(TorchDistribution):
    """A random walk x_t = scale (z_1 + ... + z_t), with what noise space asks for."""

    arg_constraints = {"scale": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = False
    capabilities = frozenset({"noise_space"})

    def __init__(self, scale: Tensor | float, steps: int = T, validate_args: bool | None = None) -> None:
        self.scale = torch.as_tensor(scale)
        self.counters: list[Any] = []
        super().__init__(self.scale.shape, Size([steps]), validate_args=validate_args)

    @property
    def noise_shape(self) -> Size:
        return self.event_shape

    def from_noise(self, z: Tensor) -> Tensor:
        for count in self.counters:
            count.calls += 1
            count.evals += z.shape[:-1].numel()
        return self.scale[..., None] * z.cumsum(-1)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        return self.from_noise(torch.randn(sample_shape + self.batch_shape + self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        steps = torch.diff(value, dim=-1, prepend=torch.zeros_like(value[..., :1]))
        return dist.Normal(0.0, self.scale[..., None]).log_prob(steps).sum(-1)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Walk:
        new = Walk(self.scale.expand(batch_shape), self.event_shape[0], validate_args=False)
        new.counters = self.counters
        return new


KERNEL = torch.minimum(torch.arange(1, T + 1)[:, None], torch.arange(1, T + 1)).double()
DATA = torch.tensor([0.4, 1.1, 0.2, -0.9, -2.0], dtype=torch.float64)
NOISE = 0.5
WALK = Walk(torch.tensor(0.8, dtype=torch.float64))


def fixed(y: Tensor) -> None:
    x = pyro.sample("x", WALK)
    pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def with_scale(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", Walk(scale))
    pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def exact_fixed() -> tuple[Tensor, Tensor]:
    prior = 0.64 * KERNEL
    gain = prior @ torch.linalg.inv(prior + NOISE**2 * torch.eye(T))
    return gain @ DATA, prior - gain @ prior


def exact_log_scale() -> tuple[float, float, float]:
    """Posterior mean and sd of log scale, and log evidence, by quadrature."""
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    covariance = (2 * grid).exp()[:, None, None] * KERNEL + NOISE**2 * torch.eye(T)
    log_f = MultivariateNormal(torch.zeros(T).double(), covariance).log_prob(DATA) + dist.Normal(0.0, 0.5).log_prob(
        grid
    )
    total = torch.logsumexp(log_f, 0)
    weight = (log_f - total).exp()
    mean = (weight * grid).sum()
    return float(mean), float((weight * (grid - mean) ** 2).sum().sqrt()), float(total + (grid[1] - grid[0]).log())


def test_full_rank_in_noise_space_is_exact() -> None:
    """The noise posterior of a linear problem is Gaussian: mean, covariance and evidence to 1e-3."""
    program = ppl.Program(fixed, DATA)
    posterior = ppl.infer(program, NoiseSpace(ppl.SVI(guide=ppl.FullRank(), steps=1500, lr=0.03)), draws=50, seed=0)
    mean, covariance = exact_fixed()
    to_x = 0.8 * torch.ones(T, T).double().tril()
    guide = posterior.guide
    torch.testing.assert_close(to_x @ guide.params["loc"], mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(to_x @ guide.guide.covariance(guide.params) @ to_x.mT, covariance, rtol=0, atol=1e-3)
    evidence = MultivariateNormal(torch.zeros(T).double(), 0.64 * KERNEL + NOISE**2 * torch.eye(T)).log_prob(DATA)
    assert abs(float(posterior.info["elbo"] - evidence)) < 1e-4
    torch.testing.assert_close(posterior["x"], posterior["x_noise"] @ to_x.mT)
    assert posterior.attrs["noise_space"] == ["x"]
    assert posterior.attrs["backend"] == "NoiseSpace(SVI)"


def check_moments(draws: Tensor, mean: Tensor, sd: Tensor, ess: Tensor) -> None:
    """z-scores of means and of squared deviations below 5; false alarm below 1e-4 over ten of them."""
    assert float(((draws.mean(0) - mean) / sd * ess.sqrt()).abs().max()) < 5
    ratio = (draws - mean).square().mean(0) / sd.square() - 1
    # Squares mix no faster than the values: half their ESS is a careful guess.
    assert float((ratio * (ess / 4).sqrt()).abs().max()) < 5


@pytest.mark.parametrize("engine", [ppl.HMC(warmup=150), ppl.EllipticalSlice(warmup=100), ppl.NUTS(warmup=150)])
def test_chains_in_noise_space(engine: ppl.Backend) -> None:
    posterior = ppl.infer(ppl.Program(fixed, DATA), NoiseSpace(engine), draws=200, seed=0)
    mean, covariance = exact_fixed()
    check_moments(posterior.flatten("x"), mean, covariance.diagonal().sqrt(), posterior.ess("x"))


def test_distribution_that_depends_on_another_latent() -> None:
    posterior = ppl.infer(ppl.Program(with_scale, DATA), NoiseSpace(ppl.HMC(warmup=200)), draws=200, seed=0)
    mean, sd, _ = exact_log_scale()
    log_scale = posterior.flatten("scale").log()[:, None]
    check_moments(log_scale, torch.tensor([mean]), torch.tensor([sd]), posterior.ess("scale")[None])
    expected = posterior["scale"][..., None] * posterior["x_noise"].cumsum(-1)
    torch.testing.assert_close(posterior["x"], expected)


def test_plate_event_and_expanded_sites() -> None:
    """A site in a plate, one made an event of, and one expanded: each x is its own noise summed up."""

    def model(y: Tensor) -> None:
        with pyro.plate("series", 3):
            a = pyro.sample("a", Walk(torch.tensor(2.0).double()))
        b = pyro.sample("b", Walk(torch.tensor([1.0, 3.0]).double()).to_event(1))
        c = pyro.sample("c", Walk(torch.tensor(0.5).double()).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(a.sum() + b.sum() + c.sum(), 1.0), obs=y)

    program = ppl.Program(model, torch.tensor(1.0).double())
    flat = program.noise_space().flat()
    assert flat.dim == 7 * T
    z = torch.randn(4, flat.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = flat.constrain(z)
    torch.testing.assert_close(values["a"], 2 * values["a_noise"].cumsum(-1))
    torch.testing.assert_close(values["b"], values["b_noise"].cumsum(-1) * torch.tensor([1.0, 3.0]).double()[:, None])
    torch.testing.assert_close(values["c"], 0.5 * values["c_noise"].cumsum(-1))
    total = values["a"].sum((1, 2)) + values["b"].sum((1, 2)) + values["c"].sum((1, 2))
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(1) + dist.Normal(total, 1.0).log_prob(torch.tensor(1.0).double())
    torch.testing.assert_close(flat.log_density(z), expected)
    some = ppl.infer(program, NoiseSpace(ppl.SVI(steps=3), sites="a"), draws=5)
    assert {"a", "a_noise", "b", "c"} == set(some.draws)


def test_class_data_come_from_the_engine() -> None:
    svi, hmc = NoiseSpace(ppl.SVI()), NoiseSpace(ppl.HMC())
    assert isinstance(hmc, ppl.Backend)
    assert registered()["NoiseSpace"] is NoiseSpace
    assert (svi.exact, hmc.exact, NoiseSpace.exact) == ("never", "in_the_limit", "never")
    assert hmc.limit == ("draws",)
    assert svi.exact_when == ppl.SVI.exact_when
    assert (svi.batches_problems, hmc.batches_problems) == (False, True)
    assert repr(hmc) == f"NoiseSpace(engine={ppl.HMC()!r}, sites=())"


def test_refusals() -> None:
    program = ppl.Program(fixed, DATA)
    with pytest.raises(OptionError, match="wraps a backend"):
        NoiseSpace(ppl.HMC)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="wraps a backend"):
        NoiseSpace(NoiseSpace(ppl.HMC()))
    with pytest.raises(ProgramError, match="observed"):
        ppl.infer(program, NoiseSpace(ppl.SVI(), sites=("y",)))

    def plain(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(CapabilityError, match="noise_space"):
        ppl.infer(ppl.Program(plain, DATA[0]), NoiseSpace(ppl.SVI()))

    class Needy(ppl.SVI):
        needs = frozenset({"denoiser"})

    with pytest.raises(CapabilityError, match="without NoiseSpace"):
        ppl.infer(program, NoiseSpace(Needy()))


def test_calls_are_counted_and_the_counter_is_taken_off() -> None:
    """One call per gradient for all lanes, rows and differentiated rows with it."""
    posterior = ppl.infer(ppl.Program(fixed, DATA), NoiseSpace(ppl.SVI(steps=10, particles=8)), draws=30, seed=0)
    assert WALK.counters == []
    cost = posterior.cost
    assert cost.gradient_evals == 80
    assert cost.vjps >= 80 + 1
    assert cost.vjps <= 80 + 8 + 1  # and the look at the starting point, and what was prepared
    assert cost.denoiser_evals >= cost.vjps + 30
    assert 12 <= cost.denoiser_calls < 40


def test_many_problems_at_once() -> None:
    ys = torch.stack([DATA, -DATA, 0 * DATA])
    posterior = ppl.infer(ppl.Program(fixed, DATA).over(y=ys), NoiseSpace(ppl.HMC(warmup=100)), draws=100, seed=0)
    assert posterior["x"].shape == (3, 16, 100, T)
    mean, covariance = exact_fixed()
    for i, sign in enumerate((1, -1, 0)):
        z = (posterior.mean("x")[i] - sign * mean) / covariance.diagonal().sqrt() * posterior.ess("x")[i].sqrt()
        assert float(z.abs().max()) < 5


def test_reparam_for_pyro_kernels() -> None:
    """The lifted Pyro model has the density of the lifted program; Pyro's NUTS runs on it."""
    model = pyro.poutine.reparam(with_scale, config=lift_noise)
    z = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = {"scale": torch.tensor(1.3).double(), "x_noise": z}
    trace = pyro.poutine.trace(pyro.poutine.condition(model, given)).get_trace(DATA)
    x = 1.3 * z.cumsum(-1)
    torch.testing.assert_close(trace.nodes["x"]["value"], x)
    expected = dist.LogNormal(0.0, 0.5).log_prob(given["scale"]) + dist.Normal(0.0, 1.0).log_prob(z).sum()
    expected = expected + dist.Normal(x, NOISE).log_prob(DATA).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    pyro.set_rng_seed(0)
    kernel = PyroNUTS(pyro.poutine.reparam(fixed, config={"x": NoiseReparam()}), max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=60, warmup_steps=40, disable_progbar=True)
    mcmc.run(DATA)
    mean, covariance = exact_fixed()
    draws = 0.8 * mcmc.get_samples()["x_noise"].cumsum(-1)
    # 60 draws of NUTS are worth at least 15 independent ones on a Gaussian of five dimensions.
    assert float(((draws.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()) < 5 / 15**0.5


def test_reparam_shapes_and_refusals() -> None:
    def model() -> None:
        with pyro.plate("outer", 2):
            pyro.sample("a", Walk(torch.tensor(1.0)))
        pyro.sample("b", Walk(torch.ones(3)).to_event(1))
        pyro.sample("c", Walk(torch.tensor(1.0)).expand([4]))
        pyro.sample("d", dist.Normal(0.0, 1.0))

    trace = pyro.poutine.trace(pyro.poutine.reparam(model, config=lift_noise)).get_trace()
    shapes = {n: tuple(trace.nodes[n]["value"].shape) for n in ("a", "b", "c", "d")}
    assert shapes == {"a": (2, T), "b": (3, T), "c": (4, T), "d": ()}
    assert trace.nodes["b_noise"]["fn"].event_dim == 2
    assert "d_noise" not in trace.nodes
    lift = NoiseReparam()
    message = SimpleNamespace(name="x", fn=Walk(torch.tensor(1.0)), value=torch.zeros(T), is_observed=True).__dict__
    assert lift_noise(message) is None
    with pytest.raises(ProgramError, match="observed"):
        lift.apply(message)
    with pytest.raises(ProgramError, match="cannot be built"):
        lift.apply({**message, "fn": dist.Normal(0.0, 1.0), "is_observed": False})
    with pytest.raises(ProgramError, match="masked"):
        lift.apply({**message, "fn": Walk(torch.ones(2)).mask(torch.tensor([True, False])), "is_observed": False})


def test_a_lifted_site_may_be_called_z() -> None:
    """The name of the flat vector inside a graph is not taken from the user's sites."""

    def named(site: str) -> ppl.Program:
        def model(y: Tensor) -> None:
            path = pyro.sample(site, Walk(1.0))
            pyro.sample("y", dist.Normal(path[-1], 0.5), obs=y)

        return ppl.Program(model, torch.tensor(1.0)).noise_space()

    z = torch.randn(3, T, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(
        named("z").flat().log_density_and_grad(z), named("path").flat().log_density_and_grad(z), strict=True
    ):
        torch.testing.assert_close(got, expected)
