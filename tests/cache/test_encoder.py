"""Encoder propagation against its description, written out on a U-Net's own modules."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from caches import ALL, Broken, breaking, built, comes_clean, counted, driven, neutral, on
from digits import written_digits
from digits_unet import drawn, trained
from families import _unet
from hasten import Recipe, moment
from hasten.cache.encoder import EARLY, Encoder, early
from hasten.measure.frechet import frechet_small
from hasten.moment import Moment

UNETS = {"sd", "sdxl", "ddpm", "svd", "animatediff"}
TEXT = {n: torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(("cond", "uncond"))}
STEPS = 8
TIMES = tuple(float(900 - 100 * i) for i in range(STEPS))
pytestmark = [pytest.mark.system("encoder-propagation"), pytest.mark.filterwarnings("ignore:In CPU autocast")]


def state(step: int) -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(step))


def call(branch: str) -> Any:
    return lambda step: ((state(step), torch.tensor(TIMES[step])), {"encoder_hidden_states": TEXT[branch]})


@torch.no_grad()
def slowly(net: Any, keys: set[int], text: Tensor) -> list[Tensor]:
    """The paper's two forwards: encoder and decoder at key steps, the decoder on the last key step's skips and middle
    at the others."""
    said, skips, middle = [], (), torch.empty(0)
    for step in range(STEPS):
        emb = net.time_embedding(net.time_proj(torch.full((2,), TIMES[step])))
        if step in keys:
            h = net.conv_in(state(step))
            skips = (h,)
            for block in net.down_blocks:
                more = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
                h, taken = block(hidden_states=h, temb=emb, **more)
                skips += taken
            middle = net.mid_block(h, emb, encoder_hidden_states=text)
        h, left = middle.clone(), skips
        for block in net.up_blocks:
            more = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            count = len(block.resnets)
            h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=left[-count:], **more)
            left = left[:-count]
        said.append(net.conv_out(net.conv_act(net.conv_norm_out(h))))
    return said


def test_an_all_key_schedule_is_the_baseline_in_every_u_net_and_others_are_refused() -> None:
    assert neutral("cache.encoder") == UNETS


def test_the_papers_list_is_dense_where_the_picture_is_laid_out() -> None:
    assert early(50) == {0, 1, 2, 3, 5, 10, 15, 25, 35} == set(EARLY)
    assert early(8) == {0, 1, 2, 4, 5}
    assert all(0 in early(n) and max(early(n)) < n and len(early(n)) <= 9 for n in range(1, 200))


@pytest.mark.parametrize("free_u", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("settings", "keys"), [({"schedule": "early"}, early(8)), ({"schedule": "uniform", "every": 3}, {0, 3, 6})]
)
def test_decoder_steps_are_the_slow_reference(settings: Any, keys: set[int], parallel: bool, free_u: bool) -> None:
    """Of one branch, and of two that are called in turn: batched decoders differ by rounding alone, measured 3e-7.
    FreeU writes into what the middle gives the decoder: what is kept must not be what it writes into."""
    net: Any = _unet()
    if free_u:
        net.enable_freeu(0.9, 0.2, 1.4, 1.6)
    want = {b: slowly(net, keys, TEXT[b]) for b in TEXT}
    with Encoder(**settings, parallel=parallel).apply(net) as patch:
        got = driven(net, {b: call(b) for b in TEXT}, STEPS, 1, ahead=TIMES)
        alone = driven(net, {"cond": call("cond")}, STEPS, 2, ahead=TIMES)
        parts = 1 + 2 + 1  # convolution, stages, middle
        assert patch.tally["ran"] == 3 * parts * len(keys)
    for branch in TEXT:
        for step in range(STEPS):
            gap = (got[branch][step] - want[branch][step]).abs().max()
            assert gap <= (1e-5 if parallel else 1e-6) * want[branch][step].abs().max(), (branch, step)
    assert all(map(torch.equal, got["cond"], alone["cond"]))  # the other branch changes nothing


@pytest.mark.parametrize("name", sorted(UNETS))
@pytest.mark.parametrize("settings", [{"schedule": "early"}, {"schedule": "uniform", "every": 4}])
def test_a_parallel_batch_of_decoders_is_the_sequence_of_them(name: str, settings: Any) -> None:
    """In pipelines with both branches in one batch, frames among the rows, and none. The decoder runs once for each
    span between key steps, the encoder at key steps alone."""
    pipe, before = built(name)
    keys = sorted(early(6)) if settings["schedule"] == "early" else [0, 4]
    spans = sum(k + 1 < after for k, after in zip(keys, [*keys[1:], 6]))
    with on(pipe, "cache.encoder", **settings):
        want = ALL[name].call(pipe)
    with (
        on(pipe, "cache.encoder", **settings, parallel=True) as handle,
        counted(pipe.unet.up_blocks[0].resnets[0]) as decoders,
        counted(pipe.unet.down_blocks[0].resnets[0]) as encoders,
    ):
        got = ALL[name].call(pipe)
        assert len(decoders) == len(keys) + spans
        assert [m.step for m, _ in encoders] == keys
        assert handle.patches[0][1].tally["spared"] == 6 - len(keys) - spans
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (before - want).abs().max() > 1e-3 * want.abs().max()


def test_on_digits_fewer_key_steps_are_further_from_the_digits() -> None:
    """A trained U-Net, 12 steps, 40 digits: their Frechet distance to written ones, over pixels, and their distance to
    what is drawn without the method, rise as the encoder runs less. The encoder runs ever less, and in parallel so does
    the decoder's part of the network."""
    net, _ = trained()
    names, written = torch.arange(40) % 10, written_digits()
    plain, errors, distances = drawn(names, 12, 1), [], []
    for every in (1, 2, 4, 12):
        keys = 12 // every
        with Encoder(schedule="uniform", every=every).apply(net), counted(net.down_blocks[0].resnets[0]) as encoders:
            got = drawn(names, 12, 1 + every)
        assert len(encoders) == keys
        with (
            Encoder(schedule="uniform", every=every, parallel=True).apply(net),
            counted(net.up_blocks[0].resnets[0]) as decoders,
        ):
            at_once = drawn(names, 12, 20 + every)
        assert len(decoders) == (2 * keys if every > 1 else keys)
        assert (at_once - got).abs().max() <= 1e-5 * got.abs().max()
        errors.append(float((got - plain).square().mean().sqrt()))
        distances.append(frechet_small(got.flatten(1), written))
    assert errors[0] == 0
    assert all(a < b for a, b in pairwise(errors)), errors
    assert all(a < b for a, b in pairwise(distances)), distances


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["sd", "svd"])
def test_nothing_is_left_behind(name: str, parallel: bool) -> None:
    comes_clean("cache.encoder", name, schedule="uniform", every=3, parallel=parallel)


