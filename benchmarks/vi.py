"""One step of variational inference: by hand in PyTorch, as an objective over two Pyro programs, and by Pyro itself.

    make bench-vi                                          everything
    python -m benchmarks.vi --parts vae --batches 64       a part of it
    python -m benchmarks.vi --smoke                        a few calls of each

A step is a minibatch, its noise, the gradient of the objective and an update of Adam (fused, on both sides). Arms run
in turn, round after round, so that all meet the same machine; each round gives one ratio. Printed are the median of the
ratios and its upper 95 % bound, the 15th of 20 (of a binomial with one half). Seconds are those of the processor, so
that a shared machine does not blur them. Rows go to runs/vi.jsonl. Tracing and compiling are not in a step; they are
printed beside it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn

import ppl
from benchmarks.results import append
from models.air import AIR
from ppl.monitor import Monitor
from ppl.objectives.fit import _Fit

RESULTS = Path(__file__).parents[1] / "runs" / "vi.jsonl"
LR = 1e-3
Step = Callable[[], Any]


# Timing


def seconds(arms: dict[str, Step], rounds: int, calls: int) -> dict[str, list[float]]:
    """Processor seconds of one call of each arm, round by round; every second round goes backwards."""
    for step in arms.values():
        step()
        step()
    out: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in list(arms)[:: 1 if i % 2 else -1]:
            start = time.process_time()
            for _ in range(calls):
                arms[name]()
            out[name].append((time.process_time() - start) / calls)
    return out


def upper(ratios: Sequence[float]) -> float:
    """Upper 95 % bound of the median, without assumptions: an order statistic."""
    n = len(ratios)
    tail, k = 0.0, n + 1
    while k > 0 and tail + math.comb(n, k - 1) / 2**n <= 0.05:
        k -= 1
        tail += math.comb(n, k) / 2**n
    return sorted(ratios)[min(k, n) - 1]


def report(part: str, what: str, times: dict[str, list[float]], pairs: Sequence[tuple[str, str]]) -> None:
    """Print and store the ratios of some arms."""
    middle = {n: statistics.median(t) for n, t in times.items()}
    print(f"{part} {what}: " + ", ".join(f"{n} {1e3 * t:.2f} ms" for n, t in middle.items()), flush=True)
    for a, b in pairs:
        ratios = [x / y for x, y in zip(times[a], times[b], strict=True)]
        row = {"part": part, "what": what, "ratio": f"{a} / {b}", "median": statistics.median(ratios)}
        row |= {"upper": upper(ratios), "ms": [1e3 * middle[a], 1e3 * middle[b]], "rounds": len(ratios)}
        append(RESULTS, row)
        print(f"    {a} / {b}: {row['median']:.3f}, upper bound {row['upper']:.3f}", flush=True)


def ours(program: ppl.Program, guide: Any, objective: Any = None, estimators: Any = None) -> Step:
    """Steps of `SVI.fit`; the program's `compile` says whether its graph is compiled."""
    options = ppl.SVI(guide=guide, objective=objective, estimators=estimators, steps=100_000, particles=1, lr=LR)
    generator = torch.Generator().manual_seed(0)
    monitor = Monitor(generator=generator)
    fit = _Fit(options, program, generator, None)
    start = time.process_time()
    fit.prepare()
    print(f"    prepared in {time.process_time() - start:.1f} s: {'; '.join(fit.notes)}", flush=True)
    if fit.traced is None:
        raise RuntimeError(fit.notes)
    count = iter(range(100_000))
    return lambda: fit.step(next(count), monitor)


