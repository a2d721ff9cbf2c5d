"""Heun's and the midpoint method: EDM's algorithm 1, the peers, and both ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at, build
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve, visited

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
HEUN, MIDPOINT = tree.function("solvers", "heun"), tree.function("solvers", "midpoint")


def noises(sigmas: list[float]) -> Grid:
    """EDM's path at these noise levels."""
    return at(EDM(sigmas[0]), [s / sigmas[0] for s in sigmas])


def algorithm_1(denoise: Any, x: Tensor, grid: Grid) -> Tensor:
    """Karras et al. 2022, arXiv:2206.00364 alg. 1, in their variables: the state is x / alpha, the time sigma /
    alpha."""
    x = x / grid.nodes[0].alpha
    for now, after in grid.steps():
        t, t_next = now.sigma / now.alpha, after.sigma / after.alpha
        d = (x - denoise(x * now.alpha, now).x0) / t
        ahead = x + (t_next - t) * d
        if t_next != 0:
            d_next = (ahead - denoise(ahead * after.alpha, after).x0) / t_next
            ahead = x + (t_next - t) * (d + d_next) / 2
        x = ahead
    return x


@pytest.mark.system("edm")
def test_heun_on_edms_path_is_edms_algorithm_1() -> None:
    """18 steps even in the seventh root of sigma from 80 to 0.002, then 0: the paper's own grid."""
    root = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18, dtype=torch.float64)
    law, grid = Mixture(), noises([*(root**7).tolist(), 0.0])
    x = 80 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    want = algorithm_1(law.denoise, x, grid)
    assert len(visited(HEUN, grid)) == 35
    assert (solve(HEUN, law.denoise, x, grid) - want).abs().max() < 1e-10


