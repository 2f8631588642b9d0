"""The command line: every command, its help, its errors, names that lead to other packages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import inverse
import pilotlight
import ppl
import sde
from ppl.backend_text import backend_from_text, value_from_text
from ppl.errors import OptionError
from ppl.shadow import shadowed

ROOT = Path(pilotlight.__file__).resolve().parent
MODULES = {"ppl": ppl, "inverse": inverse, "sde": sde}
PROGRAM = """
import pyro, pyro.distributions as dist, torch
from ppl import Program

def normal(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)

def program(at=2.0):
    return Program(normal, torch.tensor(at))

def loud(at=2.0):
    def louder(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 3.0), obs=y)
    return Program(louder, torch.tensor(at))

def pair():
    return normal, torch.tensor(2.0)

def other():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of its own."""
    (tmp_path / "my_programs.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("my_programs", None)


def run(*arguments: str) -> int:
    return pilotlight.main([*arguments, "--quiet"])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        pilotlight.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("pilotlight 0.")


@pytest.mark.parametrize("command", ["", "demo", "infer", "compare", "train", "priors"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        pilotlight.main([*([command] if command else []), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"pilotlight {command}" in text


def test_no_command_shows_help(capsys):
    assert pilotlight.main([]) == 0
    assert "examples:" in capsys.readouterr().out


def test_infer_saves_what_it_prints(here, capsys):
    code = run(
        "infer", "my_programs:program", "--set", "at=4.0", "--backend", "ppl.SVI", "--option", "steps=300",
        "--option", "lr=0.05", "--draws", "500", "--out", "posterior.nc",
    )  # fmt: skip
    assert code == 0
    assert "wrote posterior.nc" in capsys.readouterr().out
    posterior = ppl.Posterior.load("posterior.nc")
    assert posterior["x"].shape == (1, 500)
    assert float(posterior.mean("x")) == pytest.approx(2.0, abs=0.4)  # exact 2, sd 0.7
    assert torch.equal(posterior.observed["y"], torch.tensor(4.0))


def test_infer_warns_of_data_far_from_the_prior(here, capsys):
    assert run("infer", "my_programs:program", "--set", "at=90.0", "--backend", "ppl.SVI(steps=5)", "--draws", "5") == 0
    assert "warning" in capsys.readouterr().err


def test_compare_writes_page_and_posteriors(here, capsys):
    backends = ["fit: ppl.SVI(steps=50)", "ppl.SVI(guide=ppl.FullRank(), steps=50)", "inverse.DPS(steps=5)"]
    code = run(
        "compare", "my_programs:pair", "--draws", "20", "--html", "r.html", "--save", "out", "--backends", *backends
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "DPS(steps=5): CapabilityError" in out
    assert (here / "r.html").read_text().count("<tr>") >= 4
    assert sorted(p.name for p in (here / "out").iterdir()) == [
        "fit.nc",
        "svi_guide_ppl_fullrank_steps_50.nc",
        "table.csv",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["infer", "my_programs:program", "--backend", "inverse.TwistedSNC"], "did you mean TwistedSMC"),
        (["infer", "my_programs:program", "--backend", "ppl.SVI", "--option", "step=3"], "did you mean steps"),
        (["infer", "my_programs:program", "--backend", "ppl.SVI", "--option", "steps"], "name=value"),
        (["infer", "my_programs:program", "--backend", "ppl.SVI", "--option", "steps=-1"], "steps"),
        (["infer", "my_programs:program", "--backend", "ppl.MeanField()"], "is no backend"),
        (["infer", "my_programs:program", "--backend", "__import__('os').getcwd()"], "__import__"),
        (["infer", "my_programs:nothing", "--backend", "ppl.SVI"], "it has loud, normal, other, pair, program"),
        (["infer", "my_programs:other", "--backend", "ppl.SVI"], "must return a ppl.Program"),
        (["infer", "my_programs:program", "--set", "of=1", "--backend", "ppl.SVI"], "cannot be called"),
        (["infer", "my_programz:program", "--backend", "ppl.SVI"], "no module 'my_programz'"),
        (["infer", "my_programs", "--backend", "ppl.SVI"], "module:function"),
        (["infer", "my_programs.py:program", "--backend", "ppl.SVI"], "my_programs:program, not as a file"),
        (["compare", "my_programs:program", "--backends", "a: ppl.SVI", "a: ppl.NUTS"], "two backends are called"),
        (["priors", "digits9x9"], "no prior called 'digits9x9'"),
        (["train", "digits", "--steps", "0"], "steps must be one or more"),
        (["train"], "--program module:function"),
        (["train", "digits", "--program", "my_programs:program"], "not both"),
        (["train", "digits", "--option", "width=8"], "belong to --program"),
        (["train", "--program", "my_programs:program", "--option", "widht=8"], "did you mean width"),
        (["train", "--program", "my_programs:program", "--start", "none.safetensors"], "no file none.safetensors"),
        (["infer", "my_programs:program", "--backend", "none.safetensors"], "no file none.safetensors"),
        (["infer", "my_programs:program", "--backend", "ppl.SVI", "--device", "gpu"], "no device 'gpu' here"),
        (["infer", "my_programs:program", "--backend", "ppl.SVI", "--draws", "0"], "draws must be an integer"),
        (["train", "digits", "--device", "gpu"], "no device 'gpu' here"),
    ],
)
def test_errors_are_one_line_and_code_two(arguments, says, here, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["infer", "my_programs:loud", "--backend", "ppl.SVI", "--out", "."], ". is a folder, and a file is to be"),
        (["infer", "my_programs:loud", "--backend", "ppl.SVI", "--out", "my_programs.py/a.nc"], "cannot be written"),
        (["compare", "my_programs:loud", "--backends", "ppl.SVI", "--html", "."], "is a folder"),
        (
            ["compare", "my_programs:loud", "--backends", "ppl.SVI", "--save", "my_programs.py"],
            "is a file, and a folder",
        ),
        (["train", "--program", "my_programs:loud", "--out", "."], "is a folder"),
        (["demo", "--smoke", "--output", "my_programs.py"], "is a file, and a folder"),
    ],
)
def test_places_are_looked_at_before_anything_runs(arguments, says, here, capsys, monkeypatch):
    monkeypatch.setattr("models.commands._problem", lambda options: pytest.fail("the program was made first"))
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def test_ctrl_c_before_a_result(monkeypatch, capsys):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppl.infer", stop)
    assert run("infer", "models.programs:digits_unknown_noise", "--backend", "ppl.SVI") == 1
    assert "interrupted" in capsys.readouterr().err


def test_priors(capsys):
    assert run("priors") == 0
    assert "digits8x8: 1 x 8 x 8" in capsys.readouterr().out
    assert run("priors", "digits8x8") == 0
    assert '"event_shape"' in capsys.readouterr().out


def test_train_writes_a_prior_that_loads(tmp_path, capsys):
    import models

    assert run("train", "digits", "--steps", "2", "--out", str(tmp_path)) == 0
    assert models.load("digits8x8", folder=tmp_path).event_shape == (1, 8, 8)


def test_train_a_program_and_infer_with_the_file(here, capsys):
    options = ["--option", "width=16", "--option", "depth=1", "--option", "lr=0.01"]
    assert run("train", "--program", "my_programs:program", "--out", "a.safetensors", "--steps", "200", *options) == 0
    assert "wrote a.safetensors" in capsys.readouterr().out
    assert not (here / "a.checkpoint").exists()
    for at, backend in (("-3.0", "a.safetensors"), ("3.0", "inverse.AmortisedDenoiser(file='a.safetensors')")):
        code = run(
            "infer", "my_programs:program", "--set", f"at={at}", "--backend", backend, "--option", "correct=True",
            "--draws", "400", "--out", "posterior.nc",
        )  # fmt: skip
        assert code == 0
        posterior = ppl.Posterior.load("posterior.nc")
        assert posterior.attrs["exact"] == "in_the_limit"
        assert float(posterior.mean("x")) == pytest.approx(float(at) / 2, abs=0.3)  # sd 0.7, error 0.04
    assert run("infer", "my_programs:loud", "--backend", "a.safetensors", "--draws", "5") == 2
    assert "another program" in capsys.readouterr().err
    again = ["--start", "a.safetensors", "--steps", "20", "--out", "b.safetensors"]
    assert run("train", "--program", "my_programs:program", *again) == 0
    loaded = inverse.FittedDenoiser.load("b.safetensors", ppl.Program(_normal, torch.tensor(0.0)))
    assert len(loaded.history) == 220


def test_train_a_transformer_and_go_on(here, capsys):
    text = "ppl.DistributionTransformer(2, 8, 2, 1, 8, batch=32)"
    assert (
        run("train", "--program", "my_programs:program", "--backend", text, "--steps", "60", "--out", "t.safetensors")
        == 0
    )
    assert (
        run("infer", "my_programs:program", "--backend", "t.safetensors", "--draws", "200", "--out", "posterior.nc")
        == 0
    )
    assert ppl.Posterior.load("posterior.nc").attrs["backend"] == "DistributionTransformer"
    again = ["--start", "t.safetensors", "--steps", "10", "--option", "batch=16", "--out", "u.safetensors"]
    assert run("train", "--program", "my_programs:program", *again) == 0
    loaded = ppl.FittedTransformer.load("u.safetensors", ppl.Program(_normal, torch.tensor(0.0)))
    assert len(loaded.history) == 70
    capsys.readouterr()
    assert run("train", "--program", "my_programs:program", "--backend", "ppl.NUTS") == 2
    assert "--backend must be one of" in capsys.readouterr().err


def _normal(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_stopped_training_of_a_program_goes_on(here, capsys, monkeypatch):
    """Ctrl-C in the middle: a file, code 130, and the same weights as an untouched run when it goes on."""
    from ppl.amortised.training import Training

    command = [
        "train",
        "--program",
        "my_programs:program",
        "--steps",
        "30",
        "--option",
        "width=8",
        "--option",
        "batch=8",
    ]
    assert run(*command, "--out", "whole.safetensors") == 0
    advance, calls = Training.advance, []

    def strike(self):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in the background
    try:
        monkeypatch.setattr(Training, "advance", strike)
        assert run(*command, "--out", "a.safetensors") == 130
        assert (here / "a.safetensors").exists()
        assert run(*command, "--out", "a.safetensors") == 0
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(calls) == 30
    whole, parts = (
        inverse.FittedDenoiser.load(f"{n}.safetensors", ppl.Program(_normal, torch.tensor(0.0))) for n in ("whole", "a")
    )
    for name, value in whole.network.state_dict().items():
        assert torch.equal(parts.network.state_dict()[name], value)


# -- backends as text


def test_nested_backends_and_options():
    text = "NoiseSpace(ppl.SVI(guide=LowRank(4), steps=10))"
    backend = backend_from_text(text, MODULES, ["engine.steps=20", "engine.guide.rank=3"])
    assert backend == ppl.NoiseSpace(ppl.SVI(guide=ppl.LowRank(3), steps=20))
    assert backend_from_text("inverse.DPS", MODULES, ["weight=likelihood"]) == inverse.DPS(weight="likelihood")
    assert backend_from_text("inverse.DPS(clip=(-1, 1))", MODULES).clip == (-1, 1)


@pytest.mark.parametrize(
    "text", ["(lambda: 1)()", "ppl.infer(1)", "1 + 1", "ppl.SVI(**{})", "ppl.backend.torch", "f'{1}'"]
)
def test_text_never_runs_code(text):
    with pytest.raises(OptionError):
        value_from_text(text, MODULES)


def test_option_of_something_without_options():
    with pytest.raises(OptionError, match="has no options of its own"):
        backend_from_text("ppl.SVI", MODULES, ["steps.more=1"])


# -- shadowed names


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{cwd}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_nothing_is_shadowed_here():
    assert shadowed(ROOT) == {}


@pytest.mark.parametrize("name", ["ppl", "sde", "inverse", "models"])
@pytest.mark.parametrize("kind", ["package", "module"])
def test_command_refuses_shadowed_names(name, kind, tmp_path):
    if kind == "package":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        wrong = tmp_path / name
    else:
        wrong = tmp_path / f"{name}.py"
        wrong.write_text("")
    found = _python("import pilotlight, sys; sys.exit(pilotlight.main(['priors']))", tmp_path)
    assert found.returncode == 2, found.stderr
    assert str(wrong) in found.stderr
    assert "rename or move" in found.stderr.lower()
    assert "Traceback" not in found.stderr


def test_import_warns_of_shadowed_names(tmp_path):
    (tmp_path / "models.py").write_text("")
    found = _python("import ppl", tmp_path)
    assert found.returncode == 0
    assert str(tmp_path / "models.py") in found.stderr
    (tmp_path / "models.py").unlink()
    assert _python("import ppl", tmp_path).stderr == ""
