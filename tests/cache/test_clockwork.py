"""Clockwork against its description, written out on a U-Net's own modules, and its adaptor, which learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hasten
from caches import ALL, built, comes_clean, counted, driven, neutral, on
from digits_unet import NOTHING, WIDTH, WORDS, trained
from families import _unet
from hasten import Recipe, moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.cache.adaptor import Adaptor, Sizes
from hasten.cache.clockwork import Clockwork, Trajectories, below, watch
from hasten.measure.flops import count
from hasten.method import Refused
from hasten.moment import Moment
from hasten.objectives.distill.clockwork import ModelStep
from hasten.train.loop import train
from hasten.train.optimizer import adamw

UNETS = {"sd", "sdxl", "ddpm", "svd", "animatediff"}
TEXT = {n: torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(("cond", "uncond"))}
STEPS = 8
pytestmark = [pytest.mark.system("clockwork"), pytest.mark.filterwarnings("ignore:In CPU autocast")]


def state(step: int, side: int = 16) -> Tensor:
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(step))


def time(step: int) -> Tensor:
    return torch.tensor(900.0 - 100 * step)


def call(branch: str, side: int = 16) -> Any:
    return lambda step: ((state(step, side), time(step)), {"encoder_hidden_states": TEXT[branch]})


def deeper() -> Any:
    return _unet(
        block_out_channels=(16, 32, 32), layers_per_block=2, attention_head_dim=(2, 4, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def awake(sizes: Sizes) -> Adaptor:
    """Whose every weight says something."""
    torch.manual_seed(3)
    adaptor = Adaptor(sizes)
    for p in adaptor.parameters():
        nn.init.normal_(p, std=0.1)
    return adaptor.eval()


def phi(a: Adaptor, r_in: Tensor, before: Tensor, temb: Tensor, text: Tensor | None) -> Tensor:
    """The adaptor, layer by layer: sec. 4.2 of the paper."""
    joined = torch.cat([r_in.repeat_interleave(2, 2).repeat_interleave(2, 3), before], 1)
    h = F.conv2d(joined, a.down.weight, a.down.bias, stride=2, padding=1)
    if text is not None:
        assert a.text is not None
        h = h + F.linear(text, a.text.weight, a.text.bias)[:, :, None, None]
    for b in a.blocks:
        inner: Any = b
        x = inner.conv1(F.silu(inner.norm1(h))) + inner.time(F.silu(temb))[:, :, None, None]
        h = h + inner.conv2(F.silu(inner.norm2(x)))
    return before + F.conv_transpose2d(h, a.up.weight, a.up.bias, stride=2, padding=1)


@torch.no_grad()
def slowly(net: Any, clock: int, level: int, text: Tensor, adaptor: Adaptor | None = None) -> list[Tensor]:
    """The paper's sec. 4.3: high-resolution input module, the low-resolution part or the adaptor, output module."""
    said, r_out = [], torch.empty(0)
    for step in range(STEPS):
        emb = net.time_embedding(net.time_proj(time(step).expand(2)))
        h = net.conv_in(state(step))
        skips: tuple[Tensor, ...] = (h,)

        def given(block: Any, emb: Tensor = emb) -> Any:
            return {"temb": emb} | ({"encoder_hidden_states": text} if hasattr(block, "attentions") else {})

        for block in net.down_blocks[:level]:
            h, taken = block(hidden_states=h, **given(block))
            skips += taken
        if step % clock == 0:
            outer, r_in = len(skips), h
            for block in net.down_blocks[level:]:
                h, taken = block(hidden_states=h, **given(block))
                skips += taken
            h = net.mid_block(h, emb, encoder_hidden_states=text)
            for block in net.up_blocks[: len(net.up_blocks) - level]:
                used = len(block.resnets)
                h = block(hidden_states=h, res_hidden_states_tuple=skips[-used:], **given(block))
                skips = skips[:-used]
            r_out = h
            assert len(skips) == outer - 1  # its last layer has read the skip that r_in is
        else:
            r_in = h
            r_out = r_out if adaptor is None else phi(adaptor, r_in, r_out, emb, text.mean(1))
            skips = skips[:-1]
        h = r_out
        for block in net.up_blocks[len(net.up_blocks) - level :]:
            used = len(block.resnets)
            h = block(hidden_states=h, res_hidden_states_tuple=skips[-used:], **given(block))
            skips = skips[:-used]
        said.append(net.conv_out(net.conv_act(net.conv_norm_out(h))))
    return said


