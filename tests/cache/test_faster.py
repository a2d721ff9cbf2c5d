"""FasterCache against its equations, with forward hooks on an untouched network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from caches import ALL, TEXT, TWICE, Broken, breaking, built, comes_clean, counted, driven, neutral, on, prompted
from families import _unet
from hasten import Recipe, moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.cache.faster import Faster, carried, low_frequencies
from hasten.halves import instead, said
from hasten.moment import Moment

PACKED = {"flux", "qwen", "ltx", "stable_audio"}
STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def spectra(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high part of a centred spectrum, by a mask over its places."""
    full = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))
    height, width = x.shape[-2:]
    radius, mask = min(height, width) // 5, torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            mask[i, j] = (i - height // 2) ** 2 + (j - width // 2) ** 2 <= radius**2
    return full * mask, full * (1 - mask)


def back(spectrum: Tensor) -> Tensor:
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


@contextmanager
def slowly(net: Any, per: int, start: int, every: int, full: int, slope: float, alpha: float) -> Iterator[None]:
    """Every attention and both branches run; what leaves them is replaced by what the paper's equations give."""

    def whole(step: int) -> bool:
        return step < start or (step - start) % full == 0

    handles = []
    for site in anatomy(net).attentions("self", "temporal", "joint"):
        calls: list[int] = [0]
        history: dict[int, list[Any]] = {}

        def hook(_m: Any, _a: Any, out: Any, calls: Any = calls, history: Any = history) -> Any:
            step, past = calls[0] // per, history.setdefault(calls[0] % per, [])
            calls[0] += 1
            if step > start and (step - start) % every and (full == 1 or not whole(step)):
                last, before = past[-1], past[-2] if len(past) > 1 else past[-1]
                w = slope * (step - start) / (STEPS - 1 - start)
                if isinstance(out, tuple):
                    return tuple(a + w * (a - b) for a, b in zip(last, before))
                return last + w * (last - before)
            past.append(out)
            return out

        handles.append(site.module.register_forward_hook(hook))
    done, kept = [0], {}

    def guide(_m: Any, _a: Any, out: Any) -> Any:
        step, turn = divmod(done[0], per)
        done[0] += 1
        answer = said(out)
        if per == 1:
            u, c = answer.chunk(2)
        elif turn == 0:
            kept["c"] = answer
            return out
        else:
            u, c = answer, kept["c"]
        if full == 1:
            return out
        if whole(step):
            kept["low"], kept["high"] = (a - b for a, b in zip(spectra(u), spectra(c)))
            return out
        low, high = spectra(c)
        one, two = (1 + alpha, 1.0) if step < STEPS / 2 else (1.0, 1 + alpha)
        u = back(low + one * kept["low"] + high + two * kept["high"]).to(c.dtype)
        return instead(out, torch.cat([u, c]) if per == 1 else u)

    handles.append(net.register_forward_hook(guide))
    yield
    for handle in handles:
        handle.remove()


def test_intervals_of_one_are_the_baseline_and_networks_without_attention_are_refused() -> None:
    assert neutral("cache.faster") == set(ALL) - {"ddpm"}


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 2, "full": 1, "slope": 0.5, "alpha": 0.0},
        {"every": 1, "full": 3, "slope": 0.0, "alpha": 0.3},
        {"every": 2, "full": 5, "slope": 1.0, "alpha": 0.2},
    ],
    ids=["attention", "guidance", "both"],
)
@pytest.mark.parametrize("name", ["sd", "sd3", "pixart", "wan", "cogvideox", "latte", "svd", "animatediff"])
def test_a_reused_step_is_the_slow_reference(name: str, settings: dict[str, Any]) -> None:
    """Pictures and videos, in one batch and with a call for each branch, with words and picture in one attention
    (SD3, CogVideoX) and a learned variance (PixArt). Bit for bit where no rows are left out; else rows of another
    batch differ by rounding."""
    pipe, before = built(name)
    net = next(iter(networks(pipe).values()))
    with slowly(net, 2 if name in TWICE else 1, start=1, **settings):
        want = ALL[name].call(pipe)
    with on(pipe, "cache.faster", start=0.17, **settings):
        got = ALL[name].call(pipe)
    gap, effect = (got - want).abs().max(), (before - want).abs().max()
    assert effect > 0
    assert gap <= min(0.01 * effect, 2e-5 * want.abs().max())
    assert settings["full"] > 1 or torch.equal(got, want)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"ddpm", "wan22"}))
