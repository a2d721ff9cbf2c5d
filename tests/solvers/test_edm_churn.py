"""What EDM's churn raises, and where it does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from affine import Recorded
from hasten import tree
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture
from hasten.solvers.drive import solve, visited
from hasten.solvers.edm import edm

PATHS = [Flow(), EDM(8.0), Preserving()]
TIMES = [1.0, 0.9, 0.6, 0.3, 0.1, 0.02, 0.0]
X = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]


def told(value: object) -> str:
    return type(value).__name__


def starts(path: Path, **given: Any) -> list[tuple[Node, Node]]:
    """(the grid's node, the node asked first) of each step."""
    grid = at(path, TIMES)
    return list(zip(grid.nodes, visited(edm.given(order=1, **given), grid), strict=False))


@pytest.mark.system("edm")
@pytest.mark.parametrize("churn", [0.6, 1.2, 100.0])
@pytest.mark.parametrize("path", PATHS, ids=told)
def test_sigma_over_alpha_rises_by_the_share_gamma_and_never_above_the_paths_largest(path: Path, churn: float) -> None:
    gamma = min(churn / 6, math.sqrt(2) - 1)
    first = at(path, [1.0, 0.5]).nodes[0]
    largest = first.sigma / first.alpha if first.alpha else math.inf
    for now, asked in starts(path, s_churn=churn):
        want = min((1 + gamma) * now.sigma / now.alpha, largest) if now.alpha else math.inf
        assert (asked.sigma / asked.alpha if asked.alpha else math.inf) == pytest.approx(want, rel=1e-9)
    assert starts(path, s_churn=churn)[0][1].t == 1.0
    silent = Recorded()
    solve(edm.given(s_churn=churn), Mixture().denoise, X, at(path, TIMES), silent)
    assert len(silent.spans) == 5  # and none where nothing is added


@pytest.mark.system("edm")
def test_only_between_s_tmin_and_s_tmax() -> None:
    for now, asked in starts(EDM(8.0), s_churn=1.2, s_tmin=0.5, s_tmax=5.0):
        assert (asked.t > now.t) == (0.5 <= now.sigma <= 5.0)


@pytest.mark.system("edm")
def test_it_is_algorithm_2() -> None:
    """Written out on an exploding path, alpha = 1, with s_noise, to a clean end."""
    law, grid, steps = Mixture(), at(EDM(8.0), [0.7, 0.5, 0.2, 0.0]), 3
    draws = [torch.cos((k + 1) * X) for k in range(3)]
    gamma, x = min(1.0 / steps, math.sqrt(2) - 1), X

    def slope(x: Tensor, sigma: float) -> Tensor:
        return law.denoise(x, at(EDM(8.0), [sigma / 8, 0.0]).nodes[0]).eps

    for (now, after), z in zip(grid.steps(), draws, strict=True):
        up = now.sigma * (1 + gamma)
        x = x + math.sqrt(up**2 - now.sigma**2) * 1.1 * z
        d = slope(x, up)
        ahead = x + (after.sigma - up) * d
        x = ahead if after.clean else x + (after.sigma - up) * (d + slope(ahead, after.sigma)) / 2
    told = iter(draws)
    got = solve(edm.given(s_churn=1.0, s_noise=1.1), law.denoise, X, grid, lambda *_: next(told))
    assert (got - x).abs().max() < 1e-12


def test_its_calls() -> None:
    grid = at(Flow(), TIMES)
    assert len(visited(edm.given(s_churn=2.0), grid)) == 2 * len(grid) - 1
    assert len(visited(edm.given(s_churn=2.0, order=1), grid)) == len(grid)
    assert (edm.calls, edm.given(order=1).calls) == (2, 1)


def test_edits_of_the_state_are_kept() -> None:
    """The caller overwrites the state at every question: the sample is what a network sees that is asked there."""
    grid, law = at(Flow(), TIMES), Mixture()

    def edited(x: Tensor, n: Node) -> Prediction:
        return law.denoise(torch.full_like(x, 0.5), n)

    got = solve(edm.given(s_churn=2.0), edited, X, grid, Recorded())
    assert (got - edited(X, visited(edm.given(s_churn=2.0), grid)[-1]).x0).abs().max() < 1e-14


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"make the grid with grid.at\(path, times\)"):
        solve(edm.given(s_churn=1.0), Mixture().denoise, X, Grid(at(Flow(), TIMES).nodes), Recorded())
    for given in ({"s_churn": -1.0}, {"order": 3}, {"s_noise": 9.0}, {"churn": 1.0}):
        with pytest.raises(ValueError, match="validation error"):
            tree.checked(edm, given)
