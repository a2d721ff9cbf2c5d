"""How long a pipeline's denoising takes, and how often it calls its network."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from hasten.bridge.pipelines import networks
from hasten.patch import Patch


class Stopwatch:
    """Of the last call of a pipeline: seconds from `set_timesteps` to the last scheduler step, and network calls.

    Attributes:
        seconds: denoising time of the last call, s; the device is waited for at both ends.
        calls: network forwards of the last call.
    """

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self._began = 0.0

    def install(self, pipe: Any) -> Patch:
        """Works on a plain and on an accelerated pipeline; take it off before the handle under it."""
        with Patch() as patch:
            patch.after(pipe.scheduler, "set_timesteps", self._start)
            patch.after(pipe.scheduler, "step", self._stop)
            for net in networks(pipe).values():
                patch.wrap(net, self._count)
            return patch.keep()

    def _count(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return forward(*args, **kwargs)

    def _start(self) -> None:
        self.calls, self._began = 0, _now()

    def _stop(self) -> None:
        self.seconds = _now() - self._began


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
