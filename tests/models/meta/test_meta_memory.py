"""Memory of one step: constant in inner steps for the NIW guide, growing for MAML, whose path is differentiated."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.meta import MAML, SGLD, Episodes, Fisher, Gaussian, GaussNewton, Hierarchy, NIWMeta, NormalInverseGamma, mlp


class Peak(TorchDispatchMode):
    """Largest number of bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.known[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.live)
        return found

    def _gone(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


def source(number: int, generator: torch.Generator) -> Episodes:
    x = torch.randn(number, 20, 1, generator=generator)
    y = x[..., 0].sin()
    return Episodes(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


def niw(local: object) -> int:
    network = mlp([1, 40, 40, 1])
    model = Hierarchy(network, Gaussian(0.3), NormalInverseGamma.around(network.start, 0.1, 3.0, 1.0))
    gc.collect()
    with Peak() as peak:
        NIWMeta(steps=2, batch=4, local=local).fit(model, source)  # type: ignore[arg-type]
    return peak.peak


def maml(inner_steps: int, order: str) -> int:
    gc.collect()
    with Peak() as peak:
        MAML(inner_steps, 1e-3, order, steps=2, batch=4).fit(mlp([1, 40, 40, 1]), Gaussian(0.3), source)  # type: ignore[arg-type]
    return peak.peak


@pytest.mark.parametrize("local", [SGLD, Fisher, GaussNewton])
def test_memory_is_constant_in_inner_steps(local: Any) -> None:
    """Less than 5 % more from the fewest inner steps to 50."""
    few, many = niw(local(steps=2 if local is SGLD else 1)), niw(local(steps=50))
    if local is not SGLD:  # one step of the others holds no step's result while the next is made
        few = niw(local(steps=2))
    assert many < 1.05 * few, (few, many)


def test_memory_of_maml_grows() -> None:
    """The second-order path is kept whole: ten times the memory from 1 to 50 steps; the first-order one is not."""
    assert maml(50, "second") > 10 * maml(1, "second")
    assert maml(50, "first") < 1.5 * maml(1, "first")
