"""Model-step distillation: an adaptor learns what a U-Net's low-resolution part returns from what it returned last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.objectives.objective import Batch, Nets, Phase

systems: tuple[str, ...] = ("clockwork",)


@dataclass(frozen=True, slots=True)
class ModelStep:
    """E_t |r_out_t - phi(r_in_t, r_out_(t+1), temb, text)|^2 over the steps of trajectories that the full model
    unrolled from noise, at which the adaptor will stand in: Habibian et al. 2023, arXiv:2312.08128 eq. 2 and alg. 1.

    The rows come from `cache.clockwork.watch`, so no data is needed and the teacher is not among the nets: the gradient
    reaches the adaptor alone. Zero where the part returns at every step what it returned before, and the adaptor has
    not been trained.
    """

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("adaptor",), self.loss),)

    def loss(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Scalar, a mean over elements; nets["adaptor"](r_in, before, temb, text) against batch["r_out"], [B, C, H, W];
        a batch without "text" is of a network that is given none."""
        said = nets["adaptor"](batch["r_in"], batch["before"], batch["temb"], batch.get("text"))
        return (said.float() - batch["r_out"]).square().mean()
