"""DeepCache against its description, written out on a U-Net's own modules."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from families import FAMILIES, _unet
from families_more import MORE
from hasten import Recipe, moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.cache.deep import Deep, inside, key_steps
from hasten.method import Refused
from hasten.moment import Moment
from pipelines import PIPELINES

UNETS = [f for f in (*PIPELINES, *MORE) if f.name in ("sd", "sdxl", "ddpm", "svd", "animatediff")]
SD = FAMILIES[0]
TEXT = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(5))
pytestmark = pytest.mark.system("deepcache")


def inputs(step: int) -> tuple[Tensor, float]:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(step)), 900.0 - 100 * step


def slowly(net: Any, x: Tensor, t: float, branch: int, kept: dict[str, Tensor], whole: bool) -> Tensor:
    """The paper's forward of a `UNet2DConditionModel`, layer by layer: where it is not whole, what lies inside the skip
    is not run, and the layer that reads the skip takes what came to it the last time."""
    emb = net.time_embedding(net.time_proj(torch.full((len(x),), t)))
    skips, h = [net.conv_in(x)], None
    h = skips[0]
    for stage in net.down_blocks:
        pairs = zip(stage.resnets, getattr(stage, "attentions", [None] * len(stage.resnets)))
        for resnet, attention in pairs:
            if whole or len(skips) <= branch:
                h = resnet(h, emb)
                h = h if attention is None else attention(h, encoder_hidden_states=TEXT, return_dict=False)[0]
                skips.append(h)
        if stage.downsamplers is not None and (whole or len(skips) <= branch):
            h = stage.downsamplers[0](h)
            skips.append(h)
    if whole:
        h = net.mid_block(h, emb, encoder_hidden_states=TEXT)
        deeper = len(skips) - 1 - branch
    else:
        skips, deeper = skips[: branch + 1], 0
    at = 0
    for stage in net.up_blocks:
        pairs = zip(stage.resnets, getattr(stage, "attentions", [None] * len(stage.resnets)))
        for resnet, attention in pairs:
            runs = whole or at >= kept["count"]
            if whole and at == deeper:
                kept["x"], kept["count"] = h, at  # type: ignore[assignment]
            elif not whole and at == kept["count"]:
                h = kept["x"]
            if runs:
                h = resnet(torch.cat([h, skips.pop()], 1), emb)
                h = h if attention is None else attention(h, encoder_hidden_states=TEXT, return_dict=False)[0]
            at += 1
        if stage.upsamplers is not None and (whole or at > kept["count"]):
            h = stage.upsamplers[0](h)
    return net.conv_out(net.conv_act(net.conv_norm_out(h)))


def deeper() -> Any:
    return _unet(
        block_out_channels=(16, 32, 32), layers_per_block=2, attention_head_dim=(2, 4, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("branch", range(8))
@torch.no_grad()
def test_each_step_is_the_papers(branch: int) -> None:
    """At every branch, key steps and others, for two trajectories in a row."""
    net, kept = deeper(), dict[str, Any]()
    plain = deeper()
    plain.load_state_dict(net.state_dict())
    with Deep(every=3, branch=branch).apply(net):
        for run in (1, 2):
            for step in range(6):
                x, t = inputs(step + 10 * run)
                with moment.at(Moment(step, 6, run=run)):
                    got = net(x, t, TEXT).sample
                want = slowly(plain, x, t, branch, kept, step % 3 == 0)
                assert (got - want).abs().max() < 1e-5 * want.abs().max(), (run, step)


@pytest.mark.parametrize("branch", [0, 1, 3, 5])
def test_the_peers_own_package_gives_the_same_picture(branch: int) -> None:
    """DeepCache 0.1.1, where it is installed: equal interval and branch, a U-Net of two layers a stage."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper
    pipe = SD.build()
    pipe.unet = deeper()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.deep": {"every": 3, "branch": branch}}]})):
        ours = SD.call(pipe)
    peer = helper(pipe=pipe)
    peer.set_params(cache_interval=3, cache_branch_id=branch)
    peer.enable()
    theirs = SD.call(pipe)
    peer.disable()
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert not torch.equal(SD.call(pipe), ours)


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in UNETS])
def test_what_is_inside_does_not_run_between_key_steps(family: Any) -> None:
    """Counted by hooks on the convolutions themselves; the branch nearest the outside runs one layer of the way up."""
    pipe = family.build()
    (net,) = networks(pipe).values()
    unet = anatomy(net).unet
    assert unet is not None
    layers = [layer[0] for stage in (*unet.down, *unet.up) for layer in stage.layers]
    ran: Counter[int] = Counter()
    for i, layer in enumerate(layers):
        convolution = next(m for m in layer.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        convolution.register_forward_hook(lambda *_, i=i: ran.update([i]))
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.deep": {"every": 3}}]})):
        family.call(pipe)
    calls = ran[len(layers) - 1]
    assert {ran[i] * 3 for i in range(len(layers) - 1)} == {calls}


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in UNETS])
def test_deeper_branches_are_nearer_and_every_one_is_nothing(family: Any) -> None:
    pipe = family.build()
    plain = family.call(pipe)

    def off(**settings: int) -> float:
        with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.deep": settings}]})):
            return float((family.call(pipe) - plain).norm())

    assert off(every=1, branch=2) == 0
    assert 0 < off(every=2) < off(every=6)
    assert torch.equal(family.call(pipe), plain)


