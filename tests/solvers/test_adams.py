"""Multistep solvers of Adams' type: weights, orders on any grid, the start, and calls."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at, build
from hasten.path import Path, lam
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.paths.tabulated import Tabulated
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.adams import gauss, means, settled
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve, visited
from hasten.solvers.ipndm import ADAMS_BASHFORTH

PATHS = [Flow(), EDM(5.0), Preserving()]
X = torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)
ENDS = (0.9, 0.1)


def solver(name: str, **settings: Any) -> Solver:
    found: Solver = tree.function("solvers", name)
    return found.given(**settings)


def named(value: Any) -> str:
    if isinstance(value, Solver):
        return "-".join([value.name, *map(str, value.settings.values())])
    return type(value).__name__


def laid(path: Path, shares: Tensor) -> Grid:
    """Shares of the way in lam between the times ENDS."""
    first, last = lam(path, torch.tensor(ENDS, dtype=torch.float64))
    return at(path, path.time(first + (last - first) * shares).tolist())


def even(path: Path, steps: int) -> Grid:
    return laid(path, torch.linspace(0, 1, steps + 1, dtype=torch.float64))


def uneven(path: Path, steps: int) -> Grid:
    """Steps by turns of one length and of three."""
    lengths = torch.tensor([1.0, 3.0] * (steps // 2), dtype=torch.float64)
    return laid(path, torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0) / lengths.sum()]))


@cache
def reached(path: Path) -> Tensor:
    """Where the flow of the mixture takes X: Richardson's extrapolation of Heun's method."""
    coarse, fine = (solve(solver("heun"), Mixture().denoise, X, even(path, n)) for n in (1500, 3000))
    return fine + (fine - coarse) / 3


def slope(s: Solver, path: Path, grid: Callable[[Path, int], Grid], counts: tuple[int, ...] = (64, 128, 256)) -> float:
    """Of the error's logarithm, carried on to infinitely many steps."""
    errors = [solve(s, Mixture().denoise, X, grid(path, n)) - reached(path) for n in counts]
    first, second = (-torch.stack([e.square().mean().sqrt() for e in errors]).log2().diff()).tolist()
    return 2 * second - first


# --- weights


def test_weights_of_an_even_grid_are_adams_and_bashforths() -> None:
    for order in (1, 2, 3, 4):
        found = means([-float(k) for k in range(order)], gauss(0.0, 1.0))
        assert found == pytest.approx(ADAMS_BASHFORTH[order - 1], abs=1e-13)
    assert ADAMS_BASHFORTH[3] == tuple(float(Fraction(n, 24)) for n in (55, -59, 37, -9))


def test_weights_of_any_grid_are_those_of_variable_steps() -> None:
    """Of two points 1 + r / 2 and -r / 2 with r the ratio of steps; of three by the system that makes them exact for
    1, u and u^2. (zju-pi's iPNDM-v has 1 - a b for (1 - a) b in the bracket of its third, which is the same on an even
    grid only.)"""
    assert means([1.0, 3.0], gauss(1.0, 0.5)) == pytest.approx([1 + 0.25 / 2, -0.25 / 2])
    us, stop = [1.0, 1.7, 4.0], 0.4
    powers = [(stop**n - us[0] ** n) / (n * (stop - us[0])) for n in (1, 2, 3)]
    want = np.linalg.solve(np.array([[u**n for u in us] for n in range(3)]), powers)
    assert means(us, gauss(us[0], stop)) == pytest.approx(want.tolist())
    assert sum(means([0.9, 0.95, 1.0], [0.8, 0.81, 0.82, 0.83, 0.84, 0.85, 0.86, 0.87])) == pytest.approx(1)


IN_RATIO: dict[str, Callable[[Node], float]] = {
    "rhoab": lambda n: n.sigma / n.alpha, "logrho": lambda n: -n.lam, "tab": lambda n: n.t
}  # fmt: skip
EXACT = [
    *(pytest.param("lms", {}, "rhoab", k, id=f"lms-{k}") for k in (1, 2, 3, 4)),
    *(pytest.param("deis", {"variant": v}, v, k, id=f"deis-{v}-{k}") for v in IN_RATIO for k in (1, 2, 3)),
]


