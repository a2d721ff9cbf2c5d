"""SA-Solver without noise has the order of its points; with noise it is what it is written to be."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from affine import Recorded
from exact import flown, slope, spaced
from hasten import tree
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve
from hasten.solvers.sa_solver import sa_solver

PATHS = [Flow(), EDM(8.0), Preserving()]
X = torch.linspace(-2, 2.5, 24, dtype=torch.float64)
LAWS = [Gaussian(var=torch.linspace(0.05, 1.2, 24, dtype=torch.float64) ** 2), Mixture()]  # type: ignore[arg-type]


def told(value: object) -> str:
    return type(value).__name__


@cache
def truth(path: Path, law: Gaussian | Mixture) -> Tensor:
    return flown(law, X, *spaced(path, 1, "lam").nodes)


@pytest.mark.parametrize(
    "points", [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (3, 1), (1, 2), (2, 2), (2, 3), (3, 4), (4, 4)], ids=str
)
def test_without_noise_it_has_the_order_it_claims(points: tuple[int, int]) -> None:
    """On a Gaussian, of many deviations together, and a mixture, on three paths; steps of two points may be rescaled
    where that leaves points enough."""
    predictor, corrector = points
    solver = sa_solver.given(tau=0.0, predictor=predictor, corrector=corrector, rescaled=points == (2, 2))
    for path, law in product(PATHS, LAWS):

        def error(steps: int, path: Path = path, law: Gaussian | Mixture = law) -> float:
            got = solve(solver, law.denoise, X, spaced(path, steps, "lam"), Recorded())
            return float((got - truth(path, law)).square().mean().sqrt())

        found = slope(error)
        assert found > solver.order - 0.15, (path, law, found)
        if isinstance(law, Mixture):
            assert found < solver.order + 0.15, (path, law, found)


TAU = 0.8
LAMS = torch.tensor([-1.5, -1.1, -0.8, -0.2, 0.1, 0.6], dtype=torch.float64)


class Polynomial:
    """x0 is a polynomial in lam with `terms` terms, whatever the state."""

    def __init__(self, terms: int) -> None:
        self.terms = terms

    def x0(self, lam: float) -> float:
        return sum((0.5 - k) * (lam / 2) ** k for k in range(self.terms))

    def denoise(self, x: Tensor, n: Node) -> Prediction:
        value = torch.full_like(x, self.x0(n.lam))
        return Prediction(x, value, (x - n.alpha * value) / n.sigma)

    def exactly(self, x: Tensor, now: Node, after: Node) -> Tensor:
        """The solution without its noise by Simpson's rule: sigma' / sigma e^(-tau^2 h) x + rate alpha' int e^(-rate
        (lam' - lam)) x0(lam) dlam, rate = 1 + tau^2. Xue et al. 2023, prop. 4.2."""
        rate, h, m = 1 + TAU**2, after.lam - now.lam, 1000
        points = [(now.lam + h * i / m, 1 if i in (0, m) else 4 if i % 2 else 2) for i in range(m + 1)]
        kernel = sum(w * math.exp(-rate * (after.lam - lam)) * self.x0(lam) for lam, w in points)
        return x * after.sigma / now.sigma * math.exp(-(TAU**2) * h) + rate * after.alpha * kernel * h / m / 3


@pytest.mark.parametrize("path", PATHS, ids=told)
@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_the_predictor_integrates_polynomials_exactly(points: int, path: Path) -> None:
    """Of a degree below the number of its points, on uneven steps, once there are so many."""
    law, grid, states = Polynomial(points), at(path, path.time(LAMS).tolist()), []

    def noted(x: Tensor, n: Node) -> Prediction:
        states.append(x)
        return law.denoise(x, n)

    solver = sa_solver.given(tau=TAU, predictor=points, corrector=0)
    states.append(solve(solver, noted, torch.ones(1, dtype=torch.float64), grid, Recorded()))
    for i in range(points - 1, len(grid)):
        assert (law.exactly(states[i], grid.nodes[i], grid.nodes[i + 1]) - states[i + 1]).abs() < 1e-11


@pytest.mark.parametrize("path", PATHS, ids=told)
@pytest.mark.parametrize("points", [2, 3, 4])
def test_the_corrector_integrates_polynomials_exactly(points: int, path: Path) -> None:
    """The corrected state at the last node but one is what the last step, a predictor of one point, started from."""
    law, nodes = Polynomial(points), at(path, path.time(LAMS).tolist()).nodes
    solver = sa_solver.given(tau=TAU, predictor=1, corrector=points)

    def corrected(i: int) -> Tensor:
        now, after = nodes[i : i + 2]
        end = solve(solver, law.denoise, torch.ones(1, dtype=torch.float64), Grid(nodes[: i + 2]), Recorded())
        h = after.lam - now.lam
        one = -after.alpha * math.expm1(-(1 + TAU**2) * h) * law.x0(now.lam)
        return (end - one) * now.sigma / after.sigma * math.exp(TAU**2 * h)

    for i in range(points, len(nodes) - 1):
        assert (law.exactly(corrected(i - 1), nodes[i - 1], nodes[i]) - corrected(i)).abs() < 1e-11


def test_an_edit_of_the_state_is_added_to_the_corrected_one() -> None:
    """Shifting the state at a question by d shifts the corrected state by d: what d is carried on by is the same with
    and without a corrector, where x0 does not depend on the state."""
    grid = at(Flow(), [0.9, 0.7, 0.5, 0.3, 0.2])

    def ends(corrector: int, shift: float) -> Tensor:
        def denoise(x: Tensor, n: Node) -> Prediction:
            x = x + shift if n.t == 0.5 else x
            value = torch.full_like(x, n.t**2)
            return Prediction(x, value, (x - n.alpha * value) / n.sigma)

        return solve(
            sa_solver.given(corrector=corrector), denoise, torch.ones(1, dtype=torch.float64), grid, Recorded()
        )

    moved = [float(ends(c, 1.0) - ends(c, 0.0)) for c in (0, 2, 3)]
    assert moved == pytest.approx([moved[0]] * 3, abs=1e-14)
    assert abs(moved[0]) > 0.01


def test_bad_input_is_refused() -> None:
    grid = at(Flow(), [1.0, 0.5, 0.0])
    for given in ({"predictor": 4}, {"corrector": 3}):
        with pytest.raises(ValueError, match=r"points can't be had in 2 steps: ask for fewer"):
            solve(sa_solver.given(**given), Mixture().denoise, X, grid, Recorded())
    for given in ({"predictor": 0}, {"corrector": 5}, {"tau": -0.1}, {"order": 2}):
        with pytest.raises(ValueError, match="validation error"):
            tree.checked(sa_solver, given)
    with pytest.raises(ValueError, match="sa_solver adds noise: give it some"):
        solve(sa_solver, Mixture().denoise, X, grid)
