"""SageAttention in a network: its emulation anywhere, its choice for each layer, its refusal without a GPU."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES
from hasten import Recipe, accelerate
from hasten.attention import sage
from hasten.method import Refused

FLUX = FAMILIES[3]
pytestmark = pytest.mark.system("sageattention")


def recipe(**settings: object) -> Recipe:
    return Recipe.from_dict({"methods": [{"attention.sage": {"emulate": True, **settings}}]})


@pytest.mark.system("sageattention-2")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_pictures_stay_within_what_eight_bits_leave(family) -> None:
    """And four bits, whose roundings are eighteen times as wide, move them further."""
    pipe = family.build()
    want = family.call(pipe)
    off = []
    for settings in ({}, {"bits": 4, "smooth_q": True, "values": "fp8", "granularity": "thread"}):
        with accelerate(pipe, recipe(**settings)):
            off.append(float((family.call(pipe) - want).norm() / want.norm()))
    assert 0 < off[0] < 0.02
    assert off[0] < off[1]


def test_layers_that_would_lose_too_much_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FLUX.build()
    want = FLUX.call(pipe)
    monkeypatch.setattr(sage, "THRESHOLD", 1.1)  # no cosine is that high
    with accelerate(pipe, recipe(adaptive=True)) as handle:
        assert torch.equal(FLUX.call(pipe), want)
        told = {k: v for _, patch in handle.patches for k, v in patch.tally.items()}
        blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
        assert told["layers left exact"] == blocks
    monkeypatch.setattr(sage, "THRESHOLD", 0.5)
    with accelerate(pipe, recipe(adaptive=True, values="fp8")) as handle:
        got = FLUX.call(pipe)
        assert {k for _, patch in handle.patches for k in patch.tally if "layers" in k} == {"layers with fp8"}
    with accelerate(pipe, recipe(values="fp8", granularity="thread")):
        assert torch.equal(FLUX.call(pipe), got)  # the first of the ladder is version 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_unasked_nothing_is_simulated() -> None:
    with pytest.raises(Refused, match="low-bit attention runs on NVIDIA GPUs, not on 'cpu'"):
        accelerate(FLUX.build(), recipe(emulate=False))
