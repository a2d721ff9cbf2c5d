"""Self-attention whose map is the identity: every place of the picture sees itself alone, and the words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.overrides import TorchFunctionMode

from hasten.picture import Picture


class Identity(TorchFunctionMode):
    """Within it, the first self-attention over `tokens` places gives each place its own value. Ahn et al. 2024,
    arXiv:2403.17377 sec. 4 (self-attention: the values as they are); where words and picture attend jointly, only the
    picture's places are hidden from one another, as in diffusers' PAG for Stable Diffusion 3. Attention to words
    alone stays.

    Attributes:
        tokens: places of the picture, N.
        met: the self-attention was seen.

    Raises, within:
        Refused: words and picture are of one length, so that nothing tells which is which.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.met, self.picture = tokens, False, Picture(tokens)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat:
            self.picture.note(*args, **kwargs)
        if func is attend and not self.met:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> Tensor:  # fmt: skip
        length = query.shape[-2]
        start = self.picture.start(length, key.shape[-2])
        if start is None:
            return attend(query, key, value, attn_mask, dropout_p, is_causal, **more)
        self.met = True
        if length == self.tokens:
            return value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        seen = torch.zeros(length, length, dtype=query.dtype, device=query.device)
        places = slice(start, start + self.tokens)
        seen[places, places] = -torch.inf
        seen.fill_diagonal_(0)
        if attn_mask is not None:
            seen = seen + (attn_mask if attn_mask.is_floating_point() else torch.where(attn_mask, 0.0, -torch.inf))
        return attend(query, key, value, seen, dropout_p, **more)
