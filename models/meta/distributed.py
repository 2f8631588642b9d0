"""Episodes of a batch shared between processes: each takes its part, and all end each step with the same global law.

sum over workers w of (b_w / b) grad J_w = grad J,      b_w of the batch's b episodes with worker w

Every worker draws the same batch and the noise of all its episodes, and keeps its part: so results do not depend on how
many workers there are, but for rounding. `NIWMeta` shares its episodes wherever torch.distributed is initialised:

    # train.py
    import os
    import torch
    from models.meta import NIWMeta
    from models.meta.distributed import join
    from ppl.monitor import Monitor

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    join("nccl" if cuda else "gloo")
    hierarchy, source = ...  # the same on all workers, on their device
    generator = torch.Generator(device).manual_seed(0)
    monitor = Monitor(checkpoint="train.checkpoint", generator=generator)
    fitted = NIWMeta(steps=100_000).fit(hierarchy, source, generator=generator, monitor=monitor)
    if torch.distributed.get_rank() == 0:
        ...  # keep it
    torch.distributed.destroy_process_group()

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 --max-restarts=3 train.py

Worker 0 alone reads and writes checkpoints. When a worker dies torchrun ends the others and starts all of them again;
they go on from the checkpoint, with as many workers or another number. A worker that hangs counts as dead after the
timeout of `join`, which must be longer than a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from models.meta.episodes import Points
from ppl.errors import OptionError

__all__ = ["SharedGenerator", "Workers", "episode_noise", "join"]

T = TypeVar("T")


def join(backend: str = "gloo", timeout: timedelta = timedelta(minutes=2)) -> None:
    """Initialise the default group of torch.distributed by torchrun's variables, also after a death.

    torchrun keeps one store for all its rounds, so that whoever comes first in a second round would find there the
    addresses of the dead, and wait for them until the timeout. Here each round has names of its own, by the number of
    restarts. Where torchrun runs on several machines and one may be replaced, these numbers differ: set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, and every round has a store of its own.

    Args:
        backend: "gloo", or "nccl" for GPUs.
        timeout: after which a worker that does not answer counts as dead; longer than a step.

    Source: pytorch#135712, and `torch.distributed.elastic.rendezvous` of torch 2.13 [read].
    """
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = torch.distributed.PrefixStore(f"round {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


class SharedGenerator(torch.Generator):
    """A generator for some rows of a batch, which `episode_noise` draws the noise of all episodes by.

    It begins at the state of the source, which is not moved.

    Args:
        source: the generator of the run.
        first: the first episode of this worker.
        whole: episodes of the batch.
    """

    def __new__(cls, source: torch.Generator, first: int, whole: int) -> SharedGenerator:  # noqa: D102
        return super().__new__(cls, source.device)  # type: ignore[call-arg]

    def __init__(self, source: torch.Generator, first: int, whole: int) -> None:
        self.first, self.whole = first, whole
        self.set_state(source.get_state())


def episode_noise(
    draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int], generator: torch.Generator, axis: int = 0
) -> Tensor:
    """Noise of this worker's episodes, cut out of that of the whole batch; all noise of a local fit comes from here.

    Args:
        draw: noise of a given shape, by `generator`.
        shape: of the noise of this worker's episodes.
        generator: as the local fit was given it.
        axis: of the episodes, from the front.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> second = SharedGenerator(g, first=2, whole=4)
        >>> part = episode_noise(lambda size: torch.randn(size, generator=second), (2, 3), second)
        >>> torch.equal(part, torch.randn(4, 3, generator=g)[2:])
        True
    """
    if not isinstance(generator, SharedGenerator):
        return draw(tuple(shape))
    return draw((*shape[:axis], generator.whole, *shape[axis + 1 :])).narrow(axis, generator.first, shape[axis])


class Workers:
    """The processes of torch.distributed's default group; this one alone where there is no group.

    Example:
        >>> workers = Workers()
        >>> workers.rank, workers.size, workers.sums(torch.ones(2))
        (0, 1, (tensor([1., 1.]),))
    """

    def __init__(self) -> None:
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if group else 0
        self.size = torch.distributed.get_world_size() if group else 1

    def part(self, episodes: int) -> slice:
        """Which episodes of a batch are this worker's.

        Raises:
            OptionError: there are fewer episodes than workers.
        """
        if episodes < self.size:
            raise OptionError(
                f"a batch of {episodes} episodes cannot be shared between {self.size} workers; each needs at least "
                f"one: raise batch, or start fewer workers"
            )
        return slice(episodes * self.rank // self.size, episodes * (self.rank + 1) // self.size)

    def share(self, points: Points, generator: torch.Generator) -> tuple[Points, torch.Generator, float]:
        """This worker's episodes, the generator of their noise, and their share of the batch."""
        if self.size == 1:
            return points, generator, 1.0
        whole = len(points.x)
        part = self.part(whole)
        own = Points(*(value[part] for value in points))
        return own, SharedGenerator(generator, part.start, whole), len(own.x) / whole

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sum over all workers of each tensor, in one message; equal on all of them."""
        if self.size == 1:
            return values
        flat = torch.cat([value.detach().reshape(-1) for value in values])
        torch.distributed.all_reduce(flat)
        parts = flat.split([value.numel() for value in values])
        return tuple(part.reshape(value.shape) for part, value in zip(parts, values, strict=True))

    def first(self, value: T) -> T:
        """What worker 0 holds, on all workers; tensors as worker 0 has them."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
