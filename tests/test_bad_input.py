"""Bad input through the front door: one error of the right class that says what was expected, what came and what to do.

Tested elsewhere, where the code lies:

    no latent site, no model, wrong arguments            tests/ppl/test_program.py
    NaN or infinite data, data outside a support         tests/ppl/test_program.py
    branching on a value, named, and its loop            tests/ppl/test_program.py, tests/ppl/test_graph.py
    data far outside the prior predictive                tests/ppl/test_program.py (check), tests/test_cli.py (warning)
    corrupted and foreign weight files                   tests/models/test_zoo.py
    shadowed package names                               tests/test_cli.py
    memory: groups shrink, and only then an error        tests/inverse/samplers/test_guided_samplers.py
    values out of range of every option                  beside each backend
    nuisance latents without a block                     tests/inverse/samplers/test_guided_samplers.py
    data on another device than the prior                tests/test_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import ppl
from models.references import gaussian_problem
from ppl.backend import registered
from ppl.errors import CapabilityError, DataError, OptionError, PilotlightError, ProgramError, ShapeError
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
PRIOR = GaussianMixture(ONE, torch.zeros(1, 3, dtype=F64), ONE)
GENERIC = [ppl.NUTS(warmup=10), ppl.HMC(warmup=20), ppl.EllipticalSlice(warmup=2), ppl.SVI(steps=3)]
GUIDED = [
    inverse.DPS(steps=3),
    inverse.PiGDM(steps=3),
    inverse.MomentMatching(steps=3),
    inverse.TwistedSMC(steps=3),
    inverse.REDDiff(steps=3),
]


def names(values: list[Any]) -> list[str]:
    return [type(value).__name__ for value in values]


def says(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    """The message holds all of these: what was expected, what came, what to do."""
    text = str(error.value)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} are missing in: {text}"


def test_every_error_is_one_tree() -> None:
    from ppl import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) > 8
    for kind in kinds:
        assert issubclass(kind, PilotlightError)
        assert kind is PilotlightError or issubclass(kind, (ValueError, RuntimeError))


def test_no_observed_site() -> None:
    program = ppl.Program(lambda: pyro.sample("mu", dist.Normal(0.0, 1.0)))
    with pytest.raises(ProgramError) as error:
        ppl.infer(program, ppl.NUTS())
    says(error, "no observed site", "obs=", "simulate")


def test_something_else_than_a_program_or_a_backend() -> None:
    program = gaussian_problem(0.3, dim=2, observations=1).program
    with pytest.raises(OptionError) as error:
        ppl.infer(program.model, ppl.NUTS())  # type: ignore[arg-type]
    says(error, "ppl.Program", "function", "wrap the model")
    with pytest.raises(OptionError) as error:
        ppl.infer(program, inverse.Exact)  # type: ignore[arg-type]
    says(error, "the class Exact", "Exact()")
    with pytest.raises(OptionError) as error:
        ppl.infer(program, inverse.Exact(), draws=0)
    says(error, "draws", "at least 1", "got 0")


def test_data_of_another_shape_than_the_operator_gives() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    with pytest.raises(ShapeError) as error:
        ppl.Program(model, torch.zeros(2, 3, dtype=F64))
    says(error, "'y'", "(2, 3)", "(3,)", "reshape")


def test_data_of_another_type_than_the_prior() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    with pytest.raises(DataError) as error:
        ppl.Program(model, torch.zeros(3, dtype=torch.float32))
    says(error, "'x'", "float64", "float32", ".to(")


@pytest.mark.parametrize("name", ["draws", "chains", "seed"])
def test_counts_that_are_no_integers(name: str) -> None:
    program = gaussian_problem(0.3, dim=2, observations=1).program
    for value in (2.5, "10", True, 2**70 if name == "seed" else 0):
        with pytest.raises(OptionError) as error:
            ppl.infer(program, inverse.Exact(), **{name: value})  # type: ignore[arg-type]
        says(error, f"{name} must be an integer of at least", f"got {value!r}")
    counts: Any = {"draws": 3, "chains": 2, "seed": 4}
    arrays: Any = {n: numpy.int64(v) for n, v in counts.items()}
    as_array = ppl.infer(program, inverse.Exact(), **arrays)
    assert torch.equal(as_array["x"], ppl.infer(program, inverse.Exact(), **counts)["x"])


def test_options_of_a_run_that_are_no_options(tmp_path: Path) -> None:
    program = gaussian_problem(0.3, dim=2, observations=1).program
    with pytest.raises(OptionError, match="callback must be a function of an Event, got 3"):
        ppl.infer(program, inverse.Exact(), callback=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="checkpoint_every must be zero or more seconds, got 'a'"):
        ppl.infer(program, inverse.Exact(), checkpoint=tmp_path / "c", checkpoint_every="a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"device": "gpu"}, ("'gpu'", "cpu")),
        ({"device": torch.float64}, ("no device torch.float64", "write dtype=")),
        ({"dtype": "float64"}, ("'float64'", "such as torch.float64")),
        ({"dtype": torch.int64}, ("floating type", "int64")),
    ],
    ids=str,
)
def test_moving_to_no_place(place: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as error:
        gaussian_problem(0.3, dim=2, observations=1).program.to(**place)
    says(error, *words)


def test_two_sites_of_one_name() -> None:
    def model(y: Tensor) -> None:
        for _ in range(2):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ProgramError) as error:
        ppl.Program(model, torch.tensor(1.0))
    says(error, "two sites", "'mu'", 'pyro.sample(f"x_{i}"')
    assert "Trace Shapes" not in str(error.value)


def test_a_plate_of_no_data() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ProgramError) as error:
        ppl.Program(model, torch.zeros(0))
    says(error, "a plate of the model is empty", "'y' has shape (0,)", "at least one")


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def test_covariates_that_are_not_finite() -> None:
    with pytest.raises(ProgramError) as error:
        ppl.Program(regression, torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), torch.ones(2))
    says(error, "arguments 'x'", "NaN or infinite", "remove them")
    assert "Trace Shapes" not in str(error.value)


def test_arguments_of_floating_types_that_do_not_go_together() -> None:
    with pytest.raises(DataError) as error:
        ppl.Program(regression, torch.ones(3, 2), torch.ones(3, dtype=F64))
    says(error, "'x': torch.float32", "'y': torch.float64", ".to(torch.float64)")


def test_simulate_and_predict_without_what_they_need() -> None:
    program = gaussian_problem(0.3, dim=2, observations=1).program
    with pytest.raises(OptionError) as error:
        program.simulate(0)  # type: ignore[arg-type]
    says(error, "torch.Generator", "got 0", "manual_seed")
    with pytest.raises(OptionError) as error:
        program.simulate(torch.Generator(), 0)
    says(error, "size", "at least 1", "got 0")
    for found, word in (({"x": torch.zeros(1, 2)}, "dict"), (ppl.Posterior({"z": torch.zeros(1, 2)}), "'z'")):
        with pytest.raises(OptionError) as error:
            program.predict(found)  # type: ignore[arg-type]
        says(error, "ppl.Posterior", "'x'", word)


@pytest.mark.parametrize("backend", GENERIC, ids=names(GENERIC))
def test_discrete_latent_for_an_engine_that_needs_gradients(backend: Any) -> None:
    """Counts cannot be summed out."""

    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    with pytest.raises((ProgramError, CapabilityError)) as error:
        ppl.infer(ppl.Program(model, torch.tensor(2.0)), backend, draws=4)
    says(error, "'k'", "discrete")


@pytest.mark.parametrize(
    "backend", [*GENERIC[:3], ppl.Pyro(pyro.infer.NUTS)], ids=[*names(GENERIC[:3]), "Pyro"]
)  # SVI takes them
def test_subsampled_plate_for_an_engine_that_needs_one_density(backend: Any) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ProgramError) as error:
        ppl.infer(ppl.Program(model, torch.zeros(5)), backend, draws=4)
    says(error, "'rows'", "2 of 5", "ppl.SVI")


@pytest.mark.parametrize("backend", GUIDED, ids=names(GUIDED))
def test_program_without_a_denoiser_for_a_guided_backend(backend: Any) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(CapabilityError) as error:
        ppl.infer(ppl.Program(model, torch.tensor(2.0)), backend, draws=4)
    says(error, type(backend).__name__, "denoiser", "'mu'", "NUTS")


@pytest.mark.parametrize("backend", GENERIC, ids=names(GENERIC))
def test_diffusion_site_for_a_generic_engine(backend: Any) -> None:
    program = gaussian_problem(0.3, dim=3, observations=2).program
    with pytest.raises(CapabilityError) as error:
        ppl.infer(program, backend, draws=4)
    says(error, type(backend).__name__, "noise space", "ppl.NoiseSpace(engine)", "TwistedSMC")
    with pytest.raises(ProgramError) as late:
        program.flat()
    says(late, "'x'", "ppl.NoiseSpace")


CLOSED = [inverse.PiGDM(steps=3), inverse.MomentMatching(steps=3), inverse.Exact(), inverse.TwistedSMC(steps=3)]


@pytest.mark.parametrize("backend", CLOSED, ids=names(CLOSED))
def test_likelihood_that_is_not_gaussian_or_not_linear(backend: Any) -> None:
    """Counts of an exponential, then a square: both named, with a backend that takes them."""

    def counts(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    def squares(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x.square(), 0.5).to_event(1), obs=y)

    for model, word in ((counts, "Poisson"), (squares, "linear")):
        with pytest.raises(CapabilityError) as error:
            ppl.infer(ppl.Program(model, torch.ones(3, dtype=F64)), backend, draws=4)
        says(error, word, "Gaussian", "inverse.DPS")


@pytest.mark.parametrize("sigma", [0.0, -0.2])
@pytest.mark.parametrize("backend", [inverse.PiGDM(steps=3), inverse.TwistedSMC(steps=3)], ids=["PiGDM", "TwistedSMC"])
def test_noise_level_of_zero_or_below(backend: Any, sigma: float) -> None:
    def model(y: Tensor, sigma: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)

    with pytest.raises((DataError, ProgramError)) as error:
        ppl.infer(ppl.Program(model, torch.ones(3, dtype=F64), torch.tensor(sigma, dtype=F64)), backend, draws=4)
    says(error, f"{sigma:g}".removesuffix(".0"))
    assert any(word in str(error.value) for word in ("positive", "GreaterThan"))


def test_an_operator_that_torch_cannot_follow() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", PRIOR)
        doubled = torch.from_numpy(2 * numpy.asarray(x.detach()))
        pyro.sample("y", dist.Normal(doubled, 0.5).to_event(1), obs=y)

    for backend in (inverse.DPS(steps=3), inverse.PiGDM(steps=3)):
        with pytest.raises(CapabilityError) as error:
            ppl.infer(ppl.Program(model, torch.ones(3, dtype=F64)), backend, draws=4)
        says(error, "'y'", "differentiated by torch", "without numpy")


@pytest.mark.parametrize("value", [2.5, "3", 0, True])
def test_steps_and_particles_that_are_no_numbers_of_them(value: Any) -> None:
    cases: list[tuple[Callable[..., Any], str]] = [
        (inverse.TwistedSMC, "steps"),
        (inverse.TwistedSMC, "particles"),
        (inverse.MCGdiff, "steps"),
        (inverse.DPS, "steps"),
    ]
    for make, name in cases:
        with pytest.raises(OptionError, match=rf"{name} must be .* integer.*, got {value!r}"):
            make(**{name: value})


@pytest.mark.parametrize(
    "name", sorted(n for n, c in registered().items() if c.__module__.startswith(("ppl", "inverse")))
)
def test_unknown_option(name: str) -> None:
    """Python's own error names the class and the option."""
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'stepz'"):
        registered()[name](stepz=3)