def test_with_a_solver_of_hasten_too_the_times_are_known() -> None:
    pipe, _ = built("sd")
    laid = {"solver": "dpmpp_2m", "steps": 6}
    out = []
    for parallel in (False, True):
        method = {"cache.encoder": {"schedule": "uniform", "every": 3, "parallel": parallel}}
        with (
            hasten.accelerate(pipe, Recipe.from_dict(laid | {"methods": [method]})),
            counted(pipe.unet.up_blocks[0].resnets[0]) as decoders,
        ):
            out.append(ALL["sd"].call(pipe))
            assert len(decoders) == (4 if parallel else 6)
    assert (out[0] - out[1]).abs().max() <= 1e-5 * out[0].abs().max()


# what changes between the plan and its steps
CHANGED = {"time": {"ahead": (1000.0,) * STEPS}, "text": {}, "units": {"ahead": tuple(t / 1000 for t in TIMES)}}


@pytest.mark.parametrize("what", [*CHANGED, "residuals"])
def test_a_plan_that_does_not_hold_is_not_used(what: str) -> None:
    """Times told otherwise, another prompt half way, times in other units, and residuals from outside: the steps are
    those of the sequence, exactly where nothing was planned."""
    net: Any = _unet()
    rng = torch.Generator().manual_seed(9)
    added = [torch.randn(2, c, s, s, generator=rng) for c, s in ((16, 16), (16, 16), (16, 8), (32, 8))]

    def trajectory(run: int) -> list[Tensor]:
        out = []
        for step in range(4):
            ahead = TIMES[step:]
            if what == "time" and step >= 2:
                ahead = tuple(t - 5 for t in ahead)
            if what == "units":
                ahead = tuple(t / 1000 for t in ahead)
            text = TEXT["uncond" if what == "text" and step >= 2 else "cond"]
            more: dict[str, Any] = {}
            if what == "residuals":
                more = {
                    "down_block_additional_residuals": [step * a for a in added],
                    "mid_block_additional_residual": step * added[-1],
                }
            t = torch.tensor(ahead[0] if what == "time" else TIMES[step])
            with torch.no_grad(), moment.at(Moment(step, 4, 0.5, run, "cond", ahead=ahead)):
                out.append(net(state(step), t, encoder_hidden_states=text, **more).sample)
        return out

    with Encoder(schedule="uniform", every=4).apply(net):
        want = trajectory(1)
    with Encoder(schedule="uniform", every=4, parallel=True).apply(net) as patch:
        got = trajectory(2)
        assert patch.tally["spared"] == 0
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    planned = 2 if what in ("time", "text") else 4
    assert all(map(torch.equal, got[2:] if planned == 2 else got, want[2:] if planned == 2 else want))


def test_an_equal_prompt_in_another_tensor_is_the_same_prompt() -> None:
    net: Any = _unet()
    with Encoder(schedule="uniform", every=4, parallel=True).apply(net) as patch:
        fresh = lambda step: (call("cond")(step)[0], {"encoder_hidden_states": TEXT["cond"].clone()})  # noqa: E731
        driven(net, {"cond": fresh}, 4, 1, ahead=TIMES)
        assert patch.tally["spared"] == 2


@pytest.mark.parametrize("parallel", [False, True])
def test_another_form_another_run_and_the_first_step_run_in_full(parallel: bool) -> None:
    net: Any = _unet()

    def said(x: Tensor, step: int, run: int) -> Tensor:
        with torch.no_grad(), moment.at(Moment(step, 8, 0.5, run, "cond", ahead=TIMES[step:])):
            return net(x, torch.tensor(TIMES[step]), encoder_hidden_states=TEXT["cond"][: len(x)]).sample

    with torch.no_grad():
        want = [
            net(x, torch.tensor(TIMES[s]), encoder_hidden_states=TEXT["cond"][: len(x)]).sample
            for x, s in ((state(1)[:, :, :8], 2), (state(1)[:1], 3), (state(1), 1), (state(2), 0))
        ]
    with Encoder(schedule="uniform", every=8, parallel=parallel).apply(net):
        said(state(0), 0, 1), said(state(0), 1, 1)
        assert torch.equal(said(state(1)[:, :, :8], 2, 1), want[0])
        assert torch.equal(said(state(1)[:1], 3, 1), want[1])
        assert torch.equal(said(state(1), 1, 2), want[2])
        assert torch.equal(said(state(2), 0, 3), want[3])
        said(state(0), 0, 4)
        with breaking(net.mid_block, 1), pytest.raises(Broken):  # at a key step: its encoder was kept in part
            said(state(1), 0, 5)
        assert torch.equal(said(state(1), 1, 5), want[2])
