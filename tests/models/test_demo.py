"""The demo in its smallest size, its budget of denoiser evaluations, and the programs it runs."""

from __future__ import annotations

import pytest
import torch

import models.demo
import pilotlight
from models.demo import SCALES, digits_backends, fashion_backends, run_demo
from models.programs import digits_unknown_noise, inpaint_fashion, read_problem
from ppl.errors import OptionError
from ppl.posterior import Posterior


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert pilotlight.main(["demo", "--smoke", "--quiet", "--output", str(folder)]) == 0
    return folder


def test_everything_is_written(output):
    assert sorted(p.name for p in output.iterdir()) == ["digits", "fashion", "report.html", "report.png"]
    names = sorted(p.stem for p in (output / "fashion").glob("*.nc"))
    assert names == ["dps_6_steps", "noise_space_svi", "pigdm", "red_diff", "twisted_smc"]
    posterior = Posterior.load(output / "fashion" / "pigdm.nc")
    assert posterior["x"].shape == (2, 1, 4, 1, 28, 28)
    digits = Posterior.load(output / "digits" / "gibbs.nc")
    assert digits["sigma"].shape == (4, 2)
    assert bool((digits["sigma"] > 0).all())


def test_page_shows_every_backend_of_both_programs(output):
    text = (output / "report.html").read_text()
    for name in [*fashion_backends("smoke"), *digits_backends("smoke")]:
        assert f"<th>{name}</th>" in text
    # Truth and data of two images and a digit; mean, sd, residual and four draws of each backend and image.
    assert text.count("<img ") == 2 * (2 + 5 * 7) + (2 + 2 * 3 + 8 + 4)
    assert "def inpaint(y" in text
    assert "def unknown_noise(y" in text
    assert 'class="error"' not in text


def test_report_png_shows_the_page_in_one_picture(output):
    assert (output / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_ctrl_c_writes_what_is_finished(tmp_path, monkeypatch, capsys):
    calls = []
    infer = models.demo.fashion_backends("smoke")["RED-diff"].run.__func__

    def second_stops(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 1:  # both images of the first backend are done, in one run
            raise KeyboardInterrupt
        return infer(self, *args, **kwargs)

    from inverse import REDDiff

    monkeypatch.setattr(REDDiff, "run", second_stops)
    backends = {"first": REDDiff(steps=2), "second": REDDiff(steps=3), "third": REDDiff(steps=4)}
    monkeypatch.setattr(models.demo, "fashion_backends", lambda size: backends)
    assert not run_demo(tmp_path, size="smoke", progress=False)
    assert [p.name for p in (tmp_path / "fashion").glob("*.nc")] == ["first.nc"]
    assert "interrupted" in (tmp_path / "report.html").read_text()


def test_budget_of_the_normal_size():
    """At most 50 evaluations per draw but for DPS: two maps of ten steps per draw of the guide, ten per fit step."""
    scale = SCALES["normal"]
    backends = fashion_backends("normal")
    assert scale.draws == 64
    assert [b.steps for n, b in backends.items() if n in ("ΠGDM", "twisted SMC", "RED-diff")] == [50, 50, 50]
    assert backends["twisted SMC"].runs == 1
    fit = backends["noise-space SVI"].engine
    assert 10 * fit.steps * fit.particles + 2 * 10 * scale.draws <= 50 * scale.draws
    assert backends["DPS, 200 steps"].steps == 200


def test_unknown_size():
    with pytest.raises(OptionError, match="smoke, normal, full"):
        run_demo("nowhere", size="huge")  # type: ignore[arg-type]


# -- programs


def test_hidden_pixels_are_not_in_the_data():
    problem = inpaint_fashion(images=(0, 1), sigma=0.1)
    assert problem.program.problems == 2
    assert problem.truth["x"].shape == (2, 1, 28, 28)
    y = problem.program.observed_data()["y"]
    assert y.shape == (2, 28 * 28 - 16 * 15)
    seen = torch.ones(28, 28, dtype=torch.bool)
    seen[2:18, 13:28] = False
    z = (y - problem.truth["x"][:, 0][:, seen]) / 0.1
    # 1088 standard normals: mean within 5 / sqrt(n), variance within 5 sqrt(2 / n); false alarm 1e-6.
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / z.numel()) ** 0.5


def test_same_seed_same_data():
    first, second = (digits_unknown_noise(seed=3).program.data["y"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, digits_unknown_noise(seed=4).program.data["y"])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (inpaint_fashion, {"images": ()}),
        (inpaint_fashion, {"images": (99,)}),
        (inpaint_fashion, {"sigma": 0.0}),
        (digits_unknown_noise, {"hidden": 8}),
        (digits_unknown_noise, {"sigma": -1.0}),
    ],
)
def test_bad_options(function, options):
    with pytest.raises(OptionError, match="got"):
        function(**options)


def test_problem_by_name():
    problem = read_problem("models.programs:digits_unknown_noise", {"sigma": 0.3})
    assert float(problem.truth["sigma"]) == pytest.approx(0.3)