def test_a_new_size_or_batch_in_the_middle_of_a_trajectory_runs_in_full() -> None:
    net = _unet()
    x, text = torch.randn(3, 4, 24, 8), TEXT[:1].expand(3, -1, -1)
    with torch.no_grad():
        fresh = net(x, 500.0, text).sample
        with Deep(every=5).apply(net):
            with moment.at(Moment(0, 5, run=1)):
                net(inputs(0)[0], 900.0, TEXT)
            with moment.at(Moment(1, 5, run=1)):
                assert torch.equal(net(x, 500.0, text).sample, fresh)


def test_what_was_written_into_is_not_reused() -> None:
    """FreeU scales the features that an up block is given in place, which are those that were kept."""
    pipe = SD.build()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    with (
        hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.deep": {"every": 3, "branch": 2}}]})),
        pytest.raises(Refused, match=r"was written into afterwards, as FreeU does.*disable_freeu"),
    ):
        SD.call(pipe)
    pipe.disable_freeu()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.deep": {"every": 3, "branch": 2}}]})):
        SD.call(pipe)


def test_after_an_exception_the_next_picture_starts_clean() -> None:
    pipe = SD.build()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.deep": {"every": 3}}]})):
        want = SD.call(pipe)

        def stop(_: Any, step: int, *more: Any) -> Any:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            SD.call(pipe, callback_on_step_end=stop)
        assert torch.equal(SD.call(pipe), want)


def test_key_steps_are_densest_at_the_centre() -> None:
    for steps, every in ((50, 5), (28, 3), (10, 2), (6, 6), (3, 20)):
        for centre in (0.0, 0.3, 1.0):
            keys = sorted(key_steps(steps, every, centre, 1.4))
            assert keys[0] == 0
            assert keys[-1] < steps
            assert len(keys) <= -(-steps // every) + 1
    keys = sorted(key_steps(50, 5, 0.3, 1.4))
    gaps = {b: b - a for a, b in pairwise(keys)}
    assert gaps[min(gaps, key=lambda k: abs(k - 15))] < gaps[keys[-1]]
    assert sorted(key_steps(12, 3, 0.5, 1.0)) == [0, 3, 6, 9]


def test_networks_without_skips_and_branches_without_an_inside_are_refused() -> None:
    flux = next(f for f in FAMILIES if f.name == "flux").build()
    with pytest.raises(Refused, match=r"cache\.deep works on U-Nets"):
        hasten.accelerate(flux, Recipe.from_dict({"methods": ["cache.deep"]}))
    with pytest.raises(Refused, match="skip 30 of UNet2DConditionModel is not there"):
        Deep(branch=30).apply(_unet())


def test_whole_stages_are_held_where_they_can_be() -> None:
    """So that a step in between does not even join the tensors of what it skips."""
    unet = anatomy(deeper()).unet
    assert unet is not None
    held = list(inside(unet, 0))
    assert held[:4] == [*(s.module for s in unet.down), unet.middle]
    assert held[4:6] == [s.module for s in unet.up[:2]]
    assert all(isinstance(m, nn.Module) for m in held)
    assert len(held) == 4 + 2 + 2 * 2  # two of the last stage's three layers, each a residual block and a transformer
