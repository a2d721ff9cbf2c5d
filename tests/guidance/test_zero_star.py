"""CFG-Zero*: the best scale, the zero start, and the same sample on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from torch import Tensor

from hasten.denoiser import Denoiser, Prediction, on_path
from hasten.grid import Node, at, nodes
from hasten.guidance.zero_star import zero_star
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.drive import solve

COND, UNCOND = Mixture(means=(0.5, 1.5), weights=(0.6, 0.4)).denoise, Mixture().denoise
GRID = at(Flow(), [0.99, 0.8, 0.5, 0.2, 0.01])


def state(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def velocity(denoise: Denoiser, x: Tensor, node: Node) -> Tensor:
    p = denoise(x, node)
    return p.eps - p.x0


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_it_is_the_authors_formula_on_velocities(scale: float) -> None:
    """s* u + w (c - s* u), with diffusers' own s* (which is float32)."""
    for node in GRID.nodes:
        c, u = velocity(COND, state(), node), velocity(UNCOND, state(), node)
        best = cfg_zero_star_scale(c.flatten(1), u.flatten(1)).double()[..., None]
        got = velocity(zero_star(COND, UNCOND, scale=scale, zeros=0), state(), node)
        assert (got - (best * u + scale * (c - best * u))).abs().max() < 1e-5


def test_no_other_scale_brings_the_unconditional_velocity_nearer() -> None:
    """At scale 0 what is left is s* u; its distance to c is least, in each row."""
    node = GRID.nodes[2]
    c, u = velocity(COND, state(), node), velocity(UNCOND, state(), node)
    near = velocity(zero_star(COND, UNCOND, scale=0.0, zeros=0), state(), node)
    assert ((c - near) * u).sum((1, 2)).abs().max() < 1e-6  # the derivative by the scale
    assert ((c - near).norm(dim=(1, 2)) < (c - u).norm(dim=(1, 2))).all()


@pytest.mark.parametrize("zeros", [1, 2])
def test_the_state_stands_still_at_the_first_evaluations_of_each_trajectory(zeros: int) -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor, node: Node) -> Prediction:
        seen.append(x)
        return COND(x, node)

    guided = zero_star(watched, UNCOND, zeros=zeros)
    for _ in range(2):
        seen.clear()
        solve(ddim, guided, state(), GRID)
        assert len(seen) == len(GRID) - zeros
        assert torch.allclose(seen[0], state(), rtol=1e-12)  # where the network is first asked, x is where it began


@pytest.mark.parametrize("path", [EDM(160.0), Preserving()], ids=lambda p: type(p).__name__)
def test_on_another_path_it_is_the_same_sample(path: Any) -> None:
    """The same networks, the same lam: a guidance of velocities that is defined on the straight path alone gives, on
    any, the sample of the straight one up to the scale of the state."""
    grid = at(path, [float(path.time(torch.tensor(n.lam, dtype=torch.float64))) for n in GRID.nodes])
    first, last = GRID.nodes[0], GRID.nodes[-1]
    wider = grid.nodes[0].sigma / first.sigma
    got = solve(ddim, zero_star(COND, UNCOND), state() * wider, grid)
    want = solve(ddim, zero_star(COND, UNCOND), state(), GRID)
    assert torch.allclose(got * last.sigma / grid.nodes[-1].sigma, want, rtol=1e-7, atol=1e-9)
    one = nodes(path, [0.5])[0]
    assert torch.allclose(on_path(COND, Flow())(state(), one).x0, COND(state(), one).x0, atol=1e-9)  # one law