@pytest.mark.parametrize("learned", [False, True], ids=["identity", "adaptor"])
@pytest.mark.parametrize(("clock", "level"), [(2, 1), (3, 1), (2, 2), (4, 2)])
def test_each_step_is_the_papers(clock: int, level: int, learned: bool, tmp_path: Path) -> None:
    """Of two branches called in turn; above a clock of two the adaptor goes on from its own last output."""
    net, file, adaptor = deeper(), "", None
    if learned:
        out, into = (32, 16) if level == 1 else (32, 32)
        adaptor, file = awake(Sizes(level, into, out, 64, 24, 8)), str(tmp_path / "a.safetensors")
        adaptor.write(file)
    want = {b: slowly(net, clock, level, TEXT[b], adaptor) for b in TEXT}
    with Clockwork(clock=clock, level=level, adaptor=file).apply(net):
        got = driven(net, {b: call(b) for b in TEXT}, STEPS, 1)
        again = driven(net, {"cond": call("cond")}, STEPS, 2)
    for b in TEXT:
        for step in range(STEPS):
            assert (got[b][step] - want[b][step]).abs().max() <= 1e-5 * want[b][step].abs().max(), (b, step)
    assert all(map(torch.equal, got["cond"], again["cond"]))
    assert all(torch.equal(got["cond"][s], net(state(s), time(s), TEXT["cond"]).sample) for s in range(0, STEPS, clock))


def test_a_clock_of_one_is_the_baseline_in_every_u_net_and_others_are_refused() -> None:
    assert neutral("cache.clockwork") == UNETS


@pytest.mark.parametrize("name", sorted(UNETS & {"sd", "svd"}))
def test_pictures_leave_nothing_behind(name: str) -> None:
    comes_clean("cache.clockwork", name, clock=3)


@pytest.mark.parametrize("learned", [False, True], ids=["identity", "adaptor"])
def test_eight_steps_of_dpm_solver_pp_save_the_flops_that_the_tally_says(learned: bool, tmp_path: Path) -> None:
    """A clock of two: the low-resolution part runs at four steps of eight, and what is saved is four times what it
    costs, less what the adaptor costs."""
    pipe, _ = built("sd")
    family, given = ALL["sd"], {"num_inference_steps": 8}
    (net,) = networks(pipe).values()
    eight = Recipe(solver="dpmpp_2m", steps=8)
    with hasten.accelerate(pipe, eight):
        plain, whole = family.call(pipe, **given), count(lambda: family.call(pipe, **given))
    method, light = Clockwork(clock=2), 0
    if learned:
        adaptor = awake(Sizes(1, 16, 32, 64, 24, 8))
        adaptor.write(tmp_path / "a.safetensors")
        method = Clockwork(clock=2, adaptor=str(tmp_path / "a.safetensors"))
        features = torch.randn(2, 16, 8, 8), torch.randn(2, 32, 16, 16), torch.randn(2, 64), torch.randn(2, 24)
        light = count(lambda: adaptor(*features))
        assert light > 0
    low = sum(cost for _, cost in costs(net, below(net, 1)))
    with hasten.accelerate(pipe, Recipe(solver="dpmpp_2m", steps=8, methods=(method,))) as handle:
        drawn = family.call(pipe, **given)
        tally = handle.patches[0][1].tally
        parts = len(below(net, 1))
        assert dict(tally) == {"ran": 4 * parts, "reused": 4 * parts}
        times = tally["reused"] // parts
        spent = count(lambda: family.call(pipe, **given))
    assert whole - spent == times * (low - light)
    assert 0 < (drawn - plain).norm() < plain.norm()
    assert torch.equal(family.call(pipe), built("sd")[1])


@torch.no_grad()
def costs(net: Any, modules: list[nn.Module]) -> list[tuple[nn.Module, int]]:
    """FLOPs of each module in one call of the network, on both halves of a batch."""
    seen: dict[nn.Module, Any] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, k: seen.__setitem__(m, (a, k)), with_kwargs=True) for m in modules
    ]
    net(torch.cat([state(0)[:1]] * 2), time(0), TEXT["cond"])
    for h in hooks:
        h.remove()
    return [(m, count(lambda m=m: m(*seen[m][0], **seen[m][1]))) for m in modules]  # type: ignore[misc]


