"""Bottleneck sampling in whole pipelines: what the network is told at the smaller size, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, LTXPipeline, QwenImagePipeline, StableDiffusion3Img2ImgPipeline
from torch import Tensor

import hasten
from families import Family, _guided, _pair
from families_image import _normed
from hasten import Recipe, moment
from hasten.anatomy import anatomy
from hasten.bridge.clock import Clock
from hasten.bridge.pipelines import networks
from hasten.bridge.process import process
from hasten.brownian import Brownian
from hasten.grid import build
from hasten.grids.shifted import shifted
from hasten.method import Refused
from hasten.moment import Moment
from hasten.solvers.bottleneck import bottleneck
from hasten.solvers.drive import solve
from pipelines import PIPELINES

pytestmark = pytest.mark.system("bottleneck-sampling")
NAMED = {f.name: f for f in PIPELINES}
STEPS = 9
PACKED = ("flux", "qwen", "ltx")
SMALL = range(2, 5)  # the calls between the first two and the last four
Net = Callable[[Tensor, float], Tensor]
RECIPE = {
    "solver": {"bottleneck": {"base": "dpmpp_2m"}}, "grid": {"shifted": {"shift": 2.0}}, "steps": STEPS, "noise": "path"
}  # fmt: skip


def given(family: Family) -> dict[str, Any]:
    """Inputs of a call of 9 steps, broader than high where latents are packed; Wan's own pictures are too small."""
    more = (
        {"height": 32, "width": {"wan": 32, "ltx": 64}.get(family.name, 48)} if family.name in ("wan", *PACKED) else {}
    )
    return {k: v for k, v in (family.inputs() | more).items() if k != "num_inference_steps"}


def flux(pipe: Any, i: dict[str, Any]) -> Net:
    """On latents with rows and columns, packed and given places by diffusers' own functions, at any size."""

    def both(x: Tensor, t: float) -> Tensor:
        _, channels, h, w = x.shape
        packed, ids = FluxPipeline._pack_latents(x, 1, channels, h, w), pipe._prepare_latent_image_ids(
            1, h // 2, w // 2, "cpu", torch.float32
        )  # fmt: skip
        c, u = (
            pipe.transformer(
                hidden_states=packed, timestep=torch.full((1,), t) / 1000, guidance=torch.full([1], 3.0), img_ids=ids,
                pooled_projections=i[f"{p}pooled_prompt_embeds"], encoder_hidden_states=i[f"{p}prompt_embeds"],
                txt_ids=torch.zeros(7, 3),
            ).sample
            for p in ("", "negative_")
        )  # fmt: skip
        return FluxPipeline._unpack_latents(u + 2.0 * (c - u), h, w, 1)

    return both


