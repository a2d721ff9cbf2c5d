"""V-prediction: a network of a discrete diffusion learns the slope of its circle from data to noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.objectives.objective import Batch, Nets, Phase
from hasten.path import Path
from hasten.paths.discrete import scaled_linear

systems: tuple[str, ...] = ()

STABLE_DIFFUSION = scaled_linear()


@dataclass(frozen=True, slots=True)
class VPrediction:
    """E |v(x_t, t) - (alpha eps - sigma x0)|^2 on a variance preserving path, x_t = alpha x0 + sigma eps: Salimans & Ho
    2022, arXiv:2202.00512 sec. 4 and appendix D; of x0, it is weighted by 1 / sigma^2 = SNR + 1.

    At a law with a known denoiser the loss is smallest at its v; where x0 is a function of x_t (one data point) it is
    zero there. At zero signal-to-noise ratio v is -x0, so it says something where eps says nothing (Lin et al. 2023,
    arXiv:2305.08891 sec. 3.2).

    Attributes:
        path: with sigma > 0 at every step; Stable Diffusion's unless given.
        steps: of its table; times are i / steps, i = 1 .. steps, each as likely.
    """

    path: Path = STABLE_DIFFUSION
    steps: int = 1000

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("denoiser",), self.loss),)

    def loss(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Scalar; batch["x0"] is [B, ...]; all else in the batch goes to nets["denoiser"](x, t, **rest) by name.

        Times are even over the batch but for one common shift, which leaves less to chance (Kingma et al. 2021,
        arXiv:2107.00630, appendix I.1).
        """
        rest = dict(batch)
        x0 = rest.pop("x0")
        eps = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        u = (torch.rand((), generator=rng, device=rng.device) + torch.arange(len(x0), device=rng.device) / len(x0)) % 1
        t = ((u * self.steps).floor().clamp_max(self.steps - 1) + 1).to(x0) / self.steps
        t_B = t.reshape(-1, *[1] * (x0.ndim - 1))
        alpha, sigma = self.path.alpha(t_B), self.path.sigma(t_B)
        v = nets["denoiser"](alpha * x0 + sigma * eps, t, **rest)
        return (v.float() - (alpha * eps - sigma * x0)).square().mean()
