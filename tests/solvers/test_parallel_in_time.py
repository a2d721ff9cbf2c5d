"""ParaDiGMS, ParaTAA and SRDS: the sequential sampler's sample, to a tolerance, in fewer passes, never in more."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from families import FAMILIES
from hasten import Recipe, tree
from hasten.brownian import Brownian
from hasten.denoiser import Denoiser, denoiser
from hasten.grid import Grid, at, build
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.recipe import RecipeError
from hasten.solvers.chain import first_loose
from hasten.solvers.ddim import ddim
from hasten.solvers.ddpm import ddpm
from hasten.solvers.declare import Solver
from hasten.solvers.drive import Counted, solve
from hasten.solvers.genie import genie
from hasten.solvers.paradigms import paradigms
from hasten.solvers.parataa import parataa
from hasten.solvers.srds import srds

SOLVERS = [paradigms, parataa, srds]
PATHS = [Flow(), EDM(20.0), Preserving()]
SIZE = 16
MEANS = torch.randn(5, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda v: type(v).__name__)
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
each_eta = pytest.mark.parametrize("eta", [0.0, 0.5, 1.0], ids=["ddim", "half", "ddpm"])


def mixture(path: Path, var: float = 0.05) -> Denoiser:
    """Five Gaussians in 16 dimensions as a network that says v; it answers many times at once."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        a, s = path.alpha(t)[:, None].to(x), path.sigma(t)[:, None].to(x)
        spread, means = var * a**2 + s**2, MEANS.to(x)
        off = x[:, None] - a[:, None] * means
        part = torch.softmax(-(off**2).sum(-1) / (2 * spread), -1)[..., None]
        x0 = (part * (means + (var * a / spread)[:, None] * off)).sum(1)
        return a * (part * (s / spread)[:, None] * off).sum(1) - s * x0

    return denoiser(net, "v")


def wild(x: Tensor, t: Tensor) -> Tensor:
    """A network without smoothness: what one state says tells little of its neighbours."""
    return torch.sin(40 * x + 100 * t[:, None])


def laid(path: Path, steps: int) -> tuple[Grid, Tensor]:
    """The grid from t = 1 to clean, and a start in the path's scale."""
    grid = build(path, tree.function("grids", "karras" if isinstance(path, EDM) else "uniform"), steps)
    return grid, X * math.hypot(grid.nodes[0].alpha, grid.nodes[0].sigma)


@pytest.mark.system("parataa")
@each_eta
@each_path
@each_solver
def test_the_sequential_sample_to_the_tolerance(solver: Solver, path: Path, eta: float) -> None:
    """Of DDIM, and of DDPM with noise of the same seed, at every tolerance and in no more passes than steps; Flow
    starts from pure noise."""
    (grid, x), net = laid(path, 30), mixture(path)
    want = solve(ddpm.given(eta=eta), net, x, grid, Brownian([3]))
    if eta == 0:
        assert torch.equal(want, solve(ddim, net, x, grid))
    for tolerance in (1e-2, 1e-4, 1e-6):
        counted = Counted(net)
        got = solve(solver.given(eta=eta, tolerance=tolerance), counted, x, grid, Brownian([3]))
        assert (got - want).square().mean(1).sqrt().max() <= tolerance
        assert counted.passes <= 30
        assert counted.calls >= 30


@pytest.mark.system("parataa")
@pytest.mark.parametrize(
    ("solver", "eta", "most"),
    [
        (paradigms, 0.0, 18), (parataa, 0.0, 13), (srds, 0.0, 46), (paradigms, 1.0, 29), (parataa, 1.0, 24),
        (srds, 0.5, 55), (srds, 1.0, 55),
    ],
    ids=lambda v: v.name if isinstance(v, Solver) else str(v),
)  # fmt: skip
def test_passes_are_far_fewer_than_steps(solver: Solver, eta: float, most: int) -> None:
    """Of a hundred steps on every path; both costs are counted: a pass is one batch, whose states are the calls."""
    for path in PATHS:
        grid, x = laid(path, 100)
        counted = Counted(mixture(path))
        solve(solver.given(eta=eta), counted, x, grid, Brownian([3]))
        assert counted.passes <= most, (type(path).__name__, counted.passes)
        assert counted.passes < counted.calls


