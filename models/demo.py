"""The demonstration: five backends on one program of real images, and a program whose noise level is unknown."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.programs import Problem, digits_unknown_noise, inpaint_fashion
from ppl.errors import OptionError

if TYPE_CHECKING:
    from ppl.compare import Comparison

__all__ = ["Size", "digits_backends", "fashion_backends", "run_demo"]

Size = Literal["smoke", "normal", "full"]


@dataclass(frozen=True)
class _Scale:
    """How much work a demonstration is."""

    draws: int
    steps: int
    dps_steps: int
    svi_steps: int
    gibbs_draws: int
    digits_svi_steps: int
    gibbs_warmup: int


SCALES: dict[str, _Scale] = {
    "smoke": _Scale(4, 4, 6, 4, 2, 6, 1),
    "normal": _Scale(64, 50, 200, 192, 32, 60, 10),
    "full": _Scale(256, 100, 500, 1000, 256, 1000, 100),
}


def fashion_backends(size: Size = "normal") -> dict[str, Any]:
    """Backends for the program with images; all but DPS stay within 50 denoiser evaluations per draw at normal size.

    Example:
        >>> list(fashion_backends())[:2]
        ['DPS, 200 steps', 'ΠGDM']
    """
    import inverse
    import ppl

    scale = SCALES[size]
    # A draw of the guide costs two maps of ten calls, for itself and for its density; the rest is for the fit.
    svi = ppl.SVI(guide=ppl.LowRank(8, init_scale=0.3), steps=scale.svi_steps, particles=1, lr=0.1)
    return {
        f"DPS, {scale.dps_steps} steps": inverse.DPS(steps=scale.dps_steps),
        "ΠGDM": inverse.PiGDM(steps=scale.steps),
        "twisted SMC": inverse.TwistedSMC(steps=scale.steps, runs=1 if size != "full" else 4),
        "RED-diff": inverse.REDDiff(steps=scale.steps),
        "noise-space SVI": ppl.NoiseSpace(svi),
    }


def digits_backends(size: Size = "normal") -> dict[str, Any]:
    """Backends for the program whose noise level is a latent site."""
    import ppl
    from inverse.particles import NoiseAndReturn

    scale = SCALES[size]
    blocks: dict[tuple[str, ...], Any] = {
        ("x",): NoiseAndReturn(steps=4 if size == "smoke" else 12, particles=2 if size == "smoke" else 8),
        ("sigma",): ppl.SliceKernel(),
    }
    svi = ppl.SVI(guide=ppl.FullRank(), steps=scale.digits_svi_steps, particles=8, lr=0.1)
    backends: dict[str, Any] = {
        "Gibbs": ppl.Gibbs(blocks, warmup=scale.gibbs_warmup),
        "noise-space SVI": ppl.NoiseSpace(svi),
    }
    if size == "full":
        # A gradient is ten calls forward and back, a trajectory at most 32 of them: the chains end in ten minutes.
        backends["noise-space HMC"] = ppl.NoiseSpace(ppl.HMC(warmup=100, max_steps=32))
    return backends


def _digits_draws(scale: _Scale, size: Size) -> dict[str, int]:
    """Draws per chain: Gibbs and Hamiltonian chains are many, a fit is one."""
    few = {"Gibbs": scale.gibbs_draws, "noise-space HMC": max(scale.gibbs_draws // 8, 1)}
    return {name: few.get(name, scale.draws) for name in digits_backends(size)}


def run_demo(output: str | Path = "demo", *, size: Size = "normal", seed: int = 0, progress: bool = True) -> bool:
    """Run everything, print the tables, and write report.html, report.png and the posteriors.

    Args:
        output: folder, made if it is not there.
        size: "smoke" for seconds, "normal" for minutes, "full" for an hour or more.
        seed: of data and backends.
        progress: show bars with the cost.

    Returns:
        Whether everything ran to its end; after Ctrl-C what was finished is written.
    """
    import ppl
    from ppl.report import Section, write_figure, write_page

    if size not in SCALES:
        raise OptionError(f"size must be one of {', '.join(SCALES)}, got {size!r}")
    place = Path(output)
    place.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    scale = SCALES[size]
    parts: list[tuple[str, str, Problem, Mapping[str, Any], int | dict[str, int]]] = [
        ("Hidden pixels, known noise", "fashion", inpaint_fashion(seed=seed), fashion_backends(size), scale.draws),
        ("Unknown noise", "digits", digits_unknown_noise(seed=seed), digits_backends(size), _digits_draws(scale, size)),
    ]
    sections: list[Section] = []
    comparisons: dict[str, Comparison] = {}
    for heading, name, problem, backends, draws in parts:
        comparison = ppl.compare(problem.program, backends, draws, seed=seed, truth=problem.truth, progress=progress)
        comparisons[name] = comparison
        sections.append(Section(heading, comparison, problem.about))
        comparison.save(place / name)
        comparison.show()
        if not comparison.complete:
            break
    page = write_page(place / "report.html", "Pilotlight: one program, many posteriors", sections)
    written = [page]
    if any(len(p) > 0 for p in comparisons["fashion"].posteriors.values()):
        written.append(write_figure(comparisons["fashion"], place / "report.png"))
    print(f"wrote {', '.join(map(str, written))} and the posteriors in {place}/*/ in {time.monotonic() - began:.0f} s")
    return all(c.complete for c in comparisons.values())
