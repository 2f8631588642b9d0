"""The loop over steps: compiled pieces give what the loop gives, and transforms go around them."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import sde.recursion
from sde import MarkovNoise, Path, Process

DOUBLE = torch.float64


def matrix(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([torch.cos(x), x + t], -1)


def wave(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) - t * x


def make(process: Process, **options: Any) -> Path:
    """23 steps of unequal length: pieces of four leave three."""
    times = torch.linspace(0, 1, 24, dtype=DOUBLE)[1:] ** 1.3
    return Path(process, times, torch.tensor([0.5, -1.0], dtype=DOUBLE), **options)


@pytest.mark.parametrize("checkpoint_steps", [None, 9])
@pytest.mark.parametrize("kind", ["one noise each", "general", "stratonovich"])
def test_pieces_are_the_loop(kind: str, checkpoint_steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the compiler that counts: every piece goes through it, in the right place and time."""
    calls = []

    def stand_in(steps: Any) -> Any:
        def counted(x: Tensor, moves: Tensor, times: Tensor, dt: Tensor) -> Any:
            calls.append(len(moves))
            return steps(x, moves, times, dt)

        return counted

    monkeypatch.setattr(sde.recursion, "PIECE", 4)
    monkeypatch.setattr(torch, "compile", stand_in)
    if kind == "general":
        process = Process(wave, matrix, general=True)
    else:
        diffusion = 0.5 if kind == "one noise each" else (lambda x, t: 1 + 0.2 * torch.cos(x))
        process = Process(wave, diffusion, MarkovNoise(0.7, 1.0), sense="ito" if kind[0] == "o" else "stratonovich")
    plain, pieces = make(process), make(process, compile=True, checkpoint_steps=checkpoint_steps)
    z = torch.randn(3, *plain.noise_shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = [path.from_noise(z) for path in (plain, pieces)]
    assert calls == [4] * (5 if checkpoint_steps is None else 2 + 2 + 1)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.square().sum(), z)[0] for x in found]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_transforms_and_traces_do_not_meet_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Tensor) -> Tensor:
        raise AssertionError("compiled code was called")

    monkeypatch.setattr(torch, "compile", lambda steps: refuse)
    plain, compiled = (make(Process(wave, 0.5), compile=c) for c in (False, True))
    z = torch.randn(3, *plain.noise_shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for over in (
        torch.func.vmap,
        lambda f: torch.func.jacrev(lambda v: f(v).sum()),
        lambda f: lambda v: torch.func.jvp(f, (v,), (v,))[1],
        lambda f: lambda v: make_fx(lambda u: f(u))(v)(v),
    ):
        torch.testing.assert_close(over(compiled.from_noise)(z), over(plain.from_noise)(z))
    with pytest.raises(AssertionError, match="compiled code was called"):
        compiled.from_noise(z)
    with pytest.raises(AssertionError, match="compiled code was called"):
        compiled.expand([3]).from_noise(z)


@pytest.mark.slow
def test_the_compiler_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients by input and network, of two processes with a network as drift, and with checkpoints."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(sde.recursion, "PIECE", 4)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for diffusion in (0.5, lambda x, t: 1 + 0.2 * torch.cos(t * x)):
        process = Process(lambda x, t: net(x) - t * x, diffusion)
        found = []
        for options in ({}, {"compile": True}, {"compile": True, "checkpoint_steps": 9}):
            path = make(process, **options)
            z = torch.randn(3, *path.noise_shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                values = path.from_noise(z)
            x = path.from_noise(z.requires_grad_())
            found.append([values, x, *torch.autograd.grad(x.square().sum(), (z, *net.parameters()))])
        for one, other, again in zip(*found, strict=True):
            torch.testing.assert_close(one, again, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