@pytest.mark.system("edm")
def test_heun_in_18_steps_beats_euler_in_36_on_edms_grid() -> None:
    """About as many calls (35 and 36), from sigma = 80, on a law that bends."""
    law, path = Mixture(), EDM()
    x = 80 * torch.randn(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spacing = tree.function("grids", "karras")

    def error(name: str, steps: int) -> float:
        got = solve(tree.function("solvers", name), law.denoise, x, build(path, spacing, steps, smallest=0.002))
        return float((got - want).square().mean().sqrt())

    want = solve(HEUN, law.denoise, x, build(path, spacing, 1000, smallest=0.002))
    assert error("heun", 18) < 0.6 * error("euler", 36)


def test_from_near_pure_noise_heun_stays_what_it_is_and_edms_variable_does_not() -> None:
    """In float32 from alpha = 1e-4: x / alpha is ten thousand times x, and so is its rounding."""

    def denoise(x: Tensor, n: Node) -> Prediction:
        p = law.denoise(x.double(), n)
        return Prediction.of("flow", (p.eps - p.x0).to(x), x, n)

    law, grid = Mixture(), at(Flow(), [1 - 1e-4, 1 - 2e-4, 0.9, 0.7, 0.5, 0.3, 0.1])
    x = torch.linspace(-2, 2, 9)
    wide = solve(HEUN, denoise, x.double(), grid)
    assert (solve(HEUN, denoise, x, grid) - wide).abs().max() < 1e-6
    last = grid.nodes[-1].alpha
    error = (algorithm_1(denoise, x, grid) - algorithm_1(denoise, x.double(), grid)).abs().max() * last
    assert error > 1e-4


@pytest.mark.parametrize("solver", [HEUN, MIDPOINT], ids=["heun", "midpoint"])
@pytest.mark.parametrize("path", [Flow(), Preserving()], ids=["Flow", "Preserving"])
def test_both_ends_are_reached_at_second_order(path: Path, solver: Any) -> None:
    """From pure noise, alpha = 0 on the straight path. The last step, DDIM's, is the same on every grid."""
    law, x = Mixture(), torch.linspace(-2, 2, 9, dtype=torch.float64)

    def reached(steps: int) -> Tensor:
        return solve(solver, law.denoise, x, at(path, [*torch.linspace(1, 0.01, steps + 1).tolist(), 0.0]))

    errors = torch.stack([(reached(n) - reached(1500)).square().mean().sqrt() for n in (64, 128, 256)])
    assert -errors.log2().diff() == pytest.approx([2.0, 2.0], abs=0.15)


# --- peers, stepped by hand in float32 with an exact law at the noise that they think they are at


@pytest.mark.parametrize("karras", [False, True])
def test_heun_is_diffusers_heun(karras: bool) -> None:
    from diffusers import HeunDiscreteScheduler

    peer = HeunDiscreteScheduler(**BETAS, use_karras_sigmas=karras)
    peer.set_timesteps(10)
    law, levels = Mixture(), peer.sigmas.tolist()
    grid = noises(sorted(set(levels), reverse=True))
    x = torch.linspace(-2, 2, 7)[:, None] * levels[0]
    theirs = x
    for t, level in zip(peer.timesteps, levels, strict=False):
        peer.scale_model_input(theirs, t)
        theirs = peer.step(law.denoise(theirs, noises([level, 0.0]).nodes[0]).eps, t, theirs).prev_sample
    assert (solve(HEUN, law.denoise, x, grid) - theirs).abs().max() < 1e-5


@pytest.mark.system("flow-matching")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_diffusers_heun_of_flows(shift: float) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    peer = FlowMatchHeunDiscreteScheduler(shift=shift)
    peer.set_timesteps(10)
    law, levels = Mixture(), peer.sigmas.tolist()
    theirs = x = torch.linspace(-2, 2, 7)[:, None]
    for t, level in zip(peer.timesteps, levels, strict=False):
        p = law.denoise(theirs, at(Flow(), [level, 0.0]).nodes[0])
        theirs = peer.step(p.eps - p.x0, t, theirs).prev_sample
    grid = at(Flow(), sorted(set(levels), reverse=True))
    assert (solve(HEUN, law.denoise, x, grid) - theirs).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # diffusers' own, of numpy
@pytest.mark.parametrize("karras", [False, True])
def test_the_midpoint_in_lam_on_edms_path_is_diffusers_kdpm2(karras: bool) -> None:
    from diffusers import KDPM2DiscreteScheduler

    peer = KDPM2DiscreteScheduler(**BETAS, use_karras_sigmas=karras)
    peer.set_timesteps(10)
    law, levels, inner = Mixture(), peer.sigmas.tolist(), peer.sigmas_interpol.tolist()
    grid = noises(sorted(set(levels), reverse=True))
    x = torch.linspace(-2, 2, 7)[:, None] * levels[0]
    theirs = x
    for k, t in enumerate(peer.timesteps):
        node = noises([(inner if k % 2 else levels)[k], 0.0]).nodes[0]
        theirs = peer.step(law.denoise(theirs, node).eps, t, theirs, return_dict=False)[0]
    ours = solve(MIDPOINT.given(middle="lam"), law.denoise, x, grid)
    assert len(visited(MIDPOINT, grid)) == len(peer.timesteps)
    assert (ours - theirs).abs().max() < 1e-5


def test_the_midpoint_on_the_straight_path_is_the_textbooks() -> None:
    """x + h v(x + h/2 v(x, t), t + h/2)."""
    law, grid = Mixture(), at(Flow(), [0.9, 0.6, 0.25, 0.1])
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)

    def v(x: Tensor, t: float) -> Tensor:
        p = law.denoise(x, at(Flow(), [t, 0.0]).nodes[0])
        return p.eps - p.x0

    want = x
    for now, after in grid.steps():
        h = after.t - now.t
        want = want + h * v(want + h / 2 * v(want, now.t), now.t + h / 2)
    assert (solve(MIDPOINT, law.denoise, x, grid) - want).abs().max() < 1e-12


def test_the_midpoint_asks_at_the_half_time_and_needs_a_path() -> None:
    grid = at(Flow(), [1.0, 0.6, 0.2, 0.0])
    assert [n.t for n in visited(MIDPOINT, grid)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [n.t for n in visited(MIDPOINT.given(middle="lam"), grid)][:2] == pytest.approx([1.0, 0.6])
    for middle in ("t", "lam"):
        with pytest.raises(ValueError, match=r"asks between the times of its grid: make the grid with grid\.at"):
            solve(MIDPOINT.given(middle=middle), Gaussian().denoise, torch.zeros(2), Grid(grid.nodes))
    with pytest.raises(ValueError, match="middle"):
        tree.checked(MIDPOINT, {"middle": "sigma"})