@pytest.mark.parametrize("clock", [1, 2, 3, 5])
def test_the_low_resolution_part_runs_by_the_clock_and_the_rest_at_every_step(clock: int) -> None:
    pipe, _ = built("sd")
    unet = anatomy(pipe.unet).unet
    assert unet is not None and unet.middle is not None
    convolutions = [pipe.unet.mid_block.resnets[0].conv1, pipe.unet.up_blocks[0].upsamplers[0].conv]
    outer = [pipe.unet.conv_in, pipe.unet.down_blocks[0].downsamplers[0].conv, pipe.unet.up_blocks[1].resnets[0].conv1]
    with on(pipe, "cache.clockwork", clock=clock):
        for module in convolutions:
            with counted(module) as calls:
                ALL["sd"].call(pipe)
            assert [m.step for m, _ in calls] == list(range(0, 6, clock))
        for module in outer:
            with counted(module) as calls:
                ALL["sd"].call(pipe)
            assert [m.step for m, _ in calls] == list(range(6))


def test_an_untrained_adaptor_is_the_identity_bit_for_bit(tmp_path: Path) -> None:
    Adaptor(Sizes(1, 16, 32, 64, 24, 8)).write(tmp_path / "a.safetensors")
    pipe, _ = built("sd")
    with on(pipe, "cache.clockwork"):
        identity = ALL["sd"].call(pipe)
    with on(pipe, "cache.clockwork", adaptor=str(tmp_path / "a.safetensors")):
        assert torch.equal(ALL["sd"].call(pipe), identity)


def test_gradients_pass_through_the_adaptor_to_the_state_and_not_to_its_weights(tmp_path: Path) -> None:
    """Guidance by an energy asks for them: of one of the steps in between they are those of the written-out part."""
    awake(Sizes(1, 16, 32, 64, 24, 8)).write(tmp_path / "a.safetensors")
    net = _unet()
    with Clockwork(adaptor=str(tmp_path / "a.safetensors")).apply(net):
        driven(net, {"cond": call("cond")}, 1, 1)
        x = state(1).requires_grad_()
        with moment.at(Moment(1, 2, run=1, branch="cond")):
            said = net(x, time(1), TEXT["cond"]).sample
            (slope,) = torch.autograd.grad(said.square().sum(), x)
            step = 1e-2 * slope / slope.norm()
    assert slope.abs().max() > 0

    def energy(x: Tensor) -> float:
        with Clockwork(adaptor=str(tmp_path / "a.safetensors")).apply(net), torch.no_grad():
            driven(net, {"cond": call("cond")}, 1, 2)
            with moment.at(Moment(1, 2, run=2, branch="cond")):
                return float(net(x, time(1), TEXT["cond"]).sample.double().square().sum())

    found = energy(x + step) - energy(x - step)
    assert abs(found / (2 * float((slope * step).sum())) - 1) < 0.02


SHAPES = [(2, 3, 3, 2), (2, 5, 6, 4), (2, 7)]


def test_an_adaptor_hears_the_time_the_words_and_both_features() -> None:
    """Each alone changes what it says, also where it is narrow."""
    a = awake(Sizes(1, 3, 5, 7, 4, 8))
    given = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate([*SHAPES, (2, 4)])]
    said = a(*given)
    for i in range(4):
        other = [g + (i == j) for j, g in enumerate(given)]
        moved = a(*other) - said - float(i == 1)
        assert moved.abs().max() > 1e-3


