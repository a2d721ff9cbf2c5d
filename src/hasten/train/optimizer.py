"""Which optimizer moves which weight, and how the rate changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    among: Sequence[str] = ("block", "layers."),
    apart: Sequence[str] = ("norm", "embed"),
) -> list[Optimizer]:
    """Muon on the matrices inside blocks, and on the kernels of convolutions, [out, in, h, w] read as [out, in h w]
    (orthogonalised momentum, Jordan 2024; RMS-matched rate, Liu et al. 2025, arXiv:2502.16982 section 2.2 is not used:
    the rate is the plain one times sqrt(max(1, rows / columns))), AdamW on the rest: norms, modulations, embeddings,
    biases.

    Kernels stand outside the loop's clipping of gradients, to whose scale an orthogonalised step is blind.
    """
    named = [(n, p) for net in nets for n, p in net.named_parameters() if p.requires_grad]
    inner = [p for n, p in named if p.ndim > 1 and any(a in n for a in among) and not any(a in n for a in apart)]
    inside = {id(p) for p in inner}
    outer = [p for _, p in named if id(p) not in inside]
    adam = torch.optim.AdamW(outer, rate, (0.9, 0.99), weight_decay=0.0)
    return [_matrices(inner, matrix_rate), adam] if inner else [adam]


def _matrices(params: Sequence[nn.Parameter], rate: float) -> Optimizer:
    """Muon, which takes matrices alone, on weights of two dimensions or more: a kernel is moved through a view of it
    that is lent its gradient for the step."""
    views = [p if p.ndim == 2 else p.detach().view(len(p), -1).requires_grad_() for p in params]
    lent = [(p, v) for p, v in zip(params, views, strict=True) if p is not v]
    mover = torch.optim.Muon(views, rate, weight_decay=0.0)

    def lend(*_: Any) -> None:
        for p, v in lent:
            v.grad = None if p.grad is None else p.grad.flatten(1)

    def take_back(*_: Any) -> None:
        for p, v in lent:
            p.grad = v.grad = None

    mover.register_step_pre_hook(lend)
    mover.register_step_post_hook(take_back)
    return mover


def trapezoid(until: int, warmup: int, decay: float = 0.25) -> Callable[[int], float]:
    """Rate factor of a step: up over `warmup` steps, flat, then linearly to 0 over the last share `decay` of
    `until`."""
    fall = max(1, int(until * decay))
    return lambda step: max(0.0, min((step + 1) / warmup, 1.0, (until - step) / fall))
