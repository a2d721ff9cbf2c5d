"""Top-k block-sparse attention: each block of queries reads the blocks of keys that its mean says matter."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from hasten.attention.blocks import tiles_of, top
from hasten.attention.words import among_places, computed, ordered
from hasten.kernels.block_sparse import block_attention
from hasten.method import Method, Part, Stage
from hasten.patch import Patch
from hasten.picture import Call
from hasten.places import Places


class TopBlocks(Method):
    """Attention among the picture's places reads, for each block of `queries`, the share `keep` of the blocks of
    `keys` with the largest logit of mean query and mean key, and computes nothing else. Blocks are tiles of the picture
    (or of its frames), so that what they average is alike. Words that attend with the picture are read by all, and
    read all. keep = 1 changes nothing.

    The rule is that of Zhang et al. 2025, arXiv:2509.24006 (SLA, without its linear part), as in the authors' code;
    Jiang et al. 2024, arXiv:2407.02490 (MInference) call it block-sparse. It costs the share of dense attention that is
    kept, and one pass over queries and keys; it pays from some thousand tokens on.
    """

    stage: ClassVar = Stage.ATTENTION
    writes: ClassVar = frozenset({Part.ATTENTION})
    systems: ClassVar = ("sparse-attention",)
    neutral: ClassVar[dict[str, Any]] = {"keep": 1.0}
    from_tokens: ClassVar = 2048

    keep: float = Field(0.25, gt=0, le=1, description="share of the blocks that are read")
    queries: int = Field(128, ge=1, le=1024, json_schema_extra={"fixed": True})
    keys: int = Field(64, ge=1, le=1024, json_schema_extra={"fixed": True})

    def apply(self, model: nn.Module) -> Patch:
        return computed(model, "attention.top_blocks", self._compute if self.keep < 1 else None)

    def _compute(self, places: Places, names: tuple[str, ...], call: Call) -> Tensor:
        grid = places.grid(call.at.stop - call.at.start)

        def attend(q: Tensor, k: Tensor, v: Tensor, tail: int, bias: Tensor | None) -> Tensor:
            block = self.queries, self.keys
            index = top(q, k[:, :, : k.shape[2] - tail], self.keep, block)
            return block_attention(q, k, v, index, block, tail, bias)

        return among_places(call, ordered(attend, tiles_of(grid, call.query.device)))