def by_hand(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Step:
    adam = torch.optim.Adam(parameters, lr=LR, fused=True)

    def step() -> None:
        adam.zero_grad()
        loss().backward()
        adam.step()

    return step


def pyros(model: Any, guide: Any, loss: Any, *args: Any) -> Step:
    pyro.clear_param_store()
    svi = pyro.infer.SVI(model, guide, Adam({"lr": LR}), loss)
    return lambda: svi.step(*args)


# Variational autoencoder, 784-200-10-200-784


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.loc, self.scale = nn.Linear(784, 200), nn.Linear(200, 10), nn.Linear(200, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.hidden(x))
        return self.loc(h), torch.exp(self.scale(h))


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Encoder(), nn.Sequential(nn.Linear(10, 200), nn.Tanh(), nn.Linear(200, 784))


def vae_programs(batch: int) -> tuple[Any, Any]:
    """Model and guide."""
    encoder, decoder = networks()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), batch) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[i])

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), batch) as i:
            loc, scale = encoder(x[i])
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def vae_by_hand(images: Tensor, batch: int, compiled: bool) -> Step:
    encoder, decoder = networks()
    generator = torch.Generator().manual_seed(0)

    def core(x: Tensor, noise: Tensor) -> Tensor:
        loc, scale = encoder(x)
        z = loc + scale * noise
        log_lik = -nn.functional.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        log_prior = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum()
        entropy = (0.5 * noise.square() + scale.log() + 0.5 * math.log(2 * math.pi)).sum()
        return -(log_lik + log_prior + entropy) * (len(images) / batch)

    run: Callable[..., Tensor] = torch.compile(core, dynamic=False) if compiled else core

    def loss() -> Tensor:
        rows = torch.randperm(len(images), generator=generator)[:batch]
        return run(images[rows], torch.randn(batch, 10, generator=generator))

    return by_hand(loss, [*encoder.parameters(), *decoder.parameters()])


def vae(batches: Sequence[int], compiled: Sequence[int], rounds: int, calls: int) -> None:
    images = (torch.rand(4096, 784, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    for batch in batches:
        model, guide = vae_programs(batch)
        arms = {"ours": ours(ppl.Program(model, images, compile="never"), guide)}
        arms["by hand"] = vae_by_hand(images, batch, compiled=False)
        arms["Pyro"] = pyros(*vae_programs(batch), pyro.infer.Trace_ELBO(), images)
        pairs = [("ours", "by hand"), ("Pyro", "ours")]
        report("vae eager", f"batch {batch}", seconds(arms, rounds, calls), pairs)
        if batch in compiled:
            torch._dynamo.reset()
            arms = {"ours": ours(ppl.Program(model, images, compile="inductor"), guide)}
            arms["by hand"] = vae_by_hand(images, batch, compiled=True)
            report("vae compiled", f"batch {batch}", seconds(arms, rounds, calls), [("ours", "by hand")])


# Small models


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope + offset, sigma), obs=y)


def small(rounds: int, calls: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    y = x @ torch.tensor([1.0, -0.5, 0.0, 2.0, 0.3]) + 0.5 * torch.randn(200, generator=generator)
    cases: list[tuple[str, Any, tuple[Tensor, ...]]] = [
        ("eight schools", schools, (torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),)),
        ("regression 200 x 5", regression, (x, y)),
    ]
    for name, model, args in cases:
        arms = {"ours": ours(ppl.Program(model, *args, compile="never"), AutoNormal(model))}
        arms["Pyro"] = pyros(model, AutoNormal(model), pyro.infer.Trace_ELBO(), *args)
        report("small", name, seconds(arms, rounds, calls), [("Pyro", "ours")])


# Attend, infer, repeat


def normal(x: Tensor, loc: Any, scale: Any) -> Tensor:
    out = -0.5 * ((x - loc) / scale).square() - torch.as_tensor(scale).log() - 0.5 * math.log(2 * math.pi)
    return out.sum(-1)


