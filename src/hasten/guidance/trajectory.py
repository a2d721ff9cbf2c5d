"""How far along its trajectory a guidance is, for those that remember or count."""

from __future__ import annotations

from math import inf

from hasten.grid import Node
from hasten.moment import now


class Trajectory:
    """Counts the evaluations of one trajectory.

    A trajectory begins where the driver says so (another `run`), and where time rises or is at its first value again:
    samplers go from noise to data. One trajectory at a time; a solver that goes back up (churn, restarts) begins anew
    there, and one that is left half way must not be followed, undriven, by one that starts below.
    """

    def __init__(self) -> None:
        self._run, self._first, self._last, self._step = -1, -inf, -inf, 0

    def step(self, node: Node) -> int:
        """Evaluations before this one, 0 at the first; to be called once an evaluation."""
        run = now().run
        if run != self._run or node.t >= self._first or node.t > self._last:
            self._run, self._first, self._step = run, node.t, 0
        else:
            self._step += 1
        self._last = node.t
        return self._step
