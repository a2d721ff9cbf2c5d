"""The tables of betas that discrete models were trained on, as paths."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.paths.cosine import Cosine
from hasten.paths.tabulated import Tabulated


def of_betas(betas: Tensor) -> Tabulated:
    """The path whose steps add noise of variance betas, [N], each in (0, 1); a last one of 1 is pure noise. Ho et al.
    2020, arXiv:2006.11239 eq. 4: alpha_bar is the product of 1 - beta.

    Raises:
        ValueError: a beta lies outside.
    """
    if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
        raise ValueError(f"betas lie in (0, 1), and 1 may stand last; got {betas.min():.3g} to {betas.max():.3g}")
    return Tabulated(tuple((1 - betas.double()).cumprod(0).tolist()))


def linear(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """Even betas: DDPM's. Ho et al. 2020, arXiv:2006.11239 sec. 4."""
    return of_betas(torch.linspace(first, last, steps, dtype=torch.float64))


def scaled_linear(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tabulated:
    """Betas even in their roots: latent diffusion's, and so Stable Diffusion's. Rombach et al. 2022, arXiv:2112.10752,
    appendix."""
    return of_betas(torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2)


def cosine(steps: int = 1000, clip: float = 0.999) -> Tabulated:
    """beta_i = min(1 - alpha_bar(i / N) / alpha_bar((i - 1) / N), clip) of the cosine path: improved DDPM's. Nichol &
    Dhariwal 2021, arXiv:2102.09672 sec. 3.2."""
    bar = Cosine().alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64)) ** 2
    return of_betas((1 - bar[1:] / bar[:-1]).clamp_max(clip))


def to_pure_noise(path: Tabulated) -> Tabulated:
    """The table with its roots shifted and scaled so that the last is 0 and the first stays: zero terminal SNR. Lin et
    al. 2023, arXiv:2305.08891 alg. 1."""
    root = torch.tensor(path.alpha_bar, dtype=torch.float64).sqrt()
    moved = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return Tabulated(tuple((moved**2).tolist()))
