"""Linear attention in the place of softmax attention."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.attention.learned import Learned
from hasten.attention.words import among_places, computed, running
from hasten.kernels.linear_attention import linear_attention
from hasten.method import Method, Part, Stage
from hasten.patch import Patch
from hasten.picture import Call
from hasten.places import Places


class Linear(Method):
    """Attention among the picture's places is phi(q) (phi(k)^T v) / (phi(q) sum phi(k)): its cost grows with the
    tokens, not their square. phi(x) is the softmax over W x and -W x together, with a W for each head, learned for
    queries and for keys: Zhang et al. 2024, arXiv:2402.04347 (Hedgehog), sec. 4. Katharopoulos et al. 2020,
    arXiv:2006.16236 for linear attention.

    A network that was trained with softmax must be tuned to it: `tunable` gives the maps, which start at W = 1 / C^1/4,
    and `hasten.objectives.distill.attention` the loss. Without `weights` the maps are as they start, and pictures fall
    apart.
    """

    stage: ClassVar = Stage.ATTENTION
    writes: ClassVar = frozenset({Part.ATTENTION})
    systems: ClassVar = ("linear-attention",)
    neutral: ClassVar[dict[str, Any]] = {"share": 0.0}
    saves: ClassVar = False

    share: float = Field(1.0, ge=0, le=1, description="of the blocks: the last ones")
    weights: str = Field("", description="file of the tuned maps")

    def apply(self, model: nn.Module) -> Patch:
        learned = Learned("attention.linear")
        if self.weights:
            learned = Learned.read(self.weights, "attention.linear", lambda s: Hedgehog(*s["queries"].shape[:2]))
            learned.to(next(model.parameters()))
        return self._applied(model, learned)

    def tunable(self, model: nn.Module) -> tuple[Patch, Learned]:
        """Applied with maps that are to be trained, alone or with the network. They come into being at the network's
        first call. `Learned.write` keeps them."""
        learned = Learned("attention.linear", Hedgehog)
        return self._applied(model, learned), learned

    def _applied(self, model: nn.Module, learned: Learned) -> Patch:
        compute = learned.told(partial(_compute, learned)) if self.share > 0 else None
        return computed(model, "attention.linear", compute, share=self.share)


class Hedgehog(nn.Module):
    """phi of queries and of keys, [B, H, N, C] -> [B, H, N, 2 C] each, positive, of sum 1. Zhang et al. 2024,
    arXiv:2402.04347 sec. 4.2."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        start = torch.eye(channels).expand(heads, -1, -1) * channels**-0.25
        self.queries, self.keys = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    def forward(self, q_BHNC: Tensor, k_BHMC: Tensor) -> tuple[Tensor, Tensor]:
        """The features of both."""
        return signed(q_BHNC @ self.queries.to(q_BHNC)), signed(k_BHMC @ self.keys.to(k_BHMC))


def signed(x: Tensor) -> Tensor:
    """Features [..., 2 C] of [..., C]: positive, of sum 1, those of x and those of -x."""
    return torch.cat([x, -x], -1).softmax(-1)


def _compute(learned: Learned, places: Places, names: tuple[str, ...], call: Call) -> Tensor:
    name = running(names, call)
    layer = learned.of(name, call.query)

    def attend(q: Tensor, k: Tensor, v: Tensor, tail: int, bias: Tensor | None) -> Tensor:
        if layer is None and len(learned.layers):
            raise ValueError(f"the file of attention.linear has no maps for {name}: tune this network")
        scale = q.shape[-1] ** -0.25
        phi_q, phi_k = (signed(q * scale), signed(k * scale)) if layer is None else layer(q, k)
        return linear_attention(phi_q, phi_k, v, bias)

    return among_places(call, attend)
