"""The command line: `pilotlight demo`, `infer`, `compare`, `train`, `priors`; and the version."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

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
  pilotlight demo --full                  more draws and steps, with Hamiltonian Monte Carlo; takes half an hour
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
  pilotlight train --program my_module:my_problem --start amortised.safetensors --out better.safetensors

A run that was stopped goes on from its checkpoint. Then: models.load("digits8x8", folder="priors"). With --program, a
denoiser is trained on simulations of the program, for any data: pilotlight infer ... --backend FILE""",
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
        return int(options.run(options) or 0)
    except (PilotlightError, FileNotFoundError) as error:
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


def _modules() -> dict[str, ModuleType]:
    """What a backend on the command line may name."""
    import inverse
    import ppl
    import sde

    return {"ppl": ppl, "inverse": inverse, "sde": sde}


def _problem(options: argparse.Namespace) -> Any:
    """The problem that was asked for, on its device."""
    from dataclasses import replace

    from models.programs import read_problem
    from ppl.backend_text import split_option, value_from_text

    pairs = dict(split_option(text) for text in options.set)
    problem = read_problem(options.program, {n: value_from_text(v, {}, plain=True) for n, v in pairs.items()})
    if options.device:
        problem = replace(problem, program=problem.program.to(options.device))
    return problem


def _demo(options: argparse.Namespace) -> int:
    from models.demo import Size, run_demo

    size: Size = "smoke" if options.smoke else "full" if options.full else "normal"
    finished = run_demo(options.output, size=size, seed=options.seed, progress=not options.quiet)
    return 0 if finished else 130


def _infer(options: argparse.Namespace) -> int:
    import ppl
    from ppl.backend_text import backend_from_text

    problem = _problem(options)
    backend = backend_from_text(_trained(options.backend), _modules(), options.option)
    for finding in problem.program.check():
        print(f"pilotlight: warning: {finding}", file=sys.stderr)
    posterior = ppl.infer(
        problem.program,
        backend,
        options.draws,
        options.chains,
        options.seed,
        checkpoint=options.checkpoint,
        progress=not options.quiet,
    )
    print(posterior)
    if len(posterior) > 0:
        print(posterior.summary(limit=20).to_string(float_format=lambda v: f"{v:.4g}"))
    for note in posterior.attrs.get("notes", ()):
        print(f"note: {note}")
    if options.out:
        posterior.save(options.out)
        print(f"wrote {options.out}")
    return 0 if posterior.complete else 130


def _compare(options: argparse.Namespace) -> int:
    import ppl
    from ppl.backend_text import backend_from_text
    from ppl.errors import OptionError

    backends = {}
    for text in options.backends:
        name, backend = _named(text)
        if name in backends:
            raise OptionError(f'two backends are called {name!r}; name them: "first: {backend}"')
        backends[name] = backend_from_text(_trained(backend), _modules())
    problem = _problem(options)
    comparison = ppl.compare(
        problem.program,
        backends,
        options.draws,
        chains=options.chains,
        seed=options.seed,
        truth={n: t for n, t in problem.truth.items() if n in problem.program.latents},
        progress=not options.quiet,
    )
    comparison.show()
    if options.html:
        print(f"wrote {comparison.to_html(options.html)}")
    if options.save:
        print(f"wrote {comparison.save(options.save)}")
    return 0 if comparison.complete else 130


def _named(text: str) -> tuple[str, str]:
    """ "name: backend" as a pair; without a name, the backend's own text without its package."""
    before, colon, after = text.partition(":")
    if colon and "(" not in before:
        return before.strip(), after.strip()
    return text.removeprefix("inverse.").removeprefix("ppl."), text


def _trained(text: str) -> str:
    """The text of a backend; a file of `pilotlight train --program` is one."""
    return f"inverse.AmortisedDenoiser(file={text!r})" if text.endswith(".safetensors") else text


def _train(options: argparse.Namespace) -> int:
    from ppl.errors import OptionError

    if (options.prior is None) == (options.program is None):
        raise OptionError("train takes the name of a prior, or --program module:function, and not both")
    if options.steps is not None and options.steps < 1:
        raise OptionError(f"steps must be one or more, got {options.steps}")
    if options.program is not None:
        return _train_program(options)
    if options.set or options.option or options.start:
        raise OptionError("--set, --option and --start belong to --program")
    return _train_prior(options)