def qwen(pipe: Any, i: dict[str, Any]) -> Net:
    def both(x: Tensor, t: float) -> Tensor:
        _, channels, h, w = x.shape
        packed = QwenImagePipeline._pack_latents(x, 1, channels, h, w)
        shapes, time = [[(1, h // 2, w // 2)]], torch.full((1,), t) / 1000
        c, u = (
            pipe.transformer(packed, i[f"{p}prompt_embeds"], None, time, img_shapes=shapes).sample
            for p in ("", "negative_")
        )
        return QwenImagePipeline._unpack_latents(_normed(u + 3.0 * (c - u), c), h, w, 1)[:, :, 0]

    return both


def ltx(pipe: Any, i: dict[str, Any]) -> Net:
    text, mask = _pair(i, "prompt_embeds"), _pair(i, "prompt_attention_mask")
    time, space = pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio

    def both(x: Tensor, t: float) -> Tensor:
        frames, h, w = x.shape[2:]
        more = {"num_frames": frames, "height": h, "width": w, "rope_interpolation_scale": (time / 25, space, space)}
        packed = LTXPipeline._pack_latents(x)
        out = pipe.transformer(torch.cat([packed, packed]), text, torch.full((2,), t), mask, **more, return_dict=False)
        return LTXPipeline._unpack_latents(_guided(out[0], 3.0), frames, h, w)

    return both


def tokens(pipe: Any) -> list[int]:
    """Of the picture, which the first block of each call is given."""
    seen: list[int] = []
    for net in networks(pipe).values():
        block = anatomy(net).chains[0][0].module

        def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen.append(x.shape[1] if x.ndim == 3 else x.shape[-2] * x.shape[-1])

        block.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def packed(name: str, x: Tensor) -> Tensor:
    if name in ("flux", "qwen"):
        return FluxPipeline._pack_latents(x, *x.shape)
    return LTXPipeline._pack_latents(x) if name == "ltx" else x


KINDS: dict[str, tuple[Any, tuple[int, ...], int]] = {  # its network, latents with rows and columns, tokens in full
    "flux": (flux, (1, 4, 16, 24), 96),
    "qwen": (qwen, (1, 4, 16, 24), 96),
    "ltx": (ltx, (1, 8, 3, 8, 16), 384),
    "sd3": (None, (1, 4, 16, 16), 64),
    "pixart": (None, (1, 4, 16, 16), 64),
    "wan": (None, (1, 16, 2, 4, 4), 8),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_pipeline_draws_what_the_solver_draws_alone_with_the_counted_tokens(name: str) -> None:
    """The solver alone asks a network that diffusers' own functions tell each size; the pipeline, whose network is told
    the full size at every call, ends in the same latents, of the full size. Removed, it is as it was."""
    family, (network, shape, full) = NAMED[name], KINDS[name]
    pipe = family.build()
    own, given_ = pipe.scheduler, given(family)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    before = family.ask(pipe, **given_, num_inference_steps=3, latents=packed(name, x))
    known = process(own)
    alone = (network or family.network)(pipe, given_)
    grid, noise = build(known.path, shifted, STEPS, shift=2.0), Brownian.of(torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = solve(
            bottleneck.given(base="dpmpp_2m"),
            lambda x, n: known.read(alone(x, known.timestep(n.t)), x, n),
            x,
            grid,
            noise,
        )
    seen = tokens(pipe)
    with hasten.accelerate(pipe, Recipe.from_dict(RECIPE)):
        got = family.ask(pipe, **given_, latents=packed(name, x), generator=torch.Generator().manual_seed(1))
    assert seen == [full // 4 if i in SMALL else full for i in range(STEPS) for _ in range(family.calls)]
    assert got.shape == before.shape
    assert (got - packed(name, want)).abs().max() <= 1e-4 * want.abs().max()
    assert pipe.scheduler is own
    assert not any("forward" in vars(net) for net in networks(pipe).values())
    assert torch.equal(family.ask(pipe, **given_, num_inference_steps=3, latents=packed(name, x)), before)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_each_picture_may_have_a_size_of_its_own(name: str) -> None:
    family = NAMED[name]
    pipe = family.build()
    seen = tokens(pipe)

    def draw(height: int, width: int) -> Tensor:
        seen.clear()
        size = {"height": height, "width": width, "num_inference_steps": STEPS}
        return family.call(pipe, **size)

    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "bottleneck"})):
        first = draw(32, 48)
        assert seen[:: family.calls] == [96, 96, 24, 24, 24, 96, 96, 96, 96]  # of 8 by 12
        draw(48, 32)
        assert seen[:: family.calls] == [96, 96, 24, 24, 24, 96, 96, 96, 96]
        assert torch.equal(draw(32, 48), first)
        draw(32, 32)
        assert seen[:: family.calls] == [64, 64, 16, 16, 16, 64, 64, 64, 64]


def test_a_run_that_was_broken_off_leaves_nothing_to_a_newer_handle() -> None:
    """Its network is told the full size whatever it was told last."""
    family = NAMED["flux"]
    pipe = family.build()
    newer, larger = Recipe.from_dict({"solver": "ddim", "steps": 3}), {"height": 48, "num_inference_steps": 3}
    with hasten.accelerate(pipe, newer):
        want = family.call(pipe, **larger)

    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "bottleneck"})):
        with pytest.raises(KeyboardInterrupt):
            family.call(pipe, num_inference_steps=STEPS, callback_on_step_end=stop)
        with hasten.accelerate(pipe, newer):
            assert torch.equal(family.call(pipe, **larger), want)
        assert family.call(pipe, num_inference_steps=STEPS).shape == family.shape


def test_at_scale_1_a_pipeline_of_packed_latents_draws_the_bases_picture() -> None:
    family = NAMED["flux"]
    pipe, drawn = family.build(), []
    for solver in ({"bottleneck": {"scale": 1.0, "base": "unipc"}}, "unipc"):
        with hasten.accelerate(pipe, Recipe.from_dict({"solver": solver, "steps": STEPS})):
            drawn.append(family.call(pipe, num_inference_steps=STEPS))
    assert torch.equal(*drawn)


