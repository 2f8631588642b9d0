"""Whole problems as Pyro programs, and programs by name: `read_problem("models.programs:inpaint_fashion")`."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inverse.operators import Mask
from models.data import digits, held_out_fashion
from models.zoo import load
from ppl.errors import OptionError, PilotlightError
from ppl.program import Program

__all__ = ["Problem", "digits_unknown_noise", "inpaint_fashion", "read_problem"]


@dataclass(frozen=True)
class Problem:
    """A program and, where its data were made from one, the truth.

    Args:
        program: model and data.
        truth: true values by latent site.
        about: a sentence for a report.
    """

    program: Program
    truth: dict[str, Tensor] = field(default_factory=dict)
    about: str = ""


def inpaint_fashion(
    images: tuple[int, ...] = (29, 14),
    sigma: float = 0.2,
    rows: tuple[int, int] = (2, 18),
    columns: tuple[int, int] = (13, 28),
    seed: int = 0,
) -> Problem:
    """Held-out Fashion-MNIST images with a rectangle hidden and noise on the rest.

    Args:
        images: places in `models.held_out_fashion()`; one problem each.
        sigma: standard deviation of the noise; pixels are in [-1, 1].
        rows: first hidden row and one past the last.
        columns: the same for columns.
        seed: of the noise.

    Returns:
        A program over one problem for each image, whose latent site is "x".

    Example:
        >>> problem = inpaint_fashion(images=(0,))
        >>> list(problem.program.latents), problem.truth["x"].shape
        (['x'], torch.Size([1, 1, 28, 28]))
    """
    all_images, _ = held_out_fashion()
    if not images or not all(0 <= i < len(all_images) for i in images):
        raise OptionError(f"images must be places from 0 to {len(all_images) - 1}, got {tuple(images)}")
    if not sigma > 0:
        raise OptionError(f"sigma must be positive, got {sigma}")
    truth = all_images[list(images)]
    seen = torch.ones(truth.shape[1:], dtype=torch.bool)
    seen[:, slice(*rows), slice(*columns)] = False
    mask = Mask(seen)
    prior = load("fashion28x28", noise_steps=10)

    def inpaint(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(mask(x), sigma).to_event(1), obs=y)

    y = mask(truth)
    y = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    about = (
        f"Held-out Fashion-MNIST images: {1 - mask.out_shape[0] / seen.numel():.0%} of the pixels are hidden, the "
        f"others carry Gaussian noise of standard deviation {sigma:g}. The prior is a diffusion model that was trained "
        "on other images."
    )
    return Problem(Program(inpaint, y[0]).over(y=y), {"x": truth}, about)


def digits_unknown_noise(image: int = 4, sigma: float = 0.4, hidden: int = 3, seed: int = 0) -> Problem:
    """A held-out digit with some rows hidden and noise of a level that is a latent site of its own.

    Args:
        image: place in `models.digits().held_out`.
        sigma: true standard deviation of the noise, which the program does not know; pixels are in [-1, 1].
        hidden: rows in the middle that are not seen, 0 to 7.
        seed: of the noise.

    Returns:
        A program with the latent sites "sigma" and "x".

    Example:
        >>> problem = digits_unknown_noise()
        >>> list(problem.program.latents)
        ['sigma', 'x']
    """
    held_out = digits().held_out
    if not (0 <= image < len(held_out) and 0 <= hidden < 8 and sigma > 0):
        raise OptionError(
            f"expected an image from 0 to {len(held_out) - 1}, 0 to 7 hidden rows and a positive sigma, got {image}, "
            f"{hidden} and {sigma}"
        )
    truth = held_out[image]
    seen = torch.ones(truth.shape, dtype=torch.bool)
    first = (8 - hidden) // 2
    seen[:, first : first + hidden] = False
    mask = Mask(seen)
    prior = load("digits8x8", noise_steps=10)

    def unknown_noise(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(math.log(0.3), 0.7))
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(mask(x), sigma).to_event(1), obs=y)

    y = mask(truth)
    y = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    about = (
        f"A held-out digit with {hidden} of 8 rows hidden, under noise whose level is not known: sigma is an ordinary "
        "site of the program and is inferred together with the image."
    )
    return Problem(Program(unknown_noise, y), {"x": truth, "sigma": torch.tensor(sigma)}, about)


def read_problem(name: str, options: Mapping[str, Any] | None = None) -> Problem:
    """Build a problem from "module:function".

    The function returns a `ppl.Program`, a `Problem`, or (model, data) with one tensor or a tuple of arguments. Modules
    of the working directory are found, after those that are installed.

    Args:
        name: the module's import name, a colon, the function's name.
        options: keyword arguments of the function.

    Raises:
        OptionError: there is no such module or function, or it returns something else.

    Example:
        >>> read_problem("models.programs:digits_unknown_noise", {"hidden": 2}).program
        Program(unknown_noise, latents=['sigma', 'x'], observed=['y'])
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise OptionError(
            f"a program is given as module:function, such as models.programs:inpaint_fashion, got {name!r}"
        )
    if module_name.endswith(".py") or "/" in module_name:
        raise OptionError(
            f"give the module by its import name, {Path(module_name).stem}:{function_name}, not as a file"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's own module asks for is another matter than the one asked for here.
        missing = error.name or module_name
        raise OptionError(f"there is no module {missing!r} (asked for {name!r}, looked in {here} as well)") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = sorted(
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name
        )
        raise OptionError(
            f"module {module_name!r} has no function {function_name!r}; it has {', '.join(public) or 'none'}"
        )
    try:
        made = function(**dict(options or {}))
    except PilotlightError:
        raise
    except TypeError as error:
        raise OptionError(f"{name} cannot be called with {dict(options or {})}: {error}") from error
    return _problem(made, name)


def _problem(made: Any, name: str) -> Problem:
    """What a function returned, as a problem."""
    if isinstance(made, Problem):
        return made
    if isinstance(made, Program):
        return Problem(made)
    if isinstance(made, tuple) and len(made) == 2 and callable(made[0]):
        data = made[1] if isinstance(made[1], tuple) else (made[1],)
        return Problem(Program(made[0], *data))
    raise OptionError(
        f"{name} must return a ppl.Program, a models.programs.Problem or (model, data), got {type(made).__name__}"
    )
