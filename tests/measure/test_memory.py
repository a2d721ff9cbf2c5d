"""Memory is exact to the byte on known allocations."""

import pytest
import torch
import torch._inductor.config
from torch import nn

from hasten.measure.memory import peak, weight_bytes

MB = 1_000_000


def hold(size):
    return torch.empty(size, dtype=torch.uint8)


def test_a_known_sequence_has_the_known_peak():
    def call():
        a = hold(3 * MB)
        b = hold(2 * MB)  # 5 MB live
        del a
        c = hold(4 * MB)  # 6 MB live: the peak
        del b, c
        return hold(5 * MB)

    assert peak(call, []).activations == pytest.approx(6 * MB, abs=256)  # the allocator rounds up to its alignment


def test_what_was_live_before_does_not_count():
    before = hold(8 * MB)
    assert peak(lambda: hold(5 * MB), []).activations == pytest.approx(5 * MB, abs=256)
    del before


def test_a_network_in_place_of_one_with_copies():
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(inplace=True))
    x = torch.randn(500, 256)
    with torch.no_grad():
        found = peak(lambda: net(x), [net])
        copied = peak(lambda: torch.relu(net[0](x)), [net])
    assert found.weights == (256 * 256 + 256) * 4
    assert found.activations == pytest.approx(500 * 256 * 4, abs=256)
    assert copied.activations == pytest.approx(2 * 500 * 256 * 4, abs=256)
    assert found.total == found.weights + found.activations == found.to_dict()["total"]


def test_each_storage_counts_once_and_views_count_what_they_keep():
    a = nn.Linear(10, 10, bias=False)
    b = nn.Linear(10, 10, bias=False)
    b.weight = a.weight
    c = nn.Module()
    c.register_buffer("row", hold(1000)[:10])
    d = nn.Linear(1000, 1000, device="meta")
    assert weight_bytes([a, b, a, nn.Sequential(a, b)]) == 400
    assert weight_bytes([c]) == 1000
    assert weight_bytes([a, c, d]) == 1400


def test_int8_weights_are_a_quarter():
    float32, int8 = nn.Module(), nn.Module()
    float32.register_buffer("weight", torch.zeros(64, 64))
    int8.register_buffer("weight", torch.zeros(64, 64, dtype=torch.int8))
    assert weight_bytes([int8]) * 4 == weight_bytes([float32]) == 64 * 64 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_known_peak_on_cuda():
    net = nn.Linear(512, 512, device="cuda")
    x = torch.randn(4096, 512, device="cuda")
    with torch.no_grad():
        net(x)
        found = peak(lambda: torch.relu(net(x)), [net])
    assert found.activations == pytest.approx(2 * 4096 * 512 * 4, abs=1024)


def test_compiled_code_is_seen_too(monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "0")  # the compiler sets it and leaves it

    def wave(x):
        return torch.sin(x @ x).exp() @ x

    x = torch.rand(400, 400) / 400
    compiled = torch.compile(wave)
    with torch.no_grad(), torch._inductor.config.patch(compile_threads=1):  # a pool of compilers would outlive the test
        try:
            compiled(x)
        except Exception as error:
            pytest.skip(f"nothing compiles here: {type(error).__name__}")
        # in eager code three are live (the product, its sine, the exponential); compiled code fuses the last two
        assert peak(lambda: wave(x), []).activations >= 2 * 400 * 400 * 4
        assert peak(lambda: compiled(x), []).activations == pytest.approx(2 * 400 * 400 * 4, abs=256)


def test_weights_packed_for_int8_are_counted_at_a_byte_each() -> None:
    from hasten.method import Refused
    from hasten.quant.w8a8 import Int8Linear

    try:
        packed = Int8Linear(nn.Linear(512, 256, bias=False))
    except Refused as refused:
        pytest.skip(f"no int8 here: {refused}")
    assert 512 * 256 <= weight_bytes([packed]) <= 512 * 256 * 1.1
