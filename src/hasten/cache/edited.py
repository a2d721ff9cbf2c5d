"""How the layers of a U-Net compute an edit: convolutions by tiles, blocks by tokens, norms by old statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.anatomy import Anatomy
from hasten.cache.hold import first_tensor
from hasten.cache.original import State
from hasten.cache.tiles import Window, convolve, multiplies
from hasten.patch import Patch

PROJECTIONS = ("to_q", "to_k", "to_v")
"""Children of every attention."""

Cost = Callable[[int, int, int], int]
"""(rows, tokens, words) -> multiply-adds of so many rows of all the tokens, of one sample."""


def edits(patch: Patch, found: Anatomy, state: State) -> None:
    """Makes every layer of a U-Net whose output depends on the place in the picture keep it, or compute what the mask
    says of it, as `state.mode` tells; the tally counts multiply-adds."""
    numbers = iter(range(10**9))
    blocks = [b for chain in found.chains for b in chain if b.attentions]
    inside = {m for b in blocks for m in b.module.modules()}
    for block in blocks:
        own = [s.module for s in block.attentions if s.kind == "self"]
        if own and all(_plain(m) for m in own):
            _tokens(patch, state, next(numbers), block.module, _cost(block.module, own))
            for attention in own:
                _scattered(patch, state, numbers, attention)
    for name, module in found.root.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.Conv2d) and (window := Window.of(module)) is not None:
            _convolution(patch, state, next(numbers), module, window)
        elif isinstance(module, nn.GroupNorm):
            _norm(patch, state, next(numbers), module)
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("proj_in", "proj_out"):
            _tokens(patch, state, next(numbers), module, _cost(module, []))
        elif all(p in module._modules for p in PROJECTIONS) and _plain(module):
            _tokens(patch, state, next(numbers), module, _cost(module, [module]))
            _scattered(patch, state, numbers, module)


def _plain(attention: nn.Module) -> bool:
    """Whether its keys and values come from layers of their own."""
    return all(p in attention._modules for p in PROJECTIONS) and not getattr(attention, "fused_projections", False)


def _convolution(patch: Patch, state: State, number: int, module: nn.Conv2d, window: Window) -> None:
    def around(forward: Callable[..., Any], x: Tensor, *more: Any) -> Any:
        sides = (x.shape[-2], x.shape[-1])
        down, across = window.output(sides)
        dense = multiplies(module, len(x) * down * across)
        if state.mode != "edit":
            out = forward(x, *more)
            patch.tally["ran"] += dense
            if state.mode == "record":
                state.keep(number, out)
                state.original.sides.add((down, across))
            return out
        tiles = state.tiles(sides, window)
        _count(patch, multiplies(module, len(x) * len(tiles) * state.tile**2), dense)
        return convolve(x, module, tiles, state.kept(number))

    patch.wrap(module, around, traced=False)


def _norm(patch: Patch, state: State, number: int, module: nn.GroupNorm) -> None:
    """A group norm; of an edit with the mean and deviation of the original."""

    def around(forward: Callable[..., Any], x: Tensor) -> Any:
        rows, channels = x.shape[:2]
        if state.mode == "record":
            groups = x.detach().float().reshape(rows, module.num_groups, -1)
            var, mean = torch.var_mean(groups, 2, correction=0)
            state.keep(number, torch.stack([mean, torch.rsqrt(var + module.eps)]))
        if state.mode != "edit":
            return forward(x)
        mean, scale = state.kept(number).repeat_interleave(channels // module.num_groups, 2)
        if module.weight is not None:
            scale = scale * module.weight.float()
        shift = -mean * scale if module.bias is None else module.bias.float() - mean * scale
        shape = (rows, channels, *[1] * (x.ndim - 2))
        return torch.addcmul(shift.view(shape), x.float(), scale.view(shape)).to(x.dtype)

    patch.wrap(module, around, traced=False)


def _tokens(patch: Patch, state: State, number: int, module: nn.Module, cost: Cost) -> None:
    """A module that maps tokens [B, L, D], or an image that it reads as tokens, [B, C, h, w]: of an edit it is given
    those of the mask alone."""

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        assert x is not None
        image, text = x.ndim == 4, kwargs.get("encoder_hidden_states")
        words = text.shape[1] if isinstance(text, Tensor) else 0
        count = x.shape[-2] * x.shape[-1] if image else x.shape[1]
        dense, rows = len(x) * cost(count, count, words), state.tokens(count) if state.mode == "edit" else None
        if rows is None:
            out = forward(*args, **kwargs)
            patch.tally["ran"] += dense
            if state.mode == "record":
                state.keep(number, out)
            return out
        _count(patch, len(x) * cost(len(rows), count, words), dense)
        base = state.kept(number).clone()
        if not len(rows):
            return base
        some = x.flatten(2)[:, :, rows].transpose(1, 2) if image else x[:, rows]
        state.rows = rows
        try:
            new = forward(
                *(some if a is x else a for a in args), **{k: some if v is x else v for k, v in kwargs.items()}
            )
        finally:
            state.rows = None
        if image:
            base.flatten(2)[:, :, rows] = new.transpose(1, 2)
        else:
            base[:, rows] = new
        return base

    patch.wrap(module, around, traced=False)


def _scattered(patch: Patch, state: State, numbers: Iterator[int], attention: nn.Module) -> None:
    """Keys and values of a self-attention that was given some tokens: theirs, and of all others the original's."""
    for name in ("to_k", "to_v"):

        def around(forward: Callable[..., Any], x: Tensor, *more: Any, number: int = next(numbers)) -> Any:
            out = forward(x, *more)
            if state.mode == "record":
                state.keep(number, out)
            if state.mode != "edit" or state.rows is None:
                return out
            whole = state.kept(number).clone()
            whole[:, state.rows] = out
            return whole

        patch.wrap(attention._modules[name], around, traced=False)  # type: ignore[arg-type]


def _cost(module: nn.Module, own: list[nn.Module]) -> Cost:
    """Of a block with these self-attentions; keys and values of the text, which depend on no row, are left out."""
    attentions = [m for m in module.modules() if all(p in m._modules for p in PROJECTIONS)]
    text = {id(m._modules[p]) for m in attentions if m not in own for p in PROJECTIONS[1:]}
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    row = sum(m.in_features * m.out_features for m in linears if id(m) not in text)
    self_width, text_width = (
        sum(m.out_features for m in linears if any(m in (a._modules["to_k"], a._modules["to_v"]) for a in some))
        for some in (own, [a for a in attentions if a not in own])
    )
    return lambda rows, tokens, words: rows * (row + tokens * self_width + words * text_width)


def _count(patch: Patch, ran: int, dense: int) -> None:
    patch.tally["ran"] += ran
    patch.tally["reused"] += max(0, dense - ran)
