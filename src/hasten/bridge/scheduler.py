"""Every solver as a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hasten.bridge.process import planned, process
from hasten.brownian import Brownian
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.solvers.declare import Solver, Steps
from hasten.solvers.drive import visited

Lay = Callable[[Path, int], Grid]


class SolverScheduler:
    """Runs a `Solver` inside an ordinary pipeline, which keeps its loop.

    Times are floats throughout, found on the host: no step asks the device for a number. The state is what the
    pipeline hands to `step`, so edits of latents between steps are honoured; where a pipeline starts in the middle of
    `timesteps`, the solver starts there.

    Attributes:
        base: the scheduler it stands in for; it gives configuration, path and, where no grid is laid, its own times.
        lay: (path, steps) -> Grid; None keeps the times of `base`.
        order: network calls a step, as pipelines count them.
        generator: where stochastic solvers get their noise, if the pipeline passes none to `step`.
    """

    init_noise_sigma = 1.0

    def __init__(self, base: Any, solver: Solver, lay: Lay | None = None) -> None:
        if solver.unfit:
            raise ValueError(f"{solver.unfit}; take another solver here, or use hasten.solvers.drive.solve")
        self.base, self.solver, self.lay = base, solver, lay
        self.process = process(base)
        self.config, self.order = base.config, solver.calls
        self.grid: Grid | None = None
        self.timesteps, self.sigmas = torch.tensor([]), torch.tensor([])
        self.num_inference_steps: int | None = None
        self._calls: list[Node] = []
        self._laid: Grid | None = None
        self._planned: Grid | None = None
        self._running: Steps | None = None
        self._node: Node | None = None
        self._begin: int | None = None
        self.generator: Any = None
        self.step_index: int | None = None

    @property
    def begin_index(self) -> int | None:
        """Where in `timesteps` the pipeline said it starts."""
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin = begin_index

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, *,
        sigmas: Any = None, mu: float | None = None, timesteps: Any = None,
    ) -> None:  # fmt: skip
        """As every diffusers scheduler; `sigmas`, `mu` and `timesteps` go to `base` where its times are kept."""
        if self.lay is None:
            given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
            used = {k: v for k, v in given.items() if v is not None}
            if not (sigmas is not None or timesteps is not None):
                used["num_inference_steps"] = num_inference_steps
            self.base.set_timesteps(device="cpu", **used)
            self.grid = at(self.process.path, planned(self.base, self.process))
        else:
            steps = num_inference_steps or len(sigmas if sigmas is not None else timesteps)
            if self._laid is None or len(self._laid) != steps:
                self._laid = self.lay(self.process.path, steps)
            self.grid = self._laid
        if self.grid != self._planned:  # most pictures are laid as the one before
            self._planned, self._calls = self.grid, visited(self.solver, self.grid)
        times = [self.process.timestep(n.t) for n in self._calls]
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        sigmas_visited = [n.sigma for n in (*self._calls, self.grid.nodes[-1])]
        self.sigmas = torch.tensor(sigmas_visited, dtype=torch.float32, device=device)
        self.num_inference_steps = len(self.grid)
        self._running = self._begin = self.step_index = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, generator: Any = None,
        **_: Any,
    ) -> Any:  # fmt: skip
        """One network call on: `sample` [B, ...] at `timestep` and what the network said there give the next state.

        Raises:
            ValueError: the network answered NaN (seen at once on a CPU, at the last step on other devices).
        """
        if self._running is None:
            self._start(timestep, sample, generator)
        assert self._running is not None
        assert self._node is not None
        wide = sample.float()  # solvers run in float32 whatever the network's precision
        p_at = self._node
        p = Prediction.of(self.process.target, model_output.float(), wide, p_at)
        try:
            after, self._node = self._running.send(p)
        except StopIteration as end:
            after, self._running = end.value, None
        if (self._running is None or after.device.type == "cpu") and bool(torch.isnan(after).any()):
            raise ValueError(f"NaN after the call at t = {p_at.t:.4f}: the network answered it; use a wider precision")
        self.step_index = (self.step_index or 0) + 1
        after = after.to(sample.dtype)
        return SimpleNamespace(prev_sample=after) if return_dict else (after,)

    def _start(self, timestep: Any, sample: Tensor, generator: Any) -> None:
        if self.grid is None:
            raise RuntimeError("call set_timesteps before step")
        begin = self._begin if self._begin is not None else self.index_for_timestep(timestep)
        first = self.grid.nodes.index(self._calls[begin])
        noise = Brownian.of(self.generator if generator is None else generator) if self.solver.stochastic else None
        self._running = self.solver(sample.float(), self.grid.since(first), noise)
        _, self._node = next(self._running)
        self.step_index = begin

    def index_for_timestep(self, timestep: Any) -> int:
        """Place of the nearest time in `timesteps`; the one number that is read from the device, once a trajectory."""
        value = float(timestep)
        return min(range(len(self._calls)), key=lambda i: abs(self.process.timestep(self._calls[i].t) - value))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma eps at `timesteps`, [B]: where image-to-image starts."""
        t = self.process.t(timesteps.to(device=original_samples.device, dtype=torch.float64))
        t = t.reshape(-1, *[1] * (original_samples.ndim - 1)).clamp(0, 1)
        mixed = self.process.path.alpha(t) * original_samples + self.process.path.sigma(t) * noise
        return mixed.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))
