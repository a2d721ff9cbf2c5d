"""What a step costs in likelihood, between every two points of a fine grid."""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.grid import Grid

systems = ("dp-timesteps",)


def elbo(
    denoise: Denoiser, x0: Tensor, grid: Grid, rng: torch.Generator, tick: Callable[[int], None] = lambda n: None,
    rows: slice = slice(None),
) -> Tensor:  # fmt: skip
    """[M + 1, M + 1], in nats a sample: terms of the negative ELBO, one network call a node for all pairs and budgets.

    A step from t to s costs KL(q(x_s | x_t, x0) || p(x_s | x_t)) = (SNR(s) - SNR(t)) / 2 E |x0 - x0_hat(x_t)|^2, Kingma
    et al. 2021, arXiv:2107.00630 eq. 13; the table is Watson et al. 2021, arXiv:2106.03802. The last step ends
    clean, where the SNR is infinite: it is counted up to the SNR of the node before.

    Args:
        x0: samples [B, ...] of the data, or of the model.
        grid: M + 1 fine nodes.
        rows: of the batch that are counted.
    """
    nodes = grid.nodes
    error = []
    for n in nodes[:-1]:
        eps = torch.randn(x0.shape, generator=rng, dtype=x0.dtype, device=rng.device).to(x0.device)
        with torch.no_grad():
            p = denoise(n.alpha * x0 + n.sigma * eps, n)
        missed = (p.x0 - x0)[rows].double()
        error.append(float(missed.square().sum() / len(missed)))
        tick(1)
    snr = torch.tensor([exp(2 * n.lam) for n in nodes[:-1]] + [exp(2 * nodes[-2].lam)], dtype=torch.float64)
    return (snr[None, :] - snr[:, None]).clamp_min(0) / 2 * torch.tensor([*error, 0.0], dtype=torch.float64)[:, None]
