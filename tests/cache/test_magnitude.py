"""MagCache: its plan against hand-computed cases, its measure against norms taken by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from caches import ALL, built, on
from driven import AUTOCAST, Tiny, asked, behaves, drive, path, randn, same, serves
from hasten import moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.cache.magnitude import Magnitude, mean, plan, ratio, record, stretched

T, F = True, False
PLANS = [
    # ratios, threshold, most, retain -> spared
    # errors |1 - product| = 0.1, 0.19, 0.271: sums 0.1, 0.29 > 0.2, so the third runs, and again
    ((0.9, 0.9, 0.9, 0.9), 0.2, 9, 0.0, (F, T, F, T, F)),
    ((0.9, 0.9, 0.9, 0.9), 0.3, 9, 0.0, (F, T, T, F, T)),
    # at most one, two in a row
    ((1.0,) * 6, 0.5, 1, 0.0, (F, T, F, T, F, T, F)),
    ((1.0,) * 6, 0.5, 2, 0.0, (F, T, T, F, T, T, F)),
    # 0.5 * 7 steps: round to 4 that run
    ((1.0,) * 6, 0.5, 9, 0.5, (F, F, F, F, T, T, T)),
    # ratios above and below one: products 0.5, 1.0: the second adds nothing, the third 0.5 again
    ((0.5, 2.0, 0.5, 2.0), 0.5, 9, 0.0, (F, T, T, F, F)),
    # exactly at the threshold is within it
    ((0.75, 1.0), 0.25, 9, 0.0, (F, T, F)),
    # a sudden change runs at once and is then the new start
    ((1.0, 0.2, 1.0, 1.0), 0.3, 9, 0.0, (F, T, F, T, T)),
    ((), 0.3, 9, 0.0, (F,)),
]


@pytest.mark.parametrize(("ratios", "threshold", "most", "retain", "spared"), PLANS)
def test_the_plan_is_what_a_hand_computes(
    ratios: tuple[float, ...], threshold: float, most: int, retain: float, spared: tuple[bool, ...]
) -> None:
    assert plan(ratios, threshold, most, retain) == spared


def authors(gammas: list[float], steps: int, threshold: float, most: int, retain: float) -> tuple[bool, ...]:
    """The loop of MagCache's authors, gamma_0 = 1 for the first step, from memory of their variables."""
    product, error, skipped, out = 1.0, 0.0, 0, []
    for count in range(steps):
        skip = False
        if count >= int(retain * steps + 0.5):
            product *= gammas[count]
            skipped += 1
            error += abs(1 - product)
            if error <= threshold and skipped <= most:
                skip = True
            else:
                product, error, skipped = 1.0, 0.0, 0
        out.append(skip)
    return tuple(out)


@pytest.mark.parametrize("seed", range(20))
def test_past_the_retained_steps_it_is_the_authors_loop(seed: int) -> None:
    """Their count starts at the first step that may be skipped, ours with the last that ran, one before: the same."""
    rng = torch.Generator().manual_seed(seed)
    steps, most = 20, 1 + seed % 4
    gammas = [1.0, *(0.9 + 0.15 * torch.rand(steps - 1, generator=rng)).tolist()]
    retain = 0.05 + 0.02 * seed  # at least one
    assert plan(tuple(gammas[1:]), 0.12, most, retain) == authors(gammas, steps, 0.12, most, retain)


def test_ratios_are_stretched_to_the_nearest() -> None:
    assert stretched((1.0, 2.0, 3.0), 3) == (1.0, 2.0, 3.0)
    assert stretched((1.0, 2.0, 3.0), 5) == (1.0, 2.0, 2.0, 3.0, 3.0)
    assert stretched((1.0, 2.0, 3.0, 4.0, 5.0), 3) == (1.0, 3.0, 5.0)
    assert stretched((1.0, 2.0), 1) == (2.0,)
    assert stretched((1.0, 2.0), 0) == stretched((1.0, 2.0), -1) == ()


def test_the_ratio_is_the_mean_over_tokens() -> None:
    old = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    new = torch.tensor([[[0.0, 5.0], [6.0, 0.0]]])
    assert ratio(new, old) == pytest.approx((1 + 3) / 2)
    image = old.movedim(-1, 1).unsqueeze(-1)  # [B, C, H, W]
    assert ratio(new.movedim(-1, 1).unsqueeze(-1), image) == pytest.approx((1 + 3) / 2)
    assert ratio(torch.stack([image, image], 2), torch.stack([image, image / 2], 2)) == pytest.approx(1.5)  # a video
    assert ratio(old, torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])) == 2.0
    assert ratio(old, 0 * old) == 1.0


STEPS = 10


