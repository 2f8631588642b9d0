"""Computing outside of function transforms what may be kept after they end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["outside_transforms"]


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Suspend vmap, grad and tracing, so that what is computed from constants may be kept after they end."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with ExitStack() as stack:
        proxy = sys.modules.get("torch.fx.experimental.proxy_tensor")  # not imported: nothing is being traced
        if proxy is not None:
            stack.enter_context(proxy.disable_proxy_modes_tracing())
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.inference_mode(False))
        yield
