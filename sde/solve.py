r"""The same paths by torchsde: adaptive, stochastic Runge-Kutta and adjoint solvers.

The factors of a Markov noise join the state: with m noises and K factors each,

    dX = [f + g sum_k (w_k' - w_k gamma_k) Y_k] dt + g (sum_k w_k) dW,   dY_k = -gamma_k Y_k dt + dW

where w_k' is zero but for a Hurst index that depends on time, as it must smoothly. The Brownian object is given its dt:
without it torchsde's search for a time can take forever.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sde.incomplete_gamma import constant
from sde.increments import starts_random, varies
from sde.markov import MarkovNoise
from sde.path import Path

__all__ = ["AugmentedSDE", "solve_torchsde"]

STABLE = 0.5  # largest rate times step that explicit solvers are trusted with
NEAR = 1e-5  # of the path's length: between the two times whose weights give a derivative
SMOOTH = 0.05  # of the weights: what steps of dt may miss of their way when the Hurst index depends on time


class AugmentedSDE(nn.Module):
    """A process with the factors of its noise in the state, in torchsde's terms.

    Args:
        path: the process and where it starts.
    """

    rates: Tensor
    driven: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        process, noise = path.process, path.process.noise
        self.start, self.end = path.start, float(path.times[-1])
        self.process, self.d, self.m, self.size = process, path.initial.shape[-1], path.noises, noise.size
        self.sde_type = process.sense
        additive = not callable(process.diffusion)
        one_each = not process.general and not self.size
        self.noise_type = "additive" if additive else "diagonal" if one_each else "general"
        parts = {"drift": process.drift, "diffusion": process.diffusion, "hurst": getattr(noise, "hurst", None)}
        self.loose = [part for part in parts.values() if isinstance(part, Tensor) and part.requires_grad]
        for name, part in parts.items():
            if isinstance(part, nn.Module):  # so that the adjoint finds its parameters
                self.add_module(f"_{name}", part)
        like = path.initial
        rates = noise.rates if isinstance(noise, MarkovNoise) else np.zeros(0)
        self.register_buffer("rates", constant(rates, like).to(like))
        # Y(0), kept for a Hurst index that depends on time, is moved by no noise.
        self.register_buffer("driven", constant(np.sign(noise.transition(0.0)[1]), like).to(like))

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """X (batch, d) and the factors (batch, m, K)."""
        return z[:, : self.d], z[:, self.d :].reshape(len(z), self.m, self.size)

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """w at times (n,), (K,) or (m, K) or (n, K), and its derivative."""
        noise, dtype = self.process.noise, self.rates.dtype
        if not varies(noise):
            same = noise.weights(dtype=dtype)
            return same, torch.zeros_like(same)
        # A difference in float64 has eight digits, and takes a thirtieth of the time of forward derivatives.
        near, now = NEAR * (self.end - self.start), t.double()
        three = torch.stack([now, (now - near).clamp_min(self.start), (now + near).clamp_max(self.end)])
        at, before, after = noise.weights(three.flatten(), dtype=torch.float64).unflatten(0, three.shape)
        return at.to(dtype), ((after - before) / (three[2] - three[1])[:, None]).to(dtype)

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """Drift of the whole state."""
        x, y = self._split(z)
        drift = self.process.f(x, t)
        if not self.size:
            return drift
        weights, moved = self.weights(t[None])
        pull = ((moved - weights * self.rates) * y).sum(-1)
        return torch.cat([drift + self.process.apply(self.process.g(x, t), pull), (-self.rates * y).flatten(1)], -1)

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        """Diffusion of the whole state: (batch, state, m), or (batch, d) for a diagonal one."""
        x, _ = self._split(z)
        g = self.process.g(x, t)
        if self.noise_type == "diagonal":
            return g
        matrix = g.expand(len(x), *g.shape[-2:]) if self.process.general else torch.diag_embed(g)
        if not self.size:
            return matrix
        total = (self.weights(t[None])[0] * self.driven).sum(-1)
        factors = torch.block_diag(*[self.driven[:, None]] * self.m)
        return torch.cat([matrix * total, factors.expand(len(x), -1, -1)], 1)


def solve_torchsde(
    path: Path,
    paths: int,
    *,
    dt: float,
    seed: int = 0,
    method: str | None = None,
    adaptive: bool = False,
    adjoint: bool = False,
    **options: Any,
) -> Tensor:
    """Draws of a path by torchsde.

    Args:
        path: without a batch shape; its `dt` is not used.
        paths: how many draws.
        dt: step, or first step of an adaptive solver.
        seed: of the Brownian motion and of the factors' start.
        method: torchsde's name, such as "euler", "srk" or "midpoint"; None is its default for the kind of noise.
        adaptive: adaptive steps.
        adjoint: gradients by the adjoint equation, in constant memory, of the path's start, of tensors and modules that
            are drift, diffusion or Hurst index, and of no other tensors that functions hold.
        options: more of `torchsde.sdeint`, such as rtol and atol.

    Returns:
        (paths, n, d).

    Raises:
        ValueError: rates that an explicit solver cannot follow in steps of dt, a Hurst index that jumps between them, a
            dt that is not positive, a batch shape.

    Example:
        >>> from sde import Process
        >>> path = Path(Process(lambda x, t: -x, 0.5), torch.tensor([0.5, 1.0]), torch.ones(1))
        >>> solve_torchsde(path, 3, dt=0.1, method="srk").shape
        torch.Size([3, 2, 1])
    """
    import torchsde

    if path.batch_shape:
        raise ValueError(
            f"solve_torchsde draws a path without a batch shape, got {tuple(path.batch_shape)}; give paths="
        )
    if not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be positive, got {dt!r}")
    noise = path.process.noise
    fastest = float(noise.rates.max()) if noise.size else 0.0  # type: ignore[attr-defined]
    if fastest * dt > STABLE:
        raise ValueError(
            f"the fastest factor has rate {fastest:.3g}, and explicit solvers need rate times dt below {STABLE}: take "
            f"dt below {STABLE / fastest:.2g}, a MarkovNoise with grid=(lowest, {STABLE * noise.horizon / dt:.3g}), or "
            "Path.sample, whose steps are exponential"
        )
    if varies(noise):
        _check_smooth(path, dt)
    system = AugmentedSDE(path)
    x = path.initial
    generator = torch.Generator(x.device).manual_seed(seed)
    start = [x.expand(paths, -1)]
    if noise.size:
        y = torch.zeros(paths, path.noises, noise.size, dtype=x.dtype, device=x.device)
        if starts_random(noise):
            eps = torch.randn(y.shape, generator=generator, dtype=x.dtype, device=x.device)
            y = eps @ constant(noise.initial_factor.T, x).to(x)  # type: ignore[attr-defined]
        start.append(y.flatten(1))
    times = torch.cat([path.times.new_full((1,), path.start), path.times]).to(x)
    levy = "space-time" if method == "srk" or (method is None and system.sde_type == "ito") else "none"
    w = torchsde.BrownianInterval(
        float(times[0]), math.nextafter(float(times[-1]), math.inf), size=(paths, path.noises), dtype=x.dtype,
        device=x.device, entropy=seed + 1, dt=dt, levy_area_approximation=levy,
    )  # fmt: skip
    solver = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint
    if adjoint and system.loose:
        options.setdefault("adjoint_params", (*system.parameters(), *system.loose))
    found = solver(system, torch.cat(start, -1), times, bm=w, method=method, dt=dt, adaptive=adaptive, **options)
    return found[1:, :, : path.initial.shape[-1]].transpose(0, 1)


def _check_smooth(path: Path, dt: float) -> None:
    """Refuse weights that go from value to value in another way than their derivative says, step by step of dt."""
    system = AugmentedSDE(path)
    count = max(1, math.ceil((system.end - system.start) / dt))
    with torch.no_grad():
        times = torch.linspace(system.start, system.end, count + 1, dtype=torch.float64, device=path.device)
        weights, slopes = system.weights(times)
        way = (slopes[1:] + slopes[:-1]) / 2 * times.diff()[:, None]
        missed = (weights.diff(dim=0) - way).abs().amax(1)
        worst, scale = int(missed.argmax()), float(weights.abs().max())
    if float(missed.sum()) > SMOOTH * scale:
        raise ValueError(
            f"the Hurst index moves too fast near time {float(times[worst]):.3g} for steps of {dt:g}, or jumps there, "
            "and solvers follow its derivative; take a smaller dt, a smoother index, or Path.sample, whose steps take "
            "its values"
        )
