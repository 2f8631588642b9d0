"""Priors that are mixtures: read off a program, and a law of mixtures to train on.

w ~ Dirichlet(a / k),  m_k ~ N(center, (scale spread)^2),  (scale^2 L_k L_k^T)^-1 ~ Wishart(n + degrees)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.amortised.mixture import Mixture, gaussian_parts
from ppl.errors import OptionError, ProgramError
from ppl.flat import FlatDensity
from ppl.program import Program
from ppl.sites import unwrap

__all__ = ["MixtureLaw", "MixturePriors", "prior_of"]


@runtime_checkable
class MixtureLaw(Protocol):
    """A law over mixture priors, to train on: write your own where `MixturePriors` is too wide."""

    def sample(self, rows: int, components: int, center: Tensor, scale: Tensor, generator: torch.Generator) -> Mixture:
        """Independent mixtures.

        Args:
            rows: how many.
            components: of each.
            center: (dim,) mean of the program's own prior on the unconstrained scale.
            scale: (dim,) its standard deviation.
            generator: source of randomness.

        Returns:
            A batch (rows,) of mixtures over vectors (dim,).
        """
        ...


@dataclass(frozen=True)
class MixturePriors:
    """Mixtures around the program's own prior, wide and narrow, of one component or of many.

    Args:
        spread: standard deviation of the components' means, in units of the scale.
        width: standard deviation of a typical component, in the same unit.
        degrees: degrees of freedom of the precisions above dim; fewer make widths differ more.
        copies: share of the mixtures that have fewer components than the network, filled up by `Mixture.split`: a
            Gaussian prior arrives in this form.
        center: (dim,) numbers on the unconstrained scale, or one; those of the program's own prior when None.
        scale: likewise.

    Raises:
        OptionError: an option is out of range.

    Source: Whittle et al. (2025), code: Dirichlet(1/k), N(0, I), Wishart(n + 1) [read]; more degrees of freedom, copies
        and units are ours.

    Example:
        >>> law = MixturePriors()
        >>> law.sample(4, 3, torch.zeros(2), torch.ones(2), torch.Generator().manual_seed(0)).means.shape
        torch.Size([4, 3, 2])
    """

    spread: float = 1.0
    width: float = 1.0
    degrees: float = 3.0
    copies: float = 0.25
    center: float | Sequence[float] | None = None
    scale: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("spread", "width"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name} must be positive and finite, got {value}")
        if not (self.degrees >= 1 and float(self.degrees).is_integer()):
            raise OptionError(f"degrees must be a whole number, one or more, got {self.degrees}")
        if not 0 <= self.copies <= 1:
            raise OptionError(f"copies must be a share between 0 and 1, got {self.copies}")
        for name in ("center", "scale"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.scale is not None and not bool((torch.as_tensor(self.scale) > 0).all()):
            raise OptionError(f"scale must be positive, got {self.scale}")

    def sample(self, rows: int, components: int, center: Tensor, scale: Tensor, generator: torch.Generator) -> Mixture:
        """Independent mixtures, see `MixtureLaw`."""
        n, k = len(center), components
        own: dict[str, Any] = {"dtype": center.dtype, "device": center.device, "generator": generator}
        center, scale = (
            v if given is None else torch.as_tensor(given, dtype=v.dtype, device=v.device).expand(n)
            for v, given in ((center, self.center), (scale, self.scale))
        )
        # Dirichlet by normalised gammas, those of small shape by a power of a uniform: G(a) = G(a + 1) U^(1/a).
        shape = torch.full((rows, k), 1.0 / k, dtype=center.dtype, device=center.device)
        log_gamma = torch._standard_gamma(shape + 1, generator=generator).log()
        weights = torch.softmax(log_gamma + torch.rand(rows, k, **own).clamp(min=1e-30).log() / shape, -1)
        means = center + scale * self.spread * torch.randn(rows, k, n, **own)
        df = n + int(self.degrees)
        root = torch.randn(rows, k, df, n, **own) / math.sqrt(df)
        precision = root.mT @ root + 1e-6 * torch.eye(n, dtype=center.dtype, device=center.device)
        covariance = torch.linalg.inv(precision) * self.width**2
        spread = covariance * scale[:, None] * scale
        whole = Mixture.of_covariances(weights, means, (spread + spread.mT) / 2)
        few = torch.rand(rows, **own) < self.copies
        count = torch.randint(1, k + 1, (rows,), generator=generator, device=center.device)
        for kept in range(1, k):
            chosen = few & (count == kept)
            if bool(chosen.any()):
                part = whole[chosen]
                cut = part.weights[:, :kept]
                cut = torch.where(cut.sum(-1, keepdim=True) > 1e-6, cut, torch.ones_like(cut))
                fewer = Mixture(cut / cut.sum(-1, keepdim=True), part.means[:, :kept], part.scale_tril[:, :kept]).split(
                    k
                )
                whole.weights[chosen], whole.means[chosen] = fewer.weights, fewer.means
                whole.scale_tril[chosen] = fewer.scale_tril
        return whole


def prior_of(program: Program) -> Mixture:
    """The prior of a program as one mixture on the unconstrained scale.

    Every latent site has to be independent of the others, and Gaussian, log-normal or a mixture of Gaussians.

    Raises:
        ProgramError: it is not a mixture; the message names the site.

    Example:
        >>> import pyro
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(1.0, 2.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> prior_of(Program(model, torch.tensor(0.0))).means
        tensor([[1.]])
    """
    layout = FlatDensity(program, coordinates=True).layout
    found = None
    for name, leaf in layout.leaves.items():
        site = program.sites[name]
        size = leaf.stop - leaf.start
        if leaf.noise:
            one = torch.zeros(size, dtype=program.dtype, device=program.device)
            parts: Any = (one.new_ones(1), one[None], torch.diag_embed(one + 1)[None])
        else:
            fn = site.distribution
            base = unwrap(fn)
            if isinstance(base, dist.LogNormal):
                fn = dist.Normal(base.loc, base.scale).expand(fn.batch_shape + fn.event_shape)
            parts = gaussian_parts(fn)
        if parts is None or not site.static or parts[1].shape[1] != size:
            why = "depends on other latents" if not site.static else f"is {type(unwrap(site.distribution)).__name__}"
            raise ProgramError(
                f"the prior of site {name!r} {why}, which is not a mixture of Gaussians on the unconstrained scale; "
                "pass prior=ppl.Mixture(...), or train for the program's own prior with priors=None"
            )
        parts = tuple(v.detach().to(dtype=program.dtype, device=program.device) for v in parts)
        found = parts if found is None else _product(found, parts)
    assert found is not None
    return Mixture.of_covariances(*found)


def _product(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The joint law of two independent mixtures: every pair of components."""
    i, j = (v.reshape(-1) for v in torch.meshgrid(torch.arange(len(a[0])), torch.arange(len(b[0])), indexing="ij"))
    spread = torch.stack([torch.block_diag(p, q) for p, q in zip(a[2][i], b[2][j], strict=True)])
    return a[0][i] * b[0][j], torch.cat([a[1][i], b[1][j]], -1), spread
