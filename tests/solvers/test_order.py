"""Every solver has the order it declares, on every path, on a linear and a bent law."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from hasten import tree
from hasten.grid import Grid, at
from hasten.path import Path, lam
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve

SOLVERS = tree.functions("solvers")
PATHS = [Flow(), EDM(5.0), Preserving()]
LAWS = [Gaussian(), Mixture()]
X = torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)


def even_in_lam(path: Path, steps: int, start: float = 0.9, stop: float = 0.1) -> Grid:
    ends = [float(lam(path, torch.tensor(t, dtype=torch.float64))) for t in (start, stop)]
    return at(path, path.time(torch.linspace(*ends, steps + 1, dtype=torch.float64)).tolist())


@cache
def truth(path: Path, law: Gaussian | Mixture) -> torch.Tensor:
    if isinstance(law, Gaussian):
        grid = even_in_lam(path, 1)
        return law.flow(X, grid.nodes[0], grid.nodes[-1])
    # Richardson: two Heun solutions cancel the h^2 term, so what is left is far below every solver under test
    coarse, fine = (solve(SOLVERS["heun"], law.denoise, X, even_in_lam(path, n)) for n in (1500, 3000))
    return fine + (fine - coarse) / 3


@pytest.mark.system("ddim", "unipc", "dpm-solver-pp", "flow-matching", "rectified-flow")
@pytest.mark.parametrize("law", LAWS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("path", PATHS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", SOLVERS)
def test_order(name: str, path: Path, law: Gaussian | Mixture) -> None:
    solver = SOLVERS[name]
    counts = {1: (128, 256, 512), 2: (128, 256, 512), 3: (256, 512, 1024)}[solver.order]
    errors = [(solve(solver, law.denoise, X, even_in_lam(path, n)) - truth(path, law)).abs().max() for n in counts]
    slopes = torch.stack(errors).log2().diff().neg()
    assert (slopes - solver.order).abs().max() < 0.15, slopes


@pytest.mark.parametrize("path", [Flow(), Preserving()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", SOLVERS)
def test_runs_from_pure_noise_to_clean_and_converges(name: str, path: Path) -> None:
    """From alpha = 0 (or the path's end) to sigma = 0: no infinity, and the exact flow's answer."""
    law = Gaussian()
    errors = []
    for steps in (20, 80):
        grid = at(path, [1 - i / steps for i in range(steps + 1)])
        got = solve(SOLVERS[name], law.denoise, X, grid)
        errors.append(float((got - law.flow(X, grid.nodes[0], grid.nodes[-1])).abs().max()))
    assert errors[1] < errors[0]
    assert errors[1] < 0.05


@pytest.mark.system("ddim")
def test_ddim_is_exact_where_the_prediction_does_not_change() -> None:
    """One data point: x0 and eps are constant along the flow, so one step is the whole flow."""
    from hasten.denoiser import Prediction

    for path in PATHS:
        grid = at(path, [0.9, 0.2])
        now, after = grid.nodes
        x0, eps = torch.tensor([0.3]), torch.tensor([-1.1])
        got = solve(
            SOLVERS["ddim"], lambda x, n, x0=x0, eps=eps: Prediction(x, x0, eps), now.alpha * x0 + now.sigma * eps, grid
        )
        assert torch.allclose(got, after.alpha * x0 + after.sigma * eps, atol=1e-6)


@pytest.mark.system("rectified-flow")
def test_euler_is_exact_on_a_straight_flow_in_one_step() -> None:
    """A deterministic straight coupling x1 -> x0 = 2 x1 + 1: the rectified flow is straight, one step lands on it."""
    from hasten.denoiser import Prediction

    def denoise(x: torch.Tensor, n: object) -> Prediction:
        t = n.t  # type: ignore[attr-defined]
        eps = (x - (1 - t)) / (2 * (1 - t) + t)
        return Prediction(x, 2 * eps + 1, eps)

    x = torch.tensor([-1.0, 0.5, 3.0])
    got = solve(SOLVERS["euler"], denoise, x, at(Flow(), [1.0, 0.0]))
    assert torch.allclose(got, 2 * x + 1, atol=1e-6)


@pytest.mark.system("unipc", "dpm-solver-pp", "ddim")
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
def test_equals_diffusers_on_its_own_times(name: str) -> None:
    """A peer's result: diffusers' schedulers of the same solver, stepped by hand on the same betas and integer
    times."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    from hasten.bridge.process import process
    from hasten.denoiser import Prediction

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
    peer = {
        "ddim": lambda: DDIMScheduler(**betas, clip_sample=False),
        "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**betas, lower_order_final=True, euler_at_final=True),
        "unipc": lambda: UniPCMultistepScheduler(**betas, solver_order=2, solver_type="bh2", final_sigmas_type="zero"),
    }[name]()
    peer.set_timesteps(10)
    known = process(peer)
    times = peer.timesteps.tolist()
    law, x = Gaussian(), torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None, None, None]
    grid = at(known.path, [known.t(t) for t in times] + [0.0])

    def eps(x: torch.Tensor, node: object) -> torch.Tensor:
        return law.denoise(x, node).eps  # type: ignore[arg-type]

    ours = solve(SOLVERS[name], lambda x, n: Prediction.of("eps", eps(x, n), x, n), x, grid)
    theirs = x.clone()
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        theirs = peer.step(eps(theirs, node), t, theirs).prev_sample
    if name == "ddim":  # its last alpha_bar is 1 already at t = 0: the same clean end
        assert (ours - theirs).abs().max() < 1e-5
    assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max(), (ours, theirs)
