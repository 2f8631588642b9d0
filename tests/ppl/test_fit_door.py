"""The door of `fit`: one problem, a generator from the seed; and the check of whole-number options."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from ppl.errors import OptionError, ProgramError


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def several() -> ppl.Program:
    return ppl.Program(model, torch.zeros((), dtype=torch.float64)).over(y=torch.tensor([0.0, 1.0]).double())


@pytest.mark.parametrize("backend", [ppl.SVI(), ppl.Laplace(), ppl.Pathfinder()], ids=lambda b: type(b).__name__)
def test_several_problems_are_refused_by_name(backend: Any) -> None:
    with pytest.raises(ProgramError, match=rf"{type(backend).__name__}\.fit takes one problem"):
        backend.fit(several())


def test_training_on_simulations_takes_the_first_problem() -> None:
    backend = ppl.DistributionTransformer(components=1, width=4, heads=1, depth=1, feedforward=4, steps=2, batch=4)
    assert backend.fit(several()).program.problems is None


def test_seed_makes_the_generator() -> None:
    program = several().problem(1)
    loc = [ppl.SVI(steps=3).fit(program, seed=s).params["loc"] for s in (0, 1)]
    told = ppl.SVI(steps=3).fit(program, generator=torch.Generator().manual_seed(1)).params["loc"]
    assert torch.equal(loc[1], told)
    assert not torch.equal(loc[0], told)


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_whole_number_options(value: Any) -> None:
    with pytest.raises(OptionError, match="steps must be an integer of at least 1"):
        ppl.Laplace(steps=value)
