"""What every approximate attention shares: it acts among the picture's places; words attend as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hasten.kernels.flash import added
from hasten.method import Refused
from hasten.patch import Patch
from hasten.picture import Call, attending
from hasten.places import Places, spots

Attend = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
"""(q [B, H, N, C], k, v [B, H, N + tail, C], tail, bias [B or 1, N + tail] or None) -> [B, H, N, C]."""

Compute = Callable[[Places, tuple[str, ...], Call], Tensor]
"""(places of the running call, names of the attentions of the block, the attention) -> its output."""


def computed(
    model: nn.Module, label: str, compute: Compute | None, of: Literal["any", "pictures", "videos"] = "any",
    share: float = 1.0,
) -> Patch:  # fmt: skip
    """Attention among the picture's places is what `compute` says, in the last `share` of the blocks that have any;
    None changes nothing. Raises Refused as `spots` does."""
    found = spots(model, label, of)
    blocks = {s.block.name: s.block for s in found}
    with Patch() as patch:
        if compute is not None:
            places = Places(patch, model)
            for name in list(blocks)[len(blocks) - max(1, round(share * len(blocks))) :]:
                names = tuple(s.site.name for s in found if s.block.name == name)
                attending(patch, blocks[name], partial(compute, places, names))
        return patch.keep()


def running(names: tuple[str, ...], call: Call) -> str:
    """Which of a block's attentions a call is of. Raises Refused where it is called in parts and cannot be told."""
    if len(names) == 1:  # Mochi's runs once for each row
        return names[0]
    if call.which >= len(names):
        raise Refused(
            f"the attentions of {names[0]} and its block run in parts that cannot be told apart: leave it out"
        )
    return names[call.which]


def among_places(call: Call, attend: Attend) -> Tensor:
    """The places' queries attend by `attend`, to the places' keys and, at their end, those of the words; the words'
    queries, which are few, to everything, densely.

    Raises:
        Refused: it is causal, or a mask tells other keys to other queries.
    """
    if call.causal:
        raise Refused("causal attention is not served by sparse methods: leave the method out")
    query, at, (key, value) = call.query, call.at, call.heads()
    bias = _bias(call.mask)
    tail = key.shape[2] - (at.stop - at.start)
    if tail == 0:
        return attend(query, key, value, 0, bias)
    k, v = (torch.cat([x[:, :, at], x[:, :, : at.start], x[:, :, at.stop :]], 2) for x in (key, value))
    moved = None if bias is None else torch.cat([bias[:, at], bias[:, : at.start], bias[:, at.stop :]], 1)
    places = attend(query[:, :, at], k, v, tail, moved)
    told = torch.cat([query[:, :, : at.start], query[:, :, at.stop :]], 2)
    words = scaled_dot_product_attention(told, k, v, None if moved is None else moved[:, None, None].to(query.dtype))
    return torch.cat([words[:, :, : at.start], places, words[:, :, at.start :]], 2)


def ordered(attend: Attend, order_N: Tensor) -> Attend:
    """`attend`, of which the places stand in another order."""
    back = order_N.argsort()

    def run(q: Tensor, k: Tensor, v: Tensor, tail: int, bias: Tensor | None) -> Tensor:
        places = k.shape[2] - tail
        whole = torch.cat([order_N, torch.arange(places, places + tail, device=order_N.device)]) if tail else order_N
        moved = None if bias is None else bias[:, whole]
        return attend(q[:, :, order_N], k[:, :, whole], v[:, :, whole], tail, moved)[:, :, back]

    return run


def _bias(mask: Tensor | None) -> Tensor | None:
    """A mask that is the same for all queries and heads, as numbers that are added, [B or 1, L]."""
    if mask is None:
        return None
    if any(mask.shape[i] != 1 for i in range(max(0, mask.ndim - 3), mask.ndim - 1)):
        raise Refused("a mask that tells other keys to other queries is not served by sparse attention: leave it out")
    return added(mask.reshape(-1, mask.shape[-1]), torch.float32)
