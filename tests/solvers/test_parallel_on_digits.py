"""ParaDiGMS, ParaTAA and SRDS on a trained network: handwritten digits, whose denoiser nobody knows exactly."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from digits import Small, fitted, written_digits
from hasten.brownian import Brownian
from hasten.denoiser import Denoiser, denoiser
from hasten.grid import build
from hasten.grids.uniform import uniform
from hasten.paths.preserving import Preserving
from hasten.solvers.ddpm import ddpm
from hasten.solvers.declare import Solver
from hasten.solvers.drive import Counted, solve
from hasten.solvers.paradigms import paradigms
from hasten.solvers.parataa import parataa
from hasten.solvers.srds import srds


@cache
def trained() -> Denoiser:
    """A network of digits that says v, on Preserving, in seconds."""
    digits, path, rng = written_digits(), Preserving(), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Small()

    def denoising(_: int) -> Tensor:
        x0, t = digits[torch.randint(len(digits), (256,), generator=rng)], torch.rand(256, generator=rng)
        alpha, sigma, eps = path.alpha(t)[:, None], path.sigma(t)[:, None], torch.randn(x0.shape, generator=rng)
        return (net(alpha * x0 + sigma * eps, t)[0] - (alpha * eps - sigma * x0)).square().mean()

    fitted(list(net.parameters()), 700, 3e-3, denoising)
    assert denoising(0) < 0.5 * digits.square().mean(), "it has learned little"
    net.requires_grad_(False)
    return denoiser(lambda x, t: net(x, t)[0], "v")


@pytest.mark.system("parataa")
@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ddim", "ddpm"])
@pytest.mark.parametrize(
    ("solver", "most"), [(paradigms, 30), (parataa, 20), (srds, 36)], ids=["paradigms", "parataa", "srds"]
)
def test_the_sequential_digits_to_the_tolerance_in_far_fewer_passes(solver: Solver, most: int, eta: float) -> None:
    """Of DDIM, and of DDPM with noise of the same seed, in 60 steps and in float32; the calls are more."""
    net, grid = trained(), build(Preserving(), uniform, 60)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    want = solve(ddpm.given(eta=eta), net, x, grid, Brownian([3]))
    for tolerance in (1e-2, 1e-3):
        counted = Counted(net)
        got = solve(solver.given(eta=eta, tolerance=tolerance), counted, x, grid, Brownian([3]))
        assert (got - want).square().mean(1).sqrt().max() <= tolerance
        assert counted.passes <= most < 60 <= counted.calls
