"""Simulation-based calibration: data from the joint distribution, posterior by the backend, ranks that must be uniform.

(theta, y) ~ p(theta, y),   theta_1..L ~ backend(y),   rank = #{l: g(theta_l, y) < g(theta, y)}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.diagnostics.coverage import Coverage, central_coverage
from ppl.diagnostics.coverage import ranks as ranks_of
from ppl.diagnostics.ess import ess_of
from ppl.diagnostics.rank_tests import chi_square_p_value, ecdf_p_values
from ppl.diagnostics.sliced import random_directions
from ppl.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from ppl.posterior import Posterior
    from ppl.program import Program

__all__ = ["SBC", "TestFunction", "default_test_functions", "log_likelihood", "sbc"]

TestFunction = Callable[[Mapping[str, Tensor], "Program"], Tensor]
"""(site -> (draws, *event), program with its data) -> (draws,) real numbers."""


@dataclass(frozen=True)
class SBC:
    """Ranks of the truth and what they say.

    Args:
        names: of the test functions.
        ranks: (simulations, tests) int64 in 0, ..., draws.
        draws: L, draws behind each rank.
        ess: (simulations, tests) effective sample size of the draws before thinning; the ranks are only uniform
            when this is L or more.
        chi_square: (tests,) p-values.
        ecdf: (tests,) p-values.
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    ess: Tensor
    chi_square: Tensor
    ecdf: Tensor

    @property
    def p_value(self) -> float:
        """Family-wise p-value: the smallest ECDF p-value times the number of tests."""
        return min(1.0, float(self.ecdf.min()) * len(self.names))

    @property
    def thin_enough(self) -> bool:
        """Whether the median effective sample size reaches L for every test function."""
        return bool((self.ess.median(0).values >= self.draws).all())

    def coverage(self, levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)) -> Coverage:
        """Coverage of central intervals, observed (levels, tests)."""
        return central_coverage(self.ranks, self.draws, levels)

    def passes(self, alpha: float = 1e-3) -> bool:
        """Whether nothing is found at family-wise false-alarm rate alpha."""
        return self.p_value > alpha

    def __str__(self) -> str:
        head = f"{len(self.ranks)} simulations, ranks among {self.draws} draws"
        wide = max(len(name) for name in self.names)
        rows = [
            f"{name:<{wide}}  chi2 p {float(c):.3f}  ecdf p {float(e):.4f}  median ess {float(m):.0f}"
            for name, c, e, m in zip(self.names, self.chi_square, self.ecdf, self.ess.median(0).values, strict=True)
        ]
        return "\n".join([head, *rows])


def log_likelihood(values: Mapping[str, Tensor], program: Program) -> Tensor:
    """Test function log p(y | theta): it finds posteriors that ignore the data, as no function of theta alone can."""
    return program.log_likelihood({name: values[name] for name in program.latents})


def default_test_functions(
    program: Program, generator: torch.Generator, *, projections: int = 2, limit: int = 4
) -> dict[str, TestFunction]:
    """Log likelihood, and for each real latent its entries (up to `limit`) or random projections of it.

    Args:
        program: whose latents are tested.
        generator: draws the directions.
        projections: number for each latent of more than `limit` entries.
        limit: largest size at which the entries themselves are tested.

    Returns:
        name -> test function.
    """

    def along(site: str, theta: Tensor) -> TestFunction:
        def project(values: Mapping[str, Tensor], _: Program) -> Tensor:
            x = values[site]
            return x.double().reshape(len(x), -1) @ theta.to(x.device)

        return project

    functions: dict[str, TestFunction] = {"log_likelihood": log_likelihood}
    for name, site in program.latents.items():
        size = torch.Size(site.shape).numel()
        if size <= limit:
            for i, theta in enumerate(torch.eye(size, dtype=torch.float64)):
                functions[name if size == 1 else f"{name}[{i}]"] = along(name, theta)
        else:
            for i, theta in enumerate(random_directions(projections, size, generator)):
                functions[f"{name} along {i}"] = along(name, theta)
    return functions


