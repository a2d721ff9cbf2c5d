"""TaylorSeer: exact on polynomials of the step, better with the order, and cache.interval at order 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from caches import ALL
from driven import AUTOCAST, Tiny, asked, behaves, drive, network, randn, same, serves
from hasten import moment
from hasten.cache.interval import Interval
from hasten.cache.taylor import Taylor, weights


class Rule(nn.Module):
    """A block that adds a polynomial of the step, and takes no notice of its input."""

    def __init__(self, degree: int, seed: int) -> None:
        super().__init__()
        self.at = [randn(2, 4, seed=10 * seed + k).double() * 0.1**k for k in range(degree + 1)]
        self.ran = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.ran += 1
        return hidden_states + sum(c * moment.now().step ** k for k, c in enumerate(self.at))


class Rules(nn.Module):
    """Blocks of polynomials."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Rule(degree, i) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def errors(degree: int, method: Taylor, only: list[int] | None = None) -> dict[int, float]:
    """By step, how far the forecast is from the truth."""
    net, x = Rules(degree), randn(2, 4).double()
    steps = 16
    true = drive(lambda *_: net(x), steps, only=only)["both"]
    with method.apply(net):
        said = drive(lambda *_: net(x), steps, only=only)["both"]
    asked = range(steps) if only is None else only
    return {s: float((a - b).abs().max()) for s, a, b in zip(asked, said, true, strict=True)}


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_it_is_exact_on_polynomials_of_its_order_once_enough_key_steps_ran(degree: int) -> None:
    found = errors(degree, Taylor(every=3, order=degree))
    assert max(e for s, e in found.items() if s > 3 * degree) < 1e-12
    if degree:  # and no lower order is
        low = errors(degree, Taylor(every=3, order=degree - 1))
        assert min(e for s, e in low.items() if s > 3 * degree and s % 3) > 1e-4


def test_it_is_exact_where_key_steps_lie_unevenly() -> None:
    """Where a guidance interval leaves a branch out for some steps, its key steps are further apart."""
    found = errors(2, Taylor(every=3, order=2), only=[0, 3, 4, 9, 10, 11, 12, 14])
    assert max(e for s, e in found.items() if s >= 9) < 1e-12
    assert found[4] > 1e-4  # two key steps: a line


def test_the_first_trajectory_steps_have_lower_orders() -> None:
    """After one key step it repeats, after two it draws a line: exact on lines from there on, for any order."""
    line = errors(1, Taylor(every=4, order=2))
    assert min(line[s] for s in (1, 2, 3)) > 1e-3
    assert max(e for s, e in line.items() if s >= 4) < 1e-12


def paper(key_features: list[float], gap: float, ahead: float) -> float:
    """TaylorSeer as its authors wrote it: differences taken backwards again and again over one distance, then the
    Taylor sum. The newest feature is the last."""
    rows = [list(key_features)]
    while len(rows[-1]) > 1:
        rows.append([(b - a) / gap for a, b in zip(rows[-1], rows[-1][1:], strict=False)])
    return sum(row[-1] * ahead**i / math.factorial(i) for i, row in enumerate(rows))


@pytest.mark.parametrize("f", [lambda s: 3 - 2 * s, lambda s: math.sin(0.3 * s), lambda s: 0.5 * s * s - s])
def test_to_first_order_it_is_the_papers_and_to_second_better_by_what_the_paper_leaves_out(f) -> None:
    at, gap, keys = 14.0, 4.0, [4.0, 8.0, 12.0]

    def ours(order: int) -> float:
        used = keys[-1 - order :][::-1]
        return sum(w * f(s) for w, s in zip(weights(used, at), used, strict=True))

    assert ours(1) == pytest.approx(paper([f(8.0), f(12.0)], gap, at - 12), rel=1e-12)
    second = (f(12.0) - 2 * f(8.0) + f(4.0)) / gap**2
    # its first derivative is that of half a gap earlier
    assert ours(2) - paper([f(s) for s in keys], gap, at - 12) == pytest.approx(second * gap / 2 * (at - 12), abs=1e-12)


def test_weights_add_up_to_one_and_give_back_what_is_known() -> None:
    assert weights([9.0, 3.0, 0.0], 11.0) == pytest.approx([88 / 54, -22 / 18, 16 / 27])
    assert sum(weights([9.0, 3.0, 0.0], 11.0)) == pytest.approx(1, abs=1e-15)
    for i, s in enumerate([9.0, 3.0, 0.0]):
        assert weights([9.0, 3.0, 0.0], s) == [float(i == j) for j in range(3)]


def test_order_0_is_cache_interval_bit_for_bit() -> None:
    for every in (2, 5):
        out = []
        for method in (Taylor(every=every, order=0), Interval(every=every)):
            net = Tiny()
            with method.apply(net):
                out.append(drive(asked(net), 12, branches=("cond", "uncond")))
        assert all(same(out[0][b], out[1][b]) for b in ("cond", "uncond"))


def test_the_error_falls_with_the_order_on_a_smooth_network() -> None:
    """SD3's blocks, two streams, on a state and a time that move smoothly."""
    net = network("sd3").double()
    text, pooled = randn(1, 7, 16, seed=3).double(), randn(1, 16, seed=4).double()
    a, b = randn(1, 4, 16, 16, seed=1).double(), randn(1, 4, 16, 16, seed=2).double()

    def ask(step: int, _: str) -> Tensor:
        x = math.cos(0.02 * step) * a + math.sin(0.02 * step) * b
        return net(x, text, pooled, torch.tensor([900.0 - 0.1 * step], dtype=torch.float64)).sample

    true = drive(ask, 24)["both"]
    found = []
    for order in (0, 1, 2):
        with Taylor(every=4, order=order).apply(net):
            said = drive(ask, 24)["both"]
        found.append(max(float((x - y).abs().max()) for x, y in zip(said[12:], true[12:], strict=True)))
    assert found[1] < found[0] / 3
    assert found[2] < found[1] / 3


def test_it_runs_the_blocks_at_key_steps_alone() -> None:
    net, x = Rules(1), randn(2, 4).double()
    with Taylor(every=4, order=2).apply(net) as patch:
        drive(lambda *_: net(x), 10)
    assert [b.ran for b in net.blocks] == [3, 3, 3]
    assert patch.tally == {"ran": 9, "reused": 21}


@pytest.mark.parametrize("order", [1, 2])
def test_it_keeps_the_contract_of_a_cache(order: int) -> None:
    behaves(Taylor(every=3, order=order))


@AUTOCAST
@pytest.mark.parametrize("name", ALL)
def test_every_family(name: str) -> None:
    serves(Taylor(every=2, order=2), Taylor(every=1), name)
