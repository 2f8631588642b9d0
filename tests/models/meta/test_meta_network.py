"""Any torch module as an episode network, and the modules that cannot be one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.meta import (
    MAML,
    Bernoulli,
    Categorical,
    Episodes,
    Fisher,
    Gaussian,
    Hierarchy,
    Network,
    NIWMeta,
    NormalInverseGamma,
    mlp,
)
from ppl.errors import DataError, OptionError, ProgramError, ShapeError


class Pair(nn.Module):
    """Returns two things."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class Noisy(nn.Module):
    """Draws in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + torch.randn_like(x)


class Centred(Noisy):
    """Looks at all points."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) * self.weight


class Counting(Noisy):
    """Changes a buffer in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * self.weight


def hierarchy(network: Network, likelihood: object = None) -> Hierarchy:
    prior = NormalInverseGamma.around(network.start, 0.1, 3.0, 1.0)
    return Hierarchy(network, likelihood or Gaussian(1.0), prior)  # type: ignore[arg-type]


def episodes() -> Episodes:
    return Episodes(torch.randn(3, 4, 1), torch.randn(3, 4))


def labels(value: int, way: int | None = None) -> Episodes:
    x, y = torch.ones(3, 4, 1), torch.full((3, 4), value)
    return Episodes(x, y, x, y, way=way)


def classes(outputs: int) -> Hierarchy:
    return hierarchy(mlp([1, outputs]), Categorical())


def test_the_module_with_its_own_parameters() -> None:
    """theta = start gives the module's outputs, also for convolutions and many episodes at once."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(2 * 4, 3))
    network = Network(module)
    x = torch.randn(5, 7, 1, 4, 4)
    outputs = network(network.start.expand(5, -1), x)
    assert torch.allclose(outputs, torch.stack([module(v) for v in x]), atol=1e-5)


def test_evaluation_mode_is_allowed() -> None:
    """Frozen statistics and switched-off dropout are functions of theta and x."""
    module = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).eval()
    assert hierarchy(Network(module)).program(episodes()).flat().dim > 0


@pytest.mark.parametrize(
    ("words", "make"),
    [
        (r"BatchNorm1d.*module.eval", lambda: Network(nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)))),
        (r"Dropout.*module.eval", lambda: Network(nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.1)))),
        ("no parameters", lambda: Network(nn.ReLU())),
        ("torch module", lambda: Network(torch.tanh)),  # type: ignore[arg-type]
        ("random", lambda: hierarchy(Network(Noisy())).program(episodes())),
        ("other points", lambda: hierarchy(Network(Centred())).program(episodes())),
        ("buffers", lambda: hierarchy(Network(Counting())).program(episodes())),
    ],
)
def test_modules_that_are_no_function(words: str, make: object) -> None:
    """Buffers that change, dropout and noise have one clear error with a cure."""
    with pytest.raises(ProgramError, match=words):
        make()  # type: ignore[operator]


