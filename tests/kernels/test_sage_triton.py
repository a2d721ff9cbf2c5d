"""The kernels of low-bit attention: on a CPU as Triton's interpreter runs them, compiled for GPUs, and on one."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.kernels import sage
from hasten.kernels.sage import KEYS, QUERIES, SAGE, SAGE_2, SAGE_2_INT4, Setting
from interpreted import built_for, compiled, interpreted, needs_triton

pytestmark = [pytest.mark.system("sageattention", "sageattention-2"), needs_triton]
NAME = "hasten.kernels.sage_triton"
SETTINGS = {
    "sage": SAGE,
    "sage-2": SAGE_2,
    "int4": SAGE_2_INT4,
    "rough": Setting(smooth_k=False),
    "all": Setting(8, "fp8", smooth_q=True, smooth_v=True, granularity="block"),
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted(NAME) as module:
        yield module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(n: int, m: int, c: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Two heads, whose keys and values share a bias, and whose logits rise from block to block."""
    q, k, v = normal(batch, 2, n, c, seed=1), normal(batch, 2, m, c, seed=2), normal(batch, 2, m, c, seed=3)
    k = k * torch.linspace(0.5, 2, m)[:, None] + 3 * normal(c, seed=4)
    return (q + normal(c, seed=5)).to(dtype), k.to(dtype), (v + 1).to(dtype)


def off(out: Tensor, want: Tensor) -> float:
    return float((out.float() - want).norm() / want.norm())


@pytest.mark.parametrize(("bits", "means"), [(8, "none"), (8, "all"), (4, "blocks")])
@pytest.mark.parametrize("groups", [*QUERIES.values(), *KEYS.values()], ids=str)
@pytest.mark.parametrize(("tokens", "c", "dtype"), [(130, 40, torch.float32), (65, 64, torch.bfloat16)])
def test_the_integers_are_those_of_the_reference(
    tokens: int, c: int, dtype: torch.dtype, groups: sage.Groups, means: str, bits: Any, kernels: ModuleType
) -> None:
    x = (normal(1, tokens, 2, c) * torch.logspace(-3, 3, tokens)[:, None, None] + 2).to(dtype).transpose(1, 2)
    match means:
        case "none":
            mean, smooth = None, x
        case "all":
            mean, smooth = sage.key_mean(x), sage.smooth_k(x)
        case _:
            mean, smooth = sage.query_means(x), sage.smooth_queries(x)
    q, scale = kernels.quantize(x, mean, groups, bits)
    want_q, want_scale = sage.quantize(smooth, groups, bits)
    assert scale.equal(want_scale)
    assert q[..., :c].equal(want_q)
    assert q[..., c:].count_nonzero() == 0
    assert q.shape[-1] == 64


@settings
@pytest.mark.parametrize(
    ("n", "m", "c", "dtype"),
    [
        (150, 90, 40, torch.float32),
        (129, 130, 64, torch.bfloat16),
        (65, 200, 128, torch.float16),
        (128, 64, 32, torch.float32),
        (1, 1, 20, torch.float32),
    ],
)
def test_the_kernel_equals_the_reference(
    n: int, m: int, c: int, dtype: torch.dtype, setting: Setting, kernels: ModuleType
) -> None:
    q, k, v = qkv(n, m, c, dtype)
    out, want = kernels.attention(q, k, v, setting), sage.sage_reference(q, k, v, **asdict(setting))
    assert out.shape == q.shape and out.dtype == dtype
    assert off(out, want.to(dtype).float()) < 1e-4


@settings
def test_strides_of_the_input_do_not_matter(setting: Setting, kernels: ModuleType) -> None:
    given = qkv(33, 70, 24, batch=2)
    want = sage.sage_reference(*given, **asdict(setting))
    orders = ((0, 2, 1, 3), (3, 1, 0, 2), (1, 0, 3, 2))
    crossed = []
    for x, order in zip(given, orders):
        back = [order.index(i) for i in range(4)]
        crossed.append(x.permute(order).contiguous().permute(back))
        assert not crossed[-1].is_contiguous()
    out = kernels.attention(*crossed, setting)
    assert out.is_contiguous()
    assert off(out, want) < 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which the interpreter computes with
