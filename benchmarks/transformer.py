"""Distribution Transformers against exact posteriors: conjugate families, tracking, a qubit, a Gaussian process.

    python -m benchmarks.transformer normal | variance | quantum | gp | track | fusion [--quick]

KL is from the exact posterior to the mixture, averaged over problems from the joint law, with its standard error;
"corrected" is the mixture fitted again to 2000 weighted draws.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import ppl
from models.conjugate import inverse_gamma_family, log_variance_posterior, normal_family, normal_posterior
from models.fusion import (
    Motion,
    TrackPriors,
    corrected,
    kalman_update,
    particle_filter,
    range_bearing,
    range_bearing_data,
    range_bearing_log_likelihood,
    recursion,
    turning_point,
)
from models.gp_predictive import gp_posterior, gp_predictive
from models.quantum import grid_posterior, log_joint, two_level_system
from ppl import FittedTransformer, Mixture
from ppl.weighted import kish_ess

F64 = torch.float64
QUICK = "--quick" in sys.argv
DRAWS = 2000


def train(program: ppl.Program, **options: object) -> FittedTransformer:
    """Train, and say what it took."""
    if QUICK:
        options["steps"] = 100
    wall, cpu = time.perf_counter(), time.process_time()
    fitted = ppl.DistributionTransformer(**options).fit(program)  # type: ignore[arg-type]
    weights = sum(p.numel() for p in fitted.network.parameters())
    spent = time.process_time() - cpu
    print(f"trained: {weights} weights, {spent:.0f} s of one core ({time.perf_counter() - wall:.0f} s by the clock)")
    return fitted


def said(name: str, values: Tensor) -> None:
    """Mean with its standard error, median, largest."""
    error = float(values.std()) / len(values) ** 0.5
    print(
        f"{name}: {float(values.mean()):.4f} ± {error:.4f}, median {float(values.median()):.4f}, {len(values)} problems"
    )


def compare(
    exact_log_prob: Callable[[Tensor], Tensor], exact_draws: Tensor, prior: Mixture, q: Mixture, seed: int = 3
) -> None:
    """KL of prior, posterior and corrected posterior, and the quality of the weights, over a batch of problems."""
    truth = exact_log_prob(exact_draws)
    said("KL of the prior", (truth - prior.log_prob(exact_draws)).mean(0))
    said("KL in one pass", (truth - q.log_prob(exact_draws)).mean(0))
    some = min(len(q.weights), 100)
    few, own = q[:some], q.defended(prior)[:some]
    z = own.draw((DRAWS,), torch.Generator().manual_seed(seed))
    whole = torch.cat([z, z[:, :1].expand(-1, len(q.weights) - some, -1)], 1)
    log_weight = exact_log_prob(whole)[:, :some] - own.log_prob(z)
    after = few.refined(z, log_weight.softmax(0))
    said("KL corrected", (truth[:, :some] - after.log_prob(exact_draws[:, :some])).mean(0))
    share = torch.stack([kish_ess(w) for w in log_weight.softmax(0).T]) / DRAWS
    k_hat = torch.stack([ppl.diagnostics.pareto_khat(w) for w in log_weight.T])
    print(f"effective share: median {float(share.median()):.3f}, smallest {float(share.min()):.3f}")
    print(
        f"k-hat above 0.7: {int((k_hat > 0.7).sum())} of {some}; log evidence off by {_evidence(log_weight):.4f} (rms)"
    )


def _evidence(log_weight: Tensor) -> float:
    """Root mean square error of log evidences whose truth is zero."""
    value = log_weight.logsumexp(0) - torch.tensor(float(len(log_weight))).log()
    return float(value.square().mean().sqrt())


def passes(call: Callable[[], object]) -> None:
    """Processor time of a pass: the best of five, since others use the machine as well."""
    times = []
    for _ in range(5):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    print(f"a batch in one pass: {1000 * min(times):.0f} ms of one core, best of five")


def normal() -> None:
    """A mixture prior of two components and one normal datum."""
    law = ppl.MixturePriors(degrees=2)
    fitted = train(normal_family(), components=2, priors=law, steps=2000, batch=256)
    assert fitted.pairs is not None
    generator = torch.Generator().manual_seed(1)
    prior = law.sample(1000, 2, fitted.pairs.center, fitted.pairs.scale, generator)
    y = prior.draw((), generator) + torch.randn(1000, 1, generator=generator, dtype=F64)
    exact, _ = normal_posterior(prior, y)
    passes(lambda: fitted.mixtures(prior, y=y))
    compare(exact.log_prob, exact.draw((1000,), generator), prior, fitted.mixtures(prior, y=y))


def variance() -> None:
    """The wide inverse-gamma family."""
    fitted = train(inverse_gamma_family(), prior_sites=("a", "b"), steps=3000, batch=256)
    generator = torch.Generator().manual_seed(1)
    assert fitted.pairs is not None
    _, shown = fitted.pairs.draw(1000, generator)
    a, b, y = shown[:, 0].exp(), shown[:, 1].exp(), shown[:, 2]
    law = log_variance_posterior(a, b, y)
    # Draws by inversion of a gamma: G(a + 1/2), in the explicit generator.
    gamma = torch._standard_gamma((a + 0.5).expand(1000, -1).contiguous(), generator=generator)
    draws = ((b + 0.5 * y.square()).log() - gamma.log())[..., None]
    prior, q = fitted._pass(fitted.pairs.shown(torch.stack([a, b, y], 1), None))
    passes(lambda: fitted.mixtures(a=a, b=b, y=y))
    compare(lambda z: law.log_prob(z[..., 0]), draws, prior, q)


def quantum() -> None:
    """delta of the two-level system against the grid."""
    fitted = train(two_level_system(), prior_sites=("a", "b"), rows=("z",), steps=2000, batch=256)
    generator = torch.Generator().manual_seed(1)
    assert fitted.pairs is not None
    _, shown = fitted.pairs.draw(1000, generator)
    a, b, z = shown[:, 0].exp(), shown[:, 1].exp(), shown[:, 2:]
    grid, log_density, evidence = grid_posterior(a, b, z)
    step = grid[1] - grid[0]
    index = torch.multinomial(log_density.exp(), 1000, replacement=True, generator=generator).T
    draws = grid[index] + step * (torch.rand(index.shape, generator=generator, dtype=F64) - 0.5)
    prior, q = fitted._pass(fitted.pairs.shown(torch.cat([a[:, None], b[:, None], z], 1), None))
    on_grid = q.log_prob(grid[:, None, None].expand(-1, len(a), 1)).T.exp()
    said("total variation in one pass", 0.5 * (on_grid - log_density.exp()).abs().sum(1) * step)
    passes(lambda: fitted.mixtures(a=a, b=b, z=z))
    compare(lambda u: log_joint(u[..., 0], a, b, z) - evidence, draws[..., None], prior, q)


def gp() -> None:
    """Predictive and lengthscale of a Gaussian process against quadrature, weighted draws by the program's density."""
    program = gp_predictive()
    size = {"components": 8, "width": 64, "depth": 4, "feedforward": 128}
    fitted = train(program, rows=("x", "y"), steps=1500, batch=256, **size)
    generator = torch.Generator().manual_seed(1)
    assert fitted.pairs is not None
    truth, data = fitted.pairs.draw(500, generator)
    query, x, y = data[:, 0], data[:, 1:11], data[:, 11:]
    grid, weight, mean, var = gp_posterior(query, x, y)
    q = fitted.mixtures(query=query, x=x, y=y)
    passes(lambda: fitted.mixtures(query=query, x=x, y=y))
    alone = [Mixture(q.weights, q.means[..., i : i + 1], _variances(q, i).sqrt()[..., None, None]) for i in (0, 1)]
    log_f = torch.distributions.Normal(mean, var.sqrt()).log_prob(truth[:, 1:])
    exact_f = (weight.log() + log_f).logsumexp(1)
    place = torch.searchsorted(grid, truth[:, 0].contiguous()).clamp(1, len(grid) - 1)
    exact_scale = weight[torch.arange(500), place].log() - (grid[1] - grid[0]).log()
    said("predictive NLL, exact", -exact_f)
    said("predictive NLL, one pass", -alone[1].log_prob(truth[:, 1:]))
    said("lengthscale NLL, exact", -exact_scale)
    said("lengthscale NLL, one pass", -alone[0].log_prob(truth[:, :1]))
    center = (weight * mean).sum(1)
    sd = ((weight * (var + mean.square())).sum(1) - center.square()).sqrt()
    said("error of the mean in posterior sds, one pass", (alone[1].mean[:, 0] - center).abs() / sd)
    many = 4 if QUICK else 10
    posterior = fitted.posterior(DRAWS, program=program.over(query=query[:many], x=x[:many], y=y[:many]))
    said("the same, weighted draws", (posterior.mean("f") - center[:many]).abs() / sd[:many])
    print(f"k-hat above 0.7: {int((posterior.info['pareto_k'] > 0.7).sum())} of {many}")


