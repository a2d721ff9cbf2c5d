"""Low-bit attention in plain torch: smoothing changes nothing but the roundings, which are where they should be."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from families import FAMILIES
from hasten.kernels import sage
from hasten.kernels.sage import KEYS, QUERIES, SAGE, SAGE_2, SAGE_2_INT4, Setting
from hasten.method import Refused

one = pytest.mark.system("sageattention")
two = pytest.mark.system("sageattention-2")
both = pytest.mark.system("sageattention", "sageattention-2")
groupings = pytest.mark.parametrize("groups", [*QUERIES.values(), *KEYS.values()], ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(n: int, m: int, c: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, heads, n, c, seed=1), normal(2, heads, m, c, seed=2), normal(2, heads, m, c, seed=3)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float64, row by row as it is written."""
    s = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    return s.softmax(-1) @ v.double()


def off(out: Tensor, want: Tensor) -> float:
    """The error, of the size of what is wanted."""
    return float((out - want).norm() / want.norm())


def run(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    return sage.sage_reference(q, k, v, **asdict(setting))


def bias(c: int, size: float, seed: int) -> Tensor:
    """[c] zeros but for two channels of this size: what all tokens share, as the keys of trained models do."""
    g = torch.Generator().manual_seed(seed)
    at, b = torch.randperm(c, generator=g)[:2], torch.zeros(c)
    b[at] = size * torch.randn(2, generator=g).sign()
    return b


def caught(family: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of every attention over more than a dozen keys in one step of a tiny pipeline."""
    real, found = F.scaled_dot_product_attention, []

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if key.shape[2] > 12:
            found.append((query.clone(), key.clone(), value.clone()))
        return real(query, key, value, *args, **kwargs)

    of = next(f for f in FAMILIES if f.name == family)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", spy)
        of.call(of.build(), num_inference_steps=1)
    assert found
    return found


@both
def test_keys_less_their_mean_give_the_same_attention() -> None:
    q, k, v = (x.double() for x in qkv(37, 53, 24))
    k = k + 30 * normal(24, seed=4)
    smooth = sage.smooth_k(k)
    assert smooth.mean(2).abs().max() < 1e-14
    assert off(exact(q, smooth, v), exact(q, k, v)) < 1e-12


@two
@pytest.mark.parametrize("n", [1, 128, 300])
def test_queries_less_their_blocks_mean_and_the_correction_give_the_same_logits(n: int) -> None:
    q, k, _ = (x.double() for x in qkv(n, 53, 24))
    q = q + 5 * normal(24, seed=4) + torch.arange(n)[:, None] / 50
    smooth, means = sage.smooth_queries(q), sage.query_means(q)
    assert means.shape == (2, 2, -(-n // 128), 24)
    for at in range(0, n, 128):
        assert smooth[:, :, at : at + 128].mean(2).abs().max() < 1e-13  # of the last block, by what it has
    rows = sage.correction(means, k)[:, :, torch.arange(n) // 128]
    assert off(smooth @ k.mT + rows, q @ k.mT) < 1e-14


@one
def test_a_block_is_128_queries_or_64_keys() -> None:
    assert QUERIES["block"].of(300).equal(torch.arange(300) // 128)
    assert KEYS["block"].of(300).equal(torch.arange(300) // 64)
    assert [QUERIES["block"].count(n) for n in (1, 128, 129)] == [1, 1, 2]


@two
def test_a_thread_of_an_integer_product_needs_one_scale_of_each() -> None:
    """Of the 16 x 8 results of mma.m16n8k32, lane t holds rows t // 4 and t // 4 + 8, and columns 2 (t % 4) and the
    next: PTX ISA, its fragments of accumulators. A warp has 32 queries and all 64 keys of a block."""
    q, k = QUERIES["thread"].of(128), KEYS["thread"].of(128)
    for warp in range(4):
        for lane in range(32):
            rows = [32 * warp + 16 * i + 8 * j + lane // 4 for i in range(2) for j in range(2)]
            assert len(q[rows].unique()) == 1
            columns = [8 * i + 2 * (lane % 4) + j for i in range(8) for j in range(2)]
            assert len(k[columns].unique()) == 1
    assert q.bincount().tolist() == [4] * 32  # and no scale serves fewer than the thread's own
    assert k.bincount().tolist() == [16] * 8
    assert (QUERIES["thread"].count(33), KEYS["thread"].count(65)) == (16, 8)


@both
@groupings
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_within_half_a_step_and_use_the_range_of_their_group(groups: sage.Groups, bits: Any) -> None:
    x = normal(2, 3, 150, 20) * torch.logspace(-6, 6, 150)[:, None]
    q, scale = sage.quantize(x, groups, bits)
    index = groups.of(150)
    assert scale.shape == (2, 3, groups.count(150))
    assert ((scale[:, :, index, None].double() * q - x).abs() <= scale[:, :, index, None] / 2 * (1 + 1e-5)).all()
    for g in index.unique().tolist():
        of_group = x[:, :, index == g]
        assert scale[:, :, g].equal(of_group.abs().amax((2, 3)) / sage.MOST_INT[bits])
        assert q[:, :, index == g].abs().amax((2, 3)).eq(sage.MOST_INT[bits]).all()


@one
def test_ties_go_away_from_zero_and_zeros_stay() -> None:
    x = torch.tensor([[[[127.0, 0.5, -0.5, 1.49, -2.5]]]])
    assert sage.quantize(x, KEYS["block"])[0].tolist() == [[[[127, 1, -1, 1, -3]]]]
    q, scale = sage.quantize(torch.zeros(1, 1, 70, 8), KEYS["thread"])
    assert q.count_nonzero() == 0
    assert scale.isfinite().all() and (scale > 0).all()


@two
@pytest.mark.parametrize("smooth", [False, True])
def test_values_in_float8_have_a_scale_a_channel(smooth: bool) -> None:
    v = normal(1, 2, 50, 6) * torch.logspace(-4, 4, 6)
    v8, scale = sage.narrow(v, "fp8")
    assert scale is not None
    assert v8.float().abs().amax(2).eq(448).all()
    assert ((v8.float() * scale - v).abs() <= torch.maximum(v.abs() / 16, scale / 1024) * (1 + 1e-5)).all()
    assert sage.narrow(v)[0].dtype == torch.float16 and sage.narrow(v)[1] is None


def rounded(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    """Exact attention of what the settings leave of q, k and v: P alone is not rounded."""
    groups = QUERIES[setting.granularity], KEYS[setting.granularity]
    means = sage.query_means(q).repeat_interleave(128, 2)[:, :, : q.shape[2]] if setting.smooth_q else 0 * q
    k = sage.smooth_k(k) if setting.smooth_k else k
    s = means.double() @ k.double().mT
    (q8, q_scale), (k8, k_scale) = (sage.quantize(x, g, setting.bits) for x, g in zip((q - means, k), groups))
    whole = [
        x8.double() * scale[:, :, g.of(x8.shape[2]), None]
        for x8, scale, g in ((q8, q_scale, groups[0]), (k8, k_scale, groups[1]))
    ]
    s = (s + whole[0] @ whole[1].mT) / math.sqrt(q.shape[-1])
    mean = v.mean(2, keepdim=True) if setting.smooth_v else 0 * v[:, :, :1]
    narrow, scale = sage.narrow(v - mean, setting.values)
    return s.softmax(-1) @ (narrow.double() if scale is None else narrow.double() * scale) + mean


@both
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("smooth", ["", "k", "kq", "qv", "kqv"])
@pytest.mark.parametrize(("values", "granularity"), [("fp16", "block"), ("fp8", "thread")])
def test_the_reference_is_attention_of_the_rounded_numbers(
    bits: Any, smooth: str, values: Any, granularity: Any
) -> None:
    """Over blocks of keys whose largest logit keeps rising, so that what was summed is scaled down again."""
    q, k, v = qkv(200, 150, 20)
    k, v = k * torch.linspace(0.3, 3, 150)[:, None] + 1, v + 2
    setting = Setting(bits, values, "q" in smooth, "k" in smooth, "v" in smooth, granularity)
    out = run(q, k, v, setting)
    assert out.dtype == torch.float32
    error = off(out, rounded(q, k, v, setting))
    assert error < (5e-4 if values == "fp16" else 2e-2)  # P's rounding: 2^-11 and 2^-4, less by the sum
    one = torch.full_like(v, 3.25)  # weights that sum to 1
    assert off(run(q, k, one, setting), one[:, :, :1].expand_as(q)) < (5e-4 if values == "fp16" else 2e-2)


@one
def test_the_error_on_normal_data_is_small_and_grows_with_fewer_bits() -> None:
    q, k, v = qkv(200, 150, 64)
    want = exact(q, k, v)
    errors = [off(run(q, k, v, s), want) for s in (SAGE, SAGE_2, SAGE_2_INT4)]
    assert errors[0] < 0.02
    assert errors[0] < errors[1] < 0.05
    assert errors[1] < errors[2] < 0.3


@two
def test_values_less_their_mean_lose_less_in_float8() -> None:
    q, k, v = qkv(200, 150, 32)
    v = v + 8
    errors = [off(run(q, k, v, replace(SAGE_2, smooth_v=s)) - 8, exact(q, k, v) - 8) for s in (True, False)]
    assert errors[0] < errors[1] / 4


@one
@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_int8_has_a_cosine_above_0_999_on_activations_whose_keys_share_a_bias(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for q, k, v in caught(family, monkeypatch):
        k = k + bias(k.shape[-1], 20 * float(k.std()), seed=0)
        want = exact(q, k, v)
        smooth, rough = (1 - sage.cosine(run(q, k, v, replace(SAGE, smooth_k=s)), want) for s in (True, False))
        assert smooth < 1e-4
        assert smooth < rough / 8


@two
def test_int4_needs_both_smoothings_on_activations_that_share_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    for q, k, v in caught("flux", monkeypatch):
        k, q = k + bias(16, 30 * float(k.std()), seed=0), q + bias(16, 15 * float(q.std()), seed=1)
        want = exact(q, k, v)
        cosines = [
            sage.cosine(run(q, k, v, replace(SAGE_2_INT4, smooth_q=sq, smooth_k=sk)), want)
            for sq, sk in ((True, True), (False, True), (False, False))
        ]
        assert cosines[0] > 0.995
        assert cosines[0] > cosines[1] + 0.01  # 0.02 to 0.08
        assert cosines[0] > cosines[2] + 0.3  # to 0.64


@both
def test_a_cosine_is_that_of_the_outputs_as_vectors() -> None:
    a, b = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    assert sage.cosine(a, a * 7) == pytest.approx(1)
    assert sage.cosine(a, -a) == pytest.approx(-1)
    assert sage.cosine(a, b) == pytest.approx(float(F.cosine_similarity(a.flatten(), b.flatten(), 0)), abs=1e-6)


@both
def test_each_layer_gets_the_fastest_numbers_that_pass() -> None:
    """float8 loses too much for some, int4 where attention is sharp; a layer that none serves stays exact."""
    q, k, v = qkv(150, 100, 32)
    assert sage.passing(q, k, v) == SAGE_2
    assert sage.passing(q, k, v, 0.9998) == SAGE
    assert sage.passing(q, k, v, 0.999999) is None
    ladder = (SAGE_2_INT4, SAGE_2, SAGE)
    assert sage.passing(q / 8, k, v, settings=ladder) == SAGE_2_INT4
    assert sage.passing(q * 4, k, v, settings=ladder) == SAGE_2
    assert sage.passing(q, k, v, settings=()) is None


@one
def test_more_bits_than_sums_hold_never_come_up() -> None:
    """Products of the largest integers over the most channels, summed in float32 as the reference does, are exact."""
    q = torch.full((1, 1, 3, 128), 127.0)
    q[..., ::2] = 126
    q8 = sage.quantize(q, QUERIES["block"])[0]
    assert (q8.float() @ q8.float().mT).long().equal(q8.long() @ q8.long().mT)
    assert 127 * 127 * sage.WIDEST < 2**24


@one
def test_where_there_is_no_kernel_it_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(8, 8, 16)
    with pytest.raises(Refused, match="runs on NVIDIA GPUs, not on 'cpu'"):
        sage.sage_attention(q, k, v)
    for kind in ("mps", "xpu"):
        with pytest.raises(Refused, match=f"not on '{kind}'"):
            sage.backend(torch.device(kind))
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)  # another maker's GPUs go by the same name
    with pytest.raises(Refused, match="NVIDIA"):
        sage.backend(cuda)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(sage, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install triton"):
        sage.backend(cuda)
    monkeypatch.setattr(sage, "find_spec", lambda name: object())
    for capability, values, says in (((7, 5), "fp16", "8.0"), ((8, 6), "fp8", "8.9"), ((7, 5), "fp8", "8.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        with pytest.raises(Refused, match=says.replace(".", r"\.")):
            sage.backend(cuda, values)
    for capability, values in (((8, 0), "fp16"), ((8, 9), "fp8"), ((9, 0), "fp8"), ((12, 0), "fp8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert sage.backend(cuda, values) == "triton"


@one
def test_what_the_kernel_cannot_do_is_refused_not_dropped() -> None:
    q, k, v = qkv(8, 8, 16)
    with pytest.raises(Refused, match="no mask"):
        sage.sage_attention(q, k, v, mask=torch.ones(8, 8, dtype=torch.bool))
    for i in range(3):
        given = [x.clone().requires_grad_(j == i) for j, x in enumerate((q, k, v))]
        with pytest.raises(Refused, match="no gradient"):
            sage.sage_attention(*given)
    with pytest.raises(Refused, match="128 channels at most, not 129"):
        sage.sage_attention(*(normal(1, 1, 4, 129) for _ in range(3)))


@one
@pytest.mark.parametrize("call", [sage.sage_reference, sage.sage_attention])
def test_shapes_and_settings_that_do_not_fit_are_errors(call: Any) -> None:
    q, k, v = qkv(8, 9, 16)
    for wrong in ((q[0], k, v), (q, k, v[:, :, 1:]), (q, k[:, :1], v[:, :1]), (q[..., 1:], k, v), (q[:, :, :0], k, v)):
        with pytest.raises(ValueError, match=r"takes q \[B, H, N, C\]"):
            call(*wrong)
    for name, value in (("bits", 5), ("values", "fp4"), ("granularity", "warp")):
        with pytest.raises(ValueError, match=f"{name} = {value!r} is not known"):
            call(q, k, v, **{name: value})


@one
@pytest.mark.parametrize("of", [0, 1, 2])
def test_what_is_not_a_number_is_not_hidden(of: int) -> None:
    given = [x[:1] for x in qkv(140, 70, 8)]
    given[of][0, 1, 3, 2] = math.nan
    out = sage.sage_reference(*given)
    assert out[0, 0].isfinite().all()
    assert out[0, 1, 3].isnan().any()


def test_the_reference_loads_no_triton() -> None:
    code = "import sys, hasten.kernels.sage, hasten.kernels.fp8; print('triton.language' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
