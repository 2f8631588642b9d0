"""Foreign operators keep the contract, and wrong adjoints are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inverse import operators as ops
from inverse.operators.testing import check_operator
from ppl.errors import CapabilityError, DataError, OptionError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Physics(nn.Module):
    """Built like a LinearPhysics of deepinv: a module in float64 with A and A_adjoint on (batch, channel, ...)."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], dtype=torch.float64))
        self.factor = factor

    def A(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        assert x.ndim == 4
        return self.mask * x

    def A_adjoint(self, y: torch.Tensor, **kwargs: object) -> torch.Tensor:
        assert y.ndim == 4
        return self.factor * self.mask * y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("forward adds noise and must not be called")


class Spectrum:
    """Complex measurements of a real image, in plain Python."""

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft2(x, norm="ortho")[..., :2]

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(torch.nn.functional.pad(y, (0, 1)), norm="ortho")


class Magnitude:
    """Nonlinear with an `A_adjoint` that is none, as some physics have."""

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return x.square()

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y.sqrt()


class Same:
    def A(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y


@pytest.mark.parametrize("physics", [Physics(), Spectrum(), Same()], ids=["module", "complex", "identity"])
def test_linear_physics_keeps_the_contract(physics: object) -> None:
    check_operator(ops.wrap(physics, (2, 2, 3)), generator())


def test_physics_by_hand() -> None:
    physics, x = Physics(), torch.randn(5, 1, 2, 3, generator=generator(), dtype=torch.float64)
    A = ops.wrap(physics, (1, 2, 3))
    assert isinstance(A, ops.WrappedPhysics)
    torch.testing.assert_close(A(x), physics.A(x))
    torch.testing.assert_close(A(x.float()), physics.A(x).float())
    spectrum = ops.wrap(Spectrum(), (1, 2, 3))
    assert spectrum.out_shape == (1, 2, 2, 2)
    torch.testing.assert_close(torch.view_as_complex(spectrum(x)), Spectrum().A(x))
    composed = ops.Downsample(1, (1, 2, 3)) @ A
    torch.testing.assert_close(composed.adjoint(x), physics.A_adjoint(x))


@pytest.mark.parametrize("factor", [-1.0, 1.001, 0.0])
def test_wrong_adjoints_are_refused(factor: float) -> None:
    with pytest.raises(OptionError, match="not the transpose"):
        ops.wrap(Physics(factor), (1, 2, 3))
    physics = Physics(factor)
    A = ops.wrap(lambda x: physics.A(x[None])[0], (1, 2, 3), linear=True)  # the cure that the error names
    torch.testing.assert_close(A.adjoint(A(torch.ones(1, 2, 3).double())), Physics().mask.square()[None])


def test_the_check_can_be_called() -> None:
    class Wrong(ops.CircularBlur):
        def adjoint(self, y: torch.Tensor) -> torch.Tensor:
            return self.forward(y)  # right for even kernels alone

    uneven = torch.tensor([[0.0, 0.2, 0.8]], dtype=torch.float64)
    assert ops.adjoint_error(ops.CircularBlur(uneven, (8, 8)), generator()) < 1e-14
    assert ops.adjoint_error(Wrong(uneven, (8, 8)), generator()) > 0.01
    zero = 0.0 * ops.Identity((3,))
    assert ops.adjoint_error(zero, generator()) == 0
    with pytest.raises(CapabilityError, match="not linear"):
        ops.adjoint_error(ops.Clip((3,)), generator())
    with pytest.raises(OptionError, match=r"takes an operator.*wrap\(A, in_shape\)"):
        ops.adjoint_error(lambda x: x, generator())  # type: ignore[arg-type]


def test_nonlinear_physics_is_found_out() -> None:
    A = ops.wrap(Magnitude(), (1, 2, 2))
    assert not A.linear
    x = torch.randn(3, 1, 2, 2, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(A(x), x.square())
    torch.testing.assert_close(torch.func.vjp(A, x)[1](torch.ones_like(x))[0], 2 * x)
    with pytest.raises(CapabilityError, match="not linear"):
        A.adjoint(x)
    with pytest.raises(OptionError, match="declared linear"):
        ops.wrap(Magnitude(), (1, 2, 2), linear=True)
    assert not ops.wrap(Physics(), (1, 2, 3), linear=False).linear


def test_callables() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    A = ops.wrap(conv, (1, 4, 4))
    assert A.linear
    assert A.out_shape == (2, 4, 4)
    assert ops.adjoint_error(A, generator(), dtype=torch.float32) < 1e-5
    x = torch.randn(3, 1, 4, 4, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(A(x), conv(x.float()).double())
    assert not ops.wrap(nn.Conv2d(1, 2, 3), (1, 4, 4)).linear  # a bias makes it affine
    assert any(p is conv.weight for p in A.parameters())
    fourier = ops.wrap(torch.fft.rfft, (4,))
    assert fourier.out_shape == (3, 2)
    check_operator(fourier, generator())
    batched = ops.wrap(lambda v: v.flip(-1), (4,), batched=True)
    check_operator(batched, generator())
    blur = ops.GaussianBlur(1.0, (4, 4))
    assert ops.wrap(blur, (4, 4)) is blur


def test_refuses_what_is_no_operator() -> None:
    with pytest.raises(OptionError, match="callable"):
        ops.wrap(3.0, (2,))
    with pytest.raises(ShapeError, match="acts on"):
        ops.wrap(ops.Identity((2,)), (3,))
    with pytest.raises(OptionError, match="linear=True"):
        ops.wrap(ops.Identity((2,)), (2,), linear=False)

    class Several:
        def A(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x, x]

    class NoAdjoint:
        def A(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    with pytest.raises(DataError, match="got list"):
        ops.wrap(Several(), (2,))
    assert not ops.wrap(NoAdjoint(), (2,)).linear
    with pytest.raises(OptionError, match="no A_adjoint"):
        ops.wrap(NoAdjoint(), (2,), linear=True)


def test_a_wrapped_operator_is_read_from_a_program() -> None:
    """The likelihood finds the physics that the model calls, as it finds operators of ours."""
    import pyro
    import pyro.distributions as dist

    import ppl
    from inverse.likelihood import read_likelihood
    from sde import GaussianMixture

    A, one = ops.wrap(Physics(), (1, 2, 3)), torch.ones(1, dtype=torch.float64)
    prior = GaussianMixture(one, torch.zeros(1, 1, 2, 3, dtype=torch.float64), one)

    def model(y: torch.Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(A(x), 0.5).to_event(3), obs=y)

    likelihood = read_likelihood(ppl.Program(model, torch.ones(1, 2, 3, dtype=torch.float64)))
    assert likelihood.gaussian.measured is A
