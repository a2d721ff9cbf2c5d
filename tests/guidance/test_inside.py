"""Guidances inside pipelines: the sample of the standalone solve with the wrapper, whatever the pipeline computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor, nn

import hasten
from families import FAMILIES, Family, _pair
from families_image import IMAGES
from hasten import Recipe, moment
from hasten.bridge.process import process
from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node, at, build
from hasten.grids.shifted import shifted
from hasten.guidance.apg import Apg, apg
from hasten.guidance.cfg import cfg
from hasten.guidance.cfg_pp import cfg_pp
from hasten.guidance.rescale import Rescale, rescale
from hasten.guidance.zero_star import zero_star
from hasten.halves import Conditional
from hasten.method import Refused
from hasten.moment import Moment
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.drive import solve

Net = Callable[[Tensor, float], Tensor]
STEPS = 5
SCALE = {"sd": 3.0, "sd3": 3.0, "flux": 2.0, "wan": 3.0, "pixart": 3.0, "lumina2": 3.0}
MORE = {"lumina2": {"cfg_normalization": False}}
NAMED = {f.name: f for f in (*FAMILIES, *IMAGES)}


def branches(name: str, pipe: Any, i: dict[str, Any]) -> tuple[Net, Net]:
    """(conditional, unconditional) network of a family, (x, timestep) -> what it says."""
    if name in ("sd", "sd3", "pixart"):  # one batch of two: each half

        def half(k: int) -> Net:
            return lambda x, t: both(x, t).chunk(2)[k]

        text = _pair(i, "prompt_embeds")
        if name == "sd":
            both: Net = lambda x, t: pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample  # noqa: E731
        elif name == "sd3":
            pooled = _pair(i, "pooled_prompt_embeds")
            both = lambda x, t: pipe.transformer(torch.cat([x, x]), text, pooled, torch.full((2,), t)).sample  # noqa: E731
        else:
            more: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
            more["encoder_attention_mask"] = _pair(i, "prompt_attention_mask")
            both = lambda x, t: pipe.transformer(  # noqa: E731
                torch.cat([x, x]), text, timestep=torch.full((2,), t), **more
            ).sample.chunk(2, 1)[0]  # without the learned variance
        return half(1), half(0)
    if name == "wan":

        def one(x: Tensor, t: float, text: Tensor) -> Tensor:
            return pipe.transformer(x, torch.full((1,), t), text).sample

        return lambda x, t: one(x, t, i["prompt_embeds"]), lambda x, t: one(x, t, i["negative_prompt_embeds"])
    if name == "lumina2":  # its clock and its velocity run from noise to data

        def lumina(x: Tensor, t: float, prefix: str) -> Tensor:
            text, mask = i[f"{prefix}prompt_embeds"], i[f"{prefix}prompt_attention_mask"]
            return -pipe.transformer(x, 1 - torch.full((1,), t) / 1000, text, mask).sample

        return lambda x, t: lumina(x, t, ""), lambda x, t: lumina(x, t, "negative_")
    ids, strength = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32), torch.full([1], 3.0)

    def flux(x: Tensor, t: float, prefix: str) -> Tensor:
        return pipe.transformer(
            hidden_states=x, timestep=torch.full((1,), t) / 1000, guidance=strength, img_ids=ids,
            pooled_projections=i[f"{prefix}pooled_prompt_embeds"], encoder_hidden_states=i[f"{prefix}prompt_embeds"],
            txt_ids=torch.zeros(7, 3),
        ).sample  # fmt: skip

    return lambda x, t: flux(x, t, ""), lambda x, t: flux(x, t, "negative_")


def reading(known: Any, network: Net) -> Denoiser:
    return lambda x, node: Prediction.of(known.target, network(x, known.timestep(node.t)), x, node)


WRAPPERS: dict[str, tuple[dict[str, Any], Callable[..., Denoiser]]] = {
    "rescale": ({"phi": 0.7}, lambda c, u, s, target: rescale(c, u, scale=s, phi=0.7, target=target)),
    "apg": (
        {"eta": 0.2, "radius": 4.0, "momentum": -0.5},
        lambda c, u, s, _: apg(c, u, scale=s, eta=0.2, radius=4.0, momentum=-0.5),
    ),
    "zero_star": ({"zeros": 1}, lambda c, u, s, _: zero_star(c, u, scale=s, zeros=1)),
    "cfg_pp": ({"scale": 0.6}, lambda c, u, *_: cfg_pp(c, u, scale=0.6)),
}


def latents(family: Family) -> Tensor:
    return torch.randn(family.shape, generator=torch.Generator().manual_seed(3))


def run(pipe: Any, family: Family, **more: Any) -> Tensor:
    inputs = {k: v for k, v in family.inputs().items() if k != "num_inference_steps"}
    more = MORE.get(family.name, {}) | more
    out = pipe(**inputs | {"latents": latents(family), "output_type": "latent"} | more)
    return out.frames if hasattr(out, "frames") else out.images


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("family", [NAMED[n] for n in SCALE], ids=list(SCALE))
def test_a_guided_pipeline_is_the_standalone_solve_with_the_wrapper(family: Family, name: str) -> None:
    """One batch (sd, sd3, pixart with its learned variance) and two calls (flux, wan, lumina2, which negates what its
    network says), in eps and in flow. Measured: 4e-7 of the largest value."""
    pipe = family.build()
    settings, wrap = WRAPPERS[name]
    known = process(pipe.scheduler)
    grid = build(known.path, shifted, STEPS, shift=2.0)
    read = [reading(known, n) for n in branches(family.name, pipe, family.inputs())]
    with torch.no_grad():
        want = solve(ddim, wrap(*read, SCALE[family.name], known.target), latents(family), grid)
        plain = solve(ddim, cfg(*read, scale=SCALE[family.name]), latents(family), grid)
    laid = {"solver": "ddim", "grid": {"shifted": {"shift": 2.0}}, "steps": STEPS}
    with hasten.accelerate(pipe, Recipe.from_dict(laid | {"methods": [{f"guidance.{name}": settings}]})) as handle:
        got = run(pipe, family)
        again = run(pipe, family)
        assert handle.patches[0][1].tally["guided"] == 2 * STEPS
    most = want.abs().max().clamp_min(1)
    assert (got - want).abs().max() <= 1e-5 * most
    assert (got - want).abs().max() <= 1e-3 * (plain - want).abs().max()  # of what it does to plain guidance
    assert torch.equal(got, again)  # no state crosses from one picture to the next
    with hasten.accelerate(pipe, Recipe.from_dict(laid)):
        assert (run(pipe, family) - plain).abs().max() <= 1e-4 * most


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_cfg_pp_is_exact_in_diffusers_own_ddim_and_flow_euler_too(name: str) -> None:
    """The end of each step is known from the scheduler's own times."""
    family = NAMED[name]
    pipe = family.build()
    known = process(pipe.scheduler)
    pipe.scheduler.set_timesteps(6)
    told = pipe.scheduler.sigmas if name == "sd3" else [*(known.t(pipe.scheduler.timesteps.double())), 0.0]
    read = [reading(known, n) for n in branches(name, pipe, family.inputs())]
    with torch.no_grad():
        want = solve(ddim, cfg_pp(*read, scale=0.6), latents(family), at(known.path, [float(t) for t in told]))
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"guidance.cfg_pp": {"scale": 0.6}}]})):
        got = run(pipe, family, num_inference_steps=6)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max().clamp_min(1)


