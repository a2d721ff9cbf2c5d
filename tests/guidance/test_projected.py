"""Adaptive projected guidance: its three steps, its authors' formula, and a momentum of one trajectory alone."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor

from hasten import moment
from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node, at
from hasten.guidance.apg import apg
from hasten.guidance.trajectory import Trajectory
from hasten.moment import Moment
from hasten.paths.flow import Flow
from hasten.reference.laws import Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.drive import solve

NODES = at(Flow(), [1.0, 0.8, 0.5, 0.3, 0.1]).nodes
COND, UNCOND = Mixture(means=(0.5, 1.5), weights=(0.6, 0.4)).denoise, Mixture().denoise


def state(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("momentum", [0.0, -0.5, 0.75])
@pytest.mark.parametrize("radius", [0.0, 0.8])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_it_is_the_authors_formula_along_a_whole_trajectory(eta: float, radius: float, momentum: float) -> None:
    """Algorithm 1 of arXiv:2410.02416 is c + (w - 1) update: diffusers' "original formulation" of scale w - 1."""
    guided, theirs = apg(COND, UNCOND, scale=4.0, eta=eta, radius=radius, momentum=momentum), MomentumBuffer(momentum)
    for i, node in enumerate(NODES):
        c, u = COND(state(i), node).x0, UNCOND(state(i), node).x0
        want = normalized_guidance(c, u, 3.0, theirs, eta, radius, use_original_formulation=True)
        assert torch.allclose(guided(state(i), node).x0, want, rtol=1e-12, atol=1e-12)


def test_diffusers_own_form_starts_from_the_unconditional_and_so_differs_where_anything_was_cut_away() -> None:
    """u + w update against c + (w - 1) update: the difference is c - u less the update."""
    c, u = COND(state(), NODES[2]).x0, UNCOND(state(), NODES[2]).x0
    ours = apg(COND, UNCOND, scale=4.0, eta=0.0, momentum=0.0)(state(), NODES[2]).x0
    theirs = normalized_guidance(c, u, 4.0, None, 0.0, 0.0)
    update = (ours - c) / 3
    assert torch.allclose(ours - theirs, (c - u) - update, atol=1e-12)
    assert ((c - u) - update).abs().max() > 0.1


def test_the_update_is_orthogonal_to_the_conditional_prediction_and_no_longer_than_the_radius() -> None:
    c = COND(state(), NODES[2]).x0
    cut = apg(COND, UNCOND, scale=4.0, eta=0.0, radius=0.3, momentum=0.0)(state(), NODES[2]).x0 - c
    assert ((cut * c).sum((1, 2)).abs() < 1e-12).all()
    free = apg(COND, UNCOND, scale=4.0, eta=1.0, radius=0.3, momentum=0.0)(state(), NODES[2]).x0 - c
    assert torch.allclose(free.norm(dim=(1, 2)), torch.full((4,), 3 * 0.3, dtype=torch.float64))  # all were longer
    far = apg(COND, UNCOND, scale=4.0, eta=1.0, radius=900.0, momentum=0.0)(state(), NODES[2]).x0 - c
    assert torch.allclose(far, 3 * (c - UNCOND(state(), NODES[2]).x0))


def run(guided: Denoiser, nodes: tuple[Node, ...]) -> list[Tensor]:
    return [guided(state(i), n).x0 for i, n in enumerate(nodes)]


@pytest.mark.parametrize("before", [NODES, NODES[:2], NODES[2:], NODES[:1], NODES[:1] * 3])
def test_a_new_trajectory_reads_nothing_of_the_one_before(before: tuple[Node, ...]) -> None:
    """Whole, left half way, started late, or of one call: what follows is as if nothing had been, also where it starts
    late itself."""
    guided, want = apg(COND, UNCOND), run(apg(COND, UNCOND), NODES)
    run(guided, before)
    assert all(torch.equal(a, b) for a, b in zip(run(guided, NODES), want, strict=True))
    with moment.at(Moment(run=1)):
        run(guided, before)
    with moment.at(Moment(run=2)):  # one left above where the next starts is told by its driver
        late = run(guided, NODES[2:])
    assert all(torch.equal(a, b) for a, b in zip(late, run(apg(COND, UNCOND), NODES[2:]), strict=True))


def test_momentum_acts_within_a_trajectory() -> None:
    with_it, without = (run(apg(COND, UNCOND, momentum=m), NODES) for m in (-0.5, 0.0))
    assert torch.equal(with_it[0], without[0])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(with_it[1:], without[1:], strict=True))


def test_two_samples_in_a_row_are_the_same() -> None:
    guided, grid = apg(COND, UNCOND), at(Flow(), [1.0, 0.7, 0.4, 0.0])
    assert torch.equal(solve(ddim, guided, state(), grid), solve(ddim, guided, state(), grid))


def test_a_trajectory_counts_from_its_first_time() -> None:
    here = Trajectory()
    assert [here.step(n) for n in (*NODES[:3], *NODES[:3])] == [0, 1, 2, 0, 1, 2]
    two_calls = [NODES[0], NODES[1], NODES[1], NODES[2], NODES[2]]  # as Heun asks
    assert [here.step(n) for n in two_calls] == [0, 1, 2, 3, 4]
    assert [here.step(n) for n in (NODES[1], NODES[2])] == [0, 1]  # up again: anew
    with moment.at(Moment(run=7)):
        assert [here.step(n) for n in (NODES[3], NODES[4])] == [0, 1]


def test_a_vanishing_prediction_is_no_division_by_zero() -> None:
    def nothing(x: Tensor, n: Node) -> Prediction:
        return Prediction(x, torch.zeros_like(x), x / n.sigma)

    for radius in (0.0, 1.0):
        assert bool(apg(nothing, nothing, radius=radius)(state(), NODES[1]).x0.isfinite().all())
