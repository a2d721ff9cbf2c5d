"""What PixArt-alpha brought: one modulation for all layers, with an offset of each; and how it runs under a gate."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from caches import built, counted, on
from families import FAMILIES

PIXART = next(f for f in FAMILIES if f.name == "pixart")
WIDTH, HEADS = 24, 3


@pytest.mark.system("pixart-alpha")
def test_ada_ln_single_is_ada_ln_with_tied_weights_and_an_offset_a_layer() -> None:
    """Blocks of DiT whose linear layers share one weight, and whose biases are one bias plus the block's table, give
    what PixArt's blocks give: S_i = f(t) + E_i (arXiv:2310.00426 sec. 2.3)."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    shared = torch.nn.Linear(WIDTH, 6 * WIDTH)
    x = torch.randn(2, 5, WIDTH, generator=g)
    t, labels = torch.tensor([3, 700]), torch.tensor([1, 4])
    for _ in range(3):
        single = BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, norm_type="ada_norm_single",
                                       norm_elementwise_affine=False, norm_eps=1e-5).eval()  # fmt: skip
        zero = BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, norm_type="ada_norm_zero", num_embeds_ada_norm=10,
                                     norm_elementwise_affine=False, norm_eps=1e-5).eval()  # fmt: skip
        zero.attn1.load_state_dict(single.attn1.state_dict())
        zero.ff.load_state_dict(single.ff.state_dict())
        with torch.no_grad():
            zero.norm1.linear.weight.copy_(shared.weight)
            zero.norm1.linear.bias.copy_(shared.bias + single.scale_shift_table.flatten())
            said = shared(torch.nn.functional.silu(zero.norm1.emb(t, labels, hidden_dtype=x.dtype)))
            want = zero(x, timestep=t, class_labels=labels)
            x_next = single(x, timestep=said)
        assert torch.allclose(x_next, want, atol=1e-5)
        assert not torch.allclose(x_next, x, atol=1e-2)
        x = x_next


@pytest.mark.system("pixart-alpha")
def test_after_the_gate_nothing_of_the_words_is_read() -> None:
    pipe, before = built("pixart")
    crosses = [b.attn2.to_k for b in pipe.transformer.transformer_blocks]
    with counted(crosses[0]) as plain:
        assert torch.equal(PIXART.call(pipe), before)
    with on(pipe, "cache.tgate", gate=0.5), counted(crosses[0]) as gated:
        PIXART.call(pipe)
    assert len(plain) == 6
    assert [m.step for m, _ in gated] == [0, 1, 2]