def test_cfg_pp_refuses_solvers_that_ask_twice_at_a_time() -> None:
    family = NAMED["sd3"]
    pipe = family.build()
    recipe = {"solver": "heun", "steps": 3, "methods": [{"guidance.cfg_pp": {}}]}
    with hasten.accelerate(pipe, Recipe.from_dict(recipe)), pytest.raises(Refused, match="one call a step"):
        run(pipe, family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_forward_is_told_where_it_is(family: Family) -> None:
    """The scale of the call, where the state lies and where the next evaluation is, and what the network says."""
    seen: list[Moment] = []
    pipe = family.build()
    network = getattr(pipe, "unet", None) or pipe.transformer
    known = process(pipe.scheduler)
    watched(network, seen)
    with hasten.accelerate(pipe, Recipe(solver="ddim")):
        family.call(pipe)
    seen = list(dict.fromkeys(seen))
    want = 2.0 if family.name == "flux" else 3.0
    assert {m.scale for m in seen} == {want}
    assert {m.target for m in seen} == {known.target}
    steps = [m for m in seen if m.branch in ("both", "cond")]
    assert len(steps) == 6
    for m, after in zip(steps, [*steps[1:], None], strict=True):
        assert m.node is not None and m.node.end is not None
        assert abs(m.node.t - m.t) < 1e-3  # schedulers may round the times that they tell
        assert m.node.end.t == (after.node.t if after is not None and after.node is not None else 0.0)


def watched(network: nn.Module, seen: list[Moment]) -> None:
    """Notes the moment of every forward, from a layer within: outside, nobody has said it yet."""
    first = next(m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d))
    first.register_forward_pre_hook(lambda *_: seen.append(moment.now()))


