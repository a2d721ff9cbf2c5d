"""Times and weights of a few-step solver, learned by gradients through the model's own calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.denoiser import Prediction, denoiser
from hasten.fit.subspace import Weights
from hasten.fit.trajectory import Trajectory
from hasten.grid import Grid, Node, at
from hasten.path import Path


class Rollout:
    """A solver of `solvers.olss`'s form whose K - 1 inner times and weights are parameters.

    The times are cumulative shares of a softmax, so that they always fall; weights are offsets from where they start.
    Tong et al. 2024, arXiv:2405.15506 eq. 5 (LD3: times against the teacher's end state); Frankel et al. 2025,
    arXiv:2502.17423 (S4S: coefficients as well).
    """

    def __init__(self, path: Path, grid: Grid, weights: Weights) -> None:
        times = torch.tensor([n.t for n in grid.nodes], dtype=torch.float64)
        self.path, self.ends = path, (float(times[0]), float(times[-1]))
        self.gaps = (-times.diff()).log().requires_grad_()
        width = max(map(len, weights))
        self.base = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in weights], dtype=torch.float64)
        self.used = torch.tensor([[i < len(row) for i in range(width)] for row in weights])
        self.offsets = torch.zeros_like(self.base).requires_grad_()

    def times(self) -> Tensor:
        """[K + 1], falling, with a gradient to the gaps."""
        first, last = self.ends
        fallen = torch.softmax(self.gaps, 0).cumsum(0) * (first - last)
        return torch.cat([fallen.new_tensor([first]), first - fallen[:-1], fallen.new_tensor([last])])

    def weights(self) -> Tensor:
        """[K, 2 + history]."""
        return (self.base + self.offsets) * self.used

    def __call__(self, denoise: denoiser, x: Tensor) -> Tensor:
        """The end state of x, [B, ...], with gradients to times and weights."""
        seen: list[Tensor] = []
        for t, row in zip(self.times()[:-1], self.weights().to(x.dtype), strict=True):
            a, s = self.path.alpha(t), self.path.sigma(t)
            out = denoise.network(x, t.to(x.dtype).expand(len(x)))
            n = Node(t, a.to(x.dtype), s.to(x.dtype), 0.0, 0.0, 0.0)  # type: ignore[arg-type]
            p = Prediction.of(denoise.target, out, x, n)
            of_one, of_other = p.of_x0
            seen = [of_one * p.one + of_other * p.other, *seen]
            x = row[0] * x + sum(w * x0 for w, x0 in zip(row[1:], seen, strict=False))
        return x

    def kept(self) -> tuple[Grid, Weights]:
        """As plain numbers."""
        rows = [[w for w, used in zip(r, u, strict=True) if used] for r, u in zip(self.weights().tolist(), self.used)]
        return at(self.path, self.times().tolist()), tuple(tuple(row) for row in rows)


def learned(
    denoise: denoiser, exact: Trajectory, train: slice, grid: Grid, weights: Weights, rounds: int, rate: float = 0.02,
    tick: Callable[[int], None] = lambda n: None,
) -> tuple[Grid, Weights]:  # fmt: skip
    """Grid and weights after `rounds` of Adam on the distance of the end states over their norm.

    Args:
        denoise: differentiable, of all rows at once; its own weights should ask for no gradient.
        exact: the fine run of the same samples.
        train: rows whose distance counts.
        rate: a gap of times changes by about this share a round, a weight by a tenth of it.
        tick: told how many calls a round was worth, about three times its own.
    """
    assert grid.path is not None
    roll = Rollout(grid.path, grid, weights)
    adam = torch.optim.Adam([{"params": [roll.gaps], "lr": rate}, {"params": [roll.offsets], "lr": rate / 10}])
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, rounds)
    start, end = exact.x[0], exact.x[-1][train].flatten(1)
    for _ in range(rounds):
        with torch.enable_grad():
            off = (roll(denoise, start)[train].flatten(1) - end).norm(dim=1) / end.norm(dim=1)
            adam.zero_grad()
            off.mean().backward()
        for group in adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        adam.step()
        fall.step()
        tick(3 * len(grid))
    return roll.kept()
