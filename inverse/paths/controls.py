r"""What steers the particles of a path: nothing, the exact control of a linear program, or a fitted `ControlGuide`.

A control proposes driving numbers z_n ~ N(mean(state), F F') in place of N(0, I); the weight p(z_n) / q(z_n) undoes it.
With F = I this is the weight exp(-int u dW - int u^2 dt / 2) of a controlled path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from inverse.paths.control_guide import ControlGuide
from inverse.paths.factors import Factors
from inverse.paths.linear_control import LinearControl, linear_control
from inverse.paths.problem import PathProblem
from ppl.errors import CapabilityError, OptionError
from ppl.vi.fitted import FittedGuide
from sde.path import Path

__all__ = ["Chain", "Control", "Law", "Uncontrolled", "bind_control", "check_control"]


class Law(NamedTuple):
    """A normal law of driving numbers: mean (lanes, m) or (m,), and lower triangular factor (m, m)."""

    mean: Tensor
    factor: Tensor

    def draw(self, eps: Tensor) -> Tensor:
        """The number that standard normal ones (lanes, m) become."""
        return self.mean + eps @ self.factor.mT

    def log_ratio(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) - log q(z): (lanes, m) -> (lanes,)."""
        eps = torch.linalg.solve_triangular(self.factor, (z - self.mean).mT, upper=False)
        return 0.5 * (eps.square().sum(0) - z.square().sum(1)) + self.factor.diagonal().log().sum()


class Control(Protocol):
    """A control that knows its path."""

    twisted: bool
    """Whether `log_twist` foresees the data, so that particles can be resampled before they meet them."""

    def start(self) -> Law | None:
        """The law of the numbers that start the factors of type I; None is the prior's."""
        ...

    def step(self, n: int, x: Tensor, y: Tensor, start: Tensor) -> Law | None:
        """The law of the driving numbers of step n from states (lanes, d), (lanes, m, K) and the numbers of the start
        (lanes, m K); None is the prior's."""
        ...

    def log_twist(self, n: int, x: Tensor, y: Tensor) -> Tensor | float:
        """Log of what the data after n steps are worth from a state there: (lanes,)."""
        ...


@dataclass(frozen=True)
class Uncontrolled:
    """No control: particles move as the program's path does, and only data weigh them.

    Example:
        >>> Uncontrolled()
        Uncontrolled()
    """

    twisted = False

    def start(self) -> Law | None:
        """The prior's."""
        return None

    def step(self, n: int, x: Tensor, y: Tensor, start: Tensor) -> Law | None:
        """The prior's."""
        return None

    def log_twist(self, n: int, x: Tensor, y: Tensor) -> Tensor | float:
        """One."""
        return 0.0


class Exactly:
    """The exact control of a linear path with linear Gaussian data of single times."""

    twisted = True

    def __init__(self, control: LinearControl, like: Tensor) -> None:
        tensors = {n: v.to(like) for n, v in control.__dict__.items()}
        self.control = LinearControl(**tensors)

    def start(self) -> Law | None:
        """The exact posterior of the start."""
        return Law(self.control.start_mean, self.control.start_factor) if len(self.control.start_mean) else None

    def step(self, n: int, x: Tensor, y: Tensor, start: Tensor) -> Law | None:
        """The exact posterior of the step."""
        return Law(self.control.mean(n, x, y), self.control.factor[n])

    def log_twist(self, n: int, x: Tensor, y: Tensor) -> Tensor | float:
        """log p(data to come | state)."""
        return self.control.log_twist(n, x, y)


class Chain:
    """Steps of a path with its factors, for particles that are told where to go.

    Args:
        path: without a batch shape.
        like: one number, gives data type and device.
    """

    def __init__(self, path: Path, like: Tensor) -> None:
        self.path, self.factors = path, Factors(path, like.reshape(1))
        self.dts = path.increments.dt.tolist()
        self.times = torch.as_tensor(path.increments.grid, dtype=like.dtype, device=like.device)
        self.starts = path.noise_shape.numel() - path.noises * path.steps

    def start(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """State and factors from the numbers of the start (lanes, m K), empty where the factors start at zero."""
        x = self.path.initial.to(first).expand(len(first), -1)
        return x, Factors(self.path, first, first).y

    def step(self, n: int, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """State and factors after step n with driving numbers (lanes, m)."""
        self.factors.y = y
        increment = self.factors.move(n, z)
        return self.path.process.step(x, self.times[n], self.dts[n], increment), self.factors.y


def check_control(control: Any) -> None:
    """Raise OptionError unless this is a control."""
    fitted = isinstance(control, FittedGuide) and isinstance(control.guide, ControlGuide)
    if control is not None and not isinstance(control, Uncontrolled) and not fitted:
        raise OptionError(
            "control must be None, inverse.paths.Uncontrolled(), or a fitted ControlGuide such as "
            f"ppl.SVI(guide=ControlGuide(path)).fit(program.noise_space()), got {control!r}"
        )


def bind_control(control: Any, problem: PathProblem) -> Control:
    """The control of a problem: the one asked for, or the exact one where there is one, or none.

    Args:
        control: None, `Uncontrolled()` or a fitted guide.
        problem: the path and its data.
    """
    like = torch.zeros((), dtype=problem.dtype, device=problem.device)
    if isinstance(control, FittedGuide):
        return _Fitted(control, problem.path)
    if control is None and has_exact_control(problem):
        return Exactly(exact_control(problem), like)
    return Uncontrolled()


def has_exact_control(problem: PathProblem) -> bool:
    """Whether the path is linear, and the data too, with Gaussian noise, each of one time."""
    return problem.path.is_linear and problem.likelihood.is_gaussian and _single_times(problem)


def _single_times(problem: PathProblem) -> bool:
    rows = problem.likelihood.gaussian.operator.dense(dtype=torch.float64).reshape(-1, *problem.shape)
    return not bool(((rows != 0).any(-1).sum(1) > 1).any())


def exact_control(problem: PathProblem) -> LinearControl:
    """The exact control of a linear problem; its evidence lacks the scale of the data."""
    gaussian = problem.likelihood.gaussian
    rows = gaussian.operator.dense(dtype=torch.float64)
    return linear_control(problem.path, rows, gaussian.data.reshape(-1), 1.0)


class _Fitted:
    """A fitted `ControlGuide`, which looks at time, state, factors and start."""

    twisted = False

    def __init__(self, fitted: FittedGuide, path: Path) -> None:
        guide = fitted.guide
        assert isinstance(guide, ControlGuide)
        assert guide.path is not None
        law, starts = guide.rest(fitted.params), path.noise_shape.numel() - path.noises * path.steps
        if (guide.path.steps, guide.path.noises, len(law[0])) != (path.steps, path.noises, starts):
            raise CapabilityError(
                f"the fitted control steers {guide.path.noises} x {guide.path.steps} driving numbers given "
                f"{len(law[0])} other unknowns, but the path has {path.noises} x {path.steps} and {starts} that start "
                "its factors; fit it to this program, without other latents"
            )
        self.guide, self.params, self.law = guide, fitted.params, Law(*law)

    def start(self) -> Law | None:
        """The guide's full-rank Gaussian."""
        return self.law if len(self.law.mean) else None

    def step(self, n: int, x: Tensor, y: Tensor, start: Tensor) -> Law | None:
        """The guide's."""
        return Law(*self.guide.at(self.params, n, x, y, start))

    def log_twist(self, n: int, x: Tensor, y: Tensor) -> Tensor | float:
        """It says nothing of what data to come are worth."""
        return 0.0
