"""Linear attention: keys and values are summed up once, and each query reads the sum.

Letters of shapes: B batch, H heads, N queries, M keys, C channels, F features; I blocks of queries, J of keys.
Katharopoulos et al. 2020, arXiv:2006.16236 eq. 4 to 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import elu, pad, relu

Feature = Literal["softmax", "elu", "relu"]
FeatureMap = Callable[[Tensor], Tensor]

LEAST = 1e-5
"""Added to the sum of weights, so that a query that no key answers gives zero."""

SUMS = 1 << 26
"""Numbers of blocks' sums that are held at once."""


def feature_map(name: Feature) -> FeatureMap:
    """phi of queries and keys [..., C], never negative: softmax over channels, elu + 1, or relu. Raises ValueError for
    another name."""
    match name:
        case "softmax":
            return lambda x: x.softmax(-1)
        case "elu":
            return lambda x: elu(x) + 1
        case "relu":
            return relu
    raise ValueError(f"unknown feature map {name!r}; known: {', '.join(get_args(Feature))}")


def linear_attention(q_BHNF: Tensor, k_BHMF: Tensor, v_BHMC: Tensor, bias_BM: Tensor | None = None) -> Tensor:
    """q (k^T v) / (q sum k), of queries and keys whose feature map was taken, [B, H, N, C]: (N + M) F C products
    instead of N M C.

    Args:
        bias_BM: a key counts exp(bias) times; -inf hides it.
    """
    if bias_BM is not None:
        k_BHMF = k_BHMF * bias_BM.exp()[:, None, :, None].to(k_BHMF.dtype)
    sums = k_BHMF.transpose(2, 3) @ v_BHMC
    weights = (q_BHNF * k_BHMF.sum(2, keepdim=True)).sum(-1, keepdim=True)
    return q_BHNF @ sums / (weights + LEAST)


def marginal_attention(
    q_BHNF: Tensor, k_BHMF: Tensor, v_BHMC: Tensor, read_BHIJ: Tensor, block: tuple[int, int]
) -> Tensor:
    """Linear attention of each block of queries to the blocks of keys that it reads, [B, H, N, C]; zero where it reads
    none. Each block of keys is summed up once: (N + M) F C products, and I J F C of sums of sums. Zhang et al. 2025,
    arXiv:2509.24006, the marginal part.

    Args:
        read_BHIJ: bool; the last blocks may have fewer tokens than `block` says.
    """
    queries, features, channels = q_BHNF.shape[2], q_BHNF.shape[3], v_BHMC.shape[3]
    heads = max(1, SUMS // (read_BHIJ.shape[3] * features * channels * q_BHNF.shape[0]))
    out = []
    for q, k, v, read in zip(*(x.split(heads, 1) for x in (q_BHNF, k_BHMF, v_BHMC, read_BHIJ)), strict=True):
        k, v = (pad(x, (0, 0, 0, -x.shape[2] % block[1])).unflatten(2, (-1, block[1])) for x in (k, v))
        each = (k.transpose(3, 4) @ v).flatten(3)  # [B, H, J, F * C]
        which = read.to(q.dtype)
        sums = (which @ each).unflatten(3, (features, channels))
        weights = which @ k.sum(3)
        q = pad(q, (0, 0, 0, -queries % block[0])).unflatten(2, (-1, block[0]))
        y = q @ sums / ((q * weights[:, :, :, None]).sum(-1, keepdim=True) + LEAST)
        out.append(y.flatten(2, 3)[:, :, :queries])
    return torch.cat(out, 1)
