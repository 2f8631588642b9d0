"""What samplers without weights say of themselves: one trajectory per draw, an error that no option removes."""

from __future__ import annotations

from typing import ClassVar

from ppl.backend import Exactness

__all__ = ["NeverExact"]


class NeverExact:
    """The claims of a sampler whose draws are trajectories of the reverse diffusion, many problems in one batch.

    Example:
        >>> NeverExact.exact, sorted(NeverExact.needs)
        ('never', ['denoiser'])
    """

    exact: ClassVar[Exactness] = "never"
    limit: ClassVar[tuple[str, ...]] = ()
    exact_when: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    default_chains: ClassVar[int] = 1
    batches_problems: ClassVar[bool] = True
