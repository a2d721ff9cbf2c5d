"""Come closer, diffuse faster: inverse problems from a first reconstruction, each step projected on what is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Denoiser
from hasten.grid import Grid, Node
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve
from hasten.start.noised import noised, tail

systems = ("ccdf",)

Project = Callable[[Tensor, Node], Tensor]
"""(x, node) -> the nearest state that agrees with what was measured; it must not move two states apart."""


def measured(part: Callable[[Tensor], Tensor], known: Tensor, rng: torch.Generator | None = None) -> Project:
    """The data consistency of a linear measurement: x - P x + P (alpha known + sigma z), z fresh at every asking.
    Chung et al. 2021, arXiv:2112.05146.

    Args:
        part: P, an orthogonal projection: `lambda x: mask * x` for inpainting, `lambda x: enlarge(shrink(x))` with
            block means for super-resolution.
        known: a clean picture [B, ...] with the right P known, such as the masked picture or the enlarged small one.
    """

    def project(x: Tensor, node: Node) -> Tensor:
        return x - part(x) + part(noised(known, node, rng))

    return project


def projected(denoise: Denoiser, project: Project) -> Denoiser:
    """A denoiser whose every answer is for the projected state, which the solver goes on from."""
    return lambda x, node: denoise(project(x, node), node)


def ccdf(
    solver: Solver, denoise: Denoiser, guess: Tensor, grid: Grid, t0: float, project: Project,
    rng: torch.Generator | None = None, noise: Noise | None = None,
) -> Tensor:  # fmt: skip
    """The reconstruction [B, ...] from a first one, `guess`: noised to t0, then denoised along the rest of the grid,
    with a projection before every call and after the last. Chung et al. 2021, arXiv:2112.05146 sec. 3.

    A denoising step brings two states nearer to one another and a projection never apart, so an error of the guess
    shrinks by the product of the steps' contractions (theorem 1), and t0 may be the lower the better the guess. What
    was measured is met to rounding where the grid ends clean.

    Args:
        project: (x, node) -> x, such as `measured(...)`.
        rng: of the noise on the guess.
        noise: what a stochastic solver adds on the way.

    Raises:
        ValueError: t0 lies outside the grid.
    """
    rest = tail(grid, t0)
    if rest is None:
        return project(guess, grid.nodes[-1])
    x = solve(solver, projected(denoise, project), noised(guess, rest.nodes[0], rng), rest, noise)
    return project(x, rest.nodes[-1])
