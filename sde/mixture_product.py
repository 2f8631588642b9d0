"""Products of independent Gaussian mixtures: one mixture of the joined vector, sum_k prod_i w_{i, k_i} N(...)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from sde.mixture import GaussianMixture
from sde.prior import DenoisingPrior

__all__ = ["PRODUCT_LIMIT", "mixture_product", "product_size"]

PRODUCT_LIMIT = 2**24
"""Most numbers in the covariances of the components of a product of mixtures."""


def _dimensions(priors: Sequence[DenoisingPrior]) -> int:
    """Entries of the joined vector, copies of a member included."""
    return sum((p.batch_shape + p.event_shape).numel() for p in priors)


def product_size(priors: Sequence[DenoisingPrior]) -> int:
    """Numbers in the covariances of all components of the product; infinite where a member is no mixture."""
    count = 1
    for p in priors:
        if not isinstance(p, GaussianMixture):
            return 0 if "condition_linear" not in p.capabilities else PRODUCT_LIMIT + 1
        count *= p.components ** p.batch_shape.numel()
    return count * _dimensions(priors) ** 2


def mixture_product(priors: Sequence[DenoisingPrior], **options: Any) -> GaussianMixture:
    """The law of the joined vector, with a component for every choice of the members' components.

    Args:
        priors: mixtures; copies of a member (its batch shape) count as members.
        **options: of the mixture that is made.

    Raises:
        ValueError: a member is no mixture, or the product has too many components.

    Example:
        >>> one = GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2))
        >>> mixture_product([one, one]).means.tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    if not all(isinstance(p, GaussianMixture) for p in priors):
        raise ValueError(f"only mixtures have a product in closed form, got {tuple(priors)}")
    if product_size(priors) > PRODUCT_LIMIT:
        raise ValueError(
            f"the product of {[p.components for p in priors]} components in {_dimensions(priors)} dimensions "
            "is too large to write down; use a sampler such as inverse.TwistedSMC"
        )
    copies = [p for p in priors for _ in range(p.batch_shape.numel())]
    forms = [(p.weights, p.means.reshape(p.components, -1), p.covariances) for p in copies]
    rows = [
        (
            torch.stack([w[k] for (w, _, _), k in zip(forms, choice, strict=True)]).prod(),
            torch.cat([m[k] for (_, m, _), k in zip(forms, choice, strict=True)]),
            torch.block_diag(*(c[k] for (_, _, c), k in zip(forms, choice, strict=True))),
        )
        for choice in product(*(range(p.components) for p in copies))
    ]
    weights, means, covariances = (torch.stack(column) for column in zip(*rows, strict=True))
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    diagonal = bool((covariances == torch.diag_embed(variances)).all())
    return GaussianMixture(weights, means, variances if diagonal else covariances, **options)
