"""Gradient estimators of single sites.

A guide says `infer={"estimator": "mvd"}` at a site; a policy, `{site: estimator}` or a function of a site's name and
distribution, says it for guides that are not ours. All of them compose in one program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ppl.errors import OptionError

__all__ = ["Enumerate", "Estimator", "MeasureValued", "Policy", "Rebar", "Reinforce", "Relax", "Reparam"]


@dataclass(frozen=True)
class Reparam:
    """v = g(noise, eta): the gradient flows through the draw, implicitly where torch does so (gamma, beta, Dirichlet).

    The cost must be continuous in the draw.
    """


@dataclass(frozen=True)
class Reinforce:
    """(f - b) d log q(v): for any distribution whose support is fixed.

    Args:
        baseline: `"leave_one_out"` takes the mean of the other samples (two or more; a decaying average for one),
            `"decaying_average"` that of earlier steps, `"none"` zero. A tensor, or a module called with `given`, is
            learned by least squares; it must not depend on the site's own draw. Modules in the guide are registered.
        decay: weight of the past in the decaying average.
        given: input of a module.

    Raises:
        OptionError: an option has a value it cannot have.
    """

    baseline: Any = "leave_one_out"
    decay: float = 0.9
    given: Any = None

    def __post_init__(self) -> None:
        known = ("leave_one_out", "decaying_average", "none")
        if isinstance(self.baseline, str) and self.baseline not in known:
            raise OptionError(f"baseline must be one of {known}, a tensor or a module, got {self.baseline!r}")
        if not 0 <= self.decay < 1:
            raise OptionError(f"decay must lie in [0, 1), got {self.decay}")


@dataclass(frozen=True)
class Enumerate:
    """sum_v q(v) f(v): exact, at the price of all joint states of all enumerated draws of a datum.

    Args:
        limit: joint states that are allowed.
        after: name of an earlier enumerated site that this one waits for: it stays in its first state (0, False) where
            the other is in its own. The impossible joint states are then left out: of n coins in a row, each after the
            one before, n + 1 states are left of 2^n. That the guide gives the others no probability is checked.

    Raises:
        OptionError: the limit is below two.
    """

    limit: int = 4096
    after: str | None = None

    def __post_init__(self) -> None:
        if self.limit < 2:
            raise OptionError(f"limit must be two states or more, got {self.limit}")


@dataclass(frozen=True)
class MeasureValued:
    """c (f(v+) - f(v-)) for every coordinate: one or two more evaluations for each and each learned parameter.

    Args:
        limit: coordinates per datum that are allowed.

    Raises:
        OptionError: the limit is below one.
    """

    limit: int = 512

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise OptionError(f"limit must be one coordinate or more, got {self.limit}")


@dataclass(frozen=True)
class Rebar:
    """The score with a relaxed draw as control variate, for Bernoulli and OneHotCategorical; see `relaxed`.

    The cost must be defined between the states. No other site may take a score, arms or enumeration.

    Args:
        temperature: of the relaxation; above zero.
        scale: of the control variate.

    Raises:
        OptionError: the temperature is not positive.
    """

    temperature: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise OptionError(f"temperature must be positive, got {self.temperature}")


@dataclass(frozen=True)
class Relax:
    """The score with a learned function of the relaxed draw as control variate, for Bernoulli and OneHotCategorical.

    The cost itself is not relaxed, so that it may jump, and other sites may take any estimator. See `learned_control`.

    Args:
        surrogate: c, a module or function called with (*, coordinates) relaxed logits of one draw of the site, row by
            row, that returns (*, 1). A module in the guide is registered, and learns to lower the variance.

    Raises:
        OptionError: the surrogate is no function.
    """

    surrogate: Any = None

    def __post_init__(self) -> None:
        if not callable(self.surrogate):
            raise OptionError(
                "Relax learns a surrogate of the cost and needs one, such as Relax(torch.nn.Sequential(...)) from one "
                f"draw's logits to one number, got {self.surrogate!r}; Rebar() needs none"
            )


Estimator = Reparam | Reinforce | Enumerate | MeasureValued | Rebar | Relax
Policy = Mapping[str, Any] | Callable[[str, Any], Any]