def test_of_two_networks_each_is_told_its_own_scale() -> None:
    """Wan 2.2: one for the noisy steps, one for the rest, each with a scale."""
    family = NAMED["wan"]
    parts = family.build().components
    pipe = WanPipeline(**parts | {"transformer_2": copy.deepcopy(parts["transformer"])}, boundary_ratio=0.6)
    pipe.set_progress_bar_config(disable=True)
    early: list[Moment] = []
    late: list[Moment] = []
    watched(pipe.transformer, early)
    watched(pipe.transformer_2, late)
    with hasten.accelerate(pipe, Recipe(solver="ddim", steps=6, grid="uniform")):
        family.call(pipe, guidance_scale_2=2.0)
        assert ({m.scale for m in early}, {m.scale for m in late}) == ({3.0}, {2.0})
        assert min(m.t for m in early) >= 0.6 > max(m.t for m in late)
        late.clear()
        family.call(pipe)
        assert {m.scale for m in late} == {3.0}


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
@pytest.mark.parametrize("method", ["apg", "rescale", "zero_star"])
def test_outside_the_interval_a_guidance_is_left_out(name: str, method: str) -> None:
    """With the interval outermost, the conditional branch alone is what is left everywhere."""
    family = NAMED[name]
    pipe = family.build()
    off = {"true_cfg_scale": 1.0} if name == "flux" else {"guidance_scale": 1.0}
    alone = family.call(pipe, **off)
    recipe = {"methods": [f"guidance.{method}", {"guidance.interval": {"low": 0.0, "high": 0.0}}]}
    with hasten.accelerate(pipe, Recipe.from_dict(recipe)):
        got = family.call(pipe)
    assert (got - alone).abs().max() < 2e-4 * alone.abs().max().clamp_min(1)


@pytest.mark.parametrize("family", [NAMED["sd"], NAMED["flux"]], ids=lambda f: f.name)
def test_where_no_guidance_runs_nothing_changes(family: Family) -> None:
    pipe = family.build()
    off = {"true_cfg_scale": 1.0} if family.name == "flux" else {"guidance_scale": 1.0}
    alone = family.call(pipe, **off)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": ["guidance.apg"]})):
        assert torch.equal(family.call(pipe, **off), alone)


@pytest.mark.parametrize("family", [NAMED["sd3"], NAMED["wan"]], ids=lambda f: f.name)
def test_it_composes_with_bf16_and_caches(family: Family) -> None:
    """In bfloat16 with a cache that never reuses, near to float32: 2 % of the largest value."""
    pipe = family.build()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": ["guidance.apg"]})):
        want = family.call(pipe)
    methods = ["runtime.bf16", "guidance.apg", {"cache.interval": {"every": 1}}]
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": methods})):
        assert (family.call(pipe) - want).abs().max() < 0.02 * want.abs().max()


class Said(nn.Module):
    """A network of the exact denoiser of one law for the first half of a batch, of another for the second."""

    def __init__(self, node: Node, sign: float, laws: tuple[Mixture, ...]) -> None:
        super().__init__()
        self.node, self.sign, self.laws = node, sign, laws

    def forward(self, x: Tensor) -> tuple[Tensor]:
        parts = [law.denoise(h, self.node) for law, h in zip(self.laws, x.chunk(len(self.laws)), strict=True)]
        return (self.sign * torch.cat([p.eps - p.x0 for p in parts]),)


