"""Exact attention by name: torch's own kernels one by one, and packages where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.kernels.flash import added, tiled_attention
from hasten.method import Refused

Backend = Literal["flash", "cudnn", "efficient", "math", "flex", "tiled", "rows", "flash_attn_2", "flash_attn_3"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q [B, H, N, C], k, v [B, H, M, C], mask or None) -> [B, H, N, C]."""

ROUNDS = 5
"""Interleaved timings that a choice rests on."""

LOGITS = 1 << 19
"""Held at once by `rows`: what a core's cache holds."""

PACKAGES = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface"}


def attend(name: Backend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C) + mask) v by this backend. Raises Refused where the machine or the inputs are not for
    it."""
    return _backends(q.device.type)[check(name, q.device.type)](q, k, v, mask)


def check(name: str, device: str) -> Backend:
    """The name of a backend that this machine has for a kind of device. Raises Refused for another."""
    here = _backends(device)
    for known in here:
        if known == name:
            return known
    if name in PACKAGES:
        raise Refused(f"{name} needs CUDA and the package {PACKAGES[name]}; on {device} there are {', '.join(here)}")
    raise Refused(f"torch has no {name} attention on {device}; there are {', '.join(here)}")


def available(device: str) -> tuple[Backend, ...]:
    """Backends that this machine has for a kind of device; which inputs each takes shows at the call."""
    return tuple(_backends(device))


@torch.compiler.assume_constant_result
def fastest(
    device: str, dtype: torch.dtype, queries: tuple[int, ...], keys: tuple[int, ...], masked: tuple[int, ...] | None
) -> Backend | None:
    """The fastest backend for inputs of these shapes, by interleaved timing on random numbers, once a shape; None where
    torch's own choice is as fast.

    Args:
        masked: the mask's shape.
    """
    return _fastest(device, dtype, queries, keys, masked)


@functools.lru_cache(maxsize=256)
def _fastest(
    device: str, dtype: torch.dtype, queries: tuple[int, ...], keys: tuple[int, ...], masked: tuple[int, ...] | None
) -> Backend | None:
    rng = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(s, generator=rng, device=device).to(dtype) for s in (queries, keys, keys))
    mask = None if masked is None else torch.ones(masked, dtype=torch.bool, device=device)
    ways: dict[Backend | None, Attend] = {None: scaled_dot_product_attention}
    want = scaled_dot_product_attention(q, k, v, mask).float()
    for other, way in _backends(device).items():
        try:
            if (way(q, k, v, mask).float() - want).abs().max() < 0.03 * want.abs().max():
                ways[other] = way
        except Exception:  # each kernel refuses in its own way
            continue
    times: dict[Backend | None, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(_seconds(way, q, k, v, mask))
    best = min(times, key=lambda name: statistics.median(times[name]))
    clear = max(times[best]) < min(times[None])  # a change must be worth it in every round
    return best if clear else None


def _seconds(way: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> float:
    if q.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way(q, k, v, mask)
    if q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _backends(device: str) -> dict[Backend, Attend]:
    ways: dict[Backend, Attend] = {"math": _math, "tiled": lambda q, k, v, m: tiled_attention(q, k, v, m)[0]}
    if device == "cpu":
        return {"flash": _flash_cpu, "rows": _rows, **ways}
    if device == "cuda":
        more: dict[Backend, Attend] = {"flash": _flash, "cudnn": _cudnn, "efficient": _efficient, "flex": _flex}
        more |= {n: functools.partial(_package, p) for n, p in PACKAGES.items() if importlib.util.find_spec(p)}  # type: ignore[misc]
        return {**more, **ways}
    return ways


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask in full, as numbers that are added."""
    return None if mask is None else added(mask, q.dtype).expand(*q.shape[:3], k.shape[2])


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    bias = _bias(mask, q, k)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)[0]


def _rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A head at a time, as many queries as have their logits in cache, by two plain products: on CPUs whose matrix
    library is better than torch's flash kernel, the faster way for long sequences in float32."""
    bias, out = _bias(mask, q, k), torch.empty_like(q)
    some = max(1, LOGITS // k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(0, q.shape[2], some):
                part = q[b, h, i : i + some]
                start = part.new_zeros(1) if bias is None else bias[b, h, i : i + some]
                logits = torch.addmm(start, part, k[b, h].T, beta=bias is not None, alpha=q.shape[-1] ** -0.5)
                out[b, h, i : i + some] = logits.softmax(-1) @ v[b, h]
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    _maskless("flash", mask)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False)[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, _bias(mask, q, k), False)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, _bias(mask, q, k), False)[0]


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, _bias(mask, q, k))[0]


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    _maskless("flex", mask)
    return _compiled_flex()(q, k, v)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _package(package: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Packages have tokens before heads; some versions return the sums besides."""
    _maskless(package, mask)
    out = importlib.import_module(package).flash_attn_func(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _maskless(name: str, mask: Tensor | None) -> None:
    if mask is not None:
        raise Refused(f"{name} attention takes no mask, and this network has one: choose another backend, or auto")
