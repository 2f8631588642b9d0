"""The contract of a denoiser as one check that users can run on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sde.denoiser import call_denoiser

__all__ = ["check_denoiser"]


def check_denoiser(
    denoiser: Callable[..., Tensor],
    event_shape: Sequence[int],
    *,
    sigmas: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
    label: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    """Check that a callable keeps the promises of a denoiser: shapes, types, rows, noise levels, no side effects.

    It does not check that the answers are good: for that, compare with `GaussianMixture`, or look at denoising errors.

    Args:
        denoiser: (x: (batch, *event), sigma: 0-d or (batch,)[, label: (batch,)]) -> (batch, *event).
        event_shape: shape of one event.
        sigmas: noise levels to try.
        label: class to try, for conditional denoisers.
        dtype: type of x.
        device: device of x.
        seed: seed of the inputs.
        tolerance: largest difference, relative to the answer, between calls that should agree; by default 1e-3 in
            float32 and below, 1e-9 in float64.

    Raises:
        ValueError: with everything that was found, one line each.

    Example:
        >>> check_denoiser(lambda x, sigma: x / (1 + sigma.reshape(-1, 1) ** 2), (3,))
        >>> check_denoiser(lambda x, sigma: x.mean() / (1 + sigma.reshape(-1, 1) ** 2) + 0 * x, (3,))
        Traceback (most recent call last):
        ...
        ValueError: not a denoiser: at sigma=0.01 a row on its own is not denoised as it is in a batch...
    """
    findings: list[str] = []
    close = tolerance if tolerance is not None else (1e-9 if dtype == torch.float64 else 1e-3)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((3, *event_shape), generator=generator, dtype=torch.float64)
    state, default = torch.get_rng_state(), torch.get_default_dtype()

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        return call_denoiser(denoiser, x, sigma, None if label is None else torch.full(x.shape[:1], label).to(device))

    def differs(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() > close * (1e-6 + b.abs().max()))

    with torch.no_grad():
        for level in sigmas:
            at = f"at sigma={level:g} "
            x = (noise * (1 + level**2) ** 0.5).to(device, dtype)
            sigma = torch.tensor(level, dtype=dtype, device=device)
            before = x.clone()
            answer = call(x, sigma)
            if answer.shape != x.shape:
                findings.append(f"{at}x of shape {tuple(x.shape)} gives shape {tuple(answer.shape)}")
                continue
            if answer.dtype != x.dtype or answer.device != x.device:
                findings.append(f"{at}x in {x.dtype} on {x.device} gives {answer.dtype} on {answer.device}")
                continue
            if not bool(answer.isfinite().all()):
                findings.append(f"{at}the answer is not finite")
                continue
            if not torch.equal(x, before):
                findings.append(f"{at}x was changed in place")
            if differs(call(before, sigma), answer):
                findings.append(f"{at}two calls disagree; call .eval(), or remove randomness")
            if differs(call(before, sigma.expand(3)), answer):
                findings.append(f"{at}one level per row disagrees with one level for all; sigma may be () or (batch,)")
            if differs(call(before[1:2], sigma), answer[1:2]):
                findings.append(f"{at}a row on its own is not denoised as it is in a batch; use no batch statistics")
            mixed = torch.stack([sigma, 2 * sigma, 3 * sigma])
            if differs(call(before, mixed)[:1], answer[:1]):
                findings.append(f"{at}a row depends on the noise level of other rows")
            if call(before[:0], sigma).shape != before[:0].shape:
                findings.append(f"{at}an empty batch does not give an empty batch")
    if not torch.equal(torch.get_rng_state(), state):
        findings.append("torch's global random state was moved")
        torch.set_rng_state(state)
    if torch.get_default_dtype() != default:
        findings.append("the default dtype was changed")
        torch.set_default_dtype(default)
    if findings:
        raise ValueError("not a denoiser: " + "\n".join(findings))