def test_between_full_steps_one_branch_is_computed(name: str) -> None:
    """Counted at the first block: half the rows at steps 2, 4 and 5. Networks of packed tokens keep all."""
    pipe, _ = built(name)
    net = next(iter(networks(pipe).values()))
    with on(pipe, "cache.faster", start=0.17, full=2, every=1), counted(anatomy(net).blocks[0].module) as blocks:
        ALL[name].call(pipe)
    rows = [sum(n for m, n in blocks if m.step == s) for s in range(STEPS)]
    thin = () if name in PACKED else (2, 4)
    assert rows == [rows[0] // 2 if s in thin else rows[0] for s in range(STEPS)]
    assert {m.branch for m, _ in blocks if m.step in thin} <= {"cond"}


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_attention_runs_at_its_interval_from_the_start_on_and_at_full_steps(name: str) -> None:
    pipe, _ = built(name)
    net = next(iter(networks(pipe).values()))
    site: Any = anatomy(net).attentions("self", "joint")[0].module
    for settings, ran in (
        ({"start": 0.34, "every": 2, "full": 1}, [0, 1, 2, 4]),
        ({"start": 0.34, "every": 3, "full": 20}, [0, 1, 2, 5]),
        ({"start": 0.0, "every": 10, "full": 4}, [0, 4]),
        ({"start": 1.0, "every": 2, "full": 2}, [0, 1, 2, 3, 4, 5]),
    ):
        with on(pipe, "cache.faster", **settings), counted(site.to_q) as calls:
            ALL[name].call(pipe)
        assert sorted({m.step for m, _ in calls}) == ran


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (2, 2), (1, 3), (16, 12)])
def test_the_low_frequencies_are_those_of_the_centred_spectrum(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(low_frequencies(x), back(spectra(x)[0]), atol=1e-12)
    assert torch.allclose(low_frequencies(low_frequencies(x)), low_frequencies(x), atol=1e-12)  # a projection
    flat = torch.ones_like(x)
    assert torch.allclose(low_frequencies(flat), flat, atol=1e-12)


def test_attention_is_carried_on_in_a_line() -> None:
    """At equal distances and weight 1 a line is met exactly; with one output known it is given again."""
    one, two, three = (torch.tensor([1.0, -2.0]) + i * torch.tensor([0.5, 3.0]) for i in range(3))
    assert torch.equal(carried(two, one, 1.0), three)
    assert torch.equal(carried((two, one), (one, one), 1.0)[0], three)
    assert carried(two, None, 0.7) is two
    method = Faster(start=0.2, slope=0.6)
    weights = [method.weight(Moment(step, 11)) for step in range(2, 11)]
    assert weights == pytest.approx([0.6 * i / 8 for i in range(9)])


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_nothing_is_left_behind(name: str) -> None:
    comes_clean("cache.faster", name, start=0.17, full=3)


def test_branches_runs_forms_and_broken_forwards_are_kept_apart() -> None:
    """The unconditional branch reads the conditional one's answer and nothing else of it; the conditional branch none
    of the unconditional one's; a third call in an evaluation reads neither."""
    net: Any = _unet()
    method = Faster(start=0.0, every=2, full=3)

    def at(branch: Any, x: Tensor, step: int, run: int) -> Tensor:
        with torch.no_grad(), moment.at(Moment(step, 8, 0.5, run, branch)):
            return net(x, 500.0, encoder_hidden_states=TEXT["cond"][: len(x)]).sample

    x, y = (prompted("cond")(i)[0][0] for i in (1, 2))
    narrow, plain = at("cond", x[:, :, :, :8], 0, 0), at("cond", y, 0, 0)
    with method.apply(net) as patch:
        together = driven(net, {b: prompted(b) for b in TEXT}, 6, 1)
        assert patch.tally["spared"] == 4
        alone = driven(net, {"cond": prompted("cond")}, 6, 2)
        assert all(map(torch.equal, together["cond"], alone["cond"]))
        at("cond", x, 0, 5), at("uncond", x, 0, 5)
        assert not torch.equal(at("cond", y, 1, 5), plain)
        assert torch.equal(at("other", y, 1, 5), plain)
        assert torch.equal(at("cond", x[:, :, :, :8], 2, 5), narrow)
        assert torch.equal(at("uncond", x[:, :, :, :8], 2, 5), narrow)  # of another form: not rebuilt
        assert torch.equal(at("cond", y, 1, 6), plain)
        assert torch.equal(at("uncond", y, 1, 6), plain)
        at("cond", x, 0, 7)
        with breaking(net.conv_out, 1), pytest.raises(Broken):
            at("uncond", x, 0, 7)
        at("cond", y, 1, 7)
        assert patch.tally["spared"] == 4  # the full step was not finished: both branches run
        at("uncond", y, 1, 7)
        assert patch.tally["spared"] == 4
        pairs = {"encoder_hidden_states": torch.cat([TEXT["uncond"], TEXT["cond"]])}
        for step, breaks in ((0, False), (1, False), (3, True), (4, False)):
            with torch.no_grad(), moment.at(Moment(step, 8, 0.5, 9, "both")):
                if breaks:  # at a full step: its difference is not known, and the older one is not read
                    with breaking(net.conv_out, 1), pytest.raises(Broken):
                        net(torch.cat([x, y]), 500.0, **pairs)
                else:
                    net(torch.cat([x, y]), 500.0, **pairs)
            assert patch.tally["halved"] == min(step, 1)
    assert torch.equal(at("cond", y, 1, 5), plain)


def test_a_call_that_a_guidance_adds_does_not_take_the_conditional_answer() -> None:
    """Perturbed-attention guidance calls the network once more between the two branches."""
    pipe, _ = built("wan")
    spared = []
    for more in ([], ["guidance.perturbed"]):
        recipe = Recipe.from_dict({"methods": [{"cache.faster": {"start": 0.0, "every": 1}}, *more]})
        with hasten.accelerate(pipe, recipe) as handle:
            ALL["wan"].call(pipe)
            spared.append(sum(patch.tally["spared"] for _, patch in handle.patches))
    assert spared[0] == spared[1] > 0
