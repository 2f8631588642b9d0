"""What does not fit between a model and a guide, found by running both: sites, supports, minibatches, baselines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl.lint import branches
from ppl.trace import Run, run_model, seeded, settings

if TYPE_CHECKING:
    from ppl.program import Program

__all__ = ["Runner", "baselines", "guide_findings", "own_copy", "sample_nodes"]

DRAWS = 8  # of guide and prior, at which supports are compared


def guide_findings(program: Program, guide: Callable[..., Any], generator: torch.Generator) -> list[str]:
    """What looks wrong with a Pyro guide of a program; one sentence for each finding."""
    guide = own_copy(guide)  # an autoguide sets itself up when it first runs
    draw, model = Runner(program, guide, generator), Runner(program, program.model, generator)
    try:
        trace, _ = draw()
    except Exception as error:
        return [f"the guide cannot be run ({type(error).__name__}: {str(error)[:160]}); it takes the model's arguments"]
    return [
        *_sites(program, trace),
        *_supports(program, draw, model),
        *_minibatches(trace, *model()),
        *chain.from_iterable(branches(draw, "guide").values()),
        *baselines(draw, "guide"),
    ]


def own_copy(guide: Any) -> Any:
    """A copy of a guide that is a module; Pyro's autoguides forget their model when copied, and get it back."""
    if not isinstance(guide, torch.nn.Module):
        return guide
    parts = [(name, part.__dict__["_model"]) for name, part in guide.named_modules() if "_model" in part.__dict__]
    new = copy.deepcopy(guide)
    for whole in (guide, new):
        modules = dict(whole.named_modules())
        for name, model in parts:
            modules[name].__dict__["_model"] = model
    return new


