"""AsymRnR: fewer queries, and fewer keys and values at another rate; dropped queries get their match's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch
from hasten.places import Places, Spot, generator, spots
from hasten.tokens.matching import Pairs, destinations, match, redundancy
from hasten.tokens.within import Side, entered


class Asymmetric(Method):
    """In the attention of a diffusion transformer, `queries` of the queries and `keys` of the keys go, with their
    values; what attention gives for a query is copied to those that it stands for. Which stand for which is found by
    bipartite matching (Euclidean; of queries among themselves, of keys by their values) into one random token of each
    window of frames, rows and columns, for each head, and is kept for `reuse` evaluations. Sun et al. 2024,
    arXiv:2412.11706, after the authors' code. Rates of 0 change nothing. Words that attend with the picture stay.

    Where `least` is above 0, a rate holds only where the matching shows that much redundancy, the mean of
    1 - |a - b|^2 / (|a|^2 + |b|^2) over the tokens that would go: the paper's schedule over blocks and steps, measured
    as the sampler runs instead of beforehand.
    """

    stage: ClassVar = Stage.TOKENS
    writes: ClassVar = frozenset({Part.TOKENS, Part.ATTENTION})
    systems: ClassVar = ("asymrnr",)
    neutral: ClassVar[dict[str, Any]] = {"queries": 0.0, "keys": 0.0}
    from_tokens: ClassVar = 1024

    queries: float = Field(0.5, ge=0, le=0.9)
    keys: float = Field(0.3, ge=0, le=0.9)
    reuse: int = Field(5, ge=1, le=20)
    least: float = Field(0.0, ge=0, le=1, description="redundancy from which on a rate holds; 0: always")
    window_t: int = Field(2, ge=1, le=8)
    window_y: int = Field(2, ge=1, le=8)
    window_x: int = Field(2, ge=1, le=8)
    seed: int = Field(0, ge=0, le=2**31, json_schema_extra={"fixed": True})

    def apply(self, model: nn.Module) -> Patch:
        found = spots(model, "tokens.asymmetric")
        if any("down_blocks" in s.site.name for s in found):
            raise Refused(
                f"tokens.asymmetric works on diffusion transformers, and {type(model).__name__} is a U-Net: take "
                "tokens.merge"
            )
        with Patch() as patch:
            if max(self.queries, self.keys) > 0:
                places = Places(patch, model)
                for spot in found:
                    self._wrap(patch, places, spot)
            return patch.keep()

    def _wrap(self, patch: Patch, places: Places, spot: Spot) -> None:
        running = entered(patch, spot.block)
        kept = {"queries": Kept(), "keys": Kept()}

        def attention(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            grid = places.grid(running[-1].tokens)

            def side(name: str, rate: float, x: Tensor, which: int) -> Side | None:
                if rate == 0:
                    return None
                found = kept[name].get(which, self.reuse, x, lambda: self._match(x, rate, grid, 2 * spot.index, name))
                if found is None:
                    return None
                patch.tally[f"{name} dropped"] += x.shape[-2] - found.stay_BM.shape[1]
                return per_head(found, x.shape[1])

            with running[-1].on(
                lambda q, k, v, which: (side("queries", self.queries, q, which), side("keys", self.keys, v, which))
            ):
                return forward(*args, **kwargs)

        patch.wrap(spot.site.module, attention)

    def _match(self, x_BHNC: Tensor, rate: float, grid: tuple[int, int, int], index: int, name: str) -> Pairs | None:
        x_BNC = x_BHNC.flatten(0, 1)
        tokens = x_BNC.shape[1]
        rng = generator(self.seed, index + (name == "keys"))
        into_D = destinations(grid, (self.window_t, self.window_y, self.window_x), rng)
        pairs = match(x_BNC, into_D, tokens - int(tokens * (1 - rate)), "euclidean")
        if pairs.stay_BM.shape[1] == tokens:
            return None
        return pairs if self.least == 0 or float(redundancy(x_BNC, pairs)) >= self.least else None


@dataclass(frozen=True, slots=True)
class _Found:
    moment: Moment
    form: tuple[torch.Size, torch.dtype, torch.device]
    pairs: Pairs | None


class Kept:
    """The matching cache: what was found last on each branch is given again for some evaluations of its trajectory."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], _Found] = {}

    def get(self, which: int, reuse: int, x: Tensor, find: Callable[[], Pairs | None]) -> Pairs | None:
        """What is kept of the `which`-th attention of a call, or what `find` says where that is older than `reuse`
        evaluations, of another trajectory or branch, or of another form."""
        here, form = now(), (x.shape, x.dtype, x.device)
        was = self._found.get((here.branch, which))
        if was is not None and was.moment.run == here.run and was.form == form:
            age = here.step - was.moment.step
            if 0 < age < reuse:
                return was.pairs
        pairs = find()
        self._found[here.branch, which] = _Found(here, form, pairs)
        return pairs


def per_head(pairs: Pairs, heads: int) -> Side:
    """Pairs of rows (batch, head): tokens that go are dropped as they are, and get back their match's output."""

    def of(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x_BHNC: change(x_BHNC.flatten(0, 1)).unflatten(0, (-1, heads))

    return Side(of(pairs.pick), of(pairs.unmerge), pairs.stay_BM.unflatten(0, (-1, heads)))
