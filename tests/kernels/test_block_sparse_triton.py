"""The Triton kernel of block-sparse attention: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_block_sparse import SHAPES, case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from hasten.kernels.block_sparse import reference
from interpreted import built_for, compiled, interpreted, needs_triton

pytestmark = needs_triton
NAME = "hasten.kernels.block_sparse_triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    if DEVICE == "cuda":
        yield importlib.import_module(NAME)
    else:
        with interpreted(NAME) as module:
            yield module


def given(name: str, heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, index = (x.to(DEVICE) for x in case(name, heads=heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), index


@pytest.mark.system("sparse-attention", "flashattention-2")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_values_and_gradients_are_those_of_the_masked_reference(name: str, biased: bool, kernels: ModuleType) -> None:
    q, k, v, index = given(name)
    tail, block = SHAPES[name][2:4]
    bias = torch.randn(2, k.shape[2], generator=torch.Generator().manual_seed(1)).to(DEVICE) if biased else None
    got, want = (
        kernels.block_attention_triton(q, k, v, index, block, tail, bias),
        reference(q, k, v, index, block, tail, bias),
    )
    assert (got - want).abs().max() < 2e-6
    weight = torch.arange(16, device=DEVICE)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < 2e-6 * theirs.abs().max()


@pytest.mark.system("flashattention-2")
def test_it_tells_the_logarithm_of_the_sum_of_exponentials(kernels: ModuleType) -> None:
    q, k, v, _ = given("ragged")
    every = torch.arange(5, device=DEVICE).expand(2, 2, 3, -1)
    out, lse = kernels.with_logsumexp(q, k, v, every, (64, 32))
    want = (q.double() @ k.double().transpose(2, 3) / 4).logsumexp(-1)
    assert (lse - want).abs().max() < 2e-6
    assert (out - attend(q, k, v)).abs().max() < 2e-6


def test_blocks_and_channels_need_be_no_powers_of_two(kernels: ModuleType) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 60, 20, generator=rng).to(DEVICE) for _ in range(3))
    index = torch.tensor([[0, 3], [2, 1]], device=DEVICE)[None, None].expand(1, 2, -1, -1)
    got = kernels.block_attention_triton(q, k, v, index, (30, 15))
    assert (got - reference(q, k, v, index, (30, 15))).abs().max() < 2e-6


def test_a_key_that_all_is_hidden_from_in_a_block_leaves_no_nan(kernels: ModuleType) -> None:
    q, k, v, _ = given("even", heads=1)
    bias = torch.zeros(1, 256, device=DEVICE)
    bias[:, :64] = -torch.inf  # whole blocks
    first = torch.arange(3, device=DEVICE).expand(2, 1, 4, -1)
    got = kernels.block_attention_triton(q, k, v, first, (64, 32), 0, bias)
    assert (got - reference(q, k, v, first, (64, 32), 0, bias)).abs().max() < 2e-6


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("channels", [64, 128])
def test_they_compile_for_gpus_onto_tensor_cores_and_spill_nothing(
    target: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: half precision, blocks of 128 queries and 64 keys."""
    sizes = {"CHANNELS": channels, "ROWS": 128, "COLUMNS": 64, "R": 128, "C": 64, "D": channels, "BIASED": False}
    types = {"INDEX": "*i32", "LSE": "*fp32", "DELTA": "*fp32", "CHOSEN": "*i8", "BIAS": "*fp32"}
    types |= {"scale": "fp32", "log2_e": "fp32"}
    types |= dict.fromkeys(("queries", "keys", "places", "blocks", "rows", "kept", "heads", "total"), "i32")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiled(NAME) as real:
        for kernel in (real._forward, real._backward_q, real._backward_kv):
            built = built_for(kernel, target, sizes, 8, 2, **{n: types.get(n, "*fp16") for n in kernel.arg_names})
            assert "mma" in built.asm["ptx"]
            assert built.metadata.shared <= 227 * 1024 if target == 90 else 163 * 1024
            assert kernel is not real._forward or ".local" not in built.asm["ptx"]