def test_an_adaptor_serves_odd_sides_and_networks_without_words() -> None:
    a = awake(Sizes(1, 3, 5, 7, 0, 8))
    for width in (1, 3, 8, 9, 64):
        assert Adaptor(Sizes(1, 3, 5, 7, 0, width))(*map(torch.ones, SHAPES)).shape == (2, 5, 6, 4)
    for h, w in ((5, 7), (6, 4), (1, 1)):
        r_in, before, temb = torch.randn(2, 3, -(-h // 2), -(-w // 2)), torch.randn(2, 5, h, w), torch.randn(2, 7)
        assert a(r_in, before, temb).shape == before.shape
        if h % 2 == w % 2 == 0:
            assert torch.allclose(a(r_in, before, temb), phi(a, r_in, before, temb, None), atol=1e-5)


def test_an_adaptors_file_is_read_back_and_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    a, net = awake(Sizes(1, 16, 32, 64, 24, 8)), _unet()
    a.write(tmp_path / "a.safetensors")
    b = Adaptor.read(tmp_path / "a.safetensors")
    assert b.sizes == a.sizes and not b.training
    assert all(torch.equal(b.state_dict()[k], v) for k, v in a.state_dict().items())
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    for file, said in (("b", "holds no adaptor"), ("c", "cannot be read")):
        with pytest.raises(Refused, match=said):
            Clockwork(adaptor=str(tmp_path / f"{file}.safetensors")).apply(net)
    with pytest.raises(Refused, match="is for level 1: set level to that"):
        Clockwork(level=2, adaptor=str(tmp_path / "a.safetensors")).apply(deeper())
    with pytest.raises(Refused, match=r"so nothing lies below level 2: take a lower level"):
        Clockwork(level=2).apply(net)
    assert not any("forward" in vars(m) for m in net.modules())
    wider = _unet(block_out_channels=(16, 48))
    with (
        Clockwork(adaptor=str(tmp_path / "a.safetensors")).apply(wider),
        pytest.raises(Refused, match=r"this adaptor is for .* and here are .*: train one on this network"),
    ):
        driven(wider, {"cond": call("cond")}, 2, 1)


def test_an_adaptor_is_refused_where_frames_are_drawn(tmp_path: Path) -> None:
    awake(Sizes(1, 16, 32, 64, 24, 8)).write(tmp_path / "a.safetensors")
    pipe, before = built("svd")
    with (
        on(pipe, "cache.clockwork", adaptor=str(tmp_path / "a.safetensors")),
        pytest.raises(Refused, match="leave `adaptor` empty"),
    ):
        ALL["svd"].call(pipe)
    assert torch.equal(ALL["svd"].call(pipe), before)


@pytest.mark.parametrize("learned", [False, True], ids=["identity", "adaptor"])
def test_what_was_written_into_is_not_reused(learned: bool, tmp_path: Path) -> None:
    """As FreeU does with what an up block is given."""
    file = ""
    if learned:
        file = str(tmp_path / "a.safetensors")
        awake(Sizes(1, 16, 32, 64, 24, 8)).write(file)
    net: Any = _unet()
    plain = net.up_blocks[1].forward

    def writes(hidden_states: Tensor, **more: Any) -> Any:
        hidden_states[:, :4] *= 1.1
        return plain(hidden_states=hidden_states, **more)

    net.up_blocks[1].forward = writes
    with Clockwork(adaptor=file).apply(net), pytest.raises(Refused, match=r"was written into .*disable_freeu"):
        driven(net, {"cond": call("cond")}, 2, 1)


def double(x: Tensor) -> None:
    x.mul_(2)


def test_watching_changes_no_bit_and_notes_the_steps_at_which_the_adaptor_will_stand_in() -> None:
    """Each row is what reached the part, what it returned, and what it had returned at the step before; not what a
    later stage, as under FreeU, makes of it."""
    net, seen = deeper(), list[Tensor]()
    net.up_blocks[2].register_forward_pre_hook(lambda m, a, k: double(k["hidden_states"]), with_kwargs=True)
    plain = driven(net, {b: call(b) for b in TEXT}, STEPS, 1)
    last = net.up_blocks[1]
    hook = last.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    patch, found = watch(net, Clockwork(clock=3))
    for run in (1, 2):
        got = driven(net, {b: call(b) for b in TEXT}, STEPS, run)
        assert all(torch.equal(x, y) for b in TEXT for x, y in zip(got[b], plain[b], strict=True))
    hook.remove()
    patch.remove()
    assert not any("forward" in vars(m) for m in net.modules())
    steps = [s for s in range(STEPS) if s % 3]
    assert {k: len(v) for k, v in found.rows.items()} == dict.fromkeys(found.rows, 2 * 2 * len(steps))
    for i, (s, b) in enumerate((s, b) for s in steps for b in TEXT):
        at = 2 * s + list(TEXT).index(b)
        assert torch.equal(found.rows["r_out"][i], seen[at])
        assert torch.equal(found.rows["before"][i], seen[at - 2])
        assert torch.equal(found.rows["text"][i], TEXT[b].mean(1))
        emb = net.time_embedding(net.time_proj(time(s).expand(2)))
        assert torch.equal(found.rows["temb"][i], emb)
        h, _ = net.down_blocks[0](hidden_states=net.conv_in(state(s)), temb=emb, encoder_hidden_states=TEXT[b])
        assert torch.equal(found.rows["r_in"][i], h)
    with pytest.raises(ValueError, match="nothing was watched yet"):
        Trajectories(1).adaptor()


def test_the_loss_is_the_mean_square_and_reaches_the_adaptor_alone() -> None:
    net = _unet()
    patch, found = watch(net, Clockwork())
    driven(net, {"cond": call("cond")}, STEPS, 1)
    patch.remove()
    assert len(found.rows["r_out"]) == STEPS // 2
    adaptor = awake(found.adaptor(8).sizes)
    rng = torch.Generator().manual_seed(0)
    batch = found.batch(5)(0, rng)
    assert {k: len(v) for k, v in batch.items()} == dict.fromkeys(("r_in", "r_out", "before", "temb", "text"), 5)
    (phase,) = ModelStep().phases()
    assert phase.trains == ("adaptor",)
    loss = phase.loss({"adaptor": adaptor}, batch, rng)
    said = phi(adaptor, batch["r_in"], batch["before"], batch["temb"], batch["text"])
    assert torch.allclose(loss, (batch["r_out"] - said).square().mean(), rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adaptor.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_the_loss_is_zero_where_the_low_resolution_features_do_not_change() -> None:
    """A part whose last convolution is dead returns its bias at every step; alive, it does not."""
    for dead in (True, False):
        net: Any = _unet()
        if dead:
            nn.init.zeros_(net.up_blocks[0].upsamplers[0].conv.weight)
        patch, found = watch(net, Clockwork())
        driven(net, {"cond": call("cond")}, STEPS, 1)
        patch.remove()
        rng = torch.Generator().manual_seed(0)
        loss = ModelStep().loss({"adaptor": found.adaptor(8)}, found.batch(16)(0, rng), rng)
        assert (loss == 0) if dead else (loss > 1e-4)


@torch.no_grad()
def unroll(prompts: Tensor, seed: int, run: int) -> tuple[Tensor, Tensor]:
    """Eight Euler steps of the trained network from noise, guided by 2: what it says at each [8, N, 1, 8, 8], and the
    digits. Prompts are [N, WORDS * WIDTH]."""
    net, words = trained()
    x = torch.randn(len(prompts), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    nothing = words(torch.full((len(prompts),), NOTHING))
    text, said = torch.cat([nothing, prompts]).unflatten(1, (WORDS, WIDTH)), []
    for step in range(STEPS):
        t = 1 - step / STEPS
        with moment.at(Moment(step, STEPS, t, run)):
            u, c = net(torch.cat([x, x]), torch.tensor(1000 * t), encoder_hidden_states=text).sample.chunk(2)
        said.append(u + 2 * (c - u))
        x = x - said[-1] / STEPS
    return torch.stack(said), x


def test_on_digits_a_trained_adaptor_is_nearer_to_the_full_model_than_the_identity(tmp_path: Path) -> None:
    """80 steps of the house's loop on trajectories unrolled from noise with the ten names; then, from other noise, with
    those names and with prompts half way between two of them, the mean square error against the full model of what the
    network says at all steps, and of the digits."""
    net, words = trained()
    with torch.no_grad():
        names = words(torch.arange(30) % 10)
        between = (names + names.roll(3, 0)) / 2
    patch, found = watch(net, Clockwork())
    for seed in range(20):
        unroll(names, seed, run=seed + 1)
    patch.remove()
    torch.manual_seed(0)
    nets = train(
        ModelStep(), {"adaptor": found.adaptor(32)}, found.batch(64), optimizers=lambda nets: adamw(nets, 1e-3),
        rate=lambda step: min(1.0, 2 * (1 - step / 80)), until=80, folder=tmp_path, decay=0.8, every=1000, device="cpu",
    )  # fmt: skip
    file, adaptor = str(tmp_path / "a.safetensors"), nets["adaptor"]
    assert isinstance(adaptor, Adaptor)
    adaptor.write(file)
    for prompts in (names, between):
        full, digits = unroll(prompts, 100, run=1)

        def errors(method: Clockwork, prompts: Tensor = prompts, full: Tensor = full) -> Tensor:
            with method.apply(net):
                said, drawn = unroll(prompts, 100, run=2)
            assert torch.equal(said[0], full[0])
            return torch.stack([(said - full).square().mean(), (drawn - digits).square().mean()])  # noqa: B023

        share = errors(Clockwork(adaptor=file)) / errors(Clockwork())
        assert share.max() < 0.7
