"""Operations in C: value and gradient are those of the graph, as scalars and as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ppl.graph import LaneFunction
from ppl.native import NativeDensity, Unsupported

POINTS = 4
TABLE = torch.linspace(-1.0, 2.0, 12 * 60, dtype=torch.float64).reshape(60, 12)
PICK = torch.tensor([3, 0, 3, -1, 2])
MANY = (torch.arange(90) * 7) % 5


def spread(z, rows):
    """A tensor (rows, 3) of a few numbers."""
    return z[:3] * torch.linspace(0.2, 1.0, rows, dtype=z.dtype)[:, None] + z[-1]


def definite(z, rows):
    """A positive definite matrix."""
    x = torch.linspace(0.0, 3.0, rows, dtype=z.dtype)
    distance = (x[:, None] - x).square()
    return z[0].exp() * torch.exp(-distance / z[1].exp()) + (0.1 + z[2].exp()) * torch.eye(rows, dtype=z.dtype)


def loop(z):
    state, total = z[0], z[1]
    for t in range(30):
        state = 0.9 * state + z[t % len(z)] * torch.sin(state)
        total = total + state**2
    return total


FUNCTIONS = {
    "arithmetic": lambda z: (2 - z / (1 + z.square()) + 3 * z**3 - z.abs() ** 1.5).sum(),
    "exponentials": lambda z: (z.exp() + z.sigmoid().log() + (z.square() + 1).log1p() + z.expm1()).sum(),
    "circles": lambda z: (z.sin() * z.cos() + z.tanh() + z.atan() + torch.sinh(z / 3)).sum(),
    "softplus": lambda z: (F.softplus(z) + F.softplus(-30 * z) + F.logsigmoid(z) + torch.relu(z)).sum(),
    "gamma": lambda z: (torch.lgamma(z.square() + 0.3) + torch.erf(z) + torch.digamma(z.exp() + 0.1).detach()).sum(),
    "roots": lambda z: (z.square().add(1).sqrt() + (z.square() + 2).rsqrt() + z.exp().reciprocal()).sum(),
    "choices": lambda z: torch.where(z > 0.2, z**2, -z).clamp(-0.5, 0.8).sum() + torch.maximum(z, z.flip(0)).sum(),
    "minimum": lambda z: torch.minimum(z, 2 * z.flip(0)).clamp(min=-0.3).sum() + z.clamp_max(0.1).exp().sum(),
    "masks": lambda z: z.masked_fill((z > 0) & ~(z > 1) | (z < -1), 0.25).square().sum(),
    "xlogy": lambda z: torch.xlogy(z.square(), z.exp() + 0.2).sum() + torch.logaddexp(z, 1 - z).sum(),
    "broadcast": lambda z: (z[:, None] * z - z[0]).square().sum() + (z[:, None] + z).exp().mean(),
    "pieces": lambda z: torch.cat([z[1:], z[:1] * 2, z.new_zeros(2)]).square().sum() + z[::2].exp().sum(),
    "stack": lambda z: torch.stack([z.exp(), z.sin(), 1 + z], dim=1).prod(1).sum() if len(z) < 9 else z.sum(),
    "pad": lambda z: (F.pad(z, (1, 2), value=0.5).exp().flip(0)[1:-1] * torch.arange(len(z) + 1)).sum(),
    "reshape": lambda z: (spread(z, 20).t().reshape(6, 10).exp().sum(1) ** 2).sum(),
    "sums": lambda z: (spread(z, 50).sum(0) ** 2).sum() + (spread(z, 50).sum(1) ** 2).sum() + spread(z, 50).mean(),
    "long sums": lambda z: ((spread(z, 50)[:, :, None] + TABLE[:, 0]).sin().sum(0) ** 2).sum(),
    "logsumexp": lambda z: spread(z, 30).logsumexp(1).sum() + spread(z, 30).logsumexp(0).sum() + z.logsumexp(0),
    "softmax": lambda z: (spread(z, 30).log_softmax(1) * spread(z, 30).softmax(1)).sum(),
    "long softmax": lambda z: (spread(z, 30).log_softmax(0) * spread(z, 30).softmax(0)).square().sum(),
    "extremes": lambda z: (spread(z, 30).amax(1) - spread(z, 30).amin(0).sum()).square().sum(),
    "cumulated": lambda z: spread(z, 30).cumsum(0).square().sum() + (z / 2 + 1).cumprod(0).sum() + z.cumsum(0).prod(),
    "products": lambda z: (spread(z, 30) @ spread(z, 40).T).tanh().sum() + (TABLE @ z[:1].expand(12)).sin().sum(),
    "matrix": lambda z: (TABLE.T @ (TABLE[:, :4] @ z[:4]).exp() * torch.linspace(0, 1, 12).double()).sum(),
    "wide": lambda z: ((TABLE @ TABLE.T) @ (TABLE[:, :3] @ z[:3])).sin().sum(),
    "batch": lambda z: torch.bmm(spread(z, 6).reshape(2, 3, 3), spread(z, 8).reshape(2, 3, 4)).square().sum(),
    "cholesky": lambda z: torch.linalg.cholesky(definite(z, 7)).diagonal().log().sum(),
    "large cholesky": lambda z: torch.linalg.cholesky(definite(z, 20)).diagonal().log().sum(),
    "triangular": lambda z: (
        torch.linalg.solve_triangular(
            torch.linalg.cholesky(definite(z, 9)), torch.linspace(-1, 1, 9).double()[:, None] + z[3], upper=False
        )
        .square()
        .sum()
    ),
    "transposed": lambda z: (
        torch.linalg.solve_triangular(torch.linalg.cholesky(definite(z, 9)).mT, spread(z, 9).T, upper=True, left=False)
        .square()
        .sum()
    ),
    "triangle": lambda z: (spread(z, 30) @ spread(z, 30).T).tril(-1).sum() + (z[:, None] * z).triu().exp().sum(),
    "index": lambda z: (z[PICK] * torch.arange(5)).sum() + (z[MANY] ** 2 * TABLE[0, 0]).sum(),
    "rows by index": lambda z: (spread(z, 30)[MANY].sin() * TABLE.reshape(-1)[:270].reshape(90, 3)).sum(),
    "columns by index": lambda z: (spread(z, 5).T[:, MANY] ** 2).sum() + z.index_select(0, MANY).exp().sum(),
    "gather": lambda z: spread(z, 30).gather(1, (torch.arange(60).reshape(30, 2) % 3)).square().sum(),
    "scatter": lambda z: z.new_zeros(8).index_add(0, MANY, spread(z, 30).reshape(-1)).square().sum(),
    "types": lambda z: (z * (z > 0) + MANY.sum() * z + (z > 1).double() - (z < 0).to(torch.int64)).sum(),
    "recursion": loop,
}


def captured(fn, dim, dtype=torch.float64):
    z = torch.randn(POINTS, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    function = LaneFunction(lambda lane, shared: fn(lane["z"]), {"z": z[0]}, {})
    found = function.captured({"z": z[:1]}, {}, ("z",), 1000)
    assert found is not None
    return (*found, z)


# Five numbers are scalars, forty a loop; the others make tensors of both sizes out of five.
ELEMENTWISE = list(FUNCTIONS)[: list(FUNCTIONS).index("pad") + 1]


@pytest.mark.parametrize(("name", "dim"), [*((n, 5) for n in FUNCTIONS), *((n, 40) for n in ELEMENTWISE)])
def test_value_and_gradient_are_those_of_the_graph(name, dim):
    graph, inputs, z = captured(FUNCTIONS[name], dim)
    state = NativeDensity(graph, inputs).state()
    for row in z:
        value, gradient = graph(row[None], *inputs[1:])
        ours, slope = state(row.numpy())
        assert ours == pytest.approx(float(value), rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(slope, gradient[0].numpy(), rtol=1e-10, atol=1e-11 * float(gradient.abs().max()))
    assert state.gradients == POINTS


@pytest.mark.parametrize("name", ["exponentials", "reshape", "sums", "broadcast"])
def test_single_precision(name):
    graph, inputs, z = captured(lambda z: FUNCTIONS[name](z).float(), 5, torch.float32)
    value, gradient = graph(z[:1], *inputs[1:])
    ours, slope = NativeDensity(graph, inputs).state()(z[0].double().numpy())
    assert ours == pytest.approx(float(value), rel=1e-4)
    np.testing.assert_allclose(slope, gradient[0].numpy(), rtol=1e-3, atol=1e-4)


def test_not_finite_is_an_arithmetic_error():
    graph, inputs, _ = captured(lambda z: z.log().sum(), 3)
    state = NativeDensity(graph, inputs).state()
    assert state(np.array([1.0, 2.0, 3.0]))[0] == pytest.approx(np.log(6.0))
    with pytest.raises(ArithmeticError, match="not finite"):
        state(np.array([1.0, -2.0, 3.0]))
    with pytest.raises(ArithmeticError):
        state(np.array([1.0, np.inf, 3.0]))


def test_matrix_that_is_not_definite_is_not_finite():
    graph, inputs, _ = captured(lambda z: torch.linalg.cholesky_ex(z[:4].reshape(2, 2))[0].diagonal().log().sum(), 5)
    state = NativeDensity(graph, inputs).state()
    with pytest.raises(ArithmeticError):
        state(np.array([1.0, 2.0, 2.0, 1.0, 0.0]))


def test_operation_that_is_not_written_in_c_is_named():
    graph, inputs, _ = captured(lambda z: torch.linalg.eigvalsh(z[:4].reshape(2, 2).exp()).sum(), 4)
    with pytest.raises(Unsupported, match="eigh"):
        NativeDensity(graph, inputs)


def test_new_data_are_read_into_the_same_function():
    data = torch.linspace(0, 1, 20, dtype=torch.float64)
    z = torch.ones(1, 2, dtype=torch.float64)
    function = LaneFunction(
        lambda lane, shared: ((shared["y"] - lane["z"][0]) ** 2).sum() * lane["z"][1], {"z": z[0]}, {"y": data}
    )
    graph, inputs = function.captured({"z": z}, {"y": data}, ("z",), 1000)
    density = NativeDensity(graph, inputs)
    other = density.with_inputs(function.captured({"z": z}, {"y": data + 1}, ("z",), 1000)[1])
    assert density.state()(z[0].numpy())[0] == pytest.approx(float(((data - 1) ** 2).sum()))
    assert other.state()(z[0].numpy())[0] == pytest.approx(float((data**2).sum()))
