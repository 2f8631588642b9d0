"""The side-by-side benchmark on a small cell, without the peers: problems, columns, files, verdicts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import inverse
from benchmarks.inverse.methods import FIFTY, RECOMMENDED, Method, Ours, ours
from benchmarks.inverse.problems import CELLS, Cell, Judge, Score, Task
from benchmarks.inverse.records import Key, Records
from benchmarks.inverse.run import Runner
from benchmarks.inverse.table import rows, show, verdicts

GAUSSIAN = Cell(16, 6, 0.05, problems=2, best=1, defaults=1, tuning=1)
MIXTURE = Cell(8, 1, problems=2, best=1, defaults=1, tuning=1)
DRAWS = 400


def exact_draws(task, draws):
    """A peer that knows the answer."""
    x = task.problem.posterior.draw((draws,), torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))))
    return x / task.half


def shifted(task, draws, shift=1.0):
    """A peer that is off by `shift` in every entry, and asks the denoiser twice per draw."""
    for _ in range(2):
        task.denoise(torch.zeros(draws, task.dim, dtype=torch.float64), 0.1)
    return exact_draws(task, draws) + shift / task.half


PEERS = [
    Method("peer", "Shifted", shifted, {"default": {}, "less": {"shift": 0.5}}),
    Method("peer", "Broken", lambda task, draws: torch.full((draws, task.dim), math.nan), {"default": {}}),
]


def test_cells_keep_tuning_problems_apart_from_scored_ones():
    for cell in CELLS:
        assert not set(range(cell.problems)) & set(cell.tuning_seeds(close=True))
        assert cell.best <= cell.problems
        assert cell.defaults <= cell.problems
    scored, tuned = MIXTURE.problem(0), MIXTURE.problem(MIXTURE.tuning_seeds()[0])
    assert not torch.allclose(scored.matrix, tuned.matrix)


def test_where_nothing_is_tuned_peers_run_at_the_setting_they_are_given(tmp_path):
    cell = dataclasses.replace(MIXTURE, tuning=0, defaults=0, taken=(("peer Shifted", "less"),))
    runner = Runner(Records(tmp_path / "results.jsonl"), draws=DRAWS, tuning_draws=DRAWS)
    runner.tune(cell, PEERS)
    runner.peers(cell, PEERS)
    assert [(key.phase, key.method, key.setting) for key in runner.records.scores] == [("score", "Shifted", "less")]
    (row,) = rows(runner, cell, [], PEERS)
    assert row.setting == "taken: less"


def test_exact_draws_score_at_the_floor():
    """Bounds are five standard errors: 1e-5 over both problems and all columns."""
    for cell in (GAUSSIAN, MIXTURE):
        problem = cell.problem(0)
        judge = Judge(problem, DRAWS)
        score = Ours("Exact", inverse.Exact).run(problem, judge, "default", DRAWS, seed=3)
        # Two modes make the distance follow one binomial share, in units of its own mean: |z| / E|z| < 5 / 0.8.
        assert 0.4 < score.ratio < (1.6 if cell is GAUSSIAN else 5 / 0.8)
        # sum_i l_i z_i^2 / sum_i l_i exceeds 25 with less than the probability that one z^2 does.
        assert score.mean_error < 5 / DRAWS**0.5
        if cell is GAUSSIAN:
            assert score.row == pytest.approx(1, abs=5 * (2 / DRAWS) ** 0.5)
            assert score.null == pytest.approx(1, abs=5 * (2 / DRAWS) ** 0.5)
            assert math.isnan(score.tv)
        else:
            # Each share has sd at most 1/2 n^(-1/2), and few are far from zero.
            assert score.tv < 5 * 0.5 * (len(problem.posterior.weights) / DRAWS) ** 0.5


def test_columns_see_what_they_should():
    problem = GAUSSIAN.problem(0)
    judge = Judge(problem, DRAWS)
    x = judge.sets[0]
    assert judge.score(x + 3, 0, 0).ratio > 3
    assert judge.score(x + 3, 0, 0).mean_error > 1
    # Twice the spread in the row space of A alone.
    projector = torch.linalg.pinv(problem.matrix) @ problem.matrix
    wide = x + (x - x.mean(0)) @ projector
    before, after = judge.score(x, 0, 0), judge.score(wide, 0, 0)
    assert after.row == pytest.approx(4 * before.row)
    assert after.null == pytest.approx(before.null)
    lost = judge.score(torch.full_like(x, math.nan), 0, 0)
    assert math.isinf(lost.ratio)
    with pytest.raises(ValueError, match="expected draws"):
        judge.score(x[1:], 0, 0)


def test_mode_column_sees_a_lost_mode():
    problem = MIXTURE.problem(0)
    exact = problem.posterior
    judge = Judge(problem, DRAWS)
    top = int(exact.weights.argmax())
    generator = torch.Generator().manual_seed(0)
    one = exact.means[top] + torch.randn(DRAWS, 8, generator=generator, dtype=torch.float64)
    assert judge.score(one, 0, 0).tv > 1 - float(exact.weights[top]) - 0.1


def test_task_is_the_same_problem_in_units_of_its_range():
    for cell in (GAUSSIAN, MIXTURE):
        problem = cell.problem(0)
        task = Task(problem)
        x = problem.prior.draw((50,), torch.Generator().manual_seed(0))
        assert (x.abs() < task.half).all()
        level = 0.3
        expected = problem.prior.denoise(x, torch.tensor(level * task.half, dtype=torch.float64))
        torch.testing.assert_close(task.denoise(x / task.half, level) * task.half, expected)
        assert task.evals == 50
        residual = (task.y - problem.matrix @ (problem.truth / task.half)) / task.sigma
        assert residual.norm() < 5 * len(task.y) ** 0.5
        assert task.lowest < task.smallest < task.largest


def test_run_resumes_and_prints_every_column(tmp_path, capsys):
    path = tmp_path / "inverse.jsonl"
    chosen = [m for m in ours() if m.name in (RECOMMENDED, FIFTY, "Exact (control)")]

    def run():
        runner = Runner(Records(path), draws=100, tuning_draws=50)
        runner.ours(MIXTURE, chosen, first=True)
        runner.tune(MIXTURE, PEERS)
        runner.peers(MIXTURE, PEERS)
        runner.ours(MIXTURE, chosen, first=False)
        return runner

    runner = run()
    lines = path.read_text().count("\n")
    assert lines == 2 * 2 + 3 + 2 + 2 - 1 + 1  # ours, settings tried, at best, at default (one of them both), control
    again = run()
    assert path.read_text().count("\n") == lines
    assert runner.best(MIXTURE, PEERS[0]) == again.best(MIXTURE, PEERS[0]) == "less"
    capsys.readouterr()
    show(again, [MIXTURE], chosen, PEERS)
    table = capsys.readouterr().out
    assert f"| {MIXTURE.name} |" in table  # the matrix
    for text in ("best: less", "default, the best", "SW / floor", "mode TV", "evals", f"{RECOMMENDED}", "goal 1.2"):
        assert text in table
    shifted_row = next(r for r in rows(again, MIXTURE, chosen, PEERS) if r.setting == "best: less")
    assert shifted_row.scores[0].evals == 2
    fifty = next(r for r in rows(again, MIXTURE, chosen, PEERS) if r.method == FIFTY)
    assert fifty.scores[0].evals == 50


def test_failed_run_is_a_row_that_says_why(tmp_path):
    def fails(task, draws):
        raise ValueError("no such thing")

    runner = Runner(Records(tmp_path / "x.jsonl"), draws=100, tuning_draws=50)
    runner.tune(MIXTURE, [Method("peer", "Fails", fails, {"default": {}})])
    again = Records(tmp_path / "x.jsonl")
    key = Key("tune", MIXTURE.name, "peer", "Fails", "default", 100, 50)
    assert math.isinf(again.scores[key].ratio)
    assert "no such thing" in again.errors[key]


def test_verdicts_turn_at_the_goal(tmp_path):
    records = Records(tmp_path / "x.jsonl")
    d8, d80 = dataclasses.replace(MIXTURE, best=2), Cell(80, 1, problems=2, best=2, tuning=1)
    score = Score(1.0, 0.1, 1.0, 1.0, 0.0, 50.0, 1.0)

    def put(cell, phase, package, method, setting, ratio, draws):
        for seed in (0, 1) if phase == "score" else cell.tuning_seeds():
            key = Key(phase, cell.name, package, method, setting, seed, draws)
            records.add(key, dataclasses.replace(score, ratio=ratio))

    peer = Method("peer", "P", shifted, {"default": {}})
    for cell, ratio in ((d8, 1.21), (d80, 1.0)):
        put(cell, "score", "pilotlight", RECOMMENDED, "default", ratio, 100)
        put(cell, "score", "pilotlight", FIFTY, "default", 1.24, 100)
        put(cell, "tune", "peer", "P", "default", 2.9, 50)
        put(cell, "score", "peer", "P", "default", 2.9, 100)
    runner = Runner(records, draws=100, tuning_draws=50)
    lines = verdicts({cell: rows(runner, cell, ours(), [peer]) for cell in (d8, d80)})
    text = "\n".join(lines)
    assert f"{RECOMMENDED} 1.21 (goal 1.2): NOT met" in text
    assert f"{FIFTY} 1.24 (goal 1.25): met" in text
    assert "2.9 times (goal 3): NOT met" in text