@pytest.mark.system("parataa")
@each_eta
@each_solver
@pytest.mark.parametrize("steps", [1, 2, 7, 24])
def test_never_more_passes_than_steps(solver: Solver, steps: int, eta: float) -> None:
    """On a network that nothing converges on, each pass still settles a step (or a wave of blocks does), and what comes
    out is the sequential sample."""
    (grid, x), net, noise = laid(Flow(), steps), denoiser(wild, "flow"), Brownian([3])
    want = solve(ddpm.given(eta=eta), net, x, grid, noise)
    kinds = [{"window": w} for w in (1, 5, 100)] if solver is not srds else [{"blocks": b} for b in (0, 1, 5, 24)]
    for settings in kinds:
        counted = Counted(net)
        got = solve(solver.given(eta=eta, tolerance=1e-9, **settings), counted, x, grid, noise)
        assert counted.passes <= steps, settings
        assert (got - want).abs().max() < 1e-8, settings


@each_eta
def test_a_window_of_one_is_the_sequential_sampler(eta: float) -> None:
    (grid, x), net, noise = laid(Preserving(), 12), mixture(Preserving()), Brownian([3])
    want = solve(ddpm.given(eta=eta), net, x, grid, noise)
    for solver in (paradigms, parataa):
        counted = Counted(net)
        got = solve(solver.given(window=1, eta=eta), counted, x, grid, noise)
        assert (counted.passes, counted.calls) == (12, 12)
        assert (got - want).abs().max() < 1e-12


# ParaTAA against its description


def slowly(
    path: Path, grid: Grid, x: Tensor, span: int, memory: int, window: int, tolerance: float, passes: int
) -> list[Tensor]:
    """The states x_1 .. x_T, [T, N], before each pass, of one sample, DDIM: the k-th order equations written out from
    the last k steps, and for each row a least-squares problem of its own on the rows up to it, of the passes that had
    it. Tang et al. 2024, arXiv:2402.09970 sec. 3 and alg. 1, with no regard for cost."""
    nodes, steps, net = grid.nodes, len(grid), mixture(path)
    sizes = [math.hypot(n.alpha, n.sigma) for n in nodes]
    states = [x * size / sizes[0] for size in sizes]
    seen: list[tuple[list[Tensor], list[Tensor], int]] = []
    first, found = 1, []
    for _ in range(passes):
        found.append(torch.stack(states[1:]))
        eps = [net(s[None], n).eps[0] for s, n in zip(states, nodes)]
        x0 = [net(s[None], n).x0[0] for s, n in zip(states, nodes)]
        plain = [nodes[i + 1].alpha * x0[i] + nodes[i + 1].sigma * eps[i] for i in range(steps)]
        residuals: list[Tensor] = [torch.zeros_like(x)]
        for i in range(1, steps + 1):
            back = max(first - 1, i - span)  # the state that the equation of x_i runs from
            y = plain[back]
            for j in range(back + 1, i):
                gain = nodes[j + 1].alpha / nodes[j].alpha
                y = gain * y + (nodes[j + 1].sigma - gain * nodes[j].sigma) * eps[j]
            residuals.append(y - states[i])
        last = min(first - 1 + window, steps)
        seen = [*seen, (states, residuals, last)][-memory:]
        off = [float((a - b).square().mean().sqrt()) for a, b in zip(plain, states[1:])]
        loose = next(i for i in range(first, last + 1) if i == last or off[i - 1] > tolerance / steps * sizes[i])
        new = list(states)
        for i in range(first, last + 1):
            new[i] = states[i] + residuals[i]
            pairs = [(a, b) for a, b in pairwise(seen) if i <= a[2]]
            if i > loose and pairs:
                change = torch.stack([torch.cat([b[1][j] - a[1][j] for j in range(first, i + 1)]) for a, b in pairs], 1)
                right = torch.cat(residuals[first : i + 1])[:, None]
                weights = torch.linalg.lstsq(change, right, driver="gelsd").solution[:, 0]
                for w, (a, b) in zip(weights, pairs):
                    new[i] = new[i] - w * (b[0][i] - a[0][i] + b[1][i] - a[1][i])
        new[last + 1 :] = [new[last] * size / sizes[last] for size in sizes[last + 1 :]]
        states, first = new, loose + 1
    return found


