"""A bare network whose loop a test drives: what every cache must do there, and in each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caches import ALL, built
from hasten import moment
from hasten.bridge.pipelines import networks, put
from hasten.method import Method, Refused
from hasten.moment import Moment
from hasten.patch import Patch
from hasten.recipe import Recipe

AUTOCAST = pytest.mark.filterwarnings("ignore:In CPU autocast")
"""Mochi asks for it in single precision."""


def serves(method: Method, neutral: Method, name: str) -> None:
    """At its neutral setting the family draws the same bits; else the method reuses something, and taken off leaves
    nothing behind: the pipeline is the next method's, whose neutral setting must give the same bits."""
    family, (pipe, plain) = ALL[name], built(name)
    try:
        for one in (neutral, method):
            patches = [p for _, p in put(pipe, Recipe(methods=(one,)))[1]]
            try:
                drawn = family.call(pipe)
                if one is neutral:
                    assert torch.equal(drawn, plain)
                else:
                    assert patches[0].tally["reused"] > 0
                    assert not torch.equal(drawn, plain)
                    assert drawn.isfinite().all()
            finally:
                for patch in reversed(patches):
                    patch.remove()
    except Refused as refused:
        assert len(str(refused)) > 40
        pytest.skip(f"refused here: {refused}")
    assert not any("forward" in vars(m) for net in networks(pipe).values() for m in net.modules())


def network(name: str) -> nn.Module:
    """The network of a fresh pipeline of a family."""
    return next(iter(networks(ALL[name].build()).values()))


@torch.no_grad()
def drive(
    net: Callable[[int, str], Tensor],
    steps: int,
    run: int = 1,
    branches: Sequence[str] = ("both",),
    only: Sequence[int] | None = None,
) -> dict[str, list[Tensor]]:
    """Asks `net(step, branch)` at each step of a trajectory, or at some, the branches in turn."""
    out: dict[str, list[Tensor]] = {b: [] for b in branches}
    for step in range(steps) if only is None else only:
        for b in branches:
            with moment.at(Moment(step, steps, t=1 - step / steps, run=run, branch=b)):  # type: ignore[arg-type]
                out[b].append(net(step, b))
    return out


class Tiny(nn.Module):
    """Two kinds of block that a cache may meet, small: a transformer's, with AdaLN, attention and feed-forward."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Linear(1, width)
        self.transformer_blocks = nn.ModuleList([TinyBlock(width) for _ in range(depth)])

    def forward(self, x: Tensor, t: float) -> Tensor:
        emb = torch.tanh(self.time(torch.tensor([[t]], dtype=x.dtype)))
        for block in self.transformer_blocks:
            x = block(x, emb)
        return x


class TinyBlock(nn.Module):
    """x + gate attn(norm(x)) and x + ff(norm(x)), modulated by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.modulate = nn.Linear(width, 3 * width)
        self.attn1, self.ff = TinyAttention(width), nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        scale, shift, gate = self.modulate(temb).chunk(3, -1)
        x = hidden_states + gate * self.attn1(self.norm1(hidden_states) * (1 + scale) + shift)
        return x + self.ff(self.norm2(x))


class TinyAttention(nn.Module):
    """One head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden_states).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def path(step: float, batch: int = 2, tokens: int = 5, seed: int = 0) -> Tensor:
    """A state that moves smoothly with the step."""
    a, b = randn(batch, tokens, 8, seed=seed), randn(batch, tokens, 8, seed=seed + 1)
    return torch.cos(torch.tensor(0.1 * step)) * a + torch.sin(torch.tensor(0.1 * step)) * b


def asked(net: nn.Module, **more: Any) -> Callable[[int, str], Tensor]:
    """What `drive` asks: the state of a step and branch, each branch on a path of its own."""
    seeds = {"cond": 10, "uncond": 20}
    return lambda step, b: net(path(step, seed=seeds.get(b, 0), **more), 1 - 0.03 * step)


def behaves(method: Method, steps: int = 8) -> Patch:
    """The contract of a cache on a bare network: branches never mix, a trajectory reads nothing of another, also not of
    another shape or after an exception, and removal is exact. Returns its patch, for the tally."""
    net = Tiny()
    plain = drive(asked(net), steps)["both"]
    patch = method.apply(net)
    first = drive(asked(net), steps, run=1)["both"]
    assert any(not torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    assert torch.equal(first[0], plain[0])

    drive(asked(net, batch=3, tokens=4), steps, run=2)  # other shapes in between
    other = drive(asked(net, batch=3, tokens=4), steps, run=3)["both"]
    assert same(drive(asked(net), steps, run=4)["both"], first)
    assert other[-1].shape == (3, 4, 8)

    both = drive(asked(net), steps, run=5, branches=("cond", "uncond"))
    for i, b in enumerate(("cond", "uncond")):
        assert same(both[b], drive(asked(net), steps, run=6 + i, branches=(b,))[b])

    whole = TinyBlock.forward
    for at in (1, 2, 3, 5):  # the last block breaks down in the middle of a trajectory

        def breaks(self: TinyBlock, *given: Any, at: int = at) -> Tensor:
            if moment.now().step == at and self is net.transformer_blocks[-1]:
                raise ZeroDivisionError
            return whole(self, *given)

        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(TinyBlock, "forward", breaks)
            with suppress(ZeroDivisionError):
                drive(asked(net), steps, run=10 + at)
        assert same(drive(asked(net), steps, run=20 + at)["both"], first)

    changing = drive(lambda s, b: net(path(s, batch=2 if s < 3 else 4), 1 - 0.03 * s), steps, run=40)["both"]
    assert [len(y) for y in changing] == [2] * 3 + [4] * (steps - 3)
    with torch.no_grad():
        assert torch.equal(changing[3], Tiny()(path(3, batch=4), 1 - 0.03 * 3))
    patch.remove()
    assert same(drive(asked(net), steps, run=1)["both"], plain)
    assert not any("forward" in vars(m) for m in net.modules())
    return patch


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