def air_by_hand(air: AIR, images: Tensor, batch: int, kind: str, particles: int) -> Step:
    generator = torch.Generator().manual_seed(0)
    states = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).mT[..., None]  # (step, state, 1)
    lead = (4, batch) if kind == "ENUM" else (particles, batch)

    def coin(value: Tensor, p: Tensor) -> Tensor:
        return torch.where(value > 0, p.clamp_min(1e-7).log(), (-p).log1p())

    def loss() -> Tensor:
        x = images[torch.randperm(len(images), generator=generator)[:batch]]
        state = air.start(x)
        canvas = torch.zeros_like(x)
        before: Any = torch.ones(())
        log_p: Any = 0.0
        log_q: Any = 0.0
        score: Any = 0.0
        noise = torch.randn(air.steps, *lead, 3 + air.what, generator=generator)
        for t in range(air.steps):
            state, chance, where_loc, where_scale = air.attend(state)
            p = chance * before
            drawn = kind != "ENUM"
            present = (torch.rand(lead, generator=generator) < p).float() if drawn else states[t].expand(lead)
            score = score + coin(present, p.clamp_max(1 - 1e-7))
            log_p = log_p + coin(present, air.more * before)
            where = where_loc + where_scale * noise[t, ..., :3]
            loc, scale = air.look(x, where)
            what = loc + scale * noise[t, ..., 3:]
            log_p = log_p + present * (normal(where, air.centre, air.spread) + normal(what, 0.0, 1.0))
            log_q = log_q + present * (normal(where, where_loc, where_scale) + normal(what, loc, scale))
            canvas = canvas + present[..., None, None] * air.write(air.decoder(what), where)
            state = air.remember(state, where, what)
            before = present
        log_p = log_p + normal(x.flatten(-2), canvas.flatten(-2), air.sigma)
        weight = log_p - log_q - score
        outer = len(images) / batch
        if kind == "ENUM":
            return -(score.exp() * weight).sum() * outer
        bound = weight.logsumexp(0) - math.log(particles)
        return -(bound + bound.detach() * score.sum(0)).sum() * outer

    return by_hand(loss, list(air.parameters()))


def air(batch: int, kinds: Sequence[str], rounds: int, calls: int) -> None:
    images = torch.rand(512, 24, 24, generator=torch.Generator().manual_seed(0))

    def made() -> AIR:
        torch.manual_seed(0)
        return AIR()

    for kind in kinds:
        particles = 2 if kind == "IWAE" else 1
        mine, others, theirs = made(), made(), made()
        objective = ppl.objectives.IWELBO(2) if kind == "IWAE" else ppl.objectives.ELBO()
        plain: dict[str, Any] = {f"present_{t}": ppl.objectives.Reinforce("none") for t in range(mine.steps)}
        estimators = mine.enumeration() if kind == "ENUM" else plain
        program = ppl.Program(mine.model, images, batch, compile="never")
        arms = {"ours": ours(program, mine.guide, objective, estimators)}
        arms["by hand"] = air_by_hand(others, images, batch, kind, particles)
        loss: Any = pyro.infer.Trace_ELBO()
        guide: Any = theirs.guide
        if kind == "ENUM":
            loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
            guide = pyro.infer.config_enumerate(guide, default="parallel")
        elif kind == "IWAE":
            loss = pyro.infer.RenyiELBO(alpha=0, num_particles=2, max_plate_nesting=1, vectorize_particles=True)
        arms["Pyro"] = pyros(theirs.model, guide, loss, images, batch)
        pairs = [("ours", "by hand"), ("Pyro", "ours")]
        report("air", f"{kind}, batch {batch}", seconds(arms, rounds, calls), pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["vae", "small", "air"], choices=["vae", "small", "air"])
    parser.add_argument("--batches", nargs="*", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--compiled", nargs="*", type=int, help="batches that are compiled as well; all without it")
    parser.add_argument("--kinds", nargs="*", default=["REINFORCE", "ENUM", "IWAE"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=5, help="calls of each arm in a round")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.batches, options.compiled, options.rounds, options.calls = [8], [], 2, 1
    compiled = options.batches if options.compiled is None else options.compiled
    if "small" in options.parts:
        small(options.rounds, 10 * options.calls)
    if "vae" in options.parts:
        vae(options.batches, compiled, options.rounds, options.calls)
    if "air" in options.parts:
        air(8 if options.smoke else 64, options.kinds, options.rounds, options.calls)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
