"""What the network makes of the words alone is made once a picture: keys, values, projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.cache.hold import same
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch

KEYS_VALUES = ("to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj")
"""Of a cross-attention: what reads the words alone."""

PROJECTIONS = ("caption_projection", "caption_norm", "context_embedder", "text_embedder", "text_proj", "txt_in")
"""Children of a network, or of its embedders, that bring the words to its width."""

MOST = 16
"""Different words that are told apart in one evaluation: those of each text encoder, of pictures given as prompts."""


class Text(Method):
    """Keys and values of cross-attention, and the projection of the words before the blocks, are computed at the first
    evaluation of a picture and given again at the others: the words stay the same from step to step. Exact: a module
    runs again whenever what it is given differs in a single number. Known from TensorRT demos and from Stable
    Diffusion's ports as the cross-attention cache; no paper claims it.

    It pays where the words are many beside the picture's tokens (PixArt-alpha's 300, Wan's 512), and costs memory: two
    tensors [B, L, C] an attention and branch, in bfloat16 5 MB each of Wan 2.1 14B's 80. Where words and picture are
    one stream (Flux, Stable Diffusion 3) the words change from block to block, and the projection alone is spared.
    With gradients nothing is kept.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.WORDS})
    neutral: ClassVar[dict[str, Any]] = {}

    def apply(self, model: nn.Module) -> Patch:
        readers = list(dict.fromkeys(reads_words(model)))
        if not readers:
            raise Refused(
                f"cache.text spares reading the words again, and {type(model).__name__} reads none: take cache.interval"
            )
        with Patch() as patch:
            words = _Words()
            for module in readers:
                patch.wrap(module, _once(patch, words), traced=False)
            return patch.keep()


def reads_words(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose input is made of the words alone, whatever the step."""
    for name, module in model.named_modules():
        if name.count(".") < 2 and name.rpartition(".")[2] in PROJECTIONS:
            yield module
    for site in anatomy(model).attentions("cross"):
        yield from (m for n in KEYS_VALUES if isinstance(m := getattr(site.module, n, None), nn.Module))


def _once(patch: Patch, words: _Words) -> Callable[..., Any]:
    kept: dict[str, tuple[Moment, int, Any]] = {}  # of each branch: when, of which words, what

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here = now()
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        which = words.which(here, args[0])
        then, before, out = kept.get(here.branch, (None, -1, None))
        if here.since(then) > 0 and which == before:
            patch.tally["reused"] += 1
            return out
        patch.tally["ran"] += 1
        kept.pop(here.branch, None)
        out = forward(*args)
        kept[here.branch] = here, which, out
        return out

    return around


@dataclass
class _Met:
    """Words that were met: their number, a copy, and the tensor that was last found to hold the same."""

    number: int
    copy: Tensor
    last: Tensor
    at: Moment
    version: int | None

    def holds(self, x: Tensor, here: Moment) -> bool:
        """Whether `x` is the very memory that was compared, and nobody has written there since: of inference mode's
        tensors that is not told, so within one evaluation only."""
        y = self.last
        alike = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
        return alike and (_version(x) == self.version if self.version is not None else self.at == here)


@dataclass
class _Words:
    """Tells apart what modules are given on a branch of a trajectory. Numbers are compared once for all modules that
    are given one tensor: on an accelerator each comparison waits for it.

    Attributes:
        met: of each branch, the newest.
    """

    met: dict[str, list[_Met]] = field(default_factory=dict)
    count: int = 0

    def which(self, here: Moment, x: Tensor) -> int:
        """The number of the words that `x` holds."""
        known = [m for m in self.met.get(here.branch, []) if here.since(m.at) >= 0][-MOST:]
        for m in known:
            if m.holds(x, here):
                return m.number
        found = next((m for m in known if same(m.copy, x)), None)
        if found is None:
            self.count += 1
            found = _Met(self.count, x.clone(), x, here, None)
            known.append(found)
        found.last, found.at, found.version = x, here, _version(x)
        self.met[here.branch] = known
        return found.number


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
