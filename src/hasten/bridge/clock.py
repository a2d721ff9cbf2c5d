"""Tells every forward of a pipeline's network which moment it is, without the pipeline's help."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from hasten import moment
from hasten.bridge.process import Process
from hasten.moment import Branch, Moment
from hasten.patch import Patch


class Clock:
    """Counts on the host: `set_timesteps` starts a trajectory, `step` ends an evaluation, forwards in between are
    branches.

    Attributes:
        two_calls: the pipeline asks for the branches one after the other, the conditional first; else in one batch.
        guided: classifier-free guidance is on in the running call.
        calls, seconds: network calls and the time spent in them since it was put in.
    """

    def __init__(self, process: Process | None, two_calls: bool) -> None:
        self.process, self.two_calls, self.guided = process, two_calls, True
        self.calls, self.seconds, self.trajectories = 0, 0.0, 0
        self._times: list[float] = []
        self._run = self._step = self._branch = 0
        self._offset: int | None = None

    def install(self, scheduler: Any, networks: list[nn.Module]) -> Patch:
        """Wraps the scheduler's `set_timesteps` and `step`, and each network's forward."""
        with Patch() as patch:
            patch.after(scheduler, "set_timesteps", lambda: self._start(scheduler.timesteps.tolist()))
            patch.after(scheduler, "step", self._advance)
            for net in networks:
                patch.wrap(net, self._forward(scheduler))
            return patch.keep()

    def _start(self, times: list[float]) -> None:
        self._times = times
        self._run, self._step, self._branch, self._offset = self._run + 1, 0, 0, None
        self.trajectories += 1

    def _advance(self) -> None:
        self._step, self._branch = self._step + 1, 0

    def _forward(self, scheduler: Any) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here = self._moment(scheduler, args, kwargs)
            self._branch += 1
            began = time.perf_counter()
            with moment.at(here):
                out = forward(*args, **kwargs)
            self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - began
            return out

        return around

    def _moment(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
        if self._offset is None:
            self._offset = self._first(scheduler, args, kwargs)
        place = min(self._offset + self._step, len(self._times) - 1)
        timestep = self._times[place] if self._times else 0.0
        t = self.process.t(timestep) if self.process is not None else timestep / 1000
        return Moment(self._step, max(1, len(self._times) - self._offset), t, self._run, self._which())

    def _which(self) -> Branch:
        if self.two_calls:
            return ("cond", "uncond", "other")[min(self._branch, 2)]
        return "other" if self._branch else "both" if self.guided else "cond"

    def _first(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Where in the timesteps this trajectory starts: what the pipeline told the scheduler, else the nearest
        time."""
        begin = getattr(scheduler, "begin_index", None)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if begin is not None or timestep is None or not self._times:
            return int(begin or 0)
        value = float(timestep.reshape(-1)[0]) if hasattr(timestep, "reshape") else float(timestep)
        return min(range(len(self._times)), key=lambda i: abs(self._times[i] - value))
