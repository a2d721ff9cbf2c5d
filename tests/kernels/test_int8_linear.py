import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels import int8_linear as int8
from hasten.method import Refused

pytestmark = [pytest.mark.system("w8a8"), pytest.mark.usefixtures("compiler")]
CPU = torch.device("cpu")


def runs_here() -> bool:
    try:
        return int8.backend(CPU) == "onednn"
    except Refused:
        return False


fast = pytest.mark.skipif(not runs_here(), reason="this CPU has no fast int8")
either = pytest.mark.parametrize("activations", ["token", "tensor"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decades(rows: int, columns: int) -> Tensor:
    """Normal rows, each of another size, over 12 decades."""
    return normal(rows, columns) * torch.logspace(-6, 6, rows)[:, None]


def assert_rounded(y: Tensor, exact: Tensor, bias: Tensor | None) -> None:
    """`y` is `exact` but for the roundings of its precision: of the product, and of the sum with the bias."""
    unit = torch.finfo(y.dtype).eps
    product = exact if bias is None else exact - bias.float()
    assert ((y.float() - exact).abs() <= unit * (product.abs() + exact.abs()) + 1e-30).all()


def case(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, scale = int8.quantize_rows(normal(n, k, seed=1) / k**0.5)
    return normal(m, k).to(dtype), q, scale, normal(n, seed=2).to(dtype)


def test_rows_are_within_half_a_step_over_12_decades():
    w = decades(121, 333)
    q, scale = int8.quantize_rows(w)
    assert q.dtype == torch.int8
    assert q.abs().amax(1).eq(127).all()  # the whole range is used, and -128 never
    assert ((scale.double() * q - w).abs() <= scale.double() / 2).all()


@dtypes
@pytest.mark.parametrize(("stored", "zero"), [(torch.int8, 0), (torch.uint8, 128)])
def test_tokens_are_within_half_a_step_over_12_decades(dtype: torch.dtype, stored: torch.dtype, zero: int):
    x = decades(121, 333).to(dtype).reshape(11, 11, 333)
    q, scale = int8.quantize_tokens(x, dtype=stored)
    assert q.dtype == stored
    assert scale.shape == (11, 11, 1)
    step = q.double() - zero
    assert step.abs().max() <= 127
    assert ((scale.double() * step - x).abs() <= scale.double() / 2 * (1 + 1e-4)).all()
    assert scale.to(dtype).float().equal(scale)  # handed on in the precision of x, it is still what x was divided by


def test_one_scale_for_all_tokens_is_that_of_the_largest():
    x = decades(50, 64)
    q, scale = int8.quantize_tokens(x, "tensor")
    assert scale.shape == (1,)
    assert ((scale.double() * q - x).abs() <= scale.double() / 2 * (1 + 1e-4)).all()


@fast
@dtypes
@either
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("m", "k", "n"), [(64, 128, 256), (1, 7, 5), (33, 129, 67), (17, 1, 1), (300, 512, 96)])
def test_dispatch_equals_the_integer_reference(m, k, n, biased, activations, dtype):
    x, q, scale, bias = case(m, k, n, dtype)
    b = bias if biased else None
    y = int8.int8_linear(x, int8.pack(q), scale, b, activations)
    assert y.dtype == dtype
    assert_rounded(y, int8.int8_linear_reference(x, q, scale, b, activations), b)


@pytest.mark.parametrize(("m", "k", "n"), [(64, 128, 256), (1, 7, 5), (33, 129, 67)])
@either
def test_the_cuda_path_equals_the_integer_reference(m, k, n, activations):
    """`torch._int_mm` exists on CPUs too, so its padding and scales are checked there."""
    x, q, scale, bias = case(m, k, n, torch.float32)
    packed = int8._padded(q, int8.CUDA_STEP, int8.CUDA_STEP)
    y = int8.cuda_linear(x, packed, scale, bias, activations)
    assert_rounded(y, int8.int8_linear_reference(x, q, scale, bias, activations), bias)
    assert int8.unpack(packed, n, k).equal(q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@dtypes
@either
@pytest.mark.parametrize(("m", "k", "n"), [(64, 128, 256), (1, 7, 5), (33, 129, 67)])
def test_cuda_equals_the_integer_reference(m, k, n, activations, dtype):
    x, q, scale, bias = case(m, k, n, dtype)
    y = int8.int8_linear(x.cuda(), int8.pack(q.cuda()), scale.cuda(), bias.cuda(), activations)
    assert_rounded(y.cpu(), int8.int8_linear_reference(x, q, scale, bias, activations), bias)


@fast
@dtypes
@either
@pytest.mark.parametrize(("m", "k", "n"), [(1100, 512, 2048), (4096, 384, 1536)])
def test_error_on_normal_data_is_two_percent_at_most(m, k, n, activations, dtype):
    w, x = normal(n, k, seed=1) / k**0.5, normal(m, k)
    q, scale = int8.quantize_rows(w)
    y, exact = int8.int8_linear(x.to(dtype), int8.pack(q), scale, None, activations).float(), F.linear(x, w)
    assert (y - exact).norm() <= 0.02 * exact.norm()


@fast
def test_a_large_token_leaves_the_others_exact_only_with_scales_of_tokens():
    w, x = normal(64, 256, seed=1) / 16, normal(40, 256)
    x[0] *= 1000
    q, scale = int8.quantize_rows(w)
    errors = {}
    for activations in ("token", "tensor"):
        y, exact = int8.int8_linear(x, int8.pack(q), scale, None, activations)[1:], F.linear(x, w)[1:]
        errors[activations] = (y - exact).norm() / exact.norm()
    assert errors["token"] < 0.02
    assert errors["tensor"] > 0.5


@fast
@dtypes
@either
def test_zero_rows_give_the_bias(activations, dtype):
    x, q, scale, bias = case(20, 64, 32, dtype)
    x[3:7] = 0
    packed = int8.pack(q)
    assert int8.int8_linear(x, packed, scale, bias, activations)[3:7].equal(bias.expand(4, -1))
    assert int8.int8_linear(torch.zeros_like(x), packed, scale, None, activations).count_nonzero() == 0
    w_q, w_scale = int8.quantize_rows(torch.zeros(3, 8))
    assert w_q.count_nonzero() == 0
    assert w_scale.isfinite().all()


@fast
@dtypes
@either
def test_shape_and_strides_of_the_input_do_not_matter(activations, dtype):
    x, q, scale, bias = case(60, 48, 24, dtype)
    packed = int8.pack(q)
    y = int8.int8_linear(x, packed, scale, bias, activations)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    assert int8.int8_linear(strided, packed, scale, bias, activations).equal(y)
    three = x.reshape(3, 20, 48)
    assert int8.int8_linear(three, packed, scale, bias, activations).equal(y.reshape(3, 20, 24))
    crossed = three.transpose(0, 1)
    assert int8.int8_linear(crossed, packed, scale, bias, activations).equal(y.reshape(3, 20, 24).transpose(0, 1))
    wider = torch.cat([x, x], 1)[:, :48]
    assert int8.int8_linear(wider, packed, scale, bias, activations).equal(y)


@fast
@dtypes
@either
def test_compiled_in_one_graph_equals_eager(activations, dtype):
    x, q, scale, bias = case(48, 96, 64, dtype)
    packed = int8.pack(q)

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return int8.int8_linear(x, packed, scale, bias, activations), int8.int8_linear(
            x, packed, scale, None, activations
        )

    torch._dynamo.reset()
    for got, expected, b in zip(torch.compile(two, fullgraph=True)(x), two(x), (bias, None)):
        if dtype == torch.bfloat16:
            assert got.equal(expected)
        assert_rounded(got, expected.float(), b)  # one multiply-add or two roundings: an ulp of float32


@fast
def test_without_a_compiler_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    x, q, scale, bias = case(48, 96, 64, torch.bfloat16)
    packed = int8.pack(q)
    y = int8.int8_linear(x, packed, scale, bias)

    def broken(function, **kwargs):
        def call(*args):
            raise RuntimeError("no C++ compiler")

        return call

    caches = (int8._compiled, int8._compiles)
    try:
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(torch, "compile", broken)
        assert int8._compiled(int8.quantize_tokens, "cpu") is int8.quantize_tokens
        assert int8.int8_linear(x, packed, scale, bias).equal(y)
    finally:
        for cache in caches:
            cache.cache_clear()


@fast
def test_packing_is_undone_exactly():
    _, q, _, _ = case(1, 67, 129, torch.float32)
    packed = int8.pack(q)
    assert packed.nbytes == q.nbytes
    assert int8.unpack(packed, 129, 67).equal(q)


@fast
def test_a_gradient_is_refused_not_dropped():
    x, q, scale, bias = case(4, 8, 8, torch.float32)
    with pytest.raises(Refused, match="no gradient"):
        int8.int8_linear(x.requires_grad_(), int8.pack(q), scale, bias)


def test_other_devices_are_refused_in_a_sentence():
    for kind in ("mps", "meta", "xpu"):
        with pytest.raises(Refused, match=f"not on '{kind}'"):
            int8.backend(torch.device(kind))


def test_a_cpu_without_int8_instructions_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8.onednn, "available", lambda: True)
    monkeypatch.setattr(int8, "cpu_features", lambda: {"avx2": True, "avx512_f": True})
    with pytest.raises(Refused, match="avx512_vnni, avx_vnni, amx_int8, and this one has none"):
        int8.pack(torch.zeros(8, 8, dtype=torch.int8))


def test_a_torch_without_onednn_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8.onednn, "available", lambda: False)
    with pytest.raises(Refused, match="oneDNN"):
        int8.backend(CPU)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(Refused, match=r"7\.5"):
        int8.backend(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert int8.backend(torch.device("cuda")) == "cuda"