def test_a_refused_call_leaves_buffers_as_they_were() -> None:
    """The probe does not count."""
    module = Counting()
    with pytest.raises(ProgramError):
        hierarchy(Network(module)).program(episodes())
    assert float(module.calls) == 0


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (OptionError, "sigma", lambda: Gaussian(0.0)),
        (
            DataError,
            "floating",
            lambda: hierarchy(mlp([1, 2])).program(Episodes(torch.ones(1, 2, 1), torch.tensor([[0, 1]]))),
        ),
        (DataError, "0 or 1", lambda: hierarchy(mlp([1, 1]), Bernoulli()).program(episodes())),
        (DataError, "integers", lambda: hierarchy(mlp([1, 2]), Categorical()).program(episodes())),
        (OptionError, "batch", lambda: hierarchy(mlp([1, 1])).program(episodes(), batch=9)),
        (ShapeError, "coordinates", lambda: Hierarchy(mlp([1, 1]), Gaussian(), hierarchy(mlp([2, 1])).prior)),
        (ShapeError, r"cannot take points \(4, 1\)", lambda: hierarchy(mlp([2, 1])).program(episodes())),
        (ShapeError, "a tuple", lambda: hierarchy(Network(Pair())).program(episodes())),
        (ShapeError, r"targets \(4, 2\)", lambda: hierarchy(mlp([1, 2])).program(episodes())),
        (DataError, "targets from 2 to 2.*2 outputs", lambda: hierarchy(mlp([1, 2]), Categorical()).program(labels(2))),
        (DataError, "targets from 2 to 2", lambda: NIWMeta(Fisher(1), steps=1).fit(classes(2), labels(2, way=3))),
        (DataError, "targets from 2 to 2", lambda: MAML(steps=1).fit(mlp([1, 2]), Categorical(), labels(2, way=3))),
        (ShapeError, "one type", lambda: hierarchy(mlp([1, 1])).program(episodes().to(dtype=torch.float64))),
    ],
)
def test_what_does_not_fit(error: type[Exception], words: str, make: object) -> None:
    """Targets, dimensions, types and batches are checked before anything runs."""
    with pytest.raises(error, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.7), Gaussian(0.7, scalar=False), Bernoulli(), Categorical()], ids=repr
)
def test_curvature_is_that_of_the_law(likelihood: object) -> None:
    """Slope by autograd, and root times its transpose equal to the expected outer product of slopes."""
    generator = torch.Generator().manual_seed(0)
    k = {"Categorical": 3, "Gaussian": 1 if getattr(likelihood, "scalar", True) else 2}.get(
        type(likelihood).__name__, 1
    )
    outputs = torch.randn(4, k, dtype=torch.float64, generator=generator)
    y = {"Categorical": torch.tensor([0, 2, 1, 1]), "Bernoulli": torch.tensor([0.0, 1, 1, 0])}.get(
        type(likelihood).__name__, torch.randn(4, dtype=torch.float64, generator=generator)
    )
    if getattr(likelihood, "scalar", True) is False:
        y = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    slope, half = likelihood.curvature(outputs, y)  # type: ignore[attr-defined]
    at = outputs.clone().requires_grad_()
    (exact,) = torch.autograd.grad(-likelihood.law(at).log_prob(y).sum(), at)  # type: ignore[attr-defined]
    assert torch.allclose(slope, exact)
    curvature = torch.autograd.functional.hessian(
        lambda o: -likelihood.law(o).log_prob(y).sum(),  # type: ignore[attr-defined]
        outputs,
    )
    for i in range(4):
        assert torch.allclose(half[i] @ half[i].mT, curvature[i, :, i, :], atol=1e-7)


def test_ragged_points_do_not_count() -> None:
    """A padded point changes neither the density nor what the closed form makes of the episode."""
    from models.meta import GaussNewton
    from models.meta.local import close

    network = mlp([1, 3, 1])
    model = hierarchy(network)
    sizes = (4, 2)
    sets = [(torch.randn(n, 1), torch.randn(n)) for n in sizes]
    both = Episodes.ragged(sets)
    theta = network.start.expand(2, -1)
    losses = model.losses(theta, both.points)
    generator = torch.Generator().manual_seed(0)
    law = model.prior
    together = close(GaussNewton()(model, law, both.points, None, generator), law.mean, law.precision())
    for i in range(2):
        alone = Episodes(sets[i][0][None], sets[i][1][None]).points
        assert torch.allclose(model.losses(theta[:1], alone)[0], losses[i], rtol=1e-5)
        one = close(GaussNewton()(model, law, alone, None, generator), law.mean, law.precision())
        assert torch.allclose(one.mean[0], together.mean[i], atol=1e-4)
        assert torch.allclose(one.variance[0], together.variance[i], atol=1e-4)
    program = model.program(both)
    site = {n: program.first_values[n] for n in program.latents}
    assert torch.isfinite(program.log_joint({n: v[None] for n, v in site.items()})).all()
