"""Scales that err least over what they cover, though they cut the largest numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.format import INTEGERS, Format, dequantize, encode, grouped, scales

POWER, STEPS = 2.4, 80
"""Of the error, and how many hundredths the range is narrowed at most: what PTQ4DM found best (Shang et al. 2022,
arXiv:2211.15736 table 4), and the search of BRECQ's code, which Q-Diffusion, PTQD and TFMQ-DM took over."""


def searched(x: Tensor, format: Format, power: float = POWER, steps: int = STEPS) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) as `format.scales` gives, of each group's range narrowed by i / 100, where the mean of
    |x - x^|^power is least. Both ends shrink alike, so the zero point stays.

    Args:
        x: [..., I].
        format: integers, with float32 scales.

    Raises:
        ValueError: another format.
    """
    if format.scales != "float32" or format.element not in INTEGERS:
        raise ValueError(f"ranges are searched for integers with float32 scales, not {format}")
    full, zero = scales(x, format)
    best, least = full, torch.full_like(full, float("inf"))
    for i in range(steps):
        scale = full * (1 - i / 100)
        off = dequantize(encode(x, format, scale, zero)).double() - x.double()
        mean = grouped(off.abs().pow(power), format.share).mean(-1, keepdim=True).float()
        better = mean < least
        best, least = torch.where(better, scale, best), torch.where(better, mean, least)
    return best, zero
