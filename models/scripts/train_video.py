"""Train and measure the latent video models: `python -m models.scripts.train_video --motions smooth bouncing`.

For every motion two models, driven by Brownian and by fractional noise (Hurst index learned), with equal networks,
videos and seeds. They take turns, so that a machine's load falls on both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import models
from models.latent_training import FitConfig, LatentFit
from models.moving_digits import moving_digits
from models.video import WEIGHTS, VideoConfig, score, video_model

__all__ = ["AHEAD", "FRAMES", "MOTIONS", "NOISES", "export", "main", "measure", "videos"]

FRAMES, AHEAD = 16, 8  # frames that are seen, in training too, and frames to forecast
MOTIONS: dict[str, dict[str, Any]] = {
    "smooth": {"motion": "fractional", "hurst": 0.8, "speed": 0.6},
    "bouncing": {"motion": "bouncing", "speed": 1.5},
    "rough": {"motion": "fractional", "hurst": 0.3, "speed": 1.0},
}
NOISES: dict[str, VideoConfig] = {"brownian": VideoConfig(hurst=None), "fractional": VideoConfig(hurst="learn")}


def videos(motion: str, held_out: bool = False) -> Callable[[int, int, torch.Generator], Tensor]:
    """Videos of training or held-out digits: (count, frames, generator) -> (count, frames, 16, 16)."""
    data = models.digits()
    images = ((data.held_out if held_out else data.train)[:, 0] + 1) / 2
    return lambda count, frames, generator: moving_digits(images, count, frames, generator, **MOTIONS[motion])


def start(motion: str, noise: str, config: FitConfig, batch: int) -> LatentFit:
    """A run at its first step."""
    source = videos(motion)
    model = video_model(NOISES[noise], torch.Generator().manual_seed(config.seed))
    return LatentFit(model, lambda generator: source(batch, FRAMES, generator), config)


def measure(run: LatentFit, motion: str, count: int, draws: int, seed: int = 1) -> dict[str, Tensor]:
    """Scores of a trained model on held-out digits and motions, (count,) each, the same for every model."""
    y = videos(motion, held_out=True)(count, FRAMES + AHEAD, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    parts = [score(run.model, part, FRAMES, draws, generator) for part in y.split(32)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summary(scores: dict[str, Tensor]) -> dict[str, list[float]]:
    """Means with their standard errors."""
    return {n: [round(float(v.mean()), 3), round(float(v.std() / len(v) ** 0.5), 3)] for n, v in scores.items()}


def export(runs: dict[tuple[str, str], LatentFit], known: dict[str, Any], folder: Path) -> Path:
    """Write the weights of the models, the facts and a card."""
    tensors = {
        f"{m}_{n}/{key}": w.detach().half().contiguous()
        for (m, n), run in runs.items()
        for key, w in run.model.state_dict().items()
    }
    raw = save(tensors, metadata={"models": WEIGHTS})
    (folder / f"{WEIGHTS}.safetensors").write_bytes(raw)
    facts = {
        "format": 1,
        "name": WEIGHTS,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "bytes": len(raw),
        "data": "digits of scikit-learn (UCI Optical Recognition of Handwritten Digits), moved at random",
        "licence": "CC BY 4.0, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository",
        "script": f"python -m models.scripts.train_video --motions {' '.join({m: 0 for m, _ in runs})} --export FOLDER",
        "models": {
            f"{m}_{n}": {"config": NOISES[n].to_json(), "motion": MOTIONS[m], **known[f"{m}_{n}"]} for m, n in runs
        },
    }
    (folder / f"{WEIGHTS}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / f"{WEIGHTS}.md").write_text(card(facts))
    return folder / f"{WEIGHTS}.safetensors"


def card(facts: dict[str, Any]) -> str:
    """The model card."""
    columns = ("bound", "reconstruction", "draw", "best", "mean", "last", "distance", "covered")
    rows = "\n".join(
        f"| {name} | {m['hurst']:.2f} | "
        + " | ".join(f"{m['scores'][c][0]} ± {m['scores'][c][1]}" for c in columns)
        + " |"
        for name, m in facts["models"].items()
    )
    first = next(iter(facts["models"].values()))
    return f"""# {WEIGHTS}

Latent video models of a handwritten digit that moves at random through 16 x 16 pixels:
`models.video.load_video(motion, noise)`.

| | |
|---|---|
| data | {facts["data"]}; digits of the scores below were held out |
| licence of the data | {facts["licence"]} |
| training | {first["steps"]} steps of {first["batch"]} videos of {FRAMES} frames, equal for all models |
| made by | `{facts["script"]}` |
| bytes | {facts["bytes"]} |
| SHA-256 | `{facts["sha256"]}` |

Scores of {first["videos"]} held-out videos, mean and standard error: bound on the log evidence of a frame in nats; PSNR
in dB of one reconstruction, and of {AHEAD} frames to come: of one draw, of the best of {first["draws"]}, of their mean,
and of the last frame held still; distance in pixels of the mean place of the digit from the truth, and share of
coordinates in the central 90 % of the draws.

| model | H | bound | reconstruction | draw | best | mean | last frame | distance | covered |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main(arguments: list[str] | None = None) -> None:
    """Train in turns, resuming from checkpoints; then measure, and export where a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--motions", nargs="+", choices=sorted(MOTIONS), default=["smooth", "bouncing"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of networks at first, batches and driving numbers")
    parser.add_argument("--folder", type=Path, default=Path("runs/video"), help="of checkpoints; one for each seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--videos", type=int, default=256, help="held-out videos for the scores")
    parser.add_argument("--draws", type=int, default=20, help="forecasts of each")
    parser.add_argument("--export", type=Path, default=None, help="write weights, facts and card here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config, turn = FitConfig(steps=options.steps, seed=options.seed), 100
    runs = {(m, n): start(m, n, config, options.batch) for m in options.motions for n in NOISES}
    for until in range(turn, options.steps + turn, turn):
        for (motion, noise), run in runs.items():
            before = run.step
            history = run.run(until, options.folder / f"{motion}_{noise}.safetensors", every=turn)
            if run.step < min(until, options.steps):
                print("interrupted; the same command goes on")
                return
            if before < run.step <= until:
                print(
                    f"{motion} {noise}: step {run.step}, bound of a frame {float(history[-turn:].mean()):.1f}, "
                    f"H {run.hurst[-1]:.3f}, sigma {float(run.model.log_sigma.detach().exp()):.3f}, "
                    f"{run.seconds:.0f} s",
                    flush=True,
                )
    for run in runs.values():  # scores are those of the weights that are written
        run.model.load_state_dict({name: w.half().float() for name, w in run.model.state_dict().items()})
    known: dict[str, Any] = {}
    for motion in options.motions:
        scores = {noise: measure(runs[motion, noise], motion, options.videos, options.draws) for noise in NOISES}
        for noise, found in scores.items():
            run = runs[motion, noise]
            known[f"{motion}_{noise}"] = {
                "hurst": round(run.hurst[-1], 3), "steps": run.step, "batch": options.batch,
                "seconds": round(run.seconds), "videos": options.videos, "draws": options.draws,
                "scores": summary(found),
            }  # fmt: skip
            print(motion, noise, json.dumps(known[f"{motion}_{noise}"]), flush=True)
        paired = {name: scores["fractional"][name] - scores["brownian"][name] for name in scores["brownian"]}
        print(motion, "fractional less brownian", json.dumps(summary(paired)), flush=True)
    if options.export is not None:
        print(export(runs, known, options.export))


if __name__ == "__main__":
    main()
