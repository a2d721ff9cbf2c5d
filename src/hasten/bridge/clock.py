"""Tells every forward of a pipeline's network which moment it is, without the pipeline's help."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from torch import Tensor, nn

from hasten import moment
from hasten.bridge.process import Process, planned
from hasten.grid import Node, nodes
from hasten.halves import batch, swapped
from hasten.moment import Branch, Moment
from hasten.patch import Patch

LAST = 512
"""Calls whose times are kept."""


class Clock:
    """Counts on the host: `set_timesteps` starts a trajectory, `step` ends an evaluation, forwards in between are
    branches: both in one batch where the network sees twice the rows that the pipeline made, else one after the other,
    the conditional first.

    Attributes:
        sign: -1 where the network says the negative of its target, or the pipeline negates it.
        turned: in a batch of both branches the pipeline puts the conditional half first; methods see it second.
        rows: of latents that the pipeline made in the running call; None where it does not say.
        guided: classifier-free guidance is on in the running call.
        scales: of that guidance, one a network, the last for the rest; None where the call has none.
        calls, seconds: network calls and the time spent in them since it was put in.
        tallies: of the methods at work, in which "reused" counts.
        full, short: seconds of the last calls in which nothing was reused, and in which something was.
    """

    def __init__(self, process: Process | None, negated: bool = False, turned: bool = False) -> None:
        self.process, self.guided, self.turned = process, True, turned
        self.sign = (-1.0 if negated else 1.0) * (process.sign if process is not None else 1.0)
        self.rows: int | None = None
        self.scales: tuple[float | None, ...] = (None,)
        self.calls, self.seconds, self.trajectories = 0, 0.0, 0
        self.tallies: list[Counter[str]] = []
        self.full: deque[float] = deque(maxlen=LAST)
        self.short: deque[float] = deque(maxlen=LAST)
        self._times: list[float] = []
        self._nodes: list[Node] = []
        self._run = self._step = self._branch = 0
        self._offset: int | None = None
        self._sizes: dict[int, tuple[int, ...]] = {}  # of each network's input, less its batch

    def install(self, scheduler: Any, networks: list[nn.Module]) -> Patch:
        """Wraps the scheduler's `set_timesteps` and `step`, and each network's forward."""
        with Patch() as patch:
            patch.after(scheduler, "set_timesteps", lambda: self._start(scheduler))
            patch.after(scheduler, "step", self._advance)
            for which, net in enumerate(networks):
                patch.wrap(net, self._forward(scheduler, which))
            return patch.keep()

    def _start(self, scheduler: Any) -> None:
        times = scheduler.timesteps.tolist()
        if self.process is not None and times != self._times:  # most pictures go as the one before
            self._nodes = _placed(scheduler, self.process, times)
        self._times = times
        self._run, self._step, self._branch, self._offset = self._run + 1, 0, 0, None
        self.trajectories += 1

    def _advance(self) -> None:
        self._step, self._branch = self._step + 1, 0

    def _forward(self, scheduler: Any, which: int) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._sized(which, args, kwargs)
            here = self._moment(scheduler, which, args, kwargs)
            self._branch += 1
            before, began = self._reused(), time.perf_counter()
            turn = self.turned and here.branch == "both"
            size = batch(args, kwargs) if turn else 0
            with moment.at(here):
                out = forward(*swapped(args, size), **swapped(kwargs, size)) if turn else forward(*args, **kwargs)
            out = swapped(out, size) if turn else out
            spent = time.perf_counter() - began
            self.calls, self.seconds = self.calls + 1, self.seconds + spent
            (self.full if self._reused() == before else self.short).append(spent)
            return out

        return around

    def _sized(self, which: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What was kept of another size is of no use: from where a solver resizes its state on, it is another run."""
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        if isinstance(x, Tensor) and self._branch == 0:
            size = tuple(x.shape[1:])
            self._run += self._sizes.get(which, size) != size
            self._sizes[which] = size

    def _reused(self) -> int:
        return sum(tally["reused"] for tally in self.tallies)

    def gain(self) -> float | None:
        """How many times faster the last calls were than if each had taken as long as one without reuse, by medians;
        None before there was any of either kind. On an accelerator, whose work is not waited for, it means nothing."""
        if not self.short or not self.full:
            return None
        full, short = median(self.full), median(self.short)
        return full * (len(self.full) + len(self.short)) / (full * len(self.full) + short * len(self.short))

    def _moment(self, scheduler: Any, which: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
        if self._offset is None:
            self._offset = self._first(scheduler, args, kwargs)
        place = min(self._offset + self._step, len(self._times) - 1)
        node = self._nodes[place] if self._nodes else None
        t = node.t if node is not None else self._times[place] / 1000 if self._times else 0.0
        steps, scale = max(1, len(self._times) - self._offset), self.scales[min(which, len(self.scales) - 1)]
        target = self.process.target if self.process is not None else None
        ahead, branch = tuple(self._times[place:]), self._which(args, kwargs)
        return Moment(self._step, steps, t, self._run, branch, scale, node, target, self.sign, ahead)

    def _which(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Branch:
        if self.rows is None:
            return "other" if self._branch else "both" if self.guided else "cond"
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        together = len(x) // self.rows if isinstance(x, Tensor) else 0
        if together == 1:
            return ("cond", "uncond", "other")[min(self._branch, 2)]
        return "both" if together == 2 and not self._branch else "other"

    def _first(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Where in the timesteps this trajectory starts: what the pipeline told the scheduler, else the nearest
        time."""
        begin = getattr(scheduler, "begin_index", None)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if begin is not None or timestep is None or not self._times:
            return int(begin or 0)
        value = float(timestep.reshape(-1)[0]) if hasattr(timestep, "reshape") else float(timestep)
        nearest = min(range(len(self._times)), key=lambda i: abs(self._times[i] - value))
        told_as_is = abs(self._times[nearest] - value) <= 0.01 * abs(value)  # some networks count in other units
        return nearest if told_as_is else 0


def _placed(scheduler: Any, process: Process, timesteps: list[float]) -> list[Node]:
    """A node for each evaluation, which ends at the next one's; the last ends clean. None for times off the path."""
    try:
        times = planned(scheduler, process)
    except ValueError:
        return []
    if len(times) != len(timesteps) + 1:  # some are asked at twice
        times = [*(min(1.0, max(0.0, process.t(s))) for s in timesteps), 0.0]
    return [replace(a, end=b) for a, b in pairwise(nodes(process.path, times))]
