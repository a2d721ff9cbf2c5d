"""Every solver as a diffusers scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hasten.bridge.process import asked, planned, process
from hasten.brownian import Brownian, Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.solvers.declare import Solver, Steps
from hasten.solvers.drive import visited

Lay = Callable[[Path, int], Grid]

IGNORED = {"eta", "use_clipped_model_output"}
"""What pipelines tell every scheduler and only diffusers' DDIM reads."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step gives.

    Attributes:
        prev_sample: the next state, [B, ...].
    """

    prev_sample: Tensor
    _said: Prediction
    _unit: float

    @property
    def pred_original_sample(self) -> Tensor:
        """The clean sample that the network saw, [B, ...]; computed where it is asked for."""
        x0 = self._said.x0
        return (x0 if self._unit == 1 else x0 * self._unit).to(self.prev_sample.dtype)


class SolverScheduler:
    """Runs a `Solver` inside an ordinary pipeline, which keeps its loop.

    Times are floats throughout, found on the host: no step asks the device for a number. The state is what the
    pipeline hands to `step`, so edits of latents between steps are honoured; where a pipeline starts in the middle of
    `timesteps`, the solver starts there. Between steps the latents are what the network sees (see `Process`), so
    nothing is scaled at a call; the last step gives them in the pipeline's own units.

    Attributes:
        base: the scheduler it stands in for; it gives configuration, path and, where no grid is laid, its own times.
        lay: (path, steps) -> Grid; None keeps the times of `base`.
        refines: noise is one Brownian path for every number of steps, keyed by time, instead of fresh numbers a step.
        order: network calls a step, as pipelines count them.
        generator: where stochastic solvers get their noise, if the pipeline passes none to `step`: one for all rows, a
            list of one each, or None for torch's own.
        sigmas: noise at each call and at the end, counted as `base` counts, on the host.
    """

    def __init__(self, base: Any, solver: Solver, lay: Lay | None = None, refines: bool = False) -> None:
        if solver.unfit:
            raise ValueError(f"{solver.unfit}; take another solver here, or use hasten.solvers.drive.solve")
        self.base, self.solver, self.lay, self.refines = base, solver, lay, refines
        self.process = process(base)
        self.config, self.order = base.config, solver.calls
        self._tells_clean = type(base).__name__ == "LCMScheduler"  # its pipelines take the clean sample from a step too
        self.grid: Grid | None = None
        self.timesteps, self.sigmas = torch.tensor([]), torch.tensor([])
        self.num_inference_steps: int | None = None
        self._calls: list[Node] = []
        self._told = torch.tensor([])
        self._running: Steps | None = None
        self._node: Node | None = None
        self._begin: int | None = None
        self.generator: Any = None
        self.step_index: int | None = None

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply their first noise by: what `base` would, in hasten's units."""
        if not self.process.wide:
            return 1.0
        return float(self.base.init_noise_sigma / (self.base.sigmas.max() ** 2 + self.process.unit**2) ** 0.5)

    @property
    def running(self) -> bool:
        """Between the first step of a trajectory and its last."""
        return self._running is not None

    @property
    def begin_index(self) -> int | None:
        """Where in `timesteps` the pipeline said it starts."""
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Raises ValueError where the solver can't start there."""
        if self._calls and begin_index:
            self._since(begin_index)
        self._begin = begin_index

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, *,
        sigmas: Any = None, timesteps: Any = None, **more: Any,
    ) -> None:  # fmt: skip
        """As every diffusers scheduler; `sigmas` and what more there is (`mu`) go to `base` where its times are kept,
        and `timesteps` are then the times."""
        grid = self._grid(num_inference_steps, sigmas, timesteps, more)
        if grid is not self.grid:
            self.grid, self._calls = grid, visited(self.solver, grid)
            self._told = torch.tensor([self.process.timestep(n.t) for n in self._calls], dtype=torch.float32)
            levels = [self.process.level(n) for n in (*self._calls, grid.nodes[-1])]
            self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.timesteps = self._told.to(device)
        self.num_inference_steps = len(grid)
        self._running = self._begin = self.step_index = None

    def _grid(self, steps: int | None, sigmas: Any, timesteps: Any, more: dict[str, Any]) -> Grid:
        """The grid laid, asked for or planned; the one there is where nothing changed, as from picture to picture."""
        if self.lay is not None:
            steps = steps or len(sigmas if sigmas is not None else timesteps)
            if self.grid is not None and len(self.grid) == steps:
                return self.grid
            return self.lay(self.process.path, steps)
        if timesteps is not None:
            times = asked(timesteps, self.process)
        else:
            given = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
            self.base.set_timesteps(device="cpu", **given, **{k: v for k, v in more.items() if v is not None})
            times = planned(self.base, self.process)
        if self.grid is not None and [n.t for n in self.grid.nodes] == times:
            return self.grid
        return at(self.process.path, times)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, generator: Any = None,
        **more: Any,
    ) -> Any:  # fmt: skip
        """One network call on: `sample` [B, ...] at `timestep` and what the network said there give the next state.

        Raises:
            ValueError: the network answered NaN (seen at once on a CPU, at the last step on other devices), or the
                pipeline asks for more than a step in one time.
        """
        if more and (strange := {k for k, v in more.items() if v is not None} - IGNORED):
            raise ValueError(f"{', '.join(sorted(strange))}: no solver of hasten does that; leave out solver and grid")
        if self._running is None:
            self._start(timestep, sample, generator)
        assert self.grid is not None
        assert self._running is not None
        assert self._node is not None
        wide = sample.float()  # solvers run in float32 whatever the network's precision
        p_at = self._node
        p = self.process.read(model_output.float(), wide, p_at)
        try:
            after, self._node = self._running.send(p)
        except StopIteration as end:
            after, self._running = end.value, None
            if (gain := self.process.gain(self.grid.nodes[-1])) != 1:
                after = after * gain
        if (self._running is None or after.is_cpu) and math.isnan(after.sum()):  # a NaN reaches the sum in one pass
            raise ValueError(f"NaN after the call at t = {p_at.t:.4f}: the network answered it; use a wider precision")
        self.step_index = (self.step_index or 0) + 1
        after = after if after.dtype == sample.dtype else after.to(sample.dtype)
        stepped = Stepped(after, p, self.process.unit)
        if return_dict:
            return stepped
        return (after, stepped.pred_original_sample) if self._tells_clean else (after,)

    def _start(self, timestep: Any, sample: Tensor, generator: Any) -> None:
        if self.grid is None:
            raise RuntimeError("call set_timesteps before step")
        begin = self._begin if self._begin is not None else self.index_for_timestep(timestep)
        rng = self.generator if generator is None else generator
        noise = Brownian.of(rng) if self.refines else _fresh(rng)
        self._running = self.solver(sample.float(), self._since(begin), noise)
        _, self._node = next(self._running)
        self.step_index = begin

    def _since(self, begin: int) -> Grid:
        """The grid from call `begin` on. Raises ValueError where the solver's calls from there are not those that were
        announced."""
        assert self.grid is not None
        if begin == 0:
            return self.grid
        node = self._calls[begin]
        rest = self.grid.since(self.grid.nodes.index(node)) if node in self.grid.nodes else None
        if rest is None or visited(self.solver, rest) != self._calls[begin:]:
            raise ValueError(
                f"{self.solver.name} asks otherwise at its start than later, so it can't start after "
                f"{begin} of {len(self._calls)} calls; take strength 1, or another solver"
            )
        return rest

    def index_for_timestep(self, timestep: Any) -> int:
        """Place of the nearest time in `timesteps`; the one number that is read from the device, once a trajectory."""
        value = float(timestep)
        return min(range(len(self._calls)), key=lambda i: abs(self.process.timestep(self._calls[i].t) - value))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma eps at `timesteps`, [B]: where image-to-image starts."""
        t = self.process.t(timesteps.to(device=original_samples.device, dtype=torch.float64))
        t = t.reshape(-1, *[1] * (original_samples.ndim - 1)).clamp(0, 1)
        alpha, sigma = self.process.path.alpha(t) / self.process.unit, self.process.path.sigma(t)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))


def _fresh(rng: Any) -> Noise:
    """As diffusers' own draw it, one draw an increment: what is asked for on one way never overlaps."""

    def noise(start: float, stop: float, like: Tensor) -> Tensor:
        drawn: Tensor = randn_tensor(like.shape, generator=rng, device=like.device, dtype=like.dtype)
        return drawn

    return noise
