"""A fitted hierarchy: what is left of many episodes, and its use on new ones.

q(phi) = NIW(m_0, V_0, n_0, l_0);   of theta_i nothing is kept: q_i is computed anew from the points of an episode
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from models.meta.episodes import Episodes, Points
from models.meta.local import LocalFit, LocalNormal, Quadratic, close
from models.meta.niw_math import GlobalLaw, NormalInverseGamma, NormalInverseWishart, precision_root
from models.meta.predictive import Predictive
from models.meta.program import Hierarchy, hierarchy_of
from ppl.errors import CheckpointError, OptionError, ShapeError
from ppl.posterior import Estimate, Posterior
from ppl.program import Program
from ppl.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from models.meta.adaptation import Adaptation

__all__ = ["FittedMeta"]

EPISODES_AT_ONCE = 64
KINDS: dict[str, type[NormalInverseGamma] | type[NormalInverseWishart]] = {
    c.__name__: c for c in (NormalInverseGamma, NormalInverseWishart)
}


@dataclass(frozen=True, eq=False)
class FittedMeta:
    """The variational posterior of a hierarchy, as `NIWMeta.fit` and `CoordinateAscent.fit` return it.

    Args:
        hierarchy: network, likelihood and prior.
        law: q(phi).
        sigma: learned noise of the likelihood; None where it is not learned.
        local: how episodes are fitted.
        expectation: of l_i in the evidence bound, see `NIWMeta`.
        total: N, episodes that the law was learned from.
        history: (steps,) estimates of the evidence bound, float64.
        complete: whether the fit ran to its end.
    """

    hierarchy: Hierarchy
    law: GlobalLaw
    sigma: Tensor | None
    local: LocalFit
    expectation: str
    total: float
    history: Tensor
    complete: bool = True

    # Episodes --------------------------------------------------------------------------------------------------------

    def local_posteriors(self, points: Points, generator: torch.Generator) -> tuple[Quadratic, LocalNormal]:
        """q_i of the episodes, as in training; theirs are the axes of `points`."""
        with torch.no_grad():
            form = self.local(self.hierarchy, self.law, points, self.sigma, generator)
            return form, close(form, self.law.mean, self.law.precision())

    def predict(
        self,
        episodes: Episodes,
        how: Adaptation | None = None,
        draws: int | None = None,
        generator: torch.Generator | None = None,
        linearised: bool = False,
        temperature: float = 1.0,
    ) -> Predictive:
        """The laws of the query targets given the support sets: `adapt`, then `Adapted.predict`."""
        from models.meta.adaptation import adapt

        generator = generator or torch.Generator(self.law.mean.device).manual_seed(0)
        adapted = adapt(self, episodes, how, generator)
        return adapted.predict(episodes.query.x, draws, generator, linearised, temperature)

    def prior_predictive(self) -> dist.TorchDistribution:
        """The law of theta of a new episode before its data: Student's t."""
        return self.law.predictive()

    def prior_draws(self, draws: int, generator: torch.Generator) -> Tensor:
        """(draws, d) of theta of a new episode before its data."""
        mu, precision = self.law.sample(draws, generator)
        noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
        if precision.ndim == 2:
            return mu + noise * precision.rsqrt()
        upper = torch.linalg.cholesky(precision).mT
        return mu + torch.linalg.solve_triangular(upper, noise[..., None], upper=True)[..., 0]

    def elbo(self, points: Points | Episodes, generator: torch.Generator | None = None, draws: int = 64) -> Estimate:
        """The evidence bound of all N episodes the law was learned from, with its Monte-Carlo error.

        Args:
            points: the episodes; as many as `total`.
            generator: of draws of q_i and of inner fits; seed 0 when None.
            draws: of q_i, where the expectation is not that of the quadratic fit.
        """
        points = points.points if isinstance(points, Episodes) else points
        generator = generator or torch.Generator(self.law.mean.device).manual_seed(0)
        value = -self.law.kl(self.hierarchy.prior).double()
        variance = torch.zeros_like(value)
        with torch.no_grad():
            for part in _chunks(points):
                form, local = self.local_posteriors(part, generator)
                value = value - self.law.expected_kl(local.mean, local.covariance, local.log_det).double().sum()
                if self.expectation == "quadratic":
                    value = value - form.expected(local).double().sum()
                else:
                    losses = self.hierarchy.losses(local.draw(draws, generator), part, self.sigma).double()
                    value = value - losses.mean(0).sum()
                    variance = variance + losses.sum(1).var() / draws
        return Estimate(value, variance.sqrt())

    def posterior(self, program: Program, draws: int, chains: int, generator: torch.Generator) -> Posterior:
        """Draws of mu and Sigma from q(phi) and of every theta_i from its q_i; all are independent in q.

        Args:
            program: with the episodes; of the hierarchy that was fitted.
            draws: per chain.
            chains: all are of one fit.
            generator: source of the draws.
        """
        hierarchy, points = hierarchy_of(program)
        if hierarchy.prior.dim != self.law.dim:
            raise ShapeError(f"the program has {hierarchy.prior.dim} coordinates, the fit {self.law.dim}")
        size = chains * draws
        with torch.no_grad():
            mu, precision = self.law.sample(size, generator)
            found = {"mu": mu, "precision": precision}
            parts = [
                self.local_posteriors(part, generator)[1].draw(size, generator).detach() for part in _chunks(points)
            ]
            found["theta"] = torch.cat(parts, 1)
            if precision.ndim == 3:
                found |= _bartlett_sites(precision, hierarchy.prior)
            if not hierarchy.centred:
                found["theta_noise"] = _noise(found, precision)
        bound = self.elbo(points, generator)
        shaped = {n: v.reshape(chains, draws, *v.shape[1:]) for n, v in found.items()}
        return Posterior(
            draws=shaped,
            parameters={} if self.sigma is None else {"sigma": self.sigma},
            info={"elbo": bound.value, "elbo_stderr": bound.stderr, "elbo_history": self.history},
            attrs={"complete": self.complete},
        )

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the law to a safetensors file with a checksum; the network is not in it, but its start is m_0."""
        law = self.law
        tensors = {"mean": law.mean, "count": law.count, "df": law.df, "scale": law.scale, "history": self.history}
        if self.sigma is not None:
            tensors["sigma"] = self.sigma
        meta: dict[str, Any] = {
            "kind": "FittedMeta",
            "law": type(law).__name__,
            "local": repr(self.local),
            "expectation": self.expectation,
            "total": self.total,
            "complete": self.complete,
        }
        save_tensors(path, tensors, meta)

    @classmethod
    def load(cls, path: str | Path, hierarchy: Hierarchy, local: LocalFit) -> FittedMeta:
        """Read a file of `save`.

        Args:
            path: the file.
            hierarchy: network, likelihood and prior as they were.
            local: how episodes are to be fitted.

        Raises:
            CheckpointError: the file is damaged, or of something else.
            ShapeError: the hierarchy has another number of coordinates.
            OptionError: the law is of another kind than the hierarchy's prior.
        """
        tensors, meta = load_tensors(path)
        if not isinstance(meta, dict) or meta.get("kind") != "FittedMeta":
            raise CheckpointError(f"{path} holds no fitted hierarchy; expected a file of FittedMeta.save")
        if meta["law"] != type(hierarchy.prior).__name__:
            raise OptionError(f"{path} holds a {meta['law']}, the hierarchy has a {type(hierarchy.prior).__name__}")
        if len(tensors["mean"]) != hierarchy.prior.dim:
            raise ShapeError(f"{path} has {len(tensors['mean'])} coordinates, the hierarchy {hierarchy.prior.dim}")
        like = hierarchy.prior.mean
        law = KINDS[meta["law"]](*(tensors[n].to(like.device) for n in ("mean", "count", "df", "scale")))
        sigma = tensors["sigma"].to(like.device) if "sigma" in tensors else None
        return cls(
            hierarchy, law, sigma, local, meta["expectation"], meta["total"], tensors["history"], meta["complete"]
        )


def _chunks(points: Points) -> Iterator[Points]:
    """Some episodes at a time."""
    for parts in zip(*(part.split(EPISODES_AT_ONCE) for part in points), strict=True):
        yield Points(*parts)


def _bartlett_sites(precision: Tensor, prior: GlobalLaw) -> dict[str, Tensor]:
    """The sites of the full law from draws of the precision, by the prior's own root."""
    d = prior.dim
    root = precision_root(prior.scale)
    factor = torch.linalg.solve_triangular(root, torch.linalg.cholesky(precision), upper=False)
    sites = {"bartlett_diagonal": factor.diagonal(dim1=-2, dim2=-1).square()}
    if d > 1:
        rows, columns = torch.tril_indices(d, d, -1)
        sites["bartlett_lower"] = factor[:, rows, columns]
    return sites


def _noise(found: dict[str, Tensor], precision: Tensor) -> Tensor:
    """What a hierarchy that is not centred would compute theta from."""
    off = found["theta"] - found["mu"][:, None]
    if precision.ndim == 2:
        return off * precision.sqrt()[:, None]
    return off @ torch.linalg.cholesky(precision)
