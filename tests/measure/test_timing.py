"""Timing pairs what it compares, and its ratios survive a machine that slows down."""

import json
import os

import pytest
import torch

from hasten.measure.timing import Spread, cold, compare


class Machine:
    """A clock that calls move on; each second costs `load(now)` times as much."""

    def __init__(self, load=lambda now: 1.0):
        self.now, self.load, self.log = 0.0, load, []

    def call(self, name, seconds, first=None):
        costs = iter([first] if first is not None else [])

        def run():
            self.log.append(name)
            self.now += next(costs, seconds) * self.load(self.now)

        return run

    def compare(self, before, after, **settings):
        return compare(before, after, sync=lambda: None, clock=lambda: self.now, **settings)


def test_seconds_and_ratios_are_those_of_the_clock():
    m = Machine()
    found = m.compare(m.call("b", 6.0), m.call("a", 2.0), pairs=5)
    assert found.before == (6.0,) * 5
    assert found.after == (2.0,) * 5
    assert found.speedup == Spread(3, 3, 3, 3, 3, 3)


def test_the_order_alternates_within_interleaved_pairs():
    m = Machine()
    m.compare(m.call("b", 1.0), m.call("a", 1.0), pairs=4, warmup=2)
    assert "".join(m.log) == "ba" * 2 + "ba" + "ab" + "ba" + "ab"


def test_a_slow_first_call_is_told_apart_and_spoils_nothing():
    m = Machine()
    found = m.compare(m.call("b", 6.0), m.call("a", 2.0, first=90.0), pairs=3, warmup=1)
    assert (found.first_before, found.first_after) == (6.0, 90.0)
    assert found.speedup.max == 3


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    """Load grows several times over the run: medians of separate runs would be far off, pairs stay at 3."""
    m = Machine(load=lambda now: 1 + now / 8)
    found = m.compare(m.call("b", 0.6), m.call("a", 0.2), pairs=20)
    assert max(found.before) > 3 * min(found.before)
    assert found.speedup.median == pytest.approx(3, rel=0.05)
    m = Machine(load=lambda now: 1 + now / 8)
    apart = [[], []]
    for side, seconds in ((0, 0.6), (1, 0.2)):
        for _ in range(20):
            start = m.now
            m.call("", seconds)()
            apart[side].append(m.now - start)
    assert abs(Spread.of(apart[0]).median / Spread.of(apart[1]).median - 3) > 0.3


def test_the_device_is_waited_for_before_each_reading():
    m, waits = Machine(), []

    def wait():
        m.now += 1.0 if m.log and waits[-1:] != [len(m.log)] else 0.0  # work that was queued by the last call
        waits.append(len(m.log))

    found = compare(m.call("b", 1.0), m.call("a", 1.0), pairs=2, warmup=1, sync=wait, clock=lambda: m.now)
    assert found.before == (2.0, 2.0)


def test_a_spread_is_its_quantiles():
    s = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (s.min, s.low, s.median, s.high, s.max) == (1, 2, 3, 4, 5)
    assert s.tenth == pytest.approx(1.4)
    assert str(Spread.of([11.8, 12.3, 12.9])) == "12.3x (12.1-12.6)"
    assert Spread.of([0.0123]).text(" s") == "0.0123 s (0.0123-0.0123)"
    assert Spread.of([1234.5]).text(" s") == "1234 s (1234-1234)"
    with pytest.raises(ValueError, match="one measurement or more"):
        Spread.of([])


def test_the_dict_is_json_with_every_pair():
    m = Machine()
    found = json.loads(json.dumps(m.compare(m.call("b", 6.0), m.call("a", 2.0), pairs=3).to_dict()))
    assert found["pairs"] == [{"before": 6.0, "after": 2.0}] * 3
    assert found["speedup"]["median"] == 3
    assert found["first_call_seconds"] == {"before": 6.0, "after": 2.0}


def test_the_real_clock_tells_sleep():
    import time

    found = compare(lambda: time.sleep(0.03), lambda: time.sleep(0.01), pairs=3, warmup=1)
    assert min(found.before) >= 0.03
    assert min(found.after) >= 0.01


@pytest.mark.parametrize("settings", [{"pairs": 0}, {"warmup": 0}])
def test_says_what_it_wants(settings):
    with pytest.raises(ValueError, match="must be 1 or more"):
        compare(lambda: None, lambda: None, **settings)


def test_in_the_cold_what_was_compiled_is_compiled_again():
    """With a backend that counts, and a folder for what inductor keeps that was empty."""
    seen = []

    def backend(graph, inputs):
        seen.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        return graph.forward

    compiled = torch.compile(lambda x: (x.sin() + 1).cos() * 3, backend=backend)
    compiled(torch.ones(8))
    compiled(torch.ones(8))
    assert len(seen) == 1
    with cold():
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert os.listdir(folder) == []
        compiled(torch.ones(8))
    assert seen[1:] == [folder]
    assert not os.path.exists(folder)
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == seen[0] != folder
