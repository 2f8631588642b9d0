"""The hierarchy over episodes as an ordinary Pyro program.

phi = (mu, Sigma) ~ Normal-Inverse-Wishart or its relaxation
theta_i | phi ~ N(mu, Sigma)                   for episode i = 1..N, in a plate
y_ij | theta_i ~ likelihood(network(theta_i, x_ij))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.meta.episodes import Episodes, Points
from models.meta.network import Gaussian, Likelihood, Network, check_fit
from models.meta.niw_math import GlobalLaw, NormalInverseGamma, NormalInverseWishart, precision_root
from ppl.errors import OptionError, ProgramError, ShapeError
from ppl.program import Program

__all__ = ["Hierarchy", "hierarchy_of"]


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """A Pyro model of many episodes; call `program` to give it data.

    Sites: "mu" (d,); "precision" (d,) for the relaxation, or, for the full law, Bartlett's factor of the Wishart
    precision in "bartlett_diagonal" (d,) and "bartlett_lower" (d (d - 1) / 2,), with the matrix as a deterministic site
    "precision"; "theta" (N, d) in the plate "episodes"; "y".

    Args:
        network: what maps theta and x to outputs; all its parameters are theta.
        likelihood: the law of targets given outputs.
        prior: of mu and Sigma.
        batch: episodes that a subsampled plate shows at a time; None shows all.
        centred: theta_i is drawn around mu; otherwise "theta_noise" is standard normal and theta is computed from it.

    Raises:
        ShapeError: the prior's dimension is not the network's.

    Example:
        >>> from models.meta import mlp
        >>> network = mlp([1, 1])
        >>> prior = NormalInverseGamma.around(network.start, 0.1, 3.0, 1.0)
        >>> episodes = Episodes(torch.randn(4, 5, 1), torch.randn(4, 5))
        >>> Hierarchy(network, Gaussian(0.5), prior).program(episodes)
        Program(Hierarchy, latents=['precision', 'mu', 'theta'], observed=['y'])
    """

    network: Network
    likelihood: Likelihood
    prior: GlobalLaw
    batch: int | None = None
    centred: bool = True

    def __post_init__(self) -> None:
        if self.prior.dim != self.network.dim:
            raise ShapeError(
                f"the prior has {self.prior.dim} coordinates, the network {self.network.dim} parameters; build the "
                "prior around network.start"
            )
        if self.batch is not None and (not isinstance(self.batch, int) or self.batch < 1):
            raise OptionError(f"batch is a number of episodes, at least 1, or None for all, got {self.batch!r}")

    def program(self, episodes: Episodes, batch: int | None = None, **options: Any) -> Program:
        """The program with all points of the episodes as its data.

        Args:
            episodes: support and query sets alike are data.
            batch: see the class.
            **options: of `ppl.Program`.

        Raises:
            DataError: targets that the likelihood cannot have.
            OptionError: the batch is larger than the number of episodes.
            ProgramError: the network is no function of theta and x.
        """
        points = episodes.points
        model = self if batch is None else replace(self, batch=batch)
        if model.batch is not None and model.batch > len(episodes):
            raise OptionError(f"batch is {model.batch}, but there are {len(episodes)} episodes; lower it")
        self.check(points)
        return Program(model, points.x, points.y, points.mask, **options)

    def check(self, points: Points) -> None:
        """Raise where network or likelihood do not fit the points."""
        if points.x.is_floating_point() and points.x.dtype != self.prior.mean.dtype:
            raise ShapeError(
                f"x is {points.x.dtype}, the prior {self.prior.mean.dtype}; use one type: episodes.to(dtype=...)"
            )
        check_fit(self.network, self.likelihood, points)

    def __call__(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        """The Pyro model: x (N, points, *x), y (N, points, *y), mask (N, points)."""
        law, noise_law, place = self._global()
        sigma = self.sigma()
        size = None if self.batch is None or self.batch >= len(x) else self.batch
        with pyro.plate("episodes", len(x), subsample_size=size) as index:
            if self.centred:
                theta = pyro.sample("theta", law)
            else:
                theta = pyro.deterministic("theta", place(pyro.sample("theta_noise", noise_law)), event_dim=1)
            shown = (x, y, mask) if size is None else (x[index], y[index], mask[index])
            points = Points(*shown)
            target = self.likelihood.law(self.outputs(theta, points.x), sigma)
            pyro.sample("y", target.mask(points.mask).to_event(1), obs=points.y)

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """Of the network: theta (*batch, b, d), x (b, points, *x) -> (*batch, b, points, *outputs)."""
        return self.network(theta, x.expand(*theta.shape[:-2], *x.shape))

    def losses(self, theta: Tensor, points: Points, sigma: Tensor | None = None) -> Tensor:
        """l_i(theta_i) = -log p(D_i | theta_i): theta (*batch, b, d) of b episodes -> (*batch, b)."""
        # Values are checked where they come in and where they are used; one that is not finite is named there.
        with pyro.validation_enabled(False):
            log_p = self.likelihood.law(self.outputs(theta, points.x), sigma).log_prob(points.y)
        return -log_p.masked_fill(~points.mask, 0.0).sum(-1)

    def sigma(self) -> Tensor | None:
        """The learned noise of the likelihood, the parameter "sigma" of the program; None where it is not learned."""
        if not isinstance(self.likelihood, Gaussian) or not self.likelihood.learned:
            return None
        start = self.prior.mean.new_tensor(self.likelihood.sigma)
        return pyro.param("sigma", start, constraint=dist.constraints.positive)

    def _global(self) -> tuple[Any, Any, Callable[[Tensor], Tensor]]:
        """Draw mu and Sigma: the law of theta, a standard normal, and the map between them."""
        prior, d = self.prior, self.prior.dim
        noise_law = dist.Normal(prior.mean.new_zeros(d), 1.0).to_event(1)
        if isinstance(prior, NormalInverseGamma):
            gamma = dist.Gamma((prior.df / 2).expand(d), prior.scale / 2)
            precision = pyro.sample("precision", gamma.to_event(1))
            mu = pyro.sample("mu", dist.Normal(prior.mean, (prior.count * precision).rsqrt()).to_event(1))
            spread = precision.rsqrt()
            return dist.Normal(mu, spread).to_event(1), noise_law, lambda z: mu + spread * z
        assert isinstance(prior, NormalInverseWishart)
        shape = (prior.df - torch.arange(d, dtype=prior.mean.dtype, device=prior.mean.device)) / 2
        diagonal = pyro.sample("bartlett_diagonal", dist.Gamma(shape, torch.full_like(shape, 0.5)).to_event(1))
        factor = torch.diag_embed(diagonal.sqrt())
        if d > 1:
            below = pyro.sample("bartlett_lower", dist.Normal(prior.mean.new_zeros(d * (d - 1) // 2), 1.0).to_event(1))
            factor = factor + _strictly_lower(below, d)
        root = precision_root(prior.scale) @ factor
        pyro.deterministic("precision", root @ root.mT, event_dim=2)
        mu = pyro.sample("mu", RootedNormal(prior.mean, root * prior.count.sqrt()))
        return RootedNormal(mu, root), noise_law, lambda z: mu + _solved(root, z)


def _strictly_lower(below: Tensor, d: int) -> Tensor:
    """(d (d - 1) / 2,) -> the strictly lower triangle of (d, d), row by row."""
    rows, columns = torch.tril_indices(d, d, -1)
    basis = below.new_zeros(len(rows), d, d)
    basis[torch.arange(len(rows)), rows, columns] = 1.0
    return torch.einsum("...k,kij->...ij", below, basis)


def _solved(root: Tensor, z: Tensor) -> Tensor:
    """C'^-1 z for lower triangular C: (*batch, d) of covariance (C C')^-1."""
    return torch.linalg.solve_triangular(root.mT, z[..., None], upper=True)[..., 0]


class RootedNormal(dist.TorchDistribution):
    """N(loc, (C C')^-1), given by a lower triangular root C of the precision: no matrix is inverted.

    Args:
        loc: (d,), or with batch axes.
        root: (d, d) C, with a positive diagonal.
    """

    arg_constraints = {"loc": dist.constraints.real_vector, "root": dist.constraints.lower_cholesky}  # noqa: RUF012
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, root: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.root = loc, root
        batch = torch.broadcast_shapes(loc.shape[:-1], root.shape[:-2])
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RootedNormal:
        """The same over more batch axes."""
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return RootedNormal(loc, self.root, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, *batch, d)."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + _solved(self.root, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log density."""
        white = ((value - self.loc)[..., None, :] @ self.root)[..., 0, :]
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det - 0.5 * white.square().sum(-1) - 0.5 * value.shape[-1] * _LOG_2_PI


_LOG_2_PI = 1.8378770664093453


def hierarchy_of(program: Program) -> tuple[Hierarchy, Points]:
    """The hierarchy behind a program, and its data.

    Raises:
        ProgramError: the program was not made by `Hierarchy.program`.
    """
    if not isinstance(program.model, Hierarchy):
        raise ProgramError(
            "this backend reads network, likelihood and prior off a hierarchy over episodes, but the model is "
            f"{getattr(program.model, '__name__', type(program.model).__name__)}; build the program by "
            "models.meta.Hierarchy(...).program(episodes)"
        )
    (x, y, mask), _ = program.arguments.call({})
    return program.model, Points(x, y, mask)
