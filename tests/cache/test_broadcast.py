"""Pyramid attention broadcast against its description, with forward hooks on an untouched network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from caches import ALL, TEXT, TWICE, Broken, breaking, built, comes_clean, counted, driven, neutral, on, prompted
from families import _unet
from hasten import moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.cache.broadcast import Broadcast
from hasten.method import Refused
from hasten.moment import Moment

KINDS = {"self": "spatial", "temporal": "temporal", "cross": "cross", "joint": "joint"}
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


@contextmanager
def slowly(net: Any, intervals: dict[str, int], per: int) -> Iterator[None]:
    """Every attention runs; what leaves it between the steps of its interval is what left it at the last one. It counts
    its own calls, `per` a step, and keeps apart what it gave to each."""
    handles = []
    for site in anatomy(net).attentions():
        every, outs = intervals[KINDS[site.kind]], []

        def hook(_m: Any, _a: Any, out: Any, every: int = every, outs: list[Any] = outs) -> Any:
            step = len(outs) // per
            outs.append(out if step % every == 0 else outs[-per])
            return outs[-1]

        handles.append(site.module.register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def test_intervals_of_one_are_the_baseline_and_networks_without_attention_are_refused() -> None:
    assert neutral("cache.broadcast") == set(ALL) - {"ddpm"}


@pytest.mark.parametrize("name", sorted(set(ALL) - {"ddpm", "wan22"}))
def test_a_reused_step_is_the_slow_reference_bit_for_bit(name: str) -> None:
    """In every family, at an interval of its own for each kind; joint attentions give words and picture."""
    intervals = {"spatial": 2, "temporal": 3, "cross": 4, "joint": 2}
    pipe, before = built(name)
    net = next(iter(networks(pipe).values()))
    with slowly(net, intervals, 2 if name in TWICE else 1):
        want = ALL[name].call(pipe)
    with on(pipe, "cache.broadcast", **intervals, low=0.0, high=1.0):
        got = ALL[name].call(pipe)
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


@pytest.mark.parametrize(
    ("name", "kind"), [("latte", "self"), ("latte", "temporal"), ("latte", "cross"), ("sd3", "joint")]
)
def test_each_kind_has_its_own_interval_within_the_range(name: str, kind: str) -> None:
    """Counted where the queries are made: outside of low < t < high everything runs, and the other kinds always do."""
    pipe, _ = built(name)
    net = next(iter(networks(pipe).values()))
    ones = dict.fromkeys(KINDS.values(), 1)
    with on(pipe, "cache.broadcast", **ones | {KINDS[kind]: 3}, low=0.3, high=0.99):
        for site in anatomy(net).attentions():
            with counted(site.module.to_q) as calls, counted(anatomy(net).blocks[0].module) as blocks:  # type: ignore[arg-type]
                ALL[name].call(pipe)
            times = {m.step: m.t for m, _ in blocks}
            ran = [s for s, t in times.items() if not (site.kind == kind and 0.3 < t < 0.99 and s % 3)]
            assert [m.step for m, _ in calls] == ran
            assert (len(ran) < 6) == (site.kind == kind)


@pytest.mark.parametrize(("name", "kind"), [("latte", "joint"), ("sd3", "self")])
def test_an_interval_for_a_kind_that_is_not_there_is_refused(name: str, kind: str) -> None:
    pipe, _ = built(name)
    ones = dict.fromkeys(KINDS.values(), 1)
    with (
        pytest.raises(Refused, match=r"cache\.broadcast found nothing to change"),
        on(pipe, "cache.broadcast", **ones | {KINDS[kind]: 3}),
    ):
        pass


def test_a_range_the_wrong_way_round_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"low must not be above high, got 0\.6 and 0\.4"):
        Broadcast(low=0.6, high=0.4)


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_nothing_is_left_behind(name: str) -> None:
    comes_clean("cache.broadcast", name, low=0.0, high=1.0)


def test_branches_runs_forms_and_broken_forwards_are_kept_apart() -> None:
    net: Any = _unet()
    method = Broadcast(spatial=4, cross=4, low=0.0, high=1.0)

    def said(x: Tensor, step: int, run: int) -> Tensor:
        with torch.no_grad(), moment.at(Moment(step, 8, 0.5, run, "cond")):
            return net(x, 500.0, encoder_hidden_states=TEXT["cond"][: len(x)]).sample

    (x,), (y,) = (prompted("cond")(i)[0][:1] for i in (1, 2))
    wide, plain = said(x[:, :, :, :8], 0, 0), said(y, 0, 0)
    with method.apply(net) as patch:
        together = driven(net, {b: prompted(b) for b in TEXT}, 6, 1)
        assert patch.tally["reused"] == 2 * patch.tally["ran"]  # at 1, 2, 3 and 5 of 6
        for run, branch in enumerate(TEXT, 2):
            assert all(map(torch.equal, together[branch], driven(net, {branch: prompted(branch)}, 6, run)[branch]))
        said(x, 0, 5)
        assert not torch.equal(said(y, 1, 5), plain)
        assert torch.equal(said(x[:, :, :, :8], 2, 5), wide)
        assert torch.equal(said(y, 1, 6), plain)
        with breaking(net.mid_block, 1), pytest.raises(Broken):
            said(x, 0, 7)
        assert torch.equal(said(y, 1, 8), plain)
    assert torch.equal(said(y, 1, 5), plain)
