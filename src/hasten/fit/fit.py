"""A grid, and where no solver is named its weights too, fitted to one model's own fine trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten import tree
from hasten.denoiser import Denoiser, denoiser
from hasten.fit.curvature import curvature
from hasten.fit.elbo import elbo
from hasten.fit.learned import learned
from hasten.fit.search import refined
from hasten.fit.shortest import shortest
from hasten.fit.subspace import Weights, subspace
from hasten.fit.trajectory import Trajectory, record
from hasten.grid import Grid, at, build
from hasten.path import Path
from hasten.recipe import Recipe
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve

SHIFTS = (0.3, 0.5, 0.7, 1.5)
"""Of `grids.shifted`, tried besides its default."""

POINTS = 64
"""Of the fine trajectory, between which dynamic programming chooses."""


class CannotFit(ValueError):
    """What was asked can't be fitted; one line."""


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Attributes:
        fine: steps of the trajectory that is taken as exact, two calls each.
        search: grids tried by the search without gradients.
        rounds: of learning by gradients, which need the memory of a training step; 0 leaves them out.
    """

    fine: int = 50
    search: int = 40
    rounds: int = 0


@dataclass(frozen=True)
class Fitted:
    """What a fit found.

    Attributes:
        recipe: solver, times, steps.
        errors: on samples that nothing was fitted to, the distance from the exact end state over its norm, mean over
            samples: of the solver on every grid that was tried, and of "fitted".
    """

    recipe: Recipe
    errors: dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A model with what it does exactly.

    Attributes:
        denoise: of all rows at once.
        exact: their fine run.
        train: rows that are fitted to; the others judge.
        solver: None where the weights are fitted too.
        tick: told how many calls were made.
    """

    denoise: Denoiser
    exact: Trajectory
    train: slice
    solver: Solver | None = None
    tick: Callable[[int], None] = lambda n: None

    def run(self, grid: Grid, weights: Weights = ()) -> tuple[Tensor, Weights]:
        """Where the solver leads on this grid, [B, ...], and its weights, fitted where none are given."""
        if self.solver is None and not weights:
            weights, end = subspace(self.denoise, self.exact, grid, self.train)
        else:
            solver = self.solver or tree.function("solvers", "olss").given(weights=weights)
            with torch.no_grad():
                end = solve(solver, self.denoise, self.exact.x[0], grid)
        self.tick(len(grid) * (self.solver.calls if self.solver else 1))
        return end, weights

    def off(self, end: Tensor) -> tuple[float, float]:
        """Relative distance from the exact end state: of the rows fitted to, and of the others."""
        want = self.exact.x[-1].flatten(1)
        each = (end.flatten(1) - want).norm(dim=1) / want.norm(dim=1)
        others = torch.ones(len(each), dtype=torch.bool)
        others[self.train] = False
        return float(each[self.train].mean()), float(each[others].mean())

    def error(self, grid: Grid) -> float:
        """Of the rows that are fitted to."""
        return self.off(self.run(grid)[0])[0]


def fit(
    denoise: Denoiser, x: Tensor, path: Path, steps: int, solver: Solver | None = None, *,
    held: int, rng: torch.Generator, effort: Effort | None = None, exact: Trajectory | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> Fitted:  # fmt: skip
    """Fits to the first samples of x, [B, ...] pure noise, and judges on the last `held`.

    The candidates are every fixed grid and, by dynamic programming, the ones of least curvature and of least loss of
    likelihood; the best is moved by a search on the real error, and, if asked, by gradients.

    Args:
        solver: one of the tree's, whose times alone are fitted; None fits a multistep solver too (`solvers.olss`).
        exact: the fine run of x, where there is one already.
        tick: told how many network calls were just made; `calls` says how many there will be.

    Raises:
        CannotFit: too few samples, or a solver that adds noise or chooses its times.
    """
    effort = effort or Effort()
    if not 0 < held < len(x):
        raise CannotFit(f"of {len(x)} samples {held} can't be held back: give two or more, and hold back some")
    fittable(solver)
    fine = build(path, tree.function("grids", "uniform"), effort.fine)
    exact = exact or record(tree.function("solvers", "heun"), denoise, x, fine, tick)
    subject = Subject(denoise, exact, slice(0, len(x) - held), solver, tick)
    grids = candidates(subject, path, steps)
    tried = {name: subject.off(subject.run(grid)[0]) for name, grid in grids.items()}
    best = grids[min(tried, key=lambda name: tried[name][0])]
    times, _ = refined(lambda ts: subject.error(at(path, ts)), [n.t for n in best.nodes], effort.search, rng)
    grid, weights = at(path, times), subject.run(at(path, times))[1]
    if effort.rounds and solver is None and isinstance(denoise, denoiser):
        moved = learned(denoise, exact, subject.train, grid, weights, effort.rounds, tick=tick)
        if subject.off(subject.run(*moved)[0])[0] < subject.error(grid):
            grid, weights = moved
    errors = {name: others for name, (_, others) in tried.items()}
    errors["fitted"] = subject.off(subject.run(grid, weights)[0])[1]
    named = {"olss": {"weights": weights}} if solver is None else {solver.name: dict(solver.settings)}
    return Fitted(Recipe(solver=named, grid=tuple(n.t for n in grid.nodes), steps=steps), errors)


def fittable(solver: Solver | None) -> None:
    """Raises CannotFit for a solver whose times can't be fitted."""
    if solver is not None and (solver.stochastic or solver.unfit or solver.few or solver.fitted):
        raise CannotFit(f"{solver.name} can't be fitted: take a solver without noise that runs on a given grid")


def candidates(subject: Subject, path: Path, steps: int) -> dict[str, Grid]:
    """Every fixed grid, and those of least curvature and of least loss of likelihood, by name."""
    found = {name: build(path, spacing, steps) for name, spacing in tree.functions("grids").items()}
    found |= {f"shifted {s}": build(path, tree.function("grids", "shifted"), steps, shift=s) for s in SHIFTS}
    fine = subject.exact.rows(subject.train).thinned(max(POINTS, 2 * steps))
    rng = torch.Generator().manual_seed(0)
    costs = {
        "curvature": curvature(fine),
        "elbo": elbo(subject.denoise, subject.exact.x[-1], fine.grid, rng, subject.tick, subject.train),
    }
    ways = {name: shortest(cost, steps) for name, cost in costs.items()}
    return found | {name: at(path, [fine.grid.nodes[i].t for i in way]) for name, way in ways.items()}


def table(found: Fitted) -> str:
    """What was found, in lines: the fitted grid first, then the others from good to bad."""
    name = found.recipe.solving().name
    fitted = found.errors["fitted"]
    fixed = sorted((error, grid) for grid, error in found.errors.items() if grid != "fitted")
    lines = [f"relative error of {name} at {found.recipe.steps} calls, on prompts that nothing was fitted to:"]
    lines += [f"  {error:.4f}  {grid}" for error, grid in [(fitted, "fitted"), *fixed]]
    return "\n".join(lines)


def calls(solver: Solver | None, steps: int, effort: Effort) -> int:
    """About how many network calls a fit makes."""
    grids = len(tree.functions("grids")) + len(SHIFTS) + 2
    each = steps * (solver.calls if solver else 1)
    points = min(effort.fine, max(POINTS, 2 * steps))  # of the terms of the ELBO
    return (
        2 * effort.fine
        + points
        + each * (grids + effort.search + 3)
        + (3 * steps * effort.rounds if solver is None else 0)
    )
