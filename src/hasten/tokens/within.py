"""Fewer queries, or keys and values, in an attention that runs: after positions have turned them, where softmax is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hasten.anatomy import Block
from hasten.method import Refused
from hasten.patch import Patch
from hasten.picture import Attending, Call


@dataclass(frozen=True, slots=True)
class Side:
    """A shorter sequence in the place of one of N tokens.

    Attributes:
        down: [B, H, N, C] -> [B, H, M, C].
        up: back again.
        stay: [B or 1, H or 1, M], which of the N each of the M is: what a mask says of it.
    """

    down: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    stay: Tensor


Plan = Callable[[Tensor, Tensor, Tensor, int], tuple[Side | None, Side | None]]
"""(q, k, v of the picture's places [B, H, N, C], which attention of the call) -> what becomes of queries, and of keys
with values; None leaves them."""


class Within:
    """Within it, and while `on`, attention among `tokens` places runs on the sequences that `plan` makes of them; words
    that attend together with them stay. Attention to words alone stays as it is.

    Attributes:
        tokens: places of the picture, N.
        met: attentions that were seen so, in the last `on`.

    Raises, within:
        Refused: words and picture are of one length, so that nothing tells which is which, or heads share keys.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.met = tokens, 0
        self._mode = Attending(tokens, None)

    def __enter__(self) -> Within:
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, at)

    @contextmanager
    def on(self, plan: Plan) -> Iterator[None]:
        """While this lasts, attention follows the plan. Raises Refused at its end where it met none."""

        def compute(call: Call) -> Tensor:
            which, self.met = self.met, self.met + 1
            return shorter(call, plan, which)

        self._mode.compute, self.met = compute, 0
        try:
            yield
        finally:
            self._mode.compute = None
        if not self.met:
            raise Refused(
                f"no softmax attention among {self.tokens} tokens was seen to run (another backend, or a compiled "
                "block): leave the method out, or the other one"
            )


def shorter(call: Call, plan: Plan, which: int = 0) -> Tensor:
    """An attention on the sequences that `plan` makes of its places. Raises Refused where heads share keys."""
    query, key, value, here = call.query, call.key, call.value, call.at
    if query.shape[:-2] != key.shape[:-2] or call.causal:
        raise Refused("attention whose heads share keys, or that is causal, is not served: leave the method out")
    queries, keys = plan(query[..., here, :], key[..., here, :], value[..., here, :], which)

    def short(x: Tensor, side: Side | None) -> Tensor:
        return x if side is None else _instead(x, side.down(x[..., here, :]), here)

    mask = _thin(call.mask, -1, keys, here, query.shape)
    mask = _thin(mask, -2, queries, here, query.shape)
    y = replace(call, query=short(query, queries), key=short(key, keys), value=short(value, keys), mask=mask).run()
    if queries is None:
        return y
    cut = slice(here.start, here.start + queries.stay.shape[-1])
    return _instead(y, queries.up(y[..., cut, :]), cut)


def entered(patch: Patch, block: Block) -> list[Within]:
    """Runs `block` within a mode of its own, which stands last in the list while it does."""
    running: list[Within] = []

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Within(block.inputs(args, kwargs).x.shape[1]) as mode:
            running.append(mode)
            try:
                return forward(*args, **kwargs)
            finally:
                running.pop()

    patch.wrap(block.module, around, traced=False)
    return running


def _instead(x: Tensor, part: Tensor, where: slice) -> Tensor:
    return torch.cat([x[..., : where.start, :], part, x[..., where.stop :, :]], -2)


def _thin(mask: Tensor | None, dim: int, side: Side | None, here: slice, like: torch.Size) -> Tensor | None:
    """The mask [.., .., L or 1, S] of the shorter sequence."""
    if mask is None or side is None or mask.shape[dim] == 1:
        return mask
    batch, heads, _, _ = like
    per_head = mask.expand(batch, heads, *mask.shape[-2:]).transpose(dim, -1)
    stay = side.stay.expand(batch, heads, -1)[:, :, None].expand(-1, -1, per_head.shape[-2], -1)
    parts = [per_head[..., : here.start], per_head[..., here].gather(-1, stay), per_head[..., here.stop :]]
    return torch.cat(parts, -1).transpose(dim, -1)
