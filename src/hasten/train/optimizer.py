"""Which optimizer moves which weight, and how the rate changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer


def adamw(nets: Iterable[nn.Module], rate: float = 2e-3, betas: tuple[float, float] = (0.9, 0.99)) -> list[Optimizer]:
    """AdamW without decay on every weight."""
    params = [p for net in nets for p in net.parameters() if p.requires_grad]
    return [torch.optim.AdamW(params, rate, betas, weight_decay=0.0)]


def muon(
    nets: Iterable[nn.Module],
    rate: float = 2e-3,
    matrix_rate: float = 2e-2,
    among: Sequence[str] = ("blocks.", "layers."),
    apart: Sequence[str] = ("norm", "embed"),
) -> list[Optimizer]:
    """Muon on the matrices inside blocks (orthogonalised momentum, Jordan 2024; RMS-matched rate, Liu et al. 2025,
    arXiv:2502.16982 section 2.2 is not used: the rate is the plain one times sqrt(max(1, rows / columns))), AdamW on
    the rest: norms, modulations, embeddings, biases.
    """
    named = [(n, p) for net in nets for n, p in net.named_parameters() if p.requires_grad]
    inner = [p for n, p in named if p.ndim == 2 and any(a in n for a in among) and not any(a in n for a in apart)]
    inside = {id(p) for p in inner}
    outer = [p for _, p in named if id(p) not in inside]
    adam = torch.optim.AdamW(outer, rate, (0.9, 0.99), weight_decay=0.0)
    return [torch.optim.Muon(inner, matrix_rate, weight_decay=0.0), adam] if inner else [adam]


def trapezoid(until: int, warmup: int, decay: float = 0.25) -> Callable[[int], float]:
    """Rate factor of a step: up over `warmup` steps, flat, then linearly to 0 over the last share `decay` of
    `until`."""
    fall = max(1, int(until * decay))
    return lambda step: max(0.0, min((step + 1) / warmup, 1.0, (until - step) / fall))