def _variances(q: Mixture, i: int) -> Tensor:
    """(rows, components) variances of one coordinate."""
    return q.covariances[..., i, i]


def track() -> None:
    """One-dimensional tracking against the Kalman filter."""
    one = torch.ones(1, 1, dtype=F64)
    motion = Motion(0.9 * one, 0.4 * one, Mixture(torch.ones(1, dtype=F64), 0 * one, one[None]))
    fitted = train(normal_family(), components=4, priors=TrackPriors(narrow=0.3, wide=2.0), steps=1500, batch=256)
    generator = torch.Generator().manual_seed(1)
    x = motion.simulate(20, 200, generator)
    y = x + torch.randn(x.shape, generator=generator, dtype=F64)

    def update(prior: Mixture, now: Tensor) -> Mixture:
        return fitted.mixtures(prior, y=now)

    def log_likelihood(z: Tensor, now: Tensor) -> Tensor:
        return -0.5 * (z - now).square().sum(-1) - 0.918938533204673

    exact = recursion(kalman_update(one, one), motion, y)
    filters = {"one pass": update, "corrected, 1000 draws": corrected(update, log_likelihood, 1000, generator)}
    said("NLL of the truth, Kalman", _nll(exact, x))
    for name, step in filters.items():
        found = recursion(step, motion, y)
        said(f"NLL of the truth, {name}", _nll(found, x))
        z = exact[-1].draw((2000,), generator)
        said(f"KL at the last step, {name}", (exact[-1].log_prob(z) - found[-1].log_prob(z)).mean(0))
    for particles in (100, 1000):
        states, _ = particle_filter(lambda z, now: log_likelihood(z, now[:, None]), motion, y, particles, generator)
        said(f"NLL of the truth, normal at the moments of {particles} particles", _nll_of_particles(states, x))


