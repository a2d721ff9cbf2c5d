"""Kernel distance between two sets of features: unbiased, so it is fair to small sets."""

from __future__ import annotations

from torch import Tensor

systems: tuple[str, ...] = ()


def kernel_distance(x_ND: Tensor, y_MD: Tensor, block: int = 1024) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, its unbiased estimate (KID).

    Binkowski et al. 2018, arXiv:1801.01401 sec. 4 (the kernel) and Gretton et al. 2012 eq. 3 (the estimate). Its mean
    is 0 for sets of one law, so a single value may fall below 0. Float64, in blocks of `block` rows: O((N + M)^2 D)
    time, O(block^2) memory beside the features.

    Raises:
        ValueError: not [N, D] and [M, D], a set of fewer than 2, or a block below 1.
    """
    if x_ND.ndim != 2 or y_MD.ndim != 2 or x_ND.shape[1] != y_MD.shape[1]:
        raise ValueError(f"expected features [N, D] and [M, D], got {list(x_ND.shape)} and {list(y_MD.shape)}")
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2 or block < 1:
        raise ValueError(f"need 2 samples or more a set and a block of 1 or more, got {n}, {m} and {block}")
    x, y = x_ND.detach().double(), y_MD.detach().double()
    within = (_total(x, x, block) - _own(x)) / (n * (n - 1)) + (_total(y, y, block) - _own(y)) / (m * (m - 1))
    return within - 2 * _total(x, y, block) / (n * m)


def _total(x_ND: Tensor, y_MD: Tensor, block: int) -> float:
    d = x_ND.shape[1]
    return sum(float((x @ y.mT / d + 1).pow(3).sum()) for x in x_ND.split(block) for y in y_MD.split(block))


def _own(x_ND: Tensor) -> float:
    return float((x_ND.square().sum(1) / x_ND.shape[1] + 1).pow(3).sum())
