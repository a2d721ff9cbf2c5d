"""Which path, target and clock a diffusers scheduler stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hasten.denoiser import Target
from hasten.path import Path
from hasten.paths.flow import Flow
from hasten.paths.tabulated import Tabulated

TARGETS: dict[str, Target] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Process:
    """What a network was trained on.

    Attributes:
        path, target: in hasten's words.
        scale, offset: the network's time is scale t + offset.
    """

    path: Path
    target: Target
    scale: float
    offset: float

    def timestep(self, t: float) -> float:
        """What the network is told at t in [0, 1]."""
        return self.scale * t + self.offset

    def t(self, timestep: Any) -> Any:
        """Back: a float or a tensor of times in [0, 1]."""
        return (timestep - self.offset) / self.scale


def process(scheduler: Any) -> Process:
    """Reads a diffusers scheduler: flow matching, or a table of alpha_bar with its prediction type.

    Raises:
        ValueError: the scheduler has neither.
    """
    config = scheduler.config
    steps = float(config.get("num_train_timesteps", 1000))
    kind = config.get("prediction_type", None)
    if (
        kind == "flow_prediction"
        or config.get("use_flow_sigmas", False)
        or type(scheduler).__name__.startswith("FlowMatch")
    ):
        return Process(Flow(), "flow", steps, 0.0)
    table = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(table, Tensor) and kind in TARGETS:
        return Process(Tabulated(tuple(table.double().tolist())), TARGETS[kind], steps, -1.0)
    raise ValueError(
        f"{type(scheduler).__name__} has neither flow matching nor a table of alphas_cumprod, which is what hasten's "
        "solvers read; leave solver and grid out of the recipe for this pipeline"
    )


def planned(scheduler: Any, p: Process) -> list[float]:
    """The times that a diffusers scheduler is set to, falling, with 0 at the end: from its sigmas on a flow, else
    from its timesteps (repeats, as PNDM has them, once)."""
    if p.target == "flow":
        times = [min(1.0, s) for s in scheduler.sigmas.tolist()]
    else:
        times = [max(0.0, min(1.0, p.t(s))) for s in scheduler.timesteps.tolist()]
    falling = [times[0]]
    for t in [*times[1:], 0.0]:
        if t < falling[-1]:
            falling.append(t)
    return falling
