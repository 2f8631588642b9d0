"""Arguments that are no data: sizes, switches and plain numbers are part of what a program is."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl import Program
from ppl.errors import ProgramError

AT = {"mu": torch.tensor([0.0, 0.5])}
Y = torch.tensor(1.0)


def model(y: Tensor, scale: float = 1.0, power: int = 1, shifted: bool = False, extra: Any = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for _ in range(power - 1):
        mu = mu * 2
    pyro.sample("y", dist.Normal(mu + (3.0 if shifted else 0.0) + (extra or {"by": 0.0})["by"], scale), obs=y)


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"power": 3}, {"shifted": True}, {"extra": {"by": 1.0}}], ids=str)
def test_another_constant_is_another_program(change: dict[str, Any]) -> None:
    """What was traced with the old constant is not used for the new one; both orders."""
    program = Program(model, Y)
    before = program.log_joint(AT)
    other = program.with_data(**change)
    torch.testing.assert_close(other.log_joint(AT), Program(model, Y, **change).log_joint(AT))
    torch.testing.assert_close(program.log_joint(AT), before)
    assert other.fingerprint() != program.fingerprint()  # so that no checkpoint is taken for that of the other
    assert other.fingerprint() == Program(model, Y, **change).fingerprint()


def test_an_equal_constant_traces_nothing_again() -> None:
    program = Program(model, Y, scale=2.0, extra={"by": 1.0})
    assert program.with_data(y=Y + 1, scale=2.0, extra={"by": 1.0})._functions is program._functions


def test_an_unknown_argument_is_told_what_there_is() -> None:
    with pytest.raises(ProgramError, match=r"'compiled'; it takes \(y: .*batching= and compile="):
        Program(model, Y, compiled=False)