@pytest.mark.parametrize("of", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_hidden(of: int, value: float, kernels: ModuleType) -> None:
    given = qkv(140, 70, 8)
    given[of][0, 1, 3, 2] = value
    out = kernels.attention(*given, SAGE)
    assert out[0, 0].isfinite().all()
    assert not out[0, 1, 3].isfinite().all()


def test_the_dispatch_runs_the_kernel(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sage, "backend", lambda *given: asked.append(given))
    q, k, v = qkv(40, 50, 16)
    out = sage.sage_attention(q, k, v, 4, "fp8", True, smooth_k=False, smooth_v=True, granularity="thread")
    assert asked == [(torch.device("cpu"), "fp8")]
    assert out.equal(kernels.attention(q, k, v, Setting(4, "fp8", True, False, True, "thread")))
    with torch.no_grad():
        assert sage.sage_attention(q.requires_grad_(), k, v).equal(kernels.attention(q.detach(), k, v, SAGE))


def test_memory_lies_as_tensor_cores_read_it(kernels: ModuleType) -> None:
    assert [kernels.filled(c) for c in (1, 32, 33, 64, 72, 128)] == [32, 32, 64, 64, 128, 128]
    v = normal(2, 37, 24).to(torch.float8_e4m3fn)
    turned = kernels.keys_innermost(v)
    assert turned.float().equal(v.float())
    assert turned.stride() == (24 * 48, 1, 48)


def test_what_the_interpreter_changed_is_as_before_afterwards() -> None:
    def state() -> tuple[Any, ...]:
        return os.environ.get("TRITON_INTERPRET"), {n: m for n, m in sys.modules.items() if "triton" in n}

    import triton

    before = state()
    with interpreted(NAME) as module:
        assert module.triton is not triton
        assert type(module.attention_kernel).__name__ == "InterpretedFunction"
        assert sys.modules[NAME] is module
    assert state() == before
    assert sys.modules["triton"] is triton


POINTERS = {
    "x_ptr": "*bf16", "mean_ptr": "*fp32", "q_ptr": "*i8", "k_ptr": "*i8", "scale_ptr": "*fp32", "q_scale_ptr": "*fp32",
    "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "v_mean_ptr": "*fp32", "delta_ptr": "*fp32", "out_ptr": "*bf16",
    "in_bits": "fp32", "least": "fp32", "most": "fp32",
}  # fmt: skip
SHARED = 99 * 1024
"""Bytes that a block may have on Ada and on the Blackwell of desktops, the least of all these."""


def test_compiled_for_gpus_it_uses_integer_tensor_cores_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiled(NAME) as real:
        quantizing = built_for(
            real.quantize_kernel, 80, {"SMOOTH": True, "TILE": 64, "WIDTH": 2, "D": 64}, 4, 3, **POINTERS
        )
        # division to the nearest, for the integers of the reference
        assert set(re.findall(r"(?:div|rcp)\.\S*f32", quantizing.asm["ptx"])) == {"div.rn.f32"}
        for target, values, granularity, d, products in (
            (80, "fp16", "block", 64, ["s8.s8.s32", "f16.f16.f32"]),
            (89, "fp8", "thread", 128, ["s8.s8.s32", "e4m3.e4m3.f32"]),
            (90, "fp16", "block", 128, ["s32.s8.s8", "f32.f16.f16"]),
            (90, "fp8", "thread", 64, ["s32.s8.s8", "f32.e4m3.e4m3"]),
        ):
            queries, keys = QUERIES[granularity], KEYS[granularity]
            constants = {
                "FP8": values == "fp8", "DELTA": granularity == "thread", "V_MEAN": True, "TILE_Q": queries.tile,
                "WIDTH_Q": queries.width, "TILE_K": keys.tile, "WIDTH_K": keys.width, "ROWS": 128, "KEYS_AT_ONCE": 64,
                "D": d, "PEAK": 448.0,
            }  # fmt: skip
            v = {"fp16": "*fp16", "fp8": "*fp8e4nv"}[values]
            built = built_for(real.attention_kernel, target, constants, *real.launch(d), **POINTERS | {"v_ptr": v})
            for product in products:
                assert re.search(rf"mma\S*\.{re.escape(product)}", built.asm["ptx"]), (target, product)
            assert built.metadata.shared <= SHARED
            assert ".local" not in built.asm["ptx"]  # nothing spilled to memory
            if values == "fp8":
                # two levels: a product of float8 starts from zero for every block of keys, and float32 adds it up
                line = next(x for x in built.asm["ttir"].splitlines() if "tt.dot" in x and "f8E4M3" in x)
                assert "maxNumImpreciseAcc = 64" in line
                assert re.search(r"tt\.dot %\w+, %\w+, %cst", line)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@settings
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "c"), [(150, 90, 40), (1024, 1024, 64), (1111, 4097, 128), (1, 1, 20)])
def test_on_a_gpu_the_dispatch_equals_the_reference(
    n: int, m: int, c: int, dtype: torch.dtype, setting: Setting
) -> None:
    given = [x.cuda() for x in qkv(n, m, c, dtype)]
    try:
        sage.backend(given[0].device, setting.values)
    except sage.Refused as no:
        pytest.skip(str(no))
    from hasten.kernels import sage_triton

    mean = sage.key_mean(given[1])
    q, scale = sage_triton.quantize(given[1], mean, KEYS[setting.granularity], setting.bits)
    want_q, want_scale = sage.quantize(sage.smooth_k(given[1]), KEYS[setting.granularity], setting.bits)
    assert q[..., :c].equal(want_q)
    assert scale.equal(want_scale)
    want = sage.sage_reference(*given, **asdict(setting))
    assert off(sage.sage_attention(*given, **asdict(setting)), want) < 4e-3
