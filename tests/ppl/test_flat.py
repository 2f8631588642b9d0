"""The flat density against Pyro's own handlers, draw by draw, on the features a model may use."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch.distributions import biject_to

from ppl.errors import ProgramError, ShapeError
from ppl.program import Program

F64 = torch.float64
Y = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=F64)
COUNTS = torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=F64)
X = torch.linspace(-1, 1, 4, dtype=F64)


def t(*values):
    return torch.tensor(values, dtype=F64)


def nested_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("inner", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 0.5))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y.expand(2, 4))


def sequential_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("steps", 4):
        s = pyro.sample(f"s_{i}", dist.Exponential(1.0))
        pyro.sample(f"y_{i}", dist.Normal(mu, s), obs=y[i])


def factor_and_deterministic(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    twice = pyro.deterministic("twice", 2 * mu)
    pyro.factor("tilt", -twice.abs())
    pyro.sample("y", dist.Normal(twice, 1.0).expand([4]).to_event(1), obs=y)


def scaled(y):
    with pyro.poutine.scale(scale=0.3):
        mu = pyro.sample("mu", dist.Gamma(2.0, 1.0))
    with pyro.poutine.scale(scale=2.0), pyro.plate("n", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 4), pyro.poutine.mask(mask=torch.tensor([True, False, True, True])):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mask_that_depends_on_a_latent(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 4), pyro.poutine.mask(mask=y > mu):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked_distribution(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).mask(torch.tensor([True, True, False, True])).to_event(1), obs=y)


def correlation(y):
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("n", 2):
        pyro.sample(
            "y",
            dist.MultivariateNormal(torch.zeros(2, dtype=F64), scale_tril=scale[:, None] * factor),
            obs=y.view(2, 2),
        )


def simplex(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=F64)))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0, 2, 1, 1]))


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    with pyro.plate("n", 4):
        pyro.sample("k", dist.Poisson(rate), obs=COUNTS)
        pyro.sample("nb", dist.NegativeBinomial(3.0, probs=share), obs=COUNTS)
        pyro.sample("b", dist.Binomial(4, share), obs=COUNTS)
        pyro.sample("bb", dist.BetaBinomial(rate, 1.0, 4), obs=COUNTS)
        pyro.sample("zip", dist.ZeroInflatedPoisson(rate, gate=share), obs=COUNTS)


def heavy_tails(y):
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    angle = pyro.sample("angle", dist.VonMises(0.0, 2.0))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.StudentT(nu, torch.cos(angle), 1.0), obs=y)


def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2, dtype=F64)))
    loc = pyro.sample("loc", dist.Normal(t(-1.0, 1.0), 1.0).to_event(1))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0)), obs=y)


def gaussian_process(y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    kernel = torch.exp(-0.5 * ((X[:, None] - X) / length) ** 2) + noise**2 * torch.eye(4, dtype=F64)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(4, dtype=F64), covariance_matrix=kernel), obs=y)


def matrix_times_vector(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    design = torch.stack([torch.ones_like(X), X, X**2], dim=1)
    pyro.sample("y", dist.Normal(design @ z + z[0] + z.sum(), 1.0).to_event(1), obs=y)


def low_rank(y):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    cov_factor = torch.stack([X, 1 + X], dim=1) * s[0]
    pyro.sample("y", dist.LowRankMultivariateNormal(torch.zeros(4, dtype=F64), cov_factor, s[1].expand(4)), obs=y)


def network(y):
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([5, 1]).to_event(2))
    w2 = pyro.sample("w2", dist.Normal(0.0, 1.0).expand([1, 5]).to_event(2))
    hidden = torch.tanh(torch.nn.functional.linear(X[:, None], w1))
    pyro.sample("y", dist.Normal(torch.nn.functional.linear(hidden, w2)[:, 0], 1.0).to_event(1), obs=y)


def ode(y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    state, path = torch.ones_like(rate), []
    for _ in range(4):
        state = state + 0.1 * rate * state * (1 - state / 3)
        path.append(state)
    pyro.sample("y", dist.Normal(torch.stack(path), 1.0).to_event(1), obs=y)


def writes_in_place(y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    path = torch.zeros(4, dtype=F64)
    for i in range(4):
        path[i] = rate * X[i]
    pyro.sample("y", dist.Normal(path, 1.0).to_event(1), obs=y)


def linear_algebra(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
    pyro.factor("spectrum", -torch.linalg.eigvalsh(a @ a.T).sum())
    signal = torch.fft.rfft(a.sum(0))
    pyro.sample("y", dist.Normal(signal.abs().sum(), 1.0), obs=y[0])


def depending_support(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(-a, 2 * a))
    pyro.sample("y", dist.Normal(b, 1.0), obs=y[0])


def ordered_and_interval(y):
    cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    pyro.factor("prior", -0.5 * (cuts**2).sum())
    pyro.sample("y", dist.Normal(cuts.sum() * share, 1.0), obs=y[0])


def integers_and_default_types(y):
    mu = pyro.sample("mu", dist.Normal(torch.arange(4) / 3, torch.full((4,), 0.1)).to_event(1))
    weight = torch.where(torch.tensor([True, False, True, True]), 0.1, 0.7)
    pyro.sample("y", dist.Normal(mu * weight + torch.ones(4) * 0.3, 1.0).to_event(1), obs=y)


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("n", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


non_centred = pyro.poutine.reparam(hierarchy, {"theta": LocScaleReparam(0.0)})


def log_normal(y):
    base = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.ExpTransform())
    s = pyro.sample("s", base)
    pyro.sample("y", dist.Normal(0.0, s), obs=y[0])


transformed = pyro.poutine.reparam(log_normal, {"s": TransformReparam()})

MODELS = [
    nested_plates,
    sequential_plate,
    factor_and_deterministic,
    scaled,
    masked,
    mask_that_depends_on_a_latent,
    masked_distribution,
    correlation,
    simplex,
    counts,
    heavy_tails,
    mixture,
    gaussian_process,
    matrix_times_vector,
    low_rank,
    network,
    ode,
    writes_in_place,
    linear_algebra,
    depending_support,
    ordered_and_interval,
    integers_and_default_types,
    hierarchy,
    non_centred,
    transformed,
]


def by_handlers(model, z, layout):
    """Log density of one draw from Pyro's handlers alone; the Jacobian from biject_to, site by site."""

    class FromFlat(pyro.poutine.messenger.Messenger):
        total = 0.0

        def _pyro_sample(self, msg):
            leaf = layout.get(msg["name"])
            if leaf is None or msg["is_observed"]:
                return
            transform = biject_to(msg["fn"].support)
            u = z[leaf.start : leaf.stop].reshape(leaf.shape)
            msg["value"] = transform(u)
            self.total = self.total + transform.log_abs_det_jacobian(u, msg["value"]).sum()

    torch.set_default_dtype(F64)
    try:
        setter = FromFlat()
        with pyro.validation_enabled(False):
            trace = pyro.poutine.trace(setter(model)).get_trace(Y)
            return trace.log_prob_sum() + setter.total
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: getattr(m, "__name__", "reparam"))
def test_density_and_gradient_equal_those_of_the_handlers(model):
    """Value to 1e-9 and gradient to 1e-7, relative to one plus the size; also once the graph has been captured."""
    program = Program(model, Y)
    flat = program.flat()
    z = torch.rand(3, flat.dim, generator=torch.Generator().manual_seed(1), dtype=F64) - 0.5
    values, grads = [], []
    for row in z:
        row = row.clone().requires_grad_()
        value = by_handlers(model, row, flat.layout.leaves)
        values.append(value.detach())
        grads.append(torch.autograd.grad(value, row)[0])
    for _ in range(2):
        value, grad = flat.log_density_and_grad(z)
        torch.testing.assert_close(value, torch.stack(values), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(grad, torch.stack(grads), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(flat.log_density(z), value, rtol=1e-12, atol=1e-12)
        assert flat.prepare(z, calls=10) == "graph"
    assert program.batching == "graph"
    site_values = flat.constrain(z)
    torch.testing.assert_close(flat.ravel(site_values), z, rtol=1e-6, atol=1e-6)


def test_compiled_graph_equals_the_graph():
    plain, compiled = (Program(hierarchy, Y, compile=c).flat() for c in ("never", "inductor"))
    z = torch.randn(2, plain.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert compiled.prepare(z, calls=1) == "inductor"
    for a, b in zip(plain.log_density_and_grad(z), compiled.log_density_and_grad(z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def hidden_markov(y):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3, 3, dtype=F64)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    state = torch.tensor(0)
    for i in pyro.markov(range(4)):
        state = pyro.sample(f"state_{i}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{i}", dist.Normal(loc[state], 1.0), obs=y[i])


def forward_algorithm(values, y):
    log_p = values["transition"].log()
    log_f = log_p[0] + dist.Normal(values["loc"], 1.0).log_prob(y[0])
    for item in y[1:]:
        log_f = torch.logsumexp(log_f[:, None] + log_p, 0) + dist.Normal(values["loc"], 1.0).log_prob(item)
    prior = dist.Dirichlet(torch.ones(3, dtype=F64)).log_prob(values["transition"]).sum()
    return torch.logsumexp(log_f, 0) + prior + dist.Normal(0.0, 1.0).log_prob(values["loc"]).sum()


def test_discrete_sites_are_summed_out():
    """A hidden Markov model equals the forward recursion, and an enumerated mixture its closed form."""
    program = Program(hidden_markov, Y)
    flat = program.flat()
    z = torch.randn(3, flat.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    values = flat.constrain(z)
    assert set(values) == {"transition", "loc"}
    expected = torch.stack([forward_algorithm({n: v[i] for n, v in values.items()}, Y) for i in range(3)])
    torch.testing.assert_close(program.log_joint(values), expected)
    jacobian = flat.log_density(z) - expected
    simplex = biject_to(constraints.simplex)
    u = z[:, :6].reshape(3, 3, 2)
    torch.testing.assert_close(jacobian, simplex.log_abs_det_jacobian(u, simplex(u)).sum(1))


def test_enumerated_mixture_in_a_plate():
    def model(y):
        share = pyro.sample("share", dist.Beta(1.0, 1.0))
        with pyro.plate("n", 4):
            which = pyro.sample("which", dist.Bernoulli(share))
            pyro.sample("y", dist.Normal(3 * which, 1.0), obs=y)

    program = Program(model, Y)
    share = t(0.2, 0.7)
    each = torch.stack([dist.Normal(0.0, 1.0).log_prob(Y), dist.Normal(t(3.0), 1.0).log_prob(Y)])
    weights = torch.stack([1 - share, share], 1).log()
    expected = torch.logsumexp(weights[:, :, None] + each, 1).sum(1)
    torch.testing.assert_close(program.log_joint({"share": share}), expected)
    given = program.log_joint({"share": share, "which": torch.tensor([[0.0, 0, 1, 0], [1, 1, 1, 1]], dtype=F64)})
    assert bool((given < expected).all())


def test_discrete_site_that_cannot_be_summed_out_is_refused():
    def model(y):
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y[0])

    with pytest.raises(ProgramError, match=r"\['k'\] are discrete"):
        Program(model, Y).flat()


def test_shapes_and_missing_values():
    flat = Program(hierarchy, Y).flat()
    with pytest.raises(ShapeError, match=r"\(lanes, 6\)"):
        flat.log_density(torch.zeros(6, dtype=F64))
    with pytest.raises(ProgramError, match="theta"):
        flat.ravel({"mu": t(0.0), "tau": t(1.0)})
    assert flat.log_density(torch.zeros(0, 6, dtype=F64)).shape == (0,)
    assert flat.constrain(torch.zeros(0, 6, dtype=F64))["theta"].shape == (0, 4)


def test_starting_points_are_finite_and_follow_the_generator():
    def narrow(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("inside", torch.where(x.abs() < 0.2, 0.0, -math.inf))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y[0])

    flat = Program(narrow, Y).flat()
    z = flat.initial(50, torch.Generator().manual_seed(0))
    assert z.shape == (50, 1)
    assert bool((z.abs() < 0.2).all())
    assert torch.equal(z, flat.initial(50, torch.Generator().manual_seed(0)))


def test_improper_values_become_minus_infinity_or_nan_not_errors():
    """Inside the graph nothing is validated: a scale of zero is a bad point, not an exception."""

    def model(y):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, s), obs=y[0])

    value, grad = Program(model, Y).flat().log_density_and_grad(t(-800.0)[None])
    assert not bool(torch.isfinite(value).all() & torch.isfinite(grad).all())


def test_gradients_of_shared_parameters():
    def model(y):
        scale = pyro.param("scale", torch.tensor(2.0, dtype=F64), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    flat = Program(model, Y).flat()
    z = t(0.1, 0.5)[:, None]
    _, _, grads = flat.value_and_grads(z, params={"scale": t(3.0)[0]})
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    total = sum(dist.Normal(m, scale).log_prob(Y).sum() for m in z[:, 0])
    torch.testing.assert_close(grads["scale"], torch.autograd.grad(total, scale)[0])
