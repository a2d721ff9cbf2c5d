"""TeaCache: the sum of rescaled changes of the modulated input, a family at a time, against a slow reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from caches import ALL, built, on
from driven import AUTOCAST, Tiny, asked, behaves, drive, network, path, randn, same, serves
from hasten import moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.cache.first_block import change
from hasten.cache.hold import first_tensor
from hasten.cache.tea import Tea, fit, modulated, record, rescaled
from hasten.moment import Moment

STEPS = 14


def entered(net: Tiny, step: int) -> Tensor:
    """TinyBlock's modulated input, by hand."""
    block = net.transformer_blocks[0]
    emb = torch.tanh(net.time(torch.tensor([[1 - 0.03 * step]])))
    scale, shift, _ = block.modulate(emb).chunk(3, -1)
    return block.norm1(path(step)) * (1 + scale) + shift


@torch.no_grad()
def slowly(threshold: float, coefficients: tuple[float, ...]) -> tuple[list[Tensor], list[bool]]:
    """TeaCache on Tiny, written out: the outputs, and which steps were computed."""
    net, out, computed, total, kept = Tiny(), [], [], 0.0, torch.zeros(())
    for step in range(STEPS):
        x = path(step)
        full = step in (0, STEPS - 1)
        if not full:
            new, old = entered(net, step), entered(net, step - 1)
            moved = ((new - old).abs().mean() / old.abs().mean()).item()
            total += max(0.0, float(np.poly1d(coefficients)(moved)))
            full = total >= threshold
        if full:
            total = 0.0
            kept = net(x, 1 - 0.03 * step) - x
        out.append(x + kept)
        computed.append(full)
    return out, computed


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (3.0, 0.5, 0.01), (-5.0, 1.5, 0.0)])
def test_it_is_the_slow_reference(threshold: float, coefficients: tuple[float, ...]) -> None:
    want, computed = slowly(threshold, coefficients)
    net = Tiny()
    with Tea(threshold=threshold, coefficients=coefficients).apply(net):
        said = drive(asked(net), STEPS)["both"]
    for step, (a, b) in enumerate(zip(said, want, strict=True)):
        assert torch.allclose(a, b, atol=1e-5), step
    assert {s for s, full in enumerate(computed) if full} == full_steps(said, net)


def full_steps(said: list[Tensor], net: Tiny) -> set[int]:
    """Steps whose answer is the untouched network's."""
    plain = drive(asked(net), STEPS)["both"]
    return {s for s, (a, b) in enumerate(zip(said, plain, strict=True)) if torch.equal(a, b)}


def test_the_middle_threshold_computes_some_and_spares_some() -> None:
    counts = [sum(slowly(t, (1.0, 0.0))[1]) for t in (0.05, 0.25, 1e9)]
    assert counts[0] > counts[1] > counts[2] == 2


@AUTOCAST
@pytest.mark.parametrize("name", ALL)
def test_the_modulated_input_is_what_the_first_attention_is_given(name: str) -> None:
    """In each family, whatever modulates it: caught in a real call, at the first block with an attention that runs."""
    pipe, _ = built(name)
    net = next(iter(networks(pipe).values()))
    blocks = [chain[0] for chain in anatomy(net).chains if chain[0].attentions]
    if not blocks:
        pytest.skip("no attention in its blocks")
    seen: list[tuple[Tensor, Tensor]] = []
    handles = []
    for block in blocks:
        found: list[Tensor] = []

        def before(m: nn.Module, args: Any, kwargs: Any, block: Any = block, found: list[Tensor] = found) -> None:
            found[:] = [modulated(block, args, kwargs)]

        def at(m: nn.Module, args: Any, kwargs: Any, found: list[Tensor] = found) -> None:
            if found:  # not while it is being found
                seen.append((found.pop(), first_tensor(args, kwargs).clone()))  # type: ignore[union-attr]

        handles.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.attentions[0].module.register_forward_pre_hook(at, with_kwargs=True))
    drawn = ALL[name].call(pipe, num_inference_steps=2)
    for handle in handles:
        handle.remove()
    assert len(seen) >= 2 * len(blocks)
    assert all(torch.equal(a, b) for a, b in seen)
    assert drawn.isfinite().all()
    assert not any("forward" in vars(m) for m in net.modules())


