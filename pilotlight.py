"""The command line: `pilotlight demo`, `infer`, `compare`, `train`, `priors`; and the version."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "version"]

EXAMPLES = {
    "": """examples:
  pilotlight demo
  pilotlight infer models.programs:digits_unknown_noise --backend "ppl.NoiseSpace(ppl.SVI(steps=300))" --draws 200
  pilotlight compare models.programs:inpaint_fashion --backends "inverse.PiGDM(steps=50)" "inverse.REDDiff(steps=50)"
  pilotlight priors""",
    "demo": """examples:
  pilotlight demo
  pilotlight demo --output results --seed 1
  pilotlight demo --full                  more draws and steps, with Hamiltonian Monte Carlo; takes an hour or more
  pilotlight demo --smoke                 a few steps, to see that everything works""",
    "infer": """examples:
  pilotlight infer models.programs:inpaint_fashion --backend inverse.PiGDM --option steps=50 --draws 64
  pilotlight infer models.programs:inpaint_fashion --set "images=(3,)" --set sigma=0.05 \\
      --backend "inverse.TwistedSMC(steps=50, runs=1)" --draws 64 --out posterior.nc
  pilotlight infer my_module:my_problem --backend ppl.NUTS --draws 1000 --chains 4 --checkpoint run
  pilotlight infer models.programs:digits_unknown_noise \\
      --backend "ppl.NoiseSpace(ppl.SVI(guide=ppl.LowRank(8)))" --option engine.steps=300
  pilotlight infer my_module:my_problem --backend amortised.safetensors --option correct=True

The function returns a ppl.Program, or (model, data). A file of `pilotlight train --program` is a backend too. A run
that was stopped goes on from its --checkpoint.""",
    "compare": """examples:
  pilotlight compare models.programs:inpaint_fashion --draws 64 --html report.html \\
      --backends "DPS, 200 steps: inverse.DPS(steps=200)" "inverse.PiGDM(steps=50)" "inverse.REDDiff(steps=50)"
  pilotlight compare my_module:my_problem --backends ppl.NUTS "ppl.SVI(guide=ppl.FullRank())" --save results

A text before a colon is the name in the table. Ctrl-C keeps the backends that are finished.""",
    "train": """examples:
  pilotlight train digits --out priors
  pilotlight train fashion --out priors --device cuda
  pilotlight train digits --steps 500     a short run, to see that it works
  pilotlight train --program my_module:my_problem --out amortised.safetensors
  pilotlight train --program my_module:my_problem --option width=256 --option depth=4 --steps 8000
  pilotlight train --program my_module:my_problem --backend ppl.DistributionTransformer --option components=3
  pilotlight train --program my_module:my_problem --start amortised.safetensors --out better.safetensors

A run that was stopped goes on from its checkpoint. Then: models.load("digits8x8", folder="priors"). With --program,
a denoiser or a transformer is trained on simulations of the program, for any data: pilotlight infer --backend FILE""",
    "priors": """examples:
  pilotlight priors
  pilotlight priors digits8x8             everything that is known about one""",
}
RECIPES = {"digits": "digits8x8", "fashion": "fashion28x28"}


def version() -> str:
    """Version of the installed distribution.

    Example:
        >>> version()[0].isdigit()
        True
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("pilotlight")
    except PackageNotFoundError:
        return "0+not.installed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those of the command line when None.

    Returns:
        0; 1 when a run was interrupted before it had anything; 2 for errors of use; 130 when a result is incomplete.
    """
    options = _parser().parse_args(arguments)
    if options.command is None:
        _parser().print_help()
        return 0
    try:
        _check_names()
        from ppl.errors import PilotlightError
    except _Shadowed as error:
        print(f"pilotlight: {error}", file=sys.stderr)
        return 2
    try:
        from models import commands

        return int(getattr(commands, options.command)(options) or 0)
    except (PilotlightError, FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError) as error:
        print(f"pilotlight: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pilotlight: interrupted before there was a result", file=sys.stderr)
        return 1


class _Shadowed(RuntimeError):
    """One of our package names leads to somebody else's package."""


