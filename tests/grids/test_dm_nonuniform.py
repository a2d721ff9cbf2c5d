"""The bound is the authors', its minimum is found in no time, and a solver on those times errs less."""

from __future__ import annotations

from time import perf_counter

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.grid import build
from hasten.grids.dm_nonuniform import _least, bound
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture
from hasten.solvers.drive import solve

pytestmark = pytest.mark.system("optimized-time-steps")


def even(start: float, stop: float, steps: int) -> Tensor:
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize(("steps", "theirs"), [(5, 231.47846510520725), (10, 28.612224789788645)])
def test_the_bound_is_that_of_the_authors_code(steps: int, theirs: float) -> None:
    """github.com/scxue/DM-NonUniform, `sel_lambdas_lof_obj` on its linear VP schedule from t = 1 to 1e-3, even in lam;
    its order 3, sigma^2 / alpha, weights that cancel after the third step."""
    lams = even(-5.024978406659204, 4.557714932729866, steps)
    assert float(bound(lams, 3, 2.0, True)) == pytest.approx(theirs, rel=1e-12)


def test_the_minimum_is_at_or_below_that_of_the_authors_code() -> None:
    """Theirs is found by SciPy's trust region from even lam."""
    for steps, theirs in ((5, 49.9048192184469), (10, 11.887490248455979)):
        got = _least(-5.024978406659204, 4.557714932729866, steps + 1, 3, 2.0, True)
        assert float(bound(torch.tensor(got, dtype=torch.float64), 3, 2.0, True)) < theirs * (1 + 1e-6)


def slow_bound(lams: Tensor, order: int, power: float, cancel: bool) -> float:
    """By Simpson's rule on e^lam times each Lagrange polynomial, a step and an x0 at a time."""
    n, total = len(lams) - 1, 0.0
    joined = [0.0] * n
    for s in range(n):
        k = min(order, s + 1, n - s)
        through = lams[s - k + 1 : s + 1]
        lam = torch.linspace(float(lams[s]), float(lams[s + 1]), 2001, dtype=torch.float64)
        rule = torch.ones_like(lam)
        rule[1:-1:2], rule[2:-1:2] = 4, 2
        parts = []
        for j in range(k):
            others = torch.cat([through[:j], through[j + 1 :]])
            basis = ((lam[:, None] - others) / (through[j] - others)).prod(1)
            weight = (lam.exp() * basis * rule).sum() * (lam[1] - lam[0]) / 3
            alpha, sigma = torch.sigmoid(2 * through[j]).sqrt(), torch.sigmoid(-2 * through[j]).sqrt()
            parts.append(float(weight * sigma**power / alpha))
        if cancel and s >= 3:
            for j, part in enumerate(parts):
                joined[s - k + 1 + j] += part
        else:
            total += sum(p * p for p in parts) ** 0.5
    return total + sum(map(abs, joined))


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_bound_is_a_slow_references(order: int, cancel: bool) -> None:
    lams = even(-3.0, 3.5, 9) + 0.1 * torch.sin(torch.arange(10, dtype=torch.float64))
    assert float(bound(lams, order, 1.3, cancel)) == pytest.approx(slow_bound(lams, order, 1.3, cancel), rel=1e-9)


@pytest.mark.parametrize("steps", [5, 6, 8, 10, 15, 20])
@pytest.mark.parametrize("cancel", [False, True])
def test_it_falls_is_quick_and_lowers_the_bound(steps: int, cancel: bool) -> None:
    _least.cache_clear()
    start = perf_counter()
    for order in (2, 3):
        settings = {"order": order, "cancel": cancel, "low": -3.5, "high": 4.0}
        grid = build(Flow(), tree.function("grids", "dm_nonuniform"), steps, **settings)
        lams = torch.tensor([-3.5, *[n.lam for n in grid.nodes[1:-1]], 4.0], dtype=torch.float64)
        assert lams.diff().min() >= 0.2 * 7.5 / steps - 1e-9
        least, plain = (float(bound(v, order, 1.0, cancel)) for v in (lams, even(-3.5, 4.0, steps)))
        assert least < 0.98 * plain
        for i in () if cancel else range(1, steps):  # where it has no kinks, no neighbour is lower
            for move in (-0.02, 0.02):
                moved = lams.clone()
                moved[i] += move
                assert float(bound(moved, order, 1.0, cancel)) > least * (1 - 1e-6)
    assert perf_counter() - start < 15


def test_it_is_the_same_where_gradients_are_off_and_on_every_path() -> None:
    _least.cache_clear()
    with torch.inference_mode():
        first = build(Flow(), tree.function("grids", "dm_nonuniform"), 7)
    _least.cache_clear()
    for path in (Flow(), EDM(), Preserving()):
        lams = [n.lam for n in build(path, tree.function("grids", "dm_nonuniform"), 7).nodes[1:-1]]
        assert lams == pytest.approx([n.lam for n in first.nodes[1:-1]], abs=1e-9)


@pytest.mark.parametrize("path", [Preserving(), EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_unipc_errs_less_on_it_than_on_other_grids(path: Path) -> None:
    """Root mean square distance to the exact end of the trajectory, on a mixture, at 5 to 10 calls."""
    law = Mixture()
    x = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * path.sigma(torch.ones((), dtype=torch.float64))
    exact = solve(tree.function("solvers", "heun"), law.denoise, x, fine(path))

    def error(grid: str, steps: int) -> float:
        got = solve(tree.function("solvers", "unipc"), law.denoise, x, build(path, tree.function("grids", grid), steps))
        return float((got - exact).square().mean().sqrt())

    for steps in (5, 6, 8, 10):
        best = min(error(grid, steps) for grid in ("uniform", "log_snr", "karras"))
        assert error("dm_nonuniform", steps) < 0.98 * best, steps


def fine(path: Path) -> object:
    if isinstance(path, Flow):
        return build(path, tree.function("grids", "uniform"), 1500)
    return build(path, tree.function("grids", "karras"), 800, smallest=1e-3)
