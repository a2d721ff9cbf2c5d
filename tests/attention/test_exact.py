"""Exact attention by any backend: the same numbers, in one network alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, Family
from hasten import Recipe, accelerate
from hasten.kernels import backends
from hasten.kernels.backends import attend, available, fastest
from hasten.method import Refused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, n, 32, generator=rng).to(DEVICE, dtype) for n in (70, 90, 90))


@pytest.mark.system("flashattention", "flashattention-2")
@pytest.mark.parametrize("mask", ["none", "keys", "square", "added"])
@pytest.mark.parametrize("name", available(DEVICE))
def test_every_backend_of_this_machine_gives_the_definition(name: Any, mask: str) -> None:
    rng = torch.Generator().manual_seed(1)
    masks = {
        "none": None, "keys": torch.rand(2, 1, 1, 90, generator=rng) > 0.3,
        "square": torch.rand(70, 90, generator=rng) > 0.3, "added": torch.randn(2, 1, 70, 90, generator=rng),
    }  # fmt: skip
    m = None if masks[mask] is None else masks[mask].to(DEVICE)
    q, k, v = given(torch.float32 if DEVICE == "cpu" else torch.float16)
    s = q.double() @ k.double().transpose(2, 3) / 32**0.5
    if m is not None:
        s = s + m if m.is_floating_point() else s.masked_fill(~m, -torch.inf)
    want = s.softmax(-1) @ v.double()
    try:
        got = attend(name, q, k, v, m)
    except Refused as refused:
        assert "takes no mask" in str(refused)
        return
    assert (got - want).abs().max() < (2e-6 if DEVICE == "cpu" else 2e-3)


@pytest.mark.parametrize("name", ["flash", "math", "tiled", "auto"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_network_draws_the_same_whatever_computes_its_attention(family: Family, name: str) -> None:
    """And nothing that other networks of the process read has changed."""
    pipe = family.build()
    before, flags = family.call(pipe), switches()
    with accelerate(pipe, Recipe.from_dict({"methods": [{"attention.exact": {"backend": name}}]})) as handle:
        got = family.call(pipe)
        assert switches() == flags
        assert any(p.sites for _, p in handle.patches)
    assert (got - before).abs().max() < 2e-5 * before.abs().max()
    assert torch.equal(family.call(pipe), before)


def switches() -> tuple[bool, ...]:
    b = torch.backends.cuda
    return b.flash_sdp_enabled(), b.math_sdp_enabled(), b.mem_efficient_sdp_enabled(), b.cudnn_sdp_enabled()


def test_the_chosen_backend_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    whole = backends._backends("cpu")

    def counted(name: str) -> Any:
        return lambda *given: ran.append(name) or whole[name](*given)

    monkeypatch.setattr(backends, "_backends", lambda device: {n: counted(n) for n in whole})
    pipe = FAMILIES[2].build()
    with accelerate(pipe, Recipe.from_dict({"methods": [{"attention.exact": {"backend": "tiled"}}]})):
        FAMILIES[2].call(pipe)
    assert set(ran) == {"tiled"}


def test_auto_takes_the_clearly_fastest_once_a_shape_and_else_leaves_it_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {"flash": 1.0, "math": 3.0, "tiled": 0.5}
    whole, asked = backends._backends("cpu"), []
    names = {id(way): name for name, way in whole.items()}
    monkeypatch.setattr(backends, "_backends", lambda device: whole)

    def timed(way: Any, *given: Any) -> float:
        asked.append(way)
        return seconds.get(names.get(id(way), "torch"), 1.0)

    monkeypatch.setattr(backends, "_seconds", timed)
    backends._fastest.cache_clear()
    shape = (1, 2, 16, 8)
    assert fastest("cpu", torch.float32, shape, shape, None) == "tiled"
    count = len(asked)
    assert fastest("cpu", torch.float32, shape, shape, None) == "tiled"
    assert len(asked) == count
    seconds["tiled"] = 1.0
    assert fastest("cpu", torch.float32, shape, (1, 2, 8, 8), None) is None
    backends._fastest.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cudnn", "torch has no cudnn attention on cpu"),
        ("flash_attn_3", "needs CUDA and the package flash_attn_interface"),
    ],
)
def test_a_backend_that_is_not_here_is_refused_before_anything_changes(name: str, message: str) -> None:
    pipe = FAMILIES[2].build()
    with pytest.raises(Refused, match=message):
        accelerate(pipe, Recipe.from_dict({"methods": [{"attention.exact": {"backend": name}}]}))


@pytest.mark.gpu
@pytest.mark.system("flashattention")
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_memory_of_flash_grows_with_the_tokens_on_a_gpu() -> None:
    peaks = []
    for n in (4096, 8192, 16384):
        q = torch.randn(1, 8, n, 64, device="cuda", dtype=torch.float16)
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        attend("flash", q, q, q)
        peaks.append(torch.cuda.max_memory_allocated() - start)
    assert peaks[2] < 4.5 * peaks[0]
