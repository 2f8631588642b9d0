"""`program.check()`: each fault is named with its site and a cure, and sound programs get no finding."""

from __future__ import annotations

import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from ppl.check import findings
from ppl.lint import Descent
from ppl.program import Program

F64 = torch.float64
Y = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=F64)
ROOT = Path(__file__).parents[2]


def z0():
    return torch.zeros((), dtype=F64)


def clean(y):
    mu = pyro.sample("mu", dist.Normal(z0(), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(z0(), 0.5))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


# Branches on draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jump", "word"),
    [
        (lambda x: 1.0 + (x > 0), "compared"),
        (lambda x: torch.where(torch.exp(x).le(1.0), x, -x), "compared"),
        (lambda x: torch.round(2 * x), "rounded"),
        (lambda x: torch.tensor([1.0, 2.0], dtype=F64)[torch.stack([x, -x]).argmax()], "turned into a place"),
        (lambda x: torch.tensor([1.0, 2.0], dtype=F64)[x.sigmoid().mul(2).long()], "rounded"),
        (lambda x: x * (1.0 if x.sum() else 2.0), "truth value"),
        (lambda x: x * float(x.floor()), "rounded"),
    ],
)
def test_branch_on_a_draw(jump, word):
    def model(y):
        x = pyro.sample("x", dist.Normal(z0(), 1.0))
        pyro.sample("y", dist.Normal(jump(x), 1.0).expand([4]).to_event(1), obs=y)

    (finding,) = Program(model, Y, batching="loop").check()
    assert "'x'" in finding
    assert word in finding
    assert "test_lint.py:" in finding
    assert '"estimator": "reinforce"' in finding


def test_smooth_models_and_sites_with_other_estimators_may_compare():
    def smooth(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
        rate = torch.nn.functional.softplus(x[0]) + x[1:].abs().max().clamp(min=0.1)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.StudentT(3.0, x.relu().sum(), rate), obs=y)

    assert Program(smooth, Y).check() == []

    def scored(y):
        x = pyro.sample("x", dist.Normal(z0(), 1.0), infer={"estimator": "reinforce"})
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
        pyro.sample("y", dist.Normal(1.0 + (x > 0) + (k == 1), 1.0).expand([4]).to_event(1), obs=y)

    assert not [f for f in Program(scored, Y).check() if "path gradient" in f]


def test_descent_follows_several_sites_and_forgets_others():
    with Descent() as descent:
        a, b, c = (torch.tensor(v) for v in (0.1, 0.2, 0.3))
        descent.mark(a, "a")
        descent.mark(b, "b")
        both = torch.stack([a, b]).sum() * c
        assert descent.sites(both) == {"a", "b"}
        assert descent.sites(c) == frozenset()
        assert bool(c > 0.1)
        assert not descent.jumps
        assert bool(both < 1)
    assert {site for site, _ in descent.jumps} == {"a", "b"}


# Supports and sites of a model ---------------------------------------------------------------------------------------


def test_a_scale_with_too_wide_a_support():
    def model(y):
        scale = pyro.sample("scale", dist.Normal(torch.tensor(0.5, dtype=F64), 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    found = [f for f in Program(model, Y).check() if "leaves its range" in f]
    assert len(found) == 1
    assert "'y': scale of Normal" in found[0]
    assert "LogNormal" in found[0]


def test_sites_that_lead_nowhere():
    """A chain of two that ends in nothing, a discrete one, and one that reaches the data through another prior."""

    def model(y):
        first = pyro.sample("first", dist.Normal(z0(), 1.0))
        pyro.sample("second", dist.Normal(first, 1.0))
        pyro.sample("coin", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        top = pyro.sample("top", dist.Normal(z0(), 1.0))
        mu = pyro.sample("mu", dist.Normal(top, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.ones(3, dtype=F64)))
        pyro.sample("y", dist.Normal(mu + k, 1.0).expand([4]).to_event(1), obs=y)

    found = Program(model, Y).check()
    assert [f.split("'")[1] for f in found] == ["first", "second", "coin"]
    assert all("never used" in f for f in found)


# Guides --------------------------------------------------------------------------------------------------------------


def lint(model, guide, *args):
    return Program(model, *(args or (Y,))).check(guide=guide)


def good(y):
    mu = pyro.param("m", z0)
    pyro.sample("mu", dist.Normal(mu, 1.0))
    pyro.sample("scale", dist.LogNormal(mu, 1.0))


@pytest.mark.parametrize("guide", [good, AutoNormal(clean), AutoMultivariateNormal(clean), AutoDelta(clean)])
def test_guides_that_fit(guide):
    assert lint(clean, guide) == []


def test_a_guide_leaves_no_parameters_behind():
    lint(clean, good)
    assert len(pyro.get_param_store()) == 0


def test_guide_sites_missing_and_too_many():
    def guide(y):
        pyro.sample("mu", dist.Normal(z0(), 1.0))
        pyro.sample("extra", dist.Normal(z0(), 1.0))
        pyro.sample("helper", dist.Normal(z0(), 1.0), infer={"is_auxiliary": True})

    found = lint(clean, guide)
    assert len(found) == 2
    assert "no site 'scale'" in found[0]
    assert "'extra'" in found[1]
    assert "is_auxiliary" in found[1]
    (finding,) = lint(clean, lambda wrong, arguments: None)
    assert "cannot be run" in finding


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda: dist.Normal(z0(), 1.0), "outside the model's support"),
        (lambda: dist.Uniform(z0(), 0.1), "misses values"),
        (lambda: dist.Poisson(z0() + 3.0), "the guide is discrete, the model continuous"),
        (lambda: dist.LogNormal(torch.zeros(2, dtype=F64), 1.0).to_event(1), "the guide draws shape (2,)"),
    ],
)
def test_supports_of_guide_and_model(fn, words):
    def guide(y):
        pyro.sample("mu", dist.Normal(z0(), 1.0))
        pyro.sample("scale", fn())

    (finding,) = lint(clean, guide)
    assert "'scale'" in finding
    assert words in finding


