"""A stochastic differential equation: its drift, its diffusion and the noise that drives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sde.increments import BrownianNoise, Noise
from sde.prior import can_look

__all__ = ["Process"]

Coefficient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Process:
    r"""dX = f(X, t) dt + g(X, t) dB.

    Args:
        drift: f: (x (*batch, d), t 0-d) -> (*batch, d); a number or tensor where it is constant.
        diffusion: g, likewise: (*batch, d) where every coordinate has its own noise, (*batch, d, m) in general.
        noise: `BrownianNoise()` or a `MarkovNoise`; one Hurst index for all noises, or a tensor (m,) with one for each.
        general: the diffusion is a matrix (*batch, d, m).
        noises: m; None is d.
        sense: "ito", or "stratonovich": Heun's rule on the noise, the natural reading of fractional noise where g
            depends on x.

    Raises:
        ValueError: options that do not fit together.

    Example:
        >>> ou = Process(lambda x, t: -x, 0.5)
        >>> ou.f(torch.ones(3, 1), torch.tensor(0.0)).tolist()
        [[-1.0], [-1.0], [-1.0]]
    """

    drift: Coefficient | Tensor | float = 0.0
    diffusion: Coefficient | Tensor | float = 1.0
    noise: Noise = field(default_factory=BrownianNoise)
    general: bool = False
    noises: int | None = None
    sense: Literal["ito", "stratonovich"] = "ito"

    def __post_init__(self) -> None:
        for name in ("drift", "diffusion"):
            _check_coefficient(name, getattr(self, name))
        if isinstance(self.noise, type) or not isinstance(self.noise, Noise):
            raise ValueError(f"noise must be BrownianNoise() or a MarkovNoise, got {self.noise!r}")
        if self.sense not in ("ito", "stratonovich"):
            raise ValueError(f"sense must be 'ito' or 'stratonovich', got {self.sense!r}")
        if self.noises is not None and not (isinstance(self.noises, int) and self.noises >= 1):
            raise ValueError(f"noises must be a positive integer or None, got {self.noises!r}")
        if self.noises is not None and not self.general:
            raise ValueError(f"noises={self.noises} is for general=True; otherwise every coordinate has one noise")

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift at x and t, (*batch, d)."""
        value = _evaluate(self.drift, x, t)
        return value if value.shape == x.shape else value.expand_as(x)

    def g(self, x: Tensor, t: Tensor) -> Tensor:
        """The diffusion at x and t, (*batch, d), or (*batch, d, m) in general."""
        value = _evaluate(self.diffusion, x, t)
        return value if self.general else value.expand_as(x)

    def apply(self, g: Tensor, increment: Tensor) -> Tensor:
        """g dB: (*batch, d)."""
        return (g @ increment[..., None])[..., 0] if self.general else g * increment

    def step(self, x: Tensor, t: Tensor, dt: Tensor | float, increment: Tensor) -> Tensor:
        """X one step on: Euler and Maruyama, or Heun on the noise in the sense of Stratonovich.

        Args:
            x: (*batch, d).
            t: 0-d, the time of x.
            dt: length of the step.
            increment: (*batch, m), of the noise.
        """
        g = self.g(x, t)
        move = self.apply(g, increment)
        if self.sense == "stratonovich" and callable(self.diffusion):
            move = self.apply((g + self.g(x + move, t + dt)) / 2, increment)
        return x + self.f(x, t) * dt + move

    def check(self, x: Tensor, t: Tensor, horizon: float) -> None:
        """Refuse shapes that do not fit, a drift or diffusion that is not finite, and times beyond the noise's horizon.

        Args:
            x: (*batch, d), where to look.
            t: 0-d.
            horizon: last time that will be asked for.

        Raises:
            ValueError: with what was expected and found.
        """
        limit = self.noise.horizon
        if horizon > limit * (1 + 1e-9):
            raise ValueError(
                f"times go to {horizon:g}, but the noise was approximated for a horizon of {limit:g}; give "
                f"MarkovNoise(..., horizon={horizon:g})"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"the initial state must be finite, got {x.reshape(-1)[:8].tolist()}")
        found = {"drift": _evaluate(self.drift, x, t), "diffusion": _evaluate(self.diffusion, x, t)}
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the {name} must return a tensor of the shape of x, {tuple(x.shape)}, got {value!r}")
        drift, g = found.values()
        if drift.shape not in (x.shape, x.shape[-1:], torch.Size()):
            raise ValueError(f"the drift must have the shape of x, {tuple(x.shape)}, got {tuple(drift.shape)}")
        if self.general:
            expected = (x.shape[-1], self.size(x.shape[-1]))
            batches = zip(g.shape[-3::-1], x.shape[-2::-1], strict=False)
            if g.shape[-2:] != expected or g.ndim > x.ndim + 1 or any(a not in (1, b) for a, b in batches):
                raise ValueError(
                    f"a general diffusion must be {expected}, with or without the batch {tuple(x.shape[:-1])} before "
                    f"it, got shape {tuple(g.shape)}; noises= says how many columns there are"
                )
        elif g.shape not in (x.shape, x.shape[-1:], torch.Size()):
            raise ValueError(
                f"the diffusion must have the shape of x, {tuple(x.shape)}, got {tuple(g.shape)}; for a matrix set "
                "general=True"
            )
        for name, value in found.items():
            if can_look(value) and not bool(value.isfinite().all()):
                raise ValueError(
                    f"the {name} is not finite at time {float(t):g} and state {x.reshape(-1)[:8].tolist()}"
                )

    def size(self, d: int) -> int:
        """m, how many noises drive d coordinates."""
        return d if self.noises is None else self.noises


def _check_coefficient(name: str, coefficient: Any) -> None:
    """Refuse what is neither numbers nor a function of (x, t): time in front, as in torchsde, goes wrong silently."""
    if not callable(coefficient):
        if not isinstance(coefficient, Tensor | float | int):
            raise ValueError(f"the {name} must be a function of (x, t), a number or a tensor, got {coefficient!r}")
        return
    try:
        names = list(inspect.signature(coefficient).parameters)
    except (TypeError, ValueError):  # some built-in functions do not tell
        return
    if names[:1] in (["t"], ["time"]) and len(names) > 1:
        raise ValueError(
            f"the {name} is called as {name}(x, t), but takes ({', '.join(names)}); exchange its arguments"
        )


def _evaluate(coefficient: Any, x: Tensor, t: Tensor) -> Any:
    """A coefficient at x and t."""
    if callable(coefficient):
        return coefficient(x, t)
    return torch.as_tensor(coefficient, dtype=x.dtype, device=x.device)
