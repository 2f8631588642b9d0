"""The arguments of a model, split into tensors, which are data and graph inputs, and constants."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppl.errors import ProgramError
from ppl.numbers import as_tensor, is_array

__all__ = ["PLAIN", "Arguments"]

PLAIN = (str, bytes, int, float, complex, bool, type(None))  # what compares by value


@dataclass(frozen=True)
class Arguments:
    """Bound arguments with their leaves laid open; tensors go by `arg.<path>`, and numpy arrays become tensors.

    Args:
        bound: the call.
        spec: structure of the arguments.
        paths: place of each leaf.
        leaves: tensors and constants.

    Example:
        >>> arguments = Arguments.of(lambda y, n=2: None, (torch.zeros(3),), {})
        >>> list(arguments.tensors()), arguments.names
        (['arg.y'], ['y', 'n'])
    """

    bound: inspect.BoundArguments
    spec: Any
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Bind arguments to a model.

        Raises:
            ProgramError: the model cannot be called with them.
        """
        forward = model.forward if isinstance(model, torch.nn.Module) else model
        try:
            bound = inspect.signature(forward).bind(*args, **kwargs)
        except TypeError as error:
            raise ProgramError(
                f"the model cannot be called with the arguments given: {error}; it takes "
                f"{inspect.signature(forward)}, and Program(model, ...) besides that only batching= and compile="
            ) from None
        bound.apply_defaults()
        return cls(bound, None, (), ()).replace({})

    @property
    def names(self) -> list[str]:
        """Names of the arguments."""
        return list(self.bound.arguments)

    def tensors(self) -> dict[str, Tensor]:
        """The data among the arguments, by `arg.<path>`."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return {f"arg.{path}": leaf for path, leaf in pairs if isinstance(leaf, Tensor)}

    def constants(self) -> dict[str, Any]:
        """The arguments that are not tensors, by path; they are baked into graphs."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return {path: leaf for path, leaf in pairs if not isinstance(leaf, Tensor)}

    def same_constants(self, other: Arguments) -> bool:
        """Whether what graphs have baked in is the same: plain values that are equal, other things one and the same."""
        ours, theirs = self.constants(), other.constants()
        return ours.keys() == theirs.keys() and all(
            a is b or (isinstance(a, PLAIN) and type(a) is type(b) and a == b)
            for a, b in ((ours[path], theirs[path]) for path in ours)
        )

    def call(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, with tensors taken from `inputs` where it has them."""
        leaves = [inputs.get(f"arg.{p}", leaf) for p, leaf in zip(self.paths, self.leaves, strict=True)]
        bound = copy.copy(self.bound)
        bound.arguments = pytree.tree_unflatten(leaves, self.spec)
        return bound.args, bound.kwargs

    def replace(self, values: Mapping[str, Any]) -> Arguments:
        """The same call with some arguments replaced, by name."""
        bound = copy.copy(self.bound)
        bound.arguments = {**self.bound.arguments, **values}
        bound.arguments = pytree.tree_map(_data, dict(bound.arguments))
        paths, spec = pytree.tree_flatten_with_path(bound.arguments)
        dotted = tuple(".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in paths)
        return Arguments(bound, spec, dotted, tuple(leaf for _, leaf in paths))

    def map(self, fn: Callable[[Any], Any]) -> Arguments:
        """The same call with a function applied to every leaf."""
        leaves = tuple(fn(leaf) for leaf in self.leaves)
        bound = copy.copy(self.bound)
        bound.arguments = pytree.tree_unflatten(list(leaves), self.spec)
        return replace(self, bound=bound, leaves=leaves)


def _data(leaf: Any) -> Any:
    """An array is data; all else that is no tensor stays a constant, as it may be a size or a switch."""
    return as_tensor(leaf) if is_array(leaf) else leaf
