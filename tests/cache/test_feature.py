"""FORA and FRDiff: what is kept is kept, all else goes on, against forwards written out; and the score mixing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from caches import ALL
from driven import AUTOCAST, Tiny, asked, behaves, drive, network, path, randn, same, serves
from families import _unet
from hasten import moment
from hasten.cache.feature import KINDS, Feature, mixed, parts, weight
from hasten.method import Refused

pytestmark = pytest.mark.system("frdiff")
STEPS = 7
TEXT = randn(2, 7, 24, seed=5)


def ask_unet(net: Any) -> Any:
    return lambda step, _: net(randn(2, 4, 16, 16, seed=step), 900.0 - 100 * step, encoder_hidden_states=TEXT).sample


class Slow:
    """A U-Net's residual and transformer blocks written out from FRDiff's description: at a step between, the kept
    branches are added to what came in."""

    def __init__(self, every: int, keep: tuple[str, ...]) -> None:
        self.every, self.keep = every, keep
        self.kept: dict[Any, Tensor] = {}

    def branch(self, kind: str, place: Any, run: Any) -> Tensor:
        if kind not in self.keep or moment.now().step % self.every == 0:
            self.kept[place] = run()
        return self.kept[place]

    def resnet(self, block: Any, x: Tensor, temb: Tensor) -> Tensor:
        def run() -> Tensor:
            h = block.conv1(nn.functional.silu(block.norm1(x)))
            h = h + block.time_emb_proj(nn.functional.silu(temb))[:, :, None, None]
            return block.conv2(nn.functional.silu(block.norm2(h)))

        through = x if block.conv_shortcut is None else block.conv_shortcut(x)
        return (through + self.branch("residual", block, run)) / block.output_scale_factor

    def transformer(self, block: Any, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.branch("attention", (block, 1), lambda: block.attn1(block.norm1(x)))
        x = x + self.branch("attention", (block, 2), lambda: block.attn2(block.norm2(x), context))
        return x + self.branch("feed_forward", (block, 3), lambda: block.ff(block.norm3(x)))


@pytest.mark.parametrize("keep", [KINDS, ("attention",), ("feed_forward",), ("residual",), ("attention", "residual")])
def test_on_a_unet_it_is_the_forward_written_out(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = _unet()
    with Feature(every=3, keep=keep).apply(net) as patch:
        said = drive(ask_unet(net), STEPS)["both"]
    assert patch.tally["ran"] * (STEPS - 3) == patch.tally["reused"] * 3
    slow = Slow(3, keep)
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, x, temb, *_, **__: slow.resnet(self, x, temb))
    monkeypatch.setattr(
        BasicTransformerBlock, "forward",
        lambda self, x, encoder_hidden_states, **__: slow.transformer(self, x, encoder_hidden_states),
    )  # fmt: skip
    want = drive(ask_unet(net), STEPS)["both"]
    for step, (a, b) in enumerate(zip(said, want, strict=True)):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max())), step


@torch.no_grad()
def slow_tiny(every: int, keep: tuple[str, ...]) -> list[Tensor]:
    """FORA on a DiT: attention and feed-forward kept, AdaLN's scale, shift and gate of the present step."""
    net, kept, out = Tiny(), dict[Any, Tensor](), []
    for step in range(STEPS):
        x, emb = path(step), torch.tanh(net.time(torch.tensor([[1 - 0.03 * step]])))
        for i, block in enumerate(net.transformer_blocks):
            scale, shift, gate = block.modulate(emb).chunk(3, -1)
            if step % every == 0 or "attention" not in keep:
                kept[i, "a"] = block.attn1(block.norm1(x) * (1 + scale) + shift)
            x = x + gate * kept[i, "a"]
            if step % every == 0 or "feed_forward" not in keep:
                kept[i, "f"] = block.ff(block.norm2(x))
            x = x + kept[i, "f"]
        out.append(x)
    return out