class _Explicit(Messenger):
    """Notes the plates whose indices were given and not drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.plates.add(msg["name"])


class Runner:
    """Runs a model or a guide with the program's arguments and the present parameters.

    Args:
        program: whose arguments, data and type are used.
        function: what is run.
        generator: source of randomness.
    """

    def __init__(self, program: Program, function: Callable[..., Any], generator: torch.Generator) -> None:
        self.program, self.function, self.generator = program, function, generator
        self._state = pyro.get_param_store().get_state()

    def __call__(self, run: Run | None = None) -> tuple[Any, set[str]]:
        """A trace, and the plates whose indices were given."""
        args, kwargs = self.program.arguments.call({})
        explicit = _Explicit()
        run = replace(run or Run(), data=self.program._overridden, functions=self.program._replaced)
        with seeded(self.generator), torch.no_grad(), settings(self.program.dtype, validate=False):
            pyro.get_param_store().set_state(copy.copy(self._state))
            with explicit:
                trace, _ = run_model(self.function, args, kwargs, run)
        return trace, explicit.plates


def sample_nodes(trace: Any) -> list[Any]:
    """Sample sites of a trace without plates."""
    return [n for n in trace.nodes.values() if n["type"] == "sample" and not site_is_subsample(n)]


def _latent(trace: Any) -> dict[str, Any]:
    return {
        n: node
        for n, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }


def _sites(program: Program, trace: Any) -> list[str]:
    """Sites that only one of the two has."""
    own = _latent(trace)
    found = [
        f"the guide has no site {name!r}, which is latent in the model: give it one of that name and shape "
        f"{tuple(site.shape)}"
        for name, site in program.latents.items()
        if name not in own and "enumerable" not in site.capabilities
    ]
    for name, node in own.items():
        if name in program.observed:
            found.append(f"the guide draws {name!r}, which is observed in the model: take it out of the guide")
        elif name not in program.latents and not node["infer"].get("is_auxiliary"):
            found.append(
                f"the guide has a site {name!r} that the model does not have: rename it, or mark it "
                'infer={"is_auxiliary": True} if it is an auxiliary variable'
            )
    return found


def _supports(program: Program, draw: Runner, model: Runner) -> list[str]:
    """Draws of one that the other gives no density."""
    found: dict[str, str] = {}
    for _ in range(DRAWS):
        trace, _ = draw()
        own = {n: node for n, node in _latent(trace).items() if n in program.latents}
        values = {n: node["value"] for n, node in own.items()}
        plates = {n: node["value"] for n, node in trace.nodes.items() if site_is_subsample(node)}
        shapes = {n: tuple(program.first_values[n].shape) for n in own}
        unlike = {n: (tuple(v.shape), shapes[n]) for n, v in values.items() if tuple(v.shape) != shapes[n]}
        if unlike:  # the model may not be able to take them
            return [
                f"site {n!r}: the guide draws shape {ours}, the model {theirs}; give both equal plates and event axes"
                for n, (ours, theirs) in unlike.items()
            ]
        with suppress(ValueError, RuntimeError, IndexError):
            replayed, _ = model(Run(values=values, plates=plates))
            prior, _ = model(Run(plates=plates))
            for name, node in own.items():
                if name in found or name not in replayed.nodes:
                    continue
                words = _misfit(node, replayed.nodes[name], prior.nodes[name])
                if words:
                    found[name] = f"site {name!r}: {words}"
    return list(found.values())


def _misfit(guide: Any, model: Any, prior: Any) -> str:
    """What is wrong between the two distributions of one site, or nothing."""
    ours, theirs = guide["fn"], model["fn"]
    if ours.event_dim != theirs.event_dim:
        return (
            f"the guide has {ours.event_dim} event axes, the model {theirs.event_dim}; add .to_event so that both agree"
        )
    with suppress(NotImplementedError):
        if ours.support.is_discrete != theirs.support.is_discrete:
            kinds = ("continuous", "discrete")
            return (
                f"the guide is {kinds[ours.support.is_discrete]}, the model {kinds[theirs.support.is_discrete]}; "
                "choose a distribution of the same kind"
            )
        if not bool(torch.as_tensor(theirs.support.check(guide["value"])).all()):
            return (
                f"the guide draws values outside the model's support ({theirs.support}), where the ELBO is -inf; give "
                f"it a distribution on that support, or transform one (LogNormal, Beta, TransformedDistribution)"
            )
        if not bool(torch.as_tensor(ours.support.check(prior["value"])).all()):
            return (
                f"the guide's support ({ours.support}) misses values the model's prior draws ({theirs.support}): their "
                "posterior mass is lost and importance weights are biased; widen the guide"
            )
    return ""


def _minibatches(trace: Any, model: Any, given: set[str]) -> list[str]:
    """Subsampled plates in which model and guide do not look at the same rows."""
    ours = {n: node for n, node in trace.nodes.items() if site_is_subsample(node)}
    theirs = {n: node for n, node in model.nodes.items() if site_is_subsample(node)}
    shown = {f.name: (f.size, f.full_size) for node in model.nodes.values() for f in _frames(node)}
    own = {f.name: (f.size, f.full_size) for node in trace.nodes.values() for f in _frames(node)}
    found = []
    for name in sorted(set(ours) & set(theirs) & set(shown) & set(own)):
        if shown[name] != own[name]:
            found.append(
                f"plate {name!r} shows {shown[name][0]} of {shown[name][1]} rows in the model but {own[name][0]} of "
                f"{own[name][1]} in the guide: their densities are scaled differently; use one subsample_size"
            )
        elif name in given and shown[name][0] != shown[name][1] and not _same(ours[name], theirs[name]):
            found.append(
                f"plate {name!r}: the model is given its minibatch (subsample=...), the guide takes another one, which "
                "would silently replace the model's: data and latents of different rows would meet (pyro#3468). Give "
                "the guide the same indices, or build an autoguide with create_plates="
            )
    small = {n: s for n, s in shown.items() if s[0] != s[1]}
    for name, size in {n: s for n, s in own.items() if s[0] != s[1]}.items():
        if name in shown:
            continue
        twin = next((n for n, s in small.items() if s == size and n not in own), None)
        if twin is not None:
            found.append(
                f"the guide subsamples a plate {name!r}, the model one of the same size called {twin!r}: each "
                f"draws its own minibatch. Call both {twin!r}"
            )
    local = {n: node for n, node in _latent(trace).items() if n in model.nodes}
    for site, node in local.items():
        scaled = {f.name for f in _frames(model.nodes[site]) if f.name in small}
        missing = sorted(scaled - {f.name for f in _frames(node)} - {n for n in scaled if n not in own})
        missing += [n for n in sorted(scaled) if n not in own and not any(s == small[n] for s in own.values())]
        if missing:
            found.append(
                f"site {site!r} lies in the subsampled plate {missing[0]!r} in the model but not in the guide: only "
                f"the model's density is scaled up. Put it in pyro.plate({missing[0]!r}, ...) in the guide too"
            )
    return found


def _frames(node: Any) -> list[Any]:
    return [f for f in node.get("cond_indep_stack", ()) if f.full_size is not None] if node["type"] == "sample" else []


def _same(a: Any, b: Any) -> bool:
    one, other = torch.as_tensor(a["value"]), torch.as_tensor(b["value"])
    return one.shape == other.shape and bool((one.cpu() == other.cpu()).all())


def baselines(runner: Runner, whose: str) -> list[str]:
    """Sites with a baseline that changes with their own draw, all other draws held.

    Args:
        runner: runs model or guide with values set.
        whose: `"model"` or `"guide"`.
    """
    trace, _ = runner()
    sites = _latent(trace)
    plates = {n: node["value"] for n, node in trace.nodes.items() if site_is_subsample(node)}
    values = {n: node["value"] for n, node in sites.items()}
    found = []
    for name, node in sites.items():
        if _baseline(node["infer"]) is None:
            continue
        held, _ = runner(Run(values=values, plates=plates))
        first = _baseline(held.nodes[name]["infer"])
        for _ in range(DRAWS):
            others = {n: v for n, v in values.items() if n != name}
            redrawn, _ = runner(Run(values=others, plates=plates))
            second = _baseline(redrawn.nodes[name]["infer"])
            if first is not None and second is not None and not _close(first, second):
                found.append(
                    f"site {name!r} of the {whose}: its baseline changes with the site's own draw, so that the "
                    "gradient is biased. Compute it from what was drawn before (the data, earlier sites), or use "
                    'baseline="leave_one_out"'
                )
                break
    return found


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True).all())


def _baseline(infer: Mapping[str, Any]) -> Tensor | None:
    """The value of a learned or given baseline after a run; None where there is none to look at."""
    options = infer.get("baseline")
    estimator = infer.get("estimator")
    source, given = getattr(estimator, "baseline", None), getattr(estimator, "given", None)
    if isinstance(options, Mapping):
        source = options.get("nn_baseline") if options.get("nn_baseline") is not None else options.get("baseline_value")
        given = options.get("nn_baseline_input")
    elif isinstance(options, Tensor) or callable(options):
        source = options
    if callable(source) and not isinstance(source, Tensor):
        source = source(given) if given is not None else source()
    return source.detach().clone() if isinstance(source, Tensor) else None
