"""Episodes: padding, masks, and errors at the door."""

from __future__ import annotations

import pytest
import torch

from models.meta import Episodes
from ppl.errors import DataError, OptionError, ShapeError


def ragged(way: int | None = None) -> Episodes:
    sizes = ((3, 2), (1, 4), (2, 0))
    y = torch.zeros if way is None else lambda n: torch.arange(n) % 2
    return Episodes.ragged(
        [(torch.full((n, 2), float(n)), y(n)) for n, _ in sizes],
        [(torch.ones(m, 2), y(m)) for _, m in sizes],
        way=way,
    )


def test_padding_and_parts() -> None:
    """Counts, zeros in padded places, and support and query joined."""
    episodes = ragged()
    assert episodes.support.counts.tolist() == [3, 1, 2]
    assert episodes.query.counts.tolist() == [2, 4, 0]
    assert episodes.points.x.shape == (3, 7, 2)
    assert episodes.points.counts.tolist() == [5, 5, 2]
    assert float(episodes.support.x[1].sum()) == 2.0
    picked = episodes[torch.tensor([2, 0])]
    assert picked.support.counts.tolist() == [2, 3]
    assert len(episodes[-1]) == 1
    assert episodes.to(dtype=torch.float64).support.x.dtype == torch.float64


def test_padded_places_may_hold_anything() -> None:
    """NaN behind the mask is no error and does not come out."""
    x = torch.tensor([[[1.0], [torch.nan]]])
    episodes = Episodes(x, torch.zeros(1, 2), support_mask=torch.tensor([[True, False]]))
    assert torch.isfinite(episodes.points.x).all()
    assert torch.isfinite(Episodes.cat([episodes, episodes]).x_support).all()


def test_sample_is_without_replacement_and_seeded() -> None:
    """The same generator state gives the same episodes, each once."""
    episodes = Episodes(torch.arange(10.0)[:, None, None], torch.zeros(10, 1))
    seen = [episodes.sample(10, torch.Generator().manual_seed(1)).x_support.flatten() for _ in range(2)]
    assert torch.equal(seen[0], seen[1])
    assert len(set(seen[0].tolist())) == 10


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (
            DataError,
            "empty support",
            lambda: Episodes.ragged([(torch.ones(2, 1), torch.ones(2)), (torch.ones(0, 1), torch.ones(0))]),
        ),
        (DataError, "empty support", lambda: Episodes(torch.ones(1, 0, 1), torch.ones(1, 0))),
        (DataError, "0..1", lambda: Episodes(torch.ones(1, 2, 1), torch.tensor([[0, 2]]), way=2)),
        (DataError, "integer", lambda: Episodes(torch.ones(1, 2, 1), torch.zeros(1, 2), way=2)),
        (DataError, "not finite", lambda: Episodes(torch.full((1, 2, 1), torch.nan), torch.zeros(1, 2))),
        (OptionError, "way", lambda: Episodes(torch.ones(1, 2, 1), torch.tensor([[0, 0]]), way=1)),
        (ShapeError, "equal first", lambda: Episodes(torch.ones(1, 2, 1), torch.zeros(1, 3))),
        (ShapeError, "together", lambda: Episodes(torch.ones(1, 2, 1), torch.zeros(1, 2), torch.ones(1, 2, 1))),
        (
            ShapeError,
            "must agree",
            lambda: Episodes(*(torch.ones(1, 2, 1), torch.zeros(1, 2), torch.ones(1, 2, 3), torch.zeros(1, 2))),
        ),
        (
            ShapeError,
            "query_mask",
            lambda: Episodes(torch.ones(1, 1, 1), torch.zeros(1, 1), query_mask=torch.ones(1, 1).bool()),
        ),
        (ShapeError, "as many", lambda: Episodes.ragged([(torch.ones(2, 1), torch.ones(3))])),
        (
            ShapeError,
            "support_mask",
            lambda: Episodes(torch.ones(1, 1, 1), torch.zeros(1, 1), support_mask=torch.ones(1, 2).bool()),
        ),
    ],
)
def test_bad_episodes(error: type[Exception], words: str, make: object) -> None:
    """One clear error at the door."""
    with pytest.raises(error, match=words):
        make()  # type: ignore[operator]
