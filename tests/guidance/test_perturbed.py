"""Perturbed-attention guidance: identity attention against the plain definition, and against diffusers' own PAG."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    PixArtSigmaPAGPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import hasten
from families import FAMILIES, Family
from hasten import Recipe, moment
from hasten.grid import at
from hasten.guidance.cfg import cfg
from hasten.guidance.identity import Identity
from hasten.guidance.perturbed import Perturbed, blind, chosen, perturbed
from hasten.method import Refused
from hasten.moment import Moment
from hasten.paths.flow import Flow
from hasten.reference.laws import Gaussian

NAMED = {f.name: f for f in FAMILIES}
BATCH, HEADS, PLACES, WORDS, WIDTH = 2, 3, 6, 4, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_self_attention_gives_the_values_and_cross_attention_is_left_alone() -> None:
    q, k, v = (drawn(BATCH, HEADS, PLACES, WIDTH, seed=i) for i in range(3))
    text_k, text_v = (drawn(BATCH, HEADS, PLACES, WIDTH, seed=i) for i in (3, 4))  # as many words as places
    with Identity(PLACES) as mode:
        own, words = attend(q, k, v), attend(query=q, key=text_k, value=text_v)
    assert mode.met
    assert torch.equal(own, v)
    assert torch.equal(words, attend(q, text_k, text_v))
    with Identity(PLACES) as mode:
        few = attend(q, text_k[:, :, :WORDS], text_v[:, :, :WORDS])
    assert not mode.met
    assert torch.equal(few, attend(q, text_k[:, :, :WORDS], text_v[:, :, :WORDS]))


def test_grouped_queries_get_the_value_of_their_group() -> None:
    q, k, v = drawn(1, 4, PLACES, WIDTH), *(drawn(1, 2, PLACES, WIDTH, seed=i) for i in (1, 2))
    with Identity(PLACES):
        got = attend(q, k, v, enable_gqa=True)
    assert torch.equal(got, v.repeat_interleave(2, 1))


@pytest.mark.parametrize("words_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "added", "seen"])
def test_in_joint_attention_places_see_themselves_and_the_words(words_first: bool, mask: str) -> None:
    """Against softmax written out, with the map between places the identity before it is normalised."""
    parts = [
        (drawn(BATCH, HEADS, PLACES, WIDTH, seed=i), drawn(BATCH, HEADS, WORDS, WIDTH, seed=i + 9)) for i in range(3)
    ]
    added = torch.zeros(PLACES + WORDS, dtype=torch.float64)
    added[-1] = -torch.inf if mask == "seen" else 0.7  # the last column: hidden, or weighed
    given = {"none": None, "added": added, "seen": added == 0}[mask]
    with Identity(PLACES) as mode:
        q, k, v = (torch.cat(p[::-1] if words_first else p, 2) for p in parts)
        got = attend(q, k, v, attn_mask=None if given is None else given.expand(1, 1, PLACES + WORDS, -1))
    assert mode.met
    at_picture = torch.arange(PLACES + WORDS) >= WORDS if words_first else torch.arange(PLACES + WORDS) < PLACES
    hidden = at_picture[:, None] & at_picture & ~torch.eye(PLACES + WORDS, dtype=torch.bool)
    logits = (q @ k.mT / WIDTH**0.5).masked_fill(hidden, -torch.inf)
    logits = logits if mask == "none" else logits + added
    assert torch.allclose(got, logits.softmax(-1) @ v, atol=1e-12)


def test_as_many_words_as_places_are_refused() -> None:
    parts = [drawn(1, 1, PLACES, WIDTH, seed=i) for i in range(2)]
    with Identity(PLACES):
        q = torch.cat(parts, 2)
        with pytest.raises(Refused, match="which come first cannot be told"):
            attend(q, q, q)


PAG: dict[str, tuple[type[Any], str, str]] = {  # diffusers' pipeline, its name of the layers, ours
    "sd": (StableDiffusionPAGPipeline, "mid", "middle"),
    "sdxl": (StableDiffusionXLPAGPipeline, "up_blocks.0", "up_blocks.0"),
    "sd3": (StableDiffusion3PAGPipeline, "blocks.1", "middle"),
    "pixart": (PixArtSigmaPAGPipeline, "blocks.1", "middle"),
}


@pytest.mark.parametrize("guided", [True, False], ids=["with guidance", "without"])
@pytest.mark.parametrize("name", PAG)
def test_it_is_diffusers_own_pag_in_the_pipelines_that_have_it(name: str, guided: bool) -> None:
    """Also in the joint attention of Stable Diffusion 3; measured 5e-7 of the largest value, at most."""
    family = NAMED[name]
    kind, theirs, ours = PAG[name]
    more = {} if guided else {"guidance_scale": 1.0}
    pipe = family.build()
    if name == "sd3":  # diffusers' perturbed processor forgets the norms of queries and keys (of SD 3.5): without them
        for block in pipe.transformer.transformer_blocks:
            block.attn.norm_q = block.attn.norm_k = block.attn.norm_added_q = block.attn.norm_added_k = None
    plain = family.call(pipe, **more)
    with hasten.accelerate(pipe, recipe(scale=2.5, layers=ours)) as handle:
        got = family.call(pipe, **more)
        assert handle.patches[0][1].tally["extra"] == 6
    parts = {k: v for k, v in pipe.components.items() if k in inspect.signature(kind).parameters}
    whole = {"requires_safety_checker": False} if name == "sd" else {}
    pag = kind(**parts | whole, pag_applied_layers=[theirs])
    pag.set_progress_bar_config(disable=True)
    want = family.call(pag, **more, pag_scale=2.5)
    most = want.abs().max()
    assert (got - want).abs().max() < 1e-5 * most
    assert (plain - want).abs().max() > 100 * (got - want).abs().max()


def recipe(**settings: Any) -> Recipe:
    return Recipe.from_dict({"methods": [{"guidance.perturbed": settings}]})


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_the_move_is_scale_times_c_minus_p_on_both_branches(name: str) -> None:
    """The network itself, against its blinded self: what each branch gains, whether in one batch or in two calls."""
    family = NAMED[name]
    pipe = family.build()
    net, seen = pipe.transformer, list[tuple[Any, Any]]()
    inner = net.forward
    vars(net)["forward"] = lambda *a, **k: (seen.append((a, k)), inner(*a, **k))[1]
    family.call(pipe, num_inference_steps=1)
    vars(net).pop("forward")
    both = len(seen) == 1

    def ask(i: int, branch: Any, run: int) -> Tensor:
        with torch.no_grad(), moment.at(Moment(branch=branch, run=run)):
            out = net(*seen[i][0], **seen[i][1])[0]
        return out

    calls = ["both"] if both else ["cond", "uncond"]
    plain = [ask(i, b, 1) for i, b in enumerate(calls)]
    with blind(net):
        worse = ask(0, calls[0], 2)
    assert torch.equal(ask(0, calls[0], 3), plain[0])  # the blindness is gone
    with Perturbed(scale=2.0).apply(net):
        moved = [ask(i, b, 4) for i, b in enumerate(calls)]
    c, p = (plain[0].chunk(2)[1], worse.chunk(2)[1]) if both else (plain[0], worse)
    gain = 2.0 * (c - p)
    assert gain.abs().max() > 1e-4
    for before, after in zip(plain, moved, strict=True):
        want = torch.cat([gain, gain]) if both else gain
        assert torch.allclose(after - before, want, atol=1e-5)


def test_with_caches_each_branch_keeps_its_own() -> None:
    """A cache that reuses nothing changes nothing, and one that does runs: the perturbed call has state of its own."""
    family = NAMED["sd3"]
    pipe = family.build()
    with hasten.accelerate(pipe, recipe(scale=2.0)):
        want = family.call(pipe)
    methods: list[Any] = [{"guidance.perturbed": {"scale": 2.0}}, {"cache.interval": {"every": 1}}]
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": methods})):
        assert torch.equal(family.call(pipe), want)
    methods[1] = {"cache.interval": {"every": 2}}
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": methods})) as handle:
        one, two = family.call(pipe), family.call(pipe)
        assert torch.equal(one, two) and not torch.equal(one, want)
        assert sum(p.tally["reused"] for _, p in handle.patches) == 2 * 3 * 2 * 3  # pictures, steps, branches, blocks


def test_the_wrapper_goes_together_with_classifier_free_guidance() -> None:
    """cfg of it, with its scale over theirs, is u + s (c - u) + w (c - p), as the pipelines compute."""
    c, u, p = (Gaussian(m, 0.3).denoise for m in (1.0, -0.5, 0.2))
    x, node = drawn(2, 5), at(Flow(), [0.5, 0.0]).nodes[0]
    got = cfg(perturbed(c, p, scale=2.0 / 4.0), u, scale=4.0)(x, node).x0
    cs, us, ps = (d(x, node).x0 for d in (c, u, p))
    assert torch.allclose(got, us + 4.0 * (cs - us) + 2.0 * (cs - ps), atol=1e-12)
    assert torch.allclose(perturbed(c, p, scale=2.0)(x, node).x0, cs + 2.0 * (cs - ps), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "layers", "names"),
    [("sd", "middle", ["mid_block.attentions.0.transformer_blocks.0"]),
     ("pixart", "middle", ["transformer_blocks.1"]),
     ("sd3", "transformer_blocks.0", ["transformer_blocks.0"]),
     ("flux", "single_transformer_blocks", ["single_transformer_blocks.0", "single_transformer_blocks.1"])],
)  # fmt: skip
def test_layers_are_named_by_their_place(name: str, layers: str, names: list[str]) -> None:
    pipe = NAMED[name].build()
    assert [b.name for b in chosen(getattr(pipe, "unet", None) or pipe.transformer, layers)] == names


class Linear(nn.Module):
    """Attention without a softmax, as Sana's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Linear()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.attn(hidden_states)


