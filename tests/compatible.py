"""What a method does on a family, two of them together, and what is left behind: found by trying."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import hasten
from families import Family
from hasten import Recipe, tree
from hasten.method import Refused, conflict
from settings import strong

METHODS = tree.methods()
SMALL = {"quant.w8a8": {"smallest": 8}}
"""The tiny networks have no layer of its default."""


def settings(label: str, neutral: bool = False) -> dict[str, Any]:
    plain = METHODS[label].neutral or {} if neutral else strong(label)
    return SMALL.get(label, {}) | plain


def recipe(*labels: str) -> Recipe:
    """Of methods at settings at which they act."""
    return Recipe.from_dict({"methods": [{label: settings(label)} for label in labels]})


def alone(label: str, family: Family) -> dict[str, Any]:
    """One method on one family: `refused` with its reason; else places, what it moved, and whether its neutral setting
    and its removal give the very sample of before."""
    pipe = family.build()
    before = family.call(pipe)
    try:
        with hasten.accelerate(pipe, recipe(label)) as handle:
            during = family.call(pipe)
            places = sum(len(patch.sites) for name, patch in handle.patches if name.startswith(label))
            found: dict[str, Any] = {"places": places, "moved": _off(during, before)}
    except Refused as refused:
        found = {"refused": str(refused)}
    found["restored"] = torch.equal(family.call(pipe), before)
    if METHODS[label].neutral is not None and "refused" not in found:
        still = Recipe.from_dict({"methods": [{label: settings(label, neutral=True)}]})
        with hasten.accelerate(pipe, still):
            found["neutral"] = torch.equal(family.call(pipe), before)
    return found


def together(a: str, b: str, family: Family) -> dict[str, Any]:
    """Two methods on one family: a conflict or refusal with its reason, or what they moved together, and whether both
    were taken back."""
    if (why := conflict([METHODS[a](**settings(a)), METHODS[b](**settings(b))])) is not None:
        return {"conflict": why}
    pipe = family.build()
    before = family.call(pipe)
    try:
        with hasten.accelerate(pipe, recipe(a, b)):
            found: dict[str, Any] = {"moved": _off(family.call(pipe), before)}
    except Refused as refused:
        found = {"refused": str(refused)}
    found["restored"] = torch.equal(family.call(pipe), before)
    return found


def fingerprint(pipe: Any) -> dict[str, Any]:
    """Class, instance attributes and hooks of the pipeline, its scheduler and every module, and every weight's
    bytes."""
    looks: dict[str, Any] = {
        "pipe": (type(pipe), set(vars(pipe))),
        "scheduler": (pipe.scheduler, set(vars(pipe.scheduler))),
    }
    for part in ("unet", "transformer"):
        net = getattr(pipe, part, None)
        if net is None:
            continue
        for name, m in net.named_modules():
            hooks = [len(getattr(m, h)) for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            looks[f"{part}.{name}"] = (id(m), type(m), set(vars(m)), hooks, getattr(m, "processor", None))
        for name, t in itertools.chain(net.named_parameters(), net.named_buffers()):
            looks[f"{part}.{name}.data"] = (
                id(t),
                t.dtype,
                t.stride(),
                t.detach().clone().view(torch.uint8).numpy().tobytes(),
            )
    return looks


def _off(x: torch.Tensor, before: torch.Tensor) -> float:
    return float((x - before).abs().max() / before.abs().max())
