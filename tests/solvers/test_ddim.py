"""DDIM: the peers that are it under other names, and the way back from a sample to its noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.bridge.process import process
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve
from hasten.solvers.invert import encode, undo

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATHS = [Flow(), EDM(5.0), Preserving()]
LAWS = [Gaussian(), Mixture()]
X = torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)


def named(value: Any) -> str:
    return value.name if isinstance(value, Solver) else type(value).__name__


def solver(name: str, **settings: Any) -> Solver:
    found: Solver = tree.function("solvers", name)
    return found.given(**settings)


def even(path: Path, steps: int, start: float = 0.9, stop: float = 0.1) -> Grid:
    return at(path, torch.linspace(start, stop, steps + 1, dtype=torch.float64).tolist())


def noises(sigmas: list[float]) -> Grid:
    """EDM's path at these noise levels: the x / alpha and sigma / alpha of the peers that think in them."""
    return at(EDM(sigmas[0]), [s / sigmas[0] for s in sigmas])


# --- peers, stepped by hand in float32 with an exact law


def states(count: int = 7) -> Tensor:
    return torch.linspace(-2, 2, count)[:, None, None, None]


@pytest.mark.system("ddim")
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_it_is_diffusers_ddim(spacing: str) -> None:
    from diffusers import DDIMScheduler

    peer = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing=spacing)
    peer.set_timesteps(10)
    known, law = process(peer), Mixture()
    grid = at(known.path, [known.t(t) for t in peer.timesteps.tolist()] + [0.0])
    theirs = states()
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        theirs = peer.step(law.denoise(theirs, node).eps, t, theirs).prev_sample
    ours = solve(solver("ddim"), law.denoise, states(), grid)
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("karras", [False, True])
def test_eulers_method_in_sigma_over_alpha_is_ddim(karras: bool) -> None:
    """diffusers' EulerDiscrete has x / alpha for its state: DDIM on a path that is never scaled."""
    from diffusers import EulerDiscreteScheduler

    peer = EulerDiscreteScheduler(**BETAS, use_karras_sigmas=karras)
    peer.set_timesteps(10)
    law, grid = Mixture(), noises(peer.sigmas.tolist())
    x = states() * grid.nodes[0].sigma
    theirs = x
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        peer.scale_model_input(theirs, t)
        theirs = peer.step(law.denoise(theirs, node).eps, t, theirs, return_dict=False)[0]
    for name in ("ddim", "euler"):
        assert (solve(solver(name), law.denoise, x, grid) - theirs).abs().max() < 1e-5


def test_edms_euler_is_ddim() -> None:
    """diffusers' EDMEuler reads its network through EDM's preconditioning, which is undone here."""
    from diffusers import EDMEulerScheduler

    peer = EDMEulerScheduler()
    peer.set_timesteps(10)
    law, grid, data = Mixture(), noises(peer.sigmas.tolist()), peer.config.sigma_data
    x = states() * grid.nodes[0].sigma
    theirs = x
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        peer.scale_model_input(theirs, t)
        total = node.sigma**2 + data**2
        out = (law.denoise(theirs, node).x0 - data**2 / total * theirs) / (node.sigma * data / total**0.5)
        theirs = peer.step(out, t, theirs).prev_sample
    for name in ("ddim", "euler"):
        assert (solve(solver(name), law.denoise, x, grid) - theirs).abs().max() < 1e-5