def test_the_time_alone_moves_it() -> None:
    """PixArt modulates in its block's own forward, outside any norm module: still found."""
    net = network("pixart")
    block, given = anatomy(net).chains[0][0], list[tuple[Any, Any]]()
    handle = block.module.register_forward_pre_hook(lambda m, a, k: given.append((a, k)), with_kwargs=True)
    x, none = randn(1, 4, 16, 16), {"resolution": None, "aspect_ratio": None}
    for t in (900.0, 100.0):
        with torch.no_grad():
            net(x, randn(1, 7, 16, seed=1), timestep=torch.tensor([t]), added_cond_kwargs=none)
    handle.remove()
    (a, b), (p, q) = [(block.inputs(*g).x, modulated(block, *g)) for g in given]
    assert torch.equal(a, p)
    assert change(q, b) > 0.01


def test_a_block_without_attention_is_asked_by_its_input() -> None:
    net = network("ddpm")
    block = anatomy(net).chains[0][0]
    x = randn(1, 16, 8, 8)
    assert modulated(block, (x, randn(1, 64)), {}) is x


class Once(nn.Module):
    """Lists that do not run in the order of the module tree."""

    def __init__(self) -> None:
        super().__init__()
        tiny = Tiny()
        self.time = tiny.time
        self.late, self.early = nn.ModuleList([tiny.transformer_blocks[0]]), tiny.transformer_blocks[1:]

    def forward(self, x: Tensor, t: float) -> Tensor:
        emb = torch.tanh(self.time(torch.tensor([[t]])))
        for block in (*self.early, *self.late):
            x = block(x, emb)
        return x


def test_one_decision_serves_all_chains_and_is_that_of_the_block_that_runs_first() -> None:
    net = Once()
    assert anatomy(net).chains[0][0].name.startswith("late")
    with Tea(threshold=0.3).apply(net) as patch:
        drive(asked(net), STEPS)
        assert patch.tally["ran"] % 3 == 0 and patch.tally["reused"] % 3 == 0
        assert patch.tally["reused"] > 0
    # the reference: the change of what enters early[0]
    totals, computed = 0.0, [0]
    block = net.early[0]

    def enters(step: int) -> Tensor:
        with torch.no_grad():
            scale, shift, _ = block.modulate(torch.tanh(net.time(torch.tensor([[1 - 0.03 * step]])))).chunk(3, -1)
            return block.norm1(path(step)) * (1 + scale) + shift

    for step in range(1, STEPS):
        totals += change(enters(step), enters(step - 1))
        if totals >= 0.3 or step == STEPS - 1:
            computed, totals = [*computed, step], 0.0
    assert patch.tally["ran"] == 3 * len(computed)


def test_the_polynomial_is_found_again_from_pairs() -> None:
    rng = torch.Generator().manual_seed(0)
    true = (7.0, -3.0, 0.5, 1.5, 0.02)
    xs = (0.05 + 0.4 * torch.rand(60, generator=rng, dtype=torch.float64)).tolist()
    exact = fit([(x, rescaled(x, true)) for x in xs], 4)
    assert exact == pytest.approx(true, rel=1e-6)
    noisy = [(x, rescaled(x, true) + e) for x, e in zip(xs, (0.01 * torch.randn(60, generator=rng)).tolist())]
    for degree in (1, 2, 4):  # the same as numpy's own least squares
        assert fit(noisy, degree) == pytest.approx(tuple(np.polyfit(*zip(*noisy), degree)), rel=1e-5)
    for wide in (1e-6, 1e6):  # whatever the scale of the changes
        scaled = fit([(wide * x, y) for x, y in noisy], 2)
        assert [rescaled(wide * x, scaled) for x in xs] == pytest.approx([rescaled(x, fit(noisy, 2)) for x in xs])


@pytest.mark.parametrize("pairs", [[], [(0.1, 0.2)] * 9, [(0.1, 1.0), (0.2, 2.0)]])
def test_too_few_pairs_are_refused(pairs: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="needs 3 different input changes"):
        fit(pairs, 2)


