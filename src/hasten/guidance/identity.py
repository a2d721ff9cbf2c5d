"""Self-attention whose map is the identity: every place of the picture sees itself alone, and the words."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from hasten.picture import Attending, Call


class Identity:
    """Within it, the first self-attention over `tokens` places gives each place its own value. Ahn et al. 2024,
    arXiv:2403.17377 sec. 4 (self-attention: the values as they are); where words and picture attend jointly, only the
    picture's places are hidden from one another, as in diffusers' PAG for Stable Diffusion 3. Attention to words
    alone stays.

    Attributes:
        met: the self-attention was seen.

    Raises, within:
        Refused: words and picture are of one length, so that nothing tells which is which.
    """

    def __init__(self, tokens: int) -> None:
        self.met, self._mode = False, Attending(tokens, self._first)

    def __enter__(self) -> Identity:
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, at)

    def _first(self, call: Call) -> Tensor:
        self.met, self._mode.compute = True, None
        return blind(call)


def blind(call: Call) -> Tensor:
    """What an attention gives whose places of the picture see themselves and the words."""
    query, value, at, mask = call.query, call.value, call.at, call.mask
    length = query.shape[-2]
    if length == at.stop - at.start:
        return value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    seen = torch.zeros(length, length, dtype=query.dtype, device=query.device)
    seen[at, at] = -torch.inf
    seen.fill_diagonal_(0)
    if mask is not None:
        seen = seen + (mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf))
    return replace(call, mask=seen, causal=False).run()