@pytest.mark.system("flow-matching")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_eulers_method_on_the_straight_path_is_ddim(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(10)
    law, grid = Mixture(), at(Flow(), peer.sigmas.tolist())
    theirs = states()
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        p = law.denoise(theirs, node)
        theirs = peer.step(p.eps - p.x0, t, theirs).prev_sample
    for name in ("ddim", "euler"):
        assert (solve(solver(name), law.denoise, states(), grid) - theirs).abs().max() < 1e-5


# --- backwards


@pytest.mark.parametrize("law", LAWS, ids=named)
@pytest.mark.parametrize("path", PATHS, ids=named)
def test_encoding_by_ddim_is_its_formula_with_the_times_exchanged(path: Path, law: Gaussian | Mixture) -> None:
    """Song et al. 2020 sec. 4.3: x' = alpha' x0 + sigma' eps, from where x is to where it is noisier."""
    grid = even(path, 7)
    want = X
    for now, after in zip(reversed(grid.nodes[1:]), reversed(grid.nodes[:-1]), strict=True):
        p = law.denoise(want, now)
        want = after.alpha * p.x0 + after.sigma * p.eps
    assert (encode(solver("ddim"), law.denoise, X, grid) - want).abs().max() < 1e-12


@pytest.mark.system("ddim")
def test_encoding_by_ddim_is_diffusers_inverse_scheduler() -> None:
    """Told the same prediction. diffusers' pipelines ask their network for it at the time that a step ends at, not at
    that of the state, which is another first-order rule."""
    from diffusers import DDIMInverseScheduler

    peer = DDIMInverseScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    peer.set_timesteps(10)
    known, law = process(peer), Mixture()
    times = [known.t(float(t)) for t in peer.timesteps]
    grid = at(known.path, times[::-1])
    theirs, rising = states(), grid.nodes[::-1]
    for t, now in zip(peer.timesteps[1:], rising, strict=False):
        theirs = peer.step(law.denoise(theirs, now).eps, int(t), theirs).prev_sample
    assert (encode(solver("ddim"), law.denoise, states(), grid) - theirs).abs().max() < 1e-5


ROUND_TRIP = [("ddim", 1), ("dpmpp_2m", 2), ("heun", 3), ("midpoint", 3), ("adams_bashforth", 3), ("deis", 3)]
"""Of an even order the leading error is the same both ways but for its sign, and goes; dpmpp_2m is another method
backwards, where it is in eps."""


@pytest.mark.system("ddim")
@pytest.mark.parametrize("law", LAWS, ids=named)
@pytest.mark.parametrize("path", PATHS, ids=named)
@pytest.mark.parametrize(("name", "order"), ROUND_TRIP)
def test_there_and_back_errs_by_the_solvers_order(name: str, order: int, path: Path, law: Gaussian | Mixture) -> None:
    s, errors = solver(name), []
    for steps in (100, 200, 400):
        grid = even(path, steps)
        z = encode(s, law.denoise, X, grid)
        errors.append((solve(s, law.denoise, z, grid) - X).square().mean().sqrt())
    first, second = (-torch.stack(errors).log2().diff()).tolist()
    assert 2 * second - first == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_what_is_encoded_is_what_the_flow_came_from(path: Path) -> None:
    law, errors = Gaussian(), []
    for steps in (200, 400):
        grid = even(path, steps)
        want = law.flow(X, grid.nodes[-1], grid.nodes[0])
        errors.append((encode(solver("heun"), law.denoise, X, grid) - want).abs().max())
    assert errors[1] < 5e-4
    assert 1.8 < float((errors[0] / errors[1]).log2()) < 2.3


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "unipc", "adams_bashforth", "deis", "lms", "midpoint"])
def test_a_clean_sample_is_encoded_to_pure_noise_and_comes_back(name: str) -> None:
    """From sigma = 0, where no network says what noise is, to alpha = 0."""
    errors = []
    for steps in (20, 80):
        grid, law = even(Flow(), steps, 1.0, 0.0), Mixture()
        z = encode(solver(name), law.denoise, X, grid)
        errors.append(float((solve(solver(name), law.denoise, z, grid) - X).abs().max()))
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 0.1


@pytest.mark.system("ddim")
@pytest.mark.parametrize("law", LAWS, ids=named)
@pytest.mark.parametrize("path", [Flow(), Preserving()], ids=named)
@pytest.mark.parametrize("ends", [(0.9, 0.1), (1.0, 0.0)])
def test_undone_steps_come_back_exactly_however_few(
    path: Path, law: Gaussian | Mixture, ends: tuple[float, float]
) -> None:
    grid, ddim = even(path, 5, *ends), solver("ddim")
    errors = [solve(ddim, law.denoise, undo(law.denoise, X, grid, n), grid).sub(X).abs().max() for n in (4, 16, 64)]
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.01 * errors[1]
    assert errors[2] < 1e-5
    assert solve(ddim, law.denoise, encode(ddim, law.denoise, X, grid), grid).sub(X).abs().max() > 0.2


def test_a_single_step_that_forgets_all_is_refused() -> None:
    law, grid = Gaussian(), at(Flow(), [1.0, 0.0])
    for call in (lambda: encode(solver("ddim"), law.denoise, X, grid), lambda: undo(law.denoise, X, grid)):
        with pytest.raises(ValueError, match="one step from pure noise to clean forgets the noise"):
            call()


def test_a_grid_never_rises_so_that_backwards_has_a_function_of_its_own() -> None:
    with pytest.raises(ValueError, match="falling times"):
        at(Flow(), [0.1, 0.5, 0.9])


def test_encoding_asks_at_the_nodes_of_the_grid() -> None:
    """From the cleanest up, as often as the solver would downwards; for what noise is at the clean one, at the next,
    with a state that has none yet."""
    asked: list[tuple[Tensor, Node]] = []
    law, grid = Gaussian(), even(Flow(), 4, 1.0, 0.0)

    def denoise(x: Tensor, n: Node) -> Any:
        asked.append((x, n))
        return law.denoise(x, n)

    encode(solver("ddim"), denoise, X, grid)
    assert [n.t for _, n in asked] == pytest.approx([0.25, 0.25, 0.5, 0.75])
    assert [(n.alpha, n.sigma) for _, n in asked[1:]] == [(n.alpha, n.sigma) for n in grid.nodes[3:0:-1]]
    above = grid.nodes[3]
    assert torch.allclose(asked[0][0], above.alpha * X)
    assert torch.allclose(asked[1][0], above.alpha * X + above.sigma * law.denoise(above.alpha * X, above).eps)