COND, UNCOND = Mixture(means=(0.5, 1.5), weights=(0.6, 0.4)), Mixture()
NODE = at(Flow(), [0.6, 0.3]).nodes[0]
HERE = Moment(branch="both", scale=4.0, node=NODE, target="flow", run=1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_networks_whose_answer_the_pipeline_negates_are_read_as_such(sign: float) -> None:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = Said(NODE, sign, (UNCOND, COND))
    want = apg(COND.denoise, UNCOND.denoise, scale=4.0, eta=0.3, momentum=0.0)(x, NODE)
    with Apg(eta=0.3, momentum=0.0).apply(net), moment.at(replace(HERE, sign=sign)):
        u, c = (sign * net(torch.cat([x, x]))[0]).chunk(2)
    assert torch.equal(u, c)
    assert torch.allclose(u + 4.0 * (c - u), want.eps - want.x0, atol=1e-12)


def test_two_calls_are_solved_for_the_second_answer_and_never_for_one_of_another_step() -> None:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = Said(NODE, 1.0, (COND,))
    want = rescale(COND.denoise, UNCOND.denoise, scale=4.0, phi=0.5, target="flow")(x, NODE)
    with Rescale(phi=0.5).apply(net):
        with moment.at(replace(HERE, branch="cond")):
            c = net(x)[0]
        net.laws = (UNCOND,)
        with moment.at(replace(HERE, branch="uncond", step=1)):
            later = net(x)[0]
        with moment.at(replace(HERE, branch="uncond")):
            u = net(x)[0]
    p = UNCOND.denoise(x, NODE)
    assert torch.equal(later, p.eps - p.x0)  # its conditional call was never made
    assert torch.allclose(u + 4.0 * (c - u), want.eps - want.x0, atol=1e-12)
    assert not torch.equal(c, u)


def test_a_conditional_answer_is_given_once_and_at_its_own_evaluation_alone() -> None:
    kept, here = Conditional(), Moment(step=2, run=1)
    assert kept.take(here) is None
    kept.keep(here, "said")
    for other in (Moment(step=2, run=2), Moment(step=1, run=1), Moment(step=3, run=1)):
        assert kept.take(other) is None
    assert kept.take(replace(here, branch="uncond")) == "said"
    assert kept.take(here) is None


def test_what_cannot_be_guided_is_refused_in_a_sentence() -> None:
    net, x = Said(NODE, 1.0, (UNCOND, COND)), torch.zeros(2, 6)
    with Apg().apply(net):
        for unknown in ({"scale": None}, {"node": None}, {"target": None}):
            with (
                moment.at(replace(HERE, **unknown)),
                pytest.raises(Refused, match=r"guidance\.apg works in pipelines that compute u \+ s"),
            ):  # type: ignore[arg-type]
                net(x)
    odd = Said(NODE, 1.0, (UNCOND,))
    with Apg().apply(odd), moment.at(HERE), pytest.raises(Refused, match="a batch of 3 rows has no two halves"):
        odd(torch.zeros(3, 6))


@pytest.mark.parametrize("name", ["lumina2", "qwen"])
@pytest.mark.parametrize("method", ["apg", "cfg_pp", "rescale", "zero_star"])
def test_pipelines_that_change_what_they_guided_are_refused(name: str, method: str) -> None:
    """Qwen and Lumina 2 give the sum the length of c: what is answered for a step of zero would come out as noise."""
    pipe = NAMED[name].build()
    refused = pytest.raises(Refused, match=rf"guidance\.{method} works in pipelines that compute u \+ s")
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [f"guidance.{method}"]})), refused:
        NAMED[name].call(pipe)


def test_at_the_noisy_end_of_an_eps_network_it_stays_finite() -> None:
    """lam is finite there, and the prediction of x0 large."""
    node = at(Preserving(), [1.0, 0.0]).nodes[0]
    p = Prediction.of("eps", torch.ones(2, 4), torch.ones(2, 4), node)
    guided = apg(lambda *_: p, lambda *_: p, scale=4.0)(p.x, node)
    assert bool(guided.x0.isfinite().all())