class Calls(Linear):
    """Says that it calls the softmax, and does not."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        return x if len(x) else nn.functional.scaled_dot_product_attention(x, x, x)


class Net(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Plain(), Plain()])
        for block in self.blocks:
            block.attn = attention()

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_networks_without_such_attention_are_refused_before_the_first_call() -> None:
    with pytest.raises(Refused, match=r"attention of blocks\.1, Linear, is no softmax"):
        Perturbed().apply(Net(Linear))
    unconditional = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, attention_head_dim=4,
    )  # fmt: skip
    with pytest.raises(Refused, match="no transformer blocks"):
        Perturbed().apply(unconditional)
    pipe = NAMED["sd3"].build()
    with pytest.raises(Refused, match=r"no transformer block 'blocks\.9'; it has transformer_blocks\.0"):
        Perturbed(layers="blocks.9").apply(pipe.transformer)


def test_attention_that_never_ran_is_refused_at_the_first_call() -> None:
    with blind(net := Net(Calls)), pytest.raises(Refused, match=r"no self-attention over the picture ran in 'middle'"):
        net(torch.zeros(1, 4, 8))
    assert "forward" not in vars(net.blocks[1])


@pytest.mark.parametrize("family", [NAMED["sd"], NAMED["flux"]], ids=lambda f: f.name)
def test_it_undoes_itself_after_a_call(family: Family) -> None:
    pipe = family.build()
    before = family.call(pipe)
    with hasten.accelerate(pipe, recipe()):
        assert not torch.equal(family.call(pipe), before)
    assert torch.equal(family.call(pipe), before)
