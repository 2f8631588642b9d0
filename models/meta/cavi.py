"""Coordinate ascent: every episode's posterior, then the global law, in closed form, until nothing moves.

n_0 = nu_0 + N,   l_0 = lambda_0 + N,   m_0 = (lambda_0 mu_0 + sum m_i) / l_0
V_0 = Sigma_0 + lambda_0 (m_0 - mu_0)(m_0 - mu_0)' + sum_i [ V_i + (m_i - m_0)(m_i - m_0)' ]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from models.meta.fitted_meta import FittedMeta
from models.meta.gauss_newton import GaussNewton
from models.meta.local import close, second_moment
from models.meta.network import Gaussian
from models.meta.niw_math import GlobalLaw, NormalInverseWishart
from models.meta.program import hierarchy_of
from ppl.backend import Exactness
from ppl.errors import CapabilityError, OptionError
from ppl.fit_door import FitDoor
from ppl.monitor import Monitor
from ppl.option_checks import check_integers
from ppl.posterior import Posterior
from ppl.program import Program

__all__ = ["CoordinateAscent"]

LINEAR = 1e-6  # relative change of the network's derivative that counts as none


@dataclass(frozen=True)
class CoordinateAscent(FitDoor):
    """The best posterior of the form q(phi) prod_i q_i(theta_i), for networks linear in theta with Gaussian targets.

    The oracle of `NIWMeta`: all episodes in every round, and the evidence bound never falls. Mean-field, so that its
    posterior is not exact: the spread of Sigma is too small.

    Args:
        rounds: at most.
        tolerance: ends when the bound rises by less, in nats.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> from models.meta import Episodes, Hierarchy, NormalInverseGamma, mlp
        >>> network = mlp([1, 1])
        >>> prior = NormalInverseGamma.around(network.start, 0.1, 3.0, 1.0)
        >>> x = torch.linspace(-1, 1, 5)[:, None].expand(4, 5, 1)
        >>> program = Hierarchy(network, Gaussian(0.5), prior).program(Episodes(x, 2 * x[..., 0]))
        >>> fitted = CoordinateAscent().fit(program)
        >>> bool((fitted.history.diff() > -1e-4).all()), float(fitted.law.df)
        (True, 7.0)
    """

    rounds: int = 500
    tolerance: float = 1e-8

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ("rounds",)
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, rounds=1)
        if not self.tolerance >= 0:
            raise OptionError(f"tolerance must be zero or more nats, got {self.tolerance!r}")

    def run(
        self, program: Program, *, draws: int, chains: int, generator: torch.Generator, monitor: Monitor
    ) -> Posterior:
        """Fit once, and draw; see `ppl.infer`."""
        return self.fit(program, generator=generator, monitor=monitor).posterior(program, draws, chains, generator)

    def _fitted(self, program: Program, generator: torch.Generator, monitor: Monitor) -> FittedMeta:
        """Rounds of both closed forms."""
        hierarchy, points = hierarchy_of(program)
        likelihood, prior = hierarchy.likelihood, hierarchy.prior
        if not isinstance(likelihood, Gaussian) or likelihood.learned:
            raise CapabilityError(
                "coordinate ascent has closed forms for Gaussian targets of known noise; this likelihood is "
                f"{likelihood!r}: use NIWMeta"
            )
        local, total = GaussNewton(steps=1), len(points.x)
        form = local(hierarchy, prior, points, None, generator)
        moved = prior.replaced(prior.mean + 1.0, prior.count, prior.df, prior.scale)
        elsewhere = local(hierarchy, moved, points, None, generator)
        assert form.root is not None
        assert elsewhere.root is not None
        if float((form.root - elsewhere.root).abs().max()) > LINEAR * float(form.root.abs().max()):
            raise CapabilityError(
                "coordinate ascent needs a network that is linear in its parameters, and the derivative of this one "
                "changes with them: use NIWMeta, which linearises it"
            )
        full = isinstance(prior, NormalInverseWishart)
        df = prior.df + total
        law: GlobalLaw = prior.replaced(prior.mean, prior.count + total, df, prior.scale * df / prior.df)
        history: list[float] = []
        saved = monitor.resume()
        first = 0
        if saved is not None:
            first = int(saved["step"])
            law = prior.replaced(saved["mean"], law.count, law.df, saved["scale"])
            history = saved["history"].tolist()
        for step in monitor.steps(self.rounds, "rounds", start=first):
            q = close(form, law.mean, law.precision())
            law = prior.updated(total, q.mean.mean(0), second_moment(q.mean, q.covariance, full))
            bound = -law.kl(prior) - (form.expected(q) + law.expected_kl(q.mean, q.covariance, q.log_det)).sum()
            monitor.check_finite("evidence bound", bound, step)
            history.append(float(bound))
            monitor.cost.add(likelihood_evals=total)
            monitor.report(elbo=history[-1])
            now = torch.tensor(history, dtype=torch.float64)
            monitor.checkpoint(step + 1, {"mean": law.mean, "scale": law.scale, "history": now})
            if len(history) > 1 and history[-1] - history[-2] < self.tolerance:
                break
        bounds = torch.tensor(history, dtype=torch.float64)
        return FittedMeta(hierarchy, law, None, local, "quadratic", total, bounds, not monitor.interrupted)