def test_a_polynomial_is_read_highest_power_first_and_not_below_zero() -> None:
    assert rescaled(2.0, (3.0, 0.0, 1.0)) == 13.0
    assert rescaled(2.0, (1.0, 0.0)) == 2.0
    assert rescaled(2.0, (-1.0, 0.0)) == 0.0


def test_a_recorded_run_is_untouched_and_gives_the_changes_of_input_and_output() -> None:
    net = Tiny()
    plain = drive(asked(net), STEPS, branches=("cond", "uncond"))
    patch, pairs = record(net)
    said = drive(asked(net), STEPS, branches=("cond", "uncond"))
    drive(asked(net), 3, run=2)
    patch.remove()
    assert same(said["cond"], plain["cond"]) and same(said["uncond"], plain["uncond"])
    assert len(pairs) == 2 * (STEPS - 1) + 2  # none across branches or trajectories
    with torch.no_grad():
        assert pairs[-2][0] == pytest.approx(change(entered(net, 1), entered(net, 0)), rel=1e-6)
    assert [p[1] for p in pairs[: 2 * STEPS - 2 : 2]] == pytest.approx(
        [change(b, a) for a, b in zip(plain["cond"], plain["cond"][1:], strict=False)], rel=1e-6
    )
    assert not any("forward" in vars(m) for m in net.modules())


def test_a_pipeline_can_be_recorded_and_tuned_by_what_was_found() -> None:
    """In SD3: more pairs than the polynomial needs, and the threshold is then in units of the output's change."""
    pipe, plain = built("sd3")
    net = next(iter(networks(pipe).values()))
    patch, pairs = record(net)
    with on(pipe, "cache.interval", every=1):  # for its clock
        assert torch.equal(ALL["sd3"].call(pipe), plain)
    patch.remove()
    assert len(pairs) == 5
    found = fit(pairs, 2)
    assert [rescaled(x, found) for x, _ in pairs] == pytest.approx([y for _, y in pairs], rel=0.5)


def test_the_first_and_the_last_step_run() -> None:
    net = Tiny()
    with Tea(threshold=10.0).apply(net):
        said = drive(asked(net), STEPS)["both"]
    assert full_steps(said, net) == {0, STEPS - 1}


def test_asked_twice_at_one_moment_it_judges_twice() -> None:
    """Outside a driven loop every call is a first step; a pipeline may ask for a third branch twice."""
    net = Tiny()
    x = path(0), path(5)
    with torch.no_grad():
        plain = [net(y, 0.5) for y in x]
        with Tea(threshold=10.0).apply(net):
            assert same([net(y, 0.5) for y in x], plain)
            with moment.at(Moment(0, 4, run=3)):
                assert same([net(y, 0.5) for y in x], plain)


def test_the_last_call_of_a_moment_is_what_the_next_is_compared_with() -> None:
    net = Tiny()
    with torch.no_grad(), Tea(threshold=0.3).apply(net) as patch:
        for step, x in ((0, path(0)), (0, path(20)), (1, path(20))):
            with moment.at(Moment(step, 4, run=3)):
                net(x, 0.5)
        assert patch.tally == {"ran": 6, "reused": 3}


def test_a_trajectory_that_a_branch_enters_late_starts_clean() -> None:
    """As where a guidance interval leaves the unconditional branch out at first."""
    net = Tiny()
    with Tea(threshold=0.35).apply(net):
        fresh = drive(asked(net), STEPS, run=1, only=range(4, STEPS))["both"]
        drive(asked(net), 2, run=2)
        drive(asked(net), 3, run=3)  # breaks off with a sum under way
        assert same(drive(asked(net), STEPS, run=4, only=range(4, STEPS))["both"], fresh)


def test_it_keeps_the_contract_of_a_cache() -> None:
    behaves(Tea(threshold=0.3))


@AUTOCAST
@pytest.mark.parametrize("name", ALL)
def test_every_family(name: str) -> None:
    serves(Tea(threshold=10.0), Tea(threshold=0.0), name)
