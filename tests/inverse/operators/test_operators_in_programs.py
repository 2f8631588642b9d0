"""Operators inside a traced program: gradients survive the graph, and what is linear is recognised."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse import operators as ops
from inverse.likelihood import read_likelihood
from ppl.errors import CapabilityError, DataError
from sde import GaussianMixture

F64 = torch.float64


def program_of(A: ops.LinearOperator, y: Tensor) -> ppl.Program:
    one = torch.ones(1, dtype=F64)
    prior = GaussianMixture(one, torch.zeros(1, *A.in_shape, dtype=F64), one)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(A(x), 0.3).to_event(len(A.out_shape)), obs=y)

    return ppl.Program(model, y)


def nonlinear() -> dict[str, ops.LinearOperator]:
    return {
        "phase": ops.PhaseRetrieval((3, 4)),
        "clip": ops.Clip((2, 3), -0.5, 0.5),
        "saturating": ops.SaturatingBlur(ops.GaussianBlur(0.8, (3, 4))),
        "gamma": ops.GammaBlur(ops.GaussianBlur(0.8, (3, 4))),
        "jpeg": ops.JPEG((8, 8), 30),
        "scattering": ops.MultipleScattering(3, 4.0, 2, 3, orders=2),
        "scattering_all": ops.MultipleScattering(3, 4.0, 2, 3, orders=None),
        "wrapped": ops.wrap(torch.sin, (3,)),
    }


@pytest.mark.parametrize("name", nonlinear())
def test_nonlinear_gradients_pass_through_a_program(name: str) -> None:
    """The gradient of the program is J^T (y - A x) / sigma^2, J that of the operator (straight through for JPEG)."""
    A, g = nonlinear()[name], torch.Generator().manual_seed(0)
    x = torch.randn(4, *A.in_shape, generator=g, dtype=F64, requires_grad=True)
    y = torch.randn(A.out_shape, generator=g, dtype=F64)
    program = program_of(A, y)
    (found,) = torch.autograd.grad(program.log_likelihood({"x": x}).sum(), x)
    with torch.no_grad():
        image, pull = torch.func.vjp(A, x.detach())
        (expected,) = pull((y - image) / 0.3**2)
    torch.testing.assert_close(found, expected)
    with pytest.raises(CapabilityError, match="not linear"):
        _ = read_likelihood(program).gaussian


def linear() -> dict[str, ops.LinearOperator]:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 4, generator=g) < 0.6
    return {
        "radon": ops.Radon(5, (4, 4)),
        "mri": ops.MultiCoilMRI(ops.coil_sensitivities(2, (4, 4)), mask),
        "hadamard": ops.SubsampledHadamard(5, (4, 4), generator=g),
        "cosine": ops.SubsampledCosine(5, (3, 3), generator=g),
        "gaussian": ops.GaussianSensing(5, (3, 3), generator=g),
        "mosaic": ops.ColourMosaic((3, 4, 4)),
        "varying_blur": ops.VaryingBlur(torch.rand(2, 2, 3, 3, generator=g, dtype=F64), (4, 4)),
        "born": ops.BornScattering(3, 4.0, 2, 3),
    }


@pytest.mark.parametrize("name", linear())
def test_linear_operators_are_recognised(name: str) -> None:
    A = linear()[name]
    y = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    program = program_of(A, y)
    likelihood = read_likelihood(program)
    assert likelihood.gaussian.measured is A
    x = torch.randn(3, *A.in_shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    torch.testing.assert_close(likelihood.log_prob(x), program.log_likelihood({"x": x}))


class Turned(ops.LinearOperator):
    """A user's operator: numbers in reverse order, weighted; `right` says whether its adjoint is."""

    def __init__(self, right: bool) -> None:
        super().__init__((3,), (3,))
        self.right = right

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 2.0, 3.0], dtype=y.dtype)
        return (weights * y).flip(-1) if self.right else weights * y


@pytest.mark.parametrize("composed", [False, True])
def test_a_wrong_adjoint_of_the_user_is_refused(composed: bool) -> None:
    """It would be followed by every guide; a right one is taken as it is."""

    def made(right: bool) -> ops.LinearOperator:
        return Turned(right) @ ops.Identity((3,)) if composed else Turned(right)

    y = torch.ones(3, dtype=F64)
    with pytest.raises(DataError, match=r"adjoint of the operator behind 'y' is not its transpose.*correct.*Turned"):
        _ = read_likelihood(program_of(made(False), y)).gaussian
    assert read_likelihood(program_of(made(True), y)).is_gaussian
