"""Data in other forms than tensors: the program and its results are those of the tensor."""

from __future__ import annotations

from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl import Program
from ppl.errors import DataError, ShapeError
from ppl.numbers import as_tensor

AT = {"mu": torch.tensor([0.0, 0.5])}


def rows(y: Any) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def one(y: Any) -> None:
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 2.0), obs=y)


@pytest.mark.parametrize(
    "y",
    [[1.0, 3.0], (1.0, 3.0), [1, 3], numpy.array([1.0, 3.0], dtype=numpy.float32), numpy.array([1, 3])],
    ids=["list", "tuple", "integers", "array", "integer array"],
)
def test_rows_as_lists_and_arrays(y: Any) -> None:
    program, expected = Program(rows, y), Program(rows, torch.tensor([1.0, 3.0])).log_joint(AT)
    torch.testing.assert_close(program.log_joint(AT), expected)
    assert program.data["y"].shape == (2,)


@pytest.mark.parametrize("y", [2.0, 2, numpy.float64(2.0), numpy.array(2.0)])
def test_one_number(y: Any) -> None:
    torch.testing.assert_close(
        Program(one, y).log_joint(AT), Program(one, torch.tensor(2.0)).log_joint(AT), check_dtype=False
    )


def test_an_array_keeps_its_type_and_is_a_graph_input() -> None:
    program = Program(rows, numpy.array([1.0, 3.0]))
    assert program.dtype == torch.float64 == program.log_joint(AT).dtype
    other = program.with_data(y=numpy.array([0.0, -2.0]))
    assert other._functions is program._functions  # nothing is traced again
    torch.testing.assert_close(
        other.log_joint(AT), Program(rows, torch.tensor([0.0, -2.0], dtype=torch.float64)).log_joint(AT)
    )


def test_covariates_as_arrays() -> None:
    def regression(x: Any, y: Any) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    x, y = numpy.arange(6.0).reshape(3, 2), numpy.ones(3)
    at = {"w": torch.ones(4, 2, dtype=torch.float64)}
    expected = Program(regression, torch.tensor(x), torch.tensor(y)).log_joint(at)
    torch.testing.assert_close(Program(regression, x, y).log_joint(at), expected)


@pytest.mark.parametrize("ys", [[1.0, 3.0], numpy.array([1.0, 3.0], dtype=numpy.float32), [torch.tensor(1.0)] * 2])
def test_many_problems_from_lists_and_arrays(ys: Any) -> None:
    many = Program(one, torch.tensor(0.0)).over(y=ys)
    expected = Program(one, torch.tensor(0.0)).over(y=as_tensor(ys)).log_joint(AT)
    torch.testing.assert_close(many.log_joint(AT), expected)


def test_values_of_latents_as_arrays() -> None:
    program = Program(one, torch.tensor(1.0))
    at = numpy.array([0.0, 0.5], dtype=numpy.float32)
    torch.testing.assert_close(program.log_joint({"mu": at}), program.log_joint(AT))  # type: ignore[dict-item]


def test_what_holds_no_numbers_is_refused() -> None:
    for y in ("text", ["a", "b"], [[1.0], [2.0, 3.0]], object()):
        with pytest.raises(DataError, match=r"'y' has data of type .*, expected a tensor.*torch\.as_tensor"):
            Program(one, y)


def test_many_problems_that_are_no_rows() -> None:
    program = Program(one, torch.tensor(0.0))
    for ys in (3.0, torch.tensor(3.0)):
        with pytest.raises(ShapeError, match=r"\(N, \*shape\).*'y' is one number"):
            program.over(y=ys)
    with pytest.raises(DataError, match="one row for each problem; 'y'"):
        program.over(y=["a"])
