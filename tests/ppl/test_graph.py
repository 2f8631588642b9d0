"""Graphs are compared with the function before use, refuse what they cannot hold, and say where."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl.errors import TraceError
from ppl.graph import CAPTURE_AFTER, LaneFunction
from ppl.passes import simplify
from ppl.rewrites import functional, no_raise, out_of_place, pin_types

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def build(fn, size=3, **options):
    lane, shared = {"z": rand(size)}, {"a": rand(size, seed=1)}
    probes = [({"z": rand(size, seed=2)}, {"a": rand(size, seed=3)})]
    return LaneFunction(fn, lane, shared, probes=probes, **options)


def test_value_and_gradients_in_lane_and_shared_inputs():
    """f = sum a z^2: df/dz = 2 a z draw by draw, df/da = sum of z^2 over draws; before and after capture."""
    function = build(lambda lane, shared: (shared["a"] * lane["z"] ** 2).sum())
    z, a = rand(5, 3, seed=4), rand(3, seed=5)
    for _ in range(CAPTURE_AFTER + 2):
        value, grads = function.value_and_grad({"z": z}, {"a": a}, ("z", "a"))
        torch.testing.assert_close(value, (a * z**2).sum(1))
        torch.testing.assert_close(grads["z"], 2 * a * z)
        torch.testing.assert_close(grads["a"], (z**2).sum(0))
    assert {r.kind for r in function._runners.values()} == {"graph"}


def test_new_shared_inputs_are_used_after_capture():
    """Data are inputs: changing them, also in place, changes the result without a new trace."""
    function = build(lambda lane, shared: (shared["a"].exp() * lane["z"]).sum())
    z, a = rand(4, 3), rand(3)
    assert function.prepare({"z": z}, {"a": a}, wrt=("z",), calls=0) == "graph"
    for shift in (0.0, 1.0, 2.0):
        a.add_(shift)
        torch.testing.assert_close(function.value_and_grad({"z": z}, {"a": a}, ("z",))[1]["z"], a.exp().expand(4, 3))
        b = a.clone() - 1
        torch.testing.assert_close(function.value_and_grad({"z": z}, {"a": b}, ("z",))[1]["z"], b.exp().expand(4, 3))


def test_differentiable_where_gradients_are_recorded():
    function = build(lambda lane, shared: {"out": (shared["a"] * lane["z"]).exp()})
    z, a = rand(2, 3).requires_grad_(), rand(3).requires_grad_()
    out = function({"z": z}, {"a": a})["out"]
    grads = torch.autograd.grad(out.sum(), (z, a))
    torch.testing.assert_close(grads[0], a * (a * z).exp())
    torch.testing.assert_close(grads[1], (z * (a * z).exp()).sum(0))


def test_branch_on_a_value_is_refused_with_the_cure():
    def branch(lane, shared):
        return lane["z"].sum() if lane["z"][0] > 0.5 else -lane["z"].sum()

    with pytest.raises(TraceError, match=r'after site .here.*batching="loop"'):
        build(branch, where=lambda: " (after site 'here')")
    loop = build(branch, batching="loop")
    z = torch.stack([torch.full((3,), 0.9, dtype=F64), torch.full((3,), 0.1, dtype=F64)])
    value, grads = loop.value_and_grad({"z": z}, {"a": rand(3)}, ("z",))
    torch.testing.assert_close(value, torch.tensor([2.7, -0.3], dtype=F64))
    torch.testing.assert_close(grads["z"][:, 0], torch.tensor([1.0, -1.0], dtype=F64))


def test_numbers_baked_in_by_numpy_are_caught():
    def baked(lane, shared):
        return torch.as_tensor(lane["z"].detach().numpy().sum()) * shared["a"].sum()

    with pytest.raises(TraceError):
        build(baked)


def test_detach_is_kept_as_the_model_means_it():
    function = build(lambda lane, shared: (lane["z"].detach() * lane["z"]).sum())
    z = rand(2, 3)
    torch.testing.assert_close(function.value_and_grad({"z": z}, {"a": rand(3)}, ("z",))[1]["z"], z)


def test_hidden_randomness_is_caught():
    with pytest.raises(TraceError, match="random"):
        build(lambda lane, shared: lane["z"].sum() + torch.randn((), dtype=F64))
    dropout = torch.nn.Dropout(0.5)
    with pytest.raises(TraceError, match="random"):
        build(lambda lane, shared: dropout(lane["z"]).sum())
    dropout.eval()
    assert build(lambda lane, shared: dropout(lane["z"]).sum()).batching == "graph"


def test_error_of_the_function_reaches_the_user_as_it_is():
    def broken(lane, shared):
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        build(broken)


def test_writes_in_place_are_traced():
    """Values and gradients of rows, steps and slices written into a fresh tensor."""

    def writes(lane, shared):
        out = torch.zeros(6, dtype=F64)
        out[0] = lane["z"][0] ** 2
        out[1:4] = lane["z"] * shared["a"]
        out[::5] += lane["z"][1]
        return (out * torch.arange(6)).sum()

    function = build(writes)
    assert function.batching == "graph"
    z, a = rand(3, 3), rand(3)
    value, grads = function.value_and_grad({"z": z}, {"a": a}, ("z",))
    expected = (z * a * torch.tensor([1.0, 2, 3], dtype=F64)).sum(1) + 5 * z[:, 1]
    torch.testing.assert_close(value, expected)
    slope = a * torch.tensor([1.0, 2, 3], dtype=F64) + torch.tensor([0.0, 5, 0], dtype=F64)
    torch.testing.assert_close(grads["z"], slope.expand(3, 3))


def test_one_failed_factorisation_leaves_the_other_draws_alone():
    def factor(lane, shared):
        matrix = torch.eye(2, dtype=F64) + lane["z"][0] * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
        return torch.linalg.cholesky(matrix).sum()

    function = build(factor)
    z = torch.tensor([[0.5, 0, 0], [2.0, 0, 0]], dtype=F64)
    for _ in range(CAPTURE_AFTER + 1):
        value, grads = function.value_and_grad({"z": z}, {"a": rand(3)}, ("z",))
        torch.testing.assert_close(value[0], torch.tensor(1 + 0.5 + 0.75**0.5, dtype=F64))
        assert bool(torch.isnan(value[1]))
        torch.testing.assert_close(grads["z"][0, 0], torch.tensor(1 - 0.5 / 0.75**0.5, dtype=F64))


def test_types_do_not_depend_on_the_default_of_the_moment():
    """Traced with float64 as default, run with float32: constants keep their digits."""
    torch.set_default_dtype(F64)
    try:
        graph = make_fx(lambda x: x + torch.full((2,), 0.1) + torch.arange(2) / 3 + torch.where(x > 0, 0.1, 0.7))(
            rand(2)
        )
        expected = graph(rand(2))
    finally:
        torch.set_default_dtype(torch.float32)
    graph = simplify(pin_types(graph))
    torch.testing.assert_close(graph(rand(2)), expected, rtol=1e-15, atol=1e-15)


def test_simplify_leaves_nothing_idle():
    def idle(x):
        y = (x * 1 + 0.0).view(3).expand(3).clone()
        return (y**1.0 / 1 - torch.zeros_like(x)) * torch.ones(3, dtype=F64).exp().log()

    graph = simplify(make_fx(idle)(rand(3)))
    assert sum(n.op == "call_function" for n in graph.graph.nodes) <= 1  # exp(log(1)) is one up to rounding
    torch.testing.assert_close(graph(rand(3, seed=7)), rand(3, seed=7))


def test_writes_into_fresh_tensors_need_no_second_trace():
    graph = make_fx(lambda x: (x + 1).masked_fill_(x > 0.5, -1.0).mul_(2.0))(rand(4))
    assert out_of_place(graph)
    torch.testing.assert_close(graph(rand(4)), torch.where(rand(4) > 0.5, -2.0, 2 * (rand(4) + 1)))

    def view(x):
        y = x + 1
        y[0].add_(1.0)
        return y

    assert not out_of_place(make_fx(view)(rand(4)))


def test_scatters_become_operations_with_right_gradients():
    def scatter(x):
        out = torch.select_scatter(torch.zeros(4, dtype=F64), x[0], 0, -1)
        return torch.slice_scatter(out, x[1:3] ** 2, 0, 0, 4, 2).sum()

    graph = functional(make_fx(scatter)(rand(3)))
    x = rand(2, 3)
    grad = torch.func.grad(lambda x: torch.vmap(graph)(x).sum())(x)
    torch.testing.assert_close(grad, torch.cat([torch.ones(2, 1, dtype=F64), 2 * x[:, 1:]], 1))


def test_failed_factorisations_are_nan():
    graph = no_raise(make_fx(torch.linalg.cholesky)(torch.eye(2)))
    assert bool(torch.isnan(graph(-torch.eye(2))).all())
    torch.testing.assert_close(graph(4 * torch.eye(2)), 2 * torch.eye(2))


def test_a_compiled_function_equals_the_graph():
    function = build(lambda lane, shared: (shared["a"] * lane["z"]).sin().sum(), compile="inductor")
    z, a = rand(4, 3), rand(3)
    assert function.prepare({"z": z}, {"a": a}, wrt=("z",), calls=1) == "inductor"
    value, grads = function.value_and_grad({"z": z}, {"a": a}, ("z",))
    torch.testing.assert_close(value, (a * z).sin().sum(1))
    torch.testing.assert_close(grads["z"], a * (a * z).cos())


def test_bound_function_holds_what_it_was_given():
    function = build(lambda lane, shared: (shared["a"] * lane["z"] ** 2).sum())
    z, a = rand(1, 3), rand(3)
    function.prepare({"z": z}, {"a": a}, wrt=("z",), calls=1)
    value, grad = function.bind({"z": z}, {"a": a}, ("z",))(2 * z)
    torch.testing.assert_close(value, (4 * a * z**2).sum(1))
    torch.testing.assert_close(grad, 4 * a * z)