def _independent(
    posterior: Posterior, latents: Mapping[str, Any], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """`count` draws: evenly thinned over all chains, or drawn by weight."""
    total = len(posterior)
    if total == 0:
        raise OptionError("the backend returned no draws, so there is nothing to rank")
    weights = posterior.weights
    if weights is not None:
        index = torch.multinomial(
            weights.reshape(-1).to(generator.device), count, replacement=True, generator=generator
        )
    else:
        if total < count:
            raise OptionError(
                f"ranks among {count} draws need as many, the backend returned {total}; ask for more draws"
            )
        index = torch.div(torch.arange(count) * total, count, rounding_mode="floor")
    return {name: posterior.flatten(name)[index.to(posterior.draws[name].device)] for name in latents}


def _sizes(posterior: Posterior, functions: Mapping[str, TestFunction], program: Program) -> list[float]:
    """Effective sample size of each test function."""
    shared = posterior.info.get("root_ess")
    if shared is not None:
        return [float(shared.double().sum())] * len(functions)
    if posterior.weights is not None:
        return [float(1 / posterior.weights.square().sum())] * len(functions)
    flat = {name: posterior.flatten(name) for name in program.latents}
    shape = posterior.shape
    if shape[-1] < 4 or posterior.attrs.get("exact") == "always":  # independent: an estimate would only add noise
        return [float(len(posterior))] * len(functions)
    return [float(ess_of(fn(flat, program).reshape(shape))) for fn in functions.values()]


def sbc(
    program: Program,
    backend: Any,
    test_functions: Mapping[str, TestFunction] | None = None,
    *,
    simulations: int,
    draws: int,
    chains: int | None = None,
    ranks: int = 99,
    seed: int = 0,
    callback: Callable[[int, Posterior], None] | None = None,
) -> SBC:
    """Simulation-based calibration of a backend on a program: exact backends give uniform ranks.

    Args:
        program: with data of the right shape; their values are not used.
        backend: as in ppl.infer.
        test_functions: name -> (site -> (draws, *event), program) -> (draws,); `default_test_functions` when None.
        simulations: number of data sets.
        draws: asked of the backend, per chain.
        chains: asked of the backend.
        ranks: L, draws that each truth is ranked among. Chains are thinned to L and weighted draws resampled, so the
            effective sample size should be L or more: see SBC.ess.
        seed: of simulation, inference, tie-breaking and tests.
        callback: called with (simulation, posterior).

    Returns:
        SBC with ranks and p-values.

    Source: Talts et al. (2018); Modrák et al. (2023) for the log likelihood as test function [inferred].
    """
    import ppl

    if simulations < 2 or ranks < 1 or draws < 1:
        raise OptionError(f"simulations >= 2, ranks >= 1 and draws >= 1 expected, got {simulations}, {ranks}, {draws}")
    generator = torch.Generator(program.device).manual_seed(seed)
    functions = default_test_functions(program, generator) if test_functions is None else dict(test_functions)
    if not functions:
        raise OptionError("sbc needs a test function; leave test_functions None for the default ones")
    rank_rows, ess_rows = [], []
    for i in range(simulations):
        truth = program.simulate(generator)
        one = program.with_data(**{name: truth[name] for name in program.observed})
        run_seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        posterior = ppl.infer(one, backend, draws=draws, chains=chains, seed=run_seed)
        if callback is not None:
            callback(i, posterior)
        sample = _independent(posterior, one.latents, ranks, generator)
        row = []
        for name, fn in functions.items():
            # Truth and draws go through the function together, so that equal values come out equal.
            both = fn({n: torch.cat([truth[n][None].to(v), v]) for n, v in sample.items()}, one)
            if both.shape != (ranks + 1,):
                raise ShapeError(f"test function {name!r} must return ({ranks + 1},), got {tuple(both.shape)}")
            row.append(ranks_of(both[1:], both[0], generator=generator))
        rank_rows.append(torch.stack(row).cpu())
        ess_rows.append(torch.tensor(_sizes(posterior, functions, one), dtype=torch.float64))
    table = torch.stack(rank_rows)
    cpu = torch.Generator().manual_seed(seed)
    chi = [chi_square_p_value(table[:, j], ranks) for j in range(len(functions))]
    # Enough replicates that the smallest p-value, times the number of tests, stays below 1e-3.
    ecdf = ecdf_p_values(table, ranks, generator=cpu, replicates=4000 * len(functions))
    return SBC(
        tuple(functions),
        table,
        ranks,
        torch.stack(ess_rows),
        torch.tensor(chi, dtype=torch.float64),
        ecdf,
    )
