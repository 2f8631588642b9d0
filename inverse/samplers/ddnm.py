r"""Denoising diffusion null-space model with noise (DDNM+): the data replace the row space of the denoised point.

DDIM step a -> b:  x_b = k x + w x^ + c z,   c = eta b sqrt(1 - b^2 / a^2),   k = sqrt(b^2 - c^2) / a,   w = 1 - k.
In each direction of the singular basis, with data ybar = u / s of noise tau = 1 / s,

    x^ <- x^ + lambda (ybar - x^),   c^2 <- c^2 - (w lambda tau)^2,   lambda = min(1, c / (w tau)),

so that the noise in the data takes the place of noise that the step would have added. That counts on data whose noise
is new at every step, and x carries the earlier ones along. The authors' code keeps nothing of x in the row space, and
takes the whole noise of the level there: its steps are those of DDRM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from inverse.problem import DiffusionProblem
from inverse.samplers.ddrm import restored
from inverse.samplers.guided import check_steps
from inverse.samplers.lanes import check_chunk
from inverse.samplers.trajectory import SpectralData, TrajectorySampler, trajectory_levels
from inverse.samplers.travel import Journey, check_travel, travel_path
from ppl.backend import register
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import Schedule

__all__ = ["DDNM"]


@register
@dataclass(frozen=True)
class DDNM(TrajectorySampler):
    """DDNM+ with the noise of the program, for linear data with Gaussian noise and an operator with a decomposition.

    Never exact: the steps leave out the spread of x_0 given x, and in the row space they forget the prior. No vjp.

    In the form of the paper, where lambda < 1 the one noise of the data enters at every step and adds up to

        c / (b - k a) = q / (1 - sqrt(1 - q^2)) > 1,   q = eta sqrt(1 - b^2 / a^2),

    times the noise level [derived]: 3.6 times for levels that fall by a fifth. Where the data are far noisier than the
    prior is wide, as after a blur, the draws are lost: take `form="code"` or `DDRM`.

    Args:
        steps: noise levels; denoiser evaluations per draw are about `steps * travel_repeats`.
        eta: share of the ancestral noise in a DDIM step, in [0, 1]; with 0 there is no noise for the data to replace,
            and they are not used.
        travel_length: levels that time travel goes back by.
        travel_repeats: times that every stretch of `travel_length` levels is walked; 1 is no time travel.
        form: "paper" for the steps above; "code" for those of the authors' program, `DDRM`'s with time travel.
        schedule: source of the noise levels; None takes the prior's grid.
        chunk: most draws at a time.

    Raises:
        CapabilityError: on run, if the likelihood is not linear and Gaussian, or the operator has no decomposition.

    Source: Wang, Yu & Zhang (2023), section 3.3 and algorithm 2 [read], and Lambda and Lambda_noise of wyhuai/DDNM
    [read]; c^2 and w of the DDIM step in coordinates of the noise level [derived].

    Example:
        >>> DDNM(steps=4, travel_length=2, travel_repeats=2).path([8.0, 4.0, 2.0, 1.0, 0.0])
        [8.0, 4.0, 2.0, 8.0, 4.0, 2.0, 1.0, 0.0, 2.0, 1.0, 0.0]
    """

    steps: int = 100
    eta: float = 0.85
    travel_length: int = 1
    travel_repeats: int = 1
    form: Literal["paper", "code"] = "paper"
    schedule: Schedule | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_chunk(self.chunk)
        if not 0 <= self.eta <= 1:
            raise OptionError(f"eta must lie in [0, 1], got {self.eta}; 0.85 is the published value")
        if self.form not in ("paper", "code"):
            raise OptionError(f'form must be "paper" or "code", got {self.form!r}')
        check_travel(self.travel_length, self.travel_repeats)

    def path(self, levels: list[float]) -> list[float]:
        """The levels in the order in which they are visited; a rise is a return by fresh noise."""
        return travel_path(levels, self.travel_length, self.travel_repeats)

    def method(self, problem: DiffusionProblem, cost: Cost | None = None) -> _NullSpace:
        """The steps that lanes take on a problem."""
        path = self.path(trajectory_levels(self.schedule, self.steps, problem).tolist())
        return _NullSpace(self, problem, SpectralData.of(problem, "DDNM"), path, cost)


class _NullSpace(Journey):
    """The method that `run_lanes` runs."""

    def __init__(
        self, options: DDNM, problem: DiffusionProblem, data: SpectralData, path: list[float], cost: Cost | None
    ) -> None:
        super().__init__(problem, path, cost)
        self.options, self.data = options, data

    def down(self, x: Tensor, a: float, b: float, z: Tensor) -> Tensor:
        """One denoiser call, and the data in place of the row space."""
        clean, data = self.problem.prior.denoise(x, a), self.data
        self.cost.likelihood_evals += len(x)
        if self.options.form == "code":
            return restored(x, clean, z, a, b, data, self.options.eta)
        c = self.options.eta * b * math.sqrt(1 - (b / a) ** 2)
        k = math.sqrt(b**2 - c**2) / a
        w = 1 - k
        seen = data.of_x(clean)
        gain = (1 / data.s).clamp(max=c / w)  # lambda / s
        seen = seen + gain * (data.u - data.s * seen)
        spread = (c**2 - (w * gain).square()).clamp(min=0).sqrt()
        moved = k * x + w * clean + c * z
        return data.replace(moved, k * data.of_x(x) + w * seen + spread * data.of_x(z))
