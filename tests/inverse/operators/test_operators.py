"""Every operator keeps the contract; each also agrees with a matrix written by hand."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from inverse import operators as ops
from inverse.operators import base as base_module
from inverse.operators.testing import check_operator
from ppl.errors import CapabilityError, DataError, OptionError, PilotlightError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def holes(h: int = 4, w: int = 5) -> torch.Tensor:
    return torch.rand(h, w, generator=generator(3)) < 0.5


class ByProducts(ops.LinearOperator):
    """A user's operator: forward and adjoint alone, too large to factorise by decree."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)

    @property
    def capabilities(self) -> frozenset[str]:
        return frozenset({"linear"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T.to(x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        self.check_shape(y, self.out_shape, "data")
        return y @ self.matrix.to(y)


def members() -> dict[str, ops.LinearOperator]:
    image = (4, 5)
    mask = ops.Mask(holes())
    blur = ops.GaussianBlur(0.7, image)
    return {
        "identity": ops.Identity((2, 3)),
        "identity_scalar": ops.Identity(()),
        "diagonal": ops.Diagonal(torch.tensor([[2.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)),
        "mask": mask,
        "mask_channels": ops.Mask(holes(), (3, 4, 5)),
        "blur": blur,
        "blur_channels": ops.GaussianBlur(0.6, (2, 4, 4)),
        "blur_uneven": ops.CircularBlur(randn(3, 2), (4, 5)),
        "blur_singular": ops.CircularBlur(torch.full((1, 2), 0.5, dtype=torch.float64), (4, 6)),
        "motion": ops.MotionBlur(2.5, 30.0, (5, 6)),
        "downsample": ops.Downsample(2, (2, 4, 6)),
        "dense_wide": ops.Dense(randn(3, 8), (2, 4)),
        "dense_tall": ops.Dense(randn(8, 3), out_shape=(4, 2)),
        "dense_deficient": ops.Dense(randn(5, 2) @ randn(2, 6, seed=2)),
        "dense_complex": ops.Dense(torch.complex(randn(3, 4), randn(3, 4, seed=2))),
        "dense_float32": ops.Dense(randn(3, 4, dtype=torch.float32)),
        "fourier": ops.FourierMask(holes()),
        "fourier_even": ops.FourierMask(holes(4, 6), (2, 4, 6)),
        "fourier_full": ops.FourierMask(torch.ones(3, 4, dtype=torch.bool)),
        "fourier_complex": ops.FourierMask(holes(), (2, 4, 5, 2), complex_image=True),
        "compose": ops.Downsample(2, (4, 6)) @ ops.GaussianBlur(0.8, (4, 6)),
        "compose_diagonal": ops.Mask(torch.tensor([True, False, True]))
        @ ops.Mask(torch.tensor([[True, True], [False, True]])),
        "sum": blur + 0.3 * ops.Identity(image),
        "difference": ops.Identity(image) - blur,
        "scaled": -2.5 * mask,
        "scaled_zero": 0.0 * ops.Identity((3,)),
        "stack": ops.stack(mask, ops.Downsample(1, image), blur),
        "stack_diagonal": ops.stack(mask, 2.0 * ops.Identity(image)),
        "function": ops.FunctionOperator(lambda x: x.cumsum(-1)[..., 1:], (4,), linear=True),
        "function_batched": ops.FunctionOperator(lambda x: x.diff(dim=-1), (2, 3), linear=True, batched=True),
        "radon": ops.Radon([0.0, 33.0, 90.0], (4, 5)),
        "radon_narrow": ops.Radon(4, (2, 3, 3), detectors=3, spacing=0.7),
        "mri": ops.MultiCoilMRI(ops.coil_sensitivities(3, (3, 4)), holes(3, 4)),
        "mri_real": ops.MultiCoilMRI(ops.coil_sensitivities(2, (3, 4)), holes(3, 4), (2, 3, 4), complex_image=False),
        "hadamard": ops.SubsampledHadamard(3, (2, 4), generator=generator()),
        "cosine": ops.SubsampledCosine(4, (3, 3), generator=generator()),
        "gaussian_rows": ops.GaussianSensing(4, (2, 5), generator=generator()),
        "mosaic": ops.ColourMosaic((3, 3, 4)),
        "mosaic_cell": ops.ColourMosaic((2, 2, 3, 3), torch.tensor([[0, 1, 1]])),
        "varying_blur": ops.VaryingBlur(randn(2, 2, 3, 2), (4, 5)),
        "varying_blur_channels": ops.VaryingBlur(randn(1, 3, 2, 2), (2, 3, 4)),
        "born": ops.BornScattering(3, 4.0, 2, 3),
        "by_products": ByProducts(randn(3, 6)),
        "by_products_deficient": ByProducts(randn(5, 2) @ randn(2, 4, seed=2)),
    }


@pytest.mark.parametrize("name", members())
def test_contract(name: str) -> None:
    check_operator(members()[name], generator())


@pytest.mark.gpu
@pytest.mark.parametrize("name", members())
def test_contract_on_a_gpu(name: str) -> None:
    check_operator(members()[name].to("cuda"), torch.Generator("cuda").manual_seed(0))


@pytest.mark.parametrize("name", ["blur", "mask", "fourier", "downsample", "compose", "stack_diagonal", "scaled"])
def test_decompositions_can_start_inside_transforms(name: str) -> None:
    """A decomposition first built under vmap, grad or tracing must serve eager calls afterwards."""
    r = randn(3, *members()[name].out_shape)

    def solve(A: ops.LinearOperator, r: torch.Tensor) -> torch.Tensor:
        return A.solve_gram(r, 0.1, 2.0)

    expected = solve(members()[name], r)
    for transform in (
        lambda A: torch.func.vmap(lambda u: solve(A, u))(r),
        lambda A: torch.func.vmap(lambda u: torch.func.grad(lambda v: 0.5 * (v * solve(A, v)).sum())(u))(r),
        lambda A: torch.func.jvp(lambda u: solve(A, u), (r,), (r,))[1],
        lambda A: make_fx(lambda u: solve(A, u))(r)(r),
    ):
        A = members()[name]
        torch.testing.assert_close(transform(A), expected)
        torch.testing.assert_close(solve(A, r), expected)
    A = members()[name]
    with torch.inference_mode():
        solve(A, r)
    v = r.clone().requires_grad_()
    solve(A, v).sum().backward()
    assert v.grad is not None


def test_mask_keeps_observed_pixels_in_order() -> None:
    A = ops.Mask(torch.tensor([[True, False], [True, True]]), (2, 2, 2))
    x = torch.arange(8.0).reshape(2, 2, 2)
    assert A(x).tolist() == [0, 2, 3, 4, 6, 7]
    assert A.adjoint(A(x)).tolist() == [[[0, 0], [2, 3]], [[4, 0], [6, 7]]]


def test_mask_refuses_what_is_not_a_mask() -> None:
    with pytest.raises(DataError, match="boolean"):
        ops.Mask(torch.ones(3))
    with pytest.raises(DataError, match="nothing"):
        ops.Mask(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="broadcast"):
        ops.Mask(torch.ones(3, dtype=torch.bool), (2, 2))


def test_downsample_is_the_mean_of_blocks() -> None:
    x = randn(2, 4, 6)
    expected = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(ops.Downsample(2, (2, 4, 6))(x), expected)
    with pytest.raises(ShapeError, match="divisible by 4"):
        ops.Downsample(4, (4, 6))


def test_complex_matrix_is_stored_as_real_and_imaginary() -> None:
    M = torch.complex(randn(3, 4), randn(3, 4, seed=2))
    x = randn(4)
    y = ops.Dense(M)(x)
    torch.testing.assert_close(torch.view_as_complex(y), M @ x.to(M))


def test_stack_and_sum_by_hand() -> None:
    M, N = randn(2, 3), randn(2, 3, seed=2)
    A, B = ops.Dense(M), ops.Dense(N)
    torch.testing.assert_close((A + B).dense(), M + N)
    torch.testing.assert_close((A - 2 * B).dense(), M - 2 * N)
    torch.testing.assert_close(ops.stack(A, B).dense(), torch.cat([M, N]))
    torch.testing.assert_close((ops.Dense(N.T) @ A).dense(), N.T @ M)
    torch.testing.assert_close((-A).dense(), -M)


def test_algebra_names_shapes_that_do_not_fit() -> None:
    A, B = ops.Dense(randn(2, 3)), ops.Dense(randn(4, 5))
    with pytest.raises(ShapeError, match="cannot compose"):
        A @ B
    with pytest.raises(ShapeError, match="cannot add"):
        A + B
    with pytest.raises(ShapeError, match="one shape"):
        ops.stack(A, B)
    with pytest.raises(ShapeError, match=r"\(2, 4\), expected \(\*batch, 3,\)"):
        A(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(TypeError):
        A @ torch.zeros(3)  # type: ignore[operator]


def test_recording_sees_outermost_calls_only() -> None:
    blur, down = ops.GaussianBlur(0.5, (4, 4)), ops.Downsample(2, (4, 4))
    A = down @ blur
    nested = ops.FunctionOperator(lambda x: 2 * blur(x), (4, 4), linear=True)
    x = randn(4, 4)
    with ops.record_calls() as calls:
        y = A(x)
        nested(x)
        with ops.record_calls() as inner:
            blur(x)
        down(x)
    down(x)
    assert [call.operator for call in calls] == [A, nested, down]
    assert [call.operator for call in inner] == [blur]
    assert calls[0].input is x
    assert calls[0].output is y


def test_functions_are_linear_by_declaration_or_probe() -> None:
    g = generator()
    assert ops.probe_linear(lambda x: x.flip(0), (4,), g)
    assert not ops.probe_linear(lambda x: x + 1e-4, (4,), g)
    assert ops.probe_affine(lambda x: x + 1e-4, (4,), g)
    assert not ops.probe_affine(lambda x: x + 1e-3 * x.square(), (4,), g)
    assert not ops.probe_linear(lambda x: x.abs(), (4,), g)
    assert not ops.probe_linear(lambda x: x.clamp(-100, 100), (4,), g)
    assert ops.FunctionOperator(lambda x: 3 * x, (2,), linear=None, generator=g).linear
    square = ops.FunctionOperator(torch.square, (2,), linear=None, generator=g)
    assert square.capabilities == frozenset()
    with pytest.raises(CapabilityError, match="declared linear"):
        square.adjoint(torch.ones(2))
    with pytest.raises(OptionError, match="linear"):
        ops.Identity((2,)) @ square
    with pytest.raises(OptionError, match="generator"):
        ops.FunctionOperator(torch.square, (2,), linear=None)


def test_large_operators_without_structure_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    A = ops.Downsample(2, (4, 4)) @ ops.GaussianBlur(0.5, (4, 4))
    exact = A.norm()
    r = randn(2, 2)
    expected, pinv = A.solve_gram(r, 0.1, 2.0), A.pinv(r)
    monkeypatch.setattr(base_module, "DENSE_LIMIT", 10)
    B = ops.Downsample(2, (4, 4)) @ ops.GaussianBlur(0.5, (4, 4))
    assert B.capabilities == {"linear"}
    with pytest.raises(CapabilityError, match="conjugate gradients"):
        B.svd()
    torch.testing.assert_close(B.solve_gram(r, 0.1, 2.0), expected)
    torch.testing.assert_close(B.pinv(r), pinv)
    torch.testing.assert_close(B.norm(), exact, rtol=1e-6, atol=0)


def test_gram_solve_without_noise_needs_full_rows() -> None:
    A = ops.Dense(randn(2, 4))
    r = randn(2)
    torch.testing.assert_close(A.dense() @ A.dense().T @ A.solve_gram(r, 0.0, 1.0), r)


def test_unequal_noise_is_whitened() -> None:
    sigma = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    M, r = randn(3, 4), randn(3)
    W = ops.Diagonal(1 / sigma)
    whitened = W.adjoint((W @ ops.Dense(M)).solve_gram(W(r), 1.0, 0.7))
    torch.testing.assert_close(whitened, torch.linalg.solve(torch.diag(sigma**2) + 0.7 * M @ M.T, r))


def test_pinv_can_cut_small_singular_values() -> None:
    A = ops.Diagonal(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    y = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(A.pinv(y), torch.tensor([1.0, 1e6], dtype=torch.float64))
    torch.testing.assert_close(A.pinv(y, rcond=1e-3), torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_moving_outdates_the_decomposition() -> None:
    A = ops.Dense(torch.tensor([[1.0 + 1e-9]], dtype=torch.float64))
    before = A.svd()
    assert A.svd() is before
    A.to(torch.float32)
    assert A.matrix.dtype == torch.float32
    assert float(A.svd().s) == 1.0
    assert float(before.s) != 1.0


def test_learned_scale_has_gradients_through_the_solve() -> None:
    c = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    A = c * ops.Identity((1,))
    for _ in range(2):  # a kept decomposition would fail the second backward
        (gradient,) = torch.autograd.grad(A.solve_gram(torch.ones(1, dtype=torch.float64), 1.0, 3.0).sum(), c)
        assert math.isclose(float(gradient), -(2 * 3 * 2) / (1 + 3 * 4) ** 2, rel_tol=1e-12)


def test_errors_share_the_base() -> None:
    assert issubclass(ops.ConvergenceError, PilotlightError)


def test_arrays_make_operators_and_factors_are_whole() -> None:
    mask = numpy.array([[True, False], [False, True]])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert ops.Mask(mask)(x).tolist() == [1.0, 4.0]
    assert ops.Mask(mask.tolist())(x).tolist() == [1.0, 4.0]
    assert ops.Dense(numpy.array([[1.0, 1.0]]))(x).tolist() == [[3.0], [7.0]]
    for factor in (1.5, 0, "2"):
        with pytest.raises(OptionError, match="factor must be an integer of at least 1"):
            ops.Downsample(factor, (6, 6))  # type: ignore[arg-type]


SHAPED = {
    "CircularBlur": lambda shape: ops.CircularBlur(torch.ones(3, 3) / 9, shape),
    "GaussianBlur": lambda shape: ops.GaussianBlur(1.0, shape),
    "MotionBlur": lambda shape: ops.MotionBlur(3.0, 0.0, shape),
    "VaryingBlur": lambda shape: ops.VaryingBlur(torch.ones(2, 2, 3, 3) / 9, shape),
    "ColourMosaic": lambda shape: ops.ColourMosaic(shape),
    "Downsample": lambda shape: ops.Downsample(2, shape),
    "FourierMask": lambda shape: ops.FourierMask(torch.ones(8, 8, dtype=torch.bool), shape),
    "JPEG": lambda shape: ops.JPEG(shape),
    "PhaseRetrieval": lambda shape: ops.PhaseRetrieval(shape),
    "Radon": lambda shape: ops.Radon(torch.linspace(0, 3, 4), shape),
    "Identity": ops.Identity,
    "Clip": ops.Clip,
    "Mask": lambda shape: ops.Mask(torch.ones(8, dtype=torch.bool), shape),
    "Dense": lambda shape: ops.Dense(torch.eye(8), shape),
    "FunctionOperator": lambda shape: ops.FunctionOperator(torch.exp, shape),
    "wrap": lambda shape: ops.wrap(torch.exp, shape),
    "GaussianSensing": lambda shape: ops.GaussianSensing(2, shape, generator=torch.Generator()),
    "SubsampledCosine": lambda shape: ops.SubsampledCosine(2, shape, generator=torch.Generator()),
    "SubsampledHadamard": lambda shape: ops.SubsampledHadamard(2, shape, generator=torch.Generator()),
}
VECTORS = list(SHAPED)[10:]


@pytest.mark.parametrize("name", SHAPED)
def test_a_whole_number_is_a_vector_and_no_image(name: str) -> None:
    make = SHAPED[name]
    if name in VECTORS:
        assert make(8).in_shape == make([8]).in_shape == (8,)
    else:
        with pytest.raises(ShapeError, match=r"in_shape.*\(8,\)"):
            make(8)
    for bad in ("ab", 8.5, (8, 2.5)):
        with pytest.raises(ShapeError, match="in_shape must be a tuple of whole numbers"):
            make(bad)
