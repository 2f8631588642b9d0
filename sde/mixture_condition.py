r"""A Gaussian mixture given linear data y = A x_0 + e, e ~ N(0, R): again a mixture.

log p(y) = log sum_k w_k N(y; A m_k, A C_k A^T + R),   G_k = C_k A^T (A C_k A^T + R)^{-1},   x_0 | y, k has mean
m_k + G_k (y - A m_k) and covariance (I - G_k A) C_k (I - G_k A)^T + G_k R G_k^T (Joseph's form).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Size, Tensor

from sde.mixture_form import LOG_2PI, MixtureForm, orthonormal

__all__ = ["condition", "log_joint", "observed"]


def observed(
    form: MixtureForm, event_shape: Size, A: Tensor, y: Tensor, R: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """A over the flattened event, y - A c, and R as a matrix; checked."""
    d = form.dim
    # The dtype goes in at once: a Python number would pass through float32.
    A, y = (torch.as_tensor(t, dtype=form.center.dtype, device=form.center.device) for t in (A, y))
    if A.ndim < 1 or A.numel() != A.shape[0] * d:
        raise ValueError(
            f"A has shape {tuple(A.shape)}, expected (m, {d}) or (m, *{tuple(event_shape)}) for this event"
        )
    A = A.reshape(-1, d)
    m = len(A)
    y = y.reshape(-1)
    if len(y) != m:
        raise ValueError(f"y has {len(y)} entries, but A has {m} rows")
    noise = torch.as_tensor(R, dtype=form.center.dtype, device=form.center.device)
    if noise.ndim < 2 and noise.shape in ((), (1,), (m,)):
        noise = torch.diag(noise.expand(m))
    if noise.shape != (m, m):
        raise ValueError(f"R has shape {tuple(noise.shape)}, expected a variance, ({m},) variances or ({m}, {m})")
    if not (bool(torch.isfinite(A).all()) and bool(torch.isfinite(y).all()) and bool(torch.isfinite(noise).all())):
        raise ValueError("A, y and R must be finite; look for NaN in the data")
    return A, y - A @ form.center, noise


def _predictive(form: MixtureForm, A: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """A Q: (m, q), and A C_k A^T + R: (K, m, m)."""
    inside = A if form.basis is None else A @ form.basis
    covariance = inside @ form.core(form.values) @ inside.T + R
    if form.outside_dim:
        rest = A - form.lift(inside)
        covariance = covariance + form.outside[:, None, None] * (rest @ rest.T)
    return inside, covariance


def log_joint(form: MixtureForm, A: Tensor, residual: Tensor, R: Tensor) -> Tensor:
    """(K,) log w_k N(y; A m_k, A C_k A^T + R)."""
    inside, covariance = _predictive(form, A, R)
    error = residual - form.places @ inside.T
    root, info = torch.linalg.cholesky_ex(covariance)
    if bool((info > 0).any()):
        raise ValueError(
            "A C A^T + R is not positive definite; drop redundant rows of A, or give R a positive variance"
        )
    scaled = torch.linalg.solve_triangular(root, error[..., None], upper=False).squeeze(-1)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return form.log_weights - 0.5 * scaled.square().sum(-1) - log_det - 0.5 * len(residual) * LOG_2PI


def condition(form: MixtureForm, A: Tensor, residual: Tensor, R: Tensor) -> MixtureForm:
    """The mixture given A x_0 + N(0, R) - A c = residual; its subspace grows by at most m directions."""
    log_weights = log_joint(form, A, residual, R)
    wide = _widened(form, A)
    inside, predictive = _predictive(wide, A, R)
    prior = wide.core(wide.values)
    gain = torch.linalg.solve(predictive, inside @ prior).mT
    places = wide.places + torch.einsum("kqm,km->kq", gain, residual - wide.places @ inside.T)
    # Joseph's form stays positive semi-definite in rounding.
    left = torch.eye(inside.shape[1], dtype=A.dtype, device=A.device) - gain @ inside
    core = left @ prior @ left.mT + gain @ R @ gain.mT
    values, rotations = torch.linalg.eigh((core + core.mT) / 2)
    return replace(
        wide,
        log_weights=log_weights - log_weights.logsumexp(0),
        places=places,
        values=values.clamp(min=0),
        rotations=rotations,
    )


def _widened(form: MixtureForm, A: Tensor) -> MixtureForm:
    """The same mixture with the rows of A inside its subspace."""
    if form.basis is None:
        return form
    added = orthonormal(A - form.lift(A @ form.basis))
    # Twice is enough: the first pass leaves rounding along Q.
    added = orthonormal((added - form.basis @ (form.basis.T @ added)).T)
    k, rotations = form.components, None
    if form.rotations is not None:
        q = form.basis.shape[1]
        rotations = torch.eye(q + added.shape[1], dtype=A.dtype, device=A.device).repeat(k, 1, 1)
        rotations[:, :q, :q] = form.rotations
    return replace(
        form,
        basis=torch.cat([form.basis, added], 1),
        places=torch.cat([form.places, form.places.new_zeros(k, added.shape[1])], 1),
        values=torch.cat([form.values, form.outside[:, None].expand(k, added.shape[1])], 1),
        rotations=rotations,
    )
