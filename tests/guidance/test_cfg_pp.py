"""CFG++: the paper's algorithm, through any solver that takes its state from the answer."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.grid import Node, at
from hasten.guidance.cfg import cfg
from hasten.guidance.cfg_pp import cfg_pp
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.dpmpp_2m import dpmpp_2m
from hasten.solvers.drive import solve
from hasten.solvers.euler import euler

COND, UNCOND = Mixture(means=(0.5, 1.5), weights=(0.6, 0.4)).denoise, Mixture().denoise
PATHS = [pytest.param(p, id=type(p).__name__) for p in (Flow(), EDM(4.0), Preserving())]
TIMES = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def state(node: Node) -> Tensor:
    return node.sigma * torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def algorithm_2(x: Tensor, grid: Any, scale: float) -> Tensor:
    """Chung et al. 2024, written out: x0 from the guided noise, then renoised with the unconditional one."""
    for now, after in grid.steps():
        c, u = COND(x, now), UNCOND(x, now)
        x0 = u.x0 + scale * (c.x0 - u.x0)  # (x - sigma eps_guided) / alpha, also where alpha = 0
        x = after.alpha * x0 + after.sigma * u.eps
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0])
def test_ddim_with_it_is_algorithm_2(path: Any, scale: float) -> None:
    grid = at(path, TIMES)
    x = state(grid.nodes[0])
    want = algorithm_2(x, grid, scale)
    assert torch.allclose(solve(ddim, cfg_pp(COND, UNCOND, scale=scale), x, grid), want, rtol=1e-10, atol=1e-10)
    assert (want - solve(ddim, cfg(COND, UNCOND, scale=scale), x, grid)).abs().max() > 1e-2


def test_eulers_method_on_the_straight_path_is_algorithm_2_as_well() -> None:
    """Its step is from the state, not from x0 and eps: only since the answer's state is moved is it right."""
    grid = at(Flow(), TIMES)
    x = state(grid.nodes[0])
    got = solve(euler, cfg_pp(COND, UNCOND, scale=0.6), x, grid)
    assert torch.allclose(got, algorithm_2(x, grid, 0.6), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_it_is_classifier_free_guidance_of_a_scale_that_follows_the_step(path: Any) -> None:
    """scale / (1 - exp(lam - lam')): what the method gives a pipeline, whose state it cannot move."""
    grid = at(path, TIMES)
    x = state(grid.nodes[0])
    ends = {a.t: b for a, b in grid.steps()}

    def stretched(x: Tensor, n: Node) -> Any:
        return cfg(COND, UNCOND, scale=0.6 / (1 - exp(n.lam - ends[n.t].lam)))(x, n)

    want = algorithm_2(x, grid, 0.6)
    assert torch.allclose(solve(ddim, stretched, x, grid), want, rtol=1e-10, atol=1e-10)


def test_two_steps_of_dpmpp_2m_are_its_own_form_of_it() -> None:
    """The first step is DDIM's; the second starts from the moved state: sigma'/sigma (x + alpha d) and the extrapolated
    guided x0. The authors' own 2M differs in the old x0 alone, which is unconditional there."""
    grid = at(EDM(), [0.5, 0.3, 0.2])
    x = state(grid.nodes[0])
    n0, n1, n2 = grid.nodes
    c, u = COND(x, n0), UNCOND(x, n0)
    old = u.x0 + 0.6 * (c.x0 - u.x0)
    y = old + n1.sigma * u.eps
    c, u = COND(y, n1), UNCOND(y, n1)
    new = u.x0 + 0.6 * (c.x0 - u.x0)
    shrink, ratio = n2.sigma / n1.sigma, (n2.lam - n1.lam) / (2 * (n1.lam - n0.lam))
    want = shrink * (y - u.x0) + new + (1 - shrink) * ratio * (new - old)
    assert torch.allclose(solve(dpmpp_2m, cfg_pp(COND, UNCOND, scale=0.6), x, grid), want, rtol=1e-10)
