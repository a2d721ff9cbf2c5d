"""What cannot pay at so few tokens is left out of the search."""

from __future__ import annotations

from families import FAMILIES
from hasten import tree
from hasten.tune.search import counted
from hasten.tune.space import refusals

SD, SD3 = FAMILIES[0], FAMILIES[2]


def test_tokens_are_counted_where_they_attend_and_nothing_is_left() -> None:
    for family in (SD, SD3):
        pipe = family.build()
        net = getattr(pipe, "unet", None) or pipe.transformer
        before = [dict(vars(m)) for m in net.modules()]
        with counted(net) as tokens:
            latents = family.call(pipe)
        size = latents.shape[-1] * latents.shape[-2]
        assert max(tokens) == size // 4  # its stage of half the sides; patches of two by two
        assert [dict(vars(m)) for m in net.modules()] == before


def test_a_method_is_offered_from_the_tokens_on_at_which_it_pays() -> None:
    net = SD3.build().transformer
    few, many = refusals(net, 64), refusals(net, 100_000)
    for label, kind in tree.methods().items():
        if kind.from_tokens:
            assert few[label] == f"it pays from {kind.from_tokens:,} tokens on, and here are 64"
            assert "pays from" not in many.get(label, "")
    assert {"attention.top_blocks", "tokens.merge"} <= few.keys() - many.keys()
    assert "runtime.bf16" not in few
