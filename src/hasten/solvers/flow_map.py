"""Steps of a network that knows where they end: shortcut models, MeanFlow, consistency trajectory models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from hasten.denoiser import Denoiser, Prediction, Target
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver


@solver(order=0, few=True)
def flow_map(x: Tensor, grid: Grid) -> Steps:
    """x' = alpha' x0 + sigma' eps, one call a step, from a prediction for the whole step: `now.end` says where it ends.

    On the straight path that is x + (t' - t) u(x, t, t') with u the average velocity of the step: shortcut models
    (Frans et al. 2024, arXiv:2410.12557 alg. 2), MeanFlow (Geng et al. 2025, arXiv:2505.13447 sec. 4.1). On alpha = 1
    it is (s'/s) x + (1 - s'/s) g(x, s, s'), consistency trajectory models (Kim et al. 2023, arXiv:2310.02279 sec. 3.1).
    With an exact network any number of steps is the exact flow; with one that isn't told the end it is DDIM.
    """
    for now, after in grid.steps():
        p = yield x, replace(now, end=after)
        x = p.mix(x0=after.alpha, eps=after.sigma)
    return x


def jumps(network: Callable[[Tensor, Tensor, Tensor], Tensor], target: Target) -> Denoiser:
    """Reads `network(x, t, end)`, times [B] in [0, 1], as predictions for the step from t to end. Where a solver names
    no end it is t, at which average and instant are the same, so ordinary solvers run such a network too."""

    def ask(x: Tensor, n: Node) -> Prediction:
        t, end = (x.new_full(x.shape[:1], time) for time in (n.t, n.t if n.end is None else n.end.t))
        return Prediction.of(target, network(x, t, end), x, n)

    return ask
