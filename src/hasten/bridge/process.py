"""Which path, target, clock and scale a diffusers scheduler stands for."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.denoiser import Prediction, Target
from hasten.grid import Node
from hasten.path import Path
from hasten.paths.cut import Cut
from hasten.paths.flow import Flow
from hasten.paths.gvp import GVP
from hasten.paths.tabulated import Tabulated

TARGETS: dict[str, Target] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


class Told(Protocol):
    """What a network is told of the time t in [0, 1]; of a float a float, of a tensor a tensor."""

    def of(self, t: Any) -> Any:
        """The pipeline's timestep at t."""
        ...

    def t(self, timestep: Any) -> Any:
        """Back."""
        ...


@dataclass(frozen=True, slots=True)
class Line:
    """scale t + offset: a table's step, a thousandth of a flow, an angle."""

    scale: float
    offset: float = 0.0

    def of(self, t: Any) -> Any:
        return self.scale * t + self.offset

    def t(self, timestep: Any) -> Any:
        return (timestep - self.offset) / self.scale


@dataclass(frozen=True, slots=True)
class QuarterLog:
    """ln(unit sigma / alpha) / 4, "c_noise" of Karras et al. 2022, arXiv:2206.00364 table 1."""

    path: Path
    unit: float

    def of(self, t: Any) -> Any:
        wide = torch.as_tensor(t, dtype=torch.float64)
        told = (self.unit * self.path.sigma(wide) / self.path.alpha(wide)).log() / 4
        return told.to(t) if isinstance(t, Tensor) else float(told)

    def t(self, timestep: Any) -> Any:
        t = self.path.time(math.log(self.unit) - 4 * torch.as_tensor(timestep, dtype=torch.float64))
        return t.to(timestep) if isinstance(timestep, Tensor) else float(t)


@dataclass(frozen=True)
class Process:
    """What a network was trained on, and in which units a pipeline holds it.

    hasten's state is what the network sees, alpha x0 + sigma eps of `path`.

    Attributes:
        path, target: in hasten's words.
        told: the network's time.
        sign: -1 where the network says the negative of `target`.
        unit: standard deviation of the data that `path` sees as 1; the pipeline's sample is unit x0.
        wide: the pipeline's own latents are unit (x0 + sigma / alpha eps), which its scheduler scales at every call.
        bound: predictions of x0 are clipped to [-bound, bound]; None leaves them.
    """

    path: Path
    target: Target
    told: Told
    sign: float = 1.0
    unit: float = 1.0
    wide: bool = False
    bound: float | None = None

    def timestep(self, t: Any) -> Any:
        """What the network is told at t in [0, 1]; of a tensor a tensor."""
        return self.told.of(t)

    def t(self, timestep: Any) -> Any:
        """Back: a float or a tensor of times in [0, 1]."""
        return self.told.t(timestep)

    def read(self, out: Tensor, x: Tensor, node: Node) -> Prediction:
        """What the network said at state `x` [B, C, ...], of twice its channels where it also learned a variance."""
        spread = None
        if out.shape != x.shape and out.shape[1] == 2 * x.shape[1]:
            out, spread = out.chunk(2, 1)
        p = Prediction.of(self.target, out if self.sign > 0 else -out, x, node)
        if self.bound is not None:
            x0 = p.x0.clamp(-self.bound, self.bound)
            p = Prediction(x, x0, (x - node.alpha * x0) / node.sigma)
        return p if spread is None else replace(p, spread=spread)

    def gain(self, node: Node) -> float:
        """The pipeline's own latents over hasten's state at a node that is not pure noise."""
        return self.unit / node.alpha if self.wide else self.unit

    def level(self, node: Node) -> float:
        """The noise at a node as diffusers' `sigmas` count it: of a flow sigma (alpha where it is told the signal), of
        all others sigma / alpha."""
        if isinstance(self.path, Flow):
            return node.sigma if self.sign > 0 else node.alpha
        return self.unit * node.sigma / node.alpha if node.alpha else math.inf

    def times(self, levels: Tensor) -> list[float]:
        """Back, in [0, 1].

        Raises:
            ValueError: noise above 1 on a flow.
        """
        if not isinstance(self.path, Flow):
            return self.path.time(-(levels.double() / self.unit).log()).clamp(0, 1).tolist()
        if levels.numel() and float(levels.max()) > 1.001:
            raise ValueError(
                f"a straight flow has noise in [0, 1], and this scheduler is set to {float(levels.max()):.3g}; "
                "leave solver and grid out of the recipe for this pipeline"
            )
        times = levels.double().clamp(0, 1)
        return (times if self.sign > 0 else 1 - times).tolist()