def test_unknown_option_as_text() -> None:
    from ppl.backend_text import backend_from_text

    with pytest.raises(OptionError) as error:
        backend_from_text("TwistedSMC(stepz=3)", {"inverse": inverse})
    says(error, "stepz", "steps", "particles")
    with pytest.raises(OptionError) as error:
        backend_from_text("TwistedSMV()", {"inverse": inverse})
    says(error, "TwistedSMV", "TwistedSMC")


def test_a_denoiser_that_returns_another_shape() -> None:
    prior = DiffusionPrior(lambda x, sigma: x.mean(-1), (3,), sigma_max=5.0, dtype=F64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match="denoiser returned shape"):
        ppl.Program(model, torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    "make",
    [lambda: ppl.HMC(warmup=60), lambda: ppl.NUTS(warmup=60), lambda: ppl.SVI(steps=100)],
    ids=["HMC", "NUTS", "SVI"],
)
def test_support_that_depends_on_another_site_simply_works(make: Callable[[], Any]) -> None:
    """x is uniform on (0, width) for a width that is inferred as well: every draw keeps to its own bound."""

    def model(y: Tensor) -> None:
        width = pyro.sample("width", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        x = pyro.sample("x", dist.Uniform(0.0, width))
        pyro.sample("y", dist.Normal(x, 0.3), obs=y)

    posterior = ppl.infer(ppl.Program(model, torch.tensor(0.8, dtype=F64), compile="never"), make(), draws=60, chains=2)
    assert bool(((posterior["x"] > 0) & (posterior["x"] < posterior["width"])).all())
    assert float(posterior["x"].max()) > 0.9 > 0.5 > float(posterior["x"].min())


def test_wild_points_in_noise_space_have_no_density() -> None:
    """A trajectory that diverges is rejected there; it does not end the run."""
    flat = gaussian_problem(0.3, dim=2, observations=1).program.noise_space().flat()
    z = torch.tensor([[0.1, 0.2], [torch.inf, 0.0], [torch.nan, 0.0], [1e300, 0.0]], dtype=F64)
    value, gradient = flat.log_density_and_grad(z)
    assert bool(value[0].isfinite())
    assert bool((value[1:] == -torch.inf).all())
    assert bool(gradient[0].isfinite().all())
