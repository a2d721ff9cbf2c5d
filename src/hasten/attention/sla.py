"""SLA, sparse-linear attention: critical blocks exactly, marginal ones linearly, negligible ones not at all."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hasten.attention.blocks import scores, tiles_of
from hasten.attention.learned import Learned
from hasten.attention.words import among_places, computed, ordered, running
from hasten.kernels.block_sparse import block_attention
from hasten.kernels.linear_attention import Feature, feature_map, linear_attention, marginal_attention
from hasten.method import Method, Part, Stage
from hasten.patch import Patch
from hasten.picture import Call
from hasten.places import Places


class Sla(Method):
    """Blocks of `queries` by `keys` places are put in order by their mean logits: the share `critical` of highest runs
    exactly, the share `negligible` of lowest not at all, and those between by linear attention, whose output passes
    through a learned layer that starts at zero and is added. Zhang et al. 2025, arXiv:2509.24006; `linear: all` lets
    the linear part read every block, as the authors' released code. critical = 1 changes nothing.

    Without `weights` it is block-sparse attention alone; the layers come from `tunable` and training (see
    `hasten.objectives.distill.attention`, or any pretraining loss on the network with them). Words that attend with
    the picture are critical, and read all.
    """

    stage: ClassVar = Stage.ATTENTION
    writes: ClassVar = frozenset({Part.ATTENTION})
    systems: ClassVar = ("sla",)
    neutral: ClassVar[dict[str, Any]] = {"critical": 1.0, "negligible": 0.0}
    from_tokens: ClassVar = 2048

    critical: float = Field(0.05, gt=0, le=1, json_schema_extra={"high": 0.5}, description="k_h")
    negligible: float = Field(0.1, ge=0, le=1, json_schema_extra={"fixed": True}, description="k_l")
    feature: Feature = Field("softmax", json_schema_extra={"fixed": True})
    linear: Literal["marginal", "all"] = Field("marginal", json_schema_extra={"fixed": True})
    weights: str = Field("", description="file of the tuned layers")
    queries: int = Field(128, ge=1, le=1024, json_schema_extra={"fixed": True})
    keys: int = Field(64, ge=1, le=1024, json_schema_extra={"fixed": True})

    @model_validator(mode="after")
    def _shares(self) -> Sla:
        if self.critical + self.negligible > 1:
            raise ValueError(
                f"critical and negligible are shares of one whole, got {self.critical} and {self.negligible}"
            )
        return self

    def apply(self, model: nn.Module) -> Patch:
        learned = Learned("attention.sla")
        if self.weights:
            learned = Learned.read(self.weights, "attention.sla", lambda state: nn.Linear(*state["weight"].T.shape))
            learned.to(next(model.parameters()))
        return self._applied(model, learned)

    def tunable(self, model: nn.Module) -> tuple[Patch, Learned]:
        """Applied with layers that start at zero and are to be trained, alone or with the network. They come into being
        at the network's first call. `Learned.write` keeps them."""
        learned = Learned("attention.sla", _zero)
        return self._applied(model, learned), learned

    def _applied(self, model: nn.Module, learned: Learned) -> Patch:
        compute = learned.told(partial(self._compute, learned)) if self.critical < 1 else None
        return computed(model, "attention.sla", compute)

    def _compute(self, learned: Learned, places: Places, names: tuple[str, ...], call: Call) -> Tensor:
        grid, layer = places.grid(call.at.stop - call.at.start), learned.of(running(names, call), call.query)

        def attend(q: Tensor, k: Tensor, v: Tensor, tail: int, bias: Tensor | None) -> Tensor:
            near, places = (self.queries, self.keys), k.shape[2] - tail
            index, marginal = classes(scores(q, k[:, :, :places], near), self.critical, self.negligible)
            exact = block_attention(q, k, v, index, near, tail, bias)
            if layer is None:
                return exact
            phi = feature_map(self.feature)
            given = phi(q), phi(k[:, :, :places]), v[:, :, :places]
            every = self.linear == "all"
            rough = linear_attention(*given) if every else marginal_attention(*given, marginal, near)
            return exact + layer(rough)

        return among_places(call, ordered(attend, tiles_of(grid, call.query.device)))


def classes(scores_BHIJ: Tensor, critical: float, negligible: float) -> tuple[Tensor, Tensor]:
    """The highest share of a row, one at the least, as an index [B, H, I, K], and which of the others are not among the
    lowest, bool [B, H, I, J]. Zhang et al. 2025, arXiv:2509.24006."""
    blocks = scores_BHIJ.shape[-1]
    order = scores_BHIJ.argsort(-1, descending=True)
    first = max(1, int(critical * blocks))
    last = max(first, blocks - int(negligible * blocks))
    marginal = torch.zeros_like(scores_BHIJ, dtype=torch.bool).scatter(-1, order[..., first:last], True)
    return order[..., :first], marginal


def _zero(heads: int, channels: int) -> nn.Module:
    layer = nn.Linear(channels, channels)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