@pytest.mark.system("deis")
@pytest.mark.parametrize("path", PATHS, ids=named)
@pytest.mark.parametrize(("name", "settings", "variable", "order"), EXACT)
def test_an_eps_that_is_a_polynomial_is_integrated_exactly(
    name: str, settings: dict[str, Any], variable: str, order: int, path: Path
) -> None:
    """Of the degree order - 1, in the variable that the solver says, on an uneven grid, once there are enough of them:
    x / alpha moves by the integral of eps over sigma / alpha."""
    u, asked = IN_RATIO[variable], []
    rng = np.random.default_rng(3)
    poly = np.polynomial.Polynomial(rng.normal(size=order))

    def denoise(x: Tensor, n: Node) -> Prediction:
        asked.append((n, float(x[0]) / n.alpha))
        return Prediction.of("eps", torch.full_like(x, poly(u(n))), x, n)

    grid = uneven(path, 12)
    end = solve(solver(name, order=order, corrected=False, **settings), denoise, X[:1], grid)
    states = [*asked, (grid.nodes[-1], float(end) / grid.nodes[-1].alpha)]
    points, weights = np.polynomial.legendre.leggauss(80)
    for (now, y), (after, y_after) in list(pairwise(states))[order - 1 :]:
        r, h = now.sigma / now.alpha, after.sigma / after.alpha - now.sigma / now.alpha
        inside = grid.met([-log(r + h * (p + 1) / 2) for p in points])
        want = h / 2 * sum(w * poly(u(n)) for w, n in zip(weights, inside, strict=True))
        assert y_after - y == pytest.approx(want, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=named)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_velocity_that_is_a_polynomial_is_integrated_exactly(order: int, path: Path) -> None:
    """In u = sigma / (alpha + sigma), of x / (alpha + sigma)."""
    poly = np.polynomial.Polynomial(np.random.default_rng(4).normal(size=order))
    asked: list[tuple[float, float]] = []

    def denoise(x: Tensor, n: Node) -> Prediction:
        scale = n.alpha + n.sigma
        asked.append((n.sigma / scale, float(x[0]) / scale))
        return Prediction.of("flow", torch.full_like(x, poly(n.sigma / scale)), x, n)

    grid = uneven(path, 12)
    end = solve(solver("adams_bashforth", order=order, corrected=False), denoise, X[:1], grid)
    last = grid.nodes[-1]
    states = [*asked, (last.sigma / (last.alpha + last.sigma), float(end) / (last.alpha + last.sigma))]
    for (u, z), (u_after, z_after) in list(pairwise(states))[order - 1 :]:
        assert z_after - z == pytest.approx(poly.integ()(u_after) - poly.integ()(u), abs=1e-10)


def test_deis_in_sigma_over_alpha_is_lms() -> None:
    for order in (1, 2, 3):
        for grid in (uneven(Preserving(), 10), at(Flow(), [1 - i / 9 for i in range(10)])):
            one, other = (
                solve(s, Mixture().denoise, X, grid)
                for s in (solver("deis", variant="rhoab", order=order), solver("lms", order=order))
            )
            assert torch.equal(one, other)


@pytest.mark.system("deis", "ddim")
@pytest.mark.parametrize("s", [solver(n, order=1) for n in ("deis", "lms", "ipndm", "adams_bashforth")], ids=named)
def test_of_order_one_all_are_ddim(s: Solver) -> None:
    """On the straight path; the velocity's is DDIM nowhere else, being Euler's method."""
    for path in PATHS if s.name != "adams_bashforth" else [Flow()]:
        grid = uneven(path, 10)
        want = solve(solver("ddim"), Mixture().denoise, X, grid)
        assert (solve(s, Mixture().denoise, X, grid) - want).abs().max() < 1e-12


# --- orders


OF_ANY_GRID = [
    *(solver("lms", order=k) for k in (1, 2, 3, 4)),
    *(solver("adams_bashforth", order=k) for k in (1, 2, 3, 4)),
    *(solver("deis", order=k, variant=v) for k in (2, 3) for v in ("tab", "rhoab")),
]


@pytest.mark.system("deis")
@pytest.mark.parametrize("path", PATHS, ids=named)
@pytest.mark.parametrize("s", OF_ANY_GRID, ids=named)
def test_weights_of_the_very_grid_keep_the_order_where_steps_are_uneven(s: Solver, path: Path) -> None:
    assert slope(s, path, uneven) == pytest.approx(s.order, abs=0.2)


