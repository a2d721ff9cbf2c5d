"""SIGE: edits of a recorded picture against whole networks, layer by layer and picture by picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, UNet2DModel
from torch import Tensor, nn

from caches import ALL, Broken, breaking, built, driven, neutral, on
from families import _awake, _unet, sd, sd_inputs
from hasten import moment
from hasten.cache.original import Original
from hasten.cache.sige import PLACE, Sige, recording
from hasten.grid import nodes
from hasten.measure.flops import count
from hasten.method import Refused
from hasten.moment import Moment
from hasten.paths.flow import Flow
from pipelines import PIPELINES

TEXT = {n: torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(("cond", "uncond"))}
STEPS = 4
FIRST: dict[str, Any] = {"original": "first"}
pytestmark = [pytest.mark.system("sige"), pytest.mark.filterwarnings("ignore:In CPU autocast")]

State = Callable[[int], Tensor]


def state(step: int) -> Tensor:
    return torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(step))


def edited(top: int = 9, left: int = 13, size: int = 7, by: float = 1.0) -> State:
    """5 % of 32 x 32 pixels, unless told otherwise."""

    def of(step: int) -> Tensor:
        x = state(step)
        x[:, :, top : top + size, left : left + size] += by
        return x

    return of


def call(of: State, branch: str = "cond", text: Tensor | None = None) -> Any:
    given = TEXT[branch] if text is None else text
    return lambda step: ((of(step), torch.tensor(900.0 - 100 * step)), {"encoder_hidden_states": given})


def draw(net: Any, of: State, run: int, steps: int = STEPS, **told: Any) -> list[Tensor]:
    return driven(net, {"cond": call(of)}, steps, run, **told)["cond"]


def plain(net: Callable[[], Any], of: State) -> list[Tensor]:
    return draw(net(), of, 1)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Convolutions(nn.Module):
    """A U-Net of convolutions alone, in double precision: no norm looks at the whole picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: Any = UNet2DModel(
            in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None,
            downsample_padding=self.padding,
        )  # fmt: skip
        for module in list(self.net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
        _awake(self.net.double())

    padding = 1


class Unpadded(Convolutions):
    """Which pads by one on two sides before it halves."""

    padding = 0


@contextmanager
def outputs(net: nn.Module, kind: type[nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The last output of each layer of a kind, by name."""
    found: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda m, a, out, name=name: found.__setitem__(name, out.clone()))
        for name, m in net.named_modules()
        if isinstance(m, kind)
    ]
    try:
        yield found
    finally:
        for h in hooks:
            h.remove()


def test_neutral_is_exact_in_every_u_net_of_pictures_and_others_are_refused() -> None:
    assert neutral("cache.sige") == {"sd", "sdxl", "ddpm"}


def test_without_an_original_it_is_refused_with_what_to_do() -> None:
    net = _unet()
    with pytest.raises(Refused, match=r"set `original` to first, draw the original, then its edits"):
        Sige().apply(net)
    with pytest.raises(Refused, match=r"cache\.sige is not on this .*: put a recipe with it"), recording(net):
        pass
    svd = next(f for f in PIPELINES if f.name == "svd").build()
    with pytest.raises(Refused, match=r"take cache\.interval"):
        Sige(original="first").apply(svd.unet)


@pytest.mark.parametrize("name", ["sd", "sdxl", "ddpm"])
def test_the_original_is_drawn_as_ever_and_a_picture_without_an_edit_is_it_bit_for_bit(name: str) -> None:
    """What a pipeline is asked for again, nothing is computed for; taken off, all is as before."""
    pipe, before = built(name)
    with on(pipe, "cache.sige", **FIRST) as handle:
        tally = handle.patches[0][1].tally
        assert torch.equal(ALL[name].call(pipe), before)
        ran = tally["ran"]
        assert ran > 0 and tally["reused"] == 0
        assert torch.equal(ALL[name].call(pipe), before)
        assert (tally["ran"], tally["reused"]) == (ran, ran)
        assert f"bytes {vars(pipe.unet)[PLACE].original.bytes}" in str(handle)
    assert torch.equal(ALL[name].call(pipe), before)
    assert PLACE not in vars(pipe.unet)


@pytest.mark.parametrize("settings", [{}, {"tile": 3}, {"tile": 6, "dilation": 2}, {"tile": 1, "dilation": 0}])
def test_unedited_tiles_are_the_originals_bit_for_bit_in_every_layer(settings: dict[str, int]) -> None:
    """In every convolution: all but the tiles that read a pixel of the mask of its resolution."""
    net: Any = _unet()
    with Sige(**FIRST, **settings).apply(net), outputs(net, nn.Conv2d) as seen:
        old, layers = draw(net, state, 1), dict(seen)
        new = draw(net, edited(), 2)
        tile, dilation = settings.get("tile", 4), settings.get("dilation", 1)
        for name, before in layers.items():
            moved = (seen[name] != before).flatten(0, 1).any(0)
            assert moved.any()
            share = 32 // moved.shape[0]  # how much coarser it is
            rows, columns = moved.nonzero().T
            reach = dilation + 2 + tile  # the halo, also of a layer that halves, and its tile
            assert rows.min() >= 9 // share - reach and rows.max() <= 15 // share + reach, name
            assert columns.min() >= 13 // share - reach and columns.max() <= 19 // share + reach, name
    for a, b in zip(old, new, strict=True):
        same_here = (a == b).flatten(0, 1).all(0)
        assert 0.3 < same_here.float().mean() < 0.95
        assert not same_here[9:16, 13:20].any()


@pytest.mark.parametrize("build", [Convolutions, Unpadded])
@torch.no_grad()
def test_of_convolutions_alone_the_error_is_zero_where_the_receptive_field_is_covered(build: Any) -> None:
    """An edit in the corner of 96 x 96 pixels, and as much around it as the network reaches; with less there is an
    error, which falls as more is covered, and yet none in the first layer's tiles."""
    net = build().net
    plain = build().net

    def wide(by: float) -> Tensor:
        x = torch.randn(1, 4, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x[:, :, 1:4, 2:5] += by
        return x

    want, reached = plain(wide(1.0), 500.0).sample, 0.0
    errors = {}
    for dilation in (0, 1, 4, 24):
        with Sige(**FIRST, dilation=dilation).apply(net) as patch, outputs(net.conv_in, nn.Conv2d) as first:
            with moment.at(Moment(0, 1, run=1)):
                net(wide(0.0), 500.0)
            full = patch.tally["ran"]
            with moment.at(Moment(0, 1, run=2)):
                got = net(wide(1.0), 500.0).sample
            assert (first[""] - plain.conv_in(wide(1.0))).abs().max() < 1e-12
            errors[dilation] = float((got - want).abs().max())
            reached = (patch.tally["ran"] - full) / full
    assert errors[0] > errors[1] > errors[4] > 1e-9
    assert errors[24] < 1e-12
    assert reached < 0.3  # it was not all computed


@pytest.mark.parametrize("most", [0.9, 1.0])
def test_an_edit_of_everything_is_the_whole_network(most: float) -> None:
    """Bit for bit, and in full from there on."""
    want = plain(_unet, edited(0, 0, 32))
    net = _unet()
    with Sige(**FIRST, most=most).apply(net) as patch:
        draw(net, state, 1)
        assert same(draw(net, edited(0, 0, 32), 2), want)
        assert patch.tally["reused"] == 0
        draw(net, edited(), 3)
        assert patch.tally["reused"] > 0


@pytest.mark.parametrize("kind", ["attention", "ddpm", "linear projections", "convolutions"])
@torch.no_grad()
def test_of_a_five_per_cent_edit_the_multiply_adds_fall_as_counted(kind: str) -> None:
    """What torch counts less is twice what the tally says was reused, for one step of one sample."""
    nets: dict[str, Callable[[], Any]] = {
        "attention": _unet,
        "linear projections": lambda: _unet(use_linear_projection=True),
        "ddpm": lambda: next(f for f in ALL.values() if f.name == "ddpm").build().unet,
        "convolutions": lambda: Convolutions().net,
    }
    net = nets[kind]()
    channels, dtype = net.config.in_channels, next(net.parameters()).dtype

    def ask(by: float, run: int) -> Callable[[], Any]:
        x = torch.randn(1, channels, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)
        x[:, :, 9:16, 13:20] += by
        more = {"encoder_hidden_states": TEXT["cond"][:1]} if isinstance(net, type(_unet())) else {}

        def go() -> Any:
            with moment.at(Moment(0, 1, run=run)):
                return net(x, 500.0, **more).sample

        return go

    with Sige(**FIRST).apply(net) as patch:
        dense = count(ask(0, 1))
        full = patch.tally["ran"]
        sparse = count(ask(1, 2))
        ran, reused = patch.tally["ran"] - full, patch.tally["reused"]
    assert ran + reused == full
    assert dense - sparse == 2 * reused
    assert ran < 0.5 * full
    rest = 0  # what no tile has a share in: the time's path, once, and keys and values of the seven words
    for name, m in net.named_modules():
        if isinstance(m, nn.Linear) and ("time_emb" in name or "attn2.to_k" in name or "attn2.to_v" in name):
            rest += m.in_features * m.out_features * (7 if "attn2" in name else 1)
    assert dense == 2 * (full + rest)


@torch.no_grad()
def test_norms_take_the_originals_statistics() -> None:
    net: Any = _unet()
    norm, given = net.down_blocks[0].resnets[0].norm1, []
    norm.register_forward_pre_hook(lambda m, a: given.append(a[0].clone()))
    with Sige(**FIRST).apply(net), outputs(norm, nn.GroupNorm) as seen:
        draw(net, state, 1, steps=1)
        assert torch.equal(seen[""], nn.GroupNorm.forward(norm, given[0]))
        draw(net, edited(by=5.0), 2, steps=1)
    old, new = (x.unflatten(1, (norm.num_groups, -1)) for x in given)
    var, mean = torch.var_mean(old, (2, 3, 4), correction=0, keepdim=True)
    want = ((new - mean) / (var + norm.eps).sqrt()).flatten(1, 2)
    want = want * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert (seen[""] - want).abs().max() < 1e-5
    assert (seen[""] - nn.GroupNorm.forward(norm, given[1])).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["transformer", "bare"])
@torch.no_grad()
def test_tokens_of_the_mask_attend_to_all_and_all_others_are_the_originals(kind: str) -> None:
    """A transformer block, or a bare attention over an image, against the whole one on the edited tokens among the
    original's: the keys and values of those that were not edited are the original's."""
    net: Any = _unet() if kind == "transformer" else next(f for f in ALL.values() if f.name == "ddpm").build().unet
    spot = (
        net.down_blocks[1].attentions[0].transformer_blocks[0] if kind == "transformer"
        else net.down_blocks[1].attentions[0]
    )  # fmt: skip
    given: list[Tensor] = []
    hook = spot.register_forward_pre_hook(lambda m, a: given.append(a[0].clone()))
    more: dict[str, Any] = {"encoder_hidden_states": TEXT["cond"]} if kind == "transformer" else {}
    size = net.config.in_channels
    said = []
    forward = type(spot).forward
    with Sige(**FIRST).apply(net):
        out = spot.forward

        def listening(*a: Any, **k: Any) -> Any:
            said.append(out(*a, **k))
            return said[-1]

        spot.forward = listening
        for run, of in enumerate((state, edited()), 1):
            with moment.at(Moment(0, 1, run=run)):
                net(of(0)[:, :size], 500.0, **more)
        mask = vars(net)[PLACE].mask((16, 16)).flatten()
        spot.forward = out
    hook.remove()
    assert 0 < mask.sum() < 100
    old, new = (x.flatten(2).transpose(1, 2) if kind == "bare" else x for x in given)
    mixed = torch.where(mask[:, None], new, old)
    if kind == "bare":  # its norm's statistics are the original's: that is another test's
        norm, spot.group_norm = spot.group_norm, nn.Identity()
        var, mean = torch.var_mean(old.unflatten(2, (norm.num_groups, -1)), (1, 3), correction=0)
        scale = norm.weight * torch.rsqrt(var + norm.eps).repeat_interleave(len(norm.weight) // norm.num_groups, 1)
        shift = norm.bias - mean.repeat_interleave(len(norm.weight) // norm.num_groups, 1) * scale
        normed = mixed * scale[:, None] + shift[:, None]
        want = (forward(spot, normed) * spot.rescale_output_factor - normed + mixed) / spot.rescale_output_factor
        got, before = (y.flatten(2).transpose(1, 2) for y in (said[1], said[0]))
    else:
        want, got, before = forward(spot, mixed, **more), said[1], said[0]
    assert (got[:, mask] - want[:, mask]).abs().max() < 1e-5 * want.abs().max()
    assert torch.equal(got[:, ~mask], before[:, ~mask])


def test_edits_are_near_what_the_whole_network_says() -> None:
    """The nearer, the more is computed around the edit; within it a tenth of the change is left, for the statistics are
    the original's."""
    of = edited(by=0.3)
    want, old = plain(_unet, of), plain(_unet, state)

    def far(got: list[Tensor], inside: bool) -> float:
        where = (..., slice(9, 16), slice(13, 20)) if inside else ...
        return sum(float((a - b)[where].norm()) for a, b in zip(got, want, strict=True))

    off, inside = [far(old, False)], [far(old, True)]
    for dilation in (0, 1, 2, 4):
        net = _unet()
        with Sige(**FIRST, dilation=dilation).apply(net):
            draw(net, state, 1)
            got = draw(net, of, 2)
        off.append(far(got, False))
        inside.append(far(got, True))
    assert all(b < a for a, b in pairwise(off)) and all(b < a for a, b in pairwise(inside))
    assert off[2] < 0.35 * off[0]
    assert inside[2] < 0.1 * inside[0]


def test_the_mask_is_of_what_was_edited_and_grows_only_by_new_edits() -> None:
    """In a loop that steps from what the network says, as a sampler does, the edit spreads to the tiles around it,
    which is no edit; what is put in later, elsewhere, is one."""
    net: Any = _unet()

    def loop(run: int, by: float, late: float) -> tuple[list[int], Tensor]:
        """Pixels of the mask, and what the network says, at each step."""
        x, pixels, said = state(0), [], []
        x[:, :, 9:16, 13:20] += by
        for step in range(6):
            if step == 3:
                x[:, :, 30:, 30:] += late
            with torch.no_grad(), moment.at(Moment(step, 6, run=run)):
                said.append(net(x, 900.0 - 100 * step, TEXT["cond"]).sample)
            x = x - 0.2 * said[-1]
            found = vars(net)[PLACE].edit.mask
            pixels.append(0 if found is None else int(found.sum()))
        return pixels, torch.stack(said)

    with Sige(**FIRST).apply(net):
        _, old = loop(1, 0.0, 0.0)
        pixels, first = loop(2, 1.0, 0.0)
        assert pixels == [49] * 6
        pixels, both = loop(3, 1.0, 1.0)
        assert pixels == [49] * 3 + [53] * 3
        corner = (..., slice(30, 32), slice(30, 32))
        assert torch.equal(both[:3], first[:3]) and torch.equal(both[corner][:3], old[corner][:3])
        assert ((both - old)[corner][3:] != 0).all()
        pixels, late = loop(4, 0.0, 1.0)
        assert pixels == [0] * 3 + [4] * 3
        assert torch.equal(late[:3], old[:3]) and ((late - old)[corner][3:] != 0).all()
        assert torch.equal(loop(5, 1.0, 0.0)[1], first)


def test_what_counts_as_an_edit_is_in_units_of_the_clean_picture() -> None:
    """0.02 of it: at alpha = 0.25 a difference of 0.005 in the state."""
    net: Any = _unet()
    (node,) = nodes(Flow(), [0.75])
    assert node.alpha == 0.25
    with Sige(**FIRST).apply(net):
        draw(net, state, 1, node=node)
        for run, (by, told, found) in enumerate(
            [(0.0049, node, 0), (0.0051, node, 49), (0.0051, None, 0), (0.0201, None, 49)], 2
        ):
            draw(net, edited(by=by), run, steps=1, node=told)
            assert int(vars(net)[PLACE].edit.mask.sum()) == found


@pytest.mark.parametrize("what", ["text", "once", "time", "batch", "size", "steps"])
def test_with_other_inputs_a_picture_is_computed_in_full(what: str) -> None:
    """From the step on at which they are others; an edit after it is an edit again."""
    net, other = _unet(), _unet()
    x = edited()

    def asked(step: int) -> Any:
        args, kwargs = call(x)(step)
        if (what == "text" and step >= 1) or (what == "once" and step == 1):
            kwargs = {"encoder_hidden_states": TEXT["uncond"]}
        if what == "time" and step >= 1:
            args = (args[0], args[1] + 1)
        if what == "batch":
            args, kwargs = (args[0][:1], args[1]), {"encoder_hidden_states": TEXT["cond"][:1]}
        if what == "size":
            args = (args[0][..., :24], args[1])
        return args, kwargs

    steps = STEPS + 2 if what == "steps" else STEPS
    since = {"text": 1, "once": 1, "time": 1, "steps": STEPS}.get(what, 0)
    want = driven(other, {"cond": asked}, steps, 1)["cond"]
    with Sige(**FIRST).apply(net) as patch:
        draw(net, state, 1)
        edit = draw(net, x, 2)
        before = patch.tally["reused"]
        got = driven(net, {"cond": asked}, steps, 3)["cond"]
        assert same(got[since:], want[since:])
        assert same(got[:since], edit[:since])
        assert patch.tally["reused"] - before == since * before // STEPS
        assert same(draw(net, x, 4), edit)


def test_branches_and_pictures_do_not_mix() -> None:
    """Two branches interleaved, and edits in any order, give what each gives alone."""
    net = _unet()
    one, two = edited(), edited(20, 2, 5)
    with Sige(**FIRST).apply(net):
        driven(net, {b: call(state, b) for b in TEXT}, STEPS, 1)
        both = driven(net, {b: call(one, b) for b in TEXT}, STEPS, 2)
        other = driven(net, {b: call(two, b) for b in TEXT}, STEPS, 3)
        again = driven(net, {b: call(one, b) for b in TEXT}, STEPS, 4)
        assert all(same(both[b], again[b]) for b in TEXT)
    for b in TEXT:
        alone = _unet()
        with Sige(**FIRST).apply(alone):
            driven(alone, {b: call(state, b)}, STEPS, 1)
            assert same(driven(alone, {b: call(two, b)}, STEPS, 2)[b], other[b])
            assert same(driven(alone, {b: call(one, b)}, STEPS, 3)[b], both[b])


def test_within_recording_another_picture_becomes_the_original() -> None:
    net: Any = _unet()
    with Sige(**FIRST).apply(net) as patch:
        draw(net, state, 1)
        want = draw(net, edited(), 2)
        with recording(net) as original:
            assert isinstance(original, Original) and original.bytes == 0
            draw(net, edited(20, 2, 5), 3)
            one = original.bytes
            draw(net, edited(), 4)
            assert original.bytes == one > 0  # the last stays
        reused = patch.tally["reused"]
        assert same(draw(net, edited(), 5), plain(_unet, edited()))
        assert patch.tally["reused"] > reused
        back = draw(net, state, 6)
        assert not same(back, plain(_unet, state))  # which is now the edit
        assert not same(want, plain(_unet, edited()))


def test_a_network_that_no_one_drives_takes_its_original_from_recording() -> None:
    net, x = _unet(), edited()(0)
    with torch.no_grad(), Sige(**FIRST).apply(net) as patch:
        with recording(net):
            net(state(0), 500.0, TEXT["cond"])
        one = net(x, 500.0, TEXT["cond"]).sample
        two = net(edited(20, 2, 5)(0), 500.0, TEXT["cond"]).sample
        assert patch.tally["reused"] > 0
        assert torch.equal(net(x, 500.0, TEXT["cond"]).sample, one)
        assert torch.equal(net(edited(20, 2, 5)(0), 500.0, TEXT["cond"]).sample, two)


def test_what_is_kept_is_the_networks_own_and_not_the_callers() -> None:
    """Who writes into the state that was given, or into an answer, changes nothing of the next."""
    net, x = _unet(), state(0)
    with torch.no_grad(), Sige(**FIRST).apply(net) as patch:
        with recording(net):
            said = net(x, 500.0, TEXT["cond"]).sample
        want = said.clone()
        x.add_(1)
        said.zero_()
        for _ in range(2):
            got = net(state(0), 500.0, TEXT["cond"]).sample
            assert torch.equal(got, want)
            got.zero_()
        assert patch.tally["reused"] == 2 * patch.tally["ran"]


def test_an_original_that_broke_off_is_recorded_anew_and_a_broken_edit_leaves_nothing() -> None:
    net: Any = _unet()
    with Sige(**FIRST).apply(net):
        draw(net, state, 1)
        want = draw(net, edited(), 2)
    with Sige(**FIRST).apply(net) as patch:
        for call_number in (2, 3):
            with breaking(net.up_blocks[0].resnets[0].conv1, call_number), pytest.raises(Broken):
                draw(net, edited(20, 2, 5), call_number)
        draw(net, state, 4)
        assert patch.tally["reused"] == 0
        assert same(draw(net, edited(), 5), want)
        with breaking(net.up_blocks[0].resnets[0].conv1, 3), pytest.raises(Broken):
            draw(net, edited(20, 2, 5), 6)
        assert same(draw(net, edited(), 7), want)


def test_what_is_kept_is_not_what_later_layers_write_into() -> None:
    """FreeU does, in what an up block is given, which is what a convolution returned."""
    net, seen = _unet(), list[Tensor]()

    def writes(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"].clone())
        kwargs["hidden_states"].mul_(1.3)

    net.up_blocks[1].register_forward_pre_hook(writes, with_kwargs=True)  # type: ignore[index,union-attr]
    with Sige(**FIRST).apply(net):
        for run, of in enumerate((state, edited(), edited()), 1):
            draw(net, of, run)
    old, new, again = (seen[i : i + STEPS] for i in (0, STEPS, 2 * STEPS))
    assert same(again, new)
    for a, b in zip(old, new, strict=True):
        assert not torch.equal(a, b)
        assert torch.equal(a[..., 26:, :], b[..., 26:, :])


def test_bytes_are_those_of_all_that_is_kept() -> None:
    net: Any = _unet()
    with Sige(**FIRST).apply(net) as patch, outputs(net, nn.Conv2d) as seen:
        draw(net, state, 1, steps=1)
        convolutions = sum(4 * t.numel() for t in seen.values())
        one = vars(net)[PLACE].original.bytes
        tokens = [m for n, m in net.named_modules() if n.endswith("transformer_blocks.0")]
        norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
        sides = {"mid": 256, "down": 256, "up": 256}
        kept = sum(3 * 4 * 2 * sides[n.split("_")[0]] * 32 for n, m in net.named_modules() if m in tokens)
        statistics = sum(4 * 2 * 2 * m.num_groups for m in norms)
        assert one == convolutions + kept + statistics + 2 * 4 * state(0).numel()
        assert patch.tally["bytes"] == one


def painted() -> tuple[Tensor, Tensor]:
    """Latents, which these pipelines take as pictures, and the same with a square painted over."""
    picture = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    other = picture.clone()
    other[:, :, 4:10, 20:26] = 2.0
    return picture, other


def given() -> dict[str, Any]:
    return {k: v for k, v in sd_inputs().items() if k not in ("height", "width")}


def test_image_to_image_pipelines_edit_what_was_painted_over() -> None:
    """An edited picture with the same seed: near what the whole pipeline draws, and its far latents are those of the
    original, bit for bit."""
    pipe = StableDiffusionImg2ImgPipeline(**sd().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    before, after = painted()

    def call(image: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return pipe(image=image, strength=0.7, output_type="latent", generator=rng, **given()).images

    old, want = call(before), call(after)
    with on(pipe, "cache.sige", **FIRST) as handle:
        tally = handle.patches[0][1].tally
        assert torch.equal(call(before), old)
        ran = tally["ran"]
        got = call(after)
        assert tally["ran"] - ran < 0.5 * ran
        assert torch.equal(got[..., 20:, :16], old[..., 20:, :16])
        assert (got - want).norm() < 0.3 * (old - want).norm()
        assert torch.equal(call(after), got)
    assert torch.equal(call(after), want)


def test_inpainting_pipelines_put_the_edit_in_after_the_first_step() -> None:
    """From pure noise the first step sees none, and is the original's for nothing; then the pipeline puts back what
    was painted over outside of its own mask."""
    pipe = StableDiffusionInpaintPipeline(**sd().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    before, after = painted()
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 40:, :16] = 1.0

    def call(image: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        more = {"mask_image": hole, "height": 64, "width": 64, "strength": 1.0, "masked_image_latents": image}
        return pipe(image=image, output_type="latent", generator=rng, **more, **given()).images

    old, want = call(before), call(after)
    assert not torch.equal(old, want)
    with on(pipe, "cache.sige", **FIRST) as handle:
        tally = handle.patches[0][1].tally
        assert torch.equal(call(before), old)
        ran = tally["ran"]
        got = call(after)
        assert tally["reused"] > ran / 6
        assert tally["ran"] - ran < 0.5 * ran
        assert (got - want).norm() < 0.3 * (old - want).norm()
        assert torch.equal(got[..., 12:20, 12:], old[..., 12:20, 12:])
