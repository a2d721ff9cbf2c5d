"""Multistep solvers of Adams' type against diffusers', stepped by hand in float32 with an exact law, which is asked at
the noise that they think they are at.

Where diffusers differs, and the exact law is the judge:

- Its first step is DDIM's, of an error h^2, so that DEIS and LMS of orders 3 and 4 are of order two; `corrected=False`
  is that. What is corrected costs no call.
- DEIS repeats its last sigma where they are a flow's, Karras's, exponential or of a beta law: the last step goes
  nowhere, and what is left of the noise is of order one in the steps whatever the solver.
- LMS that begins in the middle, as for image-to-image, takes the weights of order 4 with as few eps as it has, and
  they do not sum to one.
- iPNDM at pure noise divides by 1e-8 and so takes x0 = 0, whatever the network says.
"""

from __future__ import annotations

from math import inf, log
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.bridge.process import process
from hasten.grid import Grid, Node, at
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve, visited

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NUMPY = pytest.mark.filterwarnings("ignore:__array_wrap__")  # diffusers' own


def solver(name: str, **settings: Any) -> Solver:
    found: Solver = tree.function("solvers", name)
    return found.given(**settings)


def noises(sigmas: list[float]) -> Grid:
    """EDM's path at these noise levels: the x / alpha and sigma / alpha of the peers."""
    return at(EDM(sigmas[0]), [s / sigmas[0] for s in sigmas])


def states() -> Tensor:
    return torch.linspace(-2, 2, 7)[:, None, None, None]


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_diffusers_lms(order: int, karras: bool) -> None:
    from diffusers import LMSDiscreteScheduler

    peer = LMSDiscreteScheduler(**BETAS, use_karras_sigmas=karras)
    peer.set_timesteps(10)
    law, grid = Mixture(), noises(peer.sigmas.tolist())
    theirs = x = states() * grid.nodes[0].sigma
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        peer.scale_model_input(theirs, t)
        theirs = peer.step(law.denoise(theirs, node).eps, t, theirs, order=order).prev_sample
    ours = solve(solver("lms", order=order, corrected=False), law.denoise, x, grid)
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() < 1e-5


def test_lms_that_begins_in_the_middle_weighs_what_it_has_and_diffusers_does_not() -> None:
    """The last 4 of 20 steps, as image-to-image of strength 0.2 runs them: the law says who is right. (The noise that
    diffusers' leaves is its issue 5630.)"""
    from diffusers import LMSDiscreteScheduler

    peer, law, begin = LMSDiscreteScheduler(**BETAS), Gaussian(), 16
    peer.set_timesteps(20)
    peer.set_begin_index(begin)
    grid = noises(peer.sigmas.tolist()[begin:])
    theirs = x = states() * grid.nodes[0].sigma
    for t, node in zip(peer.timesteps[begin:], grid.nodes, strict=False):
        peer.scale_model_input(theirs, t)
        theirs = peer.step(law.denoise(theirs, node).eps, t, theirs).prev_sample
    want = law.flow(x, grid.nodes[0], grid.nodes[-1])
    ours = solve(solver("lms", order=4, corrected=False), law.denoise, x, grid)
    assert (ours - want).abs().max() < 0.05
    assert (theirs - want).abs().max() > 0.5


def spread(r: float) -> Node:
    """The node of a variance-preserving path at sigma / alpha = r."""
    alpha = (1 + r * r) ** -0.5
    return Node(0.5, alpha, r * alpha, -log(r), 0.0, 0.0)


@NUMPY
@pytest.mark.system("deis")
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_in_log_rho_is_diffusers_deis(order: int, karras: bool) -> None:
    """But for the last step of its Karras sigmas, which goes nowhere."""
    from diffusers import DEISMultistepScheduler

    peer = DEISMultistepScheduler(**BETAS, solver_order=order, lower_order_final=False, use_karras_sigmas=karras)
    peer.set_timesteps(10)
    law, levels = Mixture(), peer.sigmas.tolist()
    assert (levels[-1] == levels[-2]) is karras
    theirs = x = states()
    for t, level in zip(peer.timesteps, levels, strict=False):
        theirs = peer.step(law.denoise(theirs, spread(level)).eps, t, theirs).prev_sample
    grid, s = noises(sorted(set(levels), reverse=True)), solver("deis", order=order, variant="logrho", corrected=False)
    ours = solve(s, law.denoise, x / spread(levels[0]).alpha, grid) * spread(levels[-1]).alpha
    assert (ours - theirs).abs().max() < 1e-4


