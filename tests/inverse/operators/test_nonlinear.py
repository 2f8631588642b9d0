"""Nonlinear operators: shapes, derivatives and transforms of all; then each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from inverse import operators as ops
from ppl.errors import CapabilityError, DataError, OptionError, ShapeError


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def members() -> dict[str, ops.NonlinearOperator]:
    blur = ops.GaussianBlur(0.8, (4, 5))
    return {
        "phase": ops.PhaseRetrieval((3, 4)),
        "phase_channels": ops.PhaseRetrieval((2, 3, 3), 1.5),
        "phase_squared": ops.PhaseRetrieval((3, 4), squared=True),
        "clip": ops.Clip((2, 3), gain=2.0),
        "saturating": ops.SaturatingBlur(blur, 0.7),
        "gamma": ops.GammaBlur(blur),
        "jpeg": ops.JPEG((2, 8, 8), 30),
        "jpeg_colour": ops.JPEG((3, 8, 16), 30),
        "scattering": ops.MultipleScattering(3, 4.0, 2, 3, orders=2),
        "scattering_all": ops.MultipleScattering(3, 4.0, 2, 3, orders=None),
    }


SMOOTH = [name for name in members() if not name.startswith("jpeg")]


@pytest.mark.parametrize("name", members())
def test_contract(name: str) -> None:
    """Every batch, both precisions, vmap, tracing, and refusals by name."""
    A = members()[name]
    assert not A.linear
    assert A.capabilities == frozenset()
    for dtype in (torch.float64, torch.float32):
        for batch in ((), (1,), (0,), (2, 3)):
            x = randn(*batch, *A.in_shape).to(dtype)
            before, y = x.clone(), A(x)
            assert y.shape == (*batch, *A.out_shape)
            assert y.dtype == dtype
            y.mul_(0)
            assert torch.equal(x, before)
    x = randn(3, *A.in_shape)
    torch.testing.assert_close(torch.stack([A(v) for v in x]), A(x))
    torch.testing.assert_close(torch.func.vmap(A)(x), A(x))
    torch.testing.assert_close(make_fx(lambda v: A(v))(x)(2 * x), A(2 * x))
    assert not ops.probe_linear(A, A.in_shape, torch.Generator().manual_seed(0))
    for verb in (A.adjoint, A.pinv, lambda y: A.solve_gram(y, 1.0, 1.0)):
        with pytest.raises(CapabilityError, match="not linear"):
            verb(A(x))
    for question in (A.dense, A.norm, A.svd):
        with pytest.raises(CapabilityError):
            question()
    with pytest.raises(ShapeError):
        A(randn(*A.in_shape[:-1], A.in_shape[-1] + 1))
    with pytest.raises(DataError):
        A(torch.zeros(A.in_shape, dtype=torch.complex128))
    with pytest.raises(OptionError, match="linear"):
        ops.stack(A, A)


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_agree_with_differences(name: str) -> None:
    A = members()[name]
    x, u = 0.6 * randn(*A.in_shape), randn(*A.in_shape, seed=1)
    h = 1e-5
    slope = (A(x + h * u) - A(x - h * u)) / (2 * h)
    torch.testing.assert_close(torch.func.jvp(A, (x,), (u,))[1], slope, rtol=1e-6, atol=1e-8)
    w = randn(*A.out_shape, seed=2)
    (pulled,) = torch.func.vjp(A, x)[1](w)
    torch.testing.assert_close((pulled * u).sum(), (w * slope).sum(), rtol=1e-6, atol=1e-8)
    lanes = torch.func.vmap(torch.func.grad(lambda v: (w * A(v)).sum()))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(lanes[0], pulled)


def test_a_chain_of_operators_in_one_call_is_not_mistaken_for_linear() -> None:
    with ops.record_calls() as calls:
        ops.SaturatingBlur(ops.GaussianBlur(0.8, (4, 5)))(randn(4, 5))
    assert [type(call.operator) for call in calls] == [ops.SaturatingBlur]


def test_clip_keeps_the_range_and_loses_the_gradient() -> None:
    A = ops.Clip((3,), -1.0, 0.5, gain=2.0)
    x = torch.tensor([-0.7, 0.1, 0.4], dtype=torch.float64)
    torch.testing.assert_close(A(x), torch.tensor([-1.0, 0.2, 0.5], dtype=torch.float64))
    assert torch.func.jacrev(A)(x).diagonal().tolist() == [0.0, 2.0, 0.0]
    with pytest.raises(OptionError, match="low < high"):
        ops.Clip((3,), 1.0, 1.0)
    with pytest.raises(OptionError, match="gain"):
        ops.Clip((3,), gain=-1.0)


def test_saturation_is_linear_for_little_light_and_bounded_for_much() -> None:
    blur = ops.GaussianBlur(0.8, (4, 5))
    A, x = ops.SaturatingBlur(blur, 0.7), randn(4, 5)
    torch.testing.assert_close(A(1e-4 * x) / 1e-4, blur(x), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(A(x), 0.7 * torch.tanh(blur(x) / 0.7))
    with pytest.raises(OptionError, match="level"):
        ops.SaturatingBlur(blur, 0.0)
    with pytest.raises(OptionError, match="linear operator"):
        ops.SaturatingBlur(A)


def test_gamma_blur_blurs_light() -> None:
    blur = ops.GaussianBlur(0.8, (4, 5))
    A = ops.GammaBlur(blur, 2.2, toe=1e-6)
    x = 2 * torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    expected = 2 * blur(((x + 1) / 2) ** 2.2) ** (1 / 2.2) - 1
    torch.testing.assert_close(A(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ops.GammaBlur(blur, 1.0)(x), blur(x))  # sum-one kernels keep the offset
    assert float((A(x) - blur(x)).mean()) > 0.01  # bright light dominates the mean of light
    # Both curves are continuous at the toe, invert each other, and go on below black.
    A = ops.GammaBlur(ops.Identity((101,)), 2.2, low=0.0, high=1.0, toe=0.1)
    ramp = torch.linspace(-0.2, 1.1, 101, dtype=torch.float64)
    torch.testing.assert_close(A(ramp), ramp)
    light = A._decode(ramp)
    assert float(light.diff().min()) > 0
    assert float(light.diff().max()) < 2.2 * 1.1**1.2 * 0.0131
    for bad in ({"gamma": 0.5}, {"toe": 0.0}, {"low": 1.0}):
        with pytest.raises(OptionError):
            ops.GammaBlur(blur, **bad)


@pytest.mark.parametrize("name", ["phase", "phase_channels", "phase_squared"])
def test_magnitudes_by_their_definition_and_their_symmetries(name: str) -> None:
    A = members()[name]
    assert isinstance(A, ops.PhaseRetrieval)
    x = randn(*A.in_shape)
    h, w, (H, W) = *A.in_shape[-2:], A.out_shape[-2:]
    padded = torch.zeros(*A.in_shape[:-2], H, W, dtype=torch.float64)
    padded[..., :h, :w] = x
    magnitude = (torch.fft.fft2(padded) / math.sqrt(H * W)).abs()
    torch.testing.assert_close(A(x), magnitude.square() if A.squared else magnitude)
    for other in A.equivalents(x):
        torch.testing.assert_close(A(other), A(x))
    # Other images are told apart: the four are all that is hidden here.
    assert not torch.allclose(A(x.flip(-1)), A(x), atol=1e-3)
    assert len({tuple(e.flatten().tolist()) for e in A.equivalents(x)}) == 4


def test_alignment_undoes_every_symmetry() -> None:
    A = ops.PhaseRetrieval((2, 3, 4))
    x = randn(2, 3, 4)
    torch.testing.assert_close(A.align(A.equivalents(x), x), x.expand(4, 2, 3, 4))
    mixed = torch.stack([-x[0], x[1].flip(-2, -1)])
    torch.testing.assert_close(A.align(mixed, x), x)


def test_a_dark_frequency_has_a_gradient_of_zero() -> None:
    A = ops.PhaseRetrieval((2, 2))
    for x in (torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)):
        gradient = torch.func.grad(lambda v: A(v).sum())(x)
        assert bool(torch.isfinite(gradient).all())
    assert gradient.abs().sum() > 0
    with pytest.raises(OptionError, match="oversampling"):
        ops.PhaseRetrieval((2, 2), 0.5)
    with pytest.raises(ShapeError, match="height"):
        ops.PhaseRetrieval((2,))


def image(*shape: int) -> torch.Tensor:
    """A smooth picture of integers between 40 and 215, so that nothing is clipped."""
    t = [torch.arange(n, dtype=torch.float64) for n in shape[-2:]]
    base = 128 + 60 * torch.sin(t[0][:, None] / 5) * torch.cos(t[1] / 7)
    shades = torch.stack([base.roll(3 * c, -1) for c in range(3)]) if len(shape) == 3 else base
    return (shades + 8 * randn(*shape)).round().clamp(40, 215)


@pytest.mark.parametrize(
    ("shape", "quality"), [((48, 64), q) for q in (10, 50, 90)] + [((3, 48, 64), q) for q in (10, 50)]
)
def test_jpeg_agrees_with_the_reference_software(shape: tuple[int, ...], quality: int) -> None:
    """What Pillow (libjpeg) writes and reads back differs by its integer arithmetic only.

    A coefficient near a half may fall to the other side and move its block, more so in colour, where YCbCr is rounded
    to integers first. So blocks are counted, and the difference is held against what compression does: a transposed
    table moves every block, and by 0.4 of that or more.
    """
    import io

    pillow = pytest.importorskip("PIL.Image")
    levels = image(*shape)
    pixels = levels.to(torch.uint8)
    picture = pillow.fromarray((pixels if len(shape) == 2 else pixels.permute(1, 2, 0)).contiguous().numpy())
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    back = torch.frombuffer(bytearray(pillow.open(file).tobytes()), dtype=torch.uint8).double()
    back = back.reshape(48, 64) if len(shape) == 2 else back.reshape(48, 64, 3).permute(2, 0, 1)
    found = ops.JPEG(shape, quality, low=0.0, high=255.0)(levels)
    error = (found.round().clamp(0, 255) - back).abs()
    same = error.reshape(-1, 6, 8, 8, 8).amax((0, 2, 4)) <= (1 if len(shape) == 2 else 3)
    assert float(same.double().mean()) > 0.6
    assert float(error.mean()) < (0.15 if len(shape) == 2 else 0.25) * float((levels - back).abs().mean())


def test_jpeg_is_a_projection_onto_its_codes() -> None:
    """A decoded picture is coded again without loss, and quality 100 rounds to about one grey level."""
    x = image(16, 16) / 127.5 - 1
    A = ops.JPEG((16, 16), 40)
    torch.testing.assert_close(A(A(x)), A(x))
    fine = ops.JPEG((16, 16), 100)
    assert float((fine(x) - x).abs().max()) < 2.5 / 127.5
    assert float((A(x) - x).abs().max()) > 5 / 127.5


def test_rounding_lets_gradients_through() -> None:
    """The surrogate derivative is the identity: reverse, forward and inside a traced graph."""
    A = ops.JPEG((3, 8, 8), 20)
    x, w = randn(3, 8, 8), randn(3, 8, 8, seed=1)

    def score(v: torch.Tensor) -> torch.Tensor:
        return (w * A(v)).sum()

    torch.testing.assert_close(torch.func.grad(score)(x), w)
    torch.testing.assert_close(torch.func.jvp(A, (x,), (w,))[1], w)
    torch.testing.assert_close(torch.func.grad(make_fx(score)(x))(x), w)
    torch.testing.assert_close(ops.round_through(3 * x), (3 * x).round())
    with pytest.raises(OptionError, match="quality"):
        ops.JPEG((8, 8), 0)
    with pytest.raises(ShapeError, match="divisible by 8"):
        ops.JPEG((8, 12))


def cylinder(size: int, contrast: float, radius: float, wavenumber: float, receivers: int) -> float:
    """Relative error of the scattered wave of a disc against its exact series of cylinder waves."""
    from scipy import special

    sub = 8
    fine = (torch.arange(size * sub, dtype=torch.float64) + 0.5) / (size * sub) - 0.5
    disc = (fine[:, None].square() + fine.square() <= radius**2).double()
    x = contrast * torch.nn.functional.avg_pool2d(disc[None], sub)[0]
    A = ops.MultipleScattering(size, wavenumber, 1, receivers, radius=0.9, orders=None)
    found = torch.view_as_complex(A(x)).squeeze(0)
    k, k1, angle = wavenumber, wavenumber * math.sqrt(1 + contrast), torch.arange(receivers) * (2 * math.pi / receivers)
    exact = torch.zeros(receivers, dtype=torch.complex128)
    for n in range(-25, 26):
        j, jp = special.jv(n, k * radius), special.jvp(n, k * radius)
        j1, j1p = special.jv(n, k1 * radius), special.jvp(n, k1 * radius)
        h, hp = special.hankel1(n, k * radius), special.h1vp(n, k * radius)
        a = (k * jp * j1 - k1 * j * j1p) / (k1 * h * j1p - k * hp * j1)
        exact += complex(1j**n * a * special.hankel1(n, k * 0.9)) * torch.exp(1j * n * angle.double())
    return float((found - exact).abs().max() / exact.abs().max())


def test_full_scattering_agrees_with_the_exact_wave_of_a_cylinder() -> None:
    """Strong contrast, where Born is far off; the error of the pixels shrinks."""
    coarse, fine = cylinder(12, 0.8, 0.3, 6.0, 9), cylinder(28, 0.8, 0.3, 6.0, 9)
    assert fine < 0.01
    assert fine < coarse / 2


def test_each_order_removes_a_power_of_the_contrast() -> None:
    """||A_m(e x) - A(e x)|| ~ e^(m + 1): halving e divides the error by 2^(m + 1); order 1 is Born."""
    x = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    geometry = {"size": 5, "wavenumber": 5.0, "transmitters": 3, "receivers": 4}
    exact = ops.MultipleScattering(**geometry, orders=None)
    born = ops.BornScattering(**geometry)
    torch.testing.assert_close(born(x), ops.MultipleScattering(**geometry, orders=1)(x))
    for orders in (1, 2, 3):
        A = ops.MultipleScattering(**geometry, orders=orders)
        error = [float((A(e * x) - exact(e * x)).norm()) for e in (0.02, 0.01)]
        assert abs(math.log2(error[0] / error[1]) - (orders + 1)) < 0.05


def test_sources_and_receivers_may_be_exchanged() -> None:
    """Reciprocity: far away, the wave from s heard at r is that from the opposite of r heard opposite of s."""
    x = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.view_as_complex(ops.MultipleScattering(6, 5.0, 4, 4, radius=1e4, orders=None)(x))
    opposite = torch.tensor([2, 3, 0, 1])
    torch.testing.assert_close(y, y[opposite][:, opposite].T, rtol=0, atol=2e-3 * float(y.abs().max()))
    assert not torch.allclose(y, y.T, rtol=0, atol=2e-2 * float(y.abs().max()))


def test_scattering_refuses_what_is_no_experiment() -> None:
    with pytest.raises(OptionError, match="outside"):
        ops.BornScattering(4, 3.0, radius=0.5)
    with pytest.raises(OptionError, match="wavenumber"):
        ops.BornScattering(4, 0.0)
    with pytest.raises(OptionError, match="orders"):
        ops.MultipleScattering(4, 3.0, orders=0)
    with pytest.raises(OptionError, match="64 pixels"):
        ops.MultipleScattering(65, 3.0)
    with pytest.raises(OptionError, match="one or more"):
        ops.BornScattering(4, 3.0, transmitters=0)
