"""Sparse and linear attention on one softmax attention, choosing of blocks and reordering of tokens included, against
torch's scaled_dot_product_attention on the same queries, keys and values.

    python benchmarks/attention.py      minutes; writes benchmarks/results/attention.json

A ratio above 1 is a gain. `error` is the largest difference from dense float64 attention under the mask of the chosen
blocks, on some blocks of queries, over the largest value: what the kernel costs, not what the mask does. Inputs are
random with a smooth part over the picture, so that blocks differ. "all blocks" is the block loop over every block: what
the loop itself gains or loses against torch's kernel on this machine. On a GPU it also measures low-bit attention
against torch's fastest backend.
"""

import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from hasten.attention.blocks import fit, scores, tiled, tiles_of, window
from hasten.attention.sla import classes
from hasten.attention.words import ordered
from hasten.kernels import backends
from hasten.kernels.block_sparse import block_attention, reference
from hasten.kernels.linear_attention import feature_map, linear_attention, marginal_attention
from hasten.measure.machine import machine
from hasten.measure.timing import compare

CHANNELS, PAIRS, KEEP = 64, 5, 0.1
GRIDS = {4096: (1, 64, 64), 16384: (4, 64, 64)}
HEADS = {4096: 8, 16384: 2}
BLOCK = 128, 64
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RESULT = Path(__file__).parent / "results" / "attention.json"


def inputs(tokens, dtype):
    rng = torch.Generator().manual_seed(0)
    frames, rows, columns = GRIDS[tokens]
    heads = 16 if GPU else HEADS[tokens]
    coarse = torch.randn(3 * heads, CHANNELS, max(1, frames // 2), 8, 8, generator=rng)
    smooth = F.interpolate(coarse, size=(frames, rows, columns), mode="trilinear").flatten(2).transpose(1, 2)
    x = smooth + 0.3 * torch.randn(smooth.shape, generator=rng)
    return tuple(x.view(3, 1, heads, tokens, CHANNELS).to(DEVICE, dtype))


def top_blocks(q, k, v, index_of):
    return block_attention(q, k, v, index_of(q, k), BLOCK)


def chosen(q, k):
    return classes(scores(q, k, BLOCK), KEEP, 0.0)[0]


def every(q, k):
    return torch.arange(k.shape[2] // BLOCK[1], device=k.device).expand(1, 1, q.shape[2] // BLOCK[0], -1)


def sliding_tile(tokens):
    """A window of tiles that holds about a tenth of them."""
    grid = GRIDS[tokens]
    tile = fit(grid[0], 4), 8, 8
    tiles = tuple(n // s for n, s in zip(grid, tile))
    near = window(tiles, (1, 3, 3)).to(DEVICE)
    size = tile[0] * tile[1] * tile[2]
    run = ordered(
        lambda q, k, v, tail, bias: block_attention(q, k, v, near[None, None], (size, size)),
        tiled(grid, tile).to(DEVICE),
    )
    return lambda q, k, v: run(q, k, v, 0, None), near.shape[1] / near.shape[0]


def sla(layer, q, k, v):
    """Half of the kept tenth exactly, and nine tenths of the rest linearly."""
    index, marginal = classes(scores(q, k, BLOCK), KEEP, 0.1)
    phi = feature_map("softmax")
    return block_attention(q, k, v, index, BLOCK) + layer(marginal_attention(phi(q), phi(k), v, marginal, BLOCK))


def linear(q, k, v):
    phi = feature_map("elu")
    return linear_attention(phi(q), phi(k), v)


def kernel_error(q, k, v):
    index = chosen(q, k)
    got = block_attention(q, k, v, index, BLOCK).unflatten(2, (-1, BLOCK[0]))
    some = torch.arange(0, index.shape[2], max(1, index.shape[2] // 4), device=q.device)
    rows = q.unflatten(2, (-1, BLOCK[0]))[:, :1, some].flatten(2, 3)
    want = reference(rows, k[:, :1], v[:, :1], index[:, :1, some], BLOCK)
    off = (got[:, :1, some].flatten(2, 3) - want).abs().max()
    return float(off / want.abs().max())


def measure(tokens, dtype):
    q, k, v = inputs(tokens, dtype)
    order = tiles_of(GRIDS[tokens]).to(DEVICE)
    layer = torch.nn.Linear(CHANNELS, CHANNELS, device=DEVICE, dtype=dtype)
    tiles, share = sliding_tile(tokens)

    def in_tiles(way):
        run = ordered(lambda q, k, v, tail, bias: way(q, k, v), order)
        return lambda q, k, v: run(q, k, v, 0, None)

    ways = {
        "top_blocks": (in_tiles(partial(top_blocks, index_of=chosen)), KEEP),
        "sliding_tile": (tiles, share),
        "sla": (in_tiles(partial(sla, layer)), KEEP),
        "linear": (linear, 0.0),
        "all blocks": (in_tiles(partial(top_blocks, index_of=every)), 1.0),
    }
    rows = []
    for name, (way, keep) in ways.items():
        found = compare(lambda: F.scaled_dot_product_attention(q, k, v), lambda way=way: way(q, k, v), pairs=PAIRS)
        row = {
            "method": name,
            "tokens": tokens,
            "heads": q.shape[1],
            "channels": CHANNELS,
            "dtype": str(dtype)[6:],
            "kept": keep,
        }
        if name == "top_blocks":
            row["error"] = kernel_error(q, k, v)
        print(row, found.speedup.text(), flush=True)
        rows.append(row | {"time": without_pairs(found)})
    return rows


def without_pairs(found):
    return {name: told for name, told in found.to_dict().items() if name != "pairs"}


def low_bits(tokens):
    """SageAttention against the fastest exact backend, on a GPU."""
    from hasten.kernels.sage import sage_attention

    q, k, v = inputs(tokens, torch.float16)
    best = backends.fastest(q.device.type, q.dtype, tuple(q.shape), tuple(k.shape), None)
    exact = F.scaled_dot_product_attention if best is None else partial(backends.attend, best)
    rows = []
    for values in ("fp16", "fp8"):
        way = partial(sage_attention, q, k, v, values=values)
        found = compare(lambda: exact(q, k, v), way, pairs=PAIRS)
        off = float((way() - exact(q, k, v)).float().norm() / exact(q, k, v).float().norm())
        row = {"method": f"sage, values {values}", "against": best or "sdpa", "tokens": tokens, "error": off}
        print(row, found.speedup.text(), flush=True)
        rows.append(row | {"time": without_pairs(found)})
    return rows


def main():
    dtypes = (torch.float16,) if GPU else (torch.float32, torch.bfloat16)
    with torch.no_grad():
        rows = [row for tokens in GRIDS for dtype in dtypes for row in measure(tokens, dtype)]
        low = [row for tokens in GRIDS for row in low_bits(tokens)] if GPU else []
    found = {"rows": rows, "low_bits": low, "machine": machine()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