def local(plate="n", size=2, indices=None, latent=True):
    """A model with a local latent in a subsampled plate, or its guide."""
    size = None if indices is not None else size

    def model(y):
        mu = pyro.sample("mu", dist.Normal(z0(), 1.0))
        with pyro.plate(plate, len(y), subsample_size=size, subsample=indices) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0).expand([len(rows)]))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    def guide(y):
        pyro.sample("mu", dist.Normal(z0(), 1.0))
        with pyro.plate(plate, len(y), subsample_size=size, subsample=indices) as rows:
            pyro.sample("z", dist.Normal(z0(), 1.0).expand([len(rows)]))

    return model, guide


def test_minibatches_that_agree():
    model, guide = local()
    assert lint(model, guide) == []
    assert lint(model, AutoNormal(model)) == []
    assert lint(*local(indices=torch.tensor([0, 3]))) == []


def test_minibatch_of_the_model_replaced_by_that_of_the_guide():
    """pyro#3468: an explicit subsample in the model, a fresh one in the guide, also of an autoguide."""
    model, _ = local(indices=torch.tensor([0, 3]))
    for guide in (AutoNormal(model), local()[1]):
        found = []
        for seed in range(4):  # by chance the guide draws the same two rows of four
            found += Program(model, Y).check(torch.Generator().manual_seed(seed), guide=guide)
        assert found
        assert all("'n'" in f and "3468" in f and "create_plates" in f for f in found)


def test_minibatches_of_other_size_name_and_place():
    model, _ = local()
    found = lint(model, local(size=3)[1])
    assert any("plate 'n' shows 2 of 4" in f for f in found)
    (finding,) = lint(model, local(plate="rows")[1])
    assert "'rows'" in finding
    assert "Call both 'n'" in finding

    def outside(y):
        pyro.sample("mu", dist.Normal(z0(), 1.0))
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0))

    found = lint(model, outside)
    assert any("'z' lies in the subsampled plate 'n'" in f for f in found)


def test_baseline_that_depends_on_its_own_draw():
    seen = {}
    net = torch.nn.Linear(1, 1).to(F64)

    def model(y):
        k = pyro.sample("k", dist.Bernoulli(z0() + 0.5))
        j = pyro.sample("j", dist.Bernoulli(z0() + 0.5))
        pyro.sample("y", dist.Normal(k + j, 1.0).expand([4]).to_event(1), obs=y)

    def cheating(y):
        k = pyro.sample("k", dist.Bernoulli(z0() + 0.5), infer={"baseline": {"nn_baseline": lambda: seen["k"] * 2.0}})
        seen["k"] = k
        pyro.sample("j", dist.Bernoulli(z0() + 0.5), infer={"baseline": {"baseline_value": 3 * k}})

    def honest(y):
        k = pyro.sample("k", dist.Bernoulli(z0() + 0.5), infer={"baseline": {"use_decaying_avg_baseline": True}})
        given = {"nn_baseline": net, "nn_baseline_input": torch.stack([k])}
        pyro.sample("j", dist.Bernoulli(z0() + 0.5), infer={"baseline": given})

    (finding,) = lint(model, cheating)
    assert "'k' of the guide" in finding
    assert "own draw" in finding
    assert lint(model, honest) == []


def test_branch_in_a_guide():
    def guide(y):
        mu = pyro.sample("mu", dist.Normal(z0(), 1.0))
        pyro.sample("scale", dist.LogNormal(1.0 * (mu > 0), 1.0))

    (finding,) = lint(clean, guide)
    assert "'mu' of the guide" in finding
    assert "compared" in finding


# No false alarm ------------------------------------------------------------------------------------------------------


def example_program(path, monkeypatch):
    """What an example script does up to the line that makes its program."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("program ="))
    stop = next((i for i in range(end + 1, len(lines)) if not lines[i].startswith((" ", ")"))), len(lines))
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    scope = {"__name__": "example", "__file__": str(path)}
    exec(compile("\n".join(lines[:stop]), str(path), "exec"), scope)
    return scope["program"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_get_no_finding(path, monkeypatch):
    if "\nprogram =" not in path.read_text():
        pytest.skip("makes its programs elsewhere")
    assert example_program(path, monkeypatch).check(draws=16) == []


@pytest.mark.parametrize("name", ["inpaint_fashion", "digits_unknown_noise"])
def test_programs_of_the_package_get_no_finding(name):
    from models import programs

    program = getattr(programs, name)().program
    assert findings(program, torch.Generator().manual_seed(0), draws=4) == []
