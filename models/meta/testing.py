"""The contract of a fitted learner as one check, for the learners here and for your own.

What comes back, that it rests on the support sets and the inputs of the queries alone, and that asking changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from models.meta.episodes import Episodes
from models.meta.predictive import Predictive
from ppl.errors import OptionError

__all__ = ["Learner", "check_learner"]


class Learner(Protocol):
    """What has learned from many episodes and predicts the queries of new ones."""

    def predict(self, episodes: Episodes) -> Predictive:
        """The laws of the query targets given the support sets; two calls on the same episodes agree."""
        ...


def check_learner(learner: Learner, episodes: Episodes, rtol: float = 1e-3) -> None:
    """Check everything that a fitted learner promises beside the quality of its predictions.

    Args:
        learner: yours; its `predict` is called six times.
        episodes: such as it was fitted for, with two queries or more.
        rtol: largest difference of predictions that should be the same, of their own size; of one, for probabilities.

    Raises:
        AssertionError: that names the broken promise.
        OptionError: an episode has fewer than two queries.

    Example:
        >>> from models.meta import MAML, Gaussian, Sinusoids, mlp
        >>> fitted = MAML(steps=2).fit(mlp([1, 8, 1]), Gaussian(0.5), Sinusoids(5, 10))
        >>> check_learner(fitted, Sinusoids(3, 4)(5, torch.Generator().manual_seed(0)))
    """
    query = episodes.query
    if query.x.shape[1] < 2:
        raise OptionError("the check compares queries with each other: give episodes with two queries or more")
    tensors = [part for points in (episodes.support, query) for part in points]
    copies, state = [part.clone() for part in tensors], torch.random.get_rng_state()
    found = learner.predict(episodes)
    _promise(isinstance(found, Predictive), f"predict returned {type(found).__name__}, expected Predictive")
    _promise(torch.equal(state, torch.random.get_rng_state()), "predict drew from the global generator")
    _promise(all(map(torch.equal, tensors, copies)), "predict changed the episodes")
    shape = tuple(found.law.batch_shape)
    _promise(shape[1:] == query.y.shape[:2], f"laws have batch shape {shape}, expected (draws, episodes, queries)")
    _promise(found.classes == (episodes.way is not None), "laws of classes are for episodes with a way, and for these")
    _promise(bool(torch.isfinite(found.mean).all()), "a prediction is not finite")
    if episodes.way is None:
        _promise(bool((found.variance > 0).all()), "a variance is not positive")
    else:
        _promise(found.mean.shape[2:] == (episodes.way,), f"probabilities are {tuple(found.mean.shape)}")
        _promise(torch.allclose(found.mean.sum(-1), torch.ones(()).to(found.mean)), "probabilities do not sum to one")
    _promise(not found.mean.requires_grad, "predictions carry a graph; use torch.no_grad()")

    def same(other: Episodes, what: str, part: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        again = learner.predict(other)
        for expected, value in zip(_moments(found), _moments(again), strict=True):
            scale = (
                rtol * max(1.0, float(expected.abs().max())) if found.classes else rtol * float(expected.abs().max())
            )
            _promise(torch.allclose(part(expected), value, rtol=0.0, atol=scale), what)

    same(episodes, "two calls on the same episodes differ")
    y, support = query.y, episodes.support
    shown = replace(episodes, y_query=torch.zeros_like(y) if episodes.way else y + 1)
    same(shown, "predictions change with the targets of the queries")
    first = replace(episodes, x_query=query.x[:, :1], y_query=y[:, :1], query_mask=query.mask[:, :1])
    same(first, "the prediction of a query depends on the other queries", lambda value: value[:, :1])
    junk = [torch.cat([part, part[:, :1]], 1) for part in support[:2]]
    mask = torch.cat([support.mask, torch.zeros_like(support.mask[:, :1])], 1)
    padded = replace(episodes, x_support=junk[0], y_support=junk[1], support_mask=mask)
    if shape[0] == 1:  # draws of several laws come in another order where shapes differ
        same(padded, "predictions depend on support points that the mask hides")
        same(episodes[:1], "the prediction of an episode depends on the others", lambda value: value[:1])
    else:
        _promise(learner.predict(padded).mean.shape == found.mean.shape, "hidden support points change shapes")


def _moments(found: Predictive) -> tuple[Tensor, ...]:
    """What two predictions are compared by."""
    return (found.mean,) if found.classes else (found.mean, found.variance)


def _promise(kept: bool, text: str) -> None:
    """Raise for a broken promise."""
    if not kept:
        raise AssertionError(text)