@pytest.mark.system("parataa")
@pytest.mark.parametrize("window", [6, 12])
@pytest.mark.parametrize("memory", [1, 2, 3, 4])
@pytest.mark.parametrize("span", [1, 4, 20])
def test_parataas_passes_are_the_papers(span: int, memory: int, window: int) -> None:
    """Every state that a pass asks for equals the slow reference's, pass after pass, on two paths: of two samples,
    neither of which sees the other, where a pass settles one step, and of one where it settles several."""
    for path, count, tolerance in ((Preserving(), 2, 1e-12), (EDM(20.0), 1, 1e-12), (Preserving(), 1, 0.1)):
        grid, x = laid(path, 12)
        settings = {"span": span, "memory": memory, "window": window, "tolerance": tolerance}
        wants = [slowly(path, grid, row, passes=5, **settings) for row in x[:count]]  # type: ignore[arg-type]
        steps = parataa.given(hold="noise", **settings)(x[:count], grid)
        query = next(steps)
        for states in (torch.stack(each, 1) for each in zip(*wants, strict=True)):
            begin, rows = grid.nodes.index(query.nodes[0]), query.xs[1:]
            assert len(query.xs) == min(window, 12 - begin)
            assert (rows - states[begin : begin + len(rows)]).abs().max() < 1e-5 * states.abs().max()
            query = steps.send(mixture(path).many(query.xs, query.nodes))


@pytest.mark.system("parataa")
@each_path
def test_anderson_and_higher_orders_save_passes(path: Path) -> None:
    """At one tolerance: plain fixed points of order one, of order 20, and accelerated."""
    grid, x = laid(path, 60)

    def passes(**settings: Any) -> int:
        counted = Counted(mixture(path))
        solve(parataa.given(tolerance=1e-4, **{"hold": "noise"} | settings), counted, x, grid)
        return counted.passes

    plain, long, fast = passes(span=1, memory=1), passes(memory=1), passes()
    assert fast < long < plain, (fast, long, plain)
    assert fast <= 0.85 * long
    assert passes(hold="move") <= fast


def test_without_memory_and_holding_moves_it_is_picards_iteration() -> None:
    """Both ask for the same states in their first passes, as far as both windows have them."""
    grid, x = laid(Flow(), 20)
    both = parataa.given(memory=1, span=100, tolerance=1e-9), paradigms.given(tolerance=1e-9)
    runs = [solver(x, grid) for solver in both]
    asked = [next(steps) for steps in runs]
    for _ in range(4):
        asked = [steps.send(mixture(Flow()).many(q.xs, q.nodes)) for steps, q in zip(runs, asked, strict=True)]
        last = min(len(q.xs) for q in asked)
        assert last > 10
        assert (asked[0].xs[-last:] - asked[1].xs[-last:]).abs().max() < 1e-10


def test_a_state_is_off_by_its_worst_row_in_units_of_its_scale() -> None:
    """In root mean square: 7 where the scale is 5, and then 2 where it is 1, of one row while the other is right."""
    nodes = at(EDM(math.sqrt(24)), [1.0, 0.0]).nodes
    off = torch.tensor([[[7.0, -7.0], [0, 0]], [[0, 0], [0, math.sqrt(8)]]])
    assert [first_loose(off, nodes, tolerance) for tolerance in (1.39, 1.41, 1.99, 2.01)] == [0, 1, 1, 2]


@pytest.mark.system("parataa")
@each_solver
def test_what_settled_steps_miss_does_not_add_up_where_a_flow_pulls_states_apart(solver: Solver) -> None:
    (grid, x), net = laid(Flow(), 100), denoiser(lambda x, t: torch.sin(6 * x), "flow")
    assert (solve(solver, net, x, grid) - solve(ddim, net, x, grid)).square().mean(1).sqrt().max() < 1e-2


@each_solver
def test_a_sample_is_the_same_alone_and_in_a_batch(solver: Solver) -> None:
    """What a sample extrapolates from is its own past; its neighbours only make it wait."""
    grid, x = laid(Flow(), 20)
    alone, beside = (solve(solver.given(tolerance=1e-8), mixture(Flow()), x[:rows], grid)[:1] for rows in (1, 4))
    assert (alone - beside).abs().max() < 1e-8


@each_solver
def test_float32_settles(solver: Solver) -> None:
    """Rounding does not keep a step loose for ever, at a tolerance that float32 can meet."""
    grid, x = laid(Flow(), 40)
    counted = Counted(mixture(Flow()))
    got = solve(solver, counted, x.float(), grid)
    assert got.dtype == torch.float32
    assert counted.passes <= 20 if solver is not srds else counted.passes < 40
    assert (got - solve(ddim, mixture(Flow()), x, grid)).square().mean(1).sqrt().max() < 1e-2