def _train_program(options: argparse.Namespace) -> int:
    import torch

    import inverse
    import ppl
    from ppl.backend_text import backend_from_text

    problem = _problem(options)
    start, given = None, list(options.option)
    if options.start is not None:
        start = inverse.FittedDenoiser.load(options.start, problem.program)
        given = [f"width={start.options.width}", f"depth={start.options.depth}", *given]
    if options.steps is not None:
        given.append(f"steps={options.steps}")
    backend = backend_from_text("inverse.AmortisedDenoiser", _modules(), given)
    assert isinstance(backend, inverse.AmortisedDenoiser)
    out = options.out or Path("amortised.safetensors")
    generator = torch.Generator(problem.program.device).manual_seed(options.seed)
    monitor = ppl.Monitor(
        progress=not options.quiet,
        checkpoint=options.checkpoint or out.with_suffix(".checkpoint"),
        generator=generator,
        fingerprint={
            "program": problem.program.fingerprint(),
            "run": f"{backend!r} seed={options.seed} start={options.start}",
        },
    )
    with monitor:
        fitted = backend.fit(problem.program, generator=generator, monitor=monitor, start=start)
    out.parent.mkdir(parents=True, exist_ok=True)
    fitted.save(out)
    monitor.done()
    for note in monitor.notes:
        print(f"note: {note}")
    print(f"wrote {out}: loss {fitted.loss[0]:.4f} on fresh simulations (1 is that of an untrained network)")
    if not fitted.complete:
        print("interrupted: the same command goes on from the checkpoint")
        return 130
    return 0


def _train_prior(options: argparse.Namespace) -> int:
    from models.denoisers import TrainProgress
    from models.scripts.train import RECIPES as KNOWN
    from models.scripts.train import export, run_stages, shortened

    name = RECIPES[options.prior]
    recipe = KNOWN[name]
    stages = recipe.stages
    if options.steps is not None:
        stages = shortened(stages, options.steps)

    def say(now: TrainProgress) -> None:
        if now.held_out is not None and not options.quiet:
            print(f"step {now.step}: loss {now.loss:.4f}, held out {now.held_out:.4f}", flush=True)

    data = recipe.data()
    folder = options.out or Path("priors")
    checkpoint = options.checkpoint or folder / f"{name}.checkpoint.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    device = options.device or "cpu"
    done = run_stages(stages, data, checkpoint, callback=say, device=device, progress=not options.quiet)
    if done[-1].interrupted:
        print(f"interrupted at step {done[-1].step}; the same command goes on from {checkpoint}")
        return 130
    print(f"wrote {export(name, done, data, folder)}")
    return 0


def _priors(options: argparse.Namespace) -> int:
    import json

    import models

    if options.name:
        print(json.dumps(models.facts(options.name), indent=2))
        return 0
    for name in models.available():
        known = models.facts(name)
        low, high = known["data_range"]
        shape = " x ".join(map(str, known["event_shape"]))
        print(f"{name}: {shape}, values in [{low:g}, {high:g}], {known['parameters']:,} parameters, ", end="")
        print(f"{known['bytes'] / 1e6:.1f} MB, noise levels {known['sigma_min']:g} to {known['sigma_max']:g}")
        print(f"    data: {known.get('data', 'not stated')}")
        print(f"    licence: {known.get('licence', 'not stated')}")
        print(f"    use: models.load({name!r})")
    return 0


def _parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _make(argparse.ArgumentParser, "", "Posteriors from diffusion priors in Pyro programs.", prog="pilotlight")
    parser.add_argument("--version", action="version", version=f"pilotlight {version()}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        sub = _make(commands.add_parser, name, about, name, help=about)
        sub.set_defaults(run=run)
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    demo = command("demo", _demo, "five backends on one program, and a program with unknown noise, as a page")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results (default: demo)")
    size = demo.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="more draws and steps")
    size.add_argument("--smoke", action="store_true", help="a few steps only")
    demo.add_argument("--seed", type=int, default=0)

    infer = command("infer", _infer, "run one backend on a program")
    infer.add_argument(
        "--backend", required=True, help="such as inverse.TwistedSMC, with options in brackets if wanted"
    )
    infer.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the backend")
    infer.add_argument("--checkpoint", type=Path, help="folder to store the run in while it runs, and to go on from")
    infer.add_argument("--out", type=Path, help="netCDF file of the posterior")
    compare = command("compare", _compare, "run several backends on a program and judge them")
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

    train = command("train", _train, "train one of the priors again, or an amortised posterior of a program")
    train.add_argument("prior", nargs="?", choices=sorted(RECIPES))
    train.add_argument("--program", metavar="module:function", help="function that returns a program to be simulated")
    train.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of that function")
    train.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of inverse.AmortisedDenoiser"
    )
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

    priors = command("priors", _priors, "the trained priors that come along, and what is known of them")
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
