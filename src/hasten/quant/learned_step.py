"""Rounding to a step that is learned: the value is rounded, gradients pass."""

from __future__ import annotations

import torch
from torch import Tensor


def through(x: Tensor) -> Tensor:
    """round(x), with the gradient of x (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432)."""
    return x + (torch.round(x) - x).detach()


def learned_step(x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """step * clip(round(x / step), low, high), in the precision of x. Its gradient is, of x, 1 within the range and 0
    outside; of the step, round(x / step) - x / step within and `low` or `high` outside (Esser et al. 2019, LSQ,
    arXiv:1902.08153 eq. 3).

    Args:
        step: positive; broadcasts with x.
    """
    return step * through((x / step).clamp(low, high))


def scaled_gradient(step: Tensor, factor: float) -> Tensor:
    """The same step, whose gradient is `factor` times as large: LSQ's 1 / sqrt(count * high) keeps the step's relative
    updates of the size of the weights' (its sec. 2.2)."""
    return step * factor + (step - step * factor).detach()


def first_step(x: Tensor, high: float) -> Tensor:
    """Where learning starts: 2 mean|x| / sqrt(high) (its sec. 2.1)."""
    return 2 * x.float().abs().mean().clamp_min(1e-8) / high**0.5