@pytest.mark.parametrize(("steps", "blocks", "calls"), [(25, 0, 5 * (5 + 4 + 3 + 2 + 1)), (24, 3, 8 * (3 + 2 + 1))])
def test_srds_calls_once_for_a_coarse_step_and_the_first_fine_one(steps: int, blocks: int, calls: int) -> None:
    """A block's walk starts where its coarse step does: of 25 steps in 5 blocks, round 0 is 5 waves, 25 calls, and each
    further round p makes (5 - p) 5 calls more, until it is stopped."""
    grid, x = laid(Flow(), steps)
    counted = Counted(denoiser(wild, "flow"))
    solve(srds.given(blocks=blocks, tolerance=1e-12), counted, x, grid)
    assert (counted.passes, counted.calls) == (steps, calls)


def test_srds_refines_blocks_of_unequal_length_as_well() -> None:
    """28 steps in 5 blocks of 5 and 6, where a coarse step may be known before or after the fine ones it corrects: the
    tolerance is met three waves before the last."""
    for path in PATHS:
        grid, x = laid(path, 28)
        counted = Counted(mixture(path))
        got = solve(srds, counted, x, grid)
        assert counted.passes <= 20
        assert (got - solve(ddim, mixture(path), x, grid)).square().mean(1).sqrt().max() < 1e-3


# counting


def test_a_count_tells_calls_from_passes() -> None:
    """A denoiser that takes a batch at once needs one pass for it; another as many as there are states."""
    net, grid = mixture(Flow()), at(Flow(), [0.9, 0.5, 0.1])
    able, unable = Counted(net), Counted(net.__call__)
    for counted, passes in ((able, 1), (unable, 3)):
        ps = counted.many(torch.stack([X, X, X]), grid.nodes)
        assert (counted.calls, counted.passes) == (3, passes)
        assert all(torch.allclose(p.x0, net(X, n).x0) for p, n in zip(ps, grid.nodes, strict=True))
    able(X, grid.nodes[0])
    assert (able.calls, able.passes) == (4, 2)
    jets = Counted(net)
    solve(genie, jets, X, grid)
    assert (jets.calls, jets.passes) == (4, 4)
    with pytest.raises(ValueError, match="asks for derivatives"):
        solve(genie, unable, X, grid)


# what goes wrong


@each_solver
@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan])
def test_tolerances_are_above_zero(solver: Solver, tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"tolerance must be above 0, got .*: for no error take ddim or ddpm"):
        solve(solver.given(tolerance=tolerance), mixture(Flow()), X, at(Flow(), [1.0, 0.5, 0.0]))


@pytest.mark.parametrize("solver", [paradigms, parataa], ids=lambda s: s.name)
def test_windows_are_as_long_as_asked_from_one_step_up(solver: Solver) -> None:
    grid, x = laid(Flow(), 12)
    assert [len(next(solver.given(window=w)(x, grid)).xs) for w in (1, 5, 100)] == [1, 5, 12]
    with pytest.raises(ValueError, match="a window holds one step or more, got 0"):
        solve(solver.given(window=0), mixture(Flow()), x, grid)


@each_solver
@pytest.mark.parametrize("below", [2.0, 0.6])
def test_a_network_that_answers_nan_is_told_of(solver: Solver, below: float) -> None:
    """Also where later states alone are NaN, which no comparison would find."""
    net = denoiser(lambda x, t: torch.where(t[:, None] < below, math.nan, 0 * x), "flow")
    with pytest.raises(ValueError, match=r"NaN in a batch from t = .* the network answered it"):
        solve(solver.given(tolerance=1.0), net, X / 2, at(Flow(), [1.0, 0.5, 0.0]))


@each_solver
def test_noise_is_asked_for_where_it_is_used_alone(solver: Solver) -> None:
    grid, x = laid(Flow(), 3)
    assert not solver.stochastic
    assert solver.given(eta=0.5).stochastic
    with pytest.raises(ValueError, match=f"{solver.name} adds noise: give it some"):
        solve(solver.given(eta=0.5), mixture(Flow()), x, grid)


@each_solver
def test_a_pipeline_refuses_them_in_one_line(solver: Solver) -> None:
    pipe = next(f for f in FAMILIES if f.name == "sd3").build()
    with pytest.raises(RecipeError, match=f"{solver.name} asks for many times in one batch, and a pipeline") as error:
        hasten.accelerate(pipe, Recipe.from_dict({"solver": solver.name}))
    assert "\n" not in str(error.value)

    with pytest.raises(RecipeError, match="tolerance"):
        Recipe.from_dict({"solver": {solver.name: {"tolerance": 0}}})