@pytest.mark.parametrize("s", [solver("ipndm"), solver("pndm")], ids=named)
def test_weights_of_an_even_grid_lose_it_there(s: Solver) -> None:
    """Down to one from two, which is why `lms` is of its own."""
    assert slope(s, Flow(), uneven) == pytest.approx(1, abs=0.2)


@pytest.mark.system("deis")
@pytest.mark.parametrize(("name", "path"), [("lms", EDM(5.0)), ("deis", EDM(5.0)), ("adams_bashforth", Flow())])
def test_a_start_by_ddim_holds_the_order_down_to_two(name: str, path: Path) -> None:
    """So do the peers'. On these paths the rest is small enough to see it at once."""
    plain, errors = solver(name, order=3, corrected=False), []
    for steps in (128, 256, 512):
        errors.append((solve(plain, Mixture().denoise, X, even(path, steps)) - reached(path)).abs().max())
    assert -torch.stack(errors).log2().diff() == pytest.approx([2, 2], abs=0.15)
    assert slope(solver(name, order=3), path, even) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("name", ["lms", "adams_bashforth"])
def test_order_four_asks_once_more_and_is_of_order_four(name: str) -> None:
    s, grid = solver(name, order=4), even(EDM(5.0), 8)
    assert slope(s, EDM(5.0), even) == pytest.approx(4, abs=0.2)
    assert [n.t for n in visited(s, grid)] == [n.t for n in (*grid.nodes[:2], *grid.nodes[1:-1])]


