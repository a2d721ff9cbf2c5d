"""An autoencoder's loss: pictures back from their latents, latents of unit scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.objectives.objective import Batch, Nets, Phase

systems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reconstruct:
    """Mean square plus absolute error of `decode(encode(x) + noise)`.

    The noise makes the decoder forgive small errors of a denoiser; the penalty on the latents' mean and variance keeps
    them where a diffusion model wants them (the part of a KL term that a deterministic encoder needs).

    Attributes:
        noise: standard deviation of the noise on the latents, in their units.
        penalty: weight of (mean^2 + (variance - 1)^2) over batch and space, a channel.
    """

    noise: float = 0.05
    penalty: float = 0.01

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("autoencoder",), self.loss),)

    def loss(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Scalar; batch["x"] is [B, 3, H, W] in [-1, 1]; nets["autoencoder"](x, noise) gives (pictures, latents)."""
        x = batch["x"]
        y, z = nets["autoencoder"](x, self.noise * batch["noise"])
        z = z.float()
        var, mean = torch.var_mean(z, (0, 2, 3))
        error = y.float() - x
        return error.square().mean() + 0.1 * error.abs().mean() + self.penalty * (mean**2 + (var - 1) ** 2).mean()
