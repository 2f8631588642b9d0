"""Few-shot learners on the same tasks, with the same network and the same number of training episodes.

    make bench-meta                                     everything
    python -m benchmarks.meta --quick                   a few minutes on one thread
    python -m benchmarks.meta --parts sinusoid --steps 3000 --seeds 0 1 2
    python -m benchmarks.meta --parts sinusoid line-sine --table     mean and spread over seeds of rows in the file

Regression: sinusoids (noise 0.1) and Line-Sine (noise 0.25), a network 1-32-32-1, 256 test tasks of 40 queries, of 5
and of 10 shots. One fit serves both: training batches have 5 or 10 shots, of 20 points in all. Every learner sees the
same batches. Printed: squared error against noisy targets, mean log-likelihood of a query, PIT error (mean distance of
the distribution function at the targets from uniform), with 95 % intervals over the tasks, and seconds per episode of
training and of adaptation with prediction. NIW-Meta and ABML are told the noise; CNP and the ridge head learn theirs;
MAML and Reptile, which have no predictive law, get the constant noise that fits 256 further training episodes best;
"widened" adds such a constant to the laws of ABML, "cooled" chooses the temperature of NIW-Meta, both by the likelihood
of those episodes. Learners and options are in `benchmarks.meta_learners`; `--paces` tries other learning rates on
development tasks.

Classes, 5-way, 1 and 5 shots, 600 episodes of 5 queries a class: digits and Fashion-MNIST, trained on classes 0-4 and
tested on held-out images of 5-9, and Omniglot characters, trained on six alphabets and tested on Balinese and Tagalog;
images of the last two are averaged to 14 x 14. Accuracy, expected calibration error and log-likelihood. The
temperature of NIW-Meta is chosen on 64 fresh training episodes. "no training" takes Reptile's steps from the network as
it begins. Rows go to runs/meta.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.meta_learners import (
    NOISE,
    PIXELS,
    ROOT,
    Budget,
    class_learners,
    classes,
    either,
    regression_learners,
    seeded,
    tasks,
)
from benchmarks.results import append
from models.meta import Episodes, EpisodeSource
from models.meta.predictive import Predictive, expected_calibration_error, pit_error
from ppl.errors import NotFiniteError

RESULTS = ROOT / "runs" / "meta.jsonl"
METRICS = ("squared error", "log-likelihood", "PIT error", "training", "adapting")
CLASS_METRICS = ("accuracy", "ECE", "log-likelihood", "training", "adapting")
SCORED, DEVELOPMENT = 2026, 4242  # seeds of test tasks


def interval(each: Tensor) -> tuple[float, float]:
    """Mean over tasks and half its 95 % interval."""
    each = each.double()
    return float(each.mean()), 1.96 * float(each.std()) / math.sqrt(len(each))


def bootstrap(score: Callable[[Tensor], Tensor], tests: int, rounds: int = 200) -> tuple[float, float]:
    """A score of pooled queries and half its 95 % interval, by resampling the tasks."""
    generator = seeded(5)
    index = torch.randint(tests, (rounds, tests), generator=generator)
    spread = torch.stack([score(row) for row in index]).std()
    return float(score(torch.arange(tests))), 1.96 * float(spread)


def scores(found: Predictive | Sequence[Predictive], episodes: Episodes) -> dict[str, tuple[float, float]]:
    """What is printed, each with half its interval; of one prediction, or of several for some episodes each."""
    parts = [found] if isinstance(found, Predictive) else found
    y, tests = episodes.query.y, len(episodes)
    targets = y.split([part.law.batch_shape[1] for part in parts])

    def joined(value: Callable[[Predictive, Tensor], Tensor]) -> Tensor:
        return torch.cat([value(part, target) for part, target in zip(parts, targets, strict=True)])

    mean = joined(lambda part, _: part.mean)
    out = {"log-likelihood": interval(joined(Predictive.log_prob).mean(1))}
    if episodes.way is None:
        cdf = joined(Predictive.cdf)
        out["squared error"] = interval((mean - y).square().mean(1))
        out["PIT error"] = bootstrap(lambda i: pit_error(cdf[i].flatten()), tests)
        return out
    out["accuracy"] = interval((mean.argmax(-1) == y).double().mean(1))
    out["ECE"] = bootstrap(lambda i: expected_calibration_error(mean[i].flatten(0, 1), y[i].flatten()), tests)
    return out


def run(part: str, budget: Budget, only: Sequence[str] | None) -> None:
    """Fit, test and print all learners of one part."""
    tests: dict[int, Episodes]
    if part in PIXELS:
        learners = class_learners(part, budget)
        shots = (1, 5)
        train: list[EpisodeSource] = [classes(part, k, test=False) for k in shots]
        tests = {k: classes(part, k, test=True)(budget.tests, seeded(SCORED)) for k in shots}
    else:
        learners = regression_learners(part, budget)
        shots = (5, 10)
        train = [tasks(part, k, 20 - k) for k in shots]
        which = SCORED if budget.pace is None else DEVELOPMENT
        tests = {k: tasks(part, k, 40)(budget.tests, seeded(which)) for k in shots}
    episodes = budget.steps * budget.batch
    heading = f"{part}: {budget.steps} steps of {budget.batch} episodes, seed {budget.seed}, {budget.tests} test tasks"
    print(f"\n{heading}{'' if budget.pace is None else f' of development, pace {budget.pace:g}'}", flush=True)
    for name, fit in learners.items():
        if only and name not in only:
            continue
        row: dict[str, Any] = {"part": part, "steps": budget.steps, "batch": budget.batch, "tests": budget.tests}
        row |= {"draws": budget.draws, "seed": budget.seed}
        row |= {} if budget.pace is None else {"pace": budget.pace}
        begin = time.process_time()
        try:
            predictors = fit(either(train))
        except NotFiniteError as error:
            append(RESULTS, row | {"learner": name, "diverged": str(error)})
            print(f"| {name} | diverged: {error} |", flush=True)
            continue
        training = (time.process_time() - begin) / episodes
        for label, predict in predictors.items():
            for k, new in tests.items():
                begin = time.process_time()
                # Some at a time: draws of all networks for all tasks at once take gigabytes.
                parts = [predict(new[i : i + 100]) for i in range(0, len(new), 100)]
                adapting = (time.process_time() - begin) / len(new)
                found = row | {"learner": label, "shots": k, "training": training, "adapting": adapting}
                found |= scores(parts, new)
                append(RESULTS, found)
                show(found)


def show(row: dict[str, Any]) -> None:
    """One row of the table."""
    values = " | ".join(f"{n} {v[0]:.3f} ± {v[1]:.3f}" for n, v in row.items() if isinstance(v, tuple))
    times = f"{1e3 * row['training']:.2f} / {1e3 * row['adapting']:.2f} ms"
    print(f"| {row['learner']} | {row['shots']} | {values} | {times} |", flush=True)


def table(part: str, steps: int) -> None:
    """Means over the seeds of stored rows, with half the 95 % interval over tasks and the spread over seeds."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows = [
        row for row in rows if (row["part"], row["steps"]) == (part, steps) and "shots" in row and "pace" not in row
    ]
    latest = {(row["learner"], row["shots"], row.get("seed", 0)): row for row in rows}
    metrics = CLASS_METRICS if part in PIXELS else METRICS
    titles = [f"ms {name}" if name in METRICS[-2:] else name for name in metrics]
    print(f"\n{part}, {steps} steps: mean (half the 95 % interval over tasks; sd over seeds)\n")
    print(f"| | seeds | {' | '.join(titles)} |\n|{'---|' * (2 + len(metrics))}")
    for learner in dict.fromkeys(row["learner"] for row in latest.values()):
        cells = []
        for metric in metrics:
            each = []
            for k in sorted({row["shots"] for row in latest.values()}):
                own = [row[metric] for row in latest.values() if row["learner"] == learner and row["shots"] == k]
                if own:
                    values = torch.tensor(own, dtype=torch.float64)
                    if values.ndim == 1:  # seconds
                        each.append(f"{1e3 * float(values.mean()):.2f}")
                        continue
                    spread = f"; {float(values[:, 0].std()):.3f}" if len(own) > 1 else ""
                    each.append(f"{float(values[:, 0].mean()):.3f} ({float(values[:, 1].mean()):.3f}{spread})")
            cells.append(", ".join(each))
        print(f"| {learner} | {len({k[2] for k in latest if k[0] == learner})} | {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*NOISE, *PIXELS], default=[*NOISE, *PIXELS], metavar="PART")
    parser.add_argument("--learners", nargs="+", help="some of them, by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training: starts and episodes")
    parser.add_argument("--steps", type=int, help="of every learner; 8000 for regression, 1000 for classes")
    parser.add_argument(
        "--paces", nargs="+", type=float, default=[None], help="learning rates of regression, in firsts"
    )
    parser.add_argument("--quick", action="store_true", help="400 and 100 steps")
    parser.add_argument("--table", action="store_true", help="no runs: a table of those in the file, over all seeds")
    options = parser.parse_args(arguments)
    for part in options.parts:
        images = part in PIXELS
        steps = options.steps or ((100 if images else 400) if options.quick else (1000 if images else 8000))
        if options.table:
            table(part, steps)
            continue
        for seed, pace in itertools.product(options.seeds, options.paces):
            run(part, Budget(steps, 8, 600 if images else 256, 20 if images else 50, seed, pace), options.learners)


if __name__ == "__main__":
    main()