@pytest.mark.parametrize("name", ["lms", "deis", "adams_bashforth", "pndm"])
def test_the_start_costs_no_call_and_pays(name: str) -> None:
    """From pure noise along the straight path in even times, against the same without it, or with DDIM's start."""
    law, z = Mixture(), torch.randn(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = solver(name)
    plain = solver("ipndm") if name == "pndm" else solver(name, corrected=False)
    want = solve(solver("heun"), law.denoise, z, build(Flow(), tree.function("grids", "log_snr"), 1500, low=-8, high=8))

    def error(s: Solver, steps: int) -> float:
        grid = build(Flow(), tree.function("grids", "uniform"), steps)
        assert len(visited(s, grid)) == steps
        return float((solve(s, law.denoise, z, grid) - want).square().mean().sqrt())

    for steps in (4, 5, 6, 8):
        assert error(s, steps) < 0.85 * error(plain, steps)


@pytest.mark.parametrize("order", [2, 4])
def test_an_edit_of_the_state_stays_where_the_start_is_made_anew(order: int) -> None:
    """As it is: predictions are those that were seen."""
    first, now = even(Preserving(), 6).nodes[:2]

    def run(edit: float) -> Tensor:
        start = [(Prediction.of("flow", X / 2, X, first), first)]
        steps = settled(Prediction.of("flow", X / 3, X + edit, now), X, now, start, order)
        try:
            return next(steps)[0]  # order 4 asks again
        except StopIteration as end:
            return end.value.x

    assert torch.allclose(run(0.3) - run(0.0), torch.full_like(X, 0.3), atol=1e-12)


def even_in_time(path: Path, steps: int) -> Grid:
    return at(path, torch.linspace(*ENDS, steps + 1, dtype=torch.float64).tolist())


@pytest.mark.parametrize("s", [*(solver("ipndm", order=k) for k in (2, 3, 4)), solver("pndm")], ids=named)
def test_on_a_grid_even_in_sigma_over_alpha_the_weights_are_of_their_full_order(s: Solver) -> None:
    """As even times are on EDM's path. The first steps are so near noise that what they err by is not seen."""
    assert slope(s, EDM(5.0), even_in_time) == pytest.approx(s.settings.get("order", 4), abs=0.3)


@pytest.mark.system("pndm")
@pytest.mark.parametrize(("warmup", "power"), [("prk", 5), ("plms", 3)])
def test_a_step_of_pndms_start_errs_by_what_its_method_does(warmup: str, power: int) -> None:
    """Runge and Kutta's fourth order by h^5, Heun's by h^3, in sigma / alpha."""
    law, errors = Gaussian(), []
    for h in (0.02, 0.01, 0.005):
        now, after, _ = (grid := at(EDM(5.0), [0.1, 0.1 - h, 0.1 - 2 * h])).nodes
        seen: list[Tensor] = []

        def denoise(x: Tensor, n: Node, seen: list[Tensor] = seen, after: Node = after) -> Prediction:
            seen.extend([x] if n is after else [])
            return law.denoise(x, n)

        solve(solver("pndm", warmup=warmup), denoise, X, grid)
        errors.append((seen[1] - law.flow(X, now, after)).abs().max())  # the second time, after the start's step
    assert (errors[1] / errors[2]).log2() == pytest.approx(power, abs=0.25)


@pytest.mark.system("pndm", "deis")
def test_few_calls_err_less_than_ddims() -> None:
    law, z = Mixture(), torch.randn(512, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    path, spacing = Preserving(), tree.function("grids", "log_snr")
    want = solve(solver("heun"), law.denoise, z, build(path, spacing, 1500, low=-8.0, high=8.0))

    def error(name: str, steps: int) -> float:
        return float((solve(solver(name), law.denoise, z, build(path, spacing, steps)) - want).square().mean().sqrt())

    assert error("deis", 10) < 0.2 * error("ddim", 10)
    assert error("pndm", 20) < 0.1 * error("ddim", 20)


# --- calls and bad input


@pytest.mark.system("pndm")
def test_calls_of_pndms_starts() -> None:
    grid = at(EDM(5.0), [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    asked = {w: [round(n.t, 6) for n in visited(solver("pndm", warmup=w), grid)] for w in ("shared", "plms", "prk")}
    assert asked["shared"] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert asked["plms"] == [1.0, 0.8, 0.8, 0.6, 0.4, 0.2]
    assert asked["prk"] == [1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.2]
    flow = at(Flow(), [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])  # one step more, of DDIM, from pure noise
    asked["flow"] = [round(n.t, 6) for n in visited(solver("pndm", warmup="prk"), flow)]
    assert asked["flow"] == [1.0, *asked["prk"][4:12], 0.4, 0.3, 0.3, 0.2, 0.2]


@pytest.mark.parametrize(
    "s",
    [solver("ipndm"), solver("lms"), solver("lms", order=4), solver("deis"), solver("deis", variant="logrho"),
     solver("adams_bashforth"), *(solver("pndm", warmup=w) for w in ("shared", "plms", "prk"))],
    ids=named,
)  # fmt: skip
def test_from_as_good_as_pure_noise_nothing_blows_up(s: Solver) -> None:
    """Tables of zero terminal signal begin at alpha = 1e-6: in float32, from a network that says v."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - beta).cumprod(0).sqrt()
    path = Tabulated((((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2).tolist())
    law, z = Mixture(), torch.linspace(-2, 2, 9)

    def denoise(x: Tensor, n: Node) -> Prediction:
        p = law.denoise(x.double(), n)
        return Prediction.of("v", (n.alpha * p.eps - n.sigma * p.x0).to(x), x, n)

    def end(s: Solver, z: Tensor, steps: int) -> Tensor:
        return solve(s, denoise, z, build(path, tree.function("grids", "uniform"), steps))

    assert path.alpha(torch.ones(1, dtype=torch.float64)) < 2e-6
    assert (end(s, z, 10) - end(s, z.double(), 10)).abs().max() < 1e-4
    assert (end(s, z.double(), 10) - end(solver("heun"), z.double(), 300)).abs().max() < 0.25


@pytest.mark.parametrize("s", [solver("deis"), solver("pndm", warmup="prk")], ids=named)
def test_a_grid_of_nodes_alone_is_refused_where_times_between_are_asked_for(s: Solver) -> None:
    nodes = Grid(at(Flow(), [0.9, 0.5, 0.1]).nodes)
    with pytest.raises(ValueError, match=r"make the grid with grid\.at\(path, times\)") as told:
        solve(s, Gaussian().denoise, X, nodes)
    assert "\n" not in str(told.value)
    solve(solver("deis", variant="rhoab"), Gaussian().denoise, X, nodes)


@pytest.mark.parametrize(
    ("name", "given"), [("lms", {"order": 5}), ("deis", {"order": 4}), ("ipndm", {"order": 0}),
                        ("deis", {"variant": "x"}), ("pndm", {"warmup": "rk"}), ("adams_bashforth", {"order": 9})],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        tree.checked(solver(name), given)
