"""What the commands of the command line do; each takes its options and returns the exit code."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["compare", "demo", "infer", "priors", "train"]


def _modules() -> dict[str, ModuleType]:
    """What a backend on the command line may name."""
    import inverse
    import ppl
    import sde

    return {"ppl": ppl, "inverse": inverse, "sde": sde}


def _problem(options: Namespace) -> Any:
    """The problem that was asked for, on its device."""
    from dataclasses import replace

    from models.programs import read_problem
    from ppl.backend_text import split_option, value_from_text

    pairs = dict(split_option(text) for text in options.set)
    problem = read_problem(options.program, {n: value_from_text(v, {}, plain=True) for n, v in pairs.items()})
    if options.device:
        problem = replace(problem, program=problem.program.to(options.device))
    return problem


def _writable(path: Path | None, folder: bool = False) -> None:
    """Refuse a place that cannot take a result, before hours are spent on the result."""
    import os

    from ppl.errors import OptionError

    if path is None:
        return
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("a folder", "a file") if folder else ("a file", "a folder")
        raise OptionError(f"{path} is {found}, and {wanted} is to be written there; give another path")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not (there.is_dir() or there == path) or not os.access(there, os.W_OK):
        raise OptionError(f"{path} cannot be written: {there} is a file, or may not be changed; give another path")


def demo(options: Namespace) -> int:
    """Five backends on one program, and a program with unknown noise, as a page."""
    from models.demo import Size, run_demo

    _writable(options.output, folder=True)
    size: Size = "smoke" if options.smoke else "full" if options.full else "normal"
    finished = run_demo(options.output, size=size, seed=options.seed, progress=not options.quiet)
    return 0 if finished else 130


def infer(options: Namespace) -> int:
    """Run one backend on a program."""
    import ppl
    from ppl.backend_text import backend_from_text

    _writable(options.out)
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


def compare(options: Namespace) -> int:
    """Run several backends on a program and judge them."""
    import ppl
    from ppl.backend_text import backend_from_text
    from ppl.errors import OptionError

    _writable(options.html)
    _writable(options.save, folder=True)
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


TRAINED = {"FittedDenoiser": "inverse.AmortisedDenoiser", "FittedTransformer": "ppl.DistributionTransformer"}


def _trained(text: str) -> str:
    """The text of a backend; a file of `pilotlight train --program` is one."""
    return f"{_trainer(Path(text))}(file={text!r})" if text.endswith(".safetensors") else text


def _trainer(path: Path) -> str:
    """The backend that trained a file; that of denoisers, for its own error, where the file is of neither."""
    from ppl.storage import load_tensors

    meta = load_tensors(path)[1] if path.is_file() else None
    kind = meta.get("kind") if isinstance(meta, dict) else None
    return TRAINED.get(str(kind), TRAINED["FittedDenoiser"])


def train(options: Namespace) -> int:
    """Train one of the priors again, or an amortised posterior of a program."""
    from ppl.errors import OptionError
    from ppl.option_checks import check_place

    if (options.prior is None) == (options.program is None):
        raise OptionError("train takes the name of a prior, or --program module:function, and not both")
    if options.steps is not None and options.steps < 1:
        raise OptionError(f"steps must be one or more, got {options.steps}")
    check_place(options.device)
    _writable(options.out, folder=options.program is None)
    if options.program is not None:
        return _train_program(options)
    if options.set or options.option or options.start or options.backend:
        raise OptionError("--set, --option, --start and --backend belong to --program")
    return _train_prior(options)


def _train_program(options: Namespace) -> int:
    import torch

    import inverse
    import ppl
    from ppl.backend_text import backend_from_text
    from ppl.errors import OptionError

    problem = _problem(options)
    start: Any = None
    text, given = options.backend or TRAINED["FittedDenoiser"], list(options.option)
    if options.start is not None:
        text = options.backend or _trainer(options.start)
        transformer = text.partition("(")[0].endswith("DistributionTransformer")
        kind: Any = ppl.FittedTransformer if transformer else inverse.FittedDenoiser
        start = kind.load(options.start, problem.program)
        given = [*(f"{n}={getattr(start.options, n)!r}" for n in kind.FORM), *given]
    if options.steps is not None:
        given.append(f"steps={options.steps}")
    backend: Any = backend_from_text(text, _modules(), given)
    if not isinstance(backend, inverse.AmortisedDenoiser | ppl.DistributionTransformer):
        raise OptionError(f"--backend must be one of {', '.join(TRAINED.values())}, got {text!r}")
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
    print(f"wrote {out}: loss {fitted.loss[0]:.4f} ± {fitted.loss[1]:.4f} on fresh simulations")
    if not fitted.complete:
        print("interrupted: the same command goes on from the checkpoint")
        return 130
    return 0


def _train_prior(options: Namespace) -> int:
    from models.denoisers import TrainProgress
    from models.scripts.train import RECIPES, export, run_stages, shortened

    name = options.recipes[options.prior]
    recipe = RECIPES[name]
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


def priors(options: Namespace) -> int:
    """Show the trained priors, or all that is known of one."""
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