def fusion() -> None:
    """Range and bearing, four-dimensional state, against particle filters."""
    motion = turning_point()
    size = {"components": 4, "width": 48, "depth": 3, "feedforward": 96}
    fitted = train(range_bearing(), priors=TrackPriors(), steps=1500, batch=256, **size)
    generator = torch.Generator().manual_seed(1)
    x = motion.simulate(15, 100, generator)
    y = range_bearing_data(x, seed=2)

    def update(prior: Mixture, now: Tensor) -> Mixture:
        return fitted.mixtures(prior, range=now[:, 0], bearing=now[:, 1])

    log_likelihood = range_bearing_log_likelihood
    filters = {"one pass": update, "corrected, 1000 draws": corrected(update, log_likelihood, 1000, generator)}
    for name, step in filters.items():
        cpu = time.process_time()
        found = recursion(step, motion, y)
        spent = (time.process_time() - cpu) / len(y)
        said(f"{name}: NLL", _nll(found, x))
        error = torch.stack([q.mean for q in found]) - x
        print(f"  rmse of places {_rmse(error):.3f}, {1000 * spent:.0f} ms of a core per step for 100 sequences")
    for particles in (100, 1000, 5000):
        cpu = time.process_time()
        states, _ = particle_filter(lambda z, now: log_likelihood(z, now[:, None]), motion, y, particles, generator)
        spent = (time.process_time() - cpu) / len(y)
        said(f"{particles} particles: NLL", _nll_of_particles(states, x))
        print(f"  rmse of places {_rmse(states.mean(2) - x):.3f}, {1000 * spent:.0f} ms of a core per step")


def _rmse(error: Tensor) -> float:
    return float(error[..., [0, 2]].square().sum(-1).mean().sqrt())


def _nll(found: list[Mixture], x: Tensor) -> Tensor:
    """Mean over steps of -log q(truth), for each sequence."""
    return -torch.stack([q.log_prob(now) for q, now in zip(found, x, strict=True)]).mean(0)


def _nll_of_particles(states: Tensor, x: Tensor) -> Tensor:
    """The same for the normal with the moments of the particles (steps, rows, particles, dim)."""
    mean = states.mean(2)
    gap = states - mean[:, :, None]
    spread = torch.einsum("tnpi,tnpj->tnij", gap, gap) / states.shape[2]
    spread = spread + 1e-6 * torch.eye(states.shape[-1], dtype=F64)
    return -torch.distributions.MultivariateNormal(mean, spread).log_prob(x).mean(0)


TASKS = {f.__name__: f for f in (normal, variance, quantum, gp, track, fusion)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for task in [a for a in sys.argv[1:] if not a.startswith("-")] or list(TASKS):
        print(f"## {task}")
        TASKS[task]()
