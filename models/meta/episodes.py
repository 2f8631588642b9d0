"""Episodes: few-shot tasks as padded tensors with masks.

D_i = {(x, y)} of episode i, in two parts: the support set that a learner adapts to, the query set that it is judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ppl.errors import DataError, OptionError, ShapeError

__all__ = ["EpisodeSource", "Episodes", "Points", "drawn"]


class Points(NamedTuple):
    """Points of every episode.

    x is (episodes, points, *x), y (episodes, points, *y), mask (episodes, points), True where there is a point. Padded
    places of x and y hold zeros.
    """

    x: Tensor
    y: Tensor
    mask: Tensor

    @property
    def counts(self) -> Tensor:
        """(episodes,) number of points, int64."""
        return self.mask.sum(1)


class EpisodeSource(Protocol):
    """An endless source of episodes; all randomness comes from the generator, so that a resumed fit sees the same."""

    def __call__(self, episodes: int, generator: torch.Generator) -> Episodes:
        """That many fresh episodes."""
        ...


@dataclass(frozen=True, eq=False)
class Episodes:
    """Tasks of one kind, stacked; ragged ones are padded, and masks tell which places hold a point.

    Args:
        x_support: (episodes, shots, *x) inputs to adapt to.
        y_support: (episodes, shots, *y) targets: floating for regression, integers for classes.
        x_query: (episodes, queries, *x) inputs to be judged on; None for no query set.
        y_query: (episodes, queries, *y); None together with x_query.
        support_mask: (episodes, shots) bool, True where there is a point; None for all.
        query_mask: (episodes, queries) bool; None for all.
        way: number of classes, for integer targets in [0, way); None for regression.

    Raises:
        ShapeError: tensors do not fit together.
        DataError: an episode has an empty support set, values are not finite, or a label is outside the way.

    Example:
        >>> episodes = Episodes(torch.randn(8, 5, 1), torch.randn(8, 5), torch.randn(8, 20, 1), torch.randn(8, 20))
        >>> episodes, episodes[:3].query.x.shape
        (Episodes(8 episodes, support 5, query 20), torch.Size([3, 20, 1]))
    """

    x_support: Tensor
    y_support: Tensor
    x_query: Tensor | None = None
    y_query: Tensor | None = None
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    way: int | None = None

    def __post_init__(self) -> None:
        if (self.x_query is None) != (self.y_query is None):
            raise ShapeError("give x_query and y_query together, or neither")
        if self.way is not None and (not isinstance(self.way, int) or isinstance(self.way, bool) or self.way < 2):
            raise OptionError(f"way is a number of classes, at least 2, or None for regression, got {self.way!r}")
        self._check("support", self.x_support, self.y_support, self.support_mask)
        empty = (~self.support.mask.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise DataError(
                f"episodes {empty[:8]} have an empty support set; leave them out, or give them a point each"
            )
        if self.x_query is not None and self.y_query is not None:
            self._check("query", self.x_query, self.y_query, self.query_mask)
            for name, one, other in (
                ("x", self.x_support, self.x_query),
                ("y", self.y_support, self.y_query),
            ):
                if len(one) != len(other) or one.shape[2:] != other.shape[2:] or one.dtype != other.dtype:
                    raise ShapeError(
                        f"{name}_support is {tuple(one.shape)} {one.dtype}, {name}_query {tuple(other.shape)} "
                        f"{other.dtype}; all axes but the second, and types, must agree"
                    )
        elif self.query_mask is not None:
            raise ShapeError("there is a query_mask but no query set")

    def _check(self, part: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Shapes, values and labels of one part."""
        if x.ndim < 2 or y.ndim < 2 or x.shape[:2] != y.shape[:2] or len(x) == 0:
            raise ShapeError(
                f"x_{part} and y_{part} must be (episodes, points, ...) with equal first two axes and at least one "
                f"episode, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ShapeError(f"{part}_mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        for name, value in (("x", x), ("y", y)):
            seen = value if mask is None else value[mask]
            bad = int((~torch.isfinite(seen)).sum())
            if bad:
                raise DataError(f"{name}_{part} has {bad} values that are not finite; mask or remove these points")
        if self.way is not None:
            if y.is_floating_point() or y.ndim != 2:
                raise DataError(f"with way={self.way}, y_{part} must be integer (episodes, points), got {y.dtype}")
            seen = y if mask is None else y[mask]
            if seen.numel() and (int(seen.min()) < 0 or int(seen.max()) >= self.way):
                raise DataError(
                    f"labels of y_{part} must lie in 0..{self.way - 1} (way={self.way}), got {int(seen.min())} to "
                    f"{int(seen.max())}; relabel the classes of each episode from 0"
                )

    # Making ----------------------------------------------------------------------------------------------------------

    @classmethod
    def ragged(
        cls,
        support: Sequence[tuple[Tensor, Tensor]],
        query: Sequence[tuple[Tensor, Tensor]] | None = None,
        way: int | None = None,
    ) -> Episodes:
        """Episodes of different sizes, padded to the largest.

        Args:
            support: for each episode x (shots_i, *x) and y (shots_i, *y).
            query: likewise.
            way: number of classes, None for regression.

        Example:
            >>> sizes = (3, 1)
            >>> episodes = Episodes.ragged([(torch.ones(n, 2), torch.zeros(n)) for n in sizes])
            >>> episodes.support.counts
            tensor([3, 1])
        """
        if not support or (query is not None and len(query) != len(support)):
            raise ShapeError(
                f"expected one support set, and one query set, for each episode, got {len(support)} and "
                f"{'none' if query is None else len(query)}"
            )
        for part, sets in (("support", support), ("query", query or ())):
            for i, (x, y) in enumerate(sets):
                if len(x) != len(y):
                    raise ShapeError(f"{part} set {i} has {len(x)} inputs and {len(y)} targets; expected as many")
        x, y, mask = _padded(support)
        if query is None:
            return cls(x, y, support_mask=mask, way=way)
        x_query, y_query, query_mask = _padded(query)
        return cls(x, y, x_query, y_query, mask, query_mask, way)

    @classmethod
    def cat(cls, parts: Sequence[Episodes]) -> Episodes:
        """Episodes one after the other, padded to a common size.

        Example:
            >>> one, five = (Episodes(torch.ones(2, n, 3), torch.zeros(2, n)) for n in (1, 5))
            >>> Episodes.cat([one, five]).support.counts
            tensor([1, 1, 5, 5])
        """
        if not parts or len({part.way for part in parts}) != 1:
            raise ShapeError("cat needs at least one part, all with the same way")
        if len({part.x_query is None for part in parts}) != 1:
            raise ShapeError("cat needs query sets in all parts, or in none")
        x, y, mask = (_joined(list(tensors)) for tensors in zip(*(part.support for part in parts), strict=True))
        if parts[0].x_query is None:
            return cls(x, y, support_mask=mask, way=parts[0].way)
        queries = (_joined(list(tensors)) for tensors in zip(*(part.query for part in parts), strict=True))
        x_query, y_query, query_mask = queries
        return cls(x, y, x_query, y_query, mask, query_mask, parts[0].way)

    # Parts -----------------------------------------------------------------------------------------------------------

    @property
    def support(self) -> Points:
        """Points to adapt to."""
        return _points(self.x_support, self.y_support, self.support_mask)

    @property
    def query(self) -> Points:
        """Points to be judged on; none of them where there is no query set."""
        if self.x_query is None or self.y_query is None:
            x, y = self.x_support[:, :0], self.y_support[:, :0]
            return Points(x, y, torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device))
        return _points(self.x_query, self.y_query, self.query_mask)

    @property
    def points(self) -> Points:
        """Support and query together: D_i, what a hierarchical model is trained on."""
        one, two = self.support, self.query
        return Points(*(torch.cat([a, b], 1) for a, b in zip(one, two, strict=True)))

    @property
    def device(self) -> torch.device:
        """Where the episodes are."""
        return self.x_support.device

    def __len__(self) -> int:
        return len(self.x_support)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Episodes:
        """Some of the episodes; an integer gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"episode {index} of {len(self)}")
            index = [index % len(self)]
        where = index if isinstance(index, slice) else torch.as_tensor(index, device=self.device)
        return self._map(lambda value: value[where])

    def sample(self, episodes: int, generator: torch.Generator) -> Episodes:
        """That many episodes, without replacement."""
        if not 1 <= episodes <= len(self):
            raise OptionError(f"expected 1 to {len(self)} episodes, got {episodes}")
        return self[torch.randperm(len(self), generator=generator, device=generator.device)[:episodes]]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Episodes:
        """The same on another device or in another floating type; labels and masks keep theirs."""
        return self._map(lambda v: v.to(device=device, dtype=dtype if v.is_floating_point() else None))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Episodes:
        def part(value: Tensor | None) -> Tensor | None:
            return None if value is None else change(value)

        x_query, y_query = part(self.x_query), part(self.y_query)
        masks = part(self.support_mask), part(self.query_mask)
        return Episodes(change(self.x_support), change(self.y_support), x_query, y_query, *masks, way=self.way)

    def __repr__(self) -> str:
        def size(points: Points) -> str:
            low, high = (int(f(points.counts)) for f in (torch.min, torch.max))
            return str(high) if low == high else f"{low} to {high}"

        way = "" if self.way is None else f", {self.way} classes"
        return f"Episodes({len(self)} episodes, support {size(self.support)}, query {size(self.query)}{way})"


def drawn(source: Episodes | EpisodeSource | None, episodes: int, generator: torch.Generator) -> Episodes:
    """That many episodes: fresh ones of a source, or of a set without replacement, all where it has no more.

    Raises:
        OptionError: it is neither a set nor a source of episodes.
    """
    if isinstance(source, Episodes):
        return source.sample(min(episodes, len(source)), generator)
    if not callable(source):
        raise OptionError(
            f"give episodes: models.meta.Episodes, or a function of (how many, generator); got {type(source).__name__}"
        )
    found = source(episodes, generator)
    if not isinstance(found, Episodes):
        raise OptionError(f"the source returned {type(found).__name__}, expected models.meta.Episodes")
    return found


def _points(x: Tensor, y: Tensor, mask: Tensor | None) -> Points:
    """Points whose padded places are zero, whatever was in them: 0 times NaN would be NaN in a masked sum."""
    if mask is None:
        return Points(x, y, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))

    def clean(value: Tensor) -> Tensor:
        return value.masked_fill(~mask.reshape(*mask.shape, *[1] * (value.ndim - 2)), 0)

    return Points(clean(x), clean(y), mask)


def _padded(sets: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked x, y and mask of sets of different sizes."""
    most = max(len(x) for x, _ in sets)

    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack([torch.cat([v, v.new_zeros(most - len(v), *v.shape[1:])]) for v in values])

    mask = stack([torch.ones(len(x), dtype=torch.bool, device=x.device) for x, _ in sets])
    return stack([x for x, _ in sets]), stack([y for _, y in sets]), mask


def _joined(values: list[Tensor]) -> Tensor:
    """Batches (episodes_i, points_i, ...) below each other, padded with zeros."""
    most = max(v.shape[1] for v in values)
    return torch.cat([torch.cat([v, v.new_zeros(len(v), most - v.shape[1], *v.shape[2:])], 1) for v in values])