@NUMPY
def test_deis_of_diffusers_is_of_order_one_on_flows_because_it_stops_one_step_short() -> None:
    """Where it stops it is of second order and more; ours goes to the end."""
    from diffusers import DEISMultistepScheduler

    law, x = Gaussian(), states().double()
    ends, stops, ours = [], [], []
    for steps in (16, 32, 64):
        peer = DEISMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2)
        peer.set_timesteps(steps)
        levels = peer.sigmas.double().tolist()
        assert levels[-1] == levels[-2] > 0
        grid = at(Flow(), [*levels[:-1], 0.0])
        theirs = x
        for t, node in zip(peer.timesteps, grid.nodes, strict=False):
            p = law.denoise(theirs, node)
            theirs = peer.step(p.eps - p.x0, t, theirs).prev_sample
        for errors, end in ((ends, -1), (stops, -2)):
            errors.append(float((theirs - law.flow(x, grid.nodes[0], grid.nodes[end])).abs().max()))
        ours.append(float((solve(solver("deis"), law.denoise, x, grid) - law.flow(x, grid.nodes[0], grid.nodes[-1]))
                          .abs().max()))  # fmt: skip
    assert [ends[i] / ends[i + 1] for i in (0, 1)] == pytest.approx([2, 2], abs=0.15)
    assert stops[-1] < 0.02 * ends[-1]
    assert ours[-1] < 0.01 * ends[-1]


@pytest.mark.system("pndm")
@pytest.mark.parametrize("skip", [True, False])
def test_pndm_is_diffusers_pndm(skip: bool) -> None:
    from diffusers import PNDMScheduler

    peer = PNDMScheduler(**BETAS, skip_prk_steps=skip, set_alpha_to_one=True)
    peer.set_timesteps(10)
    known, law = process(peer), Mixture()
    grid = at(known.path, [*(known.t(100.0 * i) for i in range(9, -1, -1)), 0.0])
    theirs = states()
    for t in peer.timesteps:
        node = at(known.path, [known.t(float(t)), 0.0]).nodes[0]
        theirs = peer.step(law.denoise(theirs, node).eps, int(t), theirs).prev_sample
    s = solver("pndm", warmup="plms" if skip else "prk")
    assert [known.timestep(n.t) for n in visited(s, grid)] == pytest.approx(peer.timesteps.tolist())
    assert (solve(s, law.denoise, states(), grid) - theirs).abs().max() < 1e-5


def test_ipndm_is_diffusers_ipndm_but_at_pure_noise() -> None:
    """Its own times; it reads a network that says v, and eps is sigma x + alpha v. From its first time, which is pure
    noise, it takes x0 = 0, and so errs by what the network says beside that."""
    from diffusers import IPNDMScheduler

    peer, law = IPNDMScheduler(), Mixture()
    peer.set_timesteps(10)
    inner = [(a, s, log(a / s)) for a, s in zip(peer.alphas.tolist()[1:-1], peer.betas.tolist()[1:-1], strict=True)]
    rows = [(0.0, 1.0, -inf), *inner, (1.0, 0.0, inf)]
    table = tuple(Node(1 - i / 10, *row, 0.0, 0.0) for i, row in enumerate(rows))

    def both(begin: int) -> tuple[Tensor, Tensor]:
        peer.set_timesteps(10)
        peer.set_begin_index(begin)
        theirs, grid = states(), Grid(table[begin:])
        for t, n in zip(peer.timesteps[begin:], grid.nodes, strict=False):
            p = law.denoise(theirs, n)
            theirs = peer.step(n.alpha * p.eps - n.sigma * p.x0, t, theirs).prev_sample
        return solve(solver("ipndm"), law.denoise, states(), grid), theirs

    ours, theirs = both(1)
    assert (ours - theirs).abs().max() < 1e-5
    ours, theirs = both(0)
    assert (ours - theirs).abs().max() > 0.05
    peer.set_timesteps(10)
    p = law.denoise(states(), table[0])
    step = peer.step(-p.x0, peer.timesteps[0], states()).prev_sample  # v at pure noise
    assert p.x0.abs().min() > 0.1
    assert torch.allclose(step, table[1].sigma * states(), atol=1e-6)
