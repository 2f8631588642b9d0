r"""Independent diffusion priors side by side, as one prior of x = (x_1, x_2, ...) with p(x) = prod_i p_i(x_i).

D(x, s) = (D_1(x_1, s), D_2(x_2, s), ...),   Cov[x_0 | x] = diag(C_1, C_2, ...),   one denoiser call per member.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from sde.block_covariance import BlockCovariance, join, split
from sde.covariance import TweedieCovariance
from sde.log_density import Estimate
from sde.mixture import GaussianMixture
from sde.mixture_product import PRODUCT_LIMIT, mixture_product, product_size
from sde.network_covariance import NetworkCovariance
from sde.prior import DenoisingPrior, can_look
from sde.schedule import log_grid

__all__ = ["BlockCovariance", "JointPrior"]


class _Counters(list[Any]):
    """The counters of a joint prior: what is added counts the calls of every member."""

    def __init__(self, lists: Sequence[list[Any]]) -> None:
        super().__init__()
        # Sites may share one prior, which has one list.
        self.lists = list({id(own): own for own in lists}.values())

    def append(self, counter: Any) -> None:
        super().append(counter)
        for own in self.lists:
            own.append(counter)

    def __setitem__(self, key: Any, counters: Any) -> None:
        kept = list(counters)
        gone = {id(c) for c in self} - {id(c) for c in kept}
        super().__setitem__(key, kept)
        for own in self.lists:
            own[:] = [c for c in own if id(c) not in gone]


class JointPrior(DenoisingPrior):
    r"""Independent priors as one over their flattened events, joined into one vector of d entries.

    All members share one grid of noise levels, from the highest `sigma_max` to the lowest `sigma_min` among them, in
    their own units: a network is asked outside its range where another member's is wider, so give priors of like
    scale. Copies of a member (its batch shape) are part of the event. Labels are the members' own.

    Args:
        priors: the members, such as a `DiffusionPrior` or a `GaussianMixture`.
        steps: default number of steps of `sigmas`; None keeps the spacing of the member with the widest range, and at
            least the most steps of any member.
        validate_args: as in all distributions.

    Raises:
        ValueError: there is no member, one of them is no diffusion prior, or types or devices differ.

    Source: [derived].

    Example:
        >>> one = torch.ones(1)
        >>> pair, single = GaussianMixture(one, torch.zeros(1, 2), one), GaussianMixture(one, torch.ones(1, 1), 3 * one)
        >>> prior = JointPrior([pair, single])
        >>> prior.denoise(torch.tensor([[1.0, 2.0, 3.0]]), 1.0).tolist()
        [[0.5, 1.0, 2.5]]
        >>> [part.shape for part in prior.split(torch.zeros(5, 3))]
        [torch.Size([5, 2]), torch.Size([5, 1])]
    """

    def __init__(
        self, priors: Sequence[DenoisingPrior], *, steps: int | None = None, validate_args: bool | None = None
    ) -> None:
        self.priors = tuple(priors)
        wrong = [p for p in self.priors if not isinstance(p, DenoisingPrior)]
        if wrong or not self.priors:
            raise ValueError(f"expected one diffusion prior or more, got {wrong or 'none'}")
        homes = {(p.dtype, torch.device(p.device).type) for p in self.priors}
        if len(homes) > 1:
            raise ValueError(
                f"priors compute in different places, {sorted(map(str, homes))}; move them to one type and device "
                "with prior.to(device, dtype)"
            )
        self.shapes = tuple(p.batch_shape + p.event_shape for p in self.priors)
        low, high = min(p.sigma_min for p in self.priors), max(p.sigma_max for p in self.priors)
        grids = {id(p.grid): p.grid for p in self.priors}
        super().__init__(
            Size([sum(s.numel() for s in self.shapes)]),
            sigma_min=low,
            sigma_max=high,
            data_std=max(p.data_std for p in self.priors),
            steps=_steps(self.priors, low, high) if steps is None else steps,
            noise_steps=max(p.noise_steps for p in self.priors),
            noise_solver=None,
            grid=next(iter(grids.values())) if len(grids) == 1 else log_grid,
            validate_args=validate_args,
        )
        self.counters = _Counters([p.counters for p in self.priors])

    # What it is.

    @property
    def dtype(self) -> torch.dtype:
        """Data type of draws."""
        return self.priors[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of draws."""
        return torch.device(self.priors[0].device)

    @property
    def capabilities(self) -> frozenset[str]:
        """What all members can do; exact conditioning only while the product of their components is small."""
        common = frozenset.intersection(*(p.capabilities for p in self.priors))
        return common if product_size(self.priors) <= PRODUCT_LIMIT else common - {"condition_linear"}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> JointPrior:
        """The same prior elsewhere or in another precision."""
        moved = [p.to(device, dtype) for p in self.priors]
        return JointPrior(moved, steps=self.steps, validate_args=self._validate_args)

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> Self:
        """Independent copies over batch_shape; parameters and counters are shared."""
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        return new

    def split(self, x: Tensor) -> list[Tensor]:
        """The members' parts of joined vectors: (*batch, d) -> (*batch, *shape) of each, plates first."""
        return split(x, self.shapes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return join(parts, self.shapes)

    # Denoising.

    def _with(self, *values: Tensor, sigma: Tensor | float) -> list[tuple[Any, ...]]:
        """For every member: itself, its parts of the values, and sigma shaped for its plates."""
        level = sigma if isinstance(sigma, Tensor) else torch.as_tensor(sigma, dtype=torch.float64)
        parts = zip(*(self.split(v) for v in values), strict=True)
        return [
            (p, *part, level.reshape(*level.shape, *[1] * len(p.batch_shape)) if level.ndim else level)
            for p, part in zip(self.priors, parts, strict=True)
        ]

    def _denoise(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Denoise x: (rows, d) at sigma: 0-d or (rows,)."""
        if label is not None:
            raise ValueError("a JointPrior takes no label; give each member its own, such as prior(label=c)")
        return self.join([p.denoise(part, level) for p, part, level in self._with(x, sigma=sigma)])

    def score(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """grad log p_sigma(x), each member's own."""
        if label is not None:
            raise ValueError("a JointPrior takes no label; give each member its own, such as prior(label=c)")
        self._checked(x, sigma)
        return self.join([p.score(part, level) for p, part, level in self._with(x, sigma=sigma)])

    def covariance(self, x: Tensor, sigma: Tensor | float) -> TweedieCovariance:
        """Cov[x_0 | x] as an operator whose `mean` is D(x, sigma): blocks, or one Jacobian where all are networks.

        Args:
            x: (*batch, d).
            sigma: positive; 0-d, or broadcastable over the batch axes.
        """
        level = self._checked(x, sigma)
        if not any("exact_covariance" in p.capabilities for p in self.priors):
            tracked = x.requires_grad or not can_look(x)
            with torch.set_grad_enabled(torch.is_grad_enabled() and tracked):
                return NetworkCovariance(
                    lambda x: self.denoise(x, level),
                    x,
                    level,
                    self.event_shape,
                    on_product=self._count_products,
                    at=lambda index: self._network_at(x, level, index),
                )
        parts = tuple(p.covariance(part, own) for p, part, own in self._with(x, sigma=level))
        return BlockCovariance(self.join([p.mean for p in parts]), self.event_shape, parts, self.shapes)

    def _network_at(self, x: Tensor, level: Tensor, index: Tensor) -> NetworkCovariance:
        """The covariance at rows `index` of the first batch axis."""
        level = level.expand(x.shape[:-1])[index] if level.ndim else level
        found = self.covariance(x[index], level)
        assert isinstance(found, NetworkCovariance)
        return found

    def _count_products(self, rows: int) -> None:
        """Count rows differentiated, once for every copy of a member."""
        for count in self.counters:
            count.vjps += rows * sum(p.batch_shape.numel() for p in self.priors)

    def start(self, noise: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """x at the first noise level from standard normal noise (*batch, d), as each member starts."""
        level = self.sigma_max if sigma is None else sigma
        return self.join([p.start(part, level) for p, part in zip(self.priors, self.split(noise), strict=True)])

    # Noise space, densities and draws.

    @property
    def noise_shape(self) -> Size:
        """Shape of the standard normal noise that makes one draw: that of all members, joined."""
        return Size([sum(s.numel() for s in self._noise_shapes)])

    @property
    def _noise_shapes(self) -> list[Size]:
        return [p.batch_shape + p.noise_shape for p in self.priors]

    def from_noise(self, z: Tensor) -> Tensor:
        """The draw that standard normal noise makes, each member by its own deterministic sampler.

        Args:
            z: (*batch, *noise_shape).

        Returns:
            (*batch, d).
        """
        parts = split(z, self._noise_shapes)
        return self.join([p.from_noise(part) for p, part in zip(self.priors, parts, strict=True)])

    def log_prob(self, value: Tensor) -> Tensor:
        """(*batch) normalised log density: the members' sum."""
        if self._validate_args:
            self._validate_sample(value)
        batch = value.shape[:-1]
        terms = [
            p.log_prob(part).reshape(*batch, -1).sum(-1) for p, part in zip(self.priors, self.split(value), strict=True)
        ]
        return torch.stack(terms).sum(0).expand(torch.broadcast_shapes(batch, self.batch_shape))

    def log_prob_estimate(
        self, value: Tensor, generator: torch.Generator | None = None, *, levels: int = 32, repeats: int = 8
    ) -> Estimate:
        """Log density with a standard error, from denoising errors of every member; see `DenoisingPrior`."""
        batch = value.shape[:-1]
        found = [
            p.log_prob_estimate(part, generator, levels=levels, repeats=repeats)
            for p, part in zip(self.priors, self.split(value), strict=True)
        ]
        # Copies of one member share their noise, so that their errors may add up.
        own = [(e.value.reshape(*batch, -1).sum(-1), e.stderr.reshape(*batch, -1).sum(-1)) for e in found]
        return Estimate(torch.stack([v for v, _ in own]).sum(0), torch.stack([s for _, s in own]).norm(dim=0))

    def draw(self, shape: Size | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """(*shape, *batch_shape, d) draws from an explicit generator; None takes torch's global one."""
        lead = Size(shape) + self.batch_shape
        return self.join([p.draw(lead, generator) for p in self.priors])

    # Products of mixtures.

    def mixture(self) -> GaussianMixture:
        """The same law as one mixture, with a component for every choice of the members' components.

        Raises:
            ValueError: a member is no mixture, or the product has too many components.
        """
        return mixture_product(self.priors, steps=self.steps, noise_steps=self.noise_steps)

    def condition_linear(self, A: Tensor, y: Tensor, R: Tensor | float) -> GaussianMixture:
        """The exact posterior of the joined vector given y = A x + N(0, R), for mixtures; see `GaussianMixture`."""
        return self.mixture().condition_linear(A, y, R)

    def log_evidence(self, A: Tensor, y: Tensor, R: Tensor | float) -> Tensor:
        """log p(y) for y = A x + N(0, R), for mixtures; 0-d."""
        return self.mixture().log_evidence(A, y, R)


def _steps(priors: Sequence[DenoisingPrior], low: float, high: float) -> int:
    """Steps with the spacing of the member with the widest range, and no fewer than any member's own."""
    wide = max(priors, key=lambda p: p.sigma_max / p.sigma_min)
    stretch = math.log(high / low) / math.log(wide.sigma_max / wide.sigma_min)
    return max(math.ceil(wide.steps * stretch - 1e-9), *(p.steps for p in priors))