@pytest.mark.parametrize("keep", [("attention", "feed_forward"), ("attention",), ("feed_forward",)])
def test_on_a_dit_gates_are_those_of_the_present_step(keep: Any) -> None:
    net = Tiny()
    with Feature(every=3, keep=keep).apply(net):
        said = drive(asked(net), STEPS)["both"]
    for a, b in zip(said, slow_tiny(3, keep), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def counts(net: nn.Module, modules: list[nn.Module], ask: Any, method: Feature) -> list[int]:
    """How often each runs within a trajectory; a module whose output is given again does not run its children."""
    ran: Counter[int] = Counter()
    handles = []
    for i, m in enumerate(modules):
        inner = next((c for c in m.modules() if not list(c.children()) and c is not m), m)
        handles.append(inner.register_forward_hook(lambda *_, i=i: ran.update([i])))
    with method.apply(net):
        drive(ask, STEPS)
    for h in handles:
        h.remove()
    return [ran[i] for i in range(len(modules))]


def test_norms_time_and_shortcuts_go_on_at_every_step() -> None:
    net: Any = _unet()
    on = [net.time_embedding.linear_1]
    off = []
    for m in net.modules():
        if isinstance(m, ResnetBlock2D):
            on += [m.norm1, m.norm2, m.time_emb_proj] + ([m.conv_shortcut] if m.conv_shortcut is not None else [])
        if isinstance(m, BasicTransformerBlock):
            on += [m.norm1, m.norm2, m.norm3]
            off += [m.attn1, m.attn2, m.ff]
    assert counts(net, on, ask_unet(net), Feature(every=3)) == [STEPS] * len(on)
    assert counts(net, off, ask_unet(net), Feature(every=3)) == [3] * len(off)


def test_what_is_kept_in_each_kind_of_block() -> None:
    flux: Any = network("flux")
    single = flux.single_transformer_blocks[0]
    both, attention, feed = (set(parts(flux, k)) for k in (KINDS, ("attention",), ("feed_forward",)))
    assert {single.attn, single.proj_mlp, single.proj_out} <= both  # the branch is one: its joint projection
    assert single.attn in attention and not {single.proj_mlp, single.proj_out} & attention
    assert single.proj_mlp in feed and not {single.attn, single.proj_out} & feed
    double = flux.transformer_blocks[0]
    assert {double.attn, double.ff, double.ff_context} <= both
    sd: Any = network("sd")
    resnets = [m for m in sd.modules() if isinstance(m, ResnetBlock2D)]
    assert set(parts(sd, ("residual",))) == {c for m in resnets for c in (m.conv1, m.conv2)}
    with pytest.raises(Refused, match=r"cache\.feature finds no residual in .*take cache\.interval"):
        Feature(keep=("residual",)).apply(flux)


@pytest.mark.parametrize("every", [1, 2])
def test_all_key_steps_are_the_baseline_with_any_mixing(every: int) -> None:
    net = Tiny()
    plain = drive(asked(net), STEPS)["both"]
    with Feature(every=every, mix=0.5).apply(net) as patch:
        said = drive(asked(net), STEPS)["both"]
        assert [torch.equal(a, b) for a, b in zip(said, plain, strict=True)] == [s % every == 0 for s in range(STEPS)]
        assert bool(patch.sites) == (every > 1)


def test_the_weight_is_the_authors_ramp() -> None:
    assert weight(0.5, 0.5, 30.0) == 0.5
    assert weight(0.5 + 1 / 30, 0.5, 30.0) == pytest.approx(0.75)
    assert weight(0.5 + 2 / 30 + 1e-9, 0.5, 30.0) == 1.0 and weight(0.5 - 2 / 30 - 1e-9, 0.5, 30.0) == 0.0
    assert {weight(s / 9, -0.1, t) for s in range(10) for t in (20.0, 30.0, 200.0)} == {1.0}
    assert {weight(s / 9, 1.1, t) for s in range(9) for t in (20.0, 30.0, 200.0)} == {0.0}


def test_weight_1_is_feature_reuse_alone_and_weight_0_fewer_steps_alone() -> None:
    net = Tiny()
    plain = drive(asked(net), STEPS)["both"]
    with Feature(every=3).apply(net):
        alone = drive(asked(net), STEPS)["both"]
    with Feature(every=3, mix=1.1).apply(net) as patch:
        fewer = drive(asked(net), STEPS)["both"]
        assert patch.tally["answered"] == STEPS - 3
        assert patch.tally["reused"] == 0  # the network is not asked at all
    assert same(fewer, [plain[s - s % 3] for s in range(STEPS)])
    with Feature(every=3, mix=0.0).apply(net):  # from the second step on its weight is one
        assert same(drive(asked(net), STEPS)["both"], alone)
    with Feature(every=3, mix=0.5, temperature=20.0).apply(net):
        mixing = drive(asked(net), STEPS)["both"]
    for s in range(STEPS):
        w = weight(s / STEPS, 0.5, 20.0)
        want = plain[s] if s % 3 == 0 else w * alone[s] + (1 - w) * plain[s - s % 3]
        assert torch.allclose(mixing[s], want, atol=1e-6)
    assert 0 < weight(4 / STEPS, 0.5, 20.0) < 1  # so one of them mixed


def test_mixing_keeps_the_container() -> None:
    net: Any = _unet()

    def ask(step: int, _: str) -> Any:
        x = randn(2, 4, 16, 16, seed=step)
        whole = net(x, 500.0, encoder_hidden_states=TEXT)
        assert type(whole).__name__ == "UNet2DConditionOutput"
        return whole.sample

    with Feature(every=4, mix=0.5, temperature=20.0).apply(net):
        drive(ask, STEPS)
    a, b = torch.ones(2), torch.zeros(2)
    assert mixed((a, [a], None), (b, [b], None), 0.25)[1][0].tolist() == [0.25, 0.25]
    assert mixed({"x": a}, {"x": b}, 0.75)["x"].tolist() == [0.75, 0.75]


def test_reused_features_follow_the_state_closer_than_fewer_steps() -> None:
    """On a smoothly moving state, what FRDiff reuses errs less than giving the last answer again."""
    net = Tiny()
    plain = drive(asked(net), 12)["both"]
    error = {}
    for mix in (-0.1, 1.1):
        with Feature(every=3, mix=mix).apply(net):
            said = drive(asked(net), 12)["both"]
        error[mix] = sum(float((a - b).square().mean()) for a, b in zip(said, plain, strict=True))
    assert error[-0.1] < 0.6 * error[1.1]


@pytest.mark.parametrize("mix", [-0.1, 0.5, 1.1])
def test_it_keeps_the_contract_of_a_cache(mix: float) -> None:
    behaves(Feature(every=3, mix=mix))


@AUTOCAST
@pytest.mark.parametrize("name", ALL)
def test_every_family(name: str) -> None:
    serves(Feature(every=2), Feature(every=1), name)


@AUTOCAST
@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_mixing_in_pipelines(name: str) -> None:
    serves(Feature(every=2, mix=0.3), Feature(every=1, mix=0.3), name)