def moments(pipe: Any) -> list[Moment]:
    seen: list[Moment] = []
    for net in networks(pipe).values():
        anatomy(net).chains[0][0].module.register_forward_pre_hook(lambda *_: seen.append(moment.now()))
    return seen


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_what_was_kept_at_one_size_is_not_read_at_another(name: str) -> None:
    """Each stage is a run of its own to methods that keep results: with every second call reused, those that come
    first at their size run."""
    family = NAMED[name]
    pipe = family.build()
    seen = moments(pipe)
    steps = {"num_inference_steps": STEPS}
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "bottleneck"})):
        family.call(pipe, **steps)
    runs = [m.run for m in seen[:: family.calls]]
    assert runs == [runs[0] + (i >= 2) + (i >= 5) for i in range(STEPS)]
    assert [m.step for m in seen[:: family.calls]] == list(range(STEPS))
    seen.clear()
    recipe = Recipe.from_dict({"solver": "bottleneck", "methods": [{"cache.interval": {"every": 2}}]})
    with hasten.accelerate(pipe, recipe) as handle:
        family.call(pipe, **steps)
        tally = sum((patch.tally for _, patch in handle.patches), start=type(handle.patches[0][1].tally)())
    assert tally["reused"] / (tally["reused"] + tally["ran"]) == 3 / 9  # calls 1, 3 and 7; 5 is the first in full again
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "ddim"})):
        seen.clear()
        family.call(pipe, **steps)
    assert len({m.run for m in seen}) == 1


def test_calls_of_two_sizes_in_every_evaluation_are_one_run() -> None:
    """As where only one branch is shown a further picture."""
    seen: list[int] = []

    class Net(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            seen.append(moment.now().run)
            return hidden_states

    scheduler = SimpleNamespace(timesteps=torch.tensor([3.0, 2.0, 1.0]), set_timesteps=lambda: None, step=lambda: None)
    net = Net()
    with Clock(None).install(scheduler, [net]):
        scheduler.set_timesteps()
        for _ in range(3):
            net(hidden_states=torch.zeros(1, 8, 4))
            net(hidden_states=torch.zeros(1, 4, 4))
            scheduler.step()
    assert len(seen) == 6
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hunyuandit", "HunyuanDiT2DModel was made smaller latents than HunyuanDiTPipeline prepared all else for"),
        ("svd", r"gives its network \[2, 8, 8, 8\] beside latents of \[2, 4, 8, 8\], which a solver that resizes"),
        ("stable_audio", r"of a state of \[1, 4, 8\] it knows no rows and columns"),
    ],
)
def test_where_it_cannot_work_it_says_so_in_a_line_and_the_pipeline_goes_on(name: str, message: str) -> None:
    family = NAMED[name]
    pipe = family.build()
    before = family.call(pipe)
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "bottleneck"})):
        with pytest.raises(ValueError, match=message) as told:
            family.call(pipe, num_inference_steps=STEPS)
        assert "take another solver" in str(told.value)
        assert "\n" not in str(told.value)
        assert isinstance(told.value, Refused) or name == "stable_audio"
        family.call(pipe, num_inference_steps=5)  # all at full size
    assert torch.equal(family.call(pipe), before)


def test_packed_latents_of_odd_sides_are_refused() -> None:
    family = NAMED["flux"]
    odd = Recipe.from_dict({"solver": {"bottleneck": {"scale": 0.7, "multiple": 1}}})
    told = r"FluxPipeline packs 2 x 2 of its pixels, and \[11, 11\] are odd: set multiple to 2"
    with hasten.accelerate(pipe := family.build(), odd), pytest.raises(Refused, match=told):
        family.call(pipe, num_inference_steps=STEPS)


def test_from_the_middle_of_the_times_it_starts_in_the_last_stage_or_not_at_all() -> None:
    family = NAMED["sd3"]
    pipe = StableDiffusion3Img2ImgPipeline(**family.build().components)
    pipe.set_progress_bar_config(disable=True)
    seen = tokens(pipe)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "bottleneck", "grid": "uniform", "steps": 10})):
        family.call(pipe, image=picture, num_inference_steps=10, strength=0.4)
        assert seen == [64] * 4
        with pytest.raises(ValueError, match="take strength 1, or another solver"):
            family.call(pipe, image=picture, num_inference_steps=10, strength=0.8)