def process(scheduler: Any) -> Process:
    """Reads a diffusers scheduler: flow matching, EDM's preconditioning, or a table of alpha_bar with what its network
    predicts.

    Raises:
        ValueError: the scheduler has none of them, or does what no solver does.
    """
    config, name = scheduler.config, type(scheduler).__name__
    steps = float(config.get("num_train_timesteps", 1000))
    kind = config.get("prediction_type", None)
    own = inspect.signature(type(scheduler).__init__).parameters
    if "thresholding" in own and config.get("thresholding", False):
        raise ValueError(f"{name} thresholds dynamically, which no solver does: set thresholding=False in its config")
    if hasattr(scheduler, "precondition_noise"):  # EDM's and Stable Audio's
        return _angular(config["sigma_max"], config["sigma_data"], kind, told_angle="Cosine" in name)
    if kind == "flow_prediction" or config.get("use_flow_sigmas", False) or name.startswith("FlowMatch"):
        if config.get("invert_sigmas", False):  # told how much signal there is, and says where it grows
            return Process(Flow(), "flow", Line(-steps, steps), sign=-1.0)
        return Process(Flow(), "flow", Line(steps))
    table = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(table, Tensor) and kind == "v_prediction" and config.get("timestep_type") == "continuous":
        last = (1 / table[-1].double() - 1).sqrt()
        return _angular(config.get("sigma_max") or float(last), 1.0, kind)
    if isinstance(table, Tensor) and kind in TARGETS:
        clips = config.get("clip_sample", False) and "clip_sample" in own and not name.startswith("CogVideoX")
        bound = config.get("clip_sample_range", 1.0) if clips else None
        path, wide = Tabulated(tuple(table.double().tolist())), float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1
        return Process(path, TARGETS[kind], Line(steps, -1.0), wide=wide, bound=bound)
    raise ValueError(
        f"{name} has neither flow matching nor EDM's preconditioning nor a table of alphas_cumprod, which is what "
        "hasten's solvers read; leave solver and grid out of the recipe for this pipeline"
    )


def _angular(largest: float, unit: float, kind: str, told_angle: bool = False) -> Process:
    """x / sqrt(sigma^2 + unit^2), which EDM's networks see, is variance preserving in u = x0 / unit: its angle is
    atan(sigma / unit). With c_skip and c_out of Karras et al. 2022, arXiv:2206.00364 table 1, what they say is minus
    the v of u; under diffusers' "v_prediction" it is v itself."""
    if told_angle and unit != 1:
        raise ValueError(f"this scheduler's angles are of data of deviation 1, and its sigma_data is {unit}")
    path = Cut(GVP(), math.atan(largest / unit) * 2 / math.pi)
    told = Line(path.last) if told_angle else QuarterLog(path, unit)
    return Process(path, "v", told, sign=1.0 if kind == "v_prediction" else -1.0, unit=unit, wide=True)


def planned(scheduler: Any, p: Process) -> list[float]:
    """The times that a diffusers scheduler is set to, falling to where its last step ends: from its sigmas where it
    has them, else from its timesteps. Repeats, as PNDM has them, once; nor is a last step made that stands still."""
    if hasattr(scheduler, "sigmas"):
        times = p.times(scheduler.sigmas.detach().cpu())
    else:
        end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))  # below 1 where the last step keeps some noise
        times = [max(0.0, min(1.0, p.t(s))) for s in scheduler.timesteps.tolist()]
        times += p.times(torch.tensor([(1 / end - 1) ** 0.5]))
    falling = times[:1]
    for t in times[1:]:
        if t < falling[-1] - 1e-9:  # else the step would stand still
            falling.append(t)
    return falling if len(falling) > 1 else [*falling, 0.0]


def asked(timesteps: Any, p: Process) -> list[float]:
    """The times of timesteps that a user gave, which the network is then told as they are; they end clean."""
    times: list[float] = p.t(torch.as_tensor(timesteps, dtype=torch.float64)).clamp(0, 1).tolist()
    return [*times, 0.0] if times[-1] > 0 else times
