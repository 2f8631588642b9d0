r"""What looks wrong in a path and its data before an engine runs on it: noise that cannot move it, steps too coarse.

    bias of the log evidence  ~  2 (log p(y) at the steps - log p(y) at half of them)

for the path linearised about its mean without noise. The discretised process has a true bound at any step; what data
sharper than a step show is that the process itself has changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.likelihood import Likelihood
from inverse.paths.linear_control import linearised_control, mean_states, single_times
from ppl.errors import CapabilityError
from ppl.monitor import Monitor
from ppl.program import Program
from ppl.sites import unwrap
from sde.path import Path

__all__ = ["coarse_steps", "discretisation_bias", "linear_data", "note_coarse_steps", "refuse_unmoved"]

WORK = 3e8  # multiply-adds of one recursion, above which the estimate is left out
ENTRIES = 10_000_000  # of the matrix from paths to data, above which a run does not wait for a remark
WORTH = 0.05  # nat of bias that is worth a remark


def discretisation_bias(path: Path, rows: Tensor, data: Tensor, variance: Tensor) -> float:
    """How far log p(y) of the path on its grid is from that in continuous time, to first order in the step: nat.

    Args:
        path: the path, linearised about its mean where it is not linear.
        rows: (obs, n, d), what each datum measures, each of one time.
        data: (obs,).
        variance: (obs,) of the data's noise.

    Example:
        >>> from sde import Process
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> path = Path(Process(lambda x, t: -x), one, one, dt=0.25)
        >>> bias = discretisation_bias(path, one.reshape(1, 1, 1), one, 0.01 * one)
        >>> abs(bias) < 0.2, abs(bias) > 0.02
        (True, True)
    """
    grid = torch.as_tensor(path.increments.grid, dtype=path.dtype, device=path.device)
    halves = torch.cat([(grid[1:] + grid[:-1])[:, None] / 2, grid[1:, None]], 1).flatten()
    fine = Path(path.process, halves, path.initial, start=path.start)
    again = rows.new_zeros(len(rows), len(halves), rows.shape[2])
    again[:, 2 * torch.as_tensor(path.ends) + 1] = rows
    with torch.no_grad():
        found = [linearised_control(p, r, data, variance).log_evidence for p, r in ((path, rows), (fine, again))]
    return 2 * float(found[0] - found[1])


def coarse_steps(path: Path, rows: Tensor, data: Tensor, variance: Tensor) -> str | None:
    """A remark where the data are sharper than the steps of the path allow, with the bias; None where they are not."""
    size = path.event_shape[1] + path.noises * path.process.noise.size
    if path.steps * 3.0 * size**3 > WORK:
        return None
    bias = discretisation_bias(path, rows, data, variance)
    if abs(bias) <= WORTH:
        return None
    step = float(path.increments.dt.max())
    return (
        f"the data are sharper than steps of {step:.3g} allow: the log evidence of the path on this grid is off by "
        f"about {bias:+.2f} nat from that in continuous time (by halving the step); dt="
        f"{step * WORTH / abs(bias):.2g} leaves about {WORTH} nat"
    )


def refuse_unmoved(path: Path, rows: Tensor | None = None) -> None:
    """Refuse a path that no noise moves where data see it: a control has nothing to steer.

    Looked at along the path without noise.

    Args:
        path: the path.
        rows: (obs, n, d) what each datum measures, each of one time; None takes all times together.

    Raises:
        CapabilityError: with the time and the state at which the diffusion is zero.
    """
    some = torch.randn(path.noise_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    some = some.to(path.initial)
    with torch.no_grad():
        still, drawn = path.from_noise(torch.stack([torch.zeros_like(some), some]))
    moved = drawn - still
    if rows is None:
        at = torch.zeros(0) if bool((moved != 0).any()) else torch.tensor([len(moved) - 1])
    else:
        at = (((rows.to(moved) * moved).sum(-1) == 0) & (rows != 0).any(-1)).any(0).nonzero()[:, 0]
    if not len(at):
        return
    time, zero = int(at[0]), torch.zeros_like(some)
    states = mean_states(path, None, zero)
    times = path.increments.grid
    for n in range(int(path.ends[time]), -1, -1):
        g = path.process.g(states[n], states.new_tensor(times[n]))
        if not bool((g != 0).any()):
            raise CapabilityError(
                f"the diffusion vanishes at time {times[n]:.4g} and state {states[n].tolist()[:8]}, and no noise "
                f"reaches what is measured at time {float(path.times[time]):.4g}: a control cannot move it. Give the "
                "diffusion a floor, or leave that datum out"
            )
    raise CapabilityError(
        f"no noise reaches what is measured at time {float(path.times[time]):.4g}: the diffusion of those coordinates "
        f"is zero along the path from state {states[0].tolist()[:8]} at time {times[0]:.4g}; give it a floor, or leave "
        "that datum out"
    )


def linear_data(program: Program, site: str, path: Path, needed: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rows (obs, n, d), data and variances of linear Gaussian data of single times, at first values of other latents.

    Raises:
        CapabilityError: the data are not such, and are needed.
    """
    given = {n: v for n, v in program.first_values.items() if n != site}
    likelihood = Likelihood(program, (site,), given)
    if not likelihood.is_gaussian and not needed:
        return None
    gaussian = likelihood.gaussian  # whitened
    rows = gaussian.operator.dense(dtype=torch.float64).reshape(-1, *path.event_shape)
    data = gaussian.data.reshape(-1).double()
    if single_times(rows):
        return rows, data, torch.ones_like(data)
    if needed:
        raise CapabilityError('around="linear" takes data that each see one time of the path; give around=None')
    return None


def note_coarse_steps(program: Program, site: str, monitor: Monitor) -> None:
    """Tell where linear Gaussian data of single times are sharper than the steps allow, at first values of the rest."""
    path = unwrap(program.sites[site].distribution)
    if path.event_shape.numel() * sum(y.numel() for y in program.data.values()) > ENTRIES:
        return
    data = linear_data(program, site, path)
    remark = None if data is None else coarse_steps(path, *data)
    if remark is not None:
        monitor.note(remark)
