"""Flow matching: a network learns the velocity of the straight path from data to noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.objectives.objective import Batch, Nets, Phase

systems: tuple[str, ...] = ("flow-matching", "rectified-flow")


@dataclass(frozen=True, slots=True)
class FlowMatching:
    """Conditional flow matching on x_t = (1 - t) x0 + t eps: E |v(x_t, t) - (eps - x0)|^2.

    Lipman et al. 2022, arXiv:2210.02747 eq. 9 and 23; times are logit-normal, Esser et al. 2024, arXiv:2403.03206 eq.
    19. At a law with a known velocity the loss is smallest at that velocity; where x0 is a function of x_t (one data
    point) it is zero there.

    Attributes:
        location, scale: of the normal whose sigmoid the time is.
    """

    location: float = 0.0
    scale: float = 1.0

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("denoiser",), self.loss),)

    def loss(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Scalar; batch["x0"] is [B, ...]; all else in the batch goes to nets["denoiser"](x, t, **rest) by name."""
        rest = dict(batch)
        x0 = rest.pop("x0")
        eps = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        t = logit_normal(len(x0), self.location, self.scale, rng).to(x0)
        t_B = t.reshape(-1, *[1] * (x0.ndim - 1))
        v = nets["denoiser"]((1 - t_B) * x0 + t_B * eps, t, **rest)
        return (v.float() - (eps - x0)).square().mean()


def logit_normal(size: int, location: float, scale: float, rng: torch.Generator) -> Tensor:
    """Times in (0, 1), [size], whose logit is normal; Esser et al. 2024, arXiv:2403.03206 eq. 19."""
    return torch.sigmoid(location + scale * torch.randn(size, generator=rng, device=rng.device))
