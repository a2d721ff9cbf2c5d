"""Between key steps, feed-forwards run on the tokens that matter most alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from hasten.anatomy import Block, anatomy
from hasten.cache.hold import Held, first_tensor, hold
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch
from hasten.picture import Call, attending
from hasten.places import Grid, Places, generator

OF_WORDS = ("ff_context", "txt_mlp")
"""Feed-forwards of the words, which are few and run in full."""

QUERIES = 512
"""Of an attention, at most so many, evenly spread, tell how much each key is looked at."""

Score = Literal["attention", "values", "random"]


class Token(Method):
    """Every `every`-th step runs in full. In between, attention gives its last output again, and a feed-forward runs on
    the share `keep` of the picture's tokens that score highest; the others give what they gave last. every = 1 changes
    nothing.

    Zou et al. 2024 (ToCa), arXiv:2410.05317 sec. 3, and its authors' code for DiT. The score of a token is the sum of
    what others attend to it at the last key step, over the norm of all tokens' (`attention`); plus `stale` for each
    step that it was left out, over `every`; the best of each 2 x 2 places gets the share `spread` on top, where rows
    and columns can be told. The score of attention is taken from 512 queries, evenly spread. `values` takes less the
    norms of the values, and `random` is DuCa's (Zou et al. 2024, arXiv:2412.18911), which found it no worse. One share
    serves all steps and layers; the authors' shares fall or rise along both.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"every": 1}

    every: int = Field(3, ge=1, le=10)
    keep: float = Field(0.3, ge=0, le=1, description="share of the tokens whose feed-forwards run between key steps")
    score: Score = "attention"
    stale: float = Field(0.25, ge=0, le=10, json_schema_extra={"fixed": True})
    spread: float = Field(0.6, ge=0, le=10, json_schema_extra={"fixed": True})
    seed: int = Field(0, ge=0, json_schema_extra={"fixed": True})

    def apply(self, model: nn.Module) -> Patch:
        blocks = [(i, b) for i, b in enumerate(anatomy(model).blocks) if _feeds(b)]
        if not blocks:
            raise Refused(
                f"cache.token leaves tokens out of feed-forwards, and {type(model).__name__} has none that take tokens "
                "one by one: take cache.feature"
            )
        with Patch() as patch:
            if self.every > 1:
                places = Places(patch, model)
                for site in anatomy(model).attentions():
                    hold(patch, site.module, self._between, weight=100)
                for index, block in blocks:
                    self._in(patch, places, index, block)
            return patch.keep()

    def _between(self, here: Moment) -> bool:
        return here.step % self.every != 0

    def _in(self, patch: Patch, places: Places, index: int, block: Block) -> None:
        scores: dict[str, Tensor] = {}  # of each branch, at the last key step

        def scored(call: Call) -> Tensor:
            scores[now().branch] = influence(call) if self.score == "attention" else -weight(call)
            return call.run()

        def rank(x_BNC: Tensor, age_BN: Tensor) -> Tensor:
            batch, tokens = x_BNC.shape[:2]
            found = scores.get(now().branch)
            if self.score == "random":
                found = torch.rand(tokens, generator=generator(self.seed, index)).to(x_BNC.device).expand(batch, -1)
            elif found is None or found.shape != (batch, tokens):
                raise Refused(
                    f"what is attended to in {block.name} of {type(places.model).__name__} cannot be read: give "
                    "cache.token score: random"
                )
            else:
                found = normalize(found, dim=1)
            found = found + self.stale / self.every * age_BN
            return found if (grid := _grid(places, tokens)) is None else spread(found, grid, self.spread)

        if self.score != "random":
            attending(patch, block, scored)
        for module in _feeds(block):
            self._partly(patch, module, rank)

    def _partly(self, patch: Patch, module: nn.Module, rank: Callable[[Tensor, Tensor], Tensor]) -> None:
        """A feed-forward that runs on a part of its tokens between key steps."""
        kept: dict[str, _Kept] = {}

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here, x = now(), first_tensor(args, kwargs)
            before = kept.pop(here.branch, None)  # where the forward raises, nothing stale is left
            if x is None or x.ndim != 3 or len(args) + len(kwargs) != 1:
                return forward(*args, **kwargs)
            if before is None or not before.held.usable(here, x) or not self._between(here):
                patch.tally["ran"] += 100
                out = forward(*args, **kwargs)
                kept[here.branch] = _Kept(Held.of(here, x, out), x.new_zeros(x.shape[:2], dtype=torch.float32))
                return out
            count = round(self.keep * x.shape[1])
            patch.tally["ran"] += round(100 * self.keep)
            patch.tally["reused"] += 100 - round(100 * self.keep)
            out, age = before.held.out, before.age_BN + 1
            if count == x.shape[1]:
                out = forward(x)
            elif count > 0:
                index = rank(x, before.age_BN).topk(count, dim=1).indices
                fresh = forward(x.gather(1, index[..., None].expand(-1, -1, x.shape[2])))
                out = out.scatter(1, index[..., None].expand(-1, -1, fresh.shape[2]), fresh)
                age = age.scatter(1, index, 0.0)
            kept[here.branch] = _Kept(Held(before.held.moment, before.held.form, out, ()), age)
            return out

        patch.wrap(module, around, traced=False)