def by_hand(branch: str = "both") -> list[float]:
    """Ratios of Tiny's residual along the path."""
    ask = asked(Tiny())
    seed = {"cond": 10, "uncond": 20}.get(branch, 0)
    with torch.no_grad():
        rs = [ask(s, branch) - path(s, seed=seed) for s in range(STEPS)]
    return [float((b.norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairwise(rs)]


def test_what_is_measured_is_what_a_hand_measures_and_each_branch_has_its_own() -> None:
    net = Tiny()
    plain = drive(asked(net), STEPS, branches=("cond", "uncond"))
    patch, meter = record(net)
    said = drive(asked(net), STEPS, branches=("cond", "uncond"))
    patch.remove()
    assert all(same(said[b], plain[b]) for b in said)
    for b in ("cond", "uncond"):
        assert meter.done[b] == pytest.approx(by_hand(b), rel=1e-6)
    assert meter.done["cond"] != pytest.approx(meter.done["uncond"], rel=1e-6)
    assert mean(list(meter.done.values())) == pytest.approx(
        [(a + b) / 2 for a, b in zip(by_hand("cond"), by_hand("uncond"), strict=True)], rel=1e-6
    )


def test_without_ratios_the_first_whole_trajectory_is_untouched_and_the_next_as_with_the_ratios() -> None:
    net = Tiny()
    plain = drive(asked(net), STEPS)["both"]
    given = Magnitude(threshold=0.06, retain=0.1, ratios=tuple(by_hand()))
    with given.apply(net) as patch:
        want = drive(asked(net), STEPS)["both"]
        assert 0 < patch.tally["reused"] < 3 * STEPS
        assert patch.tally["measured"] == 0
    with Magnitude(threshold=0.06, retain=0.1).apply(net) as patch:
        drive(asked(net), STEPS - 3, run=0, only=range(4))  # broken off: not a measure
        assert patch.tally["measured"] == 0
        assert same(drive(asked(net), STEPS, run=1)["both"], plain)
        assert patch.tally["measured"] == 1
        assert patch.tally["reused"] == 0
        for run in (2, 3):
            assert same(drive(asked(net), STEPS, run=run)["both"], want)
        assert patch.tally["measured"] == 1


def test_the_handle_tells_that_the_first_picture_was_measured() -> None:
    pipe, plain = built("sd3")
    with on(pipe, "cache.magnitude", threshold=10.0, most=20, retain=0.0) as handle:
        assert torch.equal(ALL["sd3"].call(pipe), plain)
        assert "measured 1" in str(handle)
        again = ALL["sd3"].call(pipe)
        assert not torch.equal(again, plain)
        assert torch.equal(ALL["sd3"].call(pipe), again)


class Scaled(nn.Module):
    """Adds a fixed direction, by a factor of the step alone."""

    def __init__(self, factors: list[float], seed: int) -> None:
        super().__init__()
        self.factors, self.to = factors, randn(2, 3, 4, seed=seed)
        self.ran: list[int] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.ran.append(moment.now().step)
        return hidden_states + self.factors[moment.now().step] * self.to


class Two(nn.Module):
    """Two chains, whose residuals change by factors of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList([Scaled([1.0, 0.5, 0.5, 0.5, 0.5], 1)])
        self.b = nn.ModuleList([Scaled([1.0, 1.0, 1.0, 0.25, 0.25], 2)])
        for block in (*self.a, *self.b):
            block.attn = nn.Identity()  # of the transformers

    def forward(self, x: Tensor) -> Tensor:
        return self.b[0](self.a[0](x))


def test_of_several_chains_gamma_is_the_mean_and_all_run_or_none() -> None:
    net = Two()
    assert len(anatomy(net).chains) == 2
    patch, meter = record(net)
    drive(lambda *_: net(randn(2, 3, 4)), 5)
    patch.remove()
    assert meter.done["both"] == pytest.approx([0.75, 1.0, 0.625, 1.0])
    for block in (net.a[0], net.b[0]):
        block.ran.clear()
    with Magnitude(threshold=0.5, retain=0.0, ratios=meter.done["both"]).apply(net):
        drive(lambda *_: net(randn(2, 3, 4)), 5)
    # errors: 0.25, 0.25, then 1 - 0.46875 = 0.53: over; then 0
    assert net.a[0].ran == net.b[0].ran == [0, 3]


def test_a_recipe_stores_what_was_measured(tmp_path) -> None:
    from hasten import Recipe

    wanted = Recipe(methods=(Magnitude(ratios=(0.99, 0.98, 0.5)),))
    wanted.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == wanted


def test_it_keeps_the_contract_of_a_cache() -> None:
    behaves(Magnitude(threshold=0.3, ratios=(0.95,)))


@AUTOCAST
@pytest.mark.parametrize("name", ALL)
def test_every_family(name: str) -> None:
    serves(Magnitude(threshold=0.5, ratios=(1.0,)), Magnitude(threshold=0.0), name)


@AUTOCAST
@pytest.mark.parametrize("name", ["sd", "flux", "latte"])
def test_families_of_many_chains_are_measured_whole(name: str) -> None:
    pipe, plain = built(name)
    patch, meter = record(next(iter(networks(pipe).values())))
    with on(pipe, "cache.interval", every=1):
        assert torch.equal(ALL[name].call(pipe), plain)
    patch.remove()
    assert meter.done
    assert all(len(r) == 5 and all(0.2 < g < 5 for g in r) for r in meter.done.values())
