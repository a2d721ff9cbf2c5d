"""What every cache must do in every pipeline that it serves: nothing at its neutral setting, and leave nothing
behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from families_more import MORE
from hasten import Recipe, moment, tree
from hasten.bridge.pipelines import networks
from hasten.method import Refused
from hasten.moment import Moment
from pipelines import PIPELINES

ALL = {f.name: f for f in (*PIPELINES, *MORE)}
OTHER = {
    "sd": {"height": 48, "width": 32, "num_images_per_prompt": 2},
    "svd": {"height": 16, "width": 8},
    "pixart": {"height": 64, "num_images_per_prompt": 2},
    "flux": {"height": 64, "num_images_per_prompt": 2},
    "wan": {"height": 32, "num_videos_per_prompt": 2},
}
"""Another resolution and batch, by family."""

TWICE = {"flux", "wan", "wan22", "lumina2", "qwen", "hunyuan_video"}
"""They ask for the branches one after the other."""

TEXT = {n: torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(("cond", "uncond"))}
"""A branch's words, for a bare U-Net."""


@cache
def built(name: str) -> tuple[Any, Tensor]:
    """A pipeline, which every test must leave as it was, and what it draws."""
    pipe = ALL[name].build()
    return pipe, ALL[name].call(pipe)


def on(pipe: Any, label: str, **settings: Any) -> hasten.Handle:
    return hasten.accelerate(pipe, Recipe.from_dict({"methods": [{label: settings}]}))


def neutral(label: str) -> set[str]:
    """Names of the families that it serves, in each of which its neutral setting is exact; the others are refused with
    a sentence that names another method."""
    served = set()
    for name, family in ALL.items():
        pipe, before = built(name)
        try:
            handle = on(pipe, label, **tree.method(label).neutral or {})
        except Refused as refused:
            text = str(refused)
            assert label in text and "take " in text and any(m in text for m in set(tree.methods()) - {label})
            continue
        with handle:
            assert torch.equal(family.call(pipe), before), name
        served.add(name)
    return served


def comes_clean(label: str, name: str, **settings: Any) -> None:
    """It acts; a second picture is as the first; one of another resolution and batch is what a fresh handle draws and
    leaves nothing to the next; wherever a picture breaks off, the next is clean; removal is bit for bit."""
    pipe, before = built(name)
    family = ALL[name]
    with on(pipe, label, **settings):
        first = family.call(pipe)
        assert not torch.equal(first, before)
        assert torch.equal(family.call(pipe), first)
        other = family.call(pipe, **OTHER[name])
        assert torch.equal(family.call(pipe), first)
        inner = [m for m in next(iter(networks(pipe).values())).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for module in (inner[len(inner) // 2], inner[-1]):
            with counted(module) as calls:
                assert torch.equal(family.call(pipe), first)
            for call in (len(calls) // 2 + 1, len(calls)):
                with breaking(module, call), pytest.raises(Broken):
                    family.call(pipe)
                assert torch.equal(family.call(pipe), first)
    assert torch.equal(family.call(pipe), before)
    with on(pipe, label, **settings):
        assert torch.equal(family.call(pipe, **OTHER[name]), other)
    assert torch.equal(family.call(pipe), before)


class Broken(Exception):
    """What a test raises inside a network."""


@contextmanager
def breaking(module: nn.Module, call: int) -> Iterator[None]:
    """Its call of this number, from 1, raises Broken."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Broken

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counted(module: nn.Module) -> Iterator[list[tuple[Moment, int]]]:
    """(moment, rows) of every time that it runs."""
    seen: list[tuple[Moment, int]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        seen.append((moment.now(), len(given)))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def prompted(branch: str) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a bare U-Net is called with at each step: the state and time of the step, the words of the branch."""

    def call(step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        return (x, 900.0 - 100 * step), {"encoder_hidden_states": TEXT[branch]}

    return call


def driven(
    net: Callable[..., Any], calls: dict[str, Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]], steps: int,
    run: int, **told: Any,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """A trajectory by hand: branch -> what the network says at each step, of inputs that depend on the step alone."""
    out: dict[str, list[Tensor]] = {b: [] for b in calls}
    for step in range(steps):
        for branch, given in calls.items():
            args, kwargs = given(step)
            t = 1 - step / steps
            more = {k: v[step:] if k == "ahead" else v for k, v in told.items()}
            with torch.no_grad(), moment.at(Moment(step, steps, t, run, branch, **more)):  # type: ignore[arg-type]
                said = net(*args, **kwargs)
            out[branch].append(said if isinstance(said, Tensor) else said[0])
    return out
