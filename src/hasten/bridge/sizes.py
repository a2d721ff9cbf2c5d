"""Tells a network the size of latents that a solver made smaller, and the solver how packed latents lie."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid
from hasten.method import Refused
from hasten.patch import Patch
from hasten.places import lattice
from hasten.solvers.declare import Solver, Steps


class Sizes:
    """Stands between a solver that resizes and the networks of a pipeline.

    Latents that have rows and columns pass as they are. Packed ones, [B, tokens, channels], the solver sees as [B, C,
    rows, columns], a token of a picture being 2 x 2 of its pixels, or as videos; how they lie is what the network is
    told at the first call of a trajectory. Where there are fewer tokens later, the network is told of these alone.

    Attributes:
        name: of the pipeline, for refusals.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: tuple[int, ...] = ()  # the network's input at the first call, less its batch
        self._whole: tuple[int, int, int] | None = None  # frames, rows and columns of packed latents in full
        self._flat = False  # a token is a pixel, not 2 x 2
        self._sides = (0, 0)  # rows and columns of tokens now

    def around(self, solver: Solver) -> Solver:
        """The same solver on the pipeline's own latents."""

        @functools.wraps(solver.run)
        def run(x: Tensor, grid: Grid, noise: Noise | None = None, **settings: Any) -> Steps:
            more = () if noise is None else (noise,)
            return self._between(x, lambda spread: solver.run(spread, grid, *more, **settings))

        return replace(solver, run=run)

    def watch(self, patch: Patch, pipe: Any, networks: list[nn.Module]) -> None:
        """Wraps each network's forward, for as long as the pipeline's scheduler is the one that it has now."""
        for net in networks:
            patch.wrap(net, self._forward(net, pipe, pipe.scheduler))

    def _between(self, x: Tensor, begun: Callable[[Tensor], Steps]) -> Steps:
        own, packed = tuple(x.shape[1:]), x.ndim == 3 and self._whole is not None and prod(self._whole) == x.shape[1]
        spread, folded = (self._spread, self._folded) if packed else (_same, _same)
        steps = begun(spread(x))
        x, node = next(steps)
        while True:
            x = folded(x)
            if tuple(x.shape[1:]) not in (own, ()) and self._seen not in (own, ()):
                raise Refused(
                    f"{self.name} gives its network {list(self._seen)} beside latents of {list(own)}, which a solver "
                    "that resizes cannot make smaller: take another solver"
                )
            p = yield x, node
            try:
                x, node = steps.send(_each(spread, p) if packed else p)
            except StopIteration as end:
                return folded(end.value)

    def _spread(self, x: Tensor) -> Tensor:
        """[B, tokens, channels] as a picture or a video."""
        assert self._whole is not None
        laid = x.mT.unflatten(-1, (self._whole[0], *self._sides))
        return laid if self._flat else pixel_shuffle(laid[:, :, 0], 2)

    def _folded(self, x: Tensor) -> Tensor:
        """Back, at any size. Raises Refused for sides that 2 x 2 does not divide."""
        if not self._flat and (x.shape[-2] % 2 or x.shape[-1] % 2):
            raise Refused(f"{self.name} packs 2 x 2 of its pixels, and {list(x.shape[-2:])} are odd: set multiple to 2")
        laid = x if self._flat else pixel_unshuffle(x, 2)
        self._sides = (laid.shape[-2], laid.shape[-1])
        return laid.flatten(2).mT.contiguous()

    def _forward(self, net: nn.Module, pipe: Any, scheduler: Any) -> Callable[..., Any]:
        names = list(inspect.signature(type(net).forward).parameters)[1:]

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            x = given.get("hidden_states", given.get("sample"))
            if pipe.scheduler is not scheduler or not isinstance(x, Tensor):
                return forward(*args, **kwargs)
            if not scheduler.running:
                self._begin(net, x, given)
            if tuple(x.shape[1:]) == self._seen:
                return forward(*args, **kwargs)
            try:
                return forward(*args, **kwargs | self._smaller(kwargs))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                why = str(error).partition("\n")[0]
                raise Refused(
                    f"{type(net).__name__} was made smaller latents than {self.name} prepared all else for ({why}): "
                    "take another solver"
                ) from error

        return around

    def _begin(self, net: nn.Module, x: Tensor, given: dict[str, Any]) -> None:
        self._seen = tuple(x.shape[1:])
        self._whole = lattice(net, given) if x.ndim == 3 else None
        self._flat = "num_frames" in given
        if self._whole is not None:
            self._sides = self._whole[1:]
            if self._whole[0] != 1 and not self._flat:  # layers of pictures
                self._whole = None

    def _smaller(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the network is told of its tokens, at the size that runs."""
        if self._whole is None:
            return {}
        rows, columns = self._sides
        told: dict[str, Any] = {}
        if isinstance(ids := kwargs.get("img_ids"), Tensor):
            kept = torch.arange(rows)[:, None] * self._whole[2] + torch.arange(columns)
            told["img_ids"] = ids.index_select(-2, kept.flatten().to(ids.device))
        if (shapes := kwargs.get("img_shapes")) is not None:
            told["img_shapes"] = _reshaped(shapes, rows, columns)
        if self._flat:
            told |= {"height": rows, "width": columns}
        return told


def _same(x: Tensor) -> Tensor:
    return x


def _each(change: Callable[[Tensor], Tensor], p: Prediction) -> Prediction:
    """A prediction of changed tensors."""
    spread = None if p.spread is None else change(p.spread)
    return replace(p, x=change(p.x), one=change(p.one), other=change(p.other), spread=spread)


def _reshaped(shapes: Any, rows: int, columns: int) -> Any:
    """Nested lists of (frames, rows, columns), at other rows and columns."""
    if isinstance(shapes[0], int):
        return (shapes[0], rows, columns)
    return [_reshaped(s, rows, columns) for s in shapes]
