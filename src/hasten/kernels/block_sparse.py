"""Attention to chosen blocks of keys: what is not chosen is not computed. The slow reference, loops over packed blocks
for CPUs, and the one dispatch that picks them or the Triton kernel.

Letters of shapes: B batch, H heads, N queries, M keys, C channels; I blocks of queries, J of keys, K of them chosen.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

WORK = 1 << 18
"""Numbers of keys that are packed at a time: what a core's cache holds."""


def block_attention(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, index_BHIK: Tensor, block: tuple[int, int] = (128, 64),
    tail: int = 0, bias_BM: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(C) + bias) v over the chosen keys alone, [B, H, N, C]; differentiable in q, k and v.

    Costs what dense attention costs, times the share of blocks that are chosen, plus the packing of keys.

    Args:
        index_BHIK: which blocks of keys each block of queries reads, each at most once; B and H may be 1.
        block: queries and keys of a block; the last ones may have fewer.
        tail: this many keys at the end, words say, belong to no block, and every query reads them.
        bias_BM: added to the logits of a key in every head; -inf hides it. B may be 1.

    Raises:
        ValueError: the index is not one of these blocks.
    """
    blocks = -(-q_BHNC.shape[2] // block[0]), -(-(k_BHMC.shape[2] - tail) // block[1])
    if index_BHIK.shape[2] != blocks[0] or index_BHIK.shape[3] + tail < 1 or index_BHIK.shape[3] > blocks[1]:
        raise ValueError(
            f"{blocks[0]} blocks of queries may each choose among {blocks[1]} of keys; the index has shape "
            f"{tuple(index_BHIK.shape)}"
        )
    index = index_BHIK.expand(*q_BHNC.shape[:2], -1, -1)
    if q_BHNC.is_cuda and importlib.util.find_spec("triton") is not None:
        from hasten.kernels.block_sparse_triton import block_attention_triton

        return block_attention_triton(q_BHNC, k_BHMC, v_BHMC, index, block, tail, bias_BM)
    return packed_attention(q_BHNC, k_BHMC, v_BHMC, index, block, tail, bias_BM)


def packed_attention(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, index_BHIK: Tensor, block: tuple[int, int], tail: int = 0,
    bias_BM: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`block_attention` in plain operators: the keys that some blocks of queries read are packed side by side, and each
    block attends to its own pack."""
    (batch, heads, queries, channels), (rows, columns) = q_BHNC.shape, block
    places, more = k_BHMC.shape[2] - tail, -(-tail // columns)
    blocks = -(-places // columns)
    index = torch.cat([index_BHIK, _tail(index_BHIK, blocks, more)], -1)
    k_JX, v_JX = (_blocks(x, places, columns).flatten(0, 2) for x in (k_BHMC, v_BHMC))
    q_IRC = pad(q_BHNC, (0, 0, 0, -queries % rows)).unflatten(2, (-1, rows)).flatten(0, 2)
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * (blocks + more)
    index_IK = (index + first).flatten(0, 2)
    hidden_BJR = _hidden(k_BHMC, places, columns, bias_BM)
    if hidden_BJR is not None:
        hidden_BJR = hidden_BJR.to(q_BHNC.dtype).expand(batch, -1, -1)
        hidden_JR = hidden_BJR[:, None].expand(-1, heads, -1, -1).flatten(0, 2)
    step = max(1, WORK // (index.shape[-1] * columns * channels))
    out = []
    for part in range(0, len(index_IK), step):
        chosen, q = index_IK[part : part + step].flatten(), q_IRC[part : part + step]
        k, v = (x.index_select(0, chosen).view(len(q), -1, channels) for x in (k_JX, v_JX))
        bias = None if hidden_BJR is None else hidden_JR.index_select(0, chosen).view(len(q), 1, -1)
        out.append(_attend(q, k, v, bias))
    return torch.cat(out).view(batch, heads, -1, channels)[:, :, :queries]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """A batch of small attentions. In float32 two plain products are faster than the fused kernel, which keeps the
    logits of halves in float32."""
    if q.dtype not in (torch.float32, torch.float64):
        mask = None if bias is None else bias[:, None]
        return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]
    scale = 1 / math.sqrt(q.shape[-1])
    if bias is None:
        logits = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    else:
        logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    return logits.softmax(-1) @ v


def reference(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, index_BHIK: Tensor, block: tuple[int, int] = (128, 64),
    tail: int = 0, bias_BM: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `block_attention` must equal: dense attention in float64 in which all other keys are hidden."""
    seen = seen_keys(index_BHIK, q_BHNC.shape[2], k_BHMC.shape[2], block, tail)
    logits = q_BHNC.double() @ k_BHMC.double().transpose(2, 3) / math.sqrt(q_BHNC.shape[-1])
    if bias_BM is not None:
        logits = logits + bias_BM.double()[:, None, None]
    return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v_BHMC.double()


def seen_keys(index_BHIK: Tensor, queries: int, keys: int, block: tuple[int, int], tail: int = 0) -> Tensor:
    """Which query reads which key: bool [B, H, N, M], as a mask says it."""
    blocks = -(-(keys - tail) // block[1])
    chosen = torch.zeros(*index_BHIK.shape[:3], blocks, dtype=torch.bool, device=index_BHIK.device)
    wide = chosen.scatter(-1, index_BHIK, True).repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
    return pad(wide[:, :, :queries, : keys - tail], (0, tail), value=True)


def _tail(index_BHIK: Tensor, blocks: int, more: int) -> Tensor:
    """The tail's keys as blocks of their own, behind the others, which every block of queries chooses."""
    return torch.arange(blocks, blocks + more, device=index_BHIK.device).expand(*index_BHIK.shape[:3], -1)


def _blocks(x_BHMC: Tensor, places: int, columns: int) -> Tensor:
    """[B, H, J, columns * C], zeros where a last block has fewer."""
    parts = (x_BHMC[:, :, :places], x_BHMC[:, :, places:])
    if places % columns or parts[1].shape[2]:
        x_BHMC = torch.cat([pad(p, (0, 0, 0, -p.shape[2] % columns)) for p in parts], 2)
    return x_BHMC.unflatten(2, (-1, columns)).flatten(3)


def _hidden(k_BHMC: Tensor, places: int, columns: int, bias_BM: Tensor | None) -> Tensor | None:
    """What is added to the logits of each key of each block, [B or 1, J, columns]: -inf where a block has none; None
    for nothing."""
    keys = k_BHMC.shape[2]
    ragged = places % columns or (keys - places) % columns
    if bias_BM is None and not ragged:
        return None
    if bias_BM is None:
        bias_BM = torch.zeros(1, keys, device=k_BHMC.device)
    parts = (bias_BM[:, :places], bias_BM[:, places:])
    whole = torch.cat([pad(p, (0, -p.shape[1] % columns), value=-torch.inf) for p in parts], 1)
    return whole.unflatten(1, (-1, columns))
