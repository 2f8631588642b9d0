"""Comparisons: figures against closed forms, rows of failures and interruptions, the page and the picture."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl.compare import Comparison, compare, file_name
from ppl.cost import Cost
from ppl.errors import NotFiniteError, OptionError, ShapeError
from ppl.posterior import Posterior
from ppl.program import Program
from ppl.report import Section, write_figure, write_page
from ppl.report.view import kind_of, pictures

DIM = 4


def model(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(DIM, dtype=y.dtype), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


DATA = torch.tensor([2.0, 0.0, -2.0, 1.0], dtype=torch.float64)
MEAN, SD = DATA / 2, 0.5**0.5


def exact(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": MEAN + SD * torch.randn(n, DIM, generator=generator, dtype=torch.float64)}


@dataclass(frozen=True)
class Normal:
    """Independent draws around the exact mean."""

    shift: float = 0.0
    scale: float = 1.0
    exact: ClassVar = "in_the_limit"
    limit: ClassVar = ("draws",)
    exact_when: ClassVar = ()
    needs: ClassVar = frozenset()
    default_chains: ClassVar = 2
    batches_problems: ClassVar = False

    def run(self, program, *, draws, chains, generator, monitor):
        mean = program.data["y"] / 2
        for _ in monitor.steps(1, "draw"):
            monitor.cost.add(denoiser_evals=5 * draws * chains, vjps=draws * chains)
        noise = torch.randn(chains, draws, DIM, generator=generator, dtype=torch.float64)
        return Posterior({"x": mean + self.shift * SD + self.scale * SD * noise})


@dataclass(frozen=True)
class Wrong(Normal):
    """A method that claims nothing."""

    exact: ClassVar = "never"


@dataclass(frozen=True)
class Broken(Normal):
    error: type[BaseException] = NotFiniteError

    def run(self, program, **_):
        raise self.error("the density is not finite")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    backends = {
        "right": Normal(),
        "shifted": Normal(shift=1.0),
        "narrow": Wrong(scale=0.5),
        "broken": Broken(),
        "bug": Broken(error=ZeroDivisionError),
    }
    return compare(Program(model, DATA), backends, draws=1000, truth={"x": MEAN}, reference=exact)


def test_figures_against_closed_forms(comparison):
    """2000 draws in four dimensions. Bounds at 5 standard errors: false alarm below 1e-5 for each line."""
    table = comparison.table
    root = (2 * 1000 * DIM) ** 0.5  # sqrt(number of numbers)
    assert table.loc["right", "variance_ratio"] == pytest.approx(1.0, abs=5 * 2**0.5 / root)
    assert table.loc["narrow", "variance_ratio"] == pytest.approx(0.25, abs=0.25 * 5 * 2**0.5 / root)
    # |mean - exact| / sqrt(tr cov) of a shift by one standard deviation in every entry is one.
    assert table.loc["shifted", "mean_error"] == pytest.approx(1.0, abs=5 / root + 0.02)
    assert table.loc["right", "mean_error"] < 5 / 2000**0.5
    # The floor is between sets of 1000, and the judged sample is thinned to 1000.
    assert 0.6 < table.loc["right", "distance"] < 1.6
    assert table.loc["shifted", "distance"] > 5
    assert table.loc["narrow", "distance"] > 3


def test_cost_per_draw(comparison):
    row = comparison["right"]
    assert (row.figures["evals_per_draw"], row.figures["vjps_per_draw"]) == (5.0, 1.0)
    assert row.figures["seconds"] > 0


def test_truth_scores():
    """The truth one posterior sd off in each entry: RMSE = sd; half as wide draws do not cover it."""
    truth = {"x": MEAN + SD}
    table = compare(Program(model, DATA), {"right": Normal(), "narrow": Wrong(scale=0.5)}, 2000, truth=truth).table
    se = SD / (2 * 2000 * DIM) ** 0.5
    assert table.loc["right", "rmse"] == pytest.approx(SD, abs=5 * se + 0.02)
    assert table.loc["right", "spread_error"] == pytest.approx(1.0, abs=0.1)
    assert table.loc["narrow", "spread_error"] == pytest.approx(0.5, abs=0.05)
    assert table.loc["right", "coverage_90"] == 1.0
    assert table.loc["narrow", "coverage_90"] == 0.0


def test_residual_of_draws():
    """y - x for x ~ N(y / 2, 1 / 2): mean square y^2 / 4 + 1 / 2 = 9 / 16 + 1 / 2 on average over the four data."""
    row = compare(Program(model, DATA), {"right": Normal()}, 1000)["right"]
    exact = (float((DATA / 2).square().mean()) + 0.5) ** 0.5
    assert row.figures["residual"] == pytest.approx(exact, abs=0.2)  # 64 draws of 4 numbers: sd 0.05
    program = Program(model, DATA).over(y=torch.stack([DATA, 3 * DATA]))
    figures = compare(program, {"right": Normal()}, 1000)["right"].figures
    both = (float(((DATA / 2).square().mean() + (1.5 * DATA).square().mean()) / 2) + 0.5) ** 0.5
    assert figures["residual"] == pytest.approx(both, abs=0.2)


def test_draws_by_name():
    found = compare(Program(model, DATA), {"few": Normal(), "many": Normal(scale=2.0)}, {"few": 20, "many": 40})
    assert [len(p) for p in found.posteriors.values()] == [40, 80]
    with pytest.raises(OptionError, match="draws are given for"):
        compare(Program(model, DATA), {"few": Normal()}, {"other": 3})


def test_ess_is_given_for_methods_that_may_be_exact_only(comparison):
    assert comparison["right"].figures["ess"] > 1000
    assert math.isnan(comparison["narrow"].figures["ess"])
    ess = next(c for c in comparison.columns if c.key == "ess")
    assert comparison["narrow"].cell(ess) == "–"


def test_root_ess_is_the_ess_of_particles():
    weighted = Posterior(
        {"x": torch.randn(1, 50, DIM, dtype=torch.float64)},
        log_weight=torch.zeros(1, 50),
        info={"root_ess": torch.tensor([7.0])},
        attrs={"exact": "in_the_limit"},
    )
    assert compare(Program(model, DATA), {"smc": weighted})["smc"].figures["ess"] == pytest.approx(7.0)


def test_chains_that_disagree_are_named():
    far = torch.tensor([0.0, 50.0], dtype=torch.float64)[:, None, None]
    noise = torch.randn(2, 100, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stuck = Posterior({"x": far + noise}, attrs={"exact": "in_the_limit"})
    row = compare(Program(model, DATA), {"stuck": stuck})["stuck"]
    assert row.figures["r_hat"] > 1.01
    assert any("chains disagree" in note for note in row.notes)
    assert "worth about" in row.notes[-1]


def test_evidence_elbo_and_k_hat_are_read():
    problems = {"problems": 2, "exact": "never"}
    info = {"elbo": torch.tensor([[-3.0, -2.0], [-1.0, -5.0]]), "pareto_k": torch.tensor([[0.2, 0.9], [0.1, 0.3]])}
    evidence = (torch.tensor([-4.0, -6.0]), torch.tensor([0.3, 0.4]))
    posterior = Posterior({"x": torch.randn(2, 2, 5, DIM)}, log_evidence=evidence, info=info, attrs=problems)
    program = Program(model, DATA).over(y=torch.stack([DATA, DATA]))
    figures = compare(program, {"one": posterior})["one"].figures
    assert figures["log_evidence"] == pytest.approx(-10.0)
    assert figures["log_evidence_stderr"] == pytest.approx(0.5)  # sqrt(0.3^2 + 0.4^2)
    assert figures["elbo"] == pytest.approx(-3.0)  # the better chain of each problem
    assert figures["k_hat"] == pytest.approx(0.9)


def test_a_failure_is_a_row_that_says_why(comparison):
    assert comparison["broken"].error == "NotFiniteError: the density is not finite"
    assert comparison["bug"].error == "failed with ZeroDivisionError: the density is not finite"
    assert list(comparison.posteriors) == ["right", "shifted", "narrow"]
    assert list(comparison.table.index) == ["right", "shifted", "narrow", "broken", "bug"]
    assert comparison.complete


def test_ctrl_c_keeps_finished_rows():
    backends = {"first": Normal(), "second": Broken(error=KeyboardInterrupt), "third": Normal()}
    found = compare(Program(model, DATA), backends, draws=10)
    assert list(found.posteriors) == ["first"]
    assert not found.complete
    assert found["third"].error == "not run: interrupted"


def test_interrupted_between_problems(tmp_path):
    """Ctrl-C in the second of two problems: the first is judged and shown, what follows is not run."""

    ys = torch.stack([DATA, DATA + 2])

    def sets(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": ys[:, None] / 2 + SD * torch.randn(2, n, DIM, generator=generator, dtype=torch.float64)}

    @dataclass(frozen=True)
    class First(Normal):
        def run(self, program, *, monitor, **kwargs):
            found = super().run(program, monitor=monitor, **kwargs)
            monitor.stop("interrupted by Ctrl-C")
            return found

    program = Program(model, DATA).over(y=ys)
    found = compare(program, {"a": Normal(), "b": First(), "c": Normal()}, 200, truth={"x": ys / 2}, reference=sets)
    assert not found.complete
    assert found.posteriors["b"].problems == 1
    assert found["c"].error == "not run: interrupted"
    assert any("1 of 2 problems" in note for note in found["b"].notes)
    assert 0.4 < found["b"].figures["distance"] < 1.8
    assert (found.save(tmp_path) / "b.nc").is_file()
    assert found.to_html(tmp_path / "r.html").read_text().count("<svg") == 3


def test_a_problem_cut_short_does_not_cost_the_finished_ones():
    @dataclass(frozen=True)
    class Cut(Normal):
        def run(self, program, *, draws, monitor, **kwargs):
            if monitor.cost.denoiser_evals:
                monitor.stop("interrupted by Ctrl-C")
                draws = 3
            return super().run(program, draws=draws, monitor=monitor, **kwargs)

    program = Program(model, DATA).over(y=torch.stack([DATA, DATA + 2, DATA]))
    found = compare(program, {"cut": Cut()}, 50).posteriors["cut"]
    assert found["x"].shape == (1, 2, 50, DIM)
    assert not found.complete


def test_many_problems():
    ys = torch.stack([DATA, DATA + 2])
    program = Program(model, DATA).over(y=ys)

    def sets(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(2, n, DIM, generator=generator, dtype=torch.float64)
        return {"x": ys[:, None] / 2 + SD * noise}

    found = compare(program, {"right": Normal(), "off": Normal(shift=0.5)}, 500, truth={"x": ys / 2}, reference=sets)
    assert found.posteriors["right"]["x"].shape == (2, 2, 500, DIM)
    assert 0.5 < found.table.loc["right", "distance"] < 1.7
    assert found.table.loc["off", "distance"] > 2
    assert found.table.loc["off", "mean_error"] == pytest.approx(0.5, abs=0.1)
    assert found.table.loc["right", "evals_per_draw"] == 5.0


def test_references_of_every_form():
    pool = exact(3000, torch.Generator().manual_seed(1))
    program = Program(model, DATA)
    for source in (pool, pool["x"], Posterior({"x": pool["x"].reshape(3, 1000, DIM)})):
        assert 0.5 < compare(program, {"a": Normal()}, 400, reference=source).table.loc["a", "distance"] < 1.7


def test_bad_truth_and_reference_are_refused():
    program = Program(model, DATA)
    with pytest.raises(OptionError, match="truth has the sites"):
        compare(program, {"a": Normal()}, 10, truth={"z": DATA})
    with pytest.raises(OptionError, match="sets of two or more"):
        compare(program, {"a": Normal()}, 10, reference=exact(8, torch.Generator()))
    with pytest.raises(ShapeError, match="in front of"):
        compare(program, {"a": Normal()}, 10, reference={"x": torch.zeros(100, 3)})
    with pytest.raises(OptionError, match="backends by name"):
        compare(program, {})
    with pytest.raises(ShapeError, match="truth of 'x'"):
        compare(program, {"a": Normal()}, 10, truth={"x": torch.zeros(3)})


def test_what_is_wrong_is_said_before_anything_runs():
    program = Program(model, DATA)
    never = {"a": Broken(error=AssertionError)}
    with pytest.raises(ShapeError, match=r"truth of 'x' has shape \(3,\), the site has \(4,\)"):
        compare(program, never, draws=10, truth={"x": torch.zeros(3)})
    with pytest.raises(OptionError, match=r"the reference has sites \['z'\], the program \['x'\]"):
        compare(program, never, draws=10, reference=Posterior({"z": torch.zeros(1, 100)}))
    with pytest.raises(OptionError, match=r"expected a ppl\.Program, got function; wrap the model"):
        compare(model, never, draws=10)
    for backends in ([Normal()], Normal()):
        with pytest.raises(OptionError, match=r'by name, such as \{"NUTS": ppl\.NUTS\(\)\}, got'):
            compare(program, backends, draws=10)
    with pytest.raises(OptionError, match="draws must be an integer of at least 1, got 0"):
        compare(program, never, draws=0)


def test_truth_as_plain_numbers():
    figures = [
        compare(Program(model, DATA), {"a": Normal()}, draws=50, truth={"x": truth}).table.loc["a", "rmse"]
        for truth in (MEAN, MEAN.tolist(), MEAN.numpy())
    ]
    assert figures[0] == figures[1] == figures[2] > 0


def test_same_seed_same_table():
    first, second = (compare(Program(model, DATA), {"a": Normal()}, 50, reference=exact).table for _ in range(2))
    assert first.drop(columns="seconds").equals(second.drop(columns="seconds"))


def test_save_and_show(comparison, tmp_path):
    from io import StringIO

    from rich.console import Console

    folder = comparison.save(tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["narrow.nc", "right.nc", "shifted.nc", "table.csv"]
    assert torch.equal(Posterior.load(folder / "right.nc")["x"], comparison.posteriors["right"]["x"])
    out = StringIO()
    comparison.show(Console(file=out, width=200))
    assert "broken: NotFiniteError" in out.getvalue()


def test_file_names():
    assert file_name("DPS, 200 steps") == "dps_200_steps"
    assert file_name("ΠGDM") == "pigdm"


# -- the page and the picture


SHAPE = (1, 6, 6)
KEEP = torch.ones(36, dtype=torch.bool)
KEEP[14:22] = False


def inpaint(y: Tensor) -> None:
    """Pixels in part, an unknown level of noise, and a vector that has no part in the data."""
    x = pyro.sample("x", dist.Normal(torch.zeros(SHAPE), 1.0).to_event(3))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.flatten()[KEEP] + 0 * w.sum(), sigma).to_event(1), obs=y)


@pytest.fixture(scope="module")
def images() -> Comparison:
    g = torch.Generator().manual_seed(0)
    truth = {"x": torch.rand(SHAPE, generator=g), "sigma": torch.tensor(0.3), "w": torch.zeros(5)}
    draws = {
        "x": truth["x"] + 0.1 * torch.randn(1, 20, *SHAPE, generator=g),
        "sigma": 0.3 + 0.05 * torch.rand(1, 20, generator=g),
        "w": torch.randn(1, 20, 5, generator=g),
    }
    posterior = Posterior(draws, cost=Cost(seconds=1.0), attrs={"exact": "never", "notes": ["a <note>"]})
    program = Program(inpaint, truth["x"].flatten()[KEEP])
    return compare(program, {"one": posterior, "bad": "no backend"}, truth=truth)


def test_sites_are_shown_as_what_they_are(images):
    assert [kind_of(images.program, s) for s in ("x", "sigma", "w")] == ["image", "scalar", "vector"]


def test_residual_and_data_lie_in_their_pixels(images):
    found, data = pictures(images, "x", 3)
    posterior = images.posteriors["one"]
    mean, sigma = posterior.mean("x"), posterior.mean("sigma")
    y = images.program.data["y"]
    expected = torch.full((36,), torch.nan)
    expected[KEEP] = (y - mean.flatten()[KEEP]) / sigma
    torch.testing.assert_close(found["one"].residual[0].flatten().float(), expected, equal_nan=True)
    expected[KEEP] = y
    torch.testing.assert_close(data[0].flatten().float(), expected, equal_nan=True)
    assert found["one"].draws.shape == (1, 3, *SHAPE)


def test_page_is_self_contained(images, tmp_path):
    path = images.to_html(tmp_path / "deep" / "report.html", title="A & B")
    text = path.read_text()
    assert "<title>A &amp; B</title>" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<script" not in text
    assert text.count("<img ") == 2 + 3 + 8  # truth and data; mean, sd, residual; draws
    assert text.count('<svg class="plot"') == 2  # sigma and w
    assert "a &lt;note&gt;" in text
    assert "OptionError" in text
    assert "def inpaint(y" in text


def test_page_of_two_sections(images, comparison, tmp_path):
    path = write_page(tmp_path / "two.html", "Two", [Section("One", images, "Words."), Section("Other", comparison)])
    text = path.read_text()
    assert text.count("<h2>") == 2
    assert "<p>Words.</p>" in text
    assert 'class="error"' in text


def test_picture(images, comparison, tmp_path):
    path = write_figure(images, tmp_path / "report.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(OptionError, match="no image to draw"):
        write_figure(comparison, tmp_path / "none.png")