@dataclass(frozen=True)
class _Kept:
    """What a feed-forward gave for each token, and how many steps ago."""

    held: Held
    age_BN: Tensor = field(repr=False)


def _feeds(block: Block) -> list[nn.Module]:
    """Feed-forwards of the picture that take its tokens one by one."""
    return [
        m for name, m in block.feed_forwards
        if name.rpartition(".")[2] not in OF_WORDS and not any(hasattr(c, "kernel_size") for c in m.modules())
    ]  # fmt: skip


def _grid(places: Places, tokens: int) -> Grid | None:
    try:
        return places.grid(tokens)
    except Refused:
        return None


def influence(call: Call) -> Tensor:
    """[B, N]: what each of the picture's places is attended to by all others, summed over queries (by an even choice of
    at most 512 of them), mean over heads. ToCa eq. 4, its sum over columns of the attention map."""
    key, _ = call.heads()
    length = call.query.shape[2]
    rows = torch.arange(0, length, max(1, -(-length // QUERIES)), device=key.device)
    logits = call.query.index_select(2, rows).float() @ key.float().transpose(-1, -2)
    logits = logits * ((call.more or {}).get("scale") or call.query.shape[-1] ** -0.5)
    if call.mask is not None:
        mask = call.mask.expand(*call.mask.shape[:-2], length, key.shape[2]).index_select(-2, rows)
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1).sum(2).mean(1)[:, call.at] * (length / len(rows))


def weight(call: Call) -> Tensor:
    """[B, N]: norm of the values of each of the picture's places, mean over heads."""
    return call.value.float().norm(dim=-1).mean(1)[:, call.at]


def spread(score_BN: Tensor, grid: Grid, bonus: float) -> Tensor:
    """The score, with the share `bonus` more for the best of each 2 x 2 places, so that what is chosen lies over the
    whole picture (ToCa sec. 3.2, uniform spatial distribution). What is left over of odd sides has none."""
    frames, rows, columns = grid
    tall, wide = rows // 2, columns // 2
    score = score_BN.clone().view(-1, frames, rows, columns)
    tiles = score[:, :, : 2 * tall, : 2 * wide].unflatten(3, (wide, 2)).unflatten(2, (tall, 2))  # [B, F, h, 2, w, 2]
    best = tiles.amax((3, 5), keepdim=True)
    raised = torch.where(tiles == best, tiles + bonus * best.abs(), tiles)
    score[:, :, : 2 * tall, : 2 * wide] = raised.flatten(4, 5).flatten(2, 3)
    return score.view(score_BN.shape)
