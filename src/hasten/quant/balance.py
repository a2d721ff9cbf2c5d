"""A factor for each input channel that moves outliers from activations to weights: (x / s) (s w)^T is x w^T."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

LEAST = 1e-5
"""Below it a channel's largest number counts as this, so that no factor explodes."""


def factors(x_I: Tensor, w_I: Tensor, alpha: float = 0.5, beta: float | None = None) -> Tensor:
    """[I] s = max|x|^alpha / max|w|^beta, what activations are divided by and weights multiplied with; 1 where a
    channel is never seen. Xiao et al. 2022, SmoothQuant, arXiv:2211.10438 eq. 4, with beta = 1 - alpha where none is
    given.

    Args:
        x_I, w_I: the largest size of each input channel, of the activations and of all weights that read them.

    >>> factors(torch.tensor([100.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist()
    [10.0, 1.0, 1.0]
    """
    beta = 1 - alpha if beta is None else beta
    s = x_I.double().clamp_min(LEAST) ** alpha / w_I.double().clamp_min(LEAST) ** beta
    return torch.where((x_I > 0) & (w_I > 0) & torch.isfinite(s), s, 1.0).float()


def candidates(x_I: Tensor, w_I: Tensor, steps: int = 20) -> Iterator[Tensor]:
    """No factors, and those of alpha = i / steps with beta = 0 and with beta = 1 - alpha: what SVDQuant searches over
    (Li et al. 2024, arXiv:2411.05007; the grid is that of its authors' deepcompressor)."""
    yield torch.ones_like(x_I, dtype=torch.float32)
    for i in range(1, steps):
        yield factors(x_I, w_I, i / steps, 0.0)
        yield factors(x_I, w_I, i / steps)


def best(tried: Sequence[Tensor] | Iterator[Tensor], error: Callable[[Tensor], float]) -> tuple[Tensor, float]:
    """Of the factors the first of least error, and the error.

    Raises:
        ValueError: no error is finite.
    """
    found: tuple[Tensor, float] | None = None
    for s in tried:
        off = error(s)
        if off < (float("inf") if found is None else found[1]):
            found = s, off
    if found is None:
        raise ValueError("no factors give a finite error: the activations or weights hold NaN or infinity")
    return found
