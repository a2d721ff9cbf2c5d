"""Attention among the picture's places, found and computed otherwise while a network runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.overrides import TorchFunctionMode

from hasten.anatomy import Block
from hasten.method import Refused
from hasten.patch import Patch


class Picture:
    """A sequence of `tokens` places, found again after words were joined to it: whoever sees the network's calls of
    `torch.cat` notes them, and asks when the attention runs."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self._alike = tokens, False
        self._joined: dict[int, int] = {}  # length of words and picture together -> where the picture begins

    def note(self, tensors: Any, dim: int = 0, **_: Any) -> None:
        """Joint attention puts the two sequences together: in which order is the network's own affair."""
        if len(tensors) == 2:
            first, second = (t.shape[dim] for t in tensors)
            if self.tokens in (first, second):
                self._joined[first + second] = 0 if first == self.tokens else first
                self._alike = first == second

    def start(self, queries: int, keys: int) -> int | None:
        """Where it begins in a self-attention of so many; None where words alone are attended to, or a window.

        Raises:
            Refused: words and picture are of one length, so that nothing tells which is which.
        """
        start = 0 if queries == self.tokens else self._joined.get(queries)
        if keys != queries or start is None:
            return None
        if queries > self.tokens and self._alike:
            raise Refused(
                f"{self.tokens} places and as many words: which come first cannot be told; change one of them"
            )
        return start


@dataclass(frozen=True, slots=True)
class Call:
    """A softmax attention that is about to run, in which the picture's places attend to one another.

    Attributes:
        query, key, value: [B, H, L, C]; keys and values may have fewer heads.
        at: which of the L are the picture's; the others are words.
        which: how many such attentions the block ran before it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    at: slice
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    more: dict[str, Any] | None = None
    which: int = 0

    def heads(self) -> tuple[Tensor, Tensor]:
        """Keys and values of as many heads as there are of queries."""
        times = self.query.shape[1] // self.key.shape[1]
        if times == 1:
            return self.key, self.value
        return self.key.repeat_interleave(times, 1), self.value.repeat_interleave(times, 1)

    def run(self) -> Tensor:
        """As torch computes it."""
        return attend(self.query, self.key, self.value, self.mask, self.dropout, self.causal, **self.more or {})


Compute = Callable[[Call], Tensor]


class Attending(TorchFunctionMode):
    """Within it, attention among `tokens` places is what `compute` says, as long as that is not None; all attention,
    where `tokens` is None. Else attention to words alone stays as it is, and what happens outside, in other threads
    too. `torch.compile` traces it.

    Raises, within:
        Refused: words and picture are of one length, so that nothing tells which is which.
    """

    def __init__(self, tokens: int | None, compute: Compute | None) -> None:
        super().__init__()
        self.compute, self._met = compute, 0
        self._picture = None if tokens is None else Picture(tokens)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat and self._picture is not None:
            self._picture.note(*args, **kwargs)
        if func is attend and self.compute is not None:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> Tensor:  # fmt: skip
        start, tokens = 0, query.shape[-2]
        if self._picture is not None:
            found, tokens = self._picture.start(query.shape[-2], key.shape[-2]), self._picture.tokens
            if found is None:
                return attend(query, key, value, attn_mask, dropout_p, is_causal, **more)
            start = found
        assert self.compute is not None
        at = slice(start, start + tokens)
        which, self._met = self._met, self._met + 1
        return self.compute(Call(query, key, value, at, attn_mask, dropout_p, is_causal, more, which))


def attending(patch: Patch, block: Block, compute: Compute, every: bool = False) -> None:
    """While `block` runs, attention among the picture's places, or with `every` all attention, is what `compute`
    says."""

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Attending(None if every else block.inputs(args, kwargs).x.shape[1], compute):
            return forward(*args, **kwargs)

    patch.wrap(block.module, around)
