"""The reference models of `benchmarks.mcmc` in NumPyro, written as its users would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def numpyro_model(name: str, data: dict[str, Any]) -> Callable[[], None]:
    """The same models in NumPyro, written as its users would: a scan for the recursion."""
    import jax
    import jax.numpy as jnp
    import numpyro as n
    import numpyro.distributions as d

    def array(key: str) -> Any:
        return jnp.asarray(data[key], dtype=float)

    def eight() -> None:
        mu, tau = n.sample("mu", d.Normal(0, 5)), n.sample("tau", d.HalfCauchy(5))
        with n.plate("school", 8):
            shift = n.sample("shift", d.Normal(0, 1))
            n.sample("y", d.Normal(mu + tau * shift, array("sigma")), obs=array("y"))

    def kidiq() -> None:
        beta = n.sample("beta", d.ImproperUniform(d.constraints.real, (), (2,)))
        sigma = n.sample("sigma", d.HalfCauchy(2.5))
        mean = beta[0] + beta[1] * array("mom_iq")
        n.sample("score", d.Normal(mean, sigma), obs=array("kid_score"))

    def ark() -> None:
        order, y = data["K"], array("y")
        lags = jnp.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], axis=1)
        alpha = n.sample("alpha", d.Normal(0, 10))
        beta = n.sample("beta", d.Normal(0, 10).expand([order]).to_event(1))
        sigma = n.sample("sigma", d.HalfCauchy(2.5))
        n.sample("y", d.Normal(alpha + lags @ beta, sigma), obs=y[order:])

    def gp() -> None:
        x = array("x")
        rho, alpha = n.sample("rho", d.Gamma(25, 4)), n.sample("alpha", d.HalfNormal(2))
        sigma = n.sample("sigma", d.HalfNormal(1))
        kernel = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * jnp.eye(len(x))
        n.sample("y", d.MultivariateNormal(jnp.zeros(len(x)), kernel), obs=array("y"))

    def mixture() -> None:
        mu = n.sample("mu", d.ImproperUniform(d.constraints.ordered_vector, (), (2,)))
        n.factor("mu_prior", d.Normal(0, 2).log_prob(mu).sum())
        sigma = n.sample("sigma", d.HalfNormal(2).expand([2]).to_event(1))
        theta = n.sample("theta", d.Beta(5, 5))
        weights = d.Categorical(jnp.stack([theta, 1 - theta]))
        n.sample("y", d.MixtureSameFamily(weights, d.Normal(mu, sigma)), obs=array("y"))

    def garch() -> None:
        y, first = array("y"), float(data["sigma1"])
        mu = n.sample("mu", d.ImproperUniform(d.constraints.real, (), ()))
        alpha0 = n.sample("alpha0", d.ImproperUniform(d.constraints.positive, (), ()))
        alpha1 = n.sample("alpha1", d.Uniform(0, 1))
        beta1 = n.sample("beta1", d.Uniform(0, 1 - alpha1))
        n.factor("flat", jnp.log(1 - alpha1))  # both are flat in Stan's model

        def step(variance: Any, value: Any) -> Any:
            new = alpha0 + alpha1 * (value - mu) ** 2 + beta1 * variance
            return new, new

        _, rest = jax.lax.scan(step, jnp.asarray(first**2) + 0 * mu, y[:-1])
        variance = jnp.concatenate([jnp.asarray([first**2]), rest])
        n.sample("y", d.Normal(mu, jnp.sqrt(variance)), obs=y)

    def hmm() -> None:
        rows = [n.sample(f"theta{k + 1}", d.Dirichlet(jnp.ones(2))) for k in range(2)]
        log_transition, y = jnp.log(jnp.stack(rows)), array("y")
        mu = n.sample("mu", d.ImproperUniform(d.constraints.positive_ordered_vector, (), (2,)))
        n.factor("mu_prior", d.Normal(jnp.asarray([3.0, 10.0]), 1.0).log_prob(mu).sum())
        emission = d.Normal(mu, 1.0).log_prob(y[:, None])

        def step(forward: Any, row: Any) -> Any:
            return jax.nn.logsumexp(forward[:, None] + log_transition, axis=0) + row, None

        last, _ = jax.lax.scan(step, emission[0], emission[1:])
        n.factor("likelihood", jax.nn.logsumexp(last))

    def diamonds() -> None:
        x, y = array("X")[:, 1:], array("Y")
        b = n.sample("b", d.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        intercept = n.sample("Intercept", d.StudentT(3, 8, 10))
        sigma = n.sample("sigma", d.ImproperUniform(d.constraints.positive, (), ()))
        n.factor("sigma_prior", d.StudentT(3, 0, 10).log_prob(sigma))
        n.sample("y", d.Normal(intercept + (x - x.mean(0)) @ b, sigma), obs=y)

    def logistic() -> None:
        x = array("x")
        intercept = n.sample("intercept", d.Normal(0, 5))
        b = n.sample("b", d.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        n.sample("y", d.Bernoulli(logits=intercept + x @ b), obs=array("y"))

    models = {f.__name__: f for f in (eight, kidiq, ark, gp, mixture, garch, hmm, diamonds, logistic)}
    return models[name]
