"""ReDi: a store of trajectories; a new one that has begun like a stored one jumps to that one's later state."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hasten.atomic import write_bytes_atomically
from hasten.denoiser import Denoiser
from hasten.grid import Grid
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve

systems = ("redi",)


@dataclass(frozen=True, eq=False)
class Store:
    """Early and later states of trajectories of one solver on one grid. Zhang et al. 2023, arXiv:2302.02285.

    The solver runs `at` steps, the nearest stored key (Euclidean) stands for the state it has reached, and it goes on
    from that key's value at step `to`: to - at steps are skipped. The error is at most what the flow makes of the
    distance to the key (their bound), so it falls as the store grows, fast in few dimensions and slowly in many.
    Conditions belong to a store as to a network: keep one a prompt.

    Attributes:
        keys, values: states after `at` and `to` steps, [N, ...].
        at, to: 0 <= at < to <= steps.
        levels: (t, alpha, sigma) of the grid's nodes, float64 [steps + 1, 3].
        solver: its name and settings.
    """

    keys: Tensor
    values: Tensor
    at: int
    to: int
    levels: Tensor
    solver: str

    @classmethod
    def build(cls, solver: Solver, denoise: Denoiser, xs: Tensor, grid: Grid, at: int, to: int) -> Store:
        """Runs the solver from xs [N, ...] and keeps its states. A solver that looks back sees the same in a key and in
        a run of `at` steps, and its values are those of an unbroken run; that costs the first `at` steps twice.

        Raises:
            ValueError: the solver adds noise, so that a trajectory does not follow from its early state; or `at` and
                `to` are not in order.
        """
        if solver.stochastic:
            raise ValueError(f"{solver.name} adds noise, so no later state follows from an early one: take another")
        if not 0 <= at < to <= len(grid):
            raise ValueError(f"0 <= at < to <= steps must hold, got at={at}, to={to} on {len(grid)} steps")
        keys, values = (_steps(solver, denoise, xs, grid, 0, stop) for stop in (at, to))
        return cls(keys, values, at, to, _levels(grid), _named(solver))

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(index [B], distance [B]) of the stored key nearest to each x [B, ...] after `at` steps."""
        wide = torch.promote_types(x.dtype, torch.float32)
        ours, theirs = (v.to(x.device, wide).flatten(1) for v in (x, self.keys))
        mode = "donot_use_mm_for_euclid_dist"  # products would lose small distances
        found = torch.cdist(ours, theirs, compute_mode=mode).min(1)
        return found.indices, found.values

    def sample(self, solver: Solver, denoise: Denoiser, x: Tensor, grid: Grid) -> Tensor:
        """The sample [B, ...] from x at the grid's start, without the calls of the skipped steps. From a start that is
        stored it is that trajectory's own end (a solver that looks back begins anew at the value).

        Raises:
            ValueError: another grid, solver, shape or dtype than the store's.
        """
        self._check(solver, x, grid)
        key = _steps(solver, denoise, x, grid, 0, self.at)
        value = self.values.to(x.device)[self.nearest(key)[0]]
        return _steps(solver, denoise, value, grid, self.to, len(grid))

    def _check(self, solver: Solver, x: Tensor, grid: Grid) -> None:
        if _named(solver) != self.solver:
            raise ValueError(f"the store holds trajectories of {self.solver}, not of {_named(solver)}: build another")
        levels = _levels(grid)
        if levels.shape != self.levels.shape:
            raise ValueError(f"the store's grid has {len(self.levels) - 1} steps, this one {len(grid)}: build another")
        if not torch.allclose(levels, self.levels, rtol=1e-9, atol=1e-12):
            raise ValueError("the store was built on other times or another path of as many steps: build another")
        if x.shape[1:] != self.keys.shape[1:]:
            ours, theirs = list(self.keys.shape[1:]), list(x.shape[1:])
            raise ValueError(f"the store holds states of shape {ours}, got {theirs}: build another")
        if x.dtype != self.keys.dtype:
            raise ValueError(f"the store holds {self.keys.dtype}, got {x.dtype}: build another, or convert the state")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all."""
        about = {"redi": json.dumps({"at": self.at, "to": self.to, "solver": self.solver})}
        tensors = {"keys": self.keys, "values": self.values, "levels": self.levels}
        write_bytes_atomically(path, save({k: v.cpu().contiguous() for k, v in tensors.items()}, about))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Store:
        """Reads what `save` wrote.

        Raises:
            ValueError: there is no such file, or it holds no store.
        """
        if not Path(path).is_file():
            raise ValueError(f"no store at {path}: write one with Store.build(...).save(path)")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["redi"])
                return cls(**{n: file.get_tensor(n) for n in ("keys", "values", "levels")}, **about)
        except (SafetensorError, KeyError, TypeError, ValueError) as reason:
            raise ValueError(f"{path} holds no store of trajectories ({reason}): build and save one") from None


def _steps(solver: Solver, denoise: Denoiser, x: Tensor, grid: Grid, start: int, stop: int) -> Tensor:
    """The state after steps `start` to `stop` of a grid."""
    return x if start == stop else solve(solver, denoise, x, Grid(grid.nodes[start : stop + 1], grid.path))


def _levels(grid: Grid) -> Tensor:
    return torch.tensor([(n.t, n.alpha, n.sigma) for n in grid.nodes], dtype=torch.float64)


def _named(solver: Solver) -> str:
    settings = (solver.run.__kwdefaults__ or {}) | dict(solver.settings)
    return f"{solver.name}({', '.join(f'{k}={v}' for k, v in sorted(settings.items()))})"