def _check_names() -> None:
    """Raise where `ppl`, `sde`, `inverse` or `models` would be other packages than those installed with this file."""
    here = Path(__file__).resolve().parent
    from importlib.util import find_spec

    # ppl itself may be another package, so its own check can be used only once it is known to be ours.
    spec = find_spec("ppl")
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != here / "ppl":
        found = None if spec is None else spec.origin or list(spec.submodule_search_locations or ())
        raise _Shadowed(
            f"`import ppl` would load {found}, expected {here / 'ppl'}; rename or move the other package, start in "
            "another directory, or use a fresh virtual environment"
        )
    from ppl.shadow import message, shadowed

    wrong = shadowed(here)
    if wrong:
        raise _Shadowed(message(wrong, here))


def _parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _make(argparse.ArgumentParser, "", "Posteriors from diffusion priors in Pyro programs.", prog="pilotlight")
    parser.add_argument("--version", action="version", version=f"pilotlight {version()}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        sub = _make(commands.add_parser, name, about, name, help=about)
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    demo = command("demo", "five backends on one program, and a program with unknown noise, as a page")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results (default: demo)")
    size = demo.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="more draws and steps")
    size.add_argument("--smoke", action="store_true", help="a few steps only")
    demo.add_argument("--seed", type=int, default=0)

    infer = command("infer", "run one backend on a program")
    infer.add_argument(
        "--backend", required=True, help="such as inverse.TwistedSMC, with options in brackets if wanted"
    )
    infer.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the backend")
    infer.add_argument("--checkpoint", type=Path, help="folder to store the run in while it runs, and to go on from")
    infer.add_argument("--out", type=Path, help="netCDF file of the posterior")
    compare = command("compare", "run several backends on a program and judge them")
    compare.add_argument("--backends", nargs="+", required=True, metavar="[NAME:] BACKEND")
    compare.add_argument("--html", type=Path, help="page with table and pictures")
    compare.add_argument("--save", type=Path, help="folder for posteriors and table")
    for sub in (infer, compare):
        sub.add_argument("program", metavar="module:function", help="function that returns a program")
        sub.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of that function"
        )
        sub.add_argument("--draws", type=int, default=1000, help="per chain (default: 1000)")
        sub.add_argument("--chains", type=int, help="independent runs (default: the backend's own)")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--device", help="such as cuda")

    train = command("train", "train one of the priors again, or an amortised posterior of a program")
    train.add_argument("prior", nargs="?", choices=sorted(RECIPES))
    train.set_defaults(recipes=RECIPES)
    train.add_argument("--program", metavar="module:function", help="function that returns a program to be simulated")
    train.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of that function")
    train.add_argument(
        "--backend",
        help='inverse.AmortisedDenoiser (default), or "ppl.DistributionTransformer(priors=ppl.MixturePriors())"',
    )
    train.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of that backend")
    train.add_argument("--start", type=Path, help="file of an earlier training of the program to go on from")
    train.add_argument("--seed", type=int, default=0, help="of the training of a program")
    train.add_argument(
        "--out", type=Path, help="folder of a prior (default: priors), or file (default: amortised.safetensors)"
    )
    train.add_argument("--steps", type=int, help="optimiser steps (default: those of the prior, or of the backend)")
    train.add_argument(
        "--checkpoint", type=Path, help="file, or folder for a program, to go on from (default: by --out)"
    )
    train.add_argument("--device", help="such as cuda")

    priors = command("priors", "the trained priors that come along, and what is known of them")
    priors.add_argument("name", nargs="?", help="show everything about this one")
    return parser


def _make(make: Any, key: str, about: str, *args: str, **kwargs: Any) -> argparse.ArgumentParser:
    """A parser whose help ends in examples."""
    return make(
        *args,
        description=about[0].upper() + about[1:].rstrip(".") + ".",
        epilog=EXAMPLES[key],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )


if __name__ == "__main__":
    sys.exit(main())
